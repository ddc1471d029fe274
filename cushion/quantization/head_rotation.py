"""Rotation inside attention, head by head: the values (R2), and the queries and keys (R3).

After QuaRot (arXiv 2404.00456, section 4) and SpinQuant (arXiv 2405.16406, section 3.2), which names the two. With an
orthogonal H of the size of a head, one for all heads and layers:

- R2: the values v of a head become v H, folded into the linear that makes them, and the linear that reads what
  attention makes of them takes H back, since attention only averages values over positions. The rows of grouped heads
  are turned once, the columns of every head that reads them. The cache holds v H, so the values of a prefix, found or
  tuned, are turned when its cache enters the model.
- R3: queries q and keys k become q H and k H behind the rotary positions, where nothing linear stands before them. The
  scores q k^T are the same. It matters where keys are rounded, and is done there (`cushion.quantization.attention`):
  the cache itself holds plain keys.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from cushion.errors import ConfigError
from cushion.models import LanguageModel
from cushion.prefix import PrefixCache
from cushion.quantization.effect import Effect, Work
from cushion.quantization.hadamard import randomized_hadamard
from cushion.quantization.parts.head_rotation import rotates_values
from cushion.quantization.quantizer import QuantizerConfig
from cushion.quantization.replacements import Replacements
from cushion.quantization.rotation import times


class RotatedHeads:
    """Multiplies the last dimension, the channels of a head, with the matrix H of its size."""

    def __init__(self) -> None:
        self._matrices: dict[tuple[int, torch.device], Tensor] = {}

    def __call__(self, values: Tensor) -> Tensor:
        """`values`: (..., head size) -> the same shape and dtype; multiplied in float32, or in float64 if they are."""
        place = values.shape[-1], values.device
        if place not in self._matrices:
            self._matrices[place] = randomized_hadamard(place[0]).to(place[1])
        dtype = torch.promote_types(values.dtype, torch.float32)
        return (values.to(dtype) @ self._matrices[place].to(dtype)).to(values.dtype)


class _HeadRotation(Effect):
    def check(self, lm: LanguageModel, config: QuantizerConfig) -> None:
        """The architecture names the linears that make and read values."""
        if rotates_values(config) and lm.architecture.values is None:
            raise ConfigError(
                f"quantizer.head_rotation={config.head_rotation} cannot be used with {lm.label}: the architecture "
                f"{lm.architecture.model_type!r} does not name where its values are made and read; use "
                "quantizer.head_rotation=none"
            )

    @contextmanager
    def around(self, work: Work) -> Iterator[None]:
        """Values rotated in the weights, and those of a prefix as it comes."""
        if not rotates_values(work.config):
            yield
            return
        replacements = Replacements()
        decoder = work.lm.model.get_submodule(work.lm.architecture.blocks.rpartition(".")[0])
        handle = decoder.register_forward_pre_hook(_enter, with_kwargs=True)
        try:
            _fold_values(work.lm, replacements)
            yield
        finally:
            handle.remove()
            replacements.undo()


def _fold_values(lm: LanguageModel, replacements: Replacements) -> None:
    config = lm.model.config.get_text_config()
    values = lm.architecture.values
    assert values is not None, "checked"
    _, heads, size = lm.architecture.cache_shape(config)
    groups, heads = (1, heads) if values.groups is None else (int(getattr(config, values.groups)), 1)
    matrix = randomized_hadamard(size)
    for block in lm.blocks:
        maker, reader = (cast(nn.Linear, block.get_submodule(path)) for path in (values.maker, values.reader))
        for name in ("weight", "bias"):
            old = getattr(maker, name)
            if old is not None:
                new = old.detach().clone()
                own = new.view(groups, -1, size, new.numel() // new.shape[0])[:, -heads:]
                own.copy_(times(own.mT, matrix).mT)
                replacements.put(maker, name, nn.Parameter(new, requires_grad=False))
        columns = reader.weight.detach().unflatten(1, (-1, size))
        turned = times(columns, matrix).flatten(1).to(reader.weight.dtype)
        replacements.put(reader, "weight", nn.Parameter(turned, requires_grad=False))


def _enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before every forward pass of the decoder: the values of a prefix are turned, once for each cache.

    Raises:
        ConfigError: the cache holds more than a prefix, from outside, whose values are plain.

    """
    cache: Any = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments.get("past_key_values")
    if cache is None or getattr(cache, "values_rotated", False):
        return
    own = cache.prefix_length if isinstance(cache, PrefixCache) else 0
    if cache.get_seq_length() > own:
        raise ConfigError(
            "a cache that was filled by the plain model cannot be continued under quantizer.head_rotation, which "
            "keeps rotated values: take a new one (Prefix.cache)"
        )
    rotate = RotatedHeads()
    for layer in cache.layers if own else ():
        layer.values = rotate(layer.values)
    cache.values_rotated = True


HEAD_ROTATION = _HeadRotation()
