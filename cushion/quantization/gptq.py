"""GPTQ: weights rounded so that the outputs of a linear change least (arXiv 2210.17323, section 3 and algorithm 1).

The columns of a weight are rounded one after another. The error of each is made good by those that are still to come,
weighted by the inverse of `H = 2 X X^T` of the linear's inputs: exactly the least-squares fit of the rest to what is
left of the output. The inputs are those of the model whose earlier blocks are quantized. Scales are those of the weight
as it was, also where groups of inputs have their own.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from cushion.errors import CalibrationError
from cushion.float64 import in_float64
from cushion.quantization.effect import Effect, Site, Turn, Work
from cushion.quantization.numerics import Grid, QuantizedWeight, quantize
from cushion.quantization.weights import weight_grid

COLUMNS = 128
"""Columns that are rounded before the rest of the weight is brought up to date in one product; changes no code."""


def gptq_codes(
    weight: Tensor, nearest: QuantizedWeight, hessian: Tensor, grid: Grid, damping: float, order: str
) -> Tensor:
    """The codes of a weight.

    Args:
        weight: (out_features, in_features), as it was before it was rounded.
        nearest: the same weight rounded to nearest; its scales are kept.
        hessian: `2 X X^T` of the inputs, (in_features, in_features), float64. An input that is always zero decides
            nothing: the codes of its column are the nearest ones.
        grid: of the codes.
        damping: added to the diagonal, as a share of its mean.
        order: `given`, or `diagonal`: columns with large inputs first (act-order).

    Returns:
        Whole numbers of the shape and dtype of `nearest.codes`.

    Raises:
        CalibrationError: H is not positive definite although it is damped.

    """
    scale = in_float64(nearest.scale.expand(nearest.codes.shape).reshape(weight.shape))
    rest, codes = in_float64(weight).clone(), torch.empty_like(scale)
    diagonal = hessian.diagonal()
    columns = torch.arange(weight.shape[1], device=rest.device)
    if order == "diagonal":
        columns = torch.argsort(diagonal, descending=True, stable=True)
    factor = _inverse_factor(hessian[columns][:, columns], damping)
    rest, scale = rest[:, columns], scale[:, columns]
    zero = torch.zeros((), device=rest.device)
    for start in range(0, rest.shape[1], COLUMNS):
        block = slice(start, min(start + COLUMNS, rest.shape[1]))
        own, upper = rest[:, block], factor[block, block]
        errors = torch.empty_like(own)
        for i in range(own.shape[1]):
            found = quantize(own[:, i], scale[:, start + i], zero, grid).double()
            codes[:, start + i] = found
            errors[:, i] = (own[:, i] - found * scale[:, start + i]) / upper[i, i]
            own[:, i:] -= errors[:, i, None] * upper[i, i:]
        rest[:, block.stop :] -= errors @ factor[block, block.stop :]
    given = torch.empty_like(codes)
    given[:, columns] = codes
    return given.to(nearest.codes.dtype).reshape(nearest.codes.shape).to(nearest.codes.device)


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the inverse of H with `damping` times the mean of its diagonal added to that."""
    damped = hessian.clone()
    diagonal = damped.diagonal()
    dead = diagonal == 0
    diagonal.add_(damping * diagonal.mean())
    diagonal[dead] = 1.0
    lower, failed = torch.linalg.cholesky_ex(damped)
    if failed:
        raise CalibrationError(
            f"the inputs of a linear do not tell its columns apart (H is not positive definite with "
            f"quantizer.weights.damping={damping:g}): raise the damping, or calibrate on more text "
            "(quantizer.calibration.samples)"
        )
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)


class _Gptq(Effect):
    def fit(self, turn: Turn) -> dict[str, Tensor]:
        """The codes of the block's linears, by full name. An expert that no token reaches is left out."""
        weights, hessians = turn.work.config.weights, dict[str, Tensor]()
        for name, values in turn.linear_inputs():
            inputs = in_float64(values.flatten(0, -2))
            product = inputs.T @ inputs
            hessians[name] = hessians[name].add_(product, alpha=2) if name in hessians else 2 * product
        found = {}
        for name, hessian in hessians.items():
            site = turn.sites[name]
            assert isinstance(site.weight, QuantizedWeight)
            grid = weight_grid(turn.work.config)
            found[name] = gptq_codes(
                site.linear.weight, site.weight, hessian, grid, weights.damping, weights.column_order
            )
        return found

    def at(self, work: Work, site: Site) -> None:
        """The codes that were found in place of the nearest ones."""
        assert isinstance(site.weight, QuantizedWeight)
        site.weight = replace(site.weight, codes=work.fit_of("gptq", site.name).to(site.weight.codes.device))


GPTQ = _Gptq()
