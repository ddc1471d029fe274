"""AWQ's clipping (arXiv 2306.00978, the authors' `auto_clip`): ranges of weights with the least error of the outputs.

## Clipping of weights

`weights.estimator=output`, the second half of AWQ (arXiv [2306.00978](https://arxiv.org/abs/2306.00978)): for each
output and group of inputs the range of the weights is shrunk to a share of its largest magnitude, 1, 0.95, ... 0.55,
for which the squared error of the group's part of that output is least: (w - Q(w)) X^T X (w - Q(w))^T, over all
calibration tokens (the authors' code takes a sample). X is the linear's input in the full-precision model behind the
prefix, smoothed. Linears that make queries or keys keep all values. GPTQ, where it is on, rounds on the clipped
scales.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cushion.quantization.effect import Effect, Site, Turn, Work
from cushion.quantization.gram import gram_matrices, within_groups
from cushion.quantization.numerics import Grid, fake_quantize, quantize_weight
from cushion.quantization.weights import KeptShare, weight_grid

SHARES = tuple(1 - number / 20 for number in range(10))
"""Of the largest magnitude of a group: 1 to 0.55, as in the authors' code."""

QUERIES_AND_KEYS = ("q_proj", "k_proj", "qkv", "query")
"""Words in the last part of the name of a linear that makes queries or keys: their errors multiply, so these keep all
values, as in the authors' code."""


def is_clipped(name: str) -> bool:
    """Whether the ranges of the linear of this name are searched: it makes neither queries nor keys."""
    return not any(word in name.rpartition(".")[2] for word in QUERIES_AND_KEYS)


def clipped_shares(groups: Tensor, products: Tensor, grid: Grid) -> Tensor:
    """The share of its range that each group of weights keeps.

    Args:
        groups: the weight, (out_features, groups, size).
        products: `X^T X` of the inputs of each group, (groups, size, size), float32.
        grid: of the codes.

    Returns:
        (out_features, groups, 1), float32; of equally good shares the largest.

    """
    weight = groups.float()
    low, high = weight.aminmax(dim=2, keepdim=True)
    best, least = torch.ones_like(high), torch.full_like(high, torch.inf)
    for share in SHARES:
        lost = fake_quantize(weight, *grid.parameters(low * share, high * share), grid) - weight
        weighted = torch.bmm(lost.transpose(0, 1), products).transpose(0, 1)
        error = (weighted * lost).sum(2, keepdim=True)
        better = error < least
        best, least = torch.where(better, share, best), torch.where(better, error, least)
    return best


class _Clipping(Effect):
    def fit(self, turn: Turn) -> dict[str, Tensor]:
        """The shares of the block's linears, by full name. An expert that no token reaches is left out."""
        weights, found = turn.work.config.weights, dict[str, Tensor]()

        def of_text(values: Tensor) -> Tensor:
            return within_groups(values, weights.group_size if weights.granularity == "per_group" else values.shape[-1])

        clipped = list(filter(is_clipped, turn.sites))
        for readers, products in gram_matrices(turn.shared_inputs(True, clipped), of_text).items():
            for name in readers:
                assert name not in found
                groups = turn.sites[name].linear.weight.detach().unflatten(1, (len(products), -1))
                found[name] = clipped_shares(groups, products, weight_grid(turn.work.config))
        return found

    def at(self, work: Work, site: Site) -> None:
        """Codes in the ranges that were found, in place of those in the range of all values."""
        if not is_clipped(site.name):
            return
        weights, share = work.config.weights, work.fit_of("clipping", site.name)
        ranges = KeptShare(share[:, 0] if weights.granularity == "per_channel" else share)
        weight = site.linear.weight.detach()
        site.weight = quantize_weight(weight, weight_grid(work.config), weights.granularity, weights.group_size, ranges)


CLIPPING = _Clipping()
