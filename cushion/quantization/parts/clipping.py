"""AWQ's clipping, the third way of finding the ranges of weights. Its key is `weights.estimator=output`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from cushion.checks import require
from cushion.quantization.parts.base import Part, Quantizer
from cushion.quantization.parts.registry import register


class Clipping(Part):
    """The ranges of groups of weights chosen block by block, on the grid that the weights have."""

    name = "clipping"
    order = 11
    effect = "cushion.quantization.clipping:CLIPPING"
    in_linears = True
    blockwise = True

    @property
    def key(self) -> str:
        """The estimator of the weights: the part has no field of its own."""
        return "quantizer.weights.estimator=output"

    def is_on(self, quantizer: Quantizer) -> bool:
        """Whether there are weights whose ranges are found this way."""
        return bool(quantizer.weights.estimator == "output" and quantizer.weights.bits is not None)

    def off(self, quantizer: Quantizer) -> Quantizer:
        """The range of all values."""
        return replace(quantizer, weights=replace(quantizer.weights, estimator="minmax"))

    def check(self, quantizer: Quantizer) -> None:
        """Each output has ranges of its own."""
        if self.is_on(quantizer):
            reason = f"per_channel or per_group with {self.key}, which weighs one output's error at a time"
            granularity = quantizer.weights.granularity
            require(granularity in ("per_channel", "per_group"), "quantizer.weights.granularity", granularity, reason)

    def identity(self, quantizer: Quantizer) -> dict[str, Any]:
        """Only that it is on: all else stands with the weights."""
        return {"clipping": "output"}


register(Clipping())
