"""What an offline W&B run holds: its file read back, the way `wandb sync` would send it."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

_HEADER, _BLOCK, _RECORD_HEADER = 7, 32768, 7
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


@dataclass
class OfflineRun:
    """The content of a run's file."""

    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    step_metrics: dict[str, str] = field(default_factory=dict)
    group: str = ""
    sweep: str = ""
    job_type: str = ""
    tags: list[str] = field(default_factory=list)
    exit_code: int | None = None
    artifacts: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By type, what an artifact says of itself."""
    own_summary: set[str] = field(default_factory=set)
    """The metrics, or patterns of them, whose summary W&B leaves to the run."""

    def series(self, x: str, y: str) -> list[tuple[Any, Any]]:
        """The points of a curve in the order in which they were logged."""
        return [(row[x], row[y]) for row in self.history if x in row and y in row]


def read_offline(folder: Path, seconds: float = 60, pattern: str = "offline-run-*") -> OfflineRun:
    """Read the only run of a pattern under a run's folder `wandb/`, once W&B's process has written it to its end."""
    (path,) = folder.glob(f"wandb/{pattern}/run-*.wandb")
    until = time.monotonic() + seconds
    while (run := _read(path)).exit_code is None and time.monotonic() < until:
        time.sleep(0.05)
    return run


def _read(path: Path) -> OfflineRun:
    run = OfflineRun()
    for data in _records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        _take(run, record)
    return run


def _take(run: OfflineRun, record: Any) -> None:
    kind = record.WhichOneof("record_type")
    if kind == "run":
        run.sweep = record.run.sweep_id
        run.group, run.job_type, run.tags = record.run.run_group, record.run.job_type, list(record.run.tags)
        run.config |= _items(record.run.config.update)
    elif kind == "config":
        run.config |= _items(record.config.update)
    elif kind == "history":
        run.history.append(_items(record.history.item))
        run.summary |= {
            key: value
            for key, value in run.history[-1].items()
            if not key.startswith("_") and not any(fnmatch(key, pattern) for pattern in run.own_summary)
        }
    elif kind == "summary":
        run.summary |= _items(record.summary.update)
    elif kind == "metric" and record.metric.step_metric:
        run.step_metrics[record.metric.glob_name or record.metric.name] = record.metric.step_metric
        if record.metric.summary.none:
            run.own_summary.add(record.metric.glob_name or record.metric.name)
    elif kind == "artifact":
        run.artifacts[record.artifact.type] = json.loads(record.artifact.metadata or "{}")
    elif kind == "exit":
        run.exit_code = record.exit.exit_code


def _items(items: Any) -> dict[str, Any]:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def _records(content: bytes) -> list[bytes]:
    """The records of a log in LevelDB's format: blocks of 32 KiB; a record over several blocks is in parts."""
    records, parts, place = [], b"", _HEADER
    while place + _RECORD_HEADER <= len(content):
        room = _BLOCK - place % _BLOCK
        if room < _RECORD_HEADER:
            place += room
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        part = content[place + _RECORD_HEADER : place + _RECORD_HEADER + length]
        assert content[:4] == b":W&B"
        assert kind in (_FULL, _FIRST, _MIDDLE, _LAST)
        if len(part) < length:
            break  # it is being written
        parts = part if kind in (_FULL, _FIRST) else parts + part
        if kind in (_FULL, _LAST):
            records.append(parts)
        place += _RECORD_HEADER + length
    return records
