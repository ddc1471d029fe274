"""The adapter, read back the way PEFT reads it, is the prefix: the same logits and the same generated tokens.

What PEFT does with the two files is written again here, from its source; where PEFT is installed it is asked itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import VARIANTS
from finished_runs import finished_run, tuned_prefix
from helpers import random_texts
from safetensors.torch import load_file
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from cushion.errors import ConfigError
from cushion.export.finished import FinishedRun
from cushion.export.peft_adapter import prompt_embeddings
from cushion.export.targets import export
from cushion.models import LanguageModel
from cushion.prefix import Prefix

Tiny = Callable[..., LanguageModel]
LONG = list(range(60, 70))
"""Ten tokens: more than the window of eight positions that some families have."""


def exported(folder: Path, lm: LanguageModel, prefix: Prefix) -> Path:
    export(FinishedRun.read(finished_run(folder / "run", lm, prefix)), "peft", folder / "adapter")
    return folder / "adapter"


def as_peft_does(model: PreTrainedModel, adapter: Path, batch: int) -> DynamicCache:
    """The cache that PEFT 0.21 makes for a batch from the files of an adapter."""
    config: dict[str, Any] = json.loads((adapter / "adapter_config.json").read_text())
    (embeddings,) = load_file(adapter / "adapter_model.safetensors").values()
    heads = config["num_attention_heads"]
    size = config["token_dim"] // heads
    assert embeddings.shape == (config["num_virtual_tokens"], config["num_layers"] * 2 * config["token_dim"])
    rows = embeddings.repeat(batch, 1, 1).view(batch, -1, config["num_layers"] * 2, heads, size)
    layers = rows.permute(2, 0, 3, 1, 4).split(config["num_transformer_submodules"] * 2)
    if model.config.model_type not in ("gemma2", "gemma3_text"):
        return DynamicCache(layers)
    cache = DynamicCache(config=model.config)
    for index, (key, value) in enumerate(layers):
        cache.update(key, value, index)
    return cache


def left_padded(texts: Tensor, padding: list[int]) -> Tensor:
    """The attention mask of texts of which each has this many padding tokens at its left."""
    mask = torch.ones_like(texts)
    for row, length in enumerate(padding):
        mask[row, :length] = 0
    return mask


@pytest.mark.parametrize("family", VARIANTS)
@torch.no_grad()
def test_logits_and_generated_tokens_are_those_of_the_prefix(family: str, tiny: Tiny, tmp_path: Path) -> None:
    lm = tiny(family)
    model: Any = lm.model
    for tokens in (LONG, LONG[:3]):
        prefix = tuned_prefix(lm, tokens)
        adapter = exported(tmp_path / str(len(tokens)), lm, prefix)
        texts = random_texts(4, 12)
        mask = left_padded(texts, [0, 1, 5, 2])
        whole = torch.cat([torch.ones(4, len(prefix), dtype=mask.dtype), mask], dim=1)
        further = {"attention_mask": whole}
        if "position_ids" in model.forward.__code__.co_varnames:
            further["position_ids"] = (whole.cumsum(1) - 1)[:, len(prefix) :]
        ours = model(texts, past_key_values=prefix.cache(model, 4), **further).logits
        theirs = model(texts, past_key_values=as_peft_does(model, adapter, 4), **further).logits
        alone = model(texts, attention_mask=mask).logits
        used = mask.bool()
        torch.testing.assert_close(theirs[used], ours[used], rtol=0, atol=1e-5)
        assert (alone[used] - ours[used]).abs().max() > 1e-2  # the prefix has a say at all
    inputs = prefix.prepend({"input_ids": texts, "attention_mask": mask})
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2, "pad_token_id": 258}
    # the beams of a batch of 4 are 8 rows
    ours = model.generate(**inputs, past_key_values=prefix.cache(model, 8), **options)
    theirs = model.generate(**inputs, past_key_values=as_peft_does(model, adapter, 8), **options)
    assert torch.equal(ours, theirs)


def test_the_matrix_is_that_of_the_reference(tiny: Tiny) -> None:
    lm = tiny("llama")
    prefix = tuned_prefix(lm, [7, 8])
    rows = prompt_embeddings(prefix)
    assert rows.dtype == torch.float32
    for position in range(2):  # layer by layer, the key then the value, head by head
        parts = [part[:, position].flatten() for pair in zip(prefix.keys, prefix.values, strict=True) for part in pair]
        assert torch.equal(rows[position], torch.cat(parts))


def test_a_half_precision_prefix_is_written_exactly_in_float32(tiny: Tiny) -> None:
    prefix = tuned_prefix(tiny("llama"), [7, 8])
    keys, values = ([tensor.bfloat16() for tensor in tensors] for tensors in (prefix.keys, prefix.values))
    half = replace(prefix, keys=tuple(keys), values=tuple(values))
    same = replace(prefix, keys=tuple(k.float() for k in keys), values=tuple(v.float() for v in values))
    assert prompt_embeddings(half).dtype == torch.float32
    assert torch.equal(prompt_embeddings(half), prompt_embeddings(same))


def test_layers_of_several_shapes_are_refused(tiny: Tiny) -> None:
    prefix = tuned_prefix(tiny("llama"), [7, 8])
    uneven = replace(prefix, values=(*prefix.values[:-1], prefix.values[-1][..., :4]))
    with pytest.raises(ConfigError, match=r"several shapes .* \(2, 4\) and \(2, 8\): use the prefix from Python"):
        prompt_embeddings(uneven)


@pytest.mark.parametrize(
    "family",
    [
        "llama", "mistral", "gemma2", "gemma3_text", "qwen3", "bloom", "falcon_alibi", "gpt_oss", "qwen2_moe",
        "qwen3_moe", "olmo2", "granite", "starcoder2",
    ],
)  # fmt: skip
@torch.no_grad()
def test_peft_itself_reads_the_adapter(family: str, tiny: Tiny, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    lm = tiny(family)
    prefix = tuned_prefix(lm, LONG)
    texts = random_texts(4, 12)
    ours = lm.model(texts, past_key_values=prefix.cache(lm.model, 4)).logits
    inputs = {"input_ids": texts, "attention_mask": left_padded(texts, [0, 1, 5, 2])}
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2, "pad_token_id": 258}
    generate: Any = lm.model.generate
    written = generate(**prefix.prepend(inputs), past_key_values=prefix.cache(lm.model, 8), **options)
    adapter = exported(tmp_path, lm, prefix)
    model = peft.PeftModel.from_pretrained(lm.model, adapter)
    torch.testing.assert_close(model(input_ids=texts).logits, ours, rtol=0, atol=1e-5)
    by_peft = model.generate(**inputs, **options)
    assert torch.equal(by_peft[:, -4:], written[:, -4:])
