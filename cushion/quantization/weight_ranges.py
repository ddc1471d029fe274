"""Ranges of weights with the smallest squared quantization error, measured on the weights themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from cushion.quantization.numerics import Grid, dynamic_range, fake_quantize

_COARSE = [0.9**number for number in range(16)]
"""Fractions of the range that are tried first, 1 to 0.21."""
_FINE = [0.9 ** (number / 4) for number in (-3, -2, -1, 1, 2, 3)]
"""Factors of the best of them, tried after it: the outcome is the best to 2.6 % of the range."""
_CHUNK = 2**18
"""Weights whose error is computed at once, at least one row of them."""


def mse_ranges(shaped: Tensor, dims: tuple[int, ...], grid: Grid) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of `shaped` over `dims`, shrunk to where the squared error is smallest; float32.

    On an asymmetric grid, after both ends together, the upper and then the lower one are searched on their own. Ends
    shrink towards 0, or towards the end that is nearest to it where all weights have one sign. Temporaries have the
    size of a few rows.

    Args:
        shaped: weights, rows first.
        dims: over which a range extends, kept with length 1 in what is returned.
        grid: on which the weights are to lie.

    """
    low, high = dynamic_range(shaped.float(), dims)
    centre = torch.zeros_like(low).clamp(low, high)
    down, up = low - centre, high - centre
    shrink_down, shrink_up = torch.ones_like(low), torch.ones_like(low)
    both, upper, lower = (True, True), (False, True), (True, False)
    rounds = [(both, _COARSE), (both, _FINE)]
    if not grid.symmetric:
        rounds += [(upper, _COARSE), (upper, _FINE), (lower, _COARSE), (lower, _FINE), (both, _FINE)]
    least = _errors(shaped, dims, grid, low, high)
    for (moves_low, moves_high), factors in rounds:
        from_down, from_up = shrink_down, shrink_up
        for factor in factors:
            try_down = (from_down * factor).clamp(max=1) if moves_low else from_down
            try_up = (from_up * factor).clamp(max=1) if moves_high else from_up
            error = _errors(shaped, dims, grid, centre + down * try_down, centre + up * try_up)
            better = error < least
            least = torch.where(better, error, least)
            shrink_down = torch.where(better, try_down, shrink_down)
            shrink_up = torch.where(better, try_up, shrink_up)
    return centre + down * shrink_down, centre + up * shrink_up


def _errors(shaped: Tensor, dims: tuple[int, ...], grid: Grid, low: Tensor, high: Tensor) -> Tensor:
    """The summed squared error of every range, of the shape of `low`."""
    scale, offset = grid.parameters(low, high)
    rows = max(1, _CHUNK // max(1, shaped[0].numel()))
    found = []
    for start in range(0, len(shaped), rows):
        part = shaped[start : start + rows].float()
        chosen = [one if 0 in dims else one[start : start + rows] for one in (scale, offset)]
        error = fake_quantize(part, chosen[0], chosen[1], grid).sub_(part).square_()
        found.append(error.sum(dims, keepdim=True))
    return torch.stack(found).sum(0) if 0 in dims else torch.cat(found)
