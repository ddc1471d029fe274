"""What tasks scored: the metric of each that counts, their mean, and groups of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from cushion.evaluation.tasks import TaskGroup, TaskSet

Metric = dict[str, float | None]
"""`value` and `stderr`, the standard error; None where lm-eval gives none."""


@dataclass(frozen=True)
class TaskScore:
    """What one task gave.

    Args:
        metric: the metric that enters the mean, None where the task has no accuracy.
        value, stderr: of that metric; the standard error is None where lm-eval gives none.
        samples: number of records asked.
        version: lm-eval's version of the task.
        metrics: all metrics by name.
        truncated: number of requests (of which a record can have several) whose context was cut from the left.

    """

    metric: str | None
    value: float | None
    stderr: float | None
    samples: int
    version: str
    metrics: dict[str, Metric]
    truncated: int = 0


def score(metrics: dict[str, Metric], samples: int, version: str, accuracy: str, truncated: int = 0) -> TaskScore:
    """What a task's metrics say, with the one that enters the mean picked out by `main_metric`."""
    metric = main_metric(list(metrics), accuracy)
    chosen: Metric = metrics[metric] if metric is not None else {"value": None, "stderr": None}
    return TaskScore(metric, chosen["value"], chosen["stderr"], samples, version, metrics, truncated)


def record_values(metrics: dict[str, Metric], samples: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """The metrics of a task that are means over its records, with their value on each, in lm-eval's order.

    Args:
        metrics: all metrics of the task by name, with the filter behind a comma where it is not `none`.
        samples: lm-eval's record of every sample, one per record and filter.

    """
    found = {}
    for key, metric in metrics.items():
        name, _, filtered = key.partition(",")
        values = [sample.get(name) for sample in samples if sample["filter"] == (filtered or "none")]
        numbers = [float(value) for value in values if isinstance(value, Real)]
        if not numbers or len(numbers) < len(values) or metric["value"] is None:
            continue
        if math.isclose(sum(numbers) / len(numbers), metric["value"], rel_tol=1e-9, abs_tol=1e-12):
            found[key] = numbers
    return found


def main_metric(metrics: list[str], accuracy: str = "acc") -> str | None:
    """The metric of a task that enters the mean.

    `acc`, unnormalised, as papers of SmoothQuant's time report it (or `acc_norm` where that is wanted and the task
    has it); for a task of free generation its exact match under the first filter; None where it has neither.
    """
    for wanted in (accuracy, "acc", "exact_match"):
        found = next((name for name in metrics if name.partition(",")[0] == wanted), None)
        if found is not None:
            return found
    return None


def mean_accuracy(scores: dict[str, TaskScore]) -> tuple[float, float | None] | None:
    """Mean of the tasks' accuracies and its standard error, the tasks taken as independent; None without any."""
    values = [score for score in scores.values() if score.value is not None]
    if not values:
        return None
    mean = sum(score.value or 0.0 for score in values) / len(values)
    errors = [score.stderr for score in values]
    if any(error is None for error in errors):
        return mean, None
    return mean, math.sqrt(sum((error or 0.0) ** 2 for error in errors)) / len(values)


def group_score(group: TaskGroup, scores: dict[str, TaskScore]) -> TaskScore | None:
    """The score of a group such as `mmlu_stem`: the mean of its tasks, weighted by their records where it says so."""
    members = [scores[name] for name in group.tasks]
    if any(score.value is None for score in members) or len({score.metric for score in members}) > 1:
        return None
    from lm_eval.api.metrics import pooled_sample_stderr, unweighted_mean_stderr  # slow to import

    weights = [score.samples if group.weighted else 1 for score in members]
    total = sum(weights)
    value = sum(w * (score.value or 0.0) for w, score in zip(weights, members, strict=True)) / total
    errors = [score.stderr for score in members]
    stderr = None
    if all(error is not None for error in errors):
        known, sizes = [error or 0.0 for error in errors], [score.samples for score in members]
        stderr = float(pooled_sample_stderr(known, sizes) if group.weighted else unweighted_mean_stderr(known))
    metric = members[0].metric
    assert metric is not None
    return TaskScore(
        metric, value, stderr, sum(score.samples for score in members), members[0].version,
        {metric: {"value": value, "stderr": stderr}}, sum(score.truncated for score in members),
    )  # fmt: skip


def shares_of(tasks: TaskSet, scores: Mapping[str, TaskScore]) -> dict[str, dict[str, float]]:
    """By task and group that has a score, what each single task counts for in it; they add up to one."""
    shares = {name: {name: 1.0} for name in tasks.tasks if name in scores}
    for name, group in tasks.groups.items():
        if name in scores:
            weights = {task: scores[task].samples if group.weighted else 1 for task in group.tasks}
            shares[name] = {task: weight / sum(weights.values()) for task, weight in weights.items()}
    return shares
