"""Rotation of the inputs of linears while the model runs. Its key is `input_rotation`."""

from __future__ import annotations

from dataclasses import replace

from cushion.checks import one_of
from cushion.quantization.parts.base import Part, Quantizer
from cushion.quantization.parts.registry import register

INPUT_ROTATIONS = ("none", "down", "down_and_heads", "all")


class InputRotation(Part):
    """The input of a linear multiplied by a Hadamard matrix, and its weight with the transposed one."""

    name = "input_rotation"
    order = 75
    effect = "cushion.quantization.input_rotation:INPUT_ROTATION"
    fields = ("input_rotation",)
    keeps_function = True
    mixes_channels = True

    def is_on(self, quantizer: Quantizer) -> bool:
        """Whether any input is rotated."""
        return quantizer.input_rotation != "none"

    def off(self, quantizer: Quantizer) -> Quantizer:
        """Inputs as they are."""
        return replace(quantizer, input_rotation="none")

    def check(self, quantizer: Quantizer) -> None:
        """A known set of linears."""
        one_of("quantizer.input_rotation", quantizer.input_rotation, INPUT_ROTATIONS)

    def reads(self, quantizer: Quantizer) -> frozenset[str]:
        """The targets: a linear that is not quantized needs no rotation."""
        return frozenset({"targets"}) if self.is_on(quantizer) else frozenset()

    def label(self, quantizer: Quantizer) -> str:
        """What is rotated: ` down inputs rotated`."""
        return f" {quantizer.input_rotation.replace('_', ' ')} inputs rotated" if self.is_on(quantizer) else ""


register(InputRotation())
