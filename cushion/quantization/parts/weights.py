"""Quantized weights of the linears in the decoder blocks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from cushion.checks import at_least, one_of, require, without_effect
from cushion.quantization.formats.registry import FORMATS, check_format
from cushion.quantization.parts.base import NOTHING, Part, Quantizer
from cushion.quantization.parts.grids import grid_keys, width
from cushion.quantization.parts.registry import register

WEIGHT_GRANULARITIES = ("per_tensor", "per_channel", "per_group", "per_block")
WEIGHT_ESTIMATORS = ("minmax", "mse", "output")
WEIGHT_METHODS = ("rtn", "gptq")
COLUMN_ORDERS = ("given", "diagonal")


@dataclass
class WeightConfig:
    """`quantizer.weights`: the grid of the weights, symmetric. `bits: null` leaves them in full precision.

    `estimator` says how their ranges are found: `minmax`, `mse`, those with the smallest squared error, or
    `output`, those with the smallest error of the outputs on calibration text; `method` how
    the codes are: `rtn`, each the nearest, or `gptq`, with its `damping`, the order in which it takes the columns, and
    whether the linears of a block are rounded one after another (`true_sequential`). `narrow_range: false` lets codes
    reach -2^(N-1), where ranges are searched.
    """

    bits: int | None = 8
    granularity: str = "per_tensor"
    group_size: int = 128
    estimator: str = "minmax"
    format: str = "int"
    method: str = "rtn"
    damping: float = 0.01
    column_order: str = "given"
    true_sequential: bool = False
    narrow_range: bool = True

    def __post_init__(self) -> None:
        one_of("quantizer.weights.granularity", self.granularity, WEIGHT_GRANULARITIES)
        check_format("quantizer.weights", self.format, self.bits, granularity=self.granularity)
        at_least("quantizer.weights.group_size", self.group_size, 1)
        one_of("quantizer.weights.estimator", self.estimator, WEIGHT_ESTIMATORS)
        one_of("quantizer.weights.method", self.method, WEIGHT_METHODS)
        require(self.damping > 0, "quantizer.weights.damping", self.damping, "a share above 0")
        one_of("quantizer.weights.column_order", self.column_order, COLUMN_ORDERS)
        reason = f"quantizer.weights.format={self.format} has no such code: only int has, or leave it true"
        require(self.narrow_range or self.format == "int", "quantizer.weights.narrow_range", False, reason)
        if self.bits is not None and FORMATS[self.format].block is not None:
            reason = f"minmax, because quantizer.weights.format={self.format} says what scale a block has"
            require(self.estimator == "minmax", "quantizer.weights.estimator", self.estimator, reason)
            require(self.method == "rtn", "quantizer.weights.method", self.method, f"rtn with format={self.format}")


_OF_GPTQ = ("method", "damping", "column_order", "true_sequential")
"""What the part `gptq` answers for."""


class Weights(Part):
    """The weights of the targeted linears, symmetric."""

    name = "weights"
    order = 10
    effect = "cushion.quantization.weights:WEIGHTS"
    fields = ("weights",)
    in_linears = True

    def is_on(self, quantizer: Quantizer) -> bool:
        """Whether there are bits."""
        return quantizer.weights.bits is not None

    def off(self, quantizer: Quantizer) -> Quantizer:
        """Weights in full precision."""
        return replace(quantizer, weights=WeightConfig(bits=None))

    def reads(self, quantizer: Quantizer) -> frozenset[str]:
        """The targets, and the keys of the grid."""
        return grid_keys(quantizer.weights.format, symmetric=True) | {"targets"} if self.is_on(quantizer) else NOTHING

    def identity(self, quantizer: Quantizer) -> dict[str, Any]:
        """The grid; the size of groups where there are groups."""
        weights = quantizer.weights
        size = weights.group_size if weights.granularity == "per_group" else None
        own = {key: value for key, value in vars(weights).items() if key not in _OF_GPTQ}
        if weights.narrow_range:  # keys of before there was a choice
            del own["narrow_range"]
        return {"weights": {**own, "group_size": size, "format": FORMATS[weights.format].identity()}}

    def label(self, quantizer: Quantizer) -> str:
        """`W8`."""
        return f"W{width(quantizer.weights)}"

    def warnings(self, quantizer: Quantizer) -> list[str]:
        """The estimator without bits, the size of groups without groups."""
        weights, section, found = quantizer.weights, "quantizer.weights", list[str]()
        if weights.bits is None:
            keys = ("estimator", "format", "narrow_range")
            found += without_effect(section, weights, keys, "with quantizer.weights.bits=null")
        if weights.granularity != "per_group":
            why = f"with quantizer.weights.granularity={weights.granularity}"
            found += without_effect(section, weights, ("group_size",), why)
        return found


register(Weights())
