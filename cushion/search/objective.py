"""The search objective: what a prefix is judged by, measured on the tokens that follow it.

`L_q(t | p) = sum over tokens of t and over decoder blocks of ||X_i - q(X_i)||^2` (CushionCache, section 4), with X_i
the output of a block in the full-precision model, q per tensor, and its scale and offset taken from the positions of t
alone. The abstract's reading, the maximum activation of the following tokens, is the second objective.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cushion.activations import observe_outputs
from cushion.config import SearchConfig
from cushion.models import LanguageModel
from cushion.prefix import Prefix
from cushion.quantization.numerics import Grid, fake_quantize


def quantization_error(values: Tensor, grid: Grid) -> Tensor:
    """`||X - q(X)||^2` of each text, with q's range taken from that text alone.

    Args:
        values: X, shape (texts, tokens, features).

    Returns:
        float32, shape (texts,).

    """
    flat = values.detach().flatten(1).float()
    low, high = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
    scale, offset = grid.parameters(low, high)
    error = fake_quantize(flat, scale, offset, grid).sub_(flat)
    return torch.linalg.vector_norm(error, dim=1).square()


class Objective:
    """Sums (or takes the largest of) one number per text over the decoder blocks.

    Args:
        config: names the objective and the grid of q.

    """

    def __init__(self, config: SearchConfig) -> None:
        self.grid = Grid(config.bits, config.symmetric, config.levels)
        self.name = config.objective

    @torch.no_grad()
    def __call__(self, lm: LanguageModel, prefix: Prefix, input_ids: Tensor, skip: int) -> Tensor:
        """Judge each row of `input_ids` behind the prefix, leaving out its first `skip` tokens.

        Args:
            prefix: shared by all rows; its keys and values are computed once, by the caller.
            input_ids: (rows, skip + tokens), a candidate in front of a text, or the text alone with `skip=0`.

        Returns:
            float64 on the CPU, shape (rows,).

        """
        rows = input_ids.shape[0]
        total = torch.zeros(rows, dtype=torch.float64)

        def observe(_name: str, output: Tensor) -> None:
            following = output[:, skip:]
            if self.name == "quantization_error":
                total.add_(quantization_error(following, self.grid).double().cpu())
            else:
                torch.maximum(total, following.flatten(1).abs().amax(1).double().cpu(), out=total)

        with observe_outputs(lm.named_blocks, observe):
            lm.body(input_ids, past_key_values=prefix.cache(lm.model, rows), use_cache=True)
        return total
