"""The final numbers of a run by name: what a tracker shows at its end, and what a sweeper optimises."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cushion.errors import ConfigError, did_you_mean
from cushion.metrics.columns import Place, columns
from cushion.results import RunResult


def final_numbers(result: Mapping[str, Any]) -> dict[str, Any]:
    """The final numbers of a run under keys that are the same in every run, whatever its quantizer and prefix are.

    `<key of the column>/<row>`, where `<row>` is the row's `name` in result.json; the numbers of the run's own row
    besides without `/<row>`. docs/reports.md lists the keys. What was not measured is left out.
    """
    rows, own = result["rows"], result["metrics"]
    found = {column.named(Place.RUN): own.get(column.key) for column in columns(rows, Place.RUN)}
    found |= numbers_of_rows(rows)
    for kind in ("search", "tuning"):
        record = result[kind] or {}
        found |= {f"{kind}/total_{key}": record[key] for key in ("seconds", "token_forwards") if key in record}
    prefix = result["prefix"] or {}
    found |= {f"prefix/{key}": prefix[key] for key in ("text", "length", "tuned") if key in prefix}
    return {key: value for key, value in found.items() if value is not None}


def numbers_of_rows(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The numbers of rows of a result, those that were measured, as `<key of the column>/<row>`.

    A column that has a standard error, or an interval, has them beside it, likewise.
    """
    keys = {column.named(Place.TRACKER_ROW): column.key for column in columns(rows, Place.TRACKER_ROW)}
    for column in columns(rows, Place.TRACKER_ROW):
        keys |= {key: key for key in (column.error, *(column.interval or ())) if key is not None}
    found = {f"{name}/{row['name']}": row["values"].get(key) for name, key in keys.items() for row in rows}
    return {key: value for key, value in found.items() if value is not None}


def returned(path: Path, objective: str | None) -> str | float:
    """What a run gives back to Hydra: the number that `objective` names, without one the path of result.json.

    A sweeper that chooses its next run by the results so far optimises the number; a finished run gives it at once.

    Args:
        path: the result.json of a completed run.
        objective: the name of one of its final numbers, or None.

    Raises:
        ConfigError: the run has no such number, or did not measure it.

    """
    if objective is None:
        return str(path)
    result = RunResult.read(path)
    record = asdict(result)
    numbers = {key: float(value) for key, value in final_numbers(record).items() if isinstance(value, int | float)}
    if objective in numbers:
        return numbers[objective]
    of_rows = numbers_of_rows(record["rows"])
    own = [key for key in numbers if key not in of_rows]
    near = did_you_mean(objective, numbers)
    raise ConfigError(
        f"objective={objective!r} is not a number that this run measured (one that is not finite counts as not "
        f"measured): it has {', '.join(own)}, and those of each row behind '/' and the row's name{near}"
    )
