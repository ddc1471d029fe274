"""QFeM (arXiv 2405.14428, section 4.2): linears with outlier tokens at their input keep full-precision activations."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

from cushion.checks import at_least, require, without_effect
from cushion.errors import ConfigError
from cushion.quantization.parts.base import NOTHING, Needed, Part, Quantizer
from cushion.quantization.parts.registry import register

RATIOS = Needed("cushion.quantization.qfem:RatioObserver")
"""What is gathered for it: the scales of tokens."""


@dataclass
class QFeMConfig:
    """`quantizer.qfem`: QFeM (arXiv 2405.14428, section 4.2), off unless `alpha` is set or `search` is on.

    Linears whose input has a max/median ratio of token scales above `alpha` keep full-precision activations.
    """

    alpha: float | None = None
    """QFeM: linears whose input has a max/median ratio above alpha keep full-precision activations; null: no QFeM,
    unless `qfem.search`

    Allowed: 0 and more, null
    """
    search: bool = False
    """QFeM: find alpha by `qfem.target`

    Allowed: true, false
    """
    target: float = 1.05
    """How many times the perplexity of per-token dynamic scales is good enough, on calibration text

    Allowed: positive
    Paper: **open**: 5 % is about what the eye takes for the same perplexity
    """
    texts: int | None = None
    """How many of the calibration texts that perplexity is measured on; null: all

    Allowed: 1 to `calibration.samples`, null
    Paper: **open**
    """
    curve: int = 0
    """Further points of the trade-off curve, beside those that the search needs

    Allowed: 0 and more
    """

    def __post_init__(self) -> None:
        alpha, target = self.alpha, self.target
        require(alpha is None or 0 <= alpha < math.inf, "quantizer.qfem.alpha", alpha, "at least 0 and finite, or null")
        require(0 < target < math.inf, "quantizer.qfem.target", target, "it must be positive and finite")
        at_least("quantizer.qfem.texts", self.texts, 1)
        at_least("quantizer.qfem.curve", self.curve, 0)
        reason = "with quantizer.qfem.search=true alpha is what is looked for: set one of the two"
        require(alpha is None or not self.search, "quantizer.qfem.alpha", alpha, reason)


class QFeM(Part):
    """The choice of linears whose input is not quantized."""

    name = "qfem"
    order = 70
    of_activations = True
    effect = "cushion.quantization.qfem:QFEM"
    fields = ("qfem",)
    in_linears = True

    def is_on(self, quantizer: Quantizer) -> bool:
        """Whether there is an alpha, given or looked for, and an input to leave in full precision."""
        return quantizer.activations.bits is not None and (quantizer.qfem.search or quantizer.qfem.alpha is not None)

    def off(self, quantizer: Quantizer) -> Quantizer:
        """The inputs of all linears are quantized alike."""
        return replace(quantizer, qfem=QFeMConfig())

    def check(self, quantizer: Quantizer) -> None:
        """There are as many calibration texts as it reads, and scales per token to compare with."""
        if quantizer.qfem.search and quantizer.activations.granularity == "per_block":
            raise ConfigError(
                "quantizer.qfem.search=true compares with one scale for each token, which quantizer.activations.format="
                f"{quantizer.activations.format} does not have: give quantizer.qfem.alpha, with search=false"
            )
        texts, samples = quantizer.qfem.texts, quantizer.calibration.samples
        reason = f"there are quantizer.calibration.samples={samples} calibration texts"
        require(texts is None or texts <= samples, "quantizer.qfem.texts", texts, reason)

    def statistics(self, quantizer: Quantizer) -> frozenset[Needed]:
        """The ratios are of the scales of tokens."""
        return frozenset({RATIOS}) if self.is_on(quantizer) else NOTHING

    def identity(self, quantizer: Quantizer) -> dict[str, Any]:
        """Nothing: the linears that it keeps decide, and they are named beside the quantizer."""
        return {}

    def warnings(self, quantizer: Quantizer) -> list[str]:
        """All of it without quantized activations, and the options of a search without one."""
        keys = [field.name for field in fields(QFeMConfig)]
        if quantizer.activations.bits is None:
            return without_effect("quantizer.qfem", quantizer.qfem, keys, "with quantizer.activations.bits=None")
        if quantizer.qfem.search:
            return []
        keys = [key for key in keys if key not in ("alpha", "search")]
        return without_effect("quantizer.qfem", quantizer.qfem, keys, "with quantizer.qfem.search=False")


register(QFeM())
