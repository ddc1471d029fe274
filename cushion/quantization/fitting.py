"""Fitting block by block: each decoder block on its turn, with those before it already quantized.

Two streams of hidden states walk through the decoder behind the same prefix: that of the full-precision model (rotated
and smoothed where the quantizer says so), and that of the model whose blocks so far are quantized as they will run.
Only the streams before and behind one block are in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from cushion.blockwise import BlockRunner
from cushion.execution.registry import SIMULATED, load_execution
from cushion.models import LanguageModel
from cushion.prefix import Prefix
from cushion.quantization.check import acting_parts
from cushion.quantization.effect import Turn
from cushion.quantization.fitted import FittedQuantizer, rounded, sites

Fits = dict[str, dict[str, Tensor]]
"""By part and linear, what `Effect.fit` found."""


@torch.no_grad()
def walk(
    lm: LanguageModel, behind: Prefix, fitted: FittedQuantizer, texts: Tensor, take: Callable[[Turn], None]
) -> Iterator[int]:
    """Give every decoder block its turn, in order, and quantize it after its turn.

    Args:
        behind: the prefix; each text stands behind it alone.
        fitted: the quantizer, with all that it needs but for what the turns find.
        texts: token ids, (texts, tokens).
        take: called with each turn. What it leaves in the dictionaries of `Turn.work` counts from this block on.

    Yields:
        The number of blocks done. Between two of them the rotation and the smoothing are still on the model: close the
        generator before using the model for anything else.

    """
    runner, build = BlockRunner(lm, behind), load_execution(SIMULATED)

    def run(index: int, texts: Tensor, hidden: Tensor) -> Tensor:
        rows = zip(texts.split(1), hidden.split(1), strict=True)
        return torch.cat([runner(index, text, states) for text, states in rows])

    with fitted.surroundings(lm) as work:
        inputs = torch.cat([runner.inputs(text) for text in texts.split(1)])
        quantized = inputs
        for index in range(len(lm.blocks)):
            targets = run(index, texts, inputs)
            own = {site.name: site for site in sites(work, index)}
            take(Turn(work, index, texts, inputs, targets, quantized, partial(runner, index), own))
            with rounded(work, build, index):
                quantized = run(index, texts, quantized)
            inputs = targets
            yield index + 1


def fit_block(turn: Turn) -> None:
    """Let every part that asks for it be fitted to one block, in the order of the parts; `turn.work.fits` gets it."""
    work = turn.work
    for part, effect in acting_parts(work.config).items():
        if part.blockwise:
            work.fits[part.name].update(effect.fit(turn))
        for site in turn.sites.values():
            effect.at(work, site)


@torch.no_grad()
def fit_blocks(
    lm: LanguageModel, behind: Prefix, fitted: FittedQuantizer, texts: Tensor, blocks: int = 0
) -> Iterator[int]:
    """Fit all parts of a quantizer that ask for it, to one block after another.

    Args:
        behind: the prefix.
        fitted: the quantizer; its `fits` are filled in place, and have a dictionary for every such part.
        texts: token ids, (texts, tokens).
        blocks: how many of the first blocks are fitted already: what was found for them is in `fits`.

    Yields:
        The number of blocks done, `blocks` of which only let the texts through; see `walk`.

    """
    return walk(lm, behind, fitted, texts, lambda turn: None if turn.index < blocks else fit_block(turn))
