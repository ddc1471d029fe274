"""Where a run is logged. A tracker listens to the run's events; when it fails, it says so and the run goes on.

What W&B gets of a run, and what becomes of it when the run is started again: docs/reports.md.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlparse

from filelock import FileLock, Timeout
from requests.utils import get_netrc_auth

from cushion.artifacts import read_json, write_json
from cushion.config import ModelConfig, TrackingConfig
from cushion.errors import ArtifactError
from cushion.events import Event, Record, RowMeasured, RunFailed, RunFinished, RunStarted
from cushion.final_numbers import final_numbers, numbers_of_rows
from cushion.flat import flatten
from cushion.metrics.columns import Place, columns
from cushion.schema import LEARNED, RECONSTRUCTED

logger = logging.getLogger(__name__)

TRACKING_FILE = "tracking.json"
"""File in the run's folder that says where its W&B run is."""

FINISH_TIMEOUT = 300.0
"""Seconds that W&B may take to upload what is left when a run ends; the rest stays on disk."""

NETWORK_TIMEOUT = 3.0
"""Seconds to wait for an answer of the W&B server before going offline."""


SERIES = {"search": "step", "tuning": "step", "activations": "block"}
"""The curves of a run: what is logged as `<series>/...`, over `<series>/<its step>`."""

SUMMED_UP = ("search", "activations")
"""The curves whose last point is not what the summary should say: `summed_up` says it."""

BEFORE_AND_AFTER = "largest_activation_by_block"
"""The chart of the largest magnitude at the input of each block, a line for each stage: no prefix, found, tuned."""


class WandbTracker:
    """Logs a run to Weights & Biases: configuration, search and tuning steps, curves, metrics, prefix, figures.

    Offline when there is no key or no network (or when told so); the run is always closed. A failure in here is logged
    as a warning and switches the tracker off. What it logs has the same keys in every run, so that the runs of a sweep
    can be laid over each other there; docs/reports.md lists them.

    A run that is started again after it was killed or failed is the same W&B run: offline it is logged anew, and what
    the process before left is removed; online, what the server has is not sent again. It is a new W&B run where the
    server has what an offline one would log anew: the offline run was sent meanwhile, or the run was online before.
    """

    def __init__(self, config: TrackingConfig, swept: Sequence[str] = ()) -> None:
        """`swept` are the overrides that tell the run from the others of its sweep: its name and tags say them."""
        self._config, self._swept = config, list(swept)
        self._run: Any = None
        self._failed = False
        self._place = Path(TRACKING_FILE)
        self._id: str | None = None
        self._mode: str | None = None
        self._sent: dict[str, float] = {}
        self.location: str | None = None
        """Where the run can be seen: its address when online, its folder when offline."""

    def __call__(self, event: Event) -> None:
        """Log an event; never raises."""
        if self._failed:
            return
        try:
            self._log(event)
        except Exception as error:  # noqa: BLE001 - whatever W&B raises, the run must go on
            logger.warning("W&B logging failed and is switched off for this run: %s", error)
            self._failed = True
            self.location = None
            if self._id is not None:
                with suppress(OSError):  # a full disk, say: what the file said before stays, and is as good
                    self._note()
            self.close(exit_code=1)

    def catch_up(self, finished: RunFinished, name: str) -> None:
        """Log a finished run whose W&B run did not end well: it was killed, failed before, or W&B did. Never raises.

        Nothing is done for a run that was not tracked, was logged to its end, or is being logged by another process.
        An agent of a W&B sweep waits for the numbers in the run that it opened, wherever else they were logged before.
        """
        place, of_agent = finished.folder / TRACKING_FILE, agents_run() is not None
        try:
            if self.location is not None or not _is_owed(noted(place)):
                return
            with FileLock(finished.folder / ".lock", timeout=FINISH_TIMEOUT if of_agent else 1):
                if not _is_owed(noted(place)):
                    return
                self(RunStarted(finished.folder, name, finished.result["config"]))
                for kind in ("search", "tuning"):
                    for step in (finished.result[kind] or {}).get("steps", []):
                        self(Record(kind, step["step"], {key: value for key, value in step.items() if key != "step"}))
                self(finished)
        except Timeout:
            if of_agent:
                logger.warning("another process holds %s: W&B's sweep gets no numbers of this run", finished.folder)
        except OSError as error:
            logger.warning("whether W&B has all of this run cannot be told: %s", error)

    def close(self, exit_code: int = 0) -> bool:
        """End the W&B run if one is open; never raises, and returns whether it ended well."""
        run, self._run = self._run, None
        if run is None:
            return True
        try:
            run.finish(exit_code=exit_code)
        except Exception as error:  # noqa: BLE001
            logger.warning("closing the W&B run failed: %s", error)
            return False
        return True

    def _log(self, event: Event) -> None:
        if isinstance(event, RunStarted):
            self._start(event)
        elif self._run is None:
            return
        elif isinstance(event, Record):
            values = {f"{event.kind}/{key}": value for key, value in event.values.items() if value is not None}
            self._log_point(event.kind, event.step, values)
        elif isinstance(event, RowMeasured):
            self._run.summary.update(numbers_of_rows([event.row]))  # not as a point: a run that goes on says them again
        elif isinstance(event, RunFinished):
            self._finish(event)
            self._end()
        elif isinstance(event, RunFailed):
            self._run.summary["error"] = event.error
            self._end(exit_code=1)

    def _end(self, exit_code: int = 0) -> None:
        """Close the run, and note that it was logged to its end."""
        if self.close(exit_code):
            self._note(exit_code)

    def _note(self, exit_code: int | None = None) -> None:
        """Write down where the W&B run is and, if it was logged to its end, how that was."""
        record = {"location": self.location, "id": self._id, "mode": self._mode}
        write_json(self._place, {**record, "ended": exit_code is not None, "exit_code": exit_code})

    def _start(self, event: RunStarted) -> None:
        import wandb  # slow to import, and not needed with tracking=none

        self._place = event.folder / TRACKING_FILE
        mode = self._config.mode if self._config.mode != "auto" else choose_mode()
        if mode == "disabled":  # there is no run, and none is noted
            return
        before, of_agent = noted(self._place), agents_run()
        self._id = of_agent or before.get("id") or secrets.token_hex(8)
        kept = list(event.folder.glob(f"wandb/offline-run-*-{self._id}*"))  # W&B adds "-1" within a second
        if of_agent is not None:
            pass  # the agent waits for the numbers in the run of this id, whatever it holds
        elif any(list(left.glob("*.wandb.synced")) for left in kept):
            self._id, kept = secrets.token_hex(8), []  # the server has what a try before this one logged
        elif mode == "offline" and before.get("mode") == "online":
            self._id = secrets.token_hex(8)  # the server has a part, and would get it again
        self._mode = mode
        names = chosen(event.config)
        labels = [name for name in names.values() if name != "none"]
        self._note()
        self._run = wandb.init(
            project=self._config.project if of_agent is None else None,  # else W&B takes those of the sweep
            entity=self._config.entity if of_agent is None else None,
            group=self._config.group or event.config["experiment"],
            job_type="tuning" if names["tuning"] != "none" else "search" if names["search"] != "none" else "evaluation",
            name=" ".join([event.name, *self._swept]),
            id=self._id if of_agent is None else None,
            resume="allow" if mode == "online" else None,
            mode=cast(Any, mode),
            dir=str(event.folder),
            tags=list(dict.fromkeys([*self._config.tags, *(name[:64] for name in [*labels, *self._swept])])),
            config={**flatten(event.config, separator="/"), **names},
            settings=wandb.Settings(
                console="off", silent=True, init_timeout=30, finish_timeout=FINISH_TIMEOUT, finish_timeout_raises=True
            ),
        )
        self.location = self._run.url if mode == "online" else str(Path(self._run.dir).parent)
        self._note()
        for left in kept:
            if left.resolve() != Path(self._run.dir).parent.resolve():
                _remove(left)
        if self._run.resumed and "error" in self._run.summary.keys():  # noqa: SIM118 - W&B's summary has no `in`
            del self._run.summary["error"]
        self._sent = {}
        for series, step in SERIES.items():
            self._run.define_metric(f"{series}/{step}", hidden=True)
            kind = "none" if series in SUMMED_UP else None
            self._run.define_metric(f"{series}/*", step_metric=f"{series}/{step}", summary=kind)
            last = self._run.summary.get(f"{series}/{step}") if self._run.resumed else None
            self._sent[series] = -1 if last is None else last

    def _log_point(self, series: str, step: int, values: dict[str, Any]) -> None:
        """Log one point of a curve, unless the server has it from before this process."""
        if step > self._sent[series]:
            self._run.log({f"{series}/{SERIES[series]}": step, **values})

    def _finish(self, event: RunFinished) -> None:
        import wandb

        result = event.result
        curves = result["activations"].get("curves", {})
        for block in range(len(next(iter(curves.values()))["top1"]) if curves else 0):
            point = {
                f"activations/{stage}/{key}": values[block]
                for stage, curve in curves.items()
                for key, values in curve.items()
            }
            self._log_point("activations", block, point)
        self._run.summary.update(summed_up(result) | final_numbers(result))
        if curves and self._run.summary.get(f"{BEFORE_AND_AFTER}_table") is None:
            self._run.log({BEFORE_AND_AFTER: _before_and_after(result["activations"])})
        if self._run.summary.get("comparison") is None:
            self._run.log({"comparison": _comparison(result["rows"])})
        for figure in sorted((event.folder / "figures").glob("*.png")):
            if self._run.summary.get(key := f"figures/{figure.stem}") is None:
                self._run.log({key: wandb.Image(str(figure))})
        if event.prefix is not None:
            artifact = wandb.Artifact(f"prefix-{self._run.id}", type="prefix", metadata=of_prefix(result))
            for suffix in (".safetensors", ".json"):
                artifact.add_file(str(event.prefix.with_name(event.prefix.name + suffix)))
            learned = event.prefix.with_name(LEARNED)
            if learned.is_file():
                artifact.add_file(str(learned))
            self._run.log_artifact(artifact)
        reconstructed = event.folder / RECONSTRUCTED
        if reconstructed.is_file() and not result["config"]["reconstruction"]["weights"]:  # weights: of a model's size
            artifact = wandb.Artifact(f"reconstruction-{self._run.id}", type="reconstruction")
            artifact.add_file(str(reconstructed))
            self._run.log_artifact(artifact)


def noted(place: Path) -> dict[str, Any]:
    """What a run's `tracking.json` says; nothing if it is not there, or (with a warning) if it cannot be read."""
    try:
        said = read_json(place) if place.is_file() else {}
        if not isinstance(said, dict):
            raise ArtifactError(f"{place} is damaged: it holds no object")
    except (OSError, ArtifactError) as error:
        logger.warning("where this run is in W&B is not known: %s", error)
        return {}
    return said


def agents_run() -> str | None:
    """The id of the W&B run that an agent of a W&B sweep opened for this process; None where none started it."""
    return (os.environ.get("WANDB_RUN_ID") or None) if os.environ.get("WANDB_SWEEP_ID") else None


def _is_owed(said: dict[str, Any]) -> bool:
    """Whether W&B has yet to get a finished run, of which `tracking.json` says this."""
    of_agent = agents_run()
    return _is_incomplete(said) or (of_agent is not None and said.get("id") != of_agent)


def _is_incomplete(said: dict[str, Any]) -> bool:
    """Whether a run was tracked, and not to a good end."""
    return said.get("ended") is False or bool(said.get("exit_code"))


def _remove(folder: Path) -> None:
    """Remove what an earlier process logged; once more if W&B's process of that one was just writing there."""
    for _ in range(2):
        shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        logger.warning("%s is of an earlier try and could not be removed", folder)


def chosen(config: dict[str, Any]) -> dict[str, str]:
    """What a user chose by name, for grouping and filtering: the model, and the option of every group."""
    groups = ("data", "quantizer", "search", "tuning", "reconstruction", "eval")
    names = {group: str(config[group]["name"]) for group in groups}
    return {"model": ModelConfig(path=config["model"]["path"]).label, **names}


def summed_up(result: dict[str, Any]) -> dict[str, Any]:
    """What the summary says of the curves of `SUMMED_UP`, by the curves' names.

    Of magnitudes over the blocks the largest; of a search what its last accepted step has, since its last step is
    often the one that was rejected. Lists are left out.
    """
    curves = result["activations"].get("curves", {})
    found = {
        f"activations/{stage}/{key}": max(values) for stage, curve in curves.items() for key, values in curve.items()
    }
    accepted = [step for step in (result["search"] or {}).get("steps", []) if step.get("accepted")]
    for key, value in accepted[-1].items() if accepted else ():
        if key != "step" and isinstance(value, int | float | str):
            found[f"search/{key}"] = value
    return found


def of_prefix(result: dict[str, Any]) -> dict[str, Any]:
    """What tells a prefix from others where only its artifact is seen: its model, itself, and the run's own numbers."""
    model = {key: result["model"].get(key) for key in ("path", "fingerprint", "dtype")}
    prefix = {key: value for key, value in result["prefix"].items() if value is not None}
    names = {key: value for key, value in chosen(result["config"]).items() if key != "model"}
    return {"model": model, "prefix": prefix, "chosen": names, "metrics": result["metrics"]}


def _before_and_after(activations: dict[str, Any]) -> Any:
    """The largest magnitude of each block, a line for each stage, in one chart."""
    import wandb

    curves = {stage: curve["top1"] for stage, curve in activations["curves"].items()}
    return wandb.plot.line_series(
        xs=list(range(len(next(iter(curves.values()))))),
        ys=list(curves.values()),
        keys=[activations["titles"][stage] for stage in curves],
        title="largest magnitude at the input of each block",
        xname="block",
    )


def _comparison(rows: list[dict[str, Any]]) -> Any:
    """The rows of a result as a W&B table."""
    import wandb

    there = columns(rows, Place.TRACKER_TABLE)
    titles: list[str | int] = ["row", "label", "prefix", *(column.named(Place.TRACKER_TABLE) for column in there)]
    table = wandb.Table(columns=titles)
    for row in rows:
        values = (row["values"].get(column.key) for column in there)
        table.add_data(row["name"], row["label"], row["prefix"], *values)
    return table


def choose_mode(reachable: Callable[[str, int], bool] | None = None) -> str:
    """`online` when there is a key and the server answers, else `offline`; W&B's own setting of the mode wins.

    That is `WANDB_MODE`, or what `wandb offline` and `wandb disabled` write. Server and key are those that W&B finds.

    Args:
        reachable: whether a host answers on a port; for tests.

    """
    said = os.environ.get("WANDB_MODE")  # at every run: W&B's own settings are those of the process's first
    if said in ("online", "run"):
        return "online"
    if said in _NOT_ONLINE:
        return _NOT_ONLINE[said]
    import wandb

    settings = wandb.setup().settings
    if settings.mode in _NOT_ONLINE and said is None:
        return _NOT_ONLINE[settings.mode]
    address = os.environ.get("WANDB_BASE_URL") or settings.base_url
    base = urlparse(address)
    key = os.environ.get("WANDB_API_KEY") or settings.api_key
    if not (key or get_netrc_auth(address) or _key_of_before(address)):
        _say_offline(f"there is no key for {base.hostname}: wandb login keeps one")
        return "offline"
    port = base.port or (443 if base.scheme == "https" else 80)
    if not (reachable or _reachable)(base.hostname or "", port):
        _say_offline(f"{base.hostname} does not answer")
        return "offline"
    return "online"


_NOT_ONLINE = {"offline": "offline", "dryrun": "offline", "disabled": "disabled"}


def _key_of_before(address: str) -> Any:
    """What a log-in kept for W&B's own server where that had its former name, which W&B takes too."""
    import wandb

    return get_netrc_auth("https://api.wandb.ai") if address == wandb.Settings().base_url else None


@lru_cache
def _say_offline(reason: str) -> None:
    """Once in a process."""
    logger.info("W&B is offline, since %s", reason)


def _reachable(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=NETWORK_TIMEOUT).close()
    except OSError:
        return False
    return True
