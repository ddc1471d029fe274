"""Block-wise reconstruction (PrefixQuant, arXiv 2410.05265, section 4.3): static ranges learn, and weights may.

## Reconstruction

After the block-wise fine-tuning of PrefixQuant (arXiv [2410.05265](https://arxiv.org/abs/2410.05265)). Block after
block, with F the full-precision block and F_q the same block quantized, both behind the same prefix:

    L = mean( (F_q(X_q) - F(X))^2 )

X is the block's input in the full-precision model, X_q its input where all blocks before are quantized with what they
have learned (PrefixQuant's `fp_input`, its default). With a rotation or smoothing, F is the rotated and smoothed
block. In a block learn

- the static range of every quantized linear's input, by the gradient of LSQ or LSQ+, in relative steps. Linears that
  read the same norm and start from the same range have one range. Linears that QFeM keeps have none;
- with `reconstruction.weights`, the weights of the quantized linears. Each step rounds them to the grid that
  `quantizer.weights` gives their present values, and the gradient passes straight through. Their scales follow from
  them, unlike PrefixQuant's.

Optimizer: Adam, one for each block; the rate of `blockwise` falls by a cosine to a tenth. A block whose L over all
texts does not fall keeps what it had, with a warning. PrefixQuant's code stops early by the error over 64 further
texts; here a block learns for all `reconstruction.epochs`. Scales of a static cache do not learn.
`reconstruction=prefixquant` has its texts, passes and batches; behind `quantizer=prefixquant` ranges start where their
search ended.

Rows with learned weights, ranges or scales are not of the frozen model: they are marked (`reconstructed`,
`learned_ranges`) and are in none of the papers' tables. Their ceiling is full precision with the same prefix, as for
every row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cushion.config import ReconstructionConfig
from cushion.errors import CalibrationError
from cushion.execution.registry import SIMULATED, load_execution
from cushion.float64 import in_float64
from cushion.quantization.effect import Site, Turn
from cushion.quantization.fitted import rounded
from cushion.quantization.learned import (
    HALF_PRECISION_SCALING,
    RANGES_EPSILON,
    LearnableQuantizer,
    adam_group,
    parameters_of,
)
from cushion.quantization.linear import straight_through
from cushion.quantization.numerics import QuantizedWeight
from cushion.quantization.weights import WEIGHTS


@dataclass(frozen=True)
class BlockRecord:
    """How well one block was reconstructed.

    `before` and `after` are the mean squared error of the block's output over all texts, before and after learning;
    where `after` is not the smaller one, nothing of what was learned was kept (`kept` is false).
    """

    block: int
    before: float
    after: float
    kept: bool


def reconstruct_block(turn: Turn, config: ReconstructionConfig, seed: int) -> BlockRecord:
    """Let the ranges of one block learn, and its weights where the configuration says so.

    What was learned is left in the dictionaries of `turn.work.learned`, where it lowers the error of the block's
    output.

    Args:
        turn: the block, and the texts that it learns from.
        seed: of the order of the texts.

    Raises:
        CalibrationError: the error before learning is not finite.

    """
    learnable: dict[str, LearnableQuantizer] = {}
    work = replace(turn.work, straight_through=True)  # inside attention
    with rounded(work, load_execution(SIMULATED), turn.index, learnable) as placed:
        weights = _Weights(turn, placed) if config.weights else None
        before = checked_error(turn, config)
        nothing_learns = weights is None and not learnable  # QFeM keeps all inputs of the block
        if before == 0.0 or config.epochs == 0 or nothing_learns:
            return BlockRecord(turn.index, before, before, False)
        _learn(turn, config, seed, learnable, weights, before)
        if weights is not None:
            weights.put()
        after = error_of(turn, config.batch_size)
    kept = after < before
    if kept:
        turn.work.learned.ranges.update({name: quantizer.range() for name, quantizer in learnable.items()})
        if weights is not None:
            turn.work.learned.weights.update(weights.learned())
    return BlockRecord(turn.index, before, after, kept)


def learning_rate_factor(step: int, steps: int) -> float:
    """Cosine from 1 at the first step down to a tenth at the last, as in PrefixQuant."""
    return 0.1 + 0.45 * (1 + math.cos(math.pi * step / max(1, steps - 1)))


def batches(texts: int, config: ReconstructionConfig, block: int, seed: int) -> Iterator[Tensor]:
    """The positions of the texts of every step: passes over all of them, each in an order of its own."""
    for epoch in range(config.epochs):
        generator = torch.Generator().manual_seed((seed * 100_003 + block) * 1_009 + epoch)
        yield from torch.randperm(texts, generator=generator).split(config.batch_size)


class _Weights:
    """The weights of one block's linears as they learn, in float32; each step rounds them as the quantizer would."""

    def __init__(self, turn: Turn, placed: dict[str, nn.Module]) -> None:
        self._turn, self._placed = turn, placed
        self._linears = {name: site.linear for name, site in turn.sites.items()}
        self.parameters: dict[str, nn.Parameter] = {}
        for name, site in turn.sites.items():
            assert isinstance(site.weight, Tensor), "quantized twice"
            self.parameters[name] = nn.Parameter(site.weight.detach().float().clone())
            del placed[name].weight  # a parameter without gradient, in whose place `put` sets what depends on ours
        self.put()

    def put(self) -> None:
        """Let the linears compute with the weights as they are now, rounded, and pass their gradients on."""
        for name, parameter in self.parameters.items():
            with torch.no_grad():
                fused = {other: partial(self._weight, other) for other in self._turn.sites[name].fused}
                site = Site(name, self._linears[name], self._weight(name), None, fused=fused)
                WEIGHTS.at(self._turn.work, site)
                assert isinstance(site.weight, QuantizedWeight)
                nearest = site.weight.dequantize()
            self._placed[name].weight = straight_through(parameter.to(nearest.dtype), nearest)

    def learned(self) -> dict[str, Tensor]:
        """The weights before rounding, in the model's precision."""
        return {name: self._weight(name) for name in self.parameters}

    def _weight(self, name: str) -> Tensor:
        return self.parameters[name].detach().to(self._linears[name].weight.dtype)


@torch.enable_grad()
def _learn(
    turn: Turn,
    config: ReconstructionConfig,
    seed: int,
    learnable: dict[str, LearnableQuantizer],
    weights: _Weights | None,
    before: float,
) -> None:
    groups: list[dict[str, Any]] = [adam_group(parameters_of(learnable.values()), config.scale_learning_rate)]
    if weights is not None:
        groups.append({"params": list(weights.parameters.values()), "lr": config.weight_learning_rate})
    optimizer = torch.optim.Adam(groups, eps=RANGES_EPSILON)  # of the weights too
    rates = [float(group["lr"]) for group in groups]
    scaling = HALF_PRECISION_SCALING if turn.inputs.dtype == torch.float16 else 1.0
    steps = config.epochs * math.ceil(len(turn.texts) / config.batch_size)
    for step, chosen in enumerate(batches(len(turn.texts), config, turn.index, seed)):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * learning_rate_factor(step, steps)
        if weights is not None:
            weights.put()
        optimizer.zero_grad()
        (squared_error(turn, chosen).mean() / before * scaling).backward()
        optimizer.step()


def checked_error(turn: Turn, config: ReconstructionConfig) -> float:
    """The error before learning.

    Raises:
        CalibrationError: it is not finite.

    """
    before = error_of(turn, config.batch_size)
    if not math.isfinite(before):
        raise CalibrationError(
            f"the output of the quantized block {turn.index} is not finite before reconstruction: look for what is "
            "broken in model and quantizer"
        )
    return before


def squared_error(turn: Turn, chosen: Tensor) -> Tensor:
    """Of each value of the block's output for some of the texts, (chosen, tokens, features), float32."""
    output = turn.run(turn.texts[chosen], turn.quantized[chosen])
    return (output.float() - turn.targets[chosen].float()).square()


@torch.no_grad()
def error_of(turn: Turn, batch_size: int) -> float:
    """The mean squared error of the block's output over all texts."""
    parts = torch.arange(len(turn.texts)).split(batch_size)
    return sum(float(in_float64(squared_error(turn, part)).sum()) for part in parts) / turn.targets.numel()
