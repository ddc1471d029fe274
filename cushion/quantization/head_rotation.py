"""Rotation inside attention, head by head: the values (R2), and the queries and keys (R3).

## R2 and R3: heads rotated

With `quantizer.head_rotation`. H is of the size of a head, of the same construction as for R1, with seed 0, one for
all heads and layers:

- R2 (`values`): the values v of a head become v H. Attention averages values over positions, so H goes through it:
  the rows of W_v that make a head's values become H^T W_v (and their bias b H), and the columns of W_o that read a
  head W_o H, folded in float64 before anything is rounded. With grouped heads W_v is turned once and W_o for every
  head that reads it; fused projections are turned in the rows that are values.
- R3 (`keys`): queries and keys become q H and k H behind the rotary positions, while the model runs; q k^T stays.
  Nothing depends on it unless `kv_cache` or `attention` rounds them, and a warning says so.
- The prefix's keys and values are those of the plain model, found or tuned. Its values are turned by H when its cache
  enters the model, its keys where they are read; both stay in full precision. Gradients of tuning pass through H. A
  cache that the plain model filled beyond the prefix is refused.
- Static ranges of the cache are those of the rotated keys and values, and ranges of the output projection's input
  those of what it reads then.
- Over the heads that input is rotated while the model runs, with `input_rotation=down_and_heads`: by H x I, H of the
  number of heads, which with R2 makes H x H_d, QuaRot's whole rotation there. Where their number has no Hadamard matrix
  (9, of SmolLM2-135M) H is a seeded random orthogonal one; QuaRot has none.

**`quantizer=quarot`** follows the public code: activations per token, clipped to 0.9 of their range; the cache in
groups of a head, an integer zero point, clipped to 0.95; weights from -8 to 7, ranges by error, GPTQ, one linear after
another. What differs: an input's H is one for all layers, with signs; weights have the least squared error on 22 ranges
for each row where the code has the least |e|^2.4 on 80; columns with large inputs come first (act-order); GPTQ sees
inputs behind blocks whose activations and cache are rounded too; and the calibration texts are 16 of 512 tokens unless
`quantizer.calibration` says 128 of 2048. Heads of another size than 128 are groups of their own size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn

from cushion.errors import ConfigError
from cushion.models import LanguageModel
from cushion.prefix import PrefixCache
from cushion.quantization.effect import Effect, Work
from cushion.quantization.hadamard import HadamardTransform, randomized_hadamard
from cushion.quantization.parts.head_rotation import rotates_values
from cushion.quantization.parts.rotation_sites import left_alone, values_site
from cushion.quantization.quantizer import QuantizerConfig
from cushion.quantization.replacements import Replacements
from cushion.quantization.rotation import times


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
        lm, replacements = work.lm, Replacements()
        alone = left_alone(work.config, work.inputs)
        layers = [layer for layer in range(len(lm.blocks)) if values_site(layer) not in alone]
        rotate = HadamardTransform()
        changes = dict.fromkeys(layers, rotate)
        with changed_values(lm, changes, "quantizer.head_rotation, which keeps rotated values"):
            try:
                for layer in layers:
                    _fold_values(lm, layer, replacements)
                yield
            finally:
                replacements.undo()


def value_linears(lm: LanguageModel, layer: int) -> tuple[str, str]:
    """The full names of the linear that makes the values of a layer, and of the one that reads what becomes of them."""
    values = lm.architecture.values
    assert values is not None, "checked"
    path = f"{lm.architecture.blocks}.{layer}."
    return path + values.maker, path + values.reader


def value_heads(lm: LanguageModel) -> int:
    """How many heads of values a layer makes; a cache may hold each of them several times (Falcon's new decoder)."""
    config, values = lm.model.config.get_text_config(), lm.architecture.values
    assert values is not None, "checked"
    _, heads, _ = lm.architecture.cache_shape(config)
    return heads if values.groups is None else int(getattr(config, values.groups))


def rows_of_values(lm: LanguageModel, tensor: Tensor) -> Tensor:
    """The rows of the weight or the bias of the linear that makes values, (out_features, ...), that are values.

    A view, (groups, heads, head size, ...): all key-value heads are in order of both.
    """
    config, values = lm.model.config.get_text_config(), lm.architecture.values
    assert values is not None, "checked"
    _, heads, size = lm.architecture.cache_shape(config)
    groups, heads = (1, heads) if values.groups is None else (int(getattr(config, values.groups)), 1)
    return tensor.view(groups, -1, size, tensor.numel() // len(tensor))[:, -heads:]


def turned_maker(lm: LanguageModel, tensor: Tensor) -> Tensor:
    """The weight or the bias of the linear that makes values, (out_features, ...), with the rows of values rotated."""
    turned = tensor.detach().clone()
    rows = rows_of_values(lm, turned)
    rows.copy_(times(rows.mT, randomized_hadamard(rows.shape[2])).mT)
    return turned


def turned_reader(lm: LanguageModel, weight: Tensor) -> Tensor:
    """The weight of the linear that reads values, (out_features, heads x head size), with every head rotated back."""
    _, _, size = lm.architecture.cache_shape(lm.model.config.get_text_config())
    columns = weight.detach().unflatten(1, (-1, size))
    return times(columns, randomized_hadamard(size)).flatten(1).to(weight.dtype)


def _fold_values(lm: LanguageModel, layer: int, replacements: Replacements) -> None:
    maker, reader = (cast(nn.Linear, lm.model.get_submodule(name)) for name in value_linears(lm, layer))
    turned = [(maker, "weight", turned_maker(lm, maker.weight)), (reader, "weight", turned_reader(lm, reader.weight))]
    if maker.bias is not None:
        turned.append((maker, "bias", turned_maker(lm, maker.bias)))
    for owner, name, tensor in turned:
        replacements.put(owner, name, nn.Parameter(tensor, requires_grad=False))


@contextmanager
def changed_values(lm: LanguageModel, changes: Mapping[int, Callable[[Tensor], Tensor]], what: str) -> Iterator[None]:
    """The values of every prefix changed as its cache enters the model, once, as the linears that make values are.

    Args:
        changes: by layer, of (batch, key-value heads, positions, head size).
        what: the key that asks for it, and what the cache holds then: for messages.

    Raises:
        ConfigError: while the model runs: a cache holds more than a prefix, from outside, whose values are plain.

    """

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache: Any = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments.get("past_key_values")
        if cache is None or getattr(cache, "values_changed", False):
            return
        own = cache.prefix_length if isinstance(cache, PrefixCache) else 0
        if cache.get_seq_length() > own:
            raise ConfigError(
                f"a cache that was filled by the plain model cannot be continued under {what}: take a new one "
                "(Prefix.cache)"
            )
        for layer, change in changes.items() if own else ():
            cache.layers[layer].values = change(cache.layers[layer].values)
        cache.values_changed = True

    decoder = lm.model.get_submodule(lm.architecture.blocks.rpartition(".")[0])
    handle = decoder.register_forward_pre_hook(enter, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


HEAD_ROTATION = _HeadRotation()
