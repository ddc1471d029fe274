"""Execution on FP8 numbers: linears whose inputs and weights are multiplied as E4M3, by torch's `scaled_mm`.

## What `fp8` computes

A linear keeps its weight as E4M3 numbers. Its input is rounded to E4M3 numbers, `scaled_mm` multiplies the two into
float32, and the scales and the bias follow in float32. With the numbers `c` and `w` and the scales `s` and `t`,

    Y = s t sum c w + b

The numbers are those of the simulation; the sum is accumulated in float32, by a GPU in parts (`use_fast_accum` is
off). Linears that read the very same tensor round it once. On a GPU the product wants multiples of 16 in inputs and
outputs; zeros are put where they are missing. FP8 needs a GPU of compute capability 8.9 or higher. On a CPU the product
is right, and many times slower than float32: there it is for comparing numbers, which a warning says.

| | runs |
|---|---|
| weights | E4M3, one scale for each tensor or for each output |
| activations | E4M3; one static or dynamic scale for each tensor, or a dynamic one for each token |
| beside it, in floating point | as with `int8` |

`fp8_static` and `fp8_token` run. Other formats of weights or inputs are refused before anything is computed, and so are
`quantizer.weights.granularity=per_group`, `quantizer.compensation` and a device without the product.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import ScalingType

from cushion.errors import ConfigError
from cushion.execution.on_codes import LinearOnCodes, OnCodes, not_multiplied_in, simulation_warnings
from cushion.models import LanguageModel
from cushion.quantization.formats.floats import Fp8E4M3
from cushion.quantization.linear import ActivationQuantizer
from cushion.quantization.numerics import QuantizedWeight
from cushion.quantization.quantizer import QuantizerConfig

MULTIPLE = 16
"""On a GPU `scaled_mm` wants multiples of it in inputs and outputs."""
TOLERANCE = 0.01
"""A product of known numbers may differ from the exact one by this share of its largest value: tensor cores keep fewer
bits of a sum than float32 has."""


def unsupported(quantizer: QuantizerConfig) -> str | None:
    """Why a quantizer cannot be executed on FP8 numbers, with the way out; None where it can."""
    return not_multiplied_in(quantizer, "fp8_e4m3", "E4M3 numbers")


def padded_weight(numbers: Tensor, on_gpu: bool) -> Tensor:
    """E4M3 numbers of a weight as `fp8_matmul` takes them: (in, out), with zeros behind where a GPU wants them.

    Args:
        numbers: E4M3 numbers in any dtype that holds them, (out, in).
        on_gpu: whether the sizes are made multiples of 16.

    """
    if on_gpu:
        outputs, inputs = numbers.shape
        numbers = functional.pad(numbers, (0, -inputs % MULTIPLE, 0, -outputs % MULTIPLE))
    return numbers.to(torch.float8_e4m3fn).contiguous().t()


def padded_values(numbers: Tensor, weight: Tensor) -> Tensor:
    """E4M3 numbers of an input, (rows, in), in any dtype that holds them, with zeros behind where `weight` has them."""
    return functional.pad(numbers, (0, weight.shape[0] - numbers.shape[1])).to(torch.float8_e4m3fn)


def fp8_matmul(values: Tensor, weight: Tensor, outputs: int) -> Tensor:
    """The product in float32, (rows, outputs).

    Args:
        values: what `padded_values` gave for (rows, in).
        weight: what `padded_weight` gave for (outputs, in).
        outputs: how many columns of the product are meant.

    """
    one, whole = torch.ones((), device=values.device), ScalingType.TensorWise
    return functional.scaled_mm(values, weight, one, whole, one, whole, output_dtype=torch.float32)[:, :outputs]


def check_fp8_matmul(device: torch.device) -> None:
    """Raise `ConfigError` where the product on this device is missing, or wrong by more than `TOLERANCE`."""
    generator = torch.Generator().manual_seed(0)
    for rows, inputs, outputs in ((1, 40, 24), (5, 259, 33), (64, 512, 64)):
        values, numbers = (
            (64 * torch.randn(size, inputs, generator=generator)).clamp(-448, 448).to(torch.float8_e4m3fn).float()
            for size in (rows, outputs)
        )
        exact = values.double() @ numbers.double().t()
        try:
            weight = padded_weight(numbers.to(device), device.type == "cuda")
            found = fp8_matmul(padded_values(values.to(device), weight), weight, outputs).cpu().double()
        except (RuntimeError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(
                f"execution=fp8 needs a product of FP8 numbers, which fails on {device} (a GPU has it from compute "
                f"capability 8.9 on): {reason}; use execution=simulated"
            ) from error
        if not bool(((found - exact).abs() <= TOLERANCE * exact.abs().max()).all()):
            raise ConfigError(
                f"execution=fp8 needs a product of FP8 numbers, and on {device} it is wrong for {rows} x {inputs} x "
                f"{outputs} values: use execution=simulated, or another release of torch"
            )


class Fp8Linear(LinearOnCodes):
    """A linear layer on E4M3 numbers.

    Args:
        weight: E4M3, with one scale, or one for each output.
        bias: (out_features,) or None, in full precision.
        activation: quantizer of the input, E4M3 too.

    Raises:
        NotFiniteError: a weight is not finite, for which there is no number.

    """

    execution, word = "fp8", "number"
    numbers: Tensor

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None, activation: ActivationQuantizer) -> None:
        super().__init__(weight, bias, activation)
        self.register_buffer("numbers", padded_weight(weight.codes, self.on_gpu))

    def forward(self, values: Tensor) -> Tensor:
        """`values`: (..., in_features) -> (..., out_features), in their dtype."""
        numbers, scale = self.activation.once(values, self._numbers)
        return self.scaled(fp8_matmul(numbers, self.numbers, self.out_features), scale, values)

    def _numbers(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Of the input: E4M3 numbers, as `padded_values` gives them, and the scale, (tokens, 1) or (1, 1)."""
        found = self.activation.codes(values)
        return padded_values(found.values.reshape(-1, self.in_features), self.numbers), found.scale.reshape(-1, 1)


class Fp8(OnCodes):
    """Linears on FP8 numbers; those whose inputs QFeM keeps in full precision have their dequantized weights."""

    module, grid = Fp8Linear, Fp8E4M3

    def check(self, lm: LanguageModel, quantizer: QuantizerConfig) -> None:
        """Refuse what is not made of E4M3 numbers, and a device without their product."""
        reason = unsupported(quantizer)
        if reason is not None:
            raise ConfigError(f"execution=fp8 cannot run {reason}")
        check_fp8_matmul(lm.device)

    def warnings(self, lm: LanguageModel, quantizer: QuantizerConfig) -> list[str]:
        """A processor without FP8 products, and what is simulated all the same."""
        found = []
        if lm.device.type == "cpu":
            found.append(
                "a CPU multiplies FP8 numbers many times slower than float32: figures of speed mean nothing here "
                "(execution=fp8)"
            )
        return found + simulation_warnings(quantizer, "fp8", "FP8 numbers")
