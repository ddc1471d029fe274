"""The product of two matrices of 8-bit integers: padded where a device asks for it, tested, and timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from cushion.errors import ConfigError

LEAST_ROWS, MULTIPLE = 32, 8
"""On a GPU `torch._int_mm` wants more than 16 rows, and multiples of 8 in the other two sizes."""

PROBE = (64, 1024, 1024)
"""Rows, inputs and outputs of the products that are timed against each other."""


def padded_weight(codes: Tensor, on_gpu: bool) -> Tensor:
    """Codes of a weight as `int8_matmul` takes them: int8, (in, out), with zeros behind where a GPU wants them.

    Args:
        codes: whole numbers from -128 to 127, (out, in).
        on_gpu: whether the sizes are made multiples of 8.

    """
    whole = codes.to(torch.int8)
    if on_gpu:
        outputs, inputs = whole.shape
        whole = functional.pad(whole, (0, -inputs % MULTIPLE, 0, -outputs % MULTIPLE))
    return whole.contiguous().t()


def int8_matmul(values: Tensor, weight: Tensor, outputs: int, on_gpu: bool) -> Tensor:
    """The exact product in int32, (rows, outputs).

    Args:
        values: int8, (rows, in).
        weight: what `padded_weight` gave for (outputs, in).
        outputs: how many columns of the product are meant.
        on_gpu: as for `padded_weight`.

    """
    rows, inputs = values.shape
    if on_gpu:
        more = max(LEAST_ROWS, rows + -rows % MULTIPLE) - rows
        if more or weight.shape[0] != inputs:
            values = functional.pad(values, (0, weight.shape[0] - inputs, 0, more))
    return torch._int_mm(values, weight)[:rows, :outputs]


def check_int8_matmul(device: torch.device) -> None:
    """Raise `ConfigError` where the product on this device is not the exact one: kernels have been wrong before.

    All pairs of the extreme codes are among what is multiplied, sizes that need padding too.
    """
    generator, on_gpu = torch.Generator().manual_seed(0), device.type == "cuda"
    for rows, inputs, outputs in ((1, 40, 24), (5, 259, 33), (64, 512, 64)):
        values = torch.randint(-128, 128, (rows, inputs), generator=generator).to(torch.int8)
        codes = torch.randint(-128, 128, (outputs, inputs), generator=generator).to(torch.int8)
        values[0], codes[0], codes[1] = -128, 127, -128
        exact = values.long() @ codes.long().t()
        try:
            found = int8_matmul(values.to(device), padded_weight(codes.to(device), on_gpu), outputs, on_gpu)
        except RuntimeError as error:
            raise ConfigError(
                f"execution=int8 needs torch._int_mm, which fails on {device}: {error}; use execution=simulated"
            ) from error
        if not torch.equal(found.cpu().long(), exact):
            raise ConfigError(
                f"execution=int8 needs an exact torch._int_mm, and on {device} it is wrong for {rows} x {inputs} x "
                f"{outputs} values: use execution=simulated, or another release of torch"
            )


def slowdown(device: torch.device, repeats: int = 3) -> float:
    """How many times as long as the product in float32 the one of integers takes on this device, for `PROBE`."""
    rows, inputs, outputs = PROBE
    on_gpu = device.type == "cuda"
    values = torch.ones(rows, inputs, dtype=torch.int8, device=device)
    codes = torch.ones(outputs, inputs, dtype=torch.int8, device=device)
    weight = padded_weight(codes, on_gpu)
    exact, exact_weight = values.float(), codes.float()
    ratios = []
    for _ in range(repeats + 1):
        plain = _seconds(device, lambda: functional.linear(exact, exact_weight))
        ratios.append(_seconds(device, lambda: int8_matmul(values, weight, outputs, on_gpu)) / plain)
    return statistics.median(ratios[1:])


def _seconds(device: torch.device, compute: Callable[[], object]) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    compute()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
