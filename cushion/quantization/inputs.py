"""Quantized inputs of linears."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from cushion.models import LanguageModel
from cushion.quantization.effect import Effect, Site, Work
from cushion.quantization.formats.blocks import BlockGrid, quantizer_of
from cushion.quantization.formats.registry import FORMATS
from cushion.quantization.learned import LearnableQuantizer
from cushion.quantization.numerics import Grid
from cushion.quantization.parts.activations import EXTREMES, ActivationConfig, range_from
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
        activations = work.config.activations
        grid = grid_of(work.config, activations)
        if not activations.narrow_range:
            grid = replace(grid, narrow_range=False)
        fixed = None
        if activations.range == "static":
            fixed = _static_range(work, site.name, grid, site.linear.weight.device)
        if work.keep is not None and site.name in work.keep:
            return
        if work.learns and fixed is not None:
            assert not isinstance(grid, BlockGrid), "refused with the configuration"
            site.activation = LearnableQuantizer(grid, fixed)
        else:
            site.activation = quantizer_of(grid, activations.granularity, fixed, work.straight_through)


def _static_range(work: Work, name: str, grid: Grid, device: torch.device) -> tuple[Tensor, Tensor]:
    """The range of a linear's input: learned, or what the estimator finds in what calibration saw behind smoothing."""
    if name in work.learned.ranges:
        low, high = work.learned.ranges[name]
        return low.to(device), high.to(device)
    estimator, options = work.config.activations.estimation()
    source = range_from(work.config)
    if estimator.statistic is not None:
        observed = work.gathered(source, name)
        low, high = estimator.range_of(observed, grid, options)
        return low.to(device), high.to(device)
    if source == EXTREMES:
        low, high = work.gathered(EXTREMES, name).range
        return low.to(device), high.to(device)
    low, high = work.ranges_of(name, device)
    if name in work.divisors:  # dividing by positive constants commutes with taking the extremes of a channel
        divisor = work.divisors[name].to(device)
        low, high = low / divisor, high / divisor
    if name in work.shifts:
        shift = work.shifts[name].to(device)
        low, high = low - shift, high - shift
    return low.amin(), high.amax()


INPUTS = _Inputs()
