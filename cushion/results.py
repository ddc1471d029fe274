"""The result of a run, and its one file: result.json, schema version 2, written atomically.

docs/results.md describes every field for readers of the file; tables and figures are made from it alone.
"""

from __future__ import annotations

import logging
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import cushion
from cushion.artifacts import read_json, write_json
from cushion.errors import ArtifactError
from cushion.integrity import OF_A_RUN, SAMPLES, SET_ASIDE, misfit, sealed
from cushion.metrics.columns import parts
from cushion.schema import FILE_NAME as FILE_NAME
from cushion.schema import SCHEMA_VERSION as SCHEMA_VERSION
from cushion.schema import current, way_out

logger = logging.getLogger(__name__)

_PACKAGES = ("torch", "transformers", "datasets", "lm_eval", "hydra-core", "omegaconf", "wandb", "accelerate")


@dataclass
class Row:
    """One line of the comparison: a model with or without quantizer and prefix, and what was measured on it.

    `stage` says whose prefix it has (`cushion.schema.STAGES`); `values` holds its numbers by the key of their column
    (`cushion.metrics`), None where one was not measured; `tokens` by corpus the number of tokens that a perplexity was
    averaged over; `tasks` by task or group of tasks the fields of `evaluation.task_scores.TaskScore`. A row that is
    `reconstructed` has ranges, and perhaps weights, that were learned for it, one with `learned_ranges` those that were
    learned with its prefix: neither is one of the frozen model (`cushion.schema.is_frozen`).
    """

    name: str
    label: str
    prefix: str
    quantized: bool
    stage: str
    values: dict[str, float | None]
    tokens: dict[str, int] = field(default_factory=dict)
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    reconstructed: bool = False
    learned_ranges: bool = False

    def under(self, key: str) -> dict[str, float | None]:
        """The values below a key by what follows it: `under("perplexity")` has one for each corpus."""
        return parts({"values": self.values}, key)


@dataclass
class RunResult:
    """Everything a run found out. All fields are plain JSON."""

    status: str
    config: dict[str, Any]
    environment: dict[str, Any]
    model: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    prefix: dict[str, Any] | None = None
    search: dict[str, Any] | None = None
    tuning: dict[str, Any] | None = None
    qfem: dict[str, Any] | None = None
    reconstruction: dict[str, Any] | None = None
    activations: dict[str, Any] = field(default_factory=dict)
    attention: dict[str, Any] | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    error: dict[str, str] | None = None
    schema_version: int = SCHEMA_VERSION

    def write(self, folder: Path) -> Path:
        """Write `folder/result.json` with a seal over it and the run's other files there; returns its path."""
        path = folder / FILE_NAME
        write_json(path, sealed(asdict(self), folder))
        return path

    @classmethod
    def read(cls, path: Path) -> RunResult:
        """Read a result.json, of this schema version or an older one.

        Raises:
            ArtifactError: the file is damaged or of another schema version.

        """
        return cls._of(read_json(path), path)

    @classmethod
    def _of(cls, content: Any, path: Path) -> RunResult:
        """The result that a file has as its content."""
        record = current(content, path)
        try:
            return cls(**{**record, "rows": [Row(**row) for row in record["rows"]]})
        except (TypeError, KeyError) as error:
            raise ArtifactError(f"{path} is damaged ({error}): {way_out(path)}") from error


def finished_result(folder: Path) -> RunResult | None:
    """The completed result in `folder`, or None when the run has not been done, failed, or left what does not fit."""
    return _finished(folder)[0]


def _finished(folder: Path) -> tuple[RunResult | None, str | None]:
    """The completed result in a run's folder, if it is what the run left there, and in words why it is not."""
    path = folder / FILE_NAME
    if not os.path.lexists(path):
        return None, None
    try:
        content = read_json(path)
        result = RunResult._of(content, path)
    except ArtifactError as error:
        return None, str(error).removesuffix(f": {way_out(path)}")
    if result.status != "completed":
        return None, None
    reason = misfit(content, folder)
    return (result, None) if reason is None else (None, f"{path} {reason}")


def make_room(folder: Path) -> RunResult | None:
    """The completed result in a run's folder; what does not fit is moved out of it, with a warning.

    Call it with the folder's lock. Without a result the run is done, or done again. Its cached steps stay: each is
    checked for itself when it is read.
    """
    for left_over in folder.glob(".*.json-*"):  # of a process that was killed while it wrote
        left_over.unlink()
    result, reason = _finished(folder)
    names: Sequence[str] = (FILE_NAME, *OF_A_RUN)
    if reason is None and result is None:
        names = [name for name in OF_A_RUN if _is_in_the_way(folder / name)]
        reason = f"{folder / names[0]} is not what a run leaves there" if names else None
    if reason is None:
        return result
    place = folder / SET_ASIDE / str(time.time_ns())
    place.mkdir(parents=True)
    for name in names:
        if os.path.lexists(folder / name):
            (folder / name).rename(place / name)
    logger.warning("%s: it was moved to %s, and the run is done again", reason, place)
    return None


def _is_in_the_way(path: Path) -> bool:
    """Whether what stands where a run writes a file of its own, or its folder of samples, is something else."""
    if not os.path.lexists(path):
        return False
    if path.name != SAMPLES:
        return not path.is_file()
    return not (
        path.is_dir() and all(row.is_dir() for row in path.iterdir()) and all(one.is_file() for one in path.glob("*/*"))
    )


def make_folder(folder: Path) -> None:
    """Make a run's folder; what stands in its place and is not a folder is moved beside it, with a warning."""
    if os.path.lexists(folder) and not folder.is_dir():
        place = folder.with_name(f"{SET_ASIDE}-{folder.name}-{time.time_ns()}")
        folder.rename(place)
        logger.warning("%s is not a folder: it was moved to %s, and the run is done again", folder, place)
    folder.mkdir(parents=True, exist_ok=True)


def environment(device: str) -> dict[str, Any]:
    """Versions, git state and device: what else a number may depend on."""
    return {
        "cushion": cushion.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": dict(_versions()),
        "git": _git_state(Path(__file__).resolve().parent.parent),
        "device": device,
    }


@cache
def _versions() -> dict[str, str | None]:
    """Of the packages in this process: what is installed later on is not what its runs use."""
    versions: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return versions


@cache
def _git_state(source: Path) -> dict[str, Any] | None:
    """Commit and dirty flag of the checkout Cushion runs from; None for an installed package or without git.

    As they are at the first run of a process: its later ones run the same code.
    """
    if not (source / ".git").exists():
        return None
    try:
        commit = subprocess.run(
            ["git", "-C", str(source), "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
        status = subprocess.run(
            ["git", "-C", str(source), "status", "--porcelain"], capture_output=True, text=True, check=True, timeout=10
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "dirty": bool(status.strip())}
