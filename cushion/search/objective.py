"""The search objective: what a prefix is judged by, measured on the tokens that follow it.

## The objective L_q

L_q(t | p) = sum over blocks l of || X_l - q(X_l) ||^2

X_l is the output of block l at the positions of t, behind p, in the full-precision model; the sum over tokens is in
the squared norm. q is per tensor: one s and z per block and text, from the positions of t alone, as the paper says.
Its grid is `search.bits`, `search.symmetric`, `search.levels` and `search.format`, whose blocks have scales of their
own.
`search.objective=maximum_activation` is the abstract's reading: max over blocks and positions of t of |X_l|.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cushion.blockwise import run_blocks
from cushion.config import SearchConfig
from cushion.float64 import place_of_float64
from cushion.models import LanguageModel
from cushion.prefix import Prefix
from cushion.quantization.numerics import Grid
from cushion.quantization.text_errors import error_grid, text_errors

ELEMENTS_AT_ONCE = {"cpu": 2**18, "cuda": 2**26}
"""Values of a block's output that are worked on together, by device type, at least those of one text: so few that on a
CPU what lies between stays in its cache, and on a GPU takes little memory beside the model's own."""


def quantization_error(values: Tensor, grid: Grid) -> Tensor:
    """`||X - q(X)||^2` of each text, with q's range taken from that text alone.

    No value lies outside of its own range, so on integers q clamps nothing and the error is `s * (round(Y) - Y)` with
    `Y = (X - z) / s`. Whatever the dtype of `values`, that and its norm are computed in float32.

    Args:
        values: X, shape (texts, tokens, features).

    Returns:
        float32, shape (texts,).

    """
    at_once = ELEMENTS_AT_ONCE.get(values.device.type, ELEMENTS_AT_ONCE["cpu"])
    parts = values.detach().split(max(1, at_once // values[0].numel()))
    error_of = _quantization_error if type(grid) is Grid else text_errors
    return torch.cat([error_of(part, grid) for part in parts])


def _quantization_error(values: Tensor, grid: Grid) -> Tensor:
    low, high = _extremes(values)
    scale, offset = grid.parameters(low.float()[:, None, None], high.float()[:, None, None])
    codes = values.div(scale) if grid.symmetric else values.sub(offset).div_(scale)
    error = codes.sub_(codes.round())
    return (torch.linalg.vector_norm(error.flatten(1), dim=1) * scale[:, 0, 0]).square()


def _extremes(values: Tensor) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of each text, shape (texts,), of `values`, (texts, tokens, features), in its dtype.

    The last dimension goes first: the positions that are judged are a part of a block's output, and reducing over both
    dimensions at once would copy them. `torch.aminmax` over a dimension has no vectorized kernel on the CPU.
    """
    return values.amin(-1).amin(1), values.amax(-1).amax(1)


@dataclass(frozen=True)
class Judged:
    """What a pass over some rows told of them.

    Args:
        scores: the objective, float64 on the CPU, shape (rows,). Of a row that was dropped, the part that was summed.
        blocks: how many decoder blocks each row went through, shape (rows,).
        complete: whether a row went through all of the blocks asked for, shape (rows,).

    """

    scores: Tensor
    blocks: Tensor
    complete: Tensor


class Objective:
    """Sums (or takes the largest of) one number per text over the decoder blocks.

    Args:
        config: names the objective and the grid of q.

    """

    def __init__(self, config: SearchConfig) -> None:
        self.grid = error_grid(config)
        self.name = config.objective

    def __call__(self, lm: LanguageModel, prefix: Prefix, input_ids: Tensor, skip: int) -> Tensor:
        """The objective of each row, over all blocks: the scores of `judge`."""
        return self.judge(lm, prefix, input_ids, skip).scores

    def judge(
        self,
        lm: LanguageModel,
        prefix: Prefix,
        input_ids: Tensor,
        skip: int,
        depth: int | None = None,
        bound: float = math.inf,
        observe: Callable[[int, Tensor], None] | None = None,
    ) -> Judged:
        """Judge each row of `input_ids` behind the prefix, leaving out its first `skip` tokens.

        Args:
            prefix: shared by all rows; its keys and values are computed once, by the caller.
            input_ids: (rows, skip + tokens), a candidate in front of a text, or the text alone with `skip=0`.
            depth: take the first `depth` blocks alone; None for all.
            bound: drop a row as soon as its objective over the blocks so far is larger. What a block adds is not
                negative (nor does it lower a maximum), so a row that is dropped would have ended above the bound too.
            observe: called with a block's number and its output at the judged positions, (rows, tokens, features).

        """
        rows = len(input_ids)
        total = torch.zeros(rows, dtype=torch.float64, device=place_of_float64(lm.device))
        blocks = torch.zeros(rows, dtype=torch.long)
        alive = torch.arange(rows)

        def visit(block: int, output: Tensor) -> Tensor | None:
            nonlocal alive
            following = output[:, skip:]
            if observe is not None:
                observe(block, following)
            at = alive.to(total.device)
            if self.name == "quantization_error":
                total[at] += quantization_error(following, self.grid).to(total.device).double()
            else:
                largest = torch.stack(_extremes(following)).abs().amax(0)
                total[at] = torch.maximum(total[at], largest.to(total.device).double())
            blocks[alive] += 1
            if math.isinf(bound):
                return None
            keep = (~(total[at] > bound)).nonzero()[:, 0].cpu()
            alive = alive[keep]
            return keep

        run_blocks(lm, prefix, input_ids, visit, depth)
        complete = torch.zeros(rows, dtype=torch.bool)
        complete[alive] = True
        return Judged(total.cpu(), blocks, complete)
