"""What result.json is called, its schema version, and the one door through which its content is read.

Light to import, unlike `cushion.results`, which writes the file: reports read it without torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cushion.errors import ArtifactError
from cushion.integrity import LEARNED as LEARNED
from cushion.integrity import PREFIX as PREFIX
from cushion.integrity import RECONSTRUCTED as RECONSTRUCTED
from cushion.integrity import SAMPLES as SAMPLES
from cushion.integrity import opened
from cushion.results_v1 import upgraded

FILE_NAME = "result.json"
LOG = "run.log"
"""In a run's folder: what it logged. `LOGGED` reads a line of it, or of the lines of a message the first."""

LOGGED = re.compile(r"[\d-]+ (?P<time>[\d:]+),\d+ (?P<level>[A-Z]+) (?P<message>.*)")

SCHEMA_VERSION = 2
NOT_MEASURED = ("calibration", "search", "tuning")
"""The purposes of text whose numbers are not in a row."""
STAGES = NO_PREFIX, FOUND, TUNED = ("none", "found", "tuned")
"""Whose prefix a row has: none, the one that was found or given, or that one tuned."""


def is_frozen(row: Mapping[str, Any]) -> bool:
    """Whether a row of a result is of the frozen model: nothing of its quantizer was learned. Older rows all are."""
    return not (row.get("reconstructed", False) or row.get("learned_ranges", False))


def measured_with(result: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """What a result's numbers are of: the fingerprint of the model's weights, and the hash of each text measured.

    Seeds are paired only where both agree: the file of a text, or what the name of a model stands for, may have changed
    between two runs of one configuration. Absent in older results: None, and no texts.
    """
    texts = result.get("data") or {}
    measured = {name: text.get("sha256") for name, text in texts.items() if name not in NOT_MEASURED}
    return (result.get("model") or {}).get("fingerprint"), measured


def way_out(path: Path) -> str:
    """What a user does about a result.json that cannot be read."""
    return f"delete the folder {path.parent} and run again"


def current(record: Any, path: Path) -> dict[str, Any]:
    """The content of a result.json in the current schema version, whichever version the file is of.

    Args:
        record: the content of the file.
        path: the file, for messages.

    Raises:
        ArtifactError: it is of an unknown schema version, was changed after it was written, or what is to be converted
            is damaged.

    """
    version = record.get("schema_version") if isinstance(record, dict) else None
    if version not in (1, SCHEMA_VERSION):
        raise ArtifactError(f"{path} is not a result of schema version 1 or {SCHEMA_VERSION}: {way_out(path)}")
    try:
        if version == SCHEMA_VERSION:
            return dict(opened(record))
        return {**upgraded(record), "schema_version": SCHEMA_VERSION}
    except ValueError as error:
        raise ArtifactError(f"{path} is damaged ({error}): {way_out(path)}") from error
