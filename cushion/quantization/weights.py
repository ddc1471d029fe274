"""Quantized weights."""

from __future__ import annotations

from torch import Tensor

from cushion.errors import ConfigError
from cushion.models import LanguageModel
from cushion.quantization.effect import Effect, Site, Work
from cushion.quantization.formats.registry import FORMATS
from cushion.quantization.numerics import Grid, min_max, quantize_weight
from cushion.quantization.quantizer import QuantizerConfig
from cushion.quantization.weight_ranges import mse_ranges


def weight_grid(config: QuantizerConfig) -> Grid:
    """The grid on which a quantizer's weights lie; there are bits."""
    assert config.weights.bits is not None
    return FORMATS[config.weights.format].make(config.weights.bits, True, config.levels)


class _Weights(Effect):
    def check(self, lm: LanguageModel, config: QuantizerConfig) -> None:
        """Groups divide the inputs of every linear."""
        if config.weights.granularity != "per_group":
            return
        size = config.weights.group_size
        for name, linear in lm.linears(config.targets).items():
            if linear.in_features % size:
                raise ConfigError(
                    f"quantizer.weights.group_size={size} does not divide the {linear.in_features} inputs of {name}: "
                    "choose a divisor"
                )

    def at(self, work: Work, site: Site) -> None:
        """Codes and scales in place of the weight."""
        weights, grid = work.config.weights, weight_grid(work.config)
        assert isinstance(site.weight, Tensor), "quantized twice"
        ranges = mse_ranges if weights.estimator == "mse" else min_max
        site.weight = quantize_weight(site.weight, grid, weights.granularity, weights.group_size, ranges)


WEIGHTS = _Weights()
