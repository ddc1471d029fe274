"""The quantized linear: quantize-dequantize the input, multiply with the quantized-dequantized weight."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from cushion.quantization.numerics import Grid, dynamic_range, fake_quantize, quantize, shrunk

T = TypeVar("T")


class _StraightThrough(torch.autograd.Function):
    """The value of the second argument with the gradient of the first."""

    @staticmethod
    def forward(_context: Any, values: Tensor, quantized: Tensor) -> Tensor:
        return quantized.view_as(values)

    @staticmethod
    def backward(_context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _Clipped(torch.autograd.Function):
    """The value of the second argument with the gradient of the first, where that lies inside a range."""

    @staticmethod
    def forward(context: Any, values: Tensor, quantized: Tensor, low: Tensor, high: Tensor) -> Tensor:
        if context.needs_input_grad[0]:
            context.save_for_backward((values > low) & (values < high))
        return quantized.view_as(values)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (inside,) = context.saved_tensors
        return gradients[0] * inside, None, None, None


def straight_through(values: Tensor, quantized: Tensor) -> Tensor:
    """The value of `quantized`, with the gradient of `values`; both of one shape and dtype."""
    passed: Tensor = _StraightThrough.apply(values, quantized)
    return passed


@dataclass
class _LastInput:
    """The input that was quantized last, what it became, and how many linears have yet to read that."""

    source: weakref.ref[Tensor]
    version: int
    quantized: Any
    left: int


@dataclass(frozen=True)
class Codes:
    """The input of a linear as codes: `X = scale * codes + offset`.

    Args:
        values: float32 whole numbers, of the shape of the input; what is not finite in the input stays so.
        scale: float32, (), or with a 1 for every dimension that shares it.
        offset: as `scale`; zeros on a symmetric grid.

    """

    values: Tensor
    scale: Tensor
    offset: Tensor


class ActivationQuantizer:
    """Quantize-dequantize the input of a linear, or of several linears that read the very same tensor.

    Where it serves several (`readers`, raised by `shared_with`), a tensor is quantized for the first of them and the
    others get what came of it. It is kept until all have read it or the input is gone, whichever comes first, and no
    longer used once the input was changed in place. Gradients are those of each reader on its own.

    Args:
        grid: the integer grid.
        granularity: `per_tensor` or `per_token` (one scale for the last dimension of each token), or one whose ranges
            are static and are given.
        static_range: minimum and maximum fixed by calibration, scalars, or (channels,); None computes them from every
            input (dynamic). A dynamic per-tensor range spans the whole tensor, all texts of a batch together, as in a
            real kernel.
        straight_through: let gradients pass as if nothing had been rounded, with scale and offset held constant. What a
            range clips gets none.
        clip_ratio: the share of a dynamic range that is kept, above 0 and at most 1; what lies beyond is clipped.

    """

    def __init__(
        self,
        grid: Grid,
        granularity: str,
        static_range: tuple[Tensor, Tensor] | None = None,
        straight_through: bool = False,
        clip_ratio: float = 1.0,
    ) -> None:
        self.grid = grid
        self.clip_ratio = clip_ratio
        self.dims = (-1,) if granularity == "per_token" else None
        self.straight_through = straight_through
        self.parameters = None if static_range is None else grid.parameters(*static_range)
        self.readers = 1
        self._last: _LastInput | None = None

    def shared_with(self, others: list[ActivationQuantizer]) -> ActivationQuantizer:
        """The one of `others` that computes the same, with one more reader; where there is none, this one, added."""
        for other in others:
            if self._agrees_with(other):
                other.readers += 1
                return other
        others.append(self)
        return self

    def __call__(self, values: Tensor) -> Tensor:
        """Quantize `values`, (..., channels).

        Returns:
            A tensor of the shape and dtype of `values`: a new one, or, where several linears are served, one that
            other readers get as well and that no one may change.

        """
        quantized: Tensor = self.once(values, self._quantized)
        if not self.straight_through:
            return quantized
        if self.parameters is None and self.clip_ratio == 1:
            return straight_through(values, quantized)
        scale, offset = self._parameters_for(values.detach())
        low, high = (scale * bound + offset for bound in self.grid.bounds)
        clipped: Tensor = _Clipped.apply(values, quantized, low, high)
        return clipped

    def codes(self, values: Tensor) -> Codes:
        """The codes that stand for `values`, (..., channels): those of what a call gives."""
        constant = values.detach()
        scale, offset = self._parameters_for(constant)
        return Codes(quantize(constant, scale, offset, self.grid), scale.float(), offset.float())

    def _quantized(self, values: Tensor) -> Tensor:
        constant = values.detach()
        scale, offset = self._parameters_for(constant)
        return fake_quantize(constant, scale, offset, self.grid)

    def _parameters_for(self, values: Tensor) -> tuple[Tensor, Tensor]:
        if self.parameters is not None:
            return self.parameters
        low, high = (end.float() for end in dynamic_range(values, self.dims))
        if self.clip_ratio != 1:
            low, high = shrunk(low, high, self.clip_ratio, self.grid)
        return self.grid.parameters(low, high)

    def once(self, values: Tensor, compute: Callable[[Tensor], T]) -> T:
        """What `compute` makes of `values`, computed for the first of several readers and handed to the others.

        All readers of one quantizer give the same `compute`.
        """
        if self.readers == 1 or torch.compiler.is_compiling():  # a compiler sees by itself what is the same
            return compute(values)
        if values.is_inference():  # such tensors do not count their changes
            return compute(values)
        last = self._last
        # a reference to a tensor that is gone never compares equal, so memory that is used again is no danger
        if last is not None and last.source() is values and last.version == values._version:
            last.left -= 1
            if last.left == 0:
                self._last = None
            kept: T = last.quantized
            return kept
        quantized = compute(values)
        source = weakref.ref(values, self._forget)
        self._last = _LastInput(source, values._version, quantized, self.readers - 1)
        return quantized

    def _forget(self, source: weakref.ref[Tensor]) -> None:
        if self._last is not None and self._last.source is source:
            self._last = None

    def _agrees_with(self, other: ActivationQuantizer) -> bool:
        if type(self) is not type(other):
            return False
        own, its = ((one.grid, one.dims, one.straight_through, one.clip_ratio) for one in (self, other))
        if own != its:
            return False
        if self.parameters is None or other.parameters is None:
            return self.parameters is other.parameters
        pairs = zip(self.parameters, other.parameters, strict=True)
        return all(one.device == two.device and torch.equal(one, two) for one, two in pairs)


class QuantizedLinear(nn.Module):
    """A linear layer with its own quantized-dequantized weight.

    Args:
        weight: (out_features, in_features), already quantized and dequantized.
        bias: (out_features,) or None, in full precision.
        activation: quantizer of the input, or None to leave it in full precision.

    """

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: ActivationQuantizer | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.activation = activation
        self.out_features, self.in_features = weight.shape

    def forward(self, values: Tensor) -> Tensor:
        """`values`: (..., in_features) -> (..., out_features)."""
        if self.activation is not None:
            values = self.activation(values)
        return functional.linear(values, self.weight, self.bias)
