"""The model of a search's rounds: a copy in bfloat16 where the processor multiplies that much faster.

A round only drops candidates, by fewer tokens and blocks than the objective has. Whatever enters a result (the
verification, the sweep, further texts) is judged by the model itself.
"""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor

from cushion.config import SearchConfig
from cushion.errors import ConfigError
from cushion.models import LanguageModel
from cushion.search.replicas import copied

FASTER = 2.0
"""A copy is made where bfloat16 multiplies at least so many times as fast as float32."""

PROBE = {"cpu": (256, 1024, 1024), "cuda": (4096, 4096, 4096)}
"""By device type, rows, inputs and outputs of the products that are timed against each other: so large that a GPU takes
longer for them than for starting them."""


def rounds_dtype(config: SearchConfig, lm: LanguageModel) -> torch.dtype:
    """The dtype in which the rounds of a search are run: the model's own, or bfloat16.

    Raises:
        ConfigError: bfloat16 is asked for, and the model is spread over several devices.

    """
    own: torch.dtype = lm.model.dtype
    if config.rounds_dtype == "model" or own == torch.bfloat16:
        return own
    is_spread = _is_spread(lm)
    if config.rounds_dtype == "bfloat16":
        check_rounds_dtype(config, lm)
        return torch.bfloat16
    if own != torch.float32 or is_spread:
        return own
    return torch.bfloat16 if speedup(lm.device) >= FASTER else own


def check_rounds_dtype(config: SearchConfig, lm: LanguageModel) -> None:
    """Raise `ConfigError` where bfloat16 is asked for, and the model is spread over several devices."""
    if config.rounds_dtype == "bfloat16" and lm.model.dtype != torch.bfloat16 and _is_spread(lm):
        raise ConfigError(
            f"search.rounds_dtype=bfloat16 makes a copy of {lm.label}, which is spread over several devices: set it to "
            "model"
        )


def _is_spread(lm: LanguageModel) -> bool:
    return len({weight.device for weight in lm.model.parameters()}) > 1


def in_dtype(lm: LanguageModel, dtype: torch.dtype) -> LanguageModel:
    """The model with its weights in `dtype`: itself where they are, else a copy that shares its buffers.

    Buffers stay as they are, as when a model is loaded in half precision: the frequencies of rotary embeddings would
    lose their positions.

    Raises:
        ConfigError: there is no room for the copy.

    """
    if lm.model.dtype == dtype:
        return lm
    try:
        half = copied(lm, dtype, None)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"search.rounds_dtype: {lm.device} has no room for a copy of {lm.label} in bfloat16: set it to model"
        ) from error
    half.model.config.dtype = dtype
    return half


def speedup(device: torch.device, repeats: int = 3) -> float:
    """How many times as fast as in float32 a product of `PROBE`'s size is in bfloat16 on this device."""
    rows, inputs, outputs = PROBE.get(device.type, PROBE["cpu"])
    values, weight = torch.ones(rows, inputs, device=device), torch.ones(inputs, outputs, device=device)
    half_values, half_weight = values.bfloat16(), weight.bfloat16()
    ratios = []
    for _ in range(repeats + 1):
        plain = _seconds(values, weight)
        ratios.append(plain / _seconds(half_values, half_weight))
    return statistics.median(ratios[1:])


def _seconds(values: Tensor, weight: Tensor) -> float:
    torch.mm(values, weight)[0, 0].item()  # an element is read when all that came before is done
    started = time.perf_counter()
    torch.mm(values, weight)[0, 0].item()
    return time.perf_counter() - started
