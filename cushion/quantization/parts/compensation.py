"""A low-rank branch that makes good the error of rounded weights: LQER, L2QER, ASER. Its key is `compensation`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from cushion.checks import at_least, one_of, require, without_effect
from cushion.errors import ConfigError
from cushion.quantization.parts.base import Part, Quantizer
from cushion.quantization.parts.registry import register
from cushion.quantization.parts.weights import fitted_with

COMPENSATIONS = ("none", "lqer", "l2qer", "aser")


@dataclass
class CompensationConfig:
    """`quantizer.compensation`: two thin matrices in full precision beside each quantized weight.

    `method` says in which norm they are nearest to the error of the weight: `lqer` as it stands, `l2qer` with the mean
    magnitudes of the inputs, `aser` with their whole Gram matrix, damped by a share of its mean diagonal. `rank` is the
    most that they have; with `share`, the smallest whose singular values hold this share of the sum of all. `outliers`
    is ASER's smoothing: so many channels are scaled down at the input and left to the branch alone.
    """

    method: str = "none"
    """A branch of two thin matrices in full precision beside each quantized weight, which makes good what it can of
    the rounding ([method](method.md#low-rank-compensation)): of the error of the weight (`lqer`), of that weighed
    by the mean magnitudes of the inputs (`l2qer`), or of the outputs on the calibration texts (`aser`); found block
    by block behind the prefix, with the blocks before already quantized

    Allowed: `none`, `lqer`, `l2qer`, `aser`
    Paper: not in the paper
    """
    rank: int | None = 64
    """The largest rank of a branch; null: no bound, with `share`

    Allowed: 1 and more, null
    Paper: not in the paper; larger branches cost more, and what they fit becomes the calibration text's own
    """
    share: float | None = None
    """The rank of each linear is the smallest whose singular values have this share of the sum of all; null: `rank`

    Allowed: above 0, at most 1, null
    Paper: **open** in ASER: its values are not given
    """
    damping: float = 0.01
    """With `aser`: what is added to the diagonal of X^T X, as a share of its mean

    Allowed: above 0
    Paper: **open** in ASER; the value of GPTQ
    """
    outliers: int = 0
    """ASER's smoothing: how many channels of each linear's input are scaled down to the least of them and kept by the
    branch alone; 0: none

    Allowed: 0 to `rank`
    Paper: 32 in ASER, and in `aser`
    """

    def __post_init__(self) -> None:
        one_of("quantizer.compensation.method", self.method, COMPENSATIONS)
        at_least("quantizer.compensation.rank", self.rank, 1)
        share, named = self.share, "quantizer.compensation.share"
        require(share is None or 0 < share <= 1, named, share, "above 0 and at most 1, or null")
        reason = "with quantizer.compensation.rank=null give the share that the singular values have to hold"
        require(share is not None or self.rank is not None, named, share, reason)
        require(self.damping > 0, "quantizer.compensation.damping", self.damping, "a share above 0")
        at_least("quantizer.compensation.outliers", self.outliers, 0)
        if self.rank is not None and self.outliers > self.rank:
            reason = f"at most quantizer.compensation.rank={self.rank}, as the branch alone holds these channels"
            require(False, "quantizer.compensation.outliers", self.outliers, reason)


class Compensation(Part):
    """A branch of low rank beside every quantized weight, found block by block."""

    name = "compensation"
    order = 15
    effect = "cushion.quantization.compensation:COMPENSATION"
    fields = ("compensation",)
    blockwise = True

    def is_on(self, quantizer: Quantizer) -> bool:
        """Whether there is a branch, and an error of weights for it to make good."""
        return bool(quantizer.compensation.method != "none" and quantizer.weights.bits is not None)

    def off(self, quantizer: Quantizer) -> Quantizer:
        """Rounded weights alone."""
        return replace(quantizer, compensation=CompensationConfig())

    def check(self, quantizer: Quantizer) -> None:
        """Outliers are taken out before anything measures inputs or rounds weights in another way than to nearest."""
        own = quantizer.compensation
        if not self.is_on(quantizer):
            return
        key = f"quantizer.compensation.outliers={own.outliers}"
        if own.outliers and quantizer.weights.method != "rtn":
            raise ConfigError(
                f"{key} takes channels out of the weights before they are rounded, which "
                f"quantizer.weights.method={quantizer.weights.method} does not see: use rtn, or outliers=0"
            )
        if own.outliers and quantizer.weights.estimator == "output":
            raise ConfigError(
                f"{key} rounds what it leaves of the weights anew, without the clipping that "
                "quantizer.weights.estimator=output fitted to the whole ones: use minmax or mse, or outliers=0"
            )
        if own.outliers and quantizer.activations.bits is not None and quantizer.activations.range == "static":
            raise ConfigError(
                f"{key} changes the inputs whose static ranges were measured before: use "
                "quantizer.activations.range=dynamic, or outliers=0"
            )

    def identity(self, quantizer: Quantizer) -> dict[str, Any]:
        """Everything but a damping that nothing reads."""
        own = dict(vars(quantizer.compensation))
        if own["method"] != "aser":
            del own["damping"]
        return {"compensation": own | fitted_with(quantizer)}

    def label(self, quantizer: Quantizer) -> str:
        """` ASER 64`: the method, the rank or the share of the singular values, and how many channels it smooths."""
        own = quantizer.compensation
        if not self.is_on(quantizer):
            return ""
        size = own.rank if own.share is None else f"{own.share:g}"
        return f" {own.method.upper()} {size}" + (f" smoothing {own.outliers} channels" if own.outliers else "")

    def warnings(self, quantizer: Quantizer) -> list[str]:
        """Options without rounded weights or without a branch, and the damping without a Gram matrix."""
        own, keys = quantizer.compensation, ("rank", "share", "damping", "outliers")
        if quantizer.weights.bits is None:
            why = "with quantizer.weights.bits=null"
            return without_effect("quantizer.compensation", own, ("method", *keys), why)
        why = f"with quantizer.compensation.method={own.method}"
        if not self.is_on(quantizer):
            return without_effect("quantizer.compensation", own, keys, why)
        return [] if own.method == "aser" else without_effect("quantizer.compensation", own, ("damping",), why)


register(Compensation())
