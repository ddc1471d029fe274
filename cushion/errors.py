"""What a user can mend, and how: every error that Cushion raises on purpose.

The command line prints these as one line and exits with status 1; from Python they are ordinary exceptions, and all
of them are `ValueError`s. Anything else that escapes is a bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CushionError(ValueError):
    """Base of every error that a user can mend. The message says what is wrong and the way out."""


class ConfigError(CushionError):
    """A configuration key has a value that cannot work, alone or together with another key."""


class ModelNotFoundError(CushionError):
    """The model cannot be found or read: a wrong id or folder, no access, or an optional package is missing."""


class UnsupportedModelError(CushionError):
    """The model's architecture is not in the architecture table."""


class DataError(CushionError):
    """A text source is missing, damaged, or too short for what was asked of it."""


class CalibrationError(CushionError):
    """The calibration statistics do not fit the quantizer, or are not finite."""


class ArtifactError(CushionError):
    """A stored artifact (prefix, statistics, result) is missing, damaged or of another model."""


class NotFiniteError(CushionError):
    """An activation, a loss or an objective is not a finite number, so nothing computed from it means anything."""


class TuningError(CushionError):
    """Prefix tuning cannot go on, for example because the loss is no longer finite."""


def input_not_finite(name: str) -> CalibrationError:
    """What is wrong where calibration text drove the input of the linear `name` beyond the model's precision."""
    return CalibrationError(
        f"the input of {name} is not finite on the calibration text: use model.dtype=float32 or bfloat16"
    )


def did_you_mean(value: str, options: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the option closest to `value`, or an empty string when none is close."""
    close = difflib.get_close_matches(str(value), [str(option) for option in options], n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""
