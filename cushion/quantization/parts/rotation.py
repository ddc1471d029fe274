"""Rotation of the residual stream. Its keys are `rotation` and `rotation_seed`."""

from __future__ import annotations

from dataclasses import replace

from cushion.checks import one_of, without_effect
from cushion.quantization.parts.base import Part, Quantizer
from cushion.quantization.parts.registry import register

ROTATIONS = ("none", "hadamard")


class Rotation(Part):
    """The residual stream multiplied by an orthogonal matrix, folded into the weights."""

    name = "rotation"
    order = 50
    effect = "cushion.quantization.rotation:ROTATION"
    fields = ("rotation", "rotation_seed")
    in_linears = True
    keeps_function = True

    def is_on(self, quantizer: Quantizer) -> bool:
        """Whether it rotates."""
        return quantizer.rotation != "none"

    def off(self, quantizer: Quantizer) -> Quantizer:
        """The stream as it is."""
        return replace(quantizer, rotation="none", rotation_seed=0)

    def check(self, quantizer: Quantizer) -> None:
        """A known rotation."""
        one_of("quantizer.rotation", quantizer.rotation, ROTATIONS)

    def label(self, quantizer: Quantizer) -> str:
        """` rotated`, unless the quantizer's name says so."""
        return " rotated" if self.is_on(quantizer) and quantizer.name != "rotation" else ""

    def warnings(self, quantizer: Quantizer) -> list[str]:
        """A seed without a rotation."""
        if self.is_on(quantizer):
            return []
        return without_effect("quantizer", quantizer, ("rotation_seed",), "with quantizer.rotation=none")


register(Rotation())
