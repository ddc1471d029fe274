"""SmoothQuant's scales between two linears, where no norm stands before the second. Its key is `smoothing_pairs`."""

from __future__ import annotations

from dataclasses import replace

from cushion.checks import one_of, without_effect
from cushion.errors import ConfigError
from cushion.quantization.parts.base import NOTHING, RANGES, Needed, Part, Quantizer
from cushion.quantization.parts.head_rotation import rotates_values
from cushion.quantization.parts.registry import register

PAIRS = ("none", "values", "up", "all")


def scales_values(quantizer: Quantizer) -> bool:
    """Whether the values and the output projection are a pair."""
    return quantizer.smoothing_pairs in ("values", "all")


def scales_up(quantizer: Quantizer) -> bool:
    """Whether up and down projections are pairs."""
    return quantizer.smoothing_pairs in ("up", "all")


class SmoothingPairs(Part):
    """The outputs of one linear divided and the columns of the next multiplied by a scale of each channel."""

    name = "smoothing_pairs"
    order = 62
    effect = "cushion.quantization.smoothing_pairs:SMOOTHING_PAIRS"
    fields = ("smoothing_pairs",)
    keeps_function = True

    def in_linears_of(self, quantizer: Quantizer) -> bool:
        """Scaled values are in the cache too, and so in a prefix."""
        return not scales_values(quantizer)

    def is_on(self, quantizer: Quantizer) -> bool:
        """Whether there are pairs, and an alpha."""
        return bool(quantizer.smoothing_pairs != "none" and quantizer.smoothing_alpha is not None)

    def off(self, quantizer: Quantizer) -> Quantizer:
        """Linears as they are."""
        return replace(quantizer, smoothing_pairs="none")

    def check(self, quantizer: Quantizer) -> None:
        """A known choice, and no rotation between a channel that was measured and its scale."""
        one_of("quantizer.smoothing_pairs", quantizer.smoothing_pairs, PAIRS)
        if self.is_on(quantizer) and scales_values(quantizer) and rotates_values(quantizer):
            raise ConfigError(
                f"quantizer.smoothing_pairs={quantizer.smoothing_pairs} scales the channels that quantizer."
                f"head_rotation={quantizer.head_rotation} mixes before: use smoothing_pairs=up, or head_rotation=keys"
            )

    def statistics(self, quantizer: Quantizer) -> frozenset[Needed]:
        """The abs-max of every channel comes from its range."""
        return frozenset({RANGES}) if self.is_on(quantizer) else NOTHING

    def label(self, quantizer: Quantizer) -> str:
        """What is scaled: ` values and up scaled`."""
        named = [name for name, is_scaled in (("values", scales_values), ("up", scales_up)) if is_scaled(quantizer)]
        return f" {' and '.join(named)} scaled" if self.is_on(quantizer) else ""

    def warnings(self, quantizer: Quantizer) -> list[str]:
        """Pairs without an alpha."""
        if self.is_on(quantizer):
            return []
        return without_effect("quantizer", quantizer, ("smoothing_pairs",), "with quantizer.smoothing_alpha=null")


register(SmoothingPairs())
