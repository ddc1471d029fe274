"""What of a quantizer decides an outcome, for the keys of cached steps: options without effect are left out."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

from cushion.code import version_at
from cushion.execution.registry import SIMULATED, execution_identity
from cushion.quantization.calibration import Calibration
from cushion.quantization.learned import Learned
from cushion.quantization.parts.registry import parts
from cushion.quantization.quantizer import QuantizerConfig


def quantizer_identity(
    quantizer: QuantizerConfig,
    calibration: Calibration | None = None,
    keep: Set[str] = frozenset(),
    execution: str = SIMULATED,
    learned: Learned | None = None,
) -> dict[str, Any]:
    """The part of a key that stands for a quantizer as it is put on a model, with the code of its parts.

    Args:
        quantizer: its configuration; name, amount of calibration text and QFeM's search are not in it, what came of
            them is.
        calibration: the statistics that it uses, if any.
        keep: the linears that QFeM keeps in full precision.
        execution: how its linears are computed.
        learned: ranges and weights that were learned for it, if any.

    """
    found: dict[str, Any] = {}
    shared: set[str] = set()
    code: dict[str, str] = {}
    for part in parts():
        if part.is_on(quantizer):
            own = part.identity(quantizer)
            found |= own
            shared |= part.reads(quantizer)
            if own and part.effect is not None:  # what QFeM decides is in `keep`
                code[part.effect] = version_at(part.effect)
    found |= {key: getattr(quantizer, key) for key in sorted(shared)}
    found |= {"code": code, "execution": execution_identity(execution)}
    if keep:
        found["keep"] = sorted(keep)
    if calibration is not None and quantizer.is_fitted:
        found["calibration"] = calibration.key
    if learned is not None:
        found["learned"] = learned.fingerprint
    return found


def rotation_of(quantizer: QuantizerConfig) -> list[Any]:
    """The rotation and its seed; the seed is 0 where nothing is rotated."""
    return [quantizer.rotation, 0 if quantizer.rotation == "none" else quantizer.rotation_seed]
