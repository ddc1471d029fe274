"""Results made by hand: the content of a result.json with the values that a test plants."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROWS = {
    "full_precision": ("full precision", False),
    "full_precision_tuned": ("full precision + tuned prefix", False),
    "quantized": ("W8A8", True),
    "quantized_found": ("W8A8 + greedy prefix", True),
    "quantized_tuned": ("W8A8 + tuned prefix", True),
}


def row(
    name: str, perplexity: float | None, prefix: str = "a", corpus: str = "wikitext2", accuracy: float | None = None,
    accuracy_stderr: float | None = None, tasks: dict[str, dict[str, Any]] | None = None, **values: Any,
) -> dict[str, Any]:  # fmt: skip
    """A row of one corpus; `values` are further columns, or others in place of those here."""
    label, quantized = ROWS[name]
    stage = name.rpartition("_")[2] if name.endswith(("found", "tuned")) else "none"
    scores = {f"accuracy/{task}": score.get("value") for task, score in (tasks or {}).items()}
    scores |= {f"accuracy_stderr/{task}": score.get("stderr") for task, score in (tasks or {}).items()}
    if accuracy is not None:
        scores |= {"accuracy/mean": accuracy, "accuracy_stderr/mean": accuracy_stderr}
    found = {f"perplexity/{corpus}": perplexity, **scores, "largest_activation": 10.0, "quantization_error": 5.0}
    return {
        "name": name, "label": label, "prefix": "" if name in ("full_precision", "quantized") else prefix,
        "quantized": quantized, "stage": stage, "values": {**found, "seconds": 3.0, **values}, "tasks": tasks or {},
    }  # fmt: skip


def record(
    model: str = "some/model", quantizer: str = "per_tensor_static", seed: int = 0, experiment: str = "default",
    rows: list[dict[str, Any]] | None = None, **others: Any,
) -> dict[str, Any]:  # fmt: skip
    """A completed result; `others` replaces parts of it, dotted names parts of its configuration.

    A key of no group is named as `config.bos`.
    """
    config: dict[str, Any] = {
        "experiment": experiment, "seed": seed, "device": "auto", "model": {"path": model},
        "data": {"name": "wikitext2"},
        "quantizer": {"name": quantizer, "weights": {"bits": 8, "granularity": "per_tensor"},
                      "activations": {"bits": 8, "symmetric": True}},
        "search": {"name": "greedy_sampled", "tau": 0.5}, "tuning": {"name": "short", "lambda_q": 0.01},
        "eval": {"name": "short"}, "paths": {"output_dir": "outputs", "data_dir": None}, "tracking": {"name": "none"},
    }  # fmt: skip
    for key in [key for key in others if "." in key]:
        group, _, name = key.partition(".")
        (config if group == "config" else config.setdefault(group, {}))[name] = others.pop(key)
    return {
        "schema_version": 2, "status": "completed", "config": config, "error": None,
        "environment": {"cushion": "0.1", "packages": {"torch": "2", "transformers": "5"}, "device": "cpu",
                        "git": {"commit": "0123456789abcdef", "dirty": True}},
        "rows": [row("quantized", 20.0)] if rows is None else rows, "timings": {"total": 12.0}, **others,
    }  # fmt: skip


def failed(message: str, **others: Any) -> dict[str, Any]:
    return {**record(rows=[], **others), "status": "failed", "error": {"type": "DataError", "message": message}}


def write(folder: Path, *records: dict[str, Any]) -> Path:
    for number, content in enumerate(records):
        path = folder / f"run{number:02}" / "result.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content), encoding="utf-8")
    return folder
