"""What a run's folder says of how it came about: `overrides.yaml`, `config.yaml` and `run.log`.

They are written when the run starts, so that a run that fails or is killed has them too. Nothing reads them to tell
whether a run is done, and nothing in them decides a number.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from omegaconf import OmegaConf

import cushion
from cushion.config import RunConfig, to_dict
from cushion.events import Event, Listener, Progress, RowMeasured
from cushion.metrics.columns import Place, columns
from cushion.reporting.tables import cell_text
from cushion.schema import LOG

OVERRIDES, CONFIG = "overrides.yaml", "config.yaml"
FILES = (OVERRIDES, CONFIG, LOG)

_LINE = "%(asctime)s %(levelname)s %(message)s"


@contextmanager
def kept(folder: Path, config: RunConfig, overrides: Sequence[str]) -> Iterator[Listener]:
    """Keep a run's overrides and configuration, and within the block its log; yields what listens to its events.

    The log has what is logged anyhow, each stage as it begins, each row, and the traceback of what ends the block. A
    run that is started again adds to it.

    Args:
        folder: the run's; made if need be.
        config: the whole configuration.
        overrides: of the command line and of the sweep, as Hydra has them.

    """
    from cushion.results import make_folder  # imports torch

    make_folder(folder)
    (folder / OVERRIDES).write_text(OmegaConf.to_yaml(OmegaConf.create(list(overrides))), encoding="utf-8")
    (folder / CONFIG).write_text(OmegaConf.to_yaml(OmegaConf.create(to_dict(config))), encoding="utf-8")
    handler = logging.FileHandler(folder / LOG, encoding="utf-8")
    handler.setFormatter(logging.Formatter(_LINE))
    log = logging.Logger("cushion.run", logging.INFO)  # a logger of its own: what it says stands in the file alone
    log.addHandler(handler)
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        log.info("Cushion %s: cushion %s", cushion.__version__, shlex.join(overrides))
        yield _Stages(log)
        log.info("done")
    except BaseException:
        log.exception("the run ends here")
        raise
    finally:
        root.removeHandler(handler)
        handler.close()


class _Stages:
    """Logs each stage of a run as it begins, and each row."""

    def __init__(self, log: logging.Logger) -> None:
        self._log, self._stage = log, ""

    def __call__(self, event: Event) -> None:
        """Log an event."""
        if isinstance(event, Progress) and event.stage != self._stage:
            self._stage = event.stage
            self._log.info("%s, from %s of %s (%s)", event.stage, event.done, event.total, event.unit)
        elif isinstance(event, RowMeasured):
            place = Place.COMPARISON
            shown = columns([event.row], place)
            texts = (f"{column.named(place)} {cell_text(column, event.row, place)}" for column in shown)
            self._log.info("%s: %s", event.row["label"], ", ".join(texts))
