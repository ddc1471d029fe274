"""The seal of a result: by digests it tells a result.json, and the files beside it, from what was changed afterwards.

Light to import: reports check a result's content without torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cushion.hashing import digest, file_digest

INTEGRITY = "integrity"
"""The key of the seal in result.json: a digest of everything else in it, the run it is of, and the files beside it."""

SET_ASIDE = "set_aside"
"""The folder that goes to what does not fit: nothing looks for a result or an artifact in it."""

PREFIX = "prefix"
"""In a run's folder: its final prefix, in files of this name with `.json` and `.safetensors`."""

LEARNED = "learned.safetensors"
"""What was learned for a quantizer; in a run's folder, the ranges that were learned with the tuned prefix beside it."""

RECONSTRUCTED = "reconstructed.safetensors"
"""What the reconstruction behind the run's own prefix learned: ranges, and perhaps weights."""

SAMPLES = "samples"
"""The folder of lm-eval's records of every sample."""

FIGURES_FOLDER = "figures"
"""The folder of a run's figures, which are drawn from its result wherever they are missing."""

OF_A_RUN = (f"{PREFIX}.json", f"{PREFIX}.safetensors", LEARNED, RECONSTRUCTED, SAMPLES)
"""The files and folders that a run leaves beside its result.json, if it has them."""


def is_aside(place: Path) -> bool:
    """Whether a path below a folder of results is of something that was set aside because it did not fit."""
    return any(part.startswith(SET_ASIDE) for part in place.parts)


def sealed(record: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A result with its seal.

    Args:
        record: the content of result.json, as plain JSON.
        folder: the run's folder; the files of the run are in it.

    """
    seal = {"content": _content(record), "run": folder.name, "files": _files(folder)}
    return {**record, INTEGRITY: seal}


def opened(record: dict[str, Any]) -> dict[str, Any]:
    """A result without its seal. A result of an older version has none, and comes back as it is.

    Raises:
        ValueError: it is not what was sealed; the message says so in words.

    """
    if INTEGRITY not in record:
        return record
    content = {key: value for key, value in record.items() if key != INTEGRITY}
    seal = record[INTEGRITY]
    if not isinstance(seal, dict) or seal.get("content") != _content(content):
        raise ValueError("it was changed after it was written")
    return content


def misfit(record: dict[str, Any], folder: Path) -> str | None:
    """Why a sealed result does not belong to the folder that it stands in, in words; None where it does.

    A result without a seal fits everywhere.
    """
    if INTEGRITY not in record:
        return None
    seal = record[INTEGRITY]
    if seal.get("run") != folder.name:
        return f"is the result of another run ({seal.get('run')})"
    return changed_files(record, folder)


def changed_files(record: dict[str, Any], folder: Path, names: Sequence[str] = OF_A_RUN) -> str | None:
    """Why the files of some names beside a sealed result are not those it left there, wherever its folder is now."""
    if INTEGRITY not in record:
        return None
    seal = record[INTEGRITY]
    try:
        found = _files(folder, names)
        kept = {name: of for name, of in seal["files"].items() if name.partition("/")[0] in names}
        differing = sorted(name for name in found.keys() | kept.keys() if found.get(name) != kept.get(name))
    except (OSError, KeyError, AttributeError, RuntimeError) as error:
        return f"cannot be compared with the files beside it ({type(error).__name__}: {error})"
    return f"does not fit what lies beside it ({', '.join(differing)})" if differing else None


def _content(record: dict[str, Any]) -> str:
    return digest(json.loads(json.dumps(record)))


def _files(folder: Path, names: Sequence[str] = OF_A_RUN) -> dict[str, str]:
    """By path below the folder the SHA-256 of every file of the run in it.

    Raises:
        OSError: one cannot be read, or is not a file.

    """
    return {path.relative_to(folder).as_posix(): file_digest(path) for path in _paths(folder, names)}


def _paths(folder: Path, names: Sequence[str]) -> Iterator[Path]:
    for name in names:
        path = folder / name
        if name == SAMPLES and path.is_dir():
            yield from (inner for inner in sorted(path.rglob("*")) if not inner.is_dir())
        elif os.path.lexists(path):
            yield path
