"""Latency: the seconds to the first token and for each further one, two models in turns.

The time to first token is that of one pass over the prompt behind the prefix and of the choice of a token. The time per
output token is that of the further tokens, chosen greedily one after another, divided by their number. A prefix is in
the cache before the clock starts, as a server keeps it. Nothing is cached of a prompt, and no token ends a text.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cushion.config.latency import LatencyConfig
from cushion.errors import ConfigError
from cushion.evaluation.compiling import check_compiler, compiled
from cushion.models import LanguageModel
from cushion.prefix import Prefix
from cushion.quantization.check import surrounds
from cushion.quantization.quantizer import QuantizerConfig

SEED = 0
"""Of the prompts: random tokens, since the time does not depend on which they are (but through a router of experts)."""


@dataclass(frozen=True)
class Timing:
    """Seconds to the first token, and for each further one."""

    first: float
    following: float


@dataclass(frozen=True, eq=False)
class Variant:
    """A model as it is timed: behind a prefix, and for as long as `on()` lasts."""

    behind: Prefix
    on: Callable[[], AbstractContextManager[Any]]


def prompts(lm: LanguageModel, batch: int, length: int) -> Tensor:
    """Random token ids, (batch, length), on the model's device."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(lm.vocabulary_size, (batch, length), generator=generator).to(lm.device)


@torch.no_grad()
def timed(lm: LanguageModel, behind: Prefix, texts: Tensor, new_tokens: int) -> Timing:
    """One pass over `texts`, (batch, tokens), and `new_tokens` tokens for each of them, at least 2."""
    cache = behind.cache(lm.model, len(texts))
    synchronize(lm)
    started = time.perf_counter()
    token = _next_token(lm, texts, cache)
    synchronize(lm)
    first = time.perf_counter()
    for _ in range(new_tokens - 1):
        token = _next_token(lm, token, cache)
    synchronize(lm)
    return Timing(first - started, (time.perf_counter() - first) / (new_tokens - 1))


def _next_token(lm: LanguageModel, tokens: Tensor, cache: Any) -> Tensor:
    """The most probable next token of each text, (batch, 1)."""
    hidden = lm.body(tokens, past_key_values=cache, use_cache=True).last_hidden_state[:, -1:]
    return lm.logits(hidden).argmax(-1)


def rounds(
    lm: LanguageModel, variants: list[Variant], texts: Tensor, config: LatencyConfig
) -> Iterator[list[Timing] | None]:
    """One timing of every variant a round, in an order that turns around from round to round.

    Yields:
        Timings in the order of `variants`; None for each of the first `config.warmup` rounds, which do not count.

    """
    for number in range(config.warmup + config.repeats):
        found: dict[int, Timing] = {}
        order = list(enumerate(variants))
        for index, variant in order if number % 2 == 0 else reversed(order):
            with variant.on(), compiled(lm) if config.compile else nullcontext():
                found[index] = timed(lm, variant.behind, texts, config.new_tokens)
        yield None if number < config.warmup else [found[index] for index in range(len(variants))]


def synchronize(lm: LanguageModel) -> None:
    """Wait until the GPUs of a model have done what they were given; on a CPU nothing is left to wait for."""
    for device in _gpus(lm):
        torch.cuda.synchronize(device)
    if lm.device.type == "mps":
        torch.mps.synchronize()


def weight_bytes(lm: LanguageModel) -> int:
    """Bytes of all parameters and buffers of the model as it stands; what is shared counts once."""
    tensors = [*lm.model.parameters(), *lm.model.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def peak_bytes(lm: LanguageModel, behind: Prefix, texts: Tensor, new_tokens: int) -> int | None:
    """Bytes of the weights and of all that lives beside them at the worst moment of `timed`; None off CUDA.

    The weights that the model has in full precision, which a run keeps to put them back, are not in it.
    """
    gpus = _gpus(lm)
    if not gpus:  # torch keeps the largest amount on CUDA alone
        return None
    synchronize(lm)
    before = 0
    for device in gpus:
        torch.cuda.reset_peak_memory_stats(device)
        before += torch.cuda.memory_allocated(device)
    timed(lm, behind, texts, new_tokens)
    return weight_bytes(lm) + sum(torch.cuda.max_memory_allocated(device) for device in gpus) - before


def _gpus(lm: LanguageModel) -> set[torch.device]:
    return {parameter.device for parameter in lm.model.parameters() if parameter.device.type == "cuda"}


def check_latency(lm: LanguageModel, config: LatencyConfig, quantizer: QuantizerConfig, prefix_length: int) -> None:
    """Raise `ConfigError` where a prompt does not fit the context, or a quantizer could not be timed."""
    if not config.is_on:
        return
    inside = surrounds(quantizer)
    if inside:
        raise ConfigError(
            f"eval.latency.batch_sizes={config.batch_sizes} cannot be used with quantizer.{inside[0]}, which is "
            "simulated around the linears and cannot be taken off between two timings: set its bits to null, or "
            "eval.latency.batch_sizes=[]"
        )
    longest = max(config.prompt_lengths)
    needed = prefix_length + longest + config.new_tokens
    if lm.context_length is not None and needed > lm.context_length:
        behind = f" behind a prefix of up to {prefix_length} tokens" if prefix_length else ""
        raise ConfigError(
            f"eval.latency.prompt_lengths={config.prompt_lengths} with eval.latency.new_tokens={config.new_tokens}"
            f"{behind} needs {needed} positions, but {lm.label} has {lm.context_length}: shorten the prompts"
        )
    if config.compile:
        check_compiler(lm.device)
