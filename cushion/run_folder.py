"""Which folder a run has: named by everything that its result depends on, so that a finished run is recognised."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from cushion.code import package_version
from cushion.config import RunConfig, to_dict
from cushion.evaluation.latency_step import warn_of_another_machine
from cushion.evaluation.local_tasks import local_task_files
from cushion.evaluation.tasks import own_task_files
from cushion.hashing import digest
from cushion.moving_names import resolved
from cushion.places import check_apart
from cushion.preparation import choose_device
from cushion.registry import PLUGINS
from cushion.results import RunResult, finished_result
from cushion.sources import local_files
from cushion.step import runtime


def run_folder(config: RunConfig, device_kind: str | None = None) -> Path:
    """`<output_dir>/<experiment>/<model>/<quantizer>-<search>-<tuning>/<hash of what matters>`.

    A run with a reconstruction has `-<reconstruction>` behind the tuning.

    The hash covers the whole configuration but for tracking, objective and places, the code of everything that
    decides a number (of plugins too), the versions of torch and transformers, what names that move mean now (a
    model's commit, packages that ship weights or text), the device, and size and time of the files that the user names
    as text or as model. `device_kind` (`cpu` or `cuda`) asks for the folder on a machine with another device than
    this one's.

    Raises:
        ConfigError: a folder that is read with everything in it is written to by the run, so that what it reads would
            be another thing at its end.

    """
    check_apart(config)
    identity = to_dict(config)
    del identity["tracking"], identity["experiment"], identity["objective"]
    identity["paths"] = {"data_dir": config.paths.data_dir}
    identity["code"] = package_version()
    identity["runtime"] = runtime(device_kind or choose_device(config).partition(":")[0])
    if config.eval.tasks:
        identity["lm_eval"] = version("lm_eval")
    identity["resolved"] = resolved(config)
    plugins = PLUGINS.versions()
    if plugins:
        identity["plugins"] = plugins
    identity["inputs"] = [_file_identity(path) for path in _local_inputs(config)]
    output = Path(config.paths.output_dir).expanduser()
    return output / config.experiment / config.model.label / _row(config) / digest(identity, 12)


def finished(folder: Path) -> RunResult | None:
    """The result of a run that is done already, else None; with a warning if its latency is of another machine."""
    done = finished_result(folder)
    if done is not None:
        warn_of_another_machine(done.environment)
    return done


def run_name(config: RunConfig) -> str:
    """How a run is called in a tracker: what was chosen by name."""
    return f"{config.model.label}-{_row(config)}"


def _row(config: RunConfig) -> str:
    """What was chosen by name beside the model: the reconstruction where there is one."""
    names = [config.quantizer.name, config.search.name, config.tuning.name]
    return "-".join([*names, config.reconstruction.name] if config.reconstruction.is_on else names)


def _local_inputs(config: RunConfig) -> list[Path]:
    model = Path(config.model.path).expanduser()
    weights = sorted(path for path in model.iterdir() if path.is_file()) if model.is_dir() else []
    tasks = local_task_files(config.eval, config.paths) + own_task_files(config.eval)
    return local_files(config.data, config.paths) + tasks + weights


def _file_identity(path: Path) -> list[Any]:
    if not path.is_file():
        return [path.name, None]
    stat = path.stat()
    return [path.name, stat.st_size, stat.st_mtime_ns]
