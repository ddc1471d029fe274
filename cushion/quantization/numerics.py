"""The grid: bits, symmetry and levels to scale and offset, then quantize-dequantize. Tensors in, tensors out.

Everything here is a pure function of its arguments; nothing is changed in place. The definition is CushionCache's
(arXiv 2406.12016, section 2, equation 1): `X_int = round((X - z) / s)` and `q(X) = s * X_int + z`, where the offset `z`
is the real number `min X` in the asymmetric case and 0 in the symmetric one. That is not the integer zero point of
most integer kernels (`zero_point="integer"`): the two agree wherever `z / s` is an integer.

## The quantizer

For N bits, a range [min, max], scale s and offset z:

    q(X) = s * clamp(round((X - z) / s)) + z          ties to even

| | s | z | codes |
|---|---|---|---|
| symmetric, `levels: full` | max(abs(min), abs(max)) / (2^(N-1) - 1) | 0 | -(2^(N-1) - 1) to 2^(N-1) - 1 |
| asymmetric, `levels: full` | (max - min) / (2^N - 1) | min | 0 to 2^N - 1 |
| symmetric, `levels: paper` | (max(max, 0) - min(min, 0)) / (2^(N-1) - 1) | 0 | -(2^(N-1) - 1) to 2^(N-1) - 1 |
| asymmetric, `levels: paper` | (max - min) / (2^(N-1) - 1) | min | 0 to 2^(N-1) - 1 |

- The paper prints (max - min) / (2^(N-1) - 1) for both, the last two rows: 127 steps where our default `full` has
  255. The symmetric range is widened to contain 0.
- The offset is the real number min X, as in the paper. `quantizer.zero_point=integer` has z = -s * round(-min / s),
  the range widened to contain 0, like torch's `fake_quantize_per_tensor_affine`.
- The clamp is ours; it matters for static ranges. A range of width zero gets s = 1. Half-precision values are
  computed in float32.

Weights: symmetric; per tensor, per output channel, or per output channel and group. Inputs of linears: per tensor and
static, per tensor and dynamic (over the whole batch), per token and dynamic, or per channel or cluster of channels
and static ([below](method.md#clusters-of-channels)). With `minmax` static ranges are minimum and maximum over all
calibration tokens, on the full-precision model behind the row's prefix. A quantized linear computes `q(X) q(W)^T + b`
in the model's dtype. All linears of the decoder blocks are quantized (our choice).

### Asymmetric activations with a real-valued offset

With z = min X zero is in general not on the grid. In a static range that an outlier has blown up most values become
the same grid point, up to s/2 away from zero, and the error that they share does not average out. SmolLM2-135M,
WikiText-2 test, 16 blocks of 512 tokens, W8A8, per-tensor static, calibrated on WikiText-2 train, full precision
36.6:

| perplexity | symmetric activations | asymmetric activations |
|---|---|---|
| no prefix | 88 | 3.7 million |
| prefix `" "` (one blank) | 49 | 55 |

This may explain the five-digit perplexities of the paper's Table 1; it was not tested on the paper's models. So all
options with asymmetric activations have an integer zero point.

### CushionCache's own quantizer

`quantizer=cushioncache_static`, `cushioncache_dynamic`, `cushioncache_token`; section 5.1 of the paper. With G = 64
neighbouring inputs per group, output channel o, and range [m, M] of an input (of the tensor or of the token), widened
to contain 0:

    weights      s = max over the group of |W_o| / 127,  codes -127 to 127
    activations  s = (M - m) / 255,  zero point k = round(-m / s),  q(X) = s * (clamp(round(X / s + k), 0, 255) - k)

The paper states neither G nor the estimator of static ranges (ours: minimum and maximum). `cushioncache_o1` (per
token), `cushioncache_o2` (per tensor, dynamic) and `cushioncache_o3` (per tensor, static) smooth first, with alpha =
0.8.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """An integer grid of `bits` bits.

    Args:
        bits: width of the integers, 2 to 8.
        symmetric: offset 0 and as many levels below zero as above, or offset `min X` and levels upwards from it.
        levels: how many steps the range is cut into. `full`: `abs-max / (2^(N-1) - 1)` when symmetric and
            `(max - min) / (2^N - 1)` when asymmetric, so that all codes are used. `paper`: the denominator as printed
            in CushionCache, `(max - min) / (2^(N-1) - 1)` in both cases, which leaves half of the codes unused.
        zero_point: the offset of an asymmetric grid. `real`: `min X`, as the paper defines it; 0 is in general no point
            of the grid. `integer`: a whole number of steps, for a range that was widened to contain 0, as integer
            kernels need it; 0 is then a point of the grid. Without effect on a symmetric grid.
        narrow_range: whether a symmetric grid leaves out the smallest code of N bits: codes are clamped at
            `-(2^(N-1) - 1)`, or at `-2^(N-1)`. The scale is the same. Without effect on an asymmetric grid.

    """

    bits: int
    symmetric: bool
    levels: str = "full"
    zero_point: str = "real"
    narrow_range: bool = field(default=True, kw_only=True)

    @property
    def steps(self) -> int:
        """The denominator of the scale: the number of steps that the (half) range is divided into."""
        if self.levels == "full" and not self.symmetric:
            return 2**self.bits - 1
        return int(2 ** (self.bits - 1)) - 1

    @property
    def bounds(self) -> tuple[int, int]:
        """The smallest and the largest code; codes outside are clamped (only static ranges can overflow)."""
        if not self.symmetric:
            return 0, self.steps
        return (-self.steps if self.narrow_range else -self.steps - 1), self.steps

    def parameters(self, minimum: Tensor, maximum: Tensor) -> tuple[Tensor, Tensor]:
        """Scale `s` and offset `z` for values that lie in `[minimum, maximum]`, elementwise over any shape.

        A range of width zero gets the scale 1: its only value is then reproduced exactly.
        """
        if not self.symmetric and self.zero_point == "integer":
            return self._with_integer_zero_point(minimum.clamp(max=0), maximum.clamp(min=0))
        if not self.symmetric:
            width, offset = maximum - minimum, minimum
        elif self.levels == "full":
            width, offset = torch.maximum(maximum, -minimum), torch.zeros_like(minimum)
        else:  # the range is widened to contain 0, without which the printed formula leaves the codes of N bits
            width, offset = maximum.clamp(min=0) - minimum.clamp(max=0), torch.zeros_like(minimum)
        scale = width / self.steps
        return torch.where(scale > 0, scale, torch.ones_like(scale)), offset

    def rounded(self, units: Tensor) -> Tensor:
        """The nearest codes of values in units of the scale, ties to even; may change `units` in place."""
        return units.round_().clamp_(*self.bounds)

    def _with_integer_zero_point(self, minimum: Tensor, maximum: Tensor) -> tuple[Tensor, Tensor]:
        """Scale, and the offset as the negative of a whole number of steps; `minimum <= 0 <= maximum`."""
        scale = (maximum - minimum) / self.steps
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        zero = torch.round(-minimum / scale).clamp(0, self.steps)
        return scale, -zero * scale


def fake_quantize(values: Tensor, scale: Tensor, offset: Tensor, grid: Grid) -> Tensor:
    """`q(X) = s * clamp(round((X - z) / s)) + z`: quantize and dequantize, ties to even.

    Args:
        values: any shape and floating dtype; half precision is computed in float32 and returned in its own dtype.
        scale, offset: broadcastable to `values`, in the unit of `values`.
        grid: gives the bounds of the codes.

    Returns:
        A new tensor of the shape and dtype of `values`.

    """
    codes = quantize(values, scale, offset, grid)
    if grid.symmetric:
        return codes.mul_(scale.float()).to(values.dtype)
    return codes.mul_(scale.float()).add_(offset.float()).to(values.dtype)


def quantize(values: Tensor, scale: Tensor, offset: Tensor, grid: Grid) -> Tensor:
    """The codes `clamp(round((X - z) / s))` in a new float32 tensor, whole numbers on an integer grid.

    Arguments as `fake_quantize`.
    """
    if grid.symmetric:
        return grid.rounded(values.float() / scale.float())
    return grid.rounded((values.float() - offset.float()).div_(scale.float()))


def dynamic_range(values: Tensor, dims: tuple[int, ...] | None = None) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of `values` over `dims` (all of them when None), with the reduced dimensions kept at 1."""
    if dims is None:  # one pass for both
        low, high = torch.aminmax(values)
        return low.reshape([1] * values.dim()), high.reshape([1] * values.dim())
    # not torch.aminmax, which has no kernel for several dimensions, and whose kernel for one dimension takes some
    # fifteen times as long on the CPU as these two, because it is not vectorized
    return values.amin(dims, keepdim=True), values.amax(dims, keepdim=True)


def shrunk(minimum: Tensor, maximum: Tensor, ratio: float, grid: Grid) -> tuple[Tensor, Tensor]:
    """Both ends of a range moved towards 0, to the share `ratio`: what lies beyond is clipped to them.

    As QuaRot's code does it. A range without 0 that needs not contain it shrinks towards the end that is nearest to 0.
    """
    if grid.symmetric or grid.zero_point == "integer":
        return minimum.clamp(max=0) * ratio, maximum.clamp(min=0) * ratio
    centre = torch.zeros_like(minimum).clamp(minimum, maximum)
    return centre + (minimum - centre) * ratio, centre + (maximum - centre) * ratio


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """The weight of a linear layer as codes, scales and offsets.

    Args:
        codes: whole numbers in float32, in which a weight that is not finite stays so; (out_features, in_features), or
            (out_features, groups, group_size) where groups of inputs have scales of their own.
        scale: float32, broadcastable to `codes`.
        offset: as `scale`; None on a symmetric grid.
        shape: (out_features, in_features).
        dtype: of the weight that was quantized.
        whole: the largest magnitude that the scale of the whole tensor is made for, a scalar, in formats that have one.

    """

    codes: Tensor
    scale: Tensor
    offset: Tensor | None
    shape: torch.Size
    dtype: torch.dtype
    whole: Tensor | None = None

    def dequantize(self) -> Tensor:
        """The weight that the codes stand for, a new tensor of `shape` and `dtype`: what `fake_quantize` gives."""
        values = self.codes * self.scale
        if self.offset is not None:
            values.add_(self.offset)
        return values.to(self.dtype).reshape(self.shape)


Ranges = Callable[[Tensor, tuple[int, ...], Grid], tuple[Tensor, Tensor]]
"""From values, dimensions and the grid to minimum and maximum over the dimensions, which are kept at 1."""


def min_max(values: Tensor, dims: tuple[int, ...], grid: Grid) -> tuple[Tensor, Tensor]:
    """The range that holds all values: whatever the grid."""
    return dynamic_range(values.float(), dims)


def quantize_weight(
    weight: Tensor, grid: Grid, granularity: str, group_size: int | None = None, ranges: Ranges = min_max
) -> QuantizedWeight:
    """Quantize the weight of a linear layer.

    Args:
        weight: `(out_features, in_features)`.
        grid: the integer grid.
        granularity: `per_tensor` (one scale), `per_channel` (one scale per output row) or `per_group` (one scale per
            output row and `group_size` neighbouring inputs).
        group_size: number of inputs per group; must divide `in_features`.
        ranges: how the ranges of the values that share a scale are found.

    """
    dims: tuple[int, ...]
    if granularity == "per_tensor":
        shaped, dims = weight, (0, 1)
    elif granularity == "per_channel":
        shaped, dims = weight, (1,)
    elif granularity == "per_group":
        assert group_size is not None and weight.shape[1] % group_size == 0
        shaped, dims = weight.reshape(weight.shape[0], -1, group_size), (2,)
    else:
        raise AssertionError(f"unknown weight granularity {granularity!r}")
    scale, offset = grid.parameters(*ranges(shaped, dims, grid))
    codes = quantize(shaped, scale, offset, grid)
    return QuantizedWeight(codes, scale, None if grid.symmetric else offset, weight.shape, weight.dtype)
