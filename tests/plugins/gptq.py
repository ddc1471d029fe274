"""A part of a quantizer in one file: GPTQ (arXiv 2210.17323, section 3 and algorithm 1), for weights on any grid."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cushion.errors import ConfigError
from cushion.quantization.effect import Effect, Site, Turn, Work
from cushion.quantization.numerics import Grid, QuantizedWeight, quantize
from cushion.quantization.parts.base import Part
from cushion.quantization.parts.registry import register
from cushion.quantization.weights import weight_grid


def codes_of(weight: Tensor, nearest: QuantizedWeight, hessian: Tensor, grid: Grid, damping: float) -> Tensor:
    """Codes of `weight`, (out, in), column by column: the error of each is made good by those that are to come."""
    hessian = hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian), device=hessian.device)
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    rest, scale = weight.double().clone(), nearest.scale.expand(nearest.codes.shape).reshape(weight.shape).double()
    codes = torch.empty_like(rest)
    for i in range(weight.shape[1]):
        codes[:, i] = quantize(rest[:, i], scale[:, i], torch.zeros(()), grid)
        error = (rest[:, i] - codes[:, i] * scale[:, i]) / inverse[i, i]
        rest[:, i:] -= error[:, None] * inverse[i, i:]
    return codes.to(nearest.codes.dtype).reshape(nearest.codes.shape)


class _Gptq(Effect):
    def fit(self, turn: Turn) -> dict[str, Tensor]:
        hessians: dict[str, Tensor] = {}

        def add(name: str, values: Tensor) -> None:  # H = 2 X X^T, X being (in, tokens)
            inputs = values.flatten(0, -2).double()
            hessians[name] = hessians.get(name, 0) + 2 * inputs.T @ inputs

        turn.observe(add)
        grid, damping = weight_grid(turn.work.config), turn.work.config.plugins["gptq"].damping
        sites = {name: turn.sites[name] for name in hessians}
        return {n: codes_of(site.linear.weight, site.weight, hessians[n], grid, damping) for n, site in sites.items()}

    def at(self, work: Work, site: Site) -> None:
        site.weight = replace(site.weight, codes=work.fit_of("gptq", site.name))


GPTQ = _Gptq()


@dataclass
class Options:
    damping: float = 0.01


class Gptq(Part):
    name, config, effect, blockwise = "gptq", Options, f"{__name__}:GPTQ", True

    def check(self, quantizer: Any) -> None:
        if self.is_on(quantizer) and (quantizer.weights.bits is None or self.of(quantizer).damping <= 0):
            raise ConfigError("quantizer.plugins.gptq needs quantizer.weights.bits, and a damping above 0")


register(Gptq())
