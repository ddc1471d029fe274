"""Whole runs with QFeP and with PrefixQuant's rule: what is found, recorded, kept in the cache, and refused."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from pathlib import Path

import pytest
from planted import MODULE, plant_first_spike, plant_spikes
from tiny_run import TUNED_ROWS, saved_model, small_config, tuning_config

from cushion import pipeline
from cushion.config import (
    ActivationConfig,
    CalibrationConfig,
    ModelConfig,
    PathsConfig,
    QuantizerConfig,
    RunConfig,
    SearchConfig,
    TuningConfig,
)
from cushion.errors import ConfigError
from cushion.events import Event, Progress
from cushion.models import load_language_model
from cushion.prefix import Prefix
from cushion.preparation import prepare
from cushion.search.prefixquant import PrefixQuantRecord
from cushion.search.qfep import QfepRecord

SPIKE = ord("z") - ord("!")
"""The token id of a letter that the text has nowhere."""

QFEP = SearchConfig(name="qfep", method="qfep", texts=4, text_length=20, contexts=6)
PREFIXQUANT = SearchConfig(name="prefixquant", method="prefixquant", texts=4, text_length=40)


@pytest.fixture
def spiking_text(text_file: Path) -> Path:
    """The text with a letter of its own, three times in every 20 tokens."""
    text = text_file.read_text(encoding="utf-8")
    spiking = "".join("z" if index % 20 in (4, 9, 15) and char.isalpha() else char for index, char in enumerate(text))
    text_file.write_text(spiking, encoding="utf-8")
    return text_file


def run_config(text: Path, tmp_path: Path, search: SearchConfig) -> RunConfig:
    """A run on a model in which the letter z spikes: behind BOS at its first occurrence (QFeP), or everywhere."""
    config = small_config(text, tmp_path / "out")
    first = search.method == "qfep"
    plant = (lambda m: plant_first_spike(m, SPIKE)) if first else (lambda m: plant_spikes(m, {SPIKE: 5.0}))
    folder = tmp_path / search.method
    config.model = ModelConfig(path=str(folder if folder.is_dir() else saved_model(folder, plant)))
    config.search = search
    return config


def test_the_spiking_letter_is_one_token(tmp_path: Path) -> None:
    lm = load_language_model(ModelConfig(path="tiny:llama"), PathsConfig())
    assert lm.encode("z").tolist() == [SPIKE]


def test_a_run_with_qfep_finds_the_planted_token_and_records_how(spiking_text: Path, tmp_path: Path) -> None:
    config = run_config(spiking_text, tmp_path, QFEP)
    events: list[Event] = []
    result = pipeline.run(config, [events.append])
    assert result.status == "completed" and result.search is not None and result.prefix is not None
    assert list(result.search) == ["method", *(field.name for field in fields(QfepRecord))]
    assert result.search["module"] == MODULE
    bos, context, token = result.search["token_ids"]
    assert (bos, token) == (256, SPIKE)
    best = result.search["tokens"][0]
    assert (best["token"], best["context_id"]) == ("z", context) and best["score"] > 100
    assert result.prefix["token_ids"] == result.search["token_ids"]
    assert result.timings["search"] == result.search["seconds"] > 0
    assert [row.name for row in result.rows] == [
        "full_precision", "full_precision_found", "quantized", "quantized_found",
    ]  # fmt: skip
    assert result.rows[-1].label == "per_tensor_static W8A8 + QFeP prefix"
    assert result.activations["titles"] == {"none": "no prefix", "found": "QFeP prefix"}
    shown = {event.stage for event in events if isinstance(event, Progress)}
    assert {"qfep, texts", "qfep, contexts"} <= shown
    saved = Prefix.load(pipeline.run_folder(config) / "prefix")
    assert saved.metadata["search"] == "qfep"
    lm = load_language_model(config.model, config.paths)
    assert saved.fingerprint == Prefix.from_tokens(lm.model, saved.token_ids).fingerprint


def test_a_run_with_prefixquants_rule_finds_the_planted_token(spiking_text: Path, tmp_path: Path) -> None:
    config = run_config(spiking_text, tmp_path, PREFIXQUANT)
    result = pipeline.run(config)
    assert result.search is not None
    assert list(result.search) == ["method", *(field.name for field in fields(PrefixQuantRecord))]
    assert result.search["module"] == MODULE and result.search["length"] > 2
    assert result.search["token_ids"] == [SPIKE, 256]
    assert [token["token"] for token in result.search["tokens"]] == ["z"]
    asked = f"asks for a prefix of {result.search['length']} tokens, and this one has 2"
    assert [asked in warning for warning in result.warnings] == [True]
    assert result.rows[-1].label.endswith("+ PrefixQuant prefix")


def test_without_an_outlier_the_run_goes_on_without_a_prefix_and_says_so(text_file: Path, tmp_path: Path) -> None:
    config = tuning_config(text_file, tmp_path / "out")
    config.search = PREFIXQUANT
    result = pipeline.run(config)
    assert result.prefix is None and result.tuning is None
    assert result.search is not None and result.search["token_ids"] == []
    assert [row.name for row in result.rows] == ["full_precision", "quantized"]
    assert ["no token of the search text is an outlier above search.eta=64" in w for w in result.warnings] == [True]


@pytest.mark.parametrize("search", [QFEP, PREFIXQUANT], ids=lambda search: search.method)
def test_a_prefix_of_a_rule_is_tuned_like_any_other(spiking_text: Path, tmp_path: Path, search: SearchConfig) -> None:
    config = run_config(spiking_text, tmp_path, search)
    config.tuning = tuning_config(spiking_text, tmp_path / "out").tuning
    config.tuning.learning_rate = 1e-3
    result = pipeline.run(config)
    assert [row.name for row in result.rows] == TUNED_ROWS
    assert result.search is not None and result.tuning is not None and result.prefix is not None
    assert result.prefix["token_ids"] == result.search["token_ids"]
    assert len(result.tuning["steps"]) == config.tuning.steps
    assert result.tuning["best_loss"] <= result.tuning["initial_loss"]


@pytest.mark.parametrize("family", ["llama", "opt", "bloom"])
def test_qfep_goes_with_smoothquant(text_file: Path, tmp_path: Path, family: str) -> None:
    config = small_config(text_file, tmp_path / "out")
    config.model = ModelConfig(path=f"tiny:{family}")
    config.quantizer = QuantizerConfig(
        name="smoothquant_o2",
        activations=ActivationConfig(range="dynamic"),
        smoothing_alpha=0.8,
        calibration=CalibrationConfig(samples=2, length=16),
    )
    config.search = QFEP
    result = pipeline.run(config)
    assert result.rows[-1].label == "smoothquant_o2 W8A8 + QFeP prefix"
    assert result.prefix is not None and len(result.prefix["token_ids"]) == 3
    full, quantized = result.rows[1].under("perplexity")["text"], result.rows[-1].under("perplexity")["text"]
    assert full != quantized and math.isclose(full, quantized, rel_tol=0.2)


# ---- the cache ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("search", "same", "other"),
    [
        (QFEP, {"name": "mine", "bits": 4, "eta": 3.0}, {"contexts": 5}),
        (QFEP, {"batch_size": 3}, {"outlier_tokens": 2}),
        (QFEP, {"tau": 0.25}, {"texts": 3}),
        (PREFIXQUANT, {"name": "mine", "contexts": 4}, {"eta": 32.0}),
        (PREFIXQUANT, {"outlier_tokens": 2}, {"text_length": 30}),
    ],
)
def test_a_rules_search_is_done_once_for_what_it_depends_on(
    spiking_text: Path, tmp_path: Path, search: SearchConfig, same: dict[str, object], other: dict[str, object]
) -> None:
    config = run_config(spiking_text, tmp_path, search)
    config.eval.controls = False

    def searched(changes: dict[str, object], seed: int = 0) -> bool:
        events: list[Event] = []
        changed = replace(config, search=replace(search, **changes), seed=seed)  # type: ignore[arg-type]
        results.append(pipeline.run(changed, [events.append]).search)
        return any(isinstance(event, Progress) and event.stage.startswith(search.method) for event in events)

    results: list[dict[str, object] | None] = []
    assert searched({})
    assert not searched(same)
    assert results[0] == results[1], "seconds included: they are those of the first computation"
    assert searched(other)


@pytest.mark.parametrize("search", [QFEP, PREFIXQUANT], ids=lambda search: search.method)
def test_a_changed_token_in_a_record_is_not_believed(spiking_text: Path, tmp_path: Path, search: SearchConfig) -> None:
    config = run_config(spiking_text, tmp_path, search)
    sound = pipeline.run(config)
    [folder] = [path for path in (config.paths.cache / search.method).iterdir() if path.is_dir()]
    record = json.loads((folder / "search.json").read_text(encoding="utf-8"))
    (folder / "search.json").write_text(json.dumps({**record, "token_ids": [1]}), encoding="utf-8")
    (pipeline.run_folder(config) / "result.json").unlink()
    again = pipeline.run(config)
    assert again.search is not None and sound.search is not None
    assert again.search["token_ids"] == sound.search["token_ids"]


# ---- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("search", [QFEP, PREFIXQUANT], ids=lambda search: search.method)
def test_a_model_without_bos_takes_eos_and_one_with_neither_is_refused(
    spiking_text: Path, tmp_path: Path, search: SearchConfig
) -> None:
    config = run_config(spiking_text, tmp_path, search)
    lm = load_language_model(config.model, config.paths)
    lm.tokenizer.bos_token = None
    lm.tokenizer.save_pretrained(config.model.path)
    result = pipeline.run(config)
    assert result.search is not None and 257 in result.search["token_ids"]
    lm.tokenizer.eos_token = None
    lm.tokenizer.save_pretrained(config.model.path)
    with pytest.raises(ConfigError, match=rf"search\.method={search.method} .*neither BOS nor EOS: use search=greedy"):
        pipeline.run(config)


@pytest.mark.parametrize(("search", "longest"), [(QFEP, 255), (PREFIXQUANT, 256)], ids=["qfep", "prefixquant"])
def test_texts_longer_than_the_context_are_refused(
    text_file: Path, tmp_path: Path, search: SearchConfig, longest: int
) -> None:
    config = small_config(text_file, tmp_path / "out")
    config.model = ModelConfig(path="tiny:opt")
    config.eval.controls = False
    config.search = replace(search, text_length=longest, texts=2)
    assert pipeline.run(config).status == "completed"
    config.search = replace(search, text_length=longest + 1, texts=2)
    with pytest.raises(ConfigError, match=rf"search\.text_length={longest + 1} needs 257 positions"):
        pipeline.run(config)


def test_room_is_kept_for_the_longest_prefix_that_a_rule_may_find(text_file: Path, tmp_path: Path) -> None:
    config = small_config(text_file, tmp_path / "out")
    config.tuning = TuningConfig("short", "prefix", steps=1, sequences=2, held_out_sequences=1, sequence_length=253)
    config.search = QFEP
    assert prepare(config, "cpu").texts.search is not None
    config.tuning.sequence_length = 254
    with pytest.raises(ConfigError, match=r"tuning\.sequence_length=254 behind a prefix of up to 3 tokens"):
        prepare(config, "cpu")
    config.search = PREFIXQUANT
    with pytest.raises(ConfigError, match="a prefix of up to 8 tokens"):
        prepare(config, "cpu")
