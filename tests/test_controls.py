"""Controls: the prefixes that nothing searched for, alone, tuned, and under every quantizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_documents
from omegaconf import OmegaConf
from tiny_run import TUNED_ROWS, saved_model, searching_config, small_config, tuning_config
from tokenizers import Tokenizer, normalizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from cushion import pipeline
from cushion.checks import from_plain
from cushion.cli import config_folder
from cushion.config import ModelConfig, PathsConfig, QuantizerConfig, RunConfig, SearchConfig
from cushion.errors import ConfigError
from cushion.models import LanguageModel, load_language_model
from cushion.prefix import Prefix
from cushion.preparation import prepare
from cushion.search.given import line_break, newline_tokens, random_tokens
from cushion.search.greedy_prefix import start_tokens

Tiny = Callable[..., LanguageModel]
CONF = config_folder()
CONTROLS = ("bos", "newline", "random")
QUANTIZERS = sorted(path.stem for path in (CONF / "quantizer").glob("*.yaml"))


def option(cls: type[Any], place: str) -> Any:
    """What an option's file says, such as `search/bos`.

    Composing gives the same, which `test_every_option_composes_and_brings_its_values` has of searches and quantizers.
    """
    values = OmegaConf.to_container(OmegaConf.load(CONF / f"{place}.yaml"))
    assert isinstance(values, dict)
    return from_plain(cls, values)


def quick(quantizer: QuantizerConfig) -> QuantizerConfig:
    quantizer.calibration.samples, quantizer.calibration.length = 2, 16
    quantizer.qfem.texts = quantizer.qfem.texts and 2
    quantizer.weights.group_size = 16  # of the 32 features of a tiny model
    return quantizer


def prefix_tokens(config: RunConfig) -> list[int]:
    result = pipeline.run(config)
    assert result.prefix is not None
    saved = Prefix.load(pipeline.run_folder(config) / "prefix")
    assert list(saved.token_ids) == result.prefix["token_ids"]
    return list(saved.token_ids)


def test_a_line_break_is_one_token_where_a_tokenizer_puts_a_blank_before_a_text(tiny: Tiny) -> None:
    """As those of LLaMA 2 and Mistral do."""
    vocabulary = {"▁": 0, "a": 1, "<0x0A>": 2, "▁a": 3}
    pieces = Tokenizer(BPE(vocabulary, [("▁", "a")], byte_fallback=True))
    pieces.normalizer = normalizers.Prepend("▁")
    lm = replace(tiny(), tokenizer=PreTrainedTokenizerFast(tokenizer_object=pieces))
    assert lm.encode("\n").tolist() == [0, 2]
    assert newline_tokens(lm, RunConfig()) == [2]
    assert start_tokens(lm, replace(RunConfig(), search=SearchConfig(method="greedy", start="newline"))) == [2]
    assert line_break(tiny()) == tiny().encode("\n").tolist()


@pytest.mark.parametrize("control", CONTROLS)
def test_a_control_is_the_prefix_of_its_tokens(tiny: Tiny, text_file: Path, tmp_path: Path, control: str) -> None:
    config = small_config(text_file, tmp_path)
    config.search = option(SearchConfig, f"search/{control}")
    assert config.search.name == config.search.method == control
    lm = tiny()
    wanted = {"bos": [256], "newline": lm.encode("\n").tolist(), "random": random_tokens(lm, 1, 0)}[control]
    assert len(wanted) == 1
    result = pipeline.run(config)
    assert result.search is not None
    assert (result.search["method"], result.search["token_ids"]) == (control, wanted)
    assert result.prefix is not None
    assert (result.prefix["token_ids"], result.prefix["tuned"]) == (wanted, False)
    assert result.prefix["text"] == lm.decode(wanted)
    names = ["full_precision", "full_precision_found", "quantized", "quantized_found"]
    assert [row.name for row in result.rows] == names
    assert [row.label.endswith(f" + {control} prefix") for row in result.rows] == [False, True, False, True]

    saved, made = Prefix.load(pipeline.run_folder(config) / "prefix"), Prefix.from_tokens(lm.model, wanted)
    for ours, theirs in zip((*saved.keys, *saved.values), (*made.keys, *made.values), strict=True):
        assert torch.equal(ours, theirs)

    given = small_config(text_file, tmp_path)
    given.search = SearchConfig(name="tokens", method="tokens", token_ids=wanted)
    assert [row.under("perplexity") for row in pipeline.run(given).rows] == [
        row.under("perplexity") for row in result.rows
    ]


def test_a_control_needs_no_text_to_search(text_file: Path, tmp_path: Path) -> None:
    config = small_config(text_file, tmp_path)
    config.search = SearchConfig(name="bos", method="bos")
    assert set(pipeline.run(config).data) == {"evaluation", "calibration"}
    assert not (tmp_path / "cache" / "search").exists()


# ---- random tokens --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 5, 256])
def test_random_tokens_are_distinct_and_none_is_special(tiny: Tiny, length: int) -> None:
    lm = tiny()
    for seed in range(20):
        tokens = random_tokens(lm, length, seed)
        assert len(tokens) == len(set(tokens)) == length
        assert all(0 <= token < 256 for token in tokens)  # 256 to 259 are the special ones


def test_random_tokens_are_the_seeds(tiny: Tiny) -> None:
    lm = tiny()
    drawn = [random_tokens(lm, 6, seed) for seed in range(12)]
    assert [random_tokens(lm, 6, seed) for seed in range(12)] == drawn
    assert len({tuple(tokens) for tokens in drawn}) == 12
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert random_tokens(lm, 6, 3) == drawn[3]
    assert torch.equal(torch.get_rng_state(), state), "the global generator is not touched"
    assert random_tokens(lm, 2, 3) == drawn[3][:2]


def test_random_tokens_are_drawn_from_the_whole_vocabulary(tiny: Tiny) -> None:
    lm = tiny()
    seen = {token for seed in range(400) for token in random_tokens(lm, 8, seed)}
    assert seen == set(range(256))


def test_more_random_tokens_than_there_are_is_refused(tiny: Tiny, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"search\.length=257 is more than the 256 tokens of tiny_llama.*lower it"):
        random_tokens(tiny(), 257, 0)
    config = small_config(text_file, tmp_path)
    config.search = SearchConfig(name="random", method="random", length=257)
    with pytest.raises(ConfigError, match=r"search\.length=257"):
        pipeline.run(config)
    with pytest.raises(ConfigError, match=r"search\.length=0"):
        SearchConfig(method="random", length=0)


def test_a_random_prefix_longer_than_the_context_is_refused(text_file: Path, tmp_path: Path) -> None:
    config = small_config(text_file, tmp_path)
    config.search = SearchConfig(name="random", method="random", length=250)
    with pytest.raises(ConfigError, match=r"a prefix of up to 250 tokens.*256"):
        pipeline.run(config)


def test_a_run_repeats_over_seeds(text_file: Path, tmp_path: Path, tiny: Tiny) -> None:
    found = {}
    for seed in (0, 1, 2):
        config = small_config(text_file, tmp_path)
        config.seed, config.search = seed, SearchConfig(name="random", method="random", length=4)
        found[seed] = prefix_tokens(config)
        assert found[seed] == random_tokens(tiny(), 4, seed)
    assert len({tuple(tokens) for tokens in found.values()}) == 3
    again = small_config(text_file, tmp_path / "elsewhere")
    again.search = SearchConfig(name="random", method="random", length=4)
    assert prefix_tokens(again) == found[0]


def test_the_draw_of_tokens_has_a_seed_of_its_own(text_file: Path, tmp_path: Path, tiny: Tiny) -> None:
    """`search.seed` changes the tokens and no text; the run's seed then changes the texts and no token."""
    found = {}
    for seed, own in ((0, 5), (0, 6), (1, 5)):
        config = small_config(text_file, tmp_path)
        config.seed, config.search = seed, SearchConfig(name="random", method="random", length=4, seed=own)
        prepared = prepare(config, "cpu")
        assert prepared.start_tokens == random_tokens(tiny(), 4, own)
        assert prepared.texts.calibration is not None
        found[seed, own] = prepared.texts.calibration.tolist()
    assert found[0, 5] == found[0, 6] != found[1, 5]


def test_the_draw_of_candidates_has_a_seed_of_its_own(text_file: Path, tmp_path: Path) -> None:
    """The artifact of a search is that of its candidates, whichever key their seed came from."""
    config = searching_config(text_file, tmp_path)
    searched = tmp_path / "cache" / "search"
    for seed, count in ((None, 1), (0, 1), (1, 2)):
        config.search.seed = seed
        pipeline.run(config)
        assert len([path for path in searched.iterdir() if path.is_dir()]) == count


# ---- models without BOS ---------------------------------------------------------------------------------------------


def without_bos(folder: Path) -> ModelConfig:
    saved_model(folder)
    lm = load_language_model(ModelConfig(path=str(folder)), PathsConfig())
    lm.tokenizer.bos_token = lm.tokenizer.eos_token = None
    lm.tokenizer.save_pretrained(folder)
    return ModelConfig(path=str(folder))


def test_bos_of_a_model_without_one_is_refused_and_the_other_controls_are_not(text_file: Path, tmp_path: Path) -> None:
    model = without_bos(tmp_path / "model")
    for search in (SearchConfig(name="bos", method="bos"), SearchConfig(name="g", method="greedy", start="bos")):
        config = small_config(text_file, tmp_path / "out")
        config.model, config.search = model, search
        way_out = r"search\.method=bos.*no BOS token: use search=newline"
        if search.method == "greedy":
            way_out = r"search\.start=bos.*no BOS token: use search\.start=empty"
        with pytest.raises(ConfigError, match=way_out):
            pipeline.run(config)
    for method in ("newline", "random"):
        config = small_config(text_file, tmp_path / "out")
        config.model, config.search = model, SearchConfig(name=method, method=method)
        assert len(prefix_tokens(config)) == 1


def test_bos_is_the_end_of_text_where_there_is_no_other(text_file: Path, tmp_path: Path) -> None:
    folder = saved_model(tmp_path / "model")
    config = small_config(text_file, tmp_path / "out")
    lm = load_language_model(ModelConfig(path=str(folder)), config.paths)
    lm.tokenizer.bos_token = None
    lm.tokenizer.save_pretrained(folder)
    config.model, config.search = ModelConfig(path=str(folder)), SearchConfig(name="bos", method="bos")
    assert prefix_tokens(config) == [257]


# ---- composed with everything else ----------------------------------------------------------------------------------


@pytest.mark.parametrize("control", CONTROLS)
def test_a_control_can_be_tuned(text_file: Path, tmp_path: Path, control: str) -> None:
    config = tuning_config(text_file, tmp_path)
    config.search = SearchConfig(name=control, method=control, length=2 if control == "random" else 1)
    result = pipeline.run(config)
    assert [row.name for row in result.rows] == TUNED_ROWS
    assert result.prefix is not None
    assert result.search is not None
    assert result.prefix["token_ids"] == result.search["token_ids"]
    assert len(result.prefix["token_ids"]) == (2 if control == "random" else 1)
    assert result.tuning is not None
    assert len(result.tuning["steps"]) == 5
    assert result.prefix["tuned"] is (result.tuning["best_step"] > 0)
    assert result.rows[-1].label.endswith("tuned prefix")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for runs that share what no quantizer changes, with a model of one block."""

    def cut(model: Any) -> None:
        model.model.layers, model.config.num_hidden_layers = model.model.layers[:1], 1

    folder = tmp_path_factory.mktemp("controls")
    write_documents(folder / "text.txt")
    saved_model(folder / "model", cut)
    return folder


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_a_control_stands_before_every_quantizer(shared: Path, quantizer: str) -> None:
    control = CONTROLS[QUANTIZERS.index(quantizer) % len(CONTROLS)]  # each of them before several
    config = small_config(shared / "text.txt", shared / "out")
    config.eval.blocks = 2
    config.model = ModelConfig(path=str(shared / "model"))
    config.quantizer = quick(option(QuantizerConfig, f"quantizer/{quantizer}"))
    config.search = option(SearchConfig, f"search/{control}")
    result = pipeline.run(config)
    rows = ["full_precision", "full_precision_found", "quantized", "quantized_found"]
    assert [row.name for row in result.rows] == (rows[:2] if config.quantizer.is_full_precision else rows)
    for without, behind in zip(result.rows[::2], result.rows[1::2], strict=True):
        assert without.under("perplexity") != behind.under("perplexity")
        assert (without.prefix, behind.prefix) == ("", result.prefix and result.prefix["text"])
