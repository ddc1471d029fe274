"""Before the first run of a sweep: every combination is composed and checked, and the sweep's plan is written down.

Hydra's own sweeper finds a combination that does not compose only when its batch is due, and never one that our checks
refuse. The plan, `<paths.output_dir>/sweeps/plan-<hash>.json`, lets `cushion-status` say which runs are missing,
and a report which seeds.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from cushion.config import RunConfig
from cushion.errors import ConfigError, CushionError
from cushion.hashing import digest
from cushion.places import check_apart
from cushion.registry import SEARCH_METHODS
from cushion.start import interrupt_with_care
from cushion.sweeps import Sweep, begin, warn_once, which
from cushion.swept import swept_keys

PLAN = "plan-{}.json"
_JOBLIB = ".JoblibLauncher"
_OPTIMISERS = (".OptunaSweeper", ".AxSweeper", ".NevergradSweeper")
"""Sweepers that choose the next runs by the number that the runs so far returned."""


class Preflight(Callback):
    """Hydra calls this at the start of every sweep.

    Only Hydra's basic sweeper can be foreseen; of one that chooses later runs by the results of earlier ones it is
    checked that it is told which result.
    """

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Refuse the sweep, with exit status 1, unless every combination is a valid configuration.

        Raises:
            SystemExit: a combination is invalid, and it has been reported on standard error.

        """
        from cushion.cli import report
        from cushion.config_warnings import options_without_effect

        if not config.hydra.launcher._target_.endswith(".BasicLauncher"):
            interrupt_with_care()
        try:
            _check_launcher(config)
            if config.hydra.sweeper._target_ != f"{BasicSweeper.__module__}.{BasicSweeper.__name__}":
                _check_objective(config)
                begin(Sweep(None, _chosen_keys(config)))
                return
            jobs = combinations(config)
            configs = _composed(config, jobs)
            begin(Sweep(len(jobs), swept_keys(jobs)), jobs, write_plan(jobs, configs))
            warn_once(jobs, configs, options_without_effect)
        except Exception as error:  # noqa: BLE001 - reported here, since Hydra would make it a warning and go on
            report(error)
            raise SystemExit(1) from None


def _chosen_keys(config: DictConfig) -> tuple[str, ...]:
    """The keys that a sweep names values for, whatever its sweeper makes of them."""
    given = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)
    assert isinstance(given, list)
    overrides = OverridesParser.create().parse_overrides(list(map(str, given)))
    swept = [override.get_key_element() for override in overrides if override.is_sweep_override()]
    return tuple(dict.fromkeys([*map(str, config.hydra.sweeper.params or {}), *swept]))


def _check_launcher(config: DictConfig) -> None:
    """Hydra's launchers for more than one process are packages of their own."""
    target = config.hydra.launcher._target_
    if target.startswith("hydra_plugins.") and target not in Plugins.instance().class_name_to_class:
        chosen = config.hydra.runtime.choices["hydra/launcher"]
        package = target.split(".")[1].replace("_", "-")
        raise ConfigError(f"hydra/launcher={chosen} is not installed: pip install {package}")


def _check_objective(config: DictConfig) -> None:
    """A sweeper that optimises needs to know what; what it finds is said on standard error."""
    if not config.hydra.sweeper._target_.endswith(_OPTIMISERS):
        return
    swept = any(str(override).startswith("objective=") for override in config.hydra.overrides.task)
    if config.objective is None and not swept:
        raise ConfigError(
            f"hydra/sweeper={config.hydra.runtime.choices['hydra/sweeper']} needs the number that it optimises: "
            "name one of the final numbers of a run, for example objective=perplexity/wikitext2, or accuracy_mean"
        )
    logging.getLogger("hydra_plugins").setLevel(logging.INFO)


def combinations(config: DictConfig) -> list[list[str]]:
    """The overrides of every run of a sweep, in the order in which Hydra's basic sweeper runs them."""
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    params = [f"{key}={value}" for key, value in (config.hydra.sweeper.params or {}).items()]
    given = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)
    assert isinstance(given, list)
    (batch,) = BasicSweeper.split_arguments(parser.parse_overrides([*params, *map(str, given)]), max_batch_size=None)
    return batch


def _composed(config: DictConfig, jobs: list[list[str]]) -> list[RunConfig]:
    """The configuration of every run.

    Raises:
        ConfigError: some are invalid; the message says each reason once, with the first run that it concerns. Or there
            are several experiments, and one of them sweeps by itself.

    """
    from cushion.cli import one_line, to_run_config

    loader = GlobalHydra.instance().config_loader()
    configs: list[RunConfig] = []
    refused: dict[str, list[int]] = {}
    sweeping: dict[str, bool] = {}
    for number, job in enumerate(jobs):
        try:
            composed = loader.load_sweep_config(config, job)
            own = (composed.hydra.sweeper.params or {}) != (config.hydra.sweeper.params or {})
            sweeping[str(composed.hydra.runtime.choices.get("experiment"))] = own
            with open_dict(composed):
                del composed["hydra"]
            configs.append(to_run_config(composed))
            _check_device(configs[-1])
            check_apart(configs[-1])
            _check_replicas(configs[-1], config)
        except (CushionError, HydraException, OmegaConfBaseException) as error:
            refused.setdefault(one_line(error), []).append(number)
    _check_experiments(sweeping)
    if refused:
        told = [f"{reason} ({which(jobs, numbers)})" for reason, numbers in refused.items()]
        wrong = sum(map(len, refused.values()))
        raise ConfigError(
            f"{wrong} of the {len(jobs)} runs of this sweep are invalid, none was started: {'; '.join(told)}"
        )
    return configs


def _check_device(config: RunConfig) -> None:
    """Whether the device is there only the machine knows that runs; its name can be checked here."""
    if config.device.partition(":")[0] not in ("auto", "cpu", "cuda", "mps"):
        raise ConfigError(f"device={config.device!r} is not supported: auto, cpu, cuda, cuda:<number> or mps")


def _check_replicas(config: RunConfig, sweep: DictConfig) -> None:
    """Each of joblib's processes has one GPU (`launching.gpu_of_its_own`), whatever the machine has."""
    replicas = config.search.replicas
    several = "replicas" in SEARCH_METHODS[config.search.method].reads and (replicas or 1) > 1
    if several and sweep.hydra.launcher._target_.endswith(_JOBLIB):
        raise ConfigError(
            f"search.replicas={replicas} needs as many GPUs, and with hydra/launcher="
            f"{sweep.hydra.runtime.choices['hydra/launcher']} each run has one: use search.replicas=1, or "
            "hydra/launcher=basic"
        )


def _check_experiments(sweeping: dict[str, bool]) -> None:
    """Hydra reads an experiment's `hydra.sweeper.params` only where it is the only experiment of the command.

    Args:
        sweeping: by experiment of the sweep, whether it has such parameters.

    Raises:
        ConfigError: there are several experiments, and some have them, so that these would run once instead of sweep.

    """
    own = [name for name, has in sweeping.items() if has]
    if len(sweeping) > 1 and own:
        raise ConfigError(
            f"experiment={','.join(sweeping)} cannot be one sweep: {', '.join(own)} would not be swept, since Hydra "
            "reads hydra.sweeper.params of a single experiment only: give one command each"
        )


def write_plan(jobs: list[list[str]], configs: list[RunConfig]) -> list[list[Path]]:
    """Write which runs the sweep consists of; the same sweep started again writes the same file again.

    Returns the folders that each run may have.

    A run's folder depends on the kind of device. Where the runs will have one that this machine lacks (the log-in node
    of a cluster, say) is not known here, so with `device=auto` the folders of both kinds are named.
    """
    from cushion.artifacts import write_json  # both import torch: not needed where a sweep is refused
    from cushion.pipeline import run_folder

    by_place: dict[Path, list[dict[str, Any]]] = {}
    places: list[list[Path]] = []
    for job, config in zip(jobs, configs, strict=True):
        output = Path(config.paths.output_dir).expanduser()
        kinds = ("cpu", "cuda") if config.device == "auto" else (config.device.partition(":")[0],)
        places.append([run_folder(config, kind) for kind in kinds])
        folders = [folder.relative_to(output).as_posix() for folder in places[-1]]
        run = {"overrides": job, "experiment": config.experiment, "folders": folders}
        by_place.setdefault(output, []).append({**run, "seed": config.seed, "model": config.model.label})
    for output, runs in by_place.items():
        name = PLAN.format(digest([run["overrides"] for run in runs], 12))
        write_json(output / "sweeps" / name, {"runs": runs})
    return places
