"""SmoothQuant: outliers of channels moved from the activations into the weights. Its key is `smoothing_alpha`."""

from __future__ import annotations

from dataclasses import replace

from cushion.checks import require
from cushion.quantization.parts.base import NOTHING, RANGES, Needed, Part, Quantizer
from cushion.quantization.parts.registry import register


class Smoothing(Part):
    """Norms divided and the linears behind them multiplied by a scale of each channel."""

    name = "smoothing"
    order = 60
    effect = "cushion.quantization.smoothing:SMOOTHING"
    fields = ("smoothing_alpha",)
    in_linears = True
    keeps_function = True

    def is_on(self, quantizer: Quantizer) -> bool:
        """Whether there is an alpha; 0 is one."""
        return quantizer.smoothing_alpha is not None

    def off(self, quantizer: Quantizer) -> Quantizer:
        """Norms and linears as they are."""
        return replace(quantizer, smoothing_alpha=None)

    def check(self, quantizer: Quantizer) -> None:
        """Alpha is a share."""
        alpha = quantizer.smoothing_alpha
        require(alpha is None or 0 <= alpha <= 1, "quantizer.smoothing_alpha", alpha, "0 to 1, or null for none")

    def statistics(self, quantizer: Quantizer) -> frozenset[Needed]:
        """The abs-max of every channel comes from its range."""
        return frozenset({RANGES}) if self.is_on(quantizer) else NOTHING


register(Smoothing())
