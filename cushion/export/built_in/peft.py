"""The target `peft`: the run's prefix as an adapter that stock PEFT puts before every text."""

from __future__ import annotations

from cushion.export.finished import FinishedRun
from cushion.export.targets import ExportTarget, register


def _check(run: FinishedRun) -> None:
    run.require_prefix()
    run.base_model()


register(
    ExportTarget(
        name="peft",
        title="the prefix as a PEFT adapter (PREFIX_TUNING)",
        check=_check,
        write="cushion.export.peft_adapter:write",
    )
)
