"""Where a run is logged. A tracker listens to the run's events; when it fails, it says so and the run goes on."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlparse

from requests.utils import get_netrc_auth

from cushion.artifacts import write_json
from cushion.config import TrackingConfig
from cushion.events import Event, Record, RunFailed, RunFinished, RunStarted
from cushion.hashing import digest

logger = logging.getLogger(__name__)

TRACKING_FILE = "tracking.json"
"""File in the run's folder that says where its W&B run is."""

FINISH_TIMEOUT = 300.0
"""Seconds that W&B may take to upload what is left when a run ends; the rest stays on disk."""

NETWORK_TIMEOUT = 3.0
"""Seconds to wait for an answer of the W&B server before going offline."""


class WandbTracker:
    """Logs a run to Weights & Biases: configuration, search and tuning steps, curves, metrics, prefix, figures.

    Offline when there is no key or no network (or when told so); the run is always closed. A failure in here is logged
    as a warning and switches the tracker off.
    """

    def __init__(self, config: TrackingConfig) -> None:
        self._config = config
        self._run: Any = None
        self._failed = False
        self._place = Path(TRACKING_FILE)
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
            self._place.unlink(missing_ok=True)
            self.close(exit_code=1)

    def close(self, exit_code: int = 0) -> None:
        """End the W&B run if one is open; never raises."""
        run, self._run = self._run, None
        if run is None:
            return
        try:
            run.finish(exit_code=exit_code)
        except Exception as error:  # noqa: BLE001
            logger.warning("closing the W&B run failed: %s", error)

    def _log(self, event: Event) -> None:
        if isinstance(event, RunStarted):
            self._start(event)
        elif self._run is None:
            return
        elif isinstance(event, Record):
            values = {f"{event.kind}/{key}": value for key, value in event.values.items() if value is not None}
            self._run.log({f"{event.kind}/step": event.step, **values})
        elif isinstance(event, RunFinished):
            self._finish(event)
            self.close()
        elif isinstance(event, RunFailed):
            self._run.summary["error"] = event.error
            self.close(exit_code=1)

    def _start(self, event: RunStarted) -> None:
        import wandb  # slow to import, and not needed with tracking=none

        self._place = event.folder / TRACKING_FILE
        mode = self._config.mode if self._config.mode != "auto" else choose_mode()
        self._run = wandb.init(
            project=self._config.project,
            entity=self._config.entity,
            group=self._config.group or event.config["experiment"],
            name=event.name,
            id=digest(str(event.folder.resolve())),
            resume="allow" if mode == "online" else None,
            mode=cast(Any, mode),
            dir=str(event.folder),
            tags=self._config.tags or None,
            config=event.config,
            settings=wandb.Settings(console="off", silent=True, init_timeout=30, finish_timeout=FINISH_TIMEOUT),
        )
        self.location = self._run.url if mode == "online" else str(Path(self._run.dir).parent)
        write_json(self._place, {"location": self.location})
        for kind in ("search", "tuning", "curve", "perplexity", "accuracy"):
            self._run.define_metric(f"{kind}/step")
            self._run.define_metric(f"{kind}/*", step_metric=f"{kind}/step")

    def _finish(self, event: RunFinished) -> None:
        import wandb

        result = event.result
        curves = result["activations"].get("curves", {})
        for layer in range(len(next(iter(curves.values()))["top1"]) if curves else 0):
            point = {
                f"curve/{stage}/{key}": values[layer]
                for stage, curve in curves.items()
                for key, values in curve.items()
            }
            self._run.log({"curve/step": layer, **point})
        self._run.summary.update(flatten(result["metrics"]))
        self._run.log({"comparison": _comparison(result["rows"])})
        for figure in sorted((event.folder / "figures").glob("*.png")):
            self._run.log({f"figures/{figure.stem}": wandb.Image(str(figure))})
        if event.prefix is not None:
            artifact = wandb.Artifact(f"prefix-{self._run.id}", type="prefix")
            for suffix in (".safetensors", ".json"):
                artifact.add_file(str(event.prefix.with_name(event.prefix.name + suffix)))
            self._run.log_artifact(artifact)


def _comparison(rows: list[dict[str, Any]]) -> Any:
    """The rows of a result as a W&B table."""
    import wandb

    corpora = list(rows[0]["perplexity"]) if rows else []
    tasks = list(rows[0]["tasks"]) if rows else []
    columns: list[str | int] = [
        "row", "prefix", *(f"perplexity {corpus}" for corpus in corpora), *tasks, "accuracy", "accuracy_stderr",
        "largest_activation", "quantization_error", "seconds",
    ]  # fmt: skip
    table = wandb.Table(columns=columns)
    for row in rows:
        table.add_data(
            row["label"], row["prefix"], *(row["perplexity"][corpus] for corpus in corpora),
            *(row["tasks"][task]["value"] for task in tasks), row["accuracy"], row["accuracy_stderr"],
            row["largest_activation"], row["quantization_error"], row["seconds"],
        )  # fmt: skip
    return table


def choose_mode(reachable: Callable[[str, int], bool] | None = None) -> str:
    """`online` when there is a key and the server answers, else `offline`; W&B's own setting of the mode wins.

    Args:
        reachable: whether a host answers on a port; for tests.

    """
    chosen = os.environ.get("WANDB_MODE")
    if chosen in ("online", "offline", "disabled"):
        return chosen
    import wandb

    address = os.environ.get("WANDB_BASE_URL") or wandb.Settings().base_url
    base = urlparse(address)
    key = os.environ.get("WANDB_API_KEY") or get_netrc_auth(address)  # where `wandb login` keeps it
    port = base.port or (443 if base.scheme == "https" else 80)
    return "online" if key and (reachable or _reachable)(base.hostname or "", port) else "offline"


def _reachable(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=NETWORK_TIMEOUT).close()
    except OSError:
        return False
    return True


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, keys joined with slashes."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}/")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
