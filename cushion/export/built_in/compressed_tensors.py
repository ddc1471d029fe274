"""The target `compressed-tensors`: the run's quantized model, with its prefix beside it, as transformers loads it."""

from __future__ import annotations

from importlib.util import find_spec

from cushion.errors import ConfigError
from cushion.export.finished import FinishedRun
from cushion.export.targets import ExportTarget, register


def _check(run: FinishedRun) -> None:
    from cushion.export.schemes import TARGET, check_run  # not needed for --help

    check_run(run)
    if find_spec("compressed_tensors") is None:
        raise ConfigError(f"--to={TARGET} needs the package compressed-tensors: pip install 'cushion-quant[export]'")


register(
    ExportTarget(
        name="compressed-tensors",
        title="the quantized model as a checkpoint that transformers loads, with the prefix as an adapter beside it",
        check=_check,
        write="cushion.export.checkpoint:write",
    )
)
