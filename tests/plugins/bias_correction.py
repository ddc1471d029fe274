"""A part of a quantizer in one file: bias correction (arXiv 1906.04721, section 4.2), b += (W - q(W)) E[x]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cushion.quantization.effect import Effect, Site, Work
from cushion.quantization.numerics import QuantizedWeight
from cushion.quantization.parts.base import NOTHING, Needed, Part
from cushion.quantization.parts.registry import register
from cushion.quantization.statistics.observer import InputObserver

MEANS = Needed(f"{__name__}:Means")


class Means(InputObserver):
    """E[x] of every channel of every linear's input."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def __call__(self, name: str, values: Tensor) -> None:
        counted = torch.cat([values, torch.ones_like(values[..., :1])], dim=-1)  # the last channel counts the tokens
        self.sums[name] = self.sums.get(name, 0) + counted.flatten(0, -2).double().sum(0)

    def write(self, folder: Any) -> None:
        torch.save({name: total[:-1] / total[-1] for name, total in self.sums.items()}, folder / "means.pt")

    @classmethod
    def read(cls, folder: Any, device: torch.device) -> dict[str, Tensor]:
        return torch.load(folder / "means.pt", map_location=device)


class _Correct(Effect):
    def at(self, work: Work, site: Site) -> None:
        if isinstance(site.weight, QuantizedWeight):
            error = (site.linear.weight - site.weight.dequantize()).double()
            lost = (error @ work.gathered(MEANS, site.name)).to(site.linear.weight.dtype)
            site.bias = lost + (0 if site.bias is None else site.bias)


CORRECT = _Correct()


@dataclass
class Options: ...


class BiasCorrection(Part):
    name, config, effect = "bias_correction", Options, f"{__name__}:CORRECT"

    def statistics(self, quantizer: Any) -> frozenset[Needed]:
        return frozenset({MEANS}) if self.is_on(quantizer) else NOTHING


register(BiasCorrection())
