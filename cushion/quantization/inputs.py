"""Quantized inputs of linears."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from cushion.models import LanguageModel
from cushion.quantization.clusters import cluster_ranges
from cushion.quantization.effect import Effect, Site, Work
from cushion.quantization.formats.blocks import BlockGrid, quantizer_of
from cushion.quantization.formats.registry import FORMATS
from cushion.quantization.learned import LearnableQuantizer
from cushion.quantization.linear import ActivationQuantizer
from cushion.quantization.numerics import Grid
from cushion.quantization.parts.activations import CHANNEL_EXTREMES, EXTREMES, ActivationConfig, range_from
from cushion.quantization.parts.attention import AttentionConfig
from cushion.quantization.parts.kv_cache import KvCacheConfig
from cushion.quantization.quantizer import QuantizerConfig
from cushion.quantization.weights import check_blocks


def grid_of(config: QuantizerConfig, own: ActivationConfig | KvCacheConfig | AttentionConfig) -> Grid:
    """The grid of what flows through a model, of the part whose configuration is `own`; there are bits."""
    assert own.bits is not None
    shared = config.levels, config.zero_point, config.shared_exponent
    return FORMATS[own.format].make(own.bits, own.symmetric, *shared)


class _Inputs(Effect):
    def check(self, lm: LanguageModel, config: QuantizerConfig) -> None:
        """Blocks divide the inputs of every linear."""
        check_blocks(lm, config, "activations", config.activations.format)

    def at(self, work: Work, site: Site) -> None:
        """A quantizer of the input, with the range that calibration gives where it is static."""
        fixed = static_range(work, site) if work.config.activations.range == "static" else None
        if work.keep is None or site.name not in work.keep:
            site.activation = input_quantizer(work, fixed)


def input_grid(config: QuantizerConfig) -> Grid:
    """The grid of linears' inputs, with the lowest code where `activations.narrow_range` is false; there are bits."""
    grid = grid_of(config, config.activations)
    return grid if config.activations.narrow_range else replace(grid, narrow_range=False)


def input_quantizer(work: Work, fixed: tuple[Tensor, Tensor] | None) -> ActivationQuantizer:
    """What rounds the input of a linear, as the quantizer says.

    Args:
        work: it says whether static ranges learn, and whether gradients pass.
        fixed: minimum and maximum of a static range, None for a dynamic one.

    """
    grid = input_grid(work.config)
    if work.learns and fixed is not None:
        by_channel = work.config.activations.by_channel
        assert not (isinstance(grid, BlockGrid) or by_channel), "refused with the configuration"
        return LearnableQuantizer(grid, fixed)
    own = work.config.activations
    return quantizer_of(grid, own.granularity, fixed, work.straight_through, own.clip_ratio)


def static_range(work: Work, site: Site) -> tuple[Tensor, Tensor]:
    """The range of a linear's input: learned, or what the estimator finds in what calibration saw behind smoothing.

    Minimum and maximum, scalars, or (channels,) where channels have ranges of their own.
    """
    name, device = site.name, site.linear.weight.device
    if name in work.learned.ranges:
        low, high = work.learned.ranges[name]
        return low.to(device), high.to(device)
    estimator, options = work.config.activations.estimation()
    source = range_from(work.config)
    if estimator.statistic is not None:
        observed = work.gathered(source, name)
        low, high = estimator.range_of(observed, input_grid(work.config), options)
        return low.to(device), high.to(device)
    if source == EXTREMES:
        low, high = work.gathered(EXTREMES, name).range
        return low.to(device), high.to(device)
    if source == CHANNEL_EXTREMES:
        low, high = (end.to(device) for end in work.gathered(CHANNEL_EXTREMES, name).range)
        return _of_channels(low, high, work.config.activations)
    low, high = work.ranges_of(name, device)
    if name in work.divisors:  # dividing by positive constants commutes with taking the extremes of a channel
        divisor = work.divisors[name].to(device)
        low, high = low / divisor, high / divisor
    if name in work.shifts:
        shift = work.shifts[name].to(device)
        low, high = low - shift, high - shift
    if work.config.activations.by_channel:
        return _of_channels(low, high, work.config.activations)
    return low.amin(), high.amax()


def _of_channels(low: Tensor, high: Tensor, own: ActivationConfig) -> tuple[Tensor, Tensor]:
    """The range of every channel, (channels,), from its minimum and maximum: its own, or that of its cluster."""
    if own.granularity == "per_channel":
        return low, high
    return cluster_ranges(low, high, own.clusters, own.cluster_seed)


INPUTS = _Inputs()
