"""Rotation of what attention works on, head by head. Its key is `head_rotation`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from cushion.checks import one_of
from cushion.quantization.parts.base import Part, Quantizer
from cushion.quantization.parts.registry import register

HEAD_ROTATIONS = ("none", "values", "keys", "all")


def rotates_values(quantizer: Quantizer) -> bool:
    """Whether the values of every head are rotated: R2."""
    return quantizer.head_rotation in ("values", "all")


def rotates_keys(quantizer: Quantizer) -> bool:
    """Whether queries and keys are rotated: R3. Scores stay as they are, so it takes rounded keys to see it."""
    rounded = quantizer.kv_cache.bits is not None or quantizer.attention.bits is not None
    return rounded and quantizer.head_rotation in ("keys", "all")


class HeadRotation(Part):
    """The values of each head, and its queries and keys, multiplied by a Hadamard matrix."""

    name = "head_rotation"
    order = 55
    effect = "cushion.quantization.head_rotation:HEAD_ROTATION"
    fields = ("head_rotation",)
    keeps_function = True
    mixes_channels = True

    def is_on(self, quantizer: Quantizer) -> bool:
        """Whether anything is rotated that something depends on."""
        return rotates_values(quantizer) or rotates_keys(quantizer)

    def off(self, quantizer: Quantizer) -> Quantizer:
        """Heads as they are."""
        return replace(quantizer, head_rotation="none")

    def check(self, quantizer: Quantizer) -> None:
        """A known choice."""
        one_of("quantizer.head_rotation", quantizer.head_rotation, HEAD_ROTATIONS)

    def identity(self, quantizer: Quantizer) -> dict[str, Any]:
        """What is rotated: keys that nothing rounds are not."""
        rotated = {"values": rotates_values(quantizer), "keys": rotates_keys(quantizer)}
        return {"head_rotation": [name for name, is_rotated in rotated.items() if is_rotated]}

    def label(self, quantizer: Quantizer) -> str:
        """What is rotated: ` values and keys rotated`."""
        rotated = self.identity(quantizer)["head_rotation"]
        return f" {' and '.join(rotated)} rotated" if rotated else ""

    def warnings(self, quantizer: Quantizer) -> list[str]:
        """Keys that nothing rounds."""
        if quantizer.head_rotation not in ("keys", "all") or rotates_keys(quantizer):
            return []
        return [
            f"quantizer.head_rotation={quantizer.head_rotation!r} has no effect on queries and keys with "
            "quantizer.kv_cache.bits=null and quantizer.attention.bits=null"
        ]


register(HeadRotation())
