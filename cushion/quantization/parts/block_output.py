"""Static ranges searched by the error of a block's output. Its key is `activations.estimator=block_output`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from cushion.errors import ConfigError
from cushion.quantization.parts.base import Part, Quantizer
from cushion.quantization.parts.registry import register


class BlockOutput(Part):
    """The factors by which min-max ranges of the linears' inputs are narrowed, chosen block by block."""

    name = "block_output"
    order = 21
    of_activations = True
    effect = "cushion.quantization.block_output:BLOCK_OUTPUT"
    in_linears = True
    blockwise = True
    weights_may_learn = True

    @property
    def key(self) -> str:
        """The estimator of the activations: the part has no field of its own."""
        return "quantizer.activations.estimator=block_output"

    def is_on(self, quantizer: Quantizer) -> bool:
        """Whether there are static ranges, and they are found this way."""
        activations = quantizer.activations
        is_static = activations.bits is not None and activations.range == "static"
        return bool(is_static and activations.estimator == self.name)

    def off(self, quantizer: Quantizer) -> Quantizer:
        """Min-max ranges."""
        if quantizer.activations.estimator != self.name:
            return quantizer
        activations = replace(quantizer.activations, estimator="minmax", estimator_options={})
        return replace(quantizer, activations=activations)

    def check(self, quantizer: Quantizer) -> None:
        """What is fitted to the weights is fitted in the same walk through the blocks."""
        if self.is_on(quantizer) and quantizer.weights.fitted_with != "everything":
            raise ConfigError(
                f"{self.key} searches ranges while the weights are fitted, and quantizer.weights.fitted_with="
                f"{quantizer.weights.fitted_with} rounds no activations then: use everything, or another estimator"
            )

    def identity(self, quantizer: Quantizer) -> dict[str, Any]:
        """How much text decides; the ranges that it starts from are those of the activations."""
        return {self.name: quantizer.activations.estimation()[1]}


register(BlockOutput())
