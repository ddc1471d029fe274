"""The target `tokens`: the linears at which a prefix goes beyond its ranges, what it gives as tokens, and the files."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from finished_runs import TOKENS, finished_run, tuned_prefix
from helpers import calibrated, random_texts
from planted import MODULE, plant_spikes
from tiny_run import saved_model, small_config
from tokenizers import Tokenizer
from tokenizers.models import BPE
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from cushion import pipeline
from cushion.artifacts import ArtifactStore
from cushion.config import (
    ActivationConfig,
    EvalConfig,
    ModelConfig,
    QuantizerConfig,
    RunConfig,
    SearchConfig,
    TuningConfig,
    WeightConfig,
)
from cushion.config_warnings import options_without_effect
from cushion.errors import ConfigError
from cushion.evaluation import prefix_as_tokens
from cushion.evaluation.perplexity import block_losses, perplexity
from cushion.evaluation.prefix_as_tokens import beyond_range, beyond_ranges, chosen, measure_as_tokens
from cushion.export import prefix_tokens
from cushion.export.finished import FinishedRun
from cushion.export.prefix_tokens import Compared, _stands_as_text, refuse_broken
from cushion.export.targets import export
from cushion.models import LanguageModel
from cushion.prefix import Prefix
from cushion.quantization.calibration import Calibration
from cushion.quantization.lazily import QuantizedLazily
from cushion.quantization.linear import ActivationQuantizer
from cushion.quantization.numerics import Grid
from cushion.quantization.simulate import quantized
from cushion.step import Context

Tiny = Callable[..., LanguageModel]
SPIKE = 91
"""A token that blows up the input of `MODULE`, and is in no text."""
ACTIVATIONS = QuantizerConfig(weights=WeightConfig(bits=None), activations=ActivationConfig(bits=8))
BLOCKS = {"text": random_texts(3, 12, seed=3, below=90)}


def row(lm: LanguageModel, quantizer: QuantizerConfig) -> QuantizedLazily:
    """A row behind the spike, with static ranges that leave it out."""
    prefix = Prefix.from_tokens(lm.model, [SPIKE])
    ranges = calibrated(lm, random_texts(2, 16, below=90), prefix)
    return QuantizedLazily(lm, prefix, quantizer, Calibration(ranges, "key", 0.0))


@pytest.fixture
def spiking(tiny: Tiny) -> LanguageModel:
    lm = tiny("llama")
    plant_spikes(lm.model, {SPIKE: 4.0})
    return lm


def quantizer_of(low: float, high: float, symmetric: bool) -> ActivationQuantizer:
    return ActivationQuantizer(Grid(8, symmetric), "per_tensor", (torch.tensor(low), torch.tensor(high)))


def test_how_far_values_go_beyond_a_range() -> None:
    assert beyond_range(quantizer_of(-2.0, 4.0, True), torch.tensor([[-12.0, 1.0]])) == pytest.approx(3.0)
    assert beyond_range(quantizer_of(-2.0, 4.0, True), torch.tensor([[-4.0, 4.0]])) == pytest.approx(1.0)
    assert beyond_range(quantizer_of(1.0, 3.0, False), torch.tensor([7.0])) == pytest.approx(1 + 4 / 3)
    assert beyond_range(quantizer_of(1.0, 3.0, False), torch.tensor([-2.0])) == pytest.approx(2.0)
    assert beyond_range(ActivationQuantizer(Grid(8, True), "per_token"), torch.tensor([1e9])) == 1.0


def test_the_linear_that_the_prefix_blows_up_is_found_and_measured(spiking: LanguageModel) -> None:
    model, seen = row(spiking, ACTIVATIONS), []
    found = beyond_ranges(model)
    with torch.no_grad():
        hook = spiking.model.get_submodule(MODULE).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        spiking.model(input_ids=torch.tensor([[SPIKE]]))
        hook.remove()
    assert model.calibration is not None and model.calibration.ranges is not None
    ranges = model.calibration.ranges
    largest = torch.maximum(ranges.maximum[MODULE], -ranges.minimum[MODULE]).max()
    assert found[MODULE] == pytest.approx(float(seen[0].abs().max() / largest), rel=1e-5)
    assert found[MODULE] > 100
    assert found.keys() == spiking.linears().keys()
    assert MODULE in chosen(spiking, found)


def test_linears_that_read_one_norm_are_kept_together(tiny: Tiny) -> None:
    lm = tiny("llama")
    beyond = dict.fromkeys(lm.linears(), 1.0) | {"model.layers.0.self_attn.k_proj": 2.5, MODULE: 2.0}
    assert list(chosen(lm, beyond)) == [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]


@pytest.mark.parametrize("bos", [False, True])
def test_as_tokens_it_is_one_pass_over_prefix_and_text_under_the_quantizer(
    bos: bool, spiking: LanguageModel, tmp_path: Path
) -> None:
    quantizer, config = QuantizerConfig(), EvalConfig(batch_size=2, block_length=12)
    model = row(spiking, quantizer)
    blocks = {"text": spiking.with_bos(BLOCKS["text"])} if bos else BLOCKS
    context = Context(spiking, ArtifactStore(tmp_path), lambda _: None)
    found = measure_as_tokens(context, model, config, blocks, bos)
    assert MODULE in found.keep
    assert model.calibration is not None
    whole = torch.cat([torch.tensor([[SPIKE]]).expand(3, 1), blocks["text"]], dim=1)
    with quantized(spiking, quantizer, model.calibration.ranges, keep=found.keep.keys()), torch.no_grad():
        logits = spiking.model(input_ids=whole).logits
    first = 2 + bos  # the token behind the prefix, and behind BOS, is predicted by neither row
    wanted = functional.cross_entropy(logits[:, first - 1 : -1].flatten(0, 1), whole[:, first:].flatten())
    assert math.log(found.perplexity["text"].value) == pytest.approx(float(wanted), rel=1e-5)
    assert found.perplexity["text"].tokens == 3 * 11


def test_with_every_input_kept_it_is_the_row_itself(
    spiking: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefix_as_tokens, "BEYOND", 0.0)
    model, config = row(spiking, ACTIVATIONS), EvalConfig()
    found = measure_as_tokens(Context(spiking, ArtifactStore(tmp_path), lambda _: None), model, config, BLOCKS, False)
    assert found.keep.keys() == spiking.linears().keys()
    own = perplexity(list(block_losses(spiking, model.behind, BLOCKS["text"], config)))
    assert found.perplexity["text"].value == pytest.approx(own, rel=1e-5)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """A finished run on a model that spikes, with the measurement in its table."""
    from conftest import write_documents

    place = tmp_path_factory.mktemp("tokens")
    config = small_config(write_documents(place / "text.txt"), place / "out")
    model = saved_model(place / "model", lambda model: plant_spikes(model, {SPIKE: 4.0}))
    config.model = ModelConfig(path=str(model))
    config.search = SearchConfig(name="tokens", method="tokens", token_ids=[SPIKE])
    config.eval = replace(config.eval, controls=False, prefix_as_tokens=True)
    pipeline.run(config)
    return FinishedRun.read(pipeline.run_folder(config), "owner/base")


def test_the_files_say_what_a_server_needs_and_the_run_has_the_same_figure(run: FinishedRun, tmp_path: Path) -> None:
    paths = export(run, "tokens", tmp_path / "made")
    assert [path.name for path in paths] == ["README.md", "prefix_tokens.json"]
    record, values = json.loads(paths[1].read_text()), run.record["rows"][-1]["values"]
    assert (record["base_model"], record["token_ids"], record["text"]) == ("owner/base", [SPIKE], "|")
    assert record["text_gives_token_ids"] is True and record["bos_behind"] is False
    assert record["full_precision_inputs"] == sorted(record["beyond_range"]) and MODULE in record["beyond_range"]
    (corpus,) = record["measured"]
    assert record["measured"][corpus] == {
        "run": values[f"perplexity/{corpus}"],
        "as_tokens": values[f"prefix_as_tokens/{corpus}"],
    }
    assert values["prefix_as_tokens_kept"] == len(record["beyond_range"])
    card = paths[0].read_text()
    assert f"- `{MODULE}`: {record['beyond_range'][MODULE]:.2f} times" in card
    assert f"TokensPrompt(prompt_token_ids=[{SPIKE}, *text_ids])" in card
    assert re.search(rf"\| {corpus} \| [\d.]+ \| [\d.]+ \|", card)


def test_a_text_that_becomes_one_with_what_is_behind_it_is_no_text_to_send(tiny: Callable[..., LanguageModel]) -> None:
    pieces = Tokenizer(BPE({" ": 0, "a": 1, "b": 2, " a": 3}, [(" ", "a")]))
    lm = replace(tiny(), tokenizer=PreTrainedTokenizerFast(tokenizer_object=pieces))
    assert _stands_as_text(lm, [0], [])
    assert _stands_as_text(lm, [0], [torch.tensor([[2, 1]])])
    assert not _stands_as_text(lm, [0], [torch.tensor([[2, 1], [1, 2]])])


def test_what_is_broken_is_never_written(run: FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_broken({"a": Compared(30.0, 32.9), "b": Compared(30.0, 20.0)}, "int8", 1)
    figures = r"perplexity of 33.10 on b, 10.3% above the run's 30.00, and at most 10% more is allowed"
    with pytest.raises(ConfigError, match=figures):
        refuse_broken({"a": Compared(30.0, 30.0), "b": Compared(30.0, 33.1)}, "int8", 1)
    monkeypatch.setattr(prefix_tokens, "TOLERANCE", -1.0)
    with pytest.raises(ConfigError, match="quantizer=per_tensor_static with the prefix as tokens"):
        export(run, "tokens", tmp_path / "made")
    assert not list(tmp_path.iterdir())


def test_a_run_without_a_row_to_measure_so_is_warned() -> None:
    asked = EvalConfig(prefix_as_tokens=True)
    found, tuned = SearchConfig(name="bos", method="bos"), TuningConfig(name="short", method="prefix", steps=5)
    cases = {
        "": RunConfig(search=found, eval=asked),
        " with search.method=none": RunConfig(eval=asked),
        " with quantizer.weights.bits=null": RunConfig(
            search=found, eval=asked, quantizer=QuantizerConfig("none", WeightConfig(None), ActivationConfig(None))
        ),
        " with eval.controls=false": RunConfig(search=found, eval=replace(asked, controls=False), tuning=tuned),
    }
    for why, config in cases.items():
        expected = [f"eval.prefix_as_tokens=True has no effect{why}"] if why else []
        assert [warning for warning in options_without_effect(config) if "prefix_as_tokens" in warning] == expected


def test_what_tokens_cannot_say_is_refused_before_anything_is_loaded(
    run: FinishedRun, tiny: Tiny, tmp_path: Path
) -> None:
    lm = tiny("llama")
    tuned = FinishedRun.read(finished_run(tmp_path / "tuned", lm, tuned_prefix(lm, TOKENS)))
    with pytest.raises(ConfigError, match="tuning=short changed what the tokens stand for: export with --to=peft"):
        export(tuned, "tokens", tmp_path / "made")
    with pytest.raises(ConfigError, match="is not the id of a model on the hub"):
        export(replace(run, named_base_model=None), "tokens", tmp_path / "made")

    def changed(**config: object) -> FinishedRun:
        return replace(run, record={**run.record, "config": {**run.config, **config}})

    with pytest.raises(ConfigError, match=r"run again with eval\.perplexity=true"):
        export(changed(eval={"perplexity": False}), "tokens", tmp_path / "made")
    rows = [{**run.record["rows"][-1], "quantized": False}]
    with pytest.raises(ConfigError, match="quantizes nothing"):
        export(replace(run, record={**run.record, "rows": rows}), "tokens", tmp_path / "made")
    assert not (tmp_path / "made").exists()
