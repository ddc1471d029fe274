"""The results under some folders, from result.json alone: one `Run` for each configuration, completed if any is."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from cushion.config import ModelConfig
from cushion.errors import ArtifactError
from cushion.integrity import is_aside
from cushion.schema import FILE_NAME, STAGES, current, way_out

_NEEDED: dict[str, type] = {"status": str, "config": dict, "environment": dict, "rows": list, "timings": dict}
"""What a report cannot do without; everything else may be absent, as in a run that failed early or an older file."""
_NEEDED_OF_A_ROW: dict[str, type] = {"name": str, "label": str, "prefix": str, "quantized": bool, "stage": str,
                                   "values": dict}  # fmt: skip
_NUMBERS_OF_A_TASK = ("value", "stderr", "samples")
_NUMBERS_OF_A_STEP = {"search": ("seconds", "token_forwards"), "tuning": ("seconds",)}


@dataclass(frozen=True)
class Run:
    """One result.json: its path, its content, and how many older results of the same configuration it replaces."""

    path: Path
    record: dict[str, Any]
    superseded: int = 0

    @property
    def completed(self) -> bool:
        """Whether the run ended well."""
        return bool(self.record["status"] == "completed")

    @property
    def config(self) -> dict[str, Any]:
        """The whole configuration."""
        config: dict[str, Any] = self.record["config"]
        return config

    @property
    def experiment(self) -> str:
        """The experiment that the run belongs to."""
        return str(self.config.get("experiment", "default"))

    @property
    def seed(self) -> int:
        """The run's seed."""
        return int(self.config.get("seed", 0))

    @property
    def model(self) -> str:
        """A short name of the model: the last part of its path."""
        return ModelConfig(path=str(self.config.get("model", {}).get("path", "unknown"))).label

    @property
    def error(self) -> str:
        """Why the run failed, in one line; empty if it did not."""
        error = self.record.get("error") or {}
        return " ".join(f"{error.get('type', 'error')}: {error.get('message', '')}".split()) if error else ""

    @property
    def command(self) -> str:
        """What does this run again; overrides behind it change it."""
        return f"cushion rerun {shlex.quote(str(self.path.parent))}"

    def link(self, folder: Path) -> str:
        """The address of the run's folder, from a page in another folder."""
        return quote(Path(os.path.relpath(self.path.parent, folder.resolve())).as_posix() + "/")

    def identity(self, *without: str) -> str:
        """The configuration as text, without what cannot change a number, and without the keys named."""
        config = {key: value for key, value in self.config.items() if key not in ("tracking", "objective", *without)}
        config["paths"] = {"data_dir": self.config.get("paths", {}).get("data_dir")}
        return json.dumps(config, sort_keys=True)


def collect(folders: Iterable[Path]) -> list[Run]:
    """Every result under the folders, in the order of their paths.

    Of several results of one configuration (made by different versions of the code, say), the completed one
    counts, and of several the one written last.

    Raises:
        ArtifactError: a folder is not there, holds no result, or a result.json is damaged.

    """
    newest: dict[str, Run] = {}
    for path in _files(folders):
        run = Run(path, read_result(path))
        other = newest.get(run.identity())
        if other is None:
            newest[run.identity()] = run
            continue
        kept = max(other, run, key=lambda one: (one.completed, one.path.stat().st_mtime))
        newest[run.identity()] = Run(kept.path, kept.record, run.superseded + other.superseded + 1)
    return sorted(newest.values(), key=lambda run: str(run.path))


def _files(folders: Iterable[Path]) -> list[Path]:
    found: set[Path] = set()
    for folder in folders:
        if not folder.is_dir():
            raise ArtifactError(
                f"there is no folder {folder}: name the folder of results (paths.output_dir of the runs)"
            )
        inside = {
            Path(os.path.realpath(path)) for path in folder.rglob(FILE_NAME) if not is_aside(path.relative_to(folder))
        }
        if not inside:
            raise ArtifactError(
                f"{folder} holds no {FILE_NAME}: run an experiment first, for example cushion experiment=main, "
                "or name the folder that its results went to (paths.output_dir)"
            )
        found |= inside
    return sorted(found)


def read_result(path: Path) -> dict[str, Any]:
    """The content of a result.json in the current schema version, whichever it was written in.

    Raises:
        ArtifactError: it is damaged; the message names the file and the way out.

    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path} is damaged ({error}): {way_out(path)}") from error
    record = current(record, path)
    problems = list(_wrong(record, _NEEDED, "result"))
    for number, row in enumerate(record["rows"] if not problems else []):
        problems += _wrong_row(row, f"rows[{number}]")
    if not problems:
        problems += _no_numbers(
            {key: record["timings"][key] for key in ("total",) if key in record["timings"]}, "timings"
        )
        problems += _wrong_parts(record)
        problems += _wrong_losses(record)
        seed = record["config"].get("seed", 0)
        problems += [] if isinstance(seed, int) else [f"config.seed={seed!r} is no whole number"]
    if problems:
        raise ArtifactError(f"{path} is damaged ({'; '.join(problems)}): {way_out(path)}")
    return record


def _wrong_row(row: Any, where: str) -> Iterator[str]:
    """What a report would stumble over in a row: something absent, or of another kind; absent numbers are None."""
    if not isinstance(row, dict):
        yield f"{where} is no record"
        return
    if problems := list(_wrong(row, _NEEDED_OF_A_ROW, where)):
        yield from problems
        return
    if row["stage"] not in STAGES:
        yield f"{where}.stage={row['stage']!r} is none of {', '.join(STAGES)}"
    yield from _no_numbers(row["values"], f"{where}.values")
    tasks = row.get("tasks") or {}
    if not isinstance(tasks, dict):
        yield f"{where}.tasks is no dict"
        return
    for task, scores in tasks.items():
        if not isinstance(scores, dict):
            yield f"{where}.tasks.{task} is no dict"
            continue
        yield from _no_numbers({key: scores.get(key) for key in _NUMBERS_OF_A_TASK}, f"{where}.tasks.{task}")
        metrics = scores.get("metrics") or {}
        if not (isinstance(metrics, dict) and all(isinstance(found, dict) for found in metrics.values())):
            yield f"{where}.tasks.{task}.metrics is no dict of dicts"


def _wrong_parts(record: dict[str, Any]) -> Iterator[str]:
    """What a report would stumble over in search, tuning and the activation curves, each of which may be absent."""
    for step, keys in _NUMBERS_OF_A_STEP.items():
        found = record.get(step) or {}
        if isinstance(found, dict):
            yield from _no_numbers({key: found.get(key) for key in keys}, step)
        else:
            yield f"{step} is no dict"
    where, curves = "activations", record.get("activations") or {}
    if isinstance(curves, dict):
        where, curves = "activations.curves", curves.get("curves") or {}
    if not isinstance(curves, dict):
        yield f"{where} is no dict"
        return
    for stage, by_statistic in curves.items():
        if not isinstance(by_statistic, dict):
            yield f"{where}.{stage} is no dict"
            continue
        for statistic, values in by_statistic.items():
            if not isinstance(values, list):
                yield f"{where}.{stage}.{statistic} is no list"
                continue
            for block, value in enumerate(values):
                if not _is_number(value):
                    yield f"{where}.{stage}.{statistic}[{block}]={value!r} is no number"


def _wrong_losses(record: dict[str, Any]) -> Iterator[str]:
    """What a report would stumble over in the losses of the rows and their ceilings, which older results lack."""
    evaluation = record.get("evaluation") or {}
    if not isinstance(evaluation, dict):
        yield "evaluation is no dict"
        return
    losses, ceilings = evaluation.get("losses") or {}, evaluation.get("ceilings") or {}
    if not isinstance(ceilings, dict):
        yield "evaluation.ceilings is no dict"
    if not (isinstance(losses, dict) and all(isinstance(of, dict) for of in losses.values())):
        yield "evaluation.losses is no dict of dicts"
        return
    for row, by_corpus in losses.items():
        for corpus, found in by_corpus.items():
            if not _are_losses(found):
                yield f"evaluation.losses.{row}.{corpus} is no record of nats and tokens, two lists of as many numbers"


def _are_losses(found: Any) -> bool:
    if not isinstance(found, dict) or set(found) != {"nats", "tokens"}:
        return False
    nats, tokens = found["nats"], found["tokens"]
    if not (isinstance(nats, list) and isinstance(tokens, list) and len(nats) == len(tokens)):
        return False
    return all(map(_is_number, [*nats, *tokens])) and all(count > 0 for count in tokens)


def _no_numbers(values: dict[str, Any], where: str) -> Iterator[str]:
    for key, value in values.items():
        if value is not None and not _is_number(value):
            yield f"{where}.{key}={value!r} is no number"


def _is_number(value: Any) -> bool:
    """Whether a value is a finite number; a result that Cushion wrote holds no other (docs/results.md)."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and abs(value) <= sys.float_info.max  # False for a nan too


def _wrong(record: dict[str, Any], needed: dict[str, type], where: str) -> Iterator[str]:
    for key, kind in needed.items():
        if key not in record:
            yield f"{where} has no {key!r}"
        elif not isinstance(record[key], kind):
            yield f"{where}.{key} is no {kind.__name__}"
