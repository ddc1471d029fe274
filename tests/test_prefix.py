"""The prefix as an object: its cache does what its tokens would do, it survives the disk bit for bit, and it fits."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FEW, SLIDING, VARIANTS
from helpers import random_texts
from torch import Tensor
from transformers import AutoModelForCausalLM

from cushion.errors import ArtifactError, ConfigError
from cushion.models import LanguageModel
from cushion.models.tiny import TINY
from cushion.prefix import Prefix, keeps_cache

TOKENS = (256, 10, 65)
Tiny = Callable[..., LanguageModel]


def behind(tokens: tuple[int, ...], ids: Tensor) -> Tensor:
    """[p, t] for every row t."""
    return torch.cat([torch.tensor(tokens, dtype=torch.long).expand(len(ids), -1), ids], dim=1)


@torch.no_grad()
def plain_logits(lm: LanguageModel, ids: Tensor) -> Tensor:
    return lm.model(input_ids=ids, use_cache=False).logits


@torch.no_grad()
def logits_with(lm: LanguageModel, prefix: Prefix, ids: Tensor) -> Tensor:
    cache = prefix.cache(lm.model, len(ids))
    return lm.model(input_ids=ids, past_key_values=cache, use_cache=True).logits


def bits(prefix: Prefix) -> list[bytes]:
    return [t.contiguous().view(torch.uint8).numpy().tobytes() for t in (*prefix.keys, *prefix.values)]


@pytest.mark.parametrize("family", VARIANTS)
def test_cache_does_what_the_tokens_do(tiny: Tiny, family: str) -> None:
    lm, ids = tiny(family), random_texts(4, 9)
    prefix = Prefix.from_tokens(lm.model, TOKENS)
    before = bits(prefix)
    expected = plain_logits(lm, behind(TOKENS, ids))[:, len(TOKENS) :]
    for count in (4, 1, 4):  # a cache that grew into the prefix would show the second time
        torch.testing.assert_close(logits_with(lm, prefix, ids[:count]), expected[:count], atol=2e-5, rtol=1e-4)
    assert bits(prefix) == before
    assert (expected - plain_logits(lm, ids)).abs().max() > 1e-2  # the prefix is not without effect


def test_grouped_query_attention_is_among_the_families(tiny: Tiny) -> None:
    lm = tiny("llama")
    keys = Prefix.from_tokens(lm.model, TOKENS).keys[0]
    assert keys.shape[:2] == (lm.model.config.num_key_value_heads, len(TOKENS))
    assert keys.shape[0] < lm.model.config.num_attention_heads


@pytest.mark.parametrize("length", [3, 14], ids=["short prefix", "prefix longer than the window"])
@pytest.mark.parametrize("family", VARIANTS)
def test_cache_agrees_on_a_text_longer_than_any_window(tiny: Tiny, family: str, length: int) -> None:
    lm, ids = tiny(family), random_texts(4, 40)
    assert family not in SLIDING or lm.model.config.sliding_window == 8
    tokens = tuple(range(60, 60 + length))
    prefix = Prefix.from_tokens(lm.model, tokens)
    assert {tensor.shape[1] for tensor in (*prefix.keys, *prefix.values)} == {length}
    expected = plain_logits(lm, behind(tokens, ids))[:, length:]
    for count in (1, 4):
        torch.testing.assert_close(logits_with(lm, prefix, ids[:count]), expected[:count], atol=2e-5, rtol=1e-4)
    # three windows of 8 reach 21 positions back: where all layers slide, the last token has lost sight of the prefix
    effect = (expected - plain_logits(lm, ids))[:, -1].abs().max()
    assert effect < 1e-5 if family in ("mistral", "starcoder2", "phi3") else effect > 1e-2


def test_empty_prefix_changes_nothing(tiny: Tiny) -> None:
    lm, ids = tiny(), random_texts(2, 9)
    assert len(Prefix.empty()) == 0
    assert len(Prefix.from_tokens(lm.model, [])) == 0
    assert torch.equal(logits_with(lm, Prefix.empty(), ids), plain_logits(lm, ids))
    assert torch.equal(Prefix.empty().prepend({"input_ids": ids})["input_ids"], ids)


@torch.no_grad()
def generate(lm: LanguageModel, **inputs: Any) -> tuple[Tensor, Tensor]:
    """Five greedily chosen tokens per row and the logits they were chosen by."""
    output = lm.model.generate(
        **inputs, do_sample=False, max_new_tokens=5, min_new_tokens=5, pad_token_id=258,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    return output.sequences[:, -5:], torch.stack(output.logits, dim=1)


@pytest.mark.parametrize("family", VARIANTS)
def test_generate_equals_generating_from_the_tokens(tiny: Tiny, family: str) -> None:
    lm, text = tiny(family), random_texts(1, 7)
    prefix = Prefix.from_tokens(lm.model, TOKENS)
    expected = generate(lm, input_ids=behind(TOKENS, text))
    actual = generate(lm, **prefix.prepend({"input_ids": text}), past_key_values=prefix.cache(lm.model, 1))
    assert torch.equal(actual[0], expected[0])
    torch.testing.assert_close(actual[1], expected[1], atol=5e-5, rtol=1e-4)


def test_assisted_generation_goes_without_a_prefix_or_is_refused(tiny: Tiny) -> None:
    """Its first pass runs all ids again, those of the prefix behind the prefix."""
    lm = tiny("llama")
    text = torch.tensor([[70, 71, 72, 73] * 3])
    expected = generate(lm, input_ids=text)
    found = generate(lm, input_ids=text, past_key_values=Prefix.empty().cache(lm.model), prompt_lookup_num_tokens=3)
    assert torch.equal(found[0], expected[0])
    prefix = Prefix.from_tokens(lm.model, TOKENS)
    with pytest.raises(ConfigError, match=r"\(prompt_lookup_num_tokens, assistant_model\) would run the 3 tokens"):
        generate(
            lm, **prefix.prepend({"input_ids": text}), past_key_values=prefix.cache(lm.model),
            prompt_lookup_num_tokens=3,
        )  # fmt: skip
    cache = prefix.cache(lm.model)
    lm.model(input_ids=text, past_key_values=cache)
    cache.activate_past_recording()  # as generation on a GPU of Apple's does behind the first pass


@pytest.mark.parametrize("family", (*FEW, "bloom", "mixtral"))  # padding takes up window
def test_generate_from_a_batch_padded_on_the_left(tiny: Tiny, family: str) -> None:
    lm = tiny(family)
    lm.tokenizer.padding_side = "left"
    prefix = Prefix.from_tokens(lm.model, TOKENS)
    texts = ["a text", "another, longer text"]
    inputs = lm.tokenizer(texts, return_tensors="pt", padding=True)
    assert inputs["attention_mask"][0, 0] == 0  # the first row is padded
    actual = generate(lm, **prefix.prepend(inputs), past_key_values=prefix.cache(lm.model, batch_size=2))
    for row, text in enumerate(texts):
        tokens, logits = generate(lm, input_ids=behind(TOKENS, lm.encode(text)[None]))
        assert torch.equal(actual[0][row], tokens[0])
        torch.testing.assert_close(actual[1][row], logits[0], atol=5e-5, rtol=1e-4)


def test_prepend_keeps_the_padding_between_prefix_and_text() -> None:
    prefix = Prefix((7, 8), (), ())
    inputs = {"input_ids": torch.tensor([[0, 1, 2]]), "attention_mask": torch.tensor([[0, 1, 1]])}
    extended = prefix.prepend(inputs)
    assert extended["input_ids"].tolist() == [[7, 8, 0, 1, 2]]
    assert extended["attention_mask"].tolist() == [[1, 1, 0, 1, 1]]
    assert inputs["input_ids"].shape == (1, 3)


@pytest.mark.parametrize(
    ("ids", "mask", "tells"),
    [
        ([[8, 1], [8, 2]], None, True),
        ([[0, 8], [8, 2]], [[0, 1], [1, 1]], True),
        ([[8, 1], [3, 2]], None, False),
        ([[7, 8]], None, False),
    ],
)
def test_a_token_that_stands_twice_is_told_and_left(ids: list[list[int]], mask: Any, tells: bool) -> None:
    inputs = {"input_ids": torch.tensor(ids)} | ({} if mask is None else {"attention_mask": torch.tensor(mask)})
    prefix = Prefix((7, 8), (), ())
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert prefix.prepend(inputs)["input_ids"].tolist() == [[7, 8, *row] for row in ids]
        prefix.prepend(inputs, warn=False)
        Prefix.empty().prepend(inputs)
    assert len(told) == tells
    if tells:
        assert "ends in the token 8" in str(told[0].message) and "add_special_tokens=False" in str(told[0].message)
        assert told[0].filename == __file__


@pytest.mark.parametrize("family", VARIANTS)
def test_what_generate_does_with_its_cache_is_known_before(tiny: Tiny, family: str) -> None:
    lm = tiny(family)
    drops = family == "phi3"
    if drops:
        lm.model.config.original_max_position_embeddings = 16
    assert keeps_cache(lm.model, 16)
    assert keeps_cache(lm.model, 17) != drops
    prefix = Prefix.from_tokens(lm.model, TOKENS)
    inputs = prefix.prepend({"input_ids": random_texts(1, 9)})
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    with prefix.kept(lm.model):
        for grown in (16, 17):  # the last token is not run
            refused = pytest.raises(ConfigError, match="dropped") if drops and grown == 17 else nullcontext()
            with refused:
                cache = prefix.cache(lm.model)
                lm.model.generate(**inputs, past_key_values=cache, max_new_tokens=grown + 1 - 12, **options)


# ---- another model --------------------------------------------------------------------------------------------------


def test_prefix_of_a_model_with_other_layers_is_refused(tiny: Tiny) -> None:
    config = TINY["llama"]()
    config.num_hidden_layers = 2
    shallow = AutoModelForCausalLM.from_config(config)
    prefix = Prefix.from_tokens(tiny("llama").model, TOKENS)
    with pytest.raises(ArtifactError, match=r"the prefix has .*\(3, 2, 8\), the model \(2, 2, 8\).*another model"):
        prefix.cache(shallow, 1)


@pytest.mark.parametrize(
    "changes", [{"num_key_value_heads": 4}, {"num_key_value_heads": 4, "hidden_size": 64}, {"head_dim": 16}]
)
def test_prefix_of_a_model_with_other_heads_is_refused(tiny: Tiny, changes: dict[str, int]) -> None:
    config = TINY["llama"]()
    config.head_dim = changes.get("hidden_size", config.hidden_size) // config.num_attention_heads
    for key, value in changes.items():
        setattr(config, key, value)
    other = AutoModelForCausalLM.from_config(config)
    prefix = Prefix.from_tokens(tiny("llama").model, TOKENS)
    with pytest.raises(ArtifactError, match="another model"):
        prefix.cache(other, 1)


# ---- on disk --------------------------------------------------------------------------------------------------------


def example(lm: LanguageModel, dtype: torch.dtype = torch.float32, tokens: tuple[int, ...] = TOKENS) -> Prefix:
    prefix = Prefix.from_tokens(lm.model, tokens, {"text": "ein Präfix\n", "tau": 0.5})
    keys = tuple((k + torch.randn_like(k)).to(dtype) for k in prefix.keys)
    return replace(prefix, keys=keys, values=tuple(v.to(dtype) for v in prefix.values), tuned=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("suffix", ["", ".json", ".safetensors"])
def test_load_gives_back_the_same_bits(tiny: Tiny, tmp_path: Path, dtype: torch.dtype, suffix: str) -> None:
    prefix = example(tiny(), dtype)
    prefix.save(tmp_path / "folder" / "tuned.v1")
    loaded = Prefix.load(tmp_path / "folder" / f"tuned.v1{suffix}")
    assert bits(loaded) == bits(prefix)
    assert [t.dtype for t in loaded.keys] == [dtype] * 3
    assert (loaded.token_ids, loaded.tuned, loaded.metadata) == (prefix.token_ids, True, prefix.metadata)
    assert loaded.fingerprint == prefix.fingerprint
    assert sorted(p.name for p in (tmp_path / "folder").iterdir()) == ["tuned.v1.json", "tuned.v1.safetensors"]


def test_empty_prefix_is_saved_too(tmp_path: Path) -> None:
    Prefix.empty().save(tmp_path / "none")
    assert len(Prefix.load(tmp_path / "none")) == 0


@pytest.mark.parametrize("name", ["p.safetensors", "p.json"])
def test_load_takes_the_path_that_save_took(tiny: Tiny, tmp_path: Path, name: str) -> None:
    prefix = example(tiny())
    prefix.save(tmp_path / name)
    assert bits(Prefix.load(tmp_path / name)) == bits(prefix)


@pytest.mark.parametrize("suffix", ["json", "safetensors"])
def test_missing_file_is_named(tiny: Tiny, tmp_path: Path, suffix: str) -> None:
    example(tiny()).save(tmp_path / "found")
    (tmp_path / f"found.{suffix}").unlink()
    with pytest.raises(ArtifactError, match=rf"no prefix file .*found\.{suffix}"):
        Prefix.load(tmp_path / "found")


def _edit_record(**changes: Any) -> Callable[[Path], None]:
    def edit(base: Path) -> None:
        file = base.with_suffix(".json")
        record = json.loads(file.read_text(encoding="utf-8"))
        kept = {k: v for k, v in {**record, **changes}.items() if v is not ...}
        file.write_text(json.dumps(kept), encoding="utf-8")

    return edit


def _rewrite(suffix: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def edit(base: Path) -> None:
        file = base.with_suffix(suffix)
        file.write_bytes(change(file.read_bytes()))

    return edit


DAMAGES = {
    "tensors cut in the data": _rewrite(".safetensors", lambda data: data[:-10]),
    "tensors cut in the header": _rewrite(".safetensors", lambda data: data[:20]),
    "tensors empty": _rewrite(".safetensors", lambda data: b""),
    "tensors garbage": _rewrite(".safetensors", lambda data: b"garbage " * 20),
    "record cut": _rewrite(".json", lambda data: data[: len(data) // 2]),
    "record empty": _rewrite(".json", lambda data: b""),
    "record no text": _rewrite(".json", lambda data: b"\xff\xfe\x00"),
    "record a list": _rewrite(".json", lambda data: b"[1, 2]"),
    "record null": _rewrite(".json", lambda data: b"null"),
    "record of another format": _edit_record(format="cushion-prefix-0"),
    "record without layers": _edit_record(layers=...),
    "record without metadata": _edit_record(metadata=...),
    "record with text for layers": _edit_record(layers="three"),
    "record with too many layers": _edit_record(layers=4),
    "record with too few layers": _edit_record(layers=2),
    "record of other tokens": _edit_record(token_ids=[256, 10, 66]),
    "record of a longer prefix": _edit_record(token_ids=[256, 10, 65, 65]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_refused_by_name(tiny: Tiny, tmp_path: Path, damage: str) -> None:
    example(tiny()).save(tmp_path / "found")
    DAMAGES[damage](tmp_path / "found")
    with pytest.raises(ArtifactError, match="found") as caught:
        Prefix.load(tmp_path / "found")
    assert "\n" not in str(caught.value)


def test_files_of_two_prefixes_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    lm = tiny()
    example(lm).save(tmp_path / "found")
    example(lm, tokens=(1, 2, 3)).save(tmp_path / "other")
    (tmp_path / "other.safetensors").replace(tmp_path / "found.safetensors")
    with pytest.raises(ArtifactError, match=r"found\.safetensors and .*found\.json do not belong together"):
        Prefix.load(tmp_path / "found")


def test_fingerprint_depends_on_every_part(tiny: Tiny) -> None:
    prefix = Prefix.from_tokens(tiny().model, TOKENS)
    assert prefix.fingerprint == Prefix.from_tokens(tiny().model, TOKENS).fingerprint
    variants = [
        replace(prefix, tuned=True),
        replace(prefix, token_ids=(256, 10, 66)),
        replace(prefix, keys=(*prefix.keys[:2], prefix.keys[2] + 1e-3)),
        replace(prefix, values=(*prefix.values[:2], prefix.values[2] + 1e-3)),
        replace(prefix, keys=prefix.values, values=prefix.keys),
    ]
    assert len({prefix.fingerprint, *(v.fingerprint for v in variants)}) == 6
