"""The prefix: token ids and, for every layer, the keys and values that stand before a text.

## The prefix

A prefix p of tokens is run once through the full-precision model; its keys and values in every layer are kept. A text
is run behind copies of them, at positions from the length of p on. The result equals that of running [p, t] as one
text, up to rounding. As p is not run again, its positions never reach a quantized linear, a scale or a statistic, and
stay in full precision.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from cushion.artifacts import write_json
from cushion.errors import ArtifactError, ConfigError
from cushion.hashing import tensor_digest
from cushion.models.architectures import ARCHITECTURES, cache_shape, find_architecture

FORMAT = "cushion-prefix-1"
ASSISTED = ("prompt_lookup_num_tokens", "assistant_model")
"""The options of `generate` that make it assisted generation."""


class PrefixCache(DynamicCache):
    """A cache that knows how many of its first positions are a prefix's, which stay in full precision.

    While it holds nothing else, all of its rows are the same: it then takes the number of rows that the first pass has,
    such as those of several beams or returned sequences.
    """

    prefix_length: int = 0

    values_changed: bool = False
    """Whether the values in it are those of a model with rotated or scaled values (`changed_values` of
    `cushion.quantization.head_rotation`)."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values, (batch, heads, tokens, head size), to those of a layer; returns all of them."""
        layer: Any = self.layers[layer_idx] if layer_idx < len(self.layers) else None
        rows, length = key_states.shape[0], self.prefix_length
        if length and layer is not None and layer.is_initialized and layer.get_seq_length() == length:
            layer.keys = layer.keys[:1].expand(rows, -1, -1, -1)
            layer.values = layer.values[:1].expand(rows, -1, -1, -1)
        updated: tuple[Tensor, Tensor] = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return updated

    def activate_past_recording(self) -> None:
        """Called by what takes tokens back again: before the first pass by assisted generation alone.

        Raises:
            ConfigError: a prefix is all that it holds. The first pass of assisted generation runs all ids of its
                inputs, whatever the cache holds already: the prefix would stand twice.

        """
        if self.prefix_length and self.get_seq_length() == self.prefix_length:
            raise ConfigError(
                f"assisted generation (prompt_lookup_num_tokens, assistant_model) would run the {self.prefix_length} "
                "tokens of the prefix behind the prefix once more: leave these options out, or go without a prefix"
            )
        super().activate_past_recording()


@dataclass(frozen=True, eq=False)
class Prefix:
    """A prefix of key-value cache.

    Args:
        token_ids: the prompt tokens it was made from, in order; its length is the number of positions it takes.
        keys, values: one tensor per layer, shape (key-value heads, length, head size). Rotary positions, where the
            model has them, are already applied to the keys, as in the cache of a forward pass.
        tuned: whether keys and values were tuned after they were computed from `token_ids`.
        metadata: free JSON: the model it belongs to, its text, how it was found.

    """

    token_ids: tuple[int, ...]
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    tuned: bool = False
    metadata: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.token_ids)

    @classmethod
    def empty(cls) -> Prefix:
        """The prefix of length 0: with it, every call behaves as if there were none."""
        return cls((), (), ())

    @classmethod
    @torch.no_grad()
    def from_tokens(
        cls, model: PreTrainedModel, token_ids: Sequence[int], metadata: dict[str, Any] | None = None
    ) -> Prefix:
        """The keys and values that `model` computes for `token_ids` from position 0 on, each on its layer's device.

        Raises:
            ConfigError: a quantizer that rotates values within heads is on the model: a prefix holds them as they are.

        """
        if not token_ids:
            return cls.empty()
        cache = DynamicCache()  # not the model's own kind, which drops what is behind a sliding window
        embeddings: Any = model.get_input_embeddings()
        input_ids = torch.tensor([list(token_ids)], device=embeddings.weight.device)
        model.base_model(input_ids=input_ids, past_key_values=cache, use_cache=True)
        if getattr(cache, "values_changed", False):
            raise ConfigError(
                "quantizer.head_rotation or quantizer.smoothing_pairs is on the model, and the values that it gives "
                "are rotated or scaled: make the prefix before the quantizer is put on"
            )
        layers: list[Any] = cache.layers
        keys = tuple(layer.keys[0].clone() for layer in layers)
        values = tuple(layer.values[0].clone() for layer in layers)
        return cls(tuple(int(t) for t in token_ids), keys, values, False, metadata or {})

    def cache(self, model: PreTrainedModel, batch_size: int = 1) -> PrefixCache:
        """A fresh cache that holds the prefix for each row of a batch, each layer's part on that layer's device.

        Layers with a sliding window see of the prefix what their window reaches, as they would of its tokens.

        A forward pass changes its cache in place, so take a new one for every call. In `generate`, which expects the
        ids of what is cached among its inputs, use `prepend`:
        `model.generate(**prefix.prepend(inputs), past_key_values=prefix.cache(model, batch_size))`.

        Raises:
            ArtifactError: the prefix was made for a model of another shape.

        """
        cache = PrefixCache(config=model.config)
        if len(self) == 0:
            return cache
        self._check_model(model)
        cache.prefix_length = len(self)
        devices = _layer_devices(model)
        for index, (key, value, device) in enumerate(zip(self.keys, self.values, devices, strict=True)):
            cache.update(_one_row(key, device, model.dtype), _one_row(value, device, model.dtype), index)
        layers: list[Any] = cache.layers
        for layer in layers:  # views: a batch shares one copy until the model appends to it
            layer.keys = layer.keys.expand(batch_size, -1, -1, -1)
            layer.values = layer.values.expand(batch_size, -1, -1, -1)
        return cache

    @contextmanager
    def kept(self, model: PreTrainedModel) -> Iterator[None]:
        """Within it, every call of `model` must bring the prefix in its cache: `generate` of some families drops it.

        Phi-3 drops the cache where the text grows beyond `original_max_position_embeddings`, and computes it again
        from the token ids. Keys and values that were tuned would be lost without a word.

        Raises:
            ConfigError: within it, by a call of the model without the prefix in its cache.

        """

        def check(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            cache = kwargs.get("past_key_values")
            if isinstance(cache, PrefixCache) and cache.get_seq_length() >= cache.prefix_length == len(self):
                return
            raise ConfigError(
                f"generate of {model.config.model_type!r} dropped the cache that holds the prefix of {len(self)} "
                f"tokens{dropped_beyond(model)}: generate fewer tokens, shorten the context, or go without a prefix"
            )

        hook = model.register_forward_pre_hook(check, with_kwargs=True) if len(self) else None
        try:
            yield
        finally:
            if hook is not None:
                hook.remove()

    def _check_model(self, model: PreTrainedModel) -> None:
        config = model.config.get_text_config()
        if config.model_type in ARCHITECTURES:
            wanted = find_architecture(config, str(model.name_or_path)).cache_shape(config)
        else:
            wanted = cache_shape(config)
        shapes = {(tensor.shape[0], tensor.shape[2]) for tensor in (*self.keys, *self.values)}
        own = [(len(self.keys), *shape) for shape in sorted(shapes)]
        if own != [wanted]:
            raise ArtifactError(
                f"the prefix has (layers, key-value heads, head size) {' and '.join(map(str, own))}, the model "
                f"{wanted}: it belongs to another model"
            )

    def prepend(self, inputs: Any, warn: bool = True) -> dict[str, Any]:
        """Tokenizer output with the prefix's token ids in front, as `generate` wants it beside a filled cache.

        Where every text begins with the token that the prefix ends in, as BOS does that a tokenizer adds, it stands
        twice. It is left there, since a prefix that was found before texts with BOS (`evaluation.bos` of `result.json`)
        belongs before such texts, and a `UserWarning` tells it.

        The mask is extended with ones, so rows that are padded on the left keep their padding between the prefix and
        their text.

        Args:
            inputs: mapping with `input_ids` and optionally `attention_mask`, both (batch, tokens).
            warn: whether a token that stands twice is told.

        """
        ids = inputs["input_ids"]
        mask = inputs.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        if warn and len(self) and ids.numel():
            first = ids.gather(1, mask.long().argmax(dim=1, keepdim=True))
            if bool((first == self.token_ids[-1]).all()):
                warnings.warn(
                    f"the prefix ends in the token {self.token_ids[-1]} and every text begins with it, so it stands "
                    "twice: where it is a BOS that the tokenizer adds, and the prefix was found with bos=never, "
                    "tokenize with add_special_tokens=False",
                    stacklevel=2,
                )
        own = torch.tensor(self.token_ids, dtype=ids.dtype, device=ids.device).expand(ids.shape[0], -1)
        return {
            "input_ids": torch.cat([own, ids], dim=1),
            "attention_mask": torch.cat([torch.ones_like(own), mask], dim=1),
        }

    @property
    def fingerprint(self) -> str:
        """Hash of token ids, keys and values: the prefix's part in every cache key."""
        return tensor_digest((*self.keys, *self.values), label=[list(self.token_ids), self.tuned])

    def save(self, path: str | Path) -> None:
        """Write `path`.safetensors (keys and values) and `path`.json (everything else), each atomically.

        `path` may also be given with either suffix.
        """
        base = _base(path)
        base.parent.mkdir(parents=True, exist_ok=True)
        tensors = {f"keys.{i}": key.detach().cpu().contiguous() for i, key in enumerate(self.keys)}
        tensors |= {f"values.{i}": value.detach().cpu().contiguous() for i, value in enumerate(self.values)}
        record = {
            "format": FORMAT,
            "token_ids": list(self.token_ids),
            "layers": len(self.keys),
            "tuned": self.tuned,
            "fingerprint": self.fingerprint,
            "metadata": self.metadata,
        }
        temporary = base.with_name(base.name + ".safetensors.part")
        save_file(tensors, temporary, metadata={"format": FORMAT})
        temporary.replace(base.with_name(base.name + ".safetensors"))
        write_json(base.with_name(base.name + ".json"), record)

    @classmethod
    def load(cls, path: str | Path) -> Prefix:
        """Read a saved prefix; `path` as given to `save`, or either of its two files.

        Raises:
            ArtifactError: a file is missing, damaged, or the two do not belong together.

        """
        base = _base(path)
        tensor_file, json_file = base.with_name(base.name + ".safetensors"), base.with_name(base.name + ".json")
        for file in (json_file, tensor_file):
            if not file.is_file():
                raise ArtifactError(f"no prefix file {file}: a saved prefix is a .safetensors and a .json file")
        try:
            record = json.loads(json_file.read_text(encoding="utf-8"))
            if record.get("format") != FORMAT:
                raise ArtifactError(f"{json_file} is of format {record.get('format')!r}, not {FORMAT!r}")
            with safe_open(tensor_file, framework="pt") as file:
                keys = tuple(file.get_tensor(f"keys.{i}") for i in range(record["layers"]))
                values = tuple(file.get_tensor(f"values.{i}") for i in range(record["layers"]))
            prefix = cls(tuple(record["token_ids"]), keys, values, bool(record["tuned"]), record["metadata"])
        except (
            json.JSONDecodeError,
            UnicodeDecodeError,
            SafetensorError,
            KeyError,
            AttributeError,
            TypeError,
        ) as error:
            raise ArtifactError(f"the prefix {base} is damaged ({error}): find or tune it again") from error
        if prefix.fingerprint != record.get("fingerprint"):
            raise ArtifactError(f"{tensor_file} and {json_file} do not belong together: find or tune the prefix again")
        return prefix


def dropped_beyond(model: PreTrainedModel) -> str:
    """Where `generate` of a model drops its cache, in words; empty where the configuration does not say."""
    limit = getattr(model.config.get_text_config(), "original_max_position_embeddings", None)
    return "" if limit is None else f" (it does so beyond original_max_position_embeddings={limit} tokens)"


def keeps_cache(model: PreTrainedModel, length: int) -> bool:
    """Whether `generate` keeps the cache that it is given where a text grows to `length` tokens, cached ones included.

    It is asked for what it would run on such a text; the model is not run on it.
    """
    cache, module = Prefix.from_tokens(model, [0]).cache(model), cast(Any, model)
    ids = torch.zeros((1, length), dtype=torch.long, device=model.device)
    inputs = module.prepare_inputs_for_generation(
        ids,
        past_key_values=cache,
        attention_mask=torch.ones_like(ids),
        use_cache=True,
        next_sequence_length=length - 1,
    )
    return inputs.get("past_key_values") is cache


def _base(path: str | Path) -> Path:
    base = Path(path)
    return base.with_suffix("") if base.suffix in (".safetensors", ".json") else base


def _layer_devices(model: PreTrainedModel) -> list[torch.device]:
    """Where each layer computes: a model may be spread over several devices."""
    config = model.config.get_text_config()
    if config.model_type not in ARCHITECTURES:
        return [model.device] * config.num_hidden_layers
    path = ARCHITECTURES[config.model_type][0].blocks
    if config is not model.config:  # of a multimodal model, inside of which the text part stands
        path = path.replace("model.", "model.language_model.", 1)
    blocks = model.get_submodule(path)
    return [next(block.parameters()).device for block in blocks.children()]


def _one_row(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    return tensor.to(device=device, dtype=dtype).unsqueeze(0)
