"""A part of a quantizer in one file: OPTQ, as GPTQ was published (ICLR 2023, section 3, algorithm 1), on any grid."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cushion.errors import ConfigError
from cushion.quantization.effect import Effect, Site, Turn, Work
from cushion.quantization.numerics import quantize
from cushion.quantization.parts.base import Part, Quantizer
from cushion.quantization.parts.registry import register
from cushion.quantization.weights import weight_grid


def codes_of(site: Site, hessian: Tensor, config: Quantizer) -> Tensor:
    """Codes of a weight, column by column: the error of each is made good by the columns that are to come."""
    nearest, rest = site.weight, site.linear.weight.double().clone()
    scale = nearest.scale.expand(nearest.codes.shape).reshape(rest.shape).double()
    hessian.diagonal().add_(config.plugins["optq"].damping * hessian.diagonal().mean())
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    codes, zero = torch.empty_like(rest), torch.zeros(())
    for i in range(rest.shape[1]):
        codes[:, i] = quantize(rest[:, i], scale[:, i], zero, weight_grid(config))
        error = (rest[:, i] - codes[:, i] * scale[:, i]) / factor[i, i]
        rest[:, i:] -= error[:, None] * factor[i, i:]
    return codes.to(nearest.codes.dtype).reshape(nearest.codes.shape)


class _Optq(Effect):
    def fit(self, turn: Turn) -> dict[str, Tensor]:
        hessians: dict[str, Tensor] = {}
        for name, values in turn.linear_inputs():  # H = 2 X X^T, X being (in, tokens)
            inputs = values.flatten(0, -2).double()
            hessians[name] = hessians.get(name, 0) + 2 * inputs.T @ inputs
        return {name: codes_of(turn.sites[name], hessian, turn.work.config) for name, hessian in hessians.items()}

    def at(self, work: Work, site: Site) -> None:
        site.weight = replace(site.weight, codes=work.fit_of("optq", site.name))


OPTQ = _Optq()


@dataclass
class Options:
    damping: float = 0.01


class Optq(Part):
    name, config, effect, blockwise = "optq", Options, f"{__name__}:OPTQ", True

    def check(self, quantizer: Quantizer) -> None:
        if self.is_on(quantizer) and quantizer.weights.bits is None:
            raise ConfigError("quantizer.plugins.optq has no weights to round with quantizer.weights.bits=null")


register(Optq())
