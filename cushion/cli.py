"""The one runner: Hydra composes the configuration, `pipeline.run` does the work, the path of result.json comes last.

`cushion model=... quantizer=... search=... tuning=...` does one run, `cushion -m ...` sweeps. A user's mistake ends
with one line on standard error and exit status 1; only a bug shows a traceback.
"""

from __future__ import annotations

import gc
import logging
import os
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cushion import start, sweeps, system_errors
from cushion.config import RunConfig
from cushion.errors import ConfigError, CushionError, did_you_mean
from cushion.launching import gpu_of_its_own, share_threads
from cushion.words import check_words, in_quotes

_PACKAGE = Path(__file__).resolve().parent


def config_folder() -> Path:
    """The folder of the shipped YAML files: inside the package when installed, beside it in a checkout."""
    inside = _PACKAGE / "conf"
    return inside if inside.is_dir() else _PACKAGE.parent / "conf"


def register_schema() -> None:
    """Make the typed schema known to Hydra, once in a process; `conf/config.yaml` starts from it."""
    store = ConfigStore.instance()
    known = store.repo.get("run_schema.yaml")
    if known is None or OmegaConf.get_type(known.node) is not RunConfig:  # making a node of it is a third of composing
        store.store(name="run_schema", node=RunConfig)


def to_run_config(config: DictConfig) -> RunConfig:
    """The typed configuration; every check of every group runs here.

    Raises:
        ConfigError: a key is not one of the schema, a value is out of range, or two keys contradict each other.

    """
    for key, known in unknown_keys(config):
        last = key.rpartition(".")[2]
        raise ConfigError(
            f"{key} is not a key of the configuration{did_you_mean(last, known)} (+ and ++ add nothing to it: "
            "cushion --cfg job prints every key there is)"
        )
    run_config = OmegaConf.to_object(config)
    assert isinstance(run_config, RunConfig)
    return run_config


def unknown_keys(config: DictConfig, above: str = "") -> Iterator[tuple[str, list[str]]]:
    """The keys that the schema does not have, each with those that it has there.

    `+key=value` puts them into a configuration, and making the typed one of it would leave them out without a word.
    What a user may name freely, as `quantizer.plugins`, is checked where it is read.
    """
    kind = OmegaConf.get_type(config)
    if not (isinstance(kind, type) and is_dataclass(kind)):
        return
    known = [field.name for field in fields(kind)]
    for name in map(str, config):
        if name not in known:
            yield f"{above}{name}", known
            continue
        below = None if OmegaConf.is_missing(config, name) else config[name]
        if isinstance(below, DictConfig):
            yield from unknown_keys(below, f"{above}{name}.")


def execute(
    config: RunConfig,
    overrides: Sequence[str] = (),
    heading: str = "",
    swept: Sequence[str] = (),
    folder: Path | None = None,
) -> Path:
    """Do one run with progress bars and the configured tracker, print its table, return the path of result.json.

    Args:
        config: what to do.
        overrides: what was asked for, as Hydra has it.
        heading: what is printed above the table.
        swept: the overrides that tell the run from the others of its sweep.
        folder: the run's, where the caller has asked for it already.

    """
    from cushion import pipeline  # imports torch and transformers: not needed for --help or a refused configuration
    from cushion.events import Event, Listener, RunFinished
    from cushion.journal import kept
    from cushion.preparation import choose_device
    from cushion.progress import ProgressBars
    from cushion.reporting.figures import draw_figures, figures_of
    from cushion.reporting.tables import comparison_table, further_tables
    from cushion.schema import FILE_NAME, PREFIX
    from cushion.tracking import TRACKING_FILE, WandbTracker, noted

    def draw(event: Event) -> None:
        if isinstance(event, RunFinished):
            draw_figures(event.result, event.folder)

    folder = folder or pipeline.run_folder(config)
    tracker = WandbTracker(config.tracking, swept) if config.tracking.backend == "wandb" else None
    with ExitStack() as stack:
        stack.enter_context(start.interruptible())
        listeners: list[Listener] = [stack.enter_context(ProgressBars())]
        done = pipeline.finished(folder)
        if done is None:
            listeners.append(stack.enter_context(kept(folder, config, overrides)))
            if choose_device(config) == "cpu":
                start.keep_freed_memory()
        listeners.append(draw)  # figures are drawn before the tracker looks for them
        if tracker is not None:
            listeners.append(tracker)
        try:
            result = done or pipeline.run(config, listeners, folder)
            record = asdict(result)
            draw_figures(record, folder)  # a run that was killed between its result and its figures
            if tracker is not None:
                prefix = folder / PREFIX if result.prefix else None
                tracker.catch_up(RunFinished(folder, record, prefix), pipeline.run_name(config))
        finally:
            if tracker is not None:
                tracker.close(exit_code=0 if sys.exc_info()[0] is None else 1)
    if heading:
        print(heading)
    print(comparison_table(record))
    print()
    for table in further_tables(record):
        print(table)
        print()
    if result.prefix is not None:
        print(f"prefix   {result.prefix['text']!r}, token ids {result.prefix['token_ids']}, in {folder / PREFIX}.*")
    for figure in figures_of(record, folder).values():
        print(f"figure   {figure}")
    print(f"W&B run  {noted(folder / TRACKING_FILE).get('location') or 'none'}")
    print("results")
    path = (folder / FILE_NAME).resolve()
    print(path, flush=True)
    return path


@hydra.main(version_base="1.3", config_path=str(config_folder()), config_name="config")
def _hydra_main(config: DictConfig) -> str | float:
    _set_up()  # again: a launcher may have started this process
    try:
        with _full_disk_is_no_fault_of_logging(), _place():  # likewise
            sweep = sweeps.current() if HydraConfig.get().mode == RunMode.MULTIRUN else None
            overrides = list(HydraConfig.get().overrides.task)
            if sweep is not None and sweep.runs is None:
                sweeps.chosen(overrides)
            run = to_run_config(config)
            path = execute(run, overrides) if sweep is None else _of_sweep(sweep, run, overrides)
            return _returned(path, run.objective)
    except Exception as error:  # noqa: BLE001 - reported here, job by job: at the end of a sweep Hydra knows only the first
        start.end_if_output_is_closed(error)
        report(error)
        _release(error)
    if HydraConfig.get().mode != RunMode.MULTIRUN:
        sys.exit(1)
    raise _ReportedError  # without its cause: Hydra keeps it, and with it would keep the failed job's model


def _of_sweep(sweep: sweeps.Sweep, config: RunConfig, overrides: list[str]) -> Path:
    """Do one run of a sweep, and say which it is; beside others at work, once more above its table."""
    from cushion import pipeline
    from cushion.config_warnings import options_without_effect

    hydra_config = HydraConfig.get()
    heading = sweep.heading(hydra_config.job.num, overrides)
    print(f"\n{heading}" if hydra_config.job.num else heading, flush=True)
    alone = hydra_config.launcher._target_.endswith(".BasicLauncher")
    said, folder = options_without_effect(config), pipeline.run_folder(config)
    if sweep.runs is None:
        said = sweeps.placed(folder, said)
    with sweeps.said_before(said):
        return execute(config, overrides, "" if alone else heading, sweep.of(overrides), folder)


def _returned(path: Path, objective: str | None) -> str | float:
    from cushion.final_numbers import returned  # imports torch

    return returned(path, objective)


def _set_up() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("cushion").setLevel(logging.INFO)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


@contextmanager
def _full_disk_is_no_fault_of_logging() -> Iterator[None]:
    """Within the block, a log file that a full disk does not take (W&B's own) is no reason for a traceback a line."""
    before = logging.Handler.handleError

    def failed(handler: logging.Handler, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if error is None or not system_errors.is_full_disk(error):
            before(handler, record)

    logging.Handler.handleError = failed  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        logging.Handler.handleError = before  # type: ignore[method-assign]


def _place() -> AbstractContextManager[object]:
    """The part of the machine that a run of a sweep has, where several run at a time."""
    share_threads()
    parallel = HydraConfig.get().launcher._target_.endswith(".JoblibLauncher")
    return gpu_of_its_own() if parallel else nullcontext()


def _release(error: BaseException) -> None:
    """Let go of what the frames of a failed job hold (a model, mostly), so that the next job has the memory."""
    link: BaseException | None = error
    while link is not None:
        traceback.clear_frames(link.__traceback__)
        link = link.__cause__ or link.__context__
    gc.collect()


class _ReportedError(Exception):
    """A job of a sweep failed and the user has been told; the sweep goes on and exits with status 1."""


def report(error: BaseException) -> None:
    """Tell the user of an error on standard error: one line for a mistake, the whole traceback for a bug."""
    if isinstance(error, (CushionError, HydraException, OmegaConfBaseException)):
        print(f"cushion: error: {one_line(error)}", file=sys.stderr, flush=True)
    elif (line := system_errors.told(error, _ELSEWHERE)) is not None:
        print(f"cushion: error: {line}", file=sys.stderr, flush=True)
    else:
        traceback.print_exception(error)


_ELSEWHERE = "name another place with paths.output_dir, paths.cache_dir or paths.model_dir"

_SWEEPERS = ("optuna", "ax", "nevergrad")
"""Hydra's sweepers that are packages of their own, `hydra-<name>-sweeper`."""


def main() -> None:
    """Entry point of the command `cushion`."""
    _set_up()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands errors on instead of printing them; they are printed below
    try:
        register_schema()
        with _full_disk_is_no_fault_of_logging():
            check_words(sys.argv[1:], config_folder())
            try:
                _hydra_main()
            except _ReportedError:
                _close_sweep()
                sys.exit(1)
            _close_sweep()
    except Exception as error:  # noqa: BLE001 - told to the user, and the exit status says so
        start.end_if_output_is_closed(error)
        report(error)
        sys.exit(1)
    except KeyboardInterrupt:
        start.say_interrupted()
        sys.exit(start.INTERRUPTED)
    finally:
        sweeps.end()


def _close_sweep() -> None:
    """Print what a sweep came to, behind its last run."""
    text = sweeps.closing()
    if text is not None:
        print(f"\n{text}", flush=True)


MOVED = {
    "eval.bos": "use bos, which is for all texts of a run: bos=always for eval.bos=block, bos=never for none",
    "eval.add_bos": "use bos, which is for all texts of a run: bos=always for eval.add_bos=true, bos=never for false",
}
"""Keys of former versions, and what took their place."""

_HINT = re.compile(r" ?To append to your (?:config|default list) use \+.*| ?Or add a second \+ to add or override.*")
"""In a line: Hydra's advice to add what is not there: nothing can be added to this configuration."""

_NOISE = ("reference_type=", "object_type=", "full_key:", "Config search path", "provider=")


def one_line(error: BaseException) -> str:
    """The message of an error and of what caused it in one line, with the nearest key where a key is misspelt."""
    if isinstance(error, OverrideParseException) and (way_out := in_quotes(error.override)) is not None:
        return f"{error.override} is not read as key=value: put its text in quotes, {way_out}"
    parts: list[str] = []
    link: BaseException | None = error
    while link is not None:
        lines = [_HINT.sub("", line).strip() for line in str(link).splitlines()]
        text = " ".join(line for line in lines if line and not line.startswith(_NOISE))
        if text and not any(text in part for part in parts):
            parts.append(text)
        link = link.__cause__ if isinstance(error, HydraException) else None
    nested = " ".join(_nested_options(error))
    for key in (str(getattr(link, "full_key", None)) for link in _with_causes(error)):
        if key in MOVED:
            return f"{key} is not a key any more: {MOVED[key]}"
    sweeper = str(getattr(error, "missing_cfg_file", "")).removeprefix("hydra/sweeper/")
    if sweeper in _SWEEPERS:
        return f"hydra/sweeper={sweeper} is not installed: pip install hydra-{sweeper}-sweeper"
    cause = _misspelt(error)
    return ": ".join(parts) + (f" {nested}" if nested else "") + (did_you_mean(*cause) if cause else "")


def _nested_options(error: BaseException) -> list[str]:
    """The options in folders of the group in which one was not found, as they are written; Hydra names none of them."""
    if not isinstance(error, MissingConfigException) or not error.missing_cfg_file or not error.options:
        return []
    group = config_folder() / error.missing_cfg_file.partition("/")[0]
    if not any(group.glob("*.yaml")):  # `hydra`: not a group itself, but a folder of groups
        return []
    return sorted(path.relative_to(group).with_suffix("").as_posix() for path in group.glob("*/*.yaml"))


def _misspelt(error: BaseException) -> tuple[str, list[str]] | None:
    """The unknown key or option that an error is about and those there are, if that is what it is about."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        nested = _nested_options(error)
        parts = error.missing_cfg_file.split("/")
        return "/".join(parts[1:] if nested else parts[-1:]), [*error.options, *nested]
    for link in _with_causes(error):
        if isinstance(link, OmegaConfBaseException) and link.key is not None:
            parent: Any = link.parent_node
            if OmegaConf.is_dict(parent) and link.key not in parent:
                return str(link.key), [str(key) for key in parent]
    return None


def _with_causes(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__


if __name__ == "__main__":
    main()
