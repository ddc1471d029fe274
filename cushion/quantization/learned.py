"""What was learned for a quantizer: static ranges of the linears' inputs, and weights; and the quantizer that learns.

LSQ (Esser et al., arXiv 1902.08153) gives the gradient of the scale, LSQ+ (Bhalgat et al., arXiv 2004.09576) that of
the offset. With `u = (X - z) / s` and the code `c = clamp(round(u))`, `q(X) = s c + z` has, inside the range and
outside of it,

    dq/dX = 1, 0      dq/ds = c - u, c (equation 3)      dq/dz = 0, 1

where rounding counts as the identity. Gradients of scale and offset are multiplied with `1 / sqrt(N Q_P)` (section
2.2), N being the number of values and Q_P the largest code.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from cushion.artifacts import read_tensors
from cushion.errors import ArtifactError
from cushion.hashing import tensor_digest
from cushion.quantization.linear import ActivationQuantizer
from cushion.quantization.numerics import Grid, quantize

HALF_PRECISION_SCALING = 2.0**10
"""Factor on the loss of a float16 model during the backward pass: without it small gradients underflow."""

RANGES_EPSILON = 1e-15
"""Adam's epsilon for learned ranges: their gradients are small by the factor of LSQ, and 1e-8 would hold them back."""


@dataclass(frozen=True, eq=False)
class Learned:
    """What was learned for one quantizer behind one prefix.

    Args:
        ranges: minimum and maximum of the inputs of linears, float32 scalars on the CPU, by full name. They take the
            place of what the estimator finds.
        weights: (out_features, in_features), by full name of the linear: full-precision weights that stand in for the
            model's, behind rotation and smoothing, before they are quantized.
        shares: of the largest magnitude of a weight, its rows or its groups, what its range keeps, above 0 and at most
            1; (1, 1), (out_features, 1) or (out_features, groups, 1), float32, by full name.
        divisors: (in_features,), float32, by full name: what the input of a linear is divided by and the columns of
            its weight are multiplied with, before anything is rounded.

    """

    ranges: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    shares: dict[str, Tensor] = field(default_factory=dict)
    divisors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def names(self) -> set[str]:
        """The linears for which anything was learned."""
        return {*self.ranges, *self.weights, *self.shares, *self.divisors}

    @property
    def fingerprint(self) -> str:
        """Hash of names and tensors."""
        tensors = self.tensors()
        return tensor_digest(tensors.values(), label=list(tensors))

    def tensors(self) -> dict[str, Tensor]:
        """All of it as tensors on the CPU by keys, in the order of the keys."""
        found = {f"minimum {name}": low for name, (low, _) in self.ranges.items()}
        found |= {f"maximum {name}": high for name, (_, high) in self.ranges.items()}
        for kind in ("weight", "share", "divisor"):
            found |= {f"{kind} {name}": tensor for name, tensor in getattr(self, f"{kind}s").items()}
        return {key: found[key].detach().cpu().clone().contiguous() for key in sorted(found)}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Learned:
        """What `tensors` described.

        Raises:
            KeyError: a key that it does not give, or one end of a range without the other.

        """
        kinds = ("minimum", "maximum", "weight", "share", "divisor")
        parts: dict[str, dict[str, Tensor]] = {kind: {} for kind in kinds}
        for key, value in tensors.items():
            kind, _, name = key.partition(" ")
            parts[kind][name] = value
        low, high, *others = parts.values()
        return cls({name: (low[name], high[name]) for name in sorted(low | high)}, *others)

    def save(self, path: Path) -> None:
        """Write everything into one safetensors file, atomically."""
        temporary = path.with_name(path.name + ".part")
        save_file(self.tensors(), temporary)
        temporary.replace(path)

    @classmethod
    def load(cls, path: Path) -> Learned:
        """What `save` wrote, on the CPU.

        Raises:
            ArtifactError: the file is missing, damaged, or not of this kind.

        """
        try:
            return cls.of(read_tensors(path))
        except KeyError as error:
            raise ArtifactError(f"{path} is not what was learned for a quantizer: it has or lacks {error}") from error


class LearnableQuantizer(ActivationQuantizer):
    """A static quantizer of a linear's input whose range learns, in relative steps.

    The range is `(low, high) * exp(t)` on a symmetric grid. On an asymmetric one the width is that of the initial range
    times `exp(t)`, and the low end is moved by `b` initial widths. Both start at 0. The value is the very one of an
    `ActivationQuantizer` with `range()`.

    Args:
        grid: the integer grid.
        initial: minimum and maximum to start from, scalars.

    Attributes:
        learned: `[t]`, or `[t, b]` where the grid has an offset: float32 scalars that need a gradient.

    """

    def __init__(self, grid: Grid, initial: tuple[Tensor, Tensor]) -> None:
        super().__init__(grid, "per_tensor", initial)
        low, high = (end.detach().float() for end in initial)
        if not grid.symmetric and grid.zero_point == "integer":  # as the grid widens it
            low, high = low.clamp(max=0), high.clamp(min=0)
        self._initial = low, high
        self.learned = [torch.zeros_like(low).requires_grad_() for _ in range(1 if grid.symmetric else 2)]

    def range(self) -> tuple[Tensor, Tensor]:
        """The range as it is now, on the CPU: what `Learned.ranges` has."""
        with torch.no_grad():
            low, high = self._range()
        return low.cpu(), high.cpu()

    def _range(self) -> tuple[Tensor, Tensor]:
        low, high = self._initial
        if self.grid.symmetric:
            factor = self.learned[0].exp()
            return low * factor, high * factor
        growth, moved = self.learned
        width = high - low
        return low + width * moved, high + width * (moved + growth.expm1())

    def _quantized(self, values: Tensor) -> Tensor:
        low, high = self._range()
        scale, offset = self.grid.parameters(low, high)
        if not self.grid.symmetric and self.grid.zero_point == "integer":  # rounding the offset counts as the identity
            offset = offset.detach() + (low - low.detach())
        quantized: Tensor = _LearnedStep.apply(values, scale, offset, self.grid)
        return quantized


def parameters_of(quantizers: Iterable[LearnableQuantizer]) -> list[Tensor]:
    """What the ranges are made of, in order; linears that read the output of one norm have one quantizer."""
    return [parameter for quantizer in dict.fromkeys(quantizers) for parameter in quantizer.learned]


def adam_group(ranges: list[Tensor], rate: float) -> dict[str, Any]:
    """The group of learned ranges for `torch.optim.Adam`, at a learning rate of its own."""
    return {"params": ranges, "lr": rate, "eps": RANGES_EPSILON}


class _LearnedStep(torch.autograd.Function):
    """`fake_quantize` with the gradients of LSQ and LSQ+."""

    @staticmethod
    def forward(context: Any, values: Tensor, scale: Tensor, offset: Tensor, grid: Grid) -> Tensor:
        codes = quantize(values, scale, offset, grid)
        quantized = codes * scale if grid.symmetric else (codes * scale).add_(offset)
        if any(context.needs_input_grad):
            units = (values.float() / scale) if grid.symmetric else (values.float() - offset).div_(scale)
            low, high = grid.bounds
            inside = (units > low) & (units < high)
            context.save_for_backward(torch.where(inside, codes - units, codes), inside)
            context.share = 1 / math.sqrt(max(values.numel(), 1) * high)
        return quantized.to(values.dtype)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        slope, inside = context.saved_tensors
        gradient = gradients[0]
        to_values = gradient * inside
        exact = gradient.float()
        to_scale = (exact * slope).sum() * context.share
        to_offset = (exact.sum() - to_values.sum(dtype=torch.float32)) * context.share
        return to_values, to_scale, to_offset, None
