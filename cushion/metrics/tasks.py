"""Zero-shot tasks: accuracy of each with its standard error, their mean, and what has no accuracy.

| column | content |
|---|---|
| `accuracy/<task>`, `accuracy_stderr/<task>` | the metric of a task, group or tag that enters the mean, and its standard error; null where it has none |
| `tasks/<task>/<metric>` | every metric of a task that has no accuracy |
| `accuracy/mean`, `accuracy_stderr/mean` | mean of the tasks asked for and its standard error; none without tasks |
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cushion.metrics.columns import Column, Measured, Metric, Place, Row, Values, register

ACCURACY = "accuracy"
"""The measure that a published table names."""
_FURTHER = "accuracy, %"
_TRACKER = frozenset({Place.TRACKER_TABLE, Place.TRACKER_ROW, Place.RUN})
_IN_TABLES = frozenset({Place.COMPARISON, Place.SWEEP, Place.REPORT})


def _tenths(value: float) -> str:
    return f"{value:.1f}"


_TERSE = dict.fromkeys((Place.COMPARISON, Place.SWEEP, Place.FURTHER), _tenths)
MEAN = Column(
    "accuracy/mean",
    "accuracy",
    "%",
    lower_is_better=False,
    error="accuracy_stderr/mean",
    titles={Place.FURTHER: "mean", Place.RUN: "accuracy_mean"},
    formats=_TERSE,
)


def _columns(rows: Sequence[Row]) -> list[Column]:
    tasks = list(dict.fromkeys(task for row in rows for task in row.get("tasks") or {}))
    scores = [(task, score) for row in rows for task, score in (row.get("tasks") or {}).items()]
    scored = {task for task, score in scores if score.get("metric") is not None}
    others = dict.fromkeys(
        (task, metric)
        for task, score in scores
        if task not in scored
        for metric, found in (score.get("metrics") or {}).items()
        if found.get("value") is not None
    )
    return [
        *(_accuracy(task, task in scored) for task in tasks),
        *(_other(task, metric) for task, metric in others),
        *_mean(rows, bool(scored)),
    ]


def _accuracy(task: str, is_scored: bool) -> Column:
    return Column(
        f"accuracy/{task}",
        task,
        "%",
        lower_is_better=False,
        error=f"accuracy_stderr/{task}",
        places=_TRACKER | {Place.REPORT} | ({Place.FURTHER} if is_scored else frozenset()),
        table=_FURTHER,
        formats=_TERSE,
    )


def _other(task: str, metric: str) -> Column:
    places = frozenset({Place.FURTHER, Place.TRACKER_TABLE, Place.TRACKER_ROW})
    return Column(f"tasks/{task}/{metric}", f"{task} {metric}", format=lambda v: f"{v:.6g}", places=places, table="")


def _mean(rows: Sequence[Row], is_scored: bool) -> list[Column]:
    """The mean, in tables only where there is one, and its standard error, which tables show beside it."""
    assert MEAN.error is not None
    is_there = any(row["values"].get(MEAN.key) is not None for row in rows)
    places = _TRACKER | (_IN_TABLES if is_there else frozenset()) | ({Place.FURTHER} if is_scored else frozenset())
    error_places = frozenset({Place.TRACKER_TABLE, Place.RUN})
    return [
        replace(MEAN, places=places, table=_FURTHER),
        Column(MEAN.error, "accuracy_stderr", places=error_places, titles={Place.RUN: "accuracy_stderr"}),
    ]


def _values(measured: Measured) -> Values:
    values: Values = {}
    for task, score in measured.tasks.items():
        values[f"accuracy/{task}"], values[f"accuracy_stderr/{task}"] = score["value"], score["stderr"]
        if score["metric"] is None:
            values |= {f"tasks/{task}/{metric}": found["value"] for metric, found in score["metrics"].items()}
    if measured.tasks:
        assert MEAN.error is not None
        values[MEAN.key], values[MEAN.error] = measured.accuracy or (None, None)
    return values


register(Metric("tasks", _columns, _values, {ACCURACY: MEAN}, order=20))
