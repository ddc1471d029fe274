"""The model of a search's rounds: a copy in bfloat16 where the processor has instructions to multiply it.

A round only drops candidates, by fewer tokens and blocks than the objective has. Whatever enters a result (the
verification, the sweep, further texts) is judged by the model itself.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from cushion.config import SearchConfig
from cushion.errors import ConfigError
from cushion.models import LanguageModel
from cushion.processor import processor_name
from cushion.search.replicas import copied


def resolved(config: SearchConfig, lm: LanguageModel) -> SearchConfig:
    """The search with what `rounds_dtype=auto` comes to here: the rounds decide which candidates are left.

    Raises:
        ConfigError: as `rounds_dtype`.

    """
    return replace(config, rounds_dtype="model" if rounds_dtype(config, lm) == lm.model.dtype else "bfloat16")


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
    return torch.bfloat16 if multiplies_bfloat16(lm.device) else own


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


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether it has instructions that multiply bfloat16 faster than float32: not measured, since time varies.

    AMX has them, and AVX-512 of AMD's processors. On Intel's, AVX-512 alone takes twice as long as float32.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or not torch.cpu._is_avx512_bf16_supported():
        return False
    return torch.cpu._is_amx_tile_supported() or "AuthenticAMD" in processor_name()
