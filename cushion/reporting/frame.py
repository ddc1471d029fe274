"""Results as a tidy data frame: one line for each run, row and measure, seeds not averaged."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cushion.errors import ConfigError, did_you_mean
from cushion.flat import flatten
from cushion.metrics.columns import Column, Place, Row, columns
from cushion.reporting.collect import Run, collect
from cushion.reporting.runs import varying

if TYPE_CHECKING:
    import pandas as pd

_GROUPS = ("quantizer.name", "search.name", "tuning.name")
_OF_A_RUN = ("experiment", "model", "seed", "status")
_OF_A_ROW = ("row", "label", "stage", "prefix", "quantized")
_OF_A_MEASURE = ("measure", "value", "stderr", "low", "high")


def load_results(*folders: str | PathLike[str], settings: Sequence[str] | None = None) -> pd.DataFrame:
    """Every number of every row of the results under some folders, as a tidy data frame.

    Args:
        folders: folders of results, searched with all that is inside them.
        settings: keys of the configuration that become columns, for example `search.tau`. By default those in which the
            runs differ, and the names of quantizer, search and tuning.

    Returns:
        A line for each run, row and measure. Columns: `experiment`, `model`, `seed`, `status`, one for each setting,
        `row` (its name), `label`, `stage`, `prefix`, `quantized`; `measure`, the key of the number, for example
        `perplexity/wikitext2`; `value`, in the unit of result.json (an accuracy is a fraction of one); `stderr`, its
        standard error; `low` and `high`, the ends of its 95 % interval; `result`, the path of the file. What was not
        measured is NaN. Of several results of one configuration the newest completed one counts.

    Raises:
        ArtifactError: a folder is not there or holds no result, or a result is damaged.
        ConfigError: no run has a setting of that name.

    """
    return frame_of(collect(map(Path, folders)), settings)


def frame_of(runs: Sequence[Run], settings: Sequence[str] | None = None) -> pd.DataFrame:
    """The data frame of some runs; arguments and columns as in `load_results`."""
    import pandas as pd

    flats = {run.path: flatten(run.config) for run in runs}
    keys = list(dict.fromkeys([*_GROUPS, *varying(runs)])) if settings is None else list(settings)
    known = dict.fromkeys(key for flat in flats.values() for key in flat)
    for key in keys if settings is not None else ():
        if key not in known:
            raise ConfigError(f"no result has the setting {key!r}{did_you_mean(key, known)}")
    head = [*_OF_A_RUN, *keys, *_OF_A_ROW, *_OF_A_MEASURE, "result"]
    lines = []
    for run in runs:
        of_run = [run.experiment, run.model, run.seed, run.record["status"]]
        chosen = [_scalar(flats[run.path].get(key)) for key in keys]
        for row in run.record["rows"]:
            of_row = [row["name"], row["label"], row["stage"], row["prefix"], row["quantized"]]
            lines += [[*of_run, *chosen, *of_row, *numbers, str(run.path)] for numbers in _numbers(row)]
    return pd.DataFrame(lines, columns=head).astype(dict.fromkeys(_OF_A_MEASURE[1:], float))


def _numbers(row: Row) -> Iterator[tuple[str, float | None, float | None, float | None, float | None]]:
    """Key, value, standard error and ends of the interval of each number of a row.

    What no column shows, as a value of a metric that is not installed, stands alone.
    """
    values = row["values"]
    shown: dict[str, Column] = {column.key: column for place in Place for column in columns([row], place)}
    beside = {key for column in shown.values() for key in (column.error, *(column.interval or ())) if key is not None}
    for key, value in values.items():
        if key in beside:
            continue
        column = shown.get(key)
        low, high = (None, None) if column is None or column.interval is None else column.interval
        error = None if column is None else column.error
        stderr, least, most = (None if name is None else values.get(name) for name in (error, low, high))
        yield key, value, stderr, least, most


def _scalar(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, (list, tuple)) else value
