"""Quantized weights of the linears in the decoder blocks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from cushion.checks import at_least, one_of, require, without_effect
from cushion.quantization.formats.registry import FORMATS, check_format
from cushion.quantization.parts.base import NOTHING, Part, Quantizer
from cushion.quantization.parts.grids import grid_keys, width
from cushion.quantization.parts.registry import register, rounds_activations

WEIGHT_GRANULARITIES = ("per_tensor", "per_channel", "per_group", "per_block")
WEIGHT_ESTIMATORS = ("minmax", "mse", "output")
WEIGHT_METHODS = ("rtn", "gptq")
COLUMN_ORDERS = ("given", "diagonal")
FITTED_WITH = ("everything", "weights")


@dataclass
class WeightConfig:
    """`quantizer.weights`: the grid of the weights, symmetric. `bits: null` leaves them in full precision.

    `estimator` says how their ranges are found: `minmax`, `mse`, those with the smallest squared error, or
    `output`, those with the smallest error of the outputs on calibration text; `method` how
    the codes are: `rtn`, each the nearest, or `gptq`, with its `damping`, the order in which it takes the columns, and
    whether the linears of a block are rounded one after another (`true_sequential`). `fitted_with` says what is rounded
    in the blocks before meanwhile. `narrow_range: false` lets codes reach -2^(N-1), where ranges are searched.
    """

    bits: int | None = 8
    """Bits of the weights; a format other than `int` has one width, which must stand here

    Allowed: 2 to 8, null
    """
    granularity: str = "per_tensor"
    """One scale per tensor, per output channel, or per output channel and group of inputs; `per_block` belongs to the
    formats that fix their blocks, `mxfp8`, `mxfp6`, `mxfp4` (32 inputs) and `nvfp4` (16), which take no other

    Allowed: `per_tensor`, `per_channel`, `per_group`, `per_block`
    Paper: group-wise
    """
    group_size: int = 128
    """Neighbouring inputs per group; must divide every quantized linear's inputs

    Allowed: 1 and more
    Paper: **open**; 128 is the usual size in weight quantization, the options have 64
    """
    estimator: str = "minmax"
    """How ranges are found: all values fit (`minmax`), the squared error is smallest (`mse`), or the error of the
    outputs on the calibration texts behind the prefix is (`output`, AWQ's clipping, with `per_channel` and
    `per_group`; queries and keys stay at `minmax`); formats of blocks have `minmax` alone

    Allowed: `minmax`, `mse`, `output`
    """
    format: str = "int"
    """Number format of the codes ([method](method.md#number-formats))

    Allowed: `int`, `fp8_e4m3`, `fp8_e5m2`, `mxfp8`, `mxfp6`, `mxfp4`, `nvfp4`, and what packages of yours add
        ([extending](extending.md#a-number-format))
    """
    method: str = "rtn"
    """How the codes are chosen on that grid: each the nearest (`rtn`), or block by block so that the outputs of each
    linear change least (`gptq`, arXiv [2210.17323](https://arxiv.org/abs/2210.17323)), on the calibration texts
    behind the prefix, with the blocks before already quantized

    Allowed: `rtn`, `gptq`
    """
    damping: float = 0.01
    """With `gptq`: what is added to the diagonal of H = 2 X X^T, as a share of its mean

    Allowed: above 0
    """
    column_order: str = "given"
    """With `gptq`: the columns as they stand, or those with large inputs first (act-order)

    Allowed: `given`, `diagonal`
    """
    true_sequential: bool = False
    """With `gptq`: query, key and value, then output, then gate and up, then down, each on the inputs that it has
    behind the rounded weights before it, as GPTQ's and QuaRot's codes do; else all linears of a block on those of the
    unrounded block. It costs a pass over the calibration texts for each step

    Allowed: true, false
    """
    fitted_with: str = "everything"
    """With `gptq` or a `compensation`: what the blocks before have rounded while they are found: all that the quantizer
    rounds, or weights alone, as in GPTQ's and QuaRot's codes. What is found so serves all quantizers that differ in
    activations and cache

    Allowed: `everything`, `weights`
    """
    narrow_range: bool = True
    """Whether codes leave out the lowest one, -8 of 4 bits, which `estimator=mse` and `output` and `gptq` can reach;
    false in GPTQ's and QuaRot's codes

    Allowed: true, false
    """

    def __post_init__(self) -> None:
        one_of("quantizer.weights.granularity", self.granularity, WEIGHT_GRANULARITIES)
        check_format("quantizer.weights", self.format, self.bits, granularity=self.granularity)
        at_least("quantizer.weights.group_size", self.group_size, 1)
        one_of("quantizer.weights.estimator", self.estimator, WEIGHT_ESTIMATORS)
        one_of("quantizer.weights.method", self.method, WEIGHT_METHODS)
        require(self.damping > 0, "quantizer.weights.damping", self.damping, "a share above 0")
        one_of("quantizer.weights.column_order", self.column_order, COLUMN_ORDERS)
        one_of("quantizer.weights.fitted_with", self.fitted_with, FITTED_WITH)
        reason = f"quantizer.weights.format={self.format} has no such code: only int has, or leave it true"
        require(self.narrow_range or self.format == "int", "quantizer.weights.narrow_range", False, reason)
        if self.bits is not None and FORMATS[self.format].block is not None:
            reason = f"minmax, because quantizer.weights.format={self.format} says what scale a block has"
            require(self.estimator == "minmax", "quantizer.weights.estimator", self.estimator, reason)
            require(self.method == "rtn", "quantizer.weights.method", self.method, f"rtn with format={self.format}")


_OF_GPTQ = ("method", "damping", "column_order", "true_sequential", "fitted_with")
"""What the part `gptq` answers for, the last one with `compensation`."""


def fitted_with(quantizer: Quantizer) -> dict[str, Any]:
    """For the identity of a part that is fitted: what was rounded meanwhile, where that is not all."""
    own = quantizer.weights.fitted_with
    return {"fitted_with": own} if own != "everything" and rounds_activations(quantizer) else {}


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
