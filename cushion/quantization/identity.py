"""What of a quantizer decides an outcome, for the keys of cached steps: options without effect are left out."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

from cushion.config import QuantizerConfig
from cushion.quantization.calibration import Calibration


def quantizer_identity(
    quantizer: QuantizerConfig, calibration: Calibration | None = None, keep: Set[str] = frozenset()
) -> dict[str, Any]:
    """The part of a key that stands for a quantizer as it is put on a model.

    Args:
        quantizer: its configuration; name, amount of calibration text and QFeM's search are not in it, what came of
            them is.
        calibration: the statistics that it uses, if any.
        keep: the linears that QFeM keeps in full precision.

    """
    weights, activations = quantizer.weights, quantizer.activations
    found: dict[str, Any] = {"smoothing_alpha": quantizer.smoothing_alpha, "rotation": rotation_of(quantizer)}
    if weights.bits is not None:
        size = weights.group_size if weights.granularity == "per_group" else None
        found["weights"] = [weights.bits, weights.granularity, size]
    if activations.bits is not None:
        found["activations"] = [activations.bits, activations.granularity, activations.range, activations.symmetric]
        found["keep"] = sorted(keep)
    for key in ("kv_cache", "attention"):
        part = getattr(quantizer, key)
        if part.bits is not None:
            found[key] = [part.bits, part.granularity, part.symmetric]
    grids = (activations, quantizer.kv_cache, quantizer.attention)
    if weights.bits is not None or any(grid.bits is not None for grid in grids):
        found["levels"] = quantizer.levels
    if any(grid.bits is not None and not grid.symmetric for grid in grids):
        found["zero_point"] = quantizer.zero_point
    if weights.bits is not None or activations.bits is not None:
        found["targets"] = list(quantizer.targets)
    if calibration is not None and quantizer.needs_calibration:
        found["calibration"] = calibration.key
    return found


def rotation_of(quantizer: QuantizerConfig) -> list[Any]:
    """The rotation and its seed; the seed is 0 where nothing is rotated."""
    return [quantizer.rotation, 0 if quantizer.rotation == "none" else quantizer.rotation_seed]
