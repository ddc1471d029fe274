"""Quantized weights."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cushion.errors import ConfigError
from cushion.models import LanguageModel
from cushion.quantization.effect import Effect, Site, Work
from cushion.quantization.formats.blocks import BlockGrid, quantize_weight_in_blocks
from cushion.quantization.formats.registry import FORMATS
from cushion.quantization.numerics import Grid, min_max, quantize_weight
from cushion.quantization.quantizer import QuantizerConfig
from cushion.quantization.weight_ranges import mse_ranges


def weight_grid(config: QuantizerConfig) -> Grid:
    """The grid on which a quantizer's weights lie; there are bits."""
    assert config.weights.bits is not None
    form = FORMATS[config.weights.format]
    grid = form.make(config.weights.bits, True, config.levels, shared_exponent=config.shared_exponent)
    return grid if config.weights.narrow_range else replace(grid, narrow_range=False)


def check_blocks(lm: LanguageModel, config: QuantizerConfig, part: str, form: str) -> None:
    """Raise `ConfigError` where the blocks of a format do not divide the inputs of every linear."""
    block = FORMATS[form].block
    if block is not None and (found := _undivided(lm, config, block)):
        name, inputs = found
        raise ConfigError(
            f"quantizer.{part}.format={form} has blocks of {block} values, which do not divide the {inputs} inputs of "
            f"{name}: leave it out of quantizer.targets, or choose another format"
        )


def _undivided(lm: LanguageModel, config: QuantizerConfig, size: int) -> tuple[str, int] | None:
    """Name and number of inputs of the first targeted linear that `size` does not divide; None without any."""
    inputs = ((name, linear.in_features) for name, linear in lm.linears(config.targets).items())
    return next(((name, number) for name, number in inputs if number % size), None)


@dataclass(frozen=True)
class KeptShare:
    """Ranges that keep a share of both of their ends, of the shape that ranges have; computed in float32."""

    share: Tensor

    def __call__(self, values: Tensor, dims: tuple[int, ...], grid: Grid) -> tuple[Tensor, Tensor]:
        """Minimum and maximum that are kept, as `numerics.Ranges` has it."""
        low, high = min_max(values, dims, grid)
        share = self.share.to(high.device)
        return low * share, high * share


class _Weights(Effect):
    def check(self, lm: LanguageModel, config: QuantizerConfig) -> None:
        """Groups and blocks divide the inputs of every linear."""
        check_blocks(lm, config, "weights", config.weights.format)
        if config.weights.granularity != "per_group":
            return
        size = config.weights.group_size
        if found := _undivided(lm, config, size):
            name, inputs = found
            raise ConfigError(
                f"quantizer.weights.group_size={size} does not divide the {inputs} inputs of {name}: choose a divisor"
            )

    def at(self, work: Work, site: Site) -> None:
        """Codes and scales in place of the weight."""
        config, grid = work.config.weights, weight_grid(work.config)
        assert isinstance(site.weight, Tensor), "quantized twice"
        if isinstance(grid, BlockGrid):
            weights = [weight() for weight in site.fused.values()] or [site.weight]
            largest = [weight.abs().amax().float().to(site.weight.device) for weight in weights]
            site.weight = quantize_weight_in_blocks(site.weight, grid, torch.stack(largest).amax())
            return
        ranges = mse_ranges if config.estimator == "mse" else min_max
        if site.name in work.learned.shares:
            ranges = KeptShare(work.learned.shares[site.name])
        site.weight = quantize_weight(site.weight, grid, config.granularity, config.group_size, ranges)


WEIGHTS = _Weights()
