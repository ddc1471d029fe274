"""One BOS policy: every text of a run begins with BOS, or none does, and what is counted stays the same."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from composing import composed
from hydra.errors import HydraException
from tiny_run import small_config, tuning_config, without_seconds
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn

from cushion import pipeline
from cushion.cli import one_line
from cushion.config import EvalConfig, ModelConfig, PathsConfig, RunConfig, SearchConfig
from cushion.errors import ConfigError
from cushion.evaluation.harness import PrefixedModel
from cushion.models import LanguageModel, load_language_model
from cushion.prefix import Prefix
from cushion.preparation import Prepared, begins_with_bos, prepare
from cushion.run_warnings import found_warnings

BOS = 256
BEFORE = {"tokenizer": True, "always": True, "never": False}
"""Whether BOS stands before a text with a tokenizer that puts it there, by policy."""


@pytest.fixture(scope="module")
def with_bos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama whose tokenizer puts BOS before a text and EOS behind it."""
    lm, folder = load_language_model(ModelConfig(path="tiny:llama"), PathsConfig()), tmp_path_factory.mktemp("model")
    around = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", 257)])
    lm.tokenizer.backend_tokenizer.post_processor = around
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return folder


def model(path: str | Path) -> LanguageModel:
    return load_language_model(ModelConfig(path=str(path)), PathsConfig())


def whole_run(text: Path, output: Path, path: str | Path, bos: str) -> RunConfig:
    """Every step that has text of its own, and no token that is BOS among the candidates."""
    config = replace(tuning_config(text, output), bos=bos, model=ModelConfig(path=str(path)))
    config.search = replace(config.search, proposal="user", user_tokens=list(range(40, 64)), verify_texts=2)
    return config


def all_texts(prepared: Prepared) -> dict[str, Tensor]:
    texts = prepared.texts
    found = {"blocks": next(iter(prepared.blocks.values())), "activations": texts.activations}
    for name in ("calibration", "search", "tuning", "held_out"):
        own = getattr(texts, name)
        assert own is not None
        found[name] = own
    return found


def test_the_policy_is_what_the_tokenizer_does_unless_it_is_named(with_bos: Path) -> None:
    for path, adds in (("tiny:llama", False), (with_bos, True)):
        lm = model(path)
        assert lm.adds_bos == adds
        assert {policy: begins_with_bos(lm, policy) for policy in BEFORE} == {**BEFORE, "tokenizer": adds}
    lm.tokenizer.bos_token = lm.tokenizer.eos_token = None
    with pytest.raises(ConfigError, match=r"bos=always, but .* has no BOS token: use bos=tokenizer or bos=never"):
        begins_with_bos(lm, "always")
    assert not begins_with_bos(lm, "never")


@pytest.mark.parametrize("policy", BEFORE)
def test_every_text_has_bos_once_or_not_at_all(text_file: Path, tmp_path: Path, with_bos: Path, policy: str) -> None:
    """The texts are those of a run without BOS, one token longer."""
    plain = all_texts(prepare(whole_run(text_file, tmp_path, "tiny:llama", "tokenizer"), "cpu"))
    led = prepare(whole_run(text_file, tmp_path, with_bos, policy), "cpu")
    assert led.bos == BEFORE[policy]
    for name, texts in all_texts(led).items():
        assert not (plain[name] == BOS).any()
        assert torch.equal(texts[:, int(led.bos) :], plain[name]), name
        assert ((texts == BOS).sum(1) == int(led.bos)).all(), name
    (shorter,) = led.blocks_behind(EvalConfig(block_length=32, blocks=3, prefix_in_block=True), 2).values()
    assert shorter.shape == (3, 30 + led.bos)
    assert ((shorter == BOS).sum(1) == int(led.bos)).all()


def test_a_chat_whose_template_writes_bos_has_it_once(text_file: Path, tmp_path: Path) -> None:
    lm, folder = model("tiny:llama"), tmp_path / "model"
    lm.tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    long = text_file.read_text(encoding="utf-8").split("\n\n")
    parts = [part for one in long for part in ("A short one.", one)]
    chats = [json.dumps({"messages": [{"role": "user", "content": part}]}) for part in parts]
    (tmp_path / "chats.jsonl").write_text("\n".join(chats), encoding="utf-8")
    prepared = prepare(whole_run(tmp_path / "chats.jsonl", tmp_path, folder, "always"), "cpu")
    assert prepared.bos
    for name, texts in all_texts(prepared).items():
        assert (texts[:, 0] == BOS).all() and (texts[:, 1] != BOS).all(), name
    blocks = all_texts(prepared)["blocks"]
    assert (blocks == BOS).sum() > len(blocks), "the mark of a chat that begins inside of a block stays"


def test_every_pass_of_a_run_sees_bos_once(
    text_file: Path, tmp_path: Path, with_bos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    embed = nn.Embedding.forward

    def watch(self: nn.Embedding, ids: Tensor) -> Tensor:
        seen.append(ids.reshape(-1, ids.shape[-1]).clone())
        return embed(self, ids)

    monkeypatch.setattr(nn.Embedding, "forward", watch)
    result = pipeline.run(whole_run(text_file, tmp_path / "out", with_bos, "tokenizer"))
    assert result.search is not None
    prompts = [result.search["token_ids"][:length] for length in (1, 2)]
    passes = [ids for ids in seen if ids.tolist() not in [[prompt] for prompt in prompts]]
    assert len(seen) - len(passes) >= 2, "the prefix's own passes are without"
    assert all((ids == BOS).sum(1).eq(1).all() for ids in passes)
    at = {int(place) for ids in passes for place in (ids == BOS).nonzero()[:, 1]}
    assert at == {0, 1}, "in front of the text, behind a candidate"
    first = result.search["steps"][0]
    text, rows, further = 16 + 1, 24, 2  # every text with BOS; a candidate before it
    expected = text + rows * (text + 1) + further * (text + 12 * (text + 1))
    assert first["token_forwards"] == expected
    assert result.evaluation["bos"] is True
    assert result.config["bos"] == "tokenizer"
    assert {tokens for row in result.rows for tokens in row.tokens.values()} == {4 * 31}, "as many as without BOS"


def test_without_bos_nothing_changes(text_file: Path, tmp_path: Path) -> None:
    """With a tokenizer that adds none, the default and `never` are one: all steps are those of the other's cache."""
    found: list[dict[str, Any]] = []
    for policy in ("tokenizer", "never"):
        result = pipeline.run(whole_run(text_file, tmp_path, "tiny:llama", policy))
        found.append(without_seconds({"rows": [row.values for row in result.rows], "search": result.search}))
        made = sorted(path.parent for path in (tmp_path / "cache").glob("*/*/made.json"))
        assert made
        found[-1]["made"] = made
    assert found[0] == found[1]


def test_a_bos_that_stands_twice_is_told_by_a_run(text_file: Path, tmp_path: Path, with_bos: Path) -> None:
    told = "the prefix holds BOS and every text begins with BOS, so it stands twice: with bos=never it stands once"
    config = small_config(text_file, tmp_path)
    config = replace(config, model=ModelConfig(path=str(with_bos)), search=SearchConfig(name="bos", method="bos"))
    config.eval = replace(config.eval, controls=False)
    for policy, bos in BEFORE.items():
        assert (told in pipeline.run(replace(config, bos=policy)).warnings) == bos
    lm = model(with_bos)
    always, never = replace(config, bos="always"), replace(config, bos="never")
    assert found_warnings(always, lm, Prefix((BOS, 5), (), ())) == [told], "wherever it stands, as in QFeP's"
    assert found_warnings(always, lm, Prefix((5,), (), ())) == found_warnings(always, lm, None) == []
    prefix, chats = Prefix((5, BOS), (), ()), EvalConfig(tasks=["copa"], chat_template=True)
    for template, twice in (("{{ bos_token }}{{ messages[0].content }}", True), ("{{ messages[0].content }}", False)):
        lm.tokenizer.chat_template = template
        assert bool(found_warnings(replace(never, eval=chats), lm, prefix)) == twice


def test_qfep_puts_its_own_bos_before_its_texts(text_file: Path, tmp_path: Path, with_bos: Path) -> None:
    texts = {}
    for method in ("qfep", "prefixquant"):
        config = replace(small_config(text_file, tmp_path), model=ModelConfig(path=str(with_bos)))
        config.search = SearchConfig(name=method, method=method, texts=2, text_length=20)
        texts[method] = prepare(config, "cpu").texts.search
    assert texts["qfep"] is not None and texts["prefixquant"] is not None
    assert not (texts["qfep"] == BOS).any()
    assert torch.equal(texts["prefixquant"][:, 1:], texts["qfep"])
    assert (texts["prefixquant"][:, 0] == BOS).all()


class WrittenInPython:
    """A tokenizer whose special tokens are not those of the library `tokenizers`."""

    def __init__(self, own: Any) -> None:
        self.own, self.bos_token_id = own, own.bos_token_id

    def __call__(self, text: str, **options: Any) -> Any:
        return self.own(text, **options)


def test_tasks_have_bos_alone_also_of_a_tokenizer_that_puts_eos_behind(with_bos: Path) -> None:
    """EOS behind a text would be scored as its answer, and the answer's first token taken for its context."""
    lm = model(with_bos)
    assert lm.tokenizer("ab")["input_ids"][-1] == 257
    python: Any = WrittenInPython(lm.tokenizer)
    with pytest.raises(ConfigError, match=r"eval\.tasks cannot have BOS alone: .* use bos=never"):
        PrefixedModel(replace(lm, tokenizer=python), Prefix.empty(), 2, bos=True)
    asked = PrefixedModel(lm, Prefix.empty(), 2, bos=True)
    whole, answer = lm.encode("ab cd").tolist(), lm.encode(" cd").tolist()
    assert asked._encode_pair("ab", " cd") == ([BOS, *whole[: -len(answer)]], answer)
    assert lm.tokenizer("ab")["input_ids"][-1] == 257, "the model's own tokenizer stays as it is"


def test_a_search_text_that_fits_only_without_bos_is_refused(text_file: Path, tmp_path: Path, with_bos: Path) -> None:
    config = whole_run(text_file, tmp_path, with_bos, "never")
    config.search = replace(config.search, text_length=254, verify_texts=0, max_length=2)
    prepare(config, "cpu")
    with pytest.raises(ConfigError, match=r"search\.text_length=254 behind BOS and a prefix of up to 2 tokens"):
        prepare(replace(config, bos="tokenizer"), "cpu")


def test_a_text_that_is_run_alone_needs_no_room_for_a_prefix(text_file: Path, tmp_path: Path, with_bos: Path) -> None:
    """PrefixQuant's rule reads its texts in front of no prefix; all 256 positions are theirs and BOS's."""
    config = replace(small_config(text_file, tmp_path), model=ModelConfig(path=str(with_bos)))
    config.search = SearchConfig(name="prefixquant", method="prefixquant", texts=1, text_length=255, max_length=8)
    texts = prepare(config, "cpu").texts.search
    assert texts is not None and texts.shape == (1, 256)
    config.search.text_length = 256
    with pytest.raises(ConfigError, match=r"search\.text_length=256 behind BOS does not fit the 256 positions .*text$"):
        prepare(config, "cpu")


def test_blocks_that_fit_only_without_bos_are_refused_with_it_named(tmp_path: Path, text_file: Path) -> None:
    config = replace(small_config(text_file, tmp_path), bos="always")
    config.eval.block_length, config.eval.blocks, config.eval.activation_blocks = 256, 1, 1
    with pytest.raises(ConfigError, match=r"eval\.block_length=256 behind BOS needs 257 positions"):
        prepare(config, "cpu")
    config.search = SearchConfig(name="t", method="tokens", token_ids=[5, 6])
    with pytest.raises(
        ConfigError, match=r"=256 behind BOS and a prefix of up to 2 tokens needs 259 positions.*prefix"
    ):
        prepare(config, "cpu")
    config.bos = "never"
    with pytest.raises(ConfigError, match=r"eval\.block_length=256 behind a prefix of up to 2 tokens needs 258 pos"):
        prepare(config, "cpu")


@pytest.mark.parametrize(
    ("old", "new"),
    [("eval.bos=block", r"bos=always for eval\.bos=block"), ("eval.add_bos=true", r"bos=always for eval\.add_bos")],
)
def test_the_keys_of_former_versions_are_refused_with_the_new_one(old: str, new: str) -> None:
    with pytest.raises(HydraException) as caught:
        composed(old)
    assert re.search(new, one_line(caught.value))
