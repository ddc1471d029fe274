"""GPTQ: weights rounded so that the outputs of a linear change least (arXiv 2210.17323, section 3 and algorithm 1).

## GPTQ

`weights.method=gptq` (arXiv [2210.17323](https://arxiv.org/abs/2210.17323), section 3 and algorithm 1). The columns w_i
of a weight are rounded one after another, and the error of each is made good by those that are still to come: the
least-squares fit of the rest to what is left of the output. With X (inputs x tokens) over the calibration texts,

    H = 2 X X^T,  d = damping * mean(diag H),  U^T U = (H + d I)^-1,  U upper triangular
    e = (w_i - q(w_i)) / U_ii,    w_j := w_j - e U_ij    for all j > i

X is the linear's input behind the row's prefix where the blocks before are quantized (their weights alone with
`weights.fitted_with=weights`, as in GPTQ's and QuaRot's codes), and with `true_sequential` where the earlier linears of
the block have their rounded weights too. Linears that read the same tensor have one H. Scales
are those of the weight as it was, also where groups of inputs have their own.

Prefix tuning on the quantized model sees the weights that were rounded behind the found prefix; the tuned row has its
own, rounded behind the tuned one, but for `tuning.ranges=learned`, which keeps those of the found one.
`tuning.ranges=static` is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from cushion.errors import CalibrationError
from cushion.float64 import in_float64
from cushion.quantization.effect import Effect, Site, Turn, Work
from cushion.quantization.gram import gram_matrices
from cushion.quantization.numerics import Grid, QuantizedWeight, quantize
from cushion.quantization.replacements import Replacements
from cushion.quantization.weights import weight_grid

COLUMNS = 128
"""Columns that are rounded before the rest of the weight is brought up to date in one product; changes no code."""


@dataclass(frozen=True, eq=False)
class Columns:
    """The columns of all weights that read one input: in which order they are rounded, and what the rest makes good.

    Args:
        order: their numbers, (in_features,).
        factor: the upper Cholesky factor of the inverse of the damped H in that order, (in_features, in_features).

    """

    order: Tensor
    factor: Tensor

    @classmethod
    def of(cls, hessian: Tensor, damping: float, order: str) -> Columns:
        """From the inputs.

        Args:
            hessian: `2 X X^T` of the inputs, (in_features, in_features), float64. An input that is always zero decides
                nothing: the codes of its column are the nearest ones.
            damping: added to the diagonal, as a share of its mean.
            order: `given`, or `diagonal`: columns with large inputs first (act-order).

        Raises:
            CalibrationError: H is not positive definite although it is damped.

        """
        columns = torch.arange(len(hessian), device=hessian.device)
        if order == "diagonal":
            columns = torch.argsort(hessian.diagonal(), descending=True, stable=True)
        return cls(columns, _inverse_factor(hessian[columns][:, columns], damping))


def gptq_codes(weight: Tensor, nearest: QuantizedWeight, inputs: Columns, grid: Grid) -> Tensor:
    """The codes of a weight.

    Args:
        weight: (out_features, in_features), as it was before it was rounded.
        nearest: the same weight rounded to nearest; its scales are kept.
        inputs: what follows from the inputs.
        grid: of the codes.

    Returns:
        Whole numbers of the shape and dtype of `nearest.codes`.

    """
    scale = in_float64(nearest.scale.expand(nearest.codes.shape).reshape(weight.shape))
    rest, codes = in_float64(weight).clone(), torch.empty_like(scale)
    columns, factor = inputs.order, inputs.factor
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


def stages(turn: Turn, called: list[str]) -> list[list[str]]:
    """The linears of a block in the order in which `true_sequential` rounds them: query, key and value; output; ...

    One stage has those that read one norm, that are down projections, or that have one place in all experts.

    Args:
        turn: the block's.
        called: its linears in the order in which it calls them, which may be another than that of their definition.

    """
    lm, found = turn.work.lm, list[list[str]]()
    groups = [set(names) for _, names in lm.norm_readers(turn.index)]
    groups += [{name for names in lm.down_projections().values() for name in names}, *_places(turn)]
    for name in called:
        alike = {name, *(other for group in groups if name in group for other in group)}
        stage = next((stage for stage in found if alike & set(stage)), None)
        if stage is None:
            found.append([name])
        else:
            stage.append(name)
    return found


def _places(turn: Turn) -> list[set[str]]:
    """The linears that are one place in all experts of a block, such as `mlp.experts.*.down_proj`, by full name."""
    architecture, found = turn.work.lm.architecture, dict[str, set[str]]()
    if architecture.experts is None:
        return []
    experts = f"{architecture.blocks}.{turn.index}.{architecture.experts}."
    for name in turn.sites:
        if name.startswith(experts):
            _, _, place = name.removeprefix(experts).partition(".")
            found.setdefault(place, set()).add(name)
    return list(found.values())


class _Gptq(Effect):
    def fit(self, turn: Turn) -> dict[str, Tensor]:
        """The codes of the block's linears, by full name. An expert that no token reaches is left out."""
        if not turn.work.config.weights.true_sequential:
            return self._fit_stage(turn, list(turn.sites))
        found, replacements = dict[str, Tensor](), Replacements()
        try:
            for stage in stages(turn, turn.called()):
                own = self._fit_stage(turn, stage)
                for name, codes in own.items():
                    site = turn.sites[name]
                    assert isinstance(site.weight, QuantizedWeight)
                    rounded = nn.Parameter(replace(site.weight, codes=codes).dequantize(), requires_grad=False)
                    replacements.put(site.linear, "weight", rounded)
                found |= own
        finally:
            replacements.undo()
        return found

    def _fit_stage(self, turn: Turn, names: list[str]) -> dict[str, Tensor]:
        """The codes of some of the linears, the others as they stand at the moment."""
        weights, grid = turn.work.config.weights, weight_grid(turn.work.config)
        found = {}
        for readers, gram in gram_matrices(turn.shared_inputs(among=names)).items():
            columns = Columns.of(2 * gram, weights.damping, weights.column_order)
            for name in readers:
                site = turn.sites[name]
                assert isinstance(site.weight, QuantizedWeight) and name not in found
                found[name] = gptq_codes(site.linear.weight, site.weight, columns, grid)
        return found

    def at(self, work: Work, site: Site) -> None:
        """The codes that were found in place of the nearest ones."""
        assert isinstance(site.weight, QuantizedWeight)
        site.weight = replace(site.weight, codes=work.fit_of("gptq", site.name).to(site.weight.codes.device))


GPTQ = _Gptq()
