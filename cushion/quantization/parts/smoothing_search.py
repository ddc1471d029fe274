"""Smoothing whose scales are searched, group by group. Its keys are `smoothing_search` and `smoothing_steps`."""

from __future__ import annotations

from dataclasses import replace

from cushion.checks import at_least, one_of, without_effect
from cushion.errors import ConfigError
from cushion.quantization.parts.base import NOTHING, Needed, Part, Quantizer
from cushion.quantization.parts.registry import register

METHODS = ("none", "smoothquant", "awq", "os_plus")

SEARCHED = Needed("cushion.quantization.smoothing_search:SmoothingSearch")
"""The scales of every norm, found before anything else is gathered."""


class SmoothingSearch(Part):
    """The scales of norms and of the linears behind them with the least output error under the run's quantizer."""

    name = "smoothing_search"
    order = 61
    effect = "cushion.quantization.smoothing_search:SEARCHED_SMOOTHING"
    fields = ("smoothing_search", "smoothing_steps")
    in_linears = True
    keeps_function = True

    def is_on(self, quantizer: Quantizer) -> bool:
        """Whether there is a method."""
        return bool(quantizer.smoothing_search != "none")

    def off(self, quantizer: Quantizer) -> Quantizer:
        """Norms and linears as they are."""
        return replace(quantizer, smoothing_search="none", smoothing_steps=20)

    def check(self, quantizer: Quantizer) -> None:
        """A known method that has something to lower the error of, and nothing else that smooths."""
        one_of("quantizer.smoothing_search", quantizer.smoothing_search, METHODS)
        at_least("quantizer.smoothing_steps", quantizer.smoothing_steps, 1)
        if not self.is_on(quantizer):
            return
        key = f"quantizer.smoothing_search={quantizer.smoothing_search}"
        if quantizer.smoothing_alpha is not None:
            alpha = quantizer.smoothing_alpha
            raise ConfigError(
                f"{key} finds the scales, and quantizer.smoothing_alpha={alpha} gives them: set smoothing_alpha=null, "
                "or smoothing_search=none"
            )
        if quantizer.input_rotation == "all":
            raise ConfigError(
                f"{key} weighs the channels that quantizer.input_rotation=all mixes again: use input_rotation=down"
            )

    def in_linears_of(self, quantizer: Quantizer) -> bool:
        """Not where it shifts: a norm without a bias has no place for that."""
        return bool(quantizer.smoothing_search != "os_plus")

    def statistics(self, quantizer: Quantizer) -> frozenset[Needed]:
        """The errors that decide are those of calibration text."""
        return frozenset({SEARCHED}) if self.is_on(quantizer) else NOTHING

    def label(self, quantizer: Quantizer) -> str:
        """` awq`, unless the quantizer's name says so."""
        method = str(quantizer.smoothing_search)
        return f" {method}" if self.is_on(quantizer) and not quantizer.name.startswith(method) else ""

    def warnings(self, quantizer: Quantizer) -> list[str]:
        """Steps without a search, and a search with nothing to lower the error of."""
        if self.is_on(quantizer):
            if quantizer.weights.bits is None and quantizer.activations.bits is None:
                why = "with quantizer.weights.bits=null and quantizer.activations.bits=null"
                return without_effect("quantizer", quantizer, ("smoothing_search",), why)
            return []
        return without_effect("quantizer", quantizer, ("smoothing_steps",), "with quantizer.smoothing_search=none")


register(SmoothingSearch())
