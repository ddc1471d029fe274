"""Shares of attention against two recomputations: from the plain model's own maps, and from queries and keys."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import FAMILIES, FEW
from helpers import random_texts
from tiny_run import small_config
from torch import Tensor

from cushion import pipeline
from cushion.config import EvalConfig, SearchConfig
from cushion.errors import ConfigError
from cushion.evaluation import attention as module
from cushion.evaluation.attention import AttentionShares, attention_shares
from cushion.models import LanguageModel
from cushion.prefix import Prefix

Tiny = Callable[..., LanguageModel]
PROMPT = [256, 10, 65]


@torch.no_grad()
def from_the_models_maps(lm: LanguageModel, prompt: list[int], texts: Tensor, first: int) -> AttentionShares:
    """The prefix as plain tokens of one sequence, without any cache, in a pass that predicts what any other does."""
    length = len(prompt)
    prefix, start, sinks = [], [], []
    for text in texts.tolist():
        tokens = torch.tensor([prompt + text])
        plain = lm.model(input_ids=tokens, use_cache=False).logits
        before = lm.model.config._attn_implementation
        lm.model.set_attn_implementation("eager")
        lm.model.config._attn_implementation = "eager"  # Falcon and BLOOM read it here, and take it in no other way
        found = lm.model(input_ids=tokens, use_cache=False, output_attentions=True)
        lm.model.config._attn_implementation = before
        assert torch.allclose(found.logits, plain, atol=1e-4), "a pass that gives its maps is the same pass"
        maps = torch.stack([layer[0] for layer in found.attentions]).double()
        if lm.architecture.model_type == "gpt_oss":  # learned sinks take the rest
            assert (maps.sum(-1) < 1).all()
        else:
            assert torch.allclose(maps.sum(-1), torch.ones(maps.shape[:-1], dtype=torch.double), atol=1e-5)
        assert maps.triu(1).abs().max() == 0, "nothing is seen before it is read"
        rows = maps[:, :, length + first :]
        prefix.append(rows[..., :length].sum(-1).mean(-1))
        start.append(rows[..., length : length + first].sum(-1).mean(-1))
        received = rows.sum((0, 1, 2)).tolist()
        top = sorted(range(len(received)), key=lambda position: received[position], reverse=True)[:5]
        sinks.append(sum(position < length for position in top))
    mean = sum(sinks) / len(sinks) if prompt else None
    return AttentionShares(torch.stack(prefix).mean(0).tolist(), torch.stack(start).mean(0).tolist(), mean)


def assert_equal(found: AttentionShares, expected: AttentionShares) -> None:
    for ours, theirs in ((found.prefix, expected.prefix), (found.first, expected.first)):
        assert torch.allclose(torch.tensor(ours), torch.tensor(theirs), atol=1e-5)
    assert found.sinks_in_prefix == expected.sinks_in_prefix


@pytest.mark.parametrize("prompt", [[], PROMPT], ids=["bare", "prefix"])
@pytest.mark.parametrize("family", FAMILIES)
def test_shares_are_those_of_the_models_own_maps(tiny: Tiny, family: str, prompt: list[int]) -> None:
    lm, texts = tiny(family), random_texts(2, 20)
    found = attention_shares(lm, Prefix.from_tokens(lm.model, prompt), texts, 3)
    assert_equal(found, from_the_models_maps(tiny(family), prompt, texts, 3))
    shares = torch.tensor([found.prefix, found.first])
    assert shares.shape == (2, 3, 4)  # layers and heads of the tiny models
    assert (shares >= 0).all()
    assert (shares.sum(0) <= 1 + 1e-6).all()
    assert (shares[1] > 0).all()
    if prompt:
        assert (shares[0] > 0).all()
        assert shares[0].flatten().unique().numel() > 6, "layers and heads differ"
    else:
        assert (shares[0] == 0).all()


@torch.no_grad()
def test_shares_are_those_of_queries_and_keys(tiny: Tiny) -> None:
    """A tiny llama by the textbook: rotate halves, divide by the root of the head size, softmax over the past."""
    lm, text, first = tiny(), random_texts(1, 20), 2
    found = attention_shares(lm, Prefix.from_tokens(lm.model, PROMPT), text, first)
    tokens = torch.tensor([PROMPT + text[0].tolist()])
    seen: dict[str, Tensor] = {}
    hooks = [
        linear.register_forward_hook(lambda _, __, output, name=name: seen.update({name: output[0].double()}))
        for name, linear in lm.linears(["q_proj", "k_proj"]).items()
    ]
    lm.model(input_ids=tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    count, size = tokens.shape[1], 8
    frequencies = 10000.0 ** (-torch.arange(0, size, 2, dtype=torch.double) / size)
    angles = torch.arange(count, dtype=torch.double)[:, None] * frequencies
    cos, sin = torch.cat([angles.cos()] * 2, -1), torch.cat([angles.sin()] * 2, -1)

    def rotated(projected: Tensor) -> Tensor:
        heads = projected.view(count, -1, size).transpose(0, 1)
        return heads * cos + torch.cat([-heads[..., size // 2 :], heads[..., : size // 2]], -1) * sin

    for layer in range(3):
        queries = rotated(seen[f"model.layers.{layer}.self_attn.q_proj"])
        keys = rotated(seen[f"model.layers.{layer}.self_attn.k_proj"]).repeat_interleave(2, dim=0)
        assert queries.shape == keys.shape == (4, count, size)
        scores = queries @ keys.transpose(1, 2) / math.sqrt(size)
        future = torch.ones(count, count).triu(1).bool()
        shares = scores.masked_fill(future, -math.inf).softmax(-1)[:, len(PROMPT) + first :]
        on_prefix = shares[..., : len(PROMPT)].sum(-1).mean(-1)
        on_first = shares[..., len(PROMPT) : len(PROMPT) + first].sum(-1).mean(-1)
        assert found.prefix[layer] == pytest.approx(on_prefix.tolist(), abs=1e-5)
        assert found.first[layer] == pytest.approx(on_first.tolist(), abs=1e-5)


def test_a_key_that_outshines_all_others_takes_the_attention(tiny: Tiny) -> None:
    """A planted sink: a prefix whose keys no query can resist has all of the attention, and its reverse none."""
    lm, texts = tiny(), random_texts(2, 20)
    found = Prefix.from_tokens(lm.model, [65])
    bare = torch.tensor(attention_shares(lm, found, texts, 2).prefix)
    for layer in range(3):
        keys = list(found.keys)
        keys[layer] = torch.zeros_like(keys[layer])
        plain = torch.tensor(attention_shares(lm, Prefix((65,), tuple(keys), found.values, True), texts, 2).prefix)
        assert torch.allclose(plain[:layer], bare[:layer], atol=1e-6), "no layer below sees it"
        assert not torch.allclose(plain[layer], bare[layer], atol=1e-4)


def test_planted_sinks_are_counted_where_they_lie(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention that is given: on the prefix, on the text, or in a layer that no longer holds the prefix."""
    prefix, texts = Prefix.from_tokens(tiny().model, PROMPT), random_texts(2, 9)

    def planted(*favoured: list[int], keys: int = 12) -> AttentionShares:
        maps = iter(favoured)

        def body(self: LanguageModel, ids: Tensor, **_: Any) -> Any:
            weights = torch.ones(keys)
            weights[torch.tensor(next(maps)) - 12 + keys] = 50.0
            narrow = torch.full((1, 4, 9, 10), 0.1)
            return SimpleNamespace(attentions=((weights / weights.sum()).expand(1, 4, 9, keys), narrow))

        monkeypatch.setattr(LanguageModel, "body", body)
        return attention_shares(tiny(), prefix, texts, 2)

    assert planted([0, 1, 2, 7, 9], [0, 1, 2, 7, 9]).sinks_in_prefix == 3
    assert planted([0, 4, 5, 6, 7], [0, 1, 5, 6, 7]).sinks_in_prefix == 1.5
    assert planted([3, 4, 5, 6, 7], [5, 6, 7, 8, 9]).sinks_in_prefix == 0
    assert planted([2, 4, 5, 6, 7], [5, 6, 7, 8, 9], keys=10).sinks_in_prefix == 0.5


def test_texts_are_cut_and_averaged(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, texts = tiny(), random_texts(3, 24)
    prefix = Prefix.from_tokens(lm.model, PROMPT)
    single = [attention_shares(lm, prefix, text[None], 4) for text in texts]
    mean = torch.tensor([[one.prefix, one.first] for one in single]).mean(0)
    whole = attention_shares(lm, prefix, texts, 4)
    assert torch.allclose(mean, torch.tensor([whole.prefix, whole.first]), atol=1e-6)
    monkeypatch.setattr(module, "ATTENTION_TOKENS", 10)
    assert attention_shares(lm, prefix, texts, 4) == attention_shares(lm, prefix, texts[:, :10], 4) != whole


def test_a_sliding_window_hides_the_prefix_from_late_queries(tiny: Tiny) -> None:
    """Tiny mistral looks back a few tokens only: to the queries further on, the prefix is out of sight."""
    lm = tiny("mistral")
    window = lm.model.config.sliding_window
    texts, prefix = random_texts(1, window + 70), Prefix.from_tokens(lm.model, PROMPT)
    found = attention_shares(lm, prefix, texts, 4)
    assert_equal(found, from_the_models_maps(tiny("mistral"), PROMPT, texts, 4))
    assert torch.tensor(found.prefix).min() > 0
    late = attention_shares(lm, prefix, texts, window)
    assert torch.tensor(late.prefix).abs().max() == 0


@pytest.mark.parametrize("family", FEW)
def test_the_way_attention_is_computed_is_put_back(tiny: Tiny, family: str) -> None:
    lm, texts = tiny(family), random_texts(2, 20)
    before = lm.model.config._attn_implementation
    with torch.no_grad():
        logits = lm.model(input_ids=texts).logits
    attention_shares(lm, Prefix.from_tokens(lm.model, PROMPT), texts, 3)
    assert lm.model.config._attn_implementation == before
    with torch.no_grad():
        assert torch.equal(lm.model(input_ids=texts).logits, logits)
        assert lm.model(input_ids=texts).attentions is None


def test_attention_that_was_eager_stays_so(tiny: Tiny) -> None:
    lm = tiny()
    lm.model.set_attn_implementation("eager")
    attention_shares(lm, Prefix.empty(), random_texts(2, 20), 3)
    assert lm.model.config._attn_implementation == "eager"


def test_the_way_attention_is_computed_is_put_back_after_an_error(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny()
    seen = []

    def fail(*_: Any, **__: Any) -> Any:
        seen.append(lm.model.config._attn_implementation)
        raise KeyboardInterrupt

    before = lm.model.config._attn_implementation
    assert before == "sdpa"
    monkeypatch.setattr(LanguageModel, "body", fail)
    with pytest.raises(KeyboardInterrupt):
        attention_shares(lm, Prefix.empty(), random_texts(2, 20), 3)
    assert seen == ["eager"]
    assert lm.model.config._attn_implementation == before


# ---- in a run -------------------------------------------------------------------------------------------------------


def test_a_run_keeps_the_shares_of_every_stage(text_file: Path, tmp_path: Path, tiny: Tiny) -> None:
    config = small_config(text_file, tmp_path)
    config.eval.attention_texts, config.eval.attention_first = 5, 3  # no more than there are texts
    config.search = SearchConfig(name="tokens", method="tokens", token_ids=PROMPT)
    result = pipeline.run(config)
    assert result.attention is not None
    assert json.loads((pipeline.run_folder(config) / "result.json").read_text())["attention"] == result.attention
    assert {key: result.attention[key] for key in ("texts", "text_length", "first")} == {
        "texts": 2, "text_length": 32, "first": 3,
    }  # fmt: skip
    lm = tiny()
    texts = lm.encode(text_file.read_text())[:64].reshape(2, 32)
    for stage, prompt in (("none", []), ("found", PROMPT)):
        found = AttentionShares(**result.attention["stages"][stage])
        assert_equal(found, from_the_models_maps(lm, prompt, texts, 3))
    assert list(result.attention["stages"]) == ["none", "found"]
    count = result.attention["stages"]["found"]["sinks_in_prefix"]
    for row in result.rows:
        assert row.values.get("sinks_in_prefix") == (count if row.stage == "found" else None), row.name


def test_a_run_without_attention_has_none(text_file: Path, tmp_path: Path) -> None:
    config = small_config(text_file, tmp_path)
    config.eval.attention_texts = 0
    assert pipeline.run(config).attention is None
    assert not (tmp_path / "cache" / "attention").exists()


def test_first_tokens_that_leave_no_query_are_refused(text_file: Path, tmp_path: Path) -> None:
    config = small_config(text_file, tmp_path)
    config.eval.attention_first = 32
    with pytest.raises(ConfigError, match=r"eval\.attention_first=32 leaves no other token.*eval\.attention_texts=0"):
        pipeline.run(config)
    for key, value in (("attention_first", 0), ("attention_texts", -1)):
        with pytest.raises(ConfigError, match=rf"eval\.{key}={value}"):
            EvalConfig(**{key: value})
    config.eval.attention_texts = 0
    assert asdict(pipeline.run(config))["attention"] is None
