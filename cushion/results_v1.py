"""Schema version 1 of result.json as version 2. What version 1 was is fixed, so its names are spelt out here.

In version 1 a row held its numbers in fields of their own (`perplexity` by corpus, `accuracy`, ...) and its stage as
the ending of its name; `metrics` held those of the last row in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_NEEDED: dict[str, type] = {"name": str, "label": str, "prefix": str, "quantized": bool, "perplexity": dict}
_NUMBERS = ("largest_activation", "quantization_error", "seconds")


def upgraded(record: dict[str, Any]) -> dict[str, Any]:
    """The content of a result.json of version 1 with `rows` and `metrics` as version 2 has them; nothing else changes.

    Raises:
        ValueError: a row is damaged; the message says which and how.

    """
    rows = record.get("rows")
    if not isinstance(rows, list):
        return record
    metrics = record.get("metrics") or {}
    problems = [problem for number, row in enumerate(rows) for problem in _wrong(row, f"rows[{number}]")]
    if problems := [*problems, *_wrong_metrics(metrics)]:
        raise ValueError("; ".join(problems))
    found = {**record, "rows": [_row(row) for row in rows]}
    return {**found, "metrics": _metrics(metrics)} if "metrics" in record else found


def _row(row: dict[str, Any]) -> dict[str, Any]:
    ending = row["name"].rpartition("_")[2]
    tasks = row.get("tasks") or {}
    return {
        "name": row["name"],
        "label": row["label"],
        "prefix": row["prefix"],
        "quantized": row["quantized"],
        "stage": ending if ending in ("found", "tuned") else "none",
        "values": _values(row, tasks),
        "tokens": row.get("tokens") or {},
        "tasks": tasks,
    }


def _values(row: dict[str, Any], tasks: dict[str, dict[str, Any]]) -> dict[str, Any]:
    values = {f"perplexity/{corpus}": value for corpus, value in row["perplexity"].items()}
    for task, score in tasks.items():
        values[f"accuracy/{task}"], values[f"accuracy_stderr/{task}"] = score.get("value"), score.get("stderr")
        if score.get("metric") is None:
            others = score.get("metrics") or {}
            values |= {f"tasks/{task}/{metric}": found.get("value") for metric, found in others.items()}
    if tasks or row.get("accuracy") is not None:
        values["accuracy/mean"], values["accuracy_stderr/mean"] = row.get("accuracy"), row.get("accuracy_stderr")
    return values | {key: row[key] for key in _NUMBERS if key in row}


def _metrics(metrics: dict[str, Any]) -> dict[str, Any]:
    """The numbers of the run's own row; what it cost was not among them."""
    tasks = metrics.get("accuracy") or {}
    values = {f"perplexity/{corpus}": value for corpus, value in (metrics.get("perplexity") or {}).items()}
    values |= {f"accuracy/{task}": value for task, value in tasks.items()}
    if tasks or metrics.get("accuracy_mean") is not None:
        values["accuracy/mean"] = metrics.get("accuracy_mean")
        values["accuracy_stderr/mean"] = metrics.get("accuracy_stderr")
    return values | {key: metrics[key] for key in _NUMBERS if key in metrics}


def _wrong_metrics(metrics: Any) -> Iterator[str]:
    """What cannot be converted in `metrics`."""
    if not isinstance(metrics, dict):
        yield "metrics is no dict"
        return
    for key in ("perplexity", "accuracy"):
        if not isinstance(metrics.get(key) or {}, dict):
            yield f"metrics.{key} is no dict"


def _wrong(row: Any, where: str) -> Iterator[str]:
    """What cannot be converted in a row."""
    if not isinstance(row, dict):
        yield f"{where} is no record"
        return
    for key, kind in _NEEDED.items():
        if key not in row:
            yield f"{where} has no {key!r}"
        elif not isinstance(row[key], kind):
            yield f"{where}.{key} is no {kind.__name__}"
    tasks = row.get("tasks") or {}
    if not isinstance(tasks, dict):
        yield f"{where}.tasks is no dict"
        return
    for task, score in tasks.items():
        if not isinstance(score, dict):
            yield f"{where}.tasks.{task} is no dict"
        elif not isinstance(score.get("metrics") or {}, dict):
            yield f"{where}.tasks.{task}.metrics is no dict"
        else:
            for metric, found in (score.get("metrics") or {}).items():
                if not isinstance(found, dict):
                    yield f"{where}.tasks.{task}.metrics.{metric} is no dict"
