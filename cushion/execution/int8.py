"""Execution on 8-bit codes: linears whose inputs and weights are multiplied as integers, by `torch._int_mm`.

## What `int8` computes

A linear keeps its weight as int8 codes. Its input is quantized to int8 codes, `torch._int_mm` multiplies them into
int32, and the scales and the bias follow in float32. With the codes `c` and `w`, the scales `s` and `t` and the zero
point `p` of the input,

    Y = s t (sum c w - p sum w) + b

where the bracket is a whole number without any error. Linears that read the very same tensor (query, key and value;
gate and up) quantize it once. On a GPU the product wants more than 16 rows and multiples of 8 in the other sizes;
zeros are put where they are missing.

| | runs |
|---|---|
| weights | 8 bits, one scale for each tensor or for each output |
| activations | 8 bits; one static or dynamic scale for each tensor, or a dynamic one for each token; symmetric, or with an integer zero point |
| beside it | a prefix, smoothing, rotations, any estimator of ranges, learned ranges, block-wise reconstruction |
| in floating point | linears that QFeM keeps, lm_head, norms, embeddings; the rounding of `quantizer.kv_cache` and `quantizer.attention` stays simulated, and a warning says so |

### What is refused

Before anything is computed, with the reason and the way out:

| combination | why | way out |
|---|---|---|
| `quantizer.weights.bits` or `quantizer.activations.bits` other than 8, or null | both sides of the product are 8-bit codes | 8 |
| `quantizer.weights.granularity=per_group` | one sum would have several scales | `per_channel`, `per_tensor` |
| `quantizer.weights.format` or `quantizer.activations.format` other than `int` | codes are integers | `int` |
| `quantizer.activations.granularity=per_cluster` or `per_channel` | one sum would have several scales | `per_tensor` |
| asymmetric activations with `quantizer.zero_point=real` | the offset is no whole number of steps | `integer` |
| `quantizer.compensation.method` other than `none` | a branch in floating point stands beside the codes | `none` |
| a quantizer that rounds nothing | there are no codes | another quantizer |
| a linear of more than 65,793 inputs | the sum could leave int32 | `quantizer.targets` without it |
| a device on which `torch._int_mm` is missing, or wrong | a product of known numbers is tried when the run starts | another release of torch |

`execution=simulated` runs all of them. Of the options of `quantizer`:

| option | `execution=int8` |
|---|---|
| `cushioncache_dynamic`, `cushioncache_o1`, `cushioncache_o2`, `cushioncache_o3`, `cushioncache_static`, `cushioncache_token` | refused: `quantizer.weights.granularity=per_group` |
| `int8_static`, `int8_token` | runs |
| `mse_static`, `mse_static_channel`, `mse_static_rotated` | runs |
| `awq` | refused: `quantizer.weights.bits=4` |
| `none` | refused: `quantizer=none` |
| `kivi` | refused: `quantizer.weights.bits=null` |
| `per_tensor_dynamic`, `per_tensor_static`, `per_token_dynamic` | runs |
| `qfem`, `qfem_qfep`, `qfem_static`, `qfep` | runs |
| `os_plus`, `rotation`, `smoothquant_auto`, `smoothquant_o1`, `smoothquant_o2`, `smoothquant_o3` | runs |
| `prefixquant`, `prefixquant_dynamic`, `prefixquant_w4a8` | refused: `quantizer.weights.bits=4` |
| `quarot`, `quarot_adaptive`, `quarot_rtn` | refused: `quantizer.weights.bits=4` |
| `rptq` | refused: `quantizer.weights.bits=4` |
| `aser`, `l2qer`, `lqer` | refused: `quantizer.weights.bits=4` |
| `w4a4`, `w4a8`, `w4a8_gptq`, `w4a8_gptq_static` | refused: `quantizer.weights.bits=4` |
| `fp8_static`, `fp8_token` | refused: `quantizer.weights.format=fp8_e4m3` |
| `mxfp8` | refused: `quantizer.weights.format=mxfp8` |
| `mxfp6` | refused: `quantizer.weights.format=mxfp6` |
| `mxfp4` | refused: `quantizer.weights.format=mxfp4` |
| `nvfp4`, `nvfp4_w4a16` | refused: `quantizer.weights.format=nvfp4` |
| `omniquant_w6a6`, `w6a6`, `w6a6_mse_static` | refused: `quantizer.weights.bits=6` |
| `omniquant`, `omniquant_w4a16`, `w4a16_gptq`, `w4a16_rtn` | refused: `quantizer.weights.bits=4` |
| `w8a8_group` | refused: `quantizer.weights.granularity=per_group` |

## The lowest code

A symmetric grid of 8 bits has the codes -127 to 127; int8 has -128 too, and integer kernels clamp there. The scale is
the same either way (the largest magnitude over 127), so the two differ only where a static or a clipped range is
exceeded on the negative side. `quantizer.activations.narrow_range` decides, in the simulation and in `int8` alike:
true, the default, is -127; `quantizer=int8_static` has false. Dynamic ranges that are not clipped (`clip_ratio` of 1)
never reach -128.

## How exact it is

On the same input the codes of `int8` and of the simulation are equal, and the outputs of one linear agree to 1e-6 of
the largest in a float32 model, to 2e-6 with a zero point. (In a half-precision model the simulation rounds the
dequantized values, and `int8` only the output.)

Logits of a whole model do not agree like that. Rounding is discontinuous: a difference in the last bit makes the next
linear choose another code here and there, and through many blocks it grows to the size of the quantization error. In
SmolLM2-135M (`int8_static`, 12 tokens) the 210 linears agree to 7e-7, and the logits differ by 0.30 of their norm;
the perplexity of 256 tokens behind BOS was 30.2 with `int8` and 30.7 simulated. So compare executions by linear, or
by numbers over many tokens with a tolerance of some per cent.
"""  # noqa: E501

from __future__ import annotations

import torch
from torch import Tensor

from cushion.errors import ConfigError
from cushion.execution.int8_matmul import check_int8_matmul, int8_matmul, padded_weight, slowdown
from cushion.execution.on_codes import (
    BITS,
    SIMULATED_INSTEAD,
    LinearOnCodes,
    OnCodes,
    not_multiplied_in,
    simulation_warnings,
)
from cushion.models import LanguageModel
from cushion.quantization.linear import ActivationQuantizer
from cushion.quantization.numerics import Grid, QuantizedWeight
from cushion.quantization.quantizer import QuantizerConfig

LARGEST_PRODUCT = 255 * 128
"""Of a code of the input, less its zero point, and one of the weight, in magnitude."""
MOST_INPUTS = (2**31 - 1) // LARGEST_PRODUCT
"""More of them could leave int32."""
SLOW = 1.0
"""A ratio to float32 above which figures of speed say nothing of the method."""


def unsupported(quantizer: QuantizerConfig) -> str | None:
    """Why a quantizer cannot be executed on 8-bit codes, with the way out; None where it can."""
    reason = not_multiplied_in(quantizer, "int", "8-bit codes, which are integers")
    if reason is None and not quantizer.activations.symmetric and quantizer.zero_point == "real":
        return (
            "quantizer.zero_point=real is an offset that no integer stands for (quantizer.activations.symmetric=false):"
            f" set it to integer, or use symmetric activations, {SIMULATED_INSTEAD}"
        )
    return reason


class Int8Linear(LinearOnCodes):
    """A linear layer on 8-bit codes.

    Args:
        weight: 8 bits, symmetric, with one scale, or one for each output.
        bias: (out_features,) or None, in full precision.
        activation: quantizer of the input, of 8 bits, symmetric or with an integer zero point.

    Raises:
        NotFiniteError: a weight is not finite, for which there is no code.

    """

    execution = "int8"
    codes: Tensor
    sums: Tensor | None

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None, activation: ActivationQuantizer) -> None:
        super().__init__(weight, bias, activation)
        self.register_buffer("codes", padded_weight(weight.codes, self.on_gpu))
        self.shift = 0 if activation.grid.symmetric else 2 ** (BITS - 1)
        sums = None if activation.grid.symmetric else weight.codes.sum(1, dtype=torch.float64).to(torch.int32)
        self.register_buffer("sums", sums)

    def forward(self, values: Tensor) -> Tensor:
        """`values`: (..., in_features) -> (..., out_features), in their dtype."""
        codes, scale, zero = self.activation.once(values, self._codes)
        whole = int8_matmul(codes, self.codes, self.out_features, self.on_gpu)
        if zero is not None:
            assert self.sums is not None
            whole = whole - zero * self.sums
        return self.scaled(whole.float(), scale, values)

    def _codes(self, values: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Of the input: int8 codes, (tokens, in_features); scale, (tokens, 1); and what to take off them, or None.

        Where a token is not finite its scale is not a number, so that its outputs are none either: an integer cannot
        say so.
        """
        found = self.activation.codes(values)
        codes = found.values.reshape(-1, self.in_features)
        scale = found.scale.reshape(-1, 1) + codes.sum(1, keepdim=True).mul_(0)
        if self.activation.grid.symmetric:
            return codes.to(torch.int8), scale, None
        zero = (found.offset / found.scale).neg_().round_().reshape(-1, 1)
        return codes.sub_(self.shift).to(torch.int8), scale, zero.sub_(self.shift).to(torch.int32)


class Int8(OnCodes):
    """Linears on 8-bit codes; those whose inputs QFeM keeps in full precision have their dequantized weights."""

    module, grid = Int8Linear, Grid

    def check(self, lm: LanguageModel, quantizer: QuantizerConfig) -> None:
        """Refuse what 8-bit codes cannot express, sums that int32 cannot hold, and a device whose product is wrong."""
        reason = unsupported(quantizer)
        if reason is not None:
            raise ConfigError(f"execution=int8 cannot run {reason}")
        for name, linear in lm.linears(quantizer.targets).items():
            if linear.in_features > MOST_INPUTS:
                raise ConfigError(
                    f"execution=int8 sums in 32 bits, which hold up to {MOST_INPUTS} inputs, and {name} has "
                    f"{linear.in_features}: leave it out of quantizer.targets, or use execution=simulated"
                )
        check_int8_matmul(lm.device)

    def warnings(self, lm: LanguageModel, quantizer: QuantizerConfig) -> list[str]:
        """A processor that multiplies integers slowly, and what is simulated all the same."""
        found, factor = [], slowdown(lm.device)
        if factor > SLOW:
            found.append(
                f"this processor multiplies int8 {factor:.1f} times slower than float32: figures of speed mean nothing "
                "here (execution=int8)"
            )
        return found + simulation_warnings(quantizer, "int8", "8-bit codes")
