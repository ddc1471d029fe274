"""The typed configuration: ranges and contradictions are refused by key and value, options without effect are named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from cushion.config import (
    ActivationConfig,
    CalibrationConfig,
    CorpusConfig,
    DataConfig,
    EvalConfig,
    ModelConfig,
    QuantizerConfig,
    RunConfig,
    SearchConfig,
    SearchRound,
    TrackingConfig,
    TuningConfig,
    WeightConfig,
    to_dict,
)
from cushion.config_warnings import options_without_effect
from cushion.errors import ConfigError, CushionError

REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: ModelConfig(path=" "), r"model\.path=' ' is not allowed"),
    (lambda: ModelConfig(dtype="float31"), r"model\.dtype='float31' .*did you mean 'float32'\?"),
    (lambda: DataConfig(search=CorpusConfig("wikitext")), r"data\.search\.source='wikitext' .*mean 'wikitext2'\?"),
    (lambda: DataConfig(tuning=CorpusConfig("c4", "tests")), r"data\.tuning\.split='tests' .*mean 'test'\?"),
    (lambda: DataConfig(tuning=CorpusConfig("file")), r"data\.tuning\.path=None .*needs a file"),
    (lambda: DataConfig(tuning=CorpusConfig("c4", path="x")), r"data\.tuning\.path='x' .*no effect with source=c4"),
    (lambda: QuantizerConfig(weights=WeightConfig(bits=0)), r"quantizer\.weights\.bits=0 is not allowed: 2 to 8"),
    (lambda: QuantizerConfig(weights=WeightConfig(bits=9)), r"quantizer\.weights\.bits=9"),
    (lambda: QuantizerConfig(activations=ActivationConfig(bits=1)), r"quantizer\.activations\.bits=1"),
    (lambda: QuantizerConfig(weights=WeightConfig(group_size=0)), r"quantizer\.weights\.group_size=0 .*at least 1"),
    (lambda: QuantizerConfig(weights=WeightConfig(granularity="per_chanel")), r"granularity=.*mean 'per_channel'\?"),
    (lambda: QuantizerConfig(activations=ActivationConfig(granularity="per_token")), r"activations\.range='static'"),
    (lambda: QuantizerConfig(smoothing_alpha=1.5), r"quantizer\.smoothing_alpha=1\.5"),
    (lambda: QuantizerConfig(smoothing_alpha=float("nan")), r"quantizer\.smoothing_alpha=nan"),
    (lambda: QuantizerConfig(targets=[]), r"quantizer\.targets=\[\]"),
    (lambda: QuantizerConfig(calibration=CalibrationConfig(samples=0)), r"quantizer\.calibration\.samples=0"),
    (lambda: QuantizerConfig(calibration=CalibrationConfig(length=-1)), r"quantizer\.calibration\.length=-1"),
    (lambda: SearchConfig(method="greddy"), r"search\.method='greddy' .*did you mean 'greedy'\?"),
    (lambda: SearchConfig(tau=2), r"search\.tau=2 is not allowed: above 0, at most 1"),
    (lambda: SearchConfig(tau=0), r"search\.tau=0"),
    (lambda: SearchConfig(tau=float("nan")), r"search\.tau=nan"),
    (lambda: SearchConfig(bits=16), r"search\.bits=16"),
    (lambda: SearchConfig(max_length=-3), r"search\.max_length=-3 .*at least 1"),
    (lambda: SearchConfig(text_length=-3), r"search\.text_length=-3 .*at least 2"),
    (lambda: SearchConfig(batch_size=0), r"search\.batch_size=0"),
    (lambda: SearchConfig(method="tokens"), r"needs search\.tokens or search\.token_ids"),
    (lambda: SearchConfig(method="tokens", tokens="a", token_ids=[1]), r"only one of them"),
    (lambda: SearchConfig(method="tokens", token_ids=[]), r"the prefix is empty"),
    (lambda: SearchConfig(method="tokens", token_ids=[4, -1]), r"search\.token_ids=\[4, -1\]"),
    (lambda: TuningConfig(method="prefix"), r"either tuning\.steps or tuning\.epochs"),
    (lambda: TuningConfig(method="prefix", steps=3, epochs=1), r"either tuning\.steps or tuning\.epochs"),
    (lambda: TuningConfig(method="prefix", steps=0), r"tuning\.steps=0"),
    (lambda: TuningConfig(method="prefix", epochs=-1), r"tuning\.epochs=-1"),
    (lambda: TuningConfig(sequence_length=-8), r"tuning\.sequence_length=-8"),
    (lambda: TuningConfig(learning_rate=0), r"tuning\.learning_rate=0"),
    (lambda: TuningConfig(lambda_q=-1), r"tuning\.lambda_q=-1"),
    (lambda: TuningConfig(gradient_clip=0), r"tuning\.gradient_clip=0"),
    (lambda: TuningConfig(gradient="rang"), r"tuning\.gradient='rang' .*mean 'range'\?"),
    (lambda: EvalConfig(block_length=-5), r"eval\.block_length=-5 .*at least 2"),
    (lambda: EvalConfig(blocks=0), r"eval\.blocks=0"),
    (lambda: EvalConfig(predict_first=True), r"eval\.predict_first=True .*eval\.bos=block"),
    (lambda: TrackingConfig(backend="wanbd"), r"tracking\.backend='wanbd' .*mean 'wandb'\?"),
    (lambda: TrackingConfig(mode="of"), r"tracking\.mode='of'"),
    (lambda: RunConfig(seed=-1), r"seed=-1"),
    (lambda: RunConfig(experiment="a/b"), r"experiment='a/b'"),
    (lambda: RunConfig(experiment="../up"), r"experiment='\.\./up'"),
    (lambda: RunConfig(tuning=TuningConfig("short", "prefix", steps=1)), r"tuning=short has no prefix .*search=none"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_a_value_out_of_range_is_refused_with_key_and_value(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, CushionError)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("bits", [None, 2, 3, 4, 5, 6, 7, 8])
def test_every_number_of_bits_from_2_to_8_and_none_is_allowed(bits: int | None) -> None:
    quantizer = QuantizerConfig(weights=WeightConfig(bits=bits), activations=ActivationConfig(bits=bits))
    assert quantizer.is_full_precision == (bits is None)
    assert quantizer.needs_calibration == (bits is not None)


def test_smoothing_alone_is_no_full_precision_and_needs_calibration() -> None:
    quantizer = QuantizerConfig(
        weights=WeightConfig(bits=None), activations=ActivationConfig(bits=None), smoothing_alpha=0.5
    )
    assert not quantizer.is_full_precision
    assert quantizer.needs_calibration


@pytest.mark.parametrize(
    ("path", "label"),
    [
        ("meta-llama/Llama-2-7b-hf", "Llama-2-7b-hf"),
        ("/models/mine/", "mine"),
        ("tiny:llama", "tiny_llama"),
        ("a b$c", "a_b_c"),
    ],
)
def test_a_models_label_is_the_last_part_of_its_path_and_safe_as_a_folder(path: str, label: str) -> None:
    assert ModelConfig(path=path).label == label


def test_epochs_are_passes_over_the_sequences() -> None:
    tuning = TuningConfig(method="prefix", epochs=1.5, sequences=20, batch_size=3)
    assert tuning.total_steps == 10
    assert replace(tuning, epochs=0.001).total_steps == 1
    assert replace(tuning, epochs=None, steps=7).total_steps == 7


def test_the_configuration_as_plain_data_builds_the_same_configuration_again() -> None:
    search = SearchConfig(method="tokens", token_ids=[3, 1])
    assert SearchConfig(**to_dict(search)) == search
    assert to_dict(RunConfig(search=search))["search"]["token_ids"] == [3, 1]


GREEDY = SearchConfig(method="greedy")
TUNED = TuningConfig(method="prefix", steps=1)
WITHOUT_EFFECT: list[tuple[RunConfig, str]] = [
    (RunConfig(search=SearchConfig(tau=0.3)), "search.tau=0.3 has no effect with search.method=none"),
    (RunConfig(search=SearchConfig(text_length=64)), "search.text_length=64 has no effect with search.method=none"),
    (RunConfig(search=SearchConfig(tokens="a")), "search.tokens='a' has no effect with search.method=none"),
    (
        RunConfig(search=replace(GREEDY, proposal="vocabulary", candidates=9)),
        "search.candidates=9 has no effect with search.proposal=vocabulary",
    ),
    (
        RunConfig(search=replace(GREEDY, proposal="outlier", frequent=9)),
        "search.frequent=9 has no effect with search.proposal=outlier",
    ),
    (RunConfig(search=replace(GREEDY, user_tokens=[3])), "search.user_tokens=[3] has no effect with search.proposal"),
    (
        RunConfig(search=replace(GREEDY, rounds=[SearchRound(0.5, 4, 9)])),
        "has no effect with search.scoring=full",
    ),
    (RunConfig(search=SearchConfig(scoring="exact")), "search.scoring='exact' has no effect with search.method=none"),
    (RunConfig(search=replace(GREEDY, token_ids=[1])), "search.token_ids=[1] has no effect with search.method=greedy"),
    (RunConfig(tuning=TuningConfig(learning_rate=1.0)), "tuning.learning_rate=1.0 has no effect with"),
    (
        RunConfig(search=GREEDY, tuning=replace(TUNED, lambda_q=0, reduction="sum")),
        "tuning.reduction='sum' has no effect with tuning.lambda_q=0",
    ),
    (RunConfig(search=GREEDY, tuning=replace(TUNED, gradient="straight_through")), "tuning.lambda_q has no effect"),
    (
        RunConfig(quantizer=QuantizerConfig(weights=WeightConfig(group_size=4))),
        "quantizer.weights.group_size=4 has no effect with quantizer.weights.granularity=per_tensor",
    ),
    (
        RunConfig(
            quantizer=QuantizerConfig(
                activations=ActivationConfig(range="dynamic"), calibration=CalibrationConfig(samples=3)
            )
        ),
        "quantizer.calibration.samples=3 has no effect without static ranges or smoothing",
    ),
]


@pytest.mark.parametrize(("config", "warning"), WITHOUT_EFFECT, ids=[warning for _, warning in WITHOUT_EFFECT])
def test_an_option_without_effect_is_named(config: RunConfig, warning: str) -> None:
    found = options_without_effect(config)
    assert len(found) == 1
    assert warning in found[0]


def test_options_that_have_an_effect_are_not_named() -> None:
    search = replace(GREEDY, tau=0.3, candidates=9, frequent=8, text_length=64)
    quantizer = QuantizerConfig(weights=WeightConfig(granularity="per_group", group_size=4))
    assert options_without_effect(RunConfig(search=search, quantizer=quantizer, tuning=TUNED)) == []
    assert options_without_effect(RunConfig()) == []
