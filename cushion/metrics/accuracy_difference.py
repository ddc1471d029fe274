"""Accuracy less that of full precision with the same prefix in the same run, with a paired bootstrap over records.

| column | content |
|---|---|
| `accuracy_difference/<task>`, `accuracy_difference/mean` | accuracy less that of the row's ceiling, as a fraction of one; only in rows that have one |
| `accuracy_difference_stderr/...`, `accuracy_difference_low/...`, `accuracy_difference_high/...`, `accuracy_difference_p/...` | its standard error, 95 % interval and two-sided p-value by a paired bootstrap over the records |
"""  # noqa: E501

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from cushion.intervals import Interval, over_runs, percentiles, resampled_means, student
from cushion.metrics.columns import Column, Measured, Metric, Place, Result, Row, Values, parts, register
from cushion.metrics.tasks import MEAN as ACCURACY_MEAN
from cushion.schema import measured_with

KEY = "accuracy_difference"
TITLE = "accuracy less full precision with the same prefix"
MEAN = "mean"
_NOTE = (
    "accuracy less that of full precision with the same prefix, in points, with its 95 % interval (paired bootstrap "
    "over the records); within error: the interval holds 0"
)
_ENDS = ("_stderr", "_low", "_high", "_p")
_PLACES = frozenset({Place.FURTHER, Place.TRACKER_TABLE, Place.TRACKER_ROW, Place.RUN})


def _written(value: float) -> str:
    return f"{value:+.1f}"


def _key(what: str, task: str) -> str:
    return f"{KEY}{what}/{task}"


def _column(task: str) -> Column:
    return Column(
        _key("", task),
        task,
        "%",
        format=_written,
        lower_is_better=False,
        error=_key("_stderr", task),
        places=_PLACES,
        table=f"{TITLE}, %",
        titles={Place.TRACKER_TABLE: f"{KEY} {task}"},
        neutral=0.0,
        interval=(_key("_low", task), _key("_high", task)),
        over_seeds=partial(_over_seeds, task),
        note=_NOTE,
    )


def _columns(rows: Sequence[Row]) -> list[Column]:
    tasks = dict.fromkeys(task for row in rows for task, value in parts(row, KEY).items() if value is not None)
    found = []
    for task in tasks:
        column = _column(task)
        if task == MEAN:
            titles = {**column.titles, Place.REPORT: f"{TITLE}, %", Place.PUBLISHED: "less full precision"}
            places = _PLACES | {Place.REPORT, Place.PUBLISHED}
            column = replace(column, places=places, titles=titles, compares=ACCURACY_MEAN.key)
        ends = (Column(_key(end, task), f"{KEY}{end} {task}", places=frozenset({Place.RUN})) for end in _ENDS)
        found += [column, *ends]
    return found


def _values(measured: Measured) -> Values:
    ceiling = measured.ceiling
    if ceiling is None:
        return {}
    shares = {name: of for name, of in measured.shares.items() if measured.tasks[name]["value"] is not None}
    if counted := [name for name in measured.in_mean if name in shares]:
        shares[MEAN] = _mean_of([shares[name] for name in counted])
    paired = {
        task: [mine - theirs for mine, theirs in zip(values, ceiling.records[task], strict=True)]
        for task, values in measured.records.items()
        if values and len(values) == len(ceiling.records.get(task, ()))
    }
    found: Values = {}
    means = {task: resampled_means(differences, task) for task, differences in paired.items()}
    for name, of in shares.items():
        if not set(of) <= set(paired):
            continue
        value = sum(share * sum(paired[task]) / len(paired[task]) for task, share in of.items())
        interval = percentiles(value, [(share, means[task]) for task, share in of.items()])
        found[_key("", name)] = value
        found |= {_key(end, name): getattr(interval, end.removeprefix("_")) for end in _ENDS}
    return found


def _mean_of(shares: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """What single tasks count for in the mean of several entries."""
    found: dict[str, float] = {}
    for of in shares:
        for task, share in of.items():
            found[task] = found.get(task, 0.0) + share / len(shares)
    return found


def _over_seeds(task: str, rows: Sequence[tuple[Result, Row]]) -> Interval | None:
    """Of rows with their results: the mean of the differences over the seeds; of one the bootstrap's own interval.

    An older result has no p-value of its bootstrap: its interval then has that of a normal error. None where the
    weights of the model are not the same.
    """
    if len({measured_with(result)[0] for result, _ in rows}) > 1:
        return None
    values = [row["values"].get(_key("", task)) for _, row in rows]
    errors = [row["values"].get(_key("_stderr", task)) for _, row in rows]
    if None in values or None in errors:
        return None
    if len(rows) > 1:
        return over_runs(values, errors)
    low, high, p = (rows[0][1]["values"].get(_key(end, task)) for end in ("_low", "_high", "_p"))
    if low is None or high is None:
        return None
    return Interval(values[0], errors[0], low, high, student(values[0], errors[0], math.inf).p if p is None else p)


register(Metric(KEY, _columns, _values, order=25))
