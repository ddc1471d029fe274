"""GPTQ, the second way of rounding weights: `weights.method=gptq`, `damping`, `column_order` and `true_sequential`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from cushion.checks import without_effect
from cushion.errors import ConfigError
from cushion.quantization.parts.base import Part, Quantizer
from cushion.quantization.parts.registry import PARTS, register, rounds_activations
from cushion.quantization.parts.weights import fitted_with


class Gptq(Part):
    """The codes of the weights chosen block by block, on the grid that the weights have."""

    name = "gptq"
    order = 12
    effect = "cushion.quantization.gptq:GPTQ"
    in_linears = True
    blockwise = True

    @property
    def key(self) -> str:
        """The method of the weights: the part has no field of its own."""
        return "quantizer.weights.method=gptq"

    def is_on(self, quantizer: Quantizer) -> bool:
        """Whether the weights are rounded this way."""
        return bool(quantizer.weights.method == "gptq")

    def off(self, quantizer: Quantizer) -> Quantizer:
        """Weights rounded to nearest."""
        weights = replace(quantizer.weights, method="rtn", damping=0.01, column_order="given", true_sequential=False)
        if not PARTS["compensation"].is_on(quantizer):
            weights = replace(weights, fitted_with="everything")
        return replace(quantizer, weights=weights)

    def check(self, quantizer: Quantizer) -> None:
        """There are weights to round, on a grid without offset."""
        if self.is_on(quantizer) and quantizer.weights.bits is None:
            raise ConfigError(f"{self.key} has no weights to round with quantizer.weights.bits=null: use rtn")

    def identity(self, quantizer: Quantizer) -> dict[str, Any]:
        """Damping and order; scales and grid are those of the weights."""
        weights = quantizer.weights
        own: dict[str, Any] = {"damping": weights.damping, "column_order": weights.column_order}
        if weights.true_sequential:
            own["true_sequential"] = True
        return {"gptq": own | fitted_with(quantizer)}

    def label(self, quantizer: Quantizer) -> str:
        """` GPTQ`."""
        return " GPTQ" if self.is_on(quantizer) else ""

    def warnings(self, quantizer: Quantizer) -> list[str]:
        """Damping and order without GPTQ; `fitted_with` with nothing fitted, or nothing but weights rounded."""
        why, keys = f"with quantizer.weights.method={quantizer.weights.method}", list[str]()
        if not self.is_on(quantizer):
            keys += ["damping", "column_order", "true_sequential"]
            if not PARTS["compensation"].is_on(quantizer):
                keys += ["fitted_with"]
        found = without_effect("quantizer.weights", quantizer.weights, keys, why)
        if "fitted_with" not in keys and not rounds_activations(quantizer):
            found += without_effect(
                "quantizer.weights", quantizer.weights, ["fitted_with"], "with nothing else rounded"
            )
        return found


register(Gptq())
