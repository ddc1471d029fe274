"""The typed configuration: ranges and contradictions are refused by key and value, options without effect are named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from cushion.config import (
    ActivationConfig,
    AttentionConfig,
    CalibrationConfig,
    CorpusConfig,
    DataConfig,
    EvalConfig,
    KvCacheConfig,
    ModelConfig,
    QFeMConfig,
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

GREEDY = SearchConfig(method="greedy")
TUNED = TuningConfig(method="prefix", steps=1)
DYNAMIC = QuantizerConfig(activations=ActivationConfig(range="dynamic"))
NOTHING = QuantizerConfig(weights=WeightConfig(bits=None), activations=ActivationConfig(bits=None))
REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: ModelConfig(path=" "), r"model\.path=' ' is not allowed"),
    (lambda: ModelConfig(dtype="float31"), r"model\.dtype='float31' .*did you mean 'float32'\?"),
    (lambda: DataConfig(search=CorpusConfig("wikitext")), r"data\.search\.source='wikitext' .*mean 'wikitext2'\?"),
    (lambda: DataConfig(tuning=CorpusConfig("c4", "tests")), r"data\.tuning\.split='tests' .*mean 'test'\?"),
    (lambda: DataConfig(tuning=CorpusConfig("file")), r"data\.tuning\.path=null .*needs a file"),
    (lambda: DataConfig(tuning=CorpusConfig("c4", path="x")), r"data\.tuning\.path='x' .*no effect with source=c4"),
    (lambda: QuantizerConfig(weights=WeightConfig(bits=0)), r"quantizer\.weights\.bits=0 is not allowed: 2 to 8"),
    (lambda: QuantizerConfig(weights=WeightConfig(bits=9)), r"quantizer\.weights\.bits=9"),
    (lambda: QuantizerConfig(activations=ActivationConfig(bits=1)), r"quantizer\.activations\.bits=1"),
    (lambda: QuantizerConfig(weights=WeightConfig(group_size=0)), r"quantizer\.weights\.group_size=0 .*at least 1"),
    (lambda: QuantizerConfig(weights=WeightConfig(granularity="per_chanel")), r"granularity=.*mean 'per_channel'\?"),
    (lambda: QuantizerConfig(activations=ActivationConfig(granularity="per_token")), r"activations\.range='static'"),
    (lambda: ActivationConfig(clip_ratio=0.9), r"quantizer\.activations\.clip_ratio=0\.9 .*range=static .*set dynamic"),
    (lambda: ActivationConfig(None, clip_ratio=1.1), r"quantizer\.activations\.clip_ratio=1\.1 .*at most 1"),
    (lambda: QuantizerConfig(smoothing_alpha=1.5), r"quantizer\.smoothing_alpha=1\.5"),
    (lambda: QuantizerConfig(smoothing_alpha=float("nan")), r"quantizer\.smoothing_alpha=nan"),
    (lambda: QuantizerConfig(rotation="hadamar"), r"quantizer\.rotation='hadamar' .*did you mean 'hadamard'\?"),
    (lambda: QuantizerConfig(rotation_seed=-1), r"quantizer\.rotation_seed=-1 .*at least 0"),
    (lambda: QuantizerConfig(zero_point="int"), r"quantizer\.zero_point='int' .*real, integer"),
    (lambda: QuantizerConfig(kv_cache=KvCacheConfig(bits=1)), r"quantizer\.kv_cache\.bits=1 is not allowed: 2 to 8"),
    (lambda: QuantizerConfig(attention=AttentionConfig(bits=9)), r"quantizer\.attention\.bits=9"),
    (lambda: QuantizerConfig(kv_cache=KvCacheConfig(granularity="per_tok")), r"kv_cache\.granularity.*'per_token'\?"),
    (lambda: QuantizerConfig(attention=AttentionConfig(granularity="x")), r"quantizer\.attention\.granularity='x'"),
    (lambda: QuantizerConfig(targets=[]), r"quantizer\.targets=\[\]"),
    (lambda: QuantizerConfig(calibration=CalibrationConfig(samples=0)), r"quantizer\.calibration\.samples=0"),
    (lambda: QuantizerConfig(calibration=CalibrationConfig(length=-1)), r"quantizer\.calibration\.length=-1"),
    (lambda: SearchConfig(method="greddy"), r"search\.method='greddy' .*did you mean 'greedy'\?"),
    (lambda: SearchConfig(tau=2), r"search\.tau=2 is not allowed: above 0, at most 1"),
    (lambda: SearchConfig(tau=0), r"search\.tau=0"),
    (lambda: SearchConfig(seed=-1), r"search\.seed=-1 .*at least 0"),
    (lambda: SearchConfig(tau=float("nan")), r"search\.tau=nan"),
    (lambda: SearchConfig(bits=16), r"search\.bits=16"),
    (lambda: SearchConfig(max_length=-3), r"search\.max_length=-3 .*at least 1"),
    (lambda: SearchConfig(text_length=-3), r"search\.text_length=-3 .*at least 2"),
    (lambda: SearchConfig(batch_size=0), r"search\.batch_size=0"),
    (lambda: SearchConfig(method="qefp"), r"search\.method='qefp' .*did you mean 'qfep'\?"),
    (lambda: SearchConfig(texts=0), r"search\.texts=0 .*at least 1"),
    (lambda: SearchConfig(contexts=0), r"search\.contexts=0 .*at least 1"),
    (lambda: SearchConfig(outlier_tokens=0), r"search\.outlier_tokens=0 .*at least 1"),
    (lambda: SearchConfig(eta=0.5), r"search\.eta=0\.5 is not allowed: .* at least 1"),
    (lambda: SearchConfig(eta=float("inf")), r"search\.eta=inf"),
    (lambda: SearchConfig(method="tokens"), r"needs search\.tokens or search\.token_ids"),
    (lambda: SearchConfig(method="tokens", tokens="a", token_ids=[1]), r"only one of them"),
    (lambda: SearchConfig(method="tokens", token_ids=[]), r"the prefix is empty"),
    (lambda: SearchConfig(method="tokens", token_ids=[4, -1]), r"search\.token_ids=\[4, -1\]"),
    (lambda: SearchConfig(method="random", length=0), r"search\.length=0 .*at least 1"),
    (lambda: DataConfig(further={"a b": CorpusConfig()}), r"data\.further='a b' .*letters, digits"),
    (lambda: DataConfig(further={"c4": CorpusConfig("c5")}), r"data\.further\.c4\.source='c5'"),
    (lambda: EvalConfig(perplexity=False), r"eval\.perplexity=false .*nothing would be measured"),
    (lambda: EvalConfig(tasks=["piqa", "rte", "piqa"]), r"eval\.tasks=.*piqa stands there more than once"),
    (lambda: EvalConfig(accuracy="acc_nrom"), r"eval\.accuracy='acc_nrom' .*mean 'acc_norm'\?"),
    (lambda: EvalConfig(limit=0), r"eval\.limit=0 .*at least 1"),
    (lambda: EvalConfig(shots=-1), r"eval\.shots=-1 .*at least 0"),
    (lambda: EvalConfig(limit=1.0), r"eval\.limit=1\.0 .*a share .*below 1"),
    (lambda: EvalConfig(task_batch_size=0), r"eval\.task_batch_size=0"),
    (lambda: EvalConfig(task_batch_size="auto:4"), r"eval\.task_batch_size='auto:4' .*auto, or null"),
    (lambda: EvalConfig(attention_texts=-1), r"eval\.attention_texts=-1"),
    (lambda: EvalConfig(sparsity_texts=-1), r"eval\.sparsity_texts=-1"),
    (lambda: EvalConfig(sparsity_cett=[0.1, 1.0]), r"eval\.sparsity_cett=\[0\.1, 1\.0\].*below 1"),
    (lambda: EvalConfig(sparsity_cett=[]), r"eval\.sparsity_cett=\[\].*at least one"),
    (lambda: EvalConfig(sparsity_ppl=0.0), r"eval\.sparsity_ppl=0\.0.*null for none"),
    (lambda: EvalConfig(spike_ratio=0.5), r"eval\.spike_ratio=0\.5"),
    (lambda: TuningConfig(method="prefix"), r"either tuning\.steps or tuning\.epochs"),
    (lambda: QFeMConfig(alpha=-1.0), r"quantizer\.qfem\.alpha=-1\.0 .*at least 0 and finite, or null"),
    (lambda: QFeMConfig(alpha=float("nan")), r"quantizer\.qfem\.alpha=nan"),
    (lambda: QFeMConfig(alpha=5.0, search=True), r"quantizer\.qfem\.alpha=5\.0 .*set one of the two"),
    (lambda: QFeMConfig(target=0.0), r"quantizer\.qfem\.target=0\.0 .*positive"),
    (lambda: QFeMConfig(texts=0), r"quantizer\.qfem\.texts=0 .*at least 1"),
    (lambda: QFeMConfig(curve=-1), r"quantizer\.qfem\.curve=-1 .*at least 0"),
    (lambda: QuantizerConfig(qfem=QFeMConfig(texts=17)), r"quantizer\.qfem\.texts=17 .*calibration\.samples=16"),
    (lambda: TuningConfig(method="prefix", steps=3, epochs=1), r"either tuning\.steps or tuning\.epochs"),
    (lambda: TuningConfig(method="prefix", steps=0), r"tuning\.steps=0"),
    (lambda: TuningConfig(method="prefix", epochs=-1), r"tuning\.epochs=-1"),
    (lambda: TuningConfig(sequence_length=-8), r"tuning\.sequence_length=-8"),
    (lambda: TuningConfig(learning_rate=0), r"tuning\.learning_rate=0"),
    (lambda: TuningConfig(lambda_q=-1), r"tuning\.lambda_q=-1"),
    (lambda: TuningConfig(gradient_clip=0), r"tuning\.gradient_clip=0"),
    (lambda: TuningConfig(scale_learning_rate=0), r"tuning\.scale_learning_rate=0"),
    (lambda: TuningConfig(ranges_every=0), r"tuning\.ranges_every=0"),
    (lambda: TuningConfig(ranges="learnt"), r"tuning\.ranges='learnt' .*mean 'learned'\?"),
    (lambda: TuningConfig(ranges="static", prediction_model="full_precision"), r"tuning\.ranges='static' .*=quantized"),
    (lambda: TuningConfig(loss="kl", prediction_model="full_precision"), r"tuning\.loss='kl' .*=quantized"),
    (lambda: TuningConfig(gradient="rang"), r"tuning\.gradient='rang' .*mean 'range'\?"),
    (lambda: EvalConfig(block_length=-5), r"eval\.block_length=-5 .*at least 2"),
    (lambda: EvalConfig(blocks=0), r"eval\.blocks=0"),
    (lambda: RunConfig(bos="never", eval=EvalConfig(predict_first=True)), r"eval\.predict_first=true .*bos=never"),
    (lambda: RunConfig(bos="alway"), r"bos='alway' .*mean 'always'\?"),
    (lambda: TrackingConfig(backend="wanbd"), r"tracking\.backend='wanbd' .*mean 'wandb'\?"),
    (lambda: TrackingConfig(mode="of"), r"tracking\.mode='of'"),
    (lambda: RunConfig(seed=-1), r"seed=-1"),
    (lambda: RunConfig(experiment="a/b"), r"experiment='a/b'"),
    (lambda: RunConfig(experiment="../up"), r"experiment='\.\./up'"),
    (lambda: RunConfig(tuning=TuningConfig("short", "prefix", steps=1)), r"tuning=short has no prefix .*search=none"),
    (
        lambda: RunConfig(search=GREEDY, tuning=replace(TUNED, ranges="learned"), quantizer=DYNAMIC),
        r"tuning\.ranges=learned .*quantizer\.activations\.range=dynamic: choose .*tuning\.ranges=dynamic",
    ),
    (
        lambda: RunConfig(search=GREEDY, tuning=replace(TUNED, ranges="static"), quantizer=NOTHING),
        r"tuning\.ranges=static .*quantizer\.activations\.bits=null",
    ),
    (
        lambda: RunConfig(search=GREEDY, tuning=replace(TUNED, loss="kl"), quantizer=NOTHING),
        r"tuning\.loss=kl .*rounds nothing: .*tuning\.loss=next_token",
    ),
    (
        lambda: RunConfig(
            search=GREEDY, tuning=replace(TUNED, loss="kl"), quantizer=replace(NOTHING, rotation="hadamard")
        ),
        r"tuning\.loss=kl .*rounds nothing: .*tuning\.loss=next_token",
    ),
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


def test_qfem_needs_calibration_text_and_no_ranges_and_is_off_without_activation_bits() -> None:
    dynamic = ActivationConfig(range="dynamic")
    for qfem in (QFeMConfig(alpha=0.0), QFeMConfig(search=True)):
        quantizer = QuantizerConfig(activations=dynamic, qfem=qfem)
        assert (quantizer.uses_qfem, quantizer.needs_calibration_text, quantizer.needs_calibration) == (
            True,
            True,
            False,
        )
        assert not QuantizerConfig(activations=ActivationConfig(bits=None), qfem=qfem).needs_calibration_text
    assert not QuantizerConfig(activations=dynamic).needs_calibration_text
    assert QuantizerConfig().needs_calibration_text


@pytest.mark.parametrize(
    "change",
    [{"rotation": "hadamard"}, {"kv_cache": KvCacheConfig(bits=4)}, {"attention": AttentionConfig(bits=8)}],
    ids=lambda change: next(iter(change)),
)
def test_rotation_and_the_targets_in_attention_are_no_full_precision_and_need_no_calibration(change: Any) -> None:
    kept = QuantizerConfig(weights=WeightConfig(bits=None), activations=ActivationConfig(bits=None), **change)
    assert not kept.is_full_precision
    assert not kept.needs_calibration


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


WITHOUT_EFFECT: list[tuple[RunConfig, str]] = [
    (RunConfig(search=SearchConfig(tau=0.3)), "search.tau=0.3 has no effect with search.method=none"),
    (RunConfig(search=SearchConfig(text_length=64)), "search.text_length=64 has no effect with search.method=none"),
    (RunConfig(search=SearchConfig(seed=3)), "search.seed=3 has no effect with search.method=none"),
    (RunConfig(search=SearchConfig(method="qfep", seed=3)), "search.seed=3 has no effect with search.method=qfep"),
    (
        RunConfig(search=replace(GREEDY, proposal="outlier", seed=3)),
        "search.seed=3 has no effect with search.proposal=outlier",
    ),
    (
        RunConfig(
            data=DataConfig(further={"c4": CorpusConfig("c4")}), eval=EvalConfig(perplexity=False, tasks=["copa"])
        ),
        "data.further=['c4'] is not measured with eval.perplexity=false; it only keeps its share",
    ),
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
    (RunConfig(search=replace(GREEDY, texts=9)), "search.texts=9 has no effect with search.method=greedy"),
    (RunConfig(search=SearchConfig(method="qfep", eta=9)), "search.eta=9 has no effect with search.method=qfep"),
    (
        RunConfig(search=SearchConfig(method="qfep", batch_size=9)),
        "search.batch_size=9 has no effect with search.method=qfep",
    ),
    (
        RunConfig(search=SearchConfig(method="prefixquant", contexts=9)),
        "search.contexts=9 has no effect with search.method=prefixquant",
    ),
    (RunConfig(tuning=TuningConfig(learning_rate=1.0)), "tuning.learning_rate=1.0 has no effect with"),
    (
        RunConfig(search=GREEDY, tuning=replace(TUNED, lambda_q=0, reduction="sum")),
        "tuning.reduction='sum' has no effect with tuning.lambda_q=0",
    ),
    (RunConfig(search=GREEDY, tuning=replace(TUNED, gradient="straight_through")), "tuning.lambda_q has no effect"),
    (
        RunConfig(search=GREEDY, tuning=replace(TUNED, ranges_every=3)),
        "tuning.ranges_every=3 has no effect with tuning.ranges=dynamic",
    ),
    (
        RunConfig(search=GREEDY, tuning=replace(TUNED, ranges="static", scale_learning_rate=1.0)),
        "tuning.scale_learning_rate=1.0 has no effect with tuning.ranges=static",
    ),
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
        "quantizer.calibration.samples=3 has no effect without static ranges, smoothing or QFeM",
    ),
    (
        RunConfig(quantizer=QuantizerConfig(qfem=QFeMConfig(alpha=3.0, curve=4))),
        "quantizer.qfem.curve=4 has no effect with quantizer.qfem.search=False",
    ),
    (
        RunConfig(quantizer=QuantizerConfig(activations=ActivationConfig(bits=None), qfem=QFeMConfig(search=True))),
        "quantizer.qfem.search=True has no effect with quantizer.activations.bits=None",
    ),
    (
        RunConfig(quantizer=QuantizerConfig(rotation_seed=2)),
        "rotation_seed=2 has no effect with quantizer.rotation=none",
    ),
    (
        RunConfig(quantizer=QuantizerConfig(zero_point="integer")),
        "quantizer.zero_point='integer' has no effect without an asymmetric grid",
    ),
    (
        RunConfig(quantizer=QuantizerConfig(kv_cache=KvCacheConfig(symmetric=True))),
        "quantizer.kv_cache.symmetric=True has no effect with quantizer.kv_cache.bits=null",
    ),
    (
        RunConfig(quantizer=QuantizerConfig(attention=AttentionConfig(granularity="per_token"))),
        "quantizer.attention.granularity='per_token' has no effect with quantizer.attention.bits=null",
    ),
]


@pytest.mark.parametrize(("config", "warning"), WITHOUT_EFFECT, ids=[warning for _, warning in WITHOUT_EFFECT])
def test_an_option_without_effect_is_named(config: RunConfig, warning: str) -> None:
    found = options_without_effect(config)
    assert len(found) == 1
    assert warning in found[0]


def test_options_that_have_an_effect_are_not_named() -> None:
    search = replace(GREEDY, tau=0.3, candidates=9, frequent=8, text_length=64, seed=3)
    quantizer = QuantizerConfig(weights=WeightConfig(granularity="per_group", group_size=4))
    assert options_without_effect(RunConfig(search=search, quantizer=quantizer, tuning=TUNED)) == []
    for rule in (
        SearchConfig(method="random", length=2, seed=3),
        SearchConfig(method="qfep", texts=2, text_length=9, contexts=3, outlier_tokens=2),
        SearchConfig(method="prefixquant", texts=2, text_length=9, eta=3, max_length=2),
    ):
        assert options_without_effect(RunConfig(search=rule)) == []
    asymmetric = {"activations": ActivationConfig(symmetric=False), "kv_cache": KvCacheConfig(bits=4)}
    for part in asymmetric:
        quantizer = QuantizerConfig(
            zero_point="integer", rotation="hadamard", rotation_seed=2, **{part: asymmetric[part]}
        )
        assert options_without_effect(RunConfig(quantizer=quantizer)) == []
    assert options_without_effect(RunConfig()) == []
