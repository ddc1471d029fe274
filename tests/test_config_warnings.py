"""Options without effect are those that no step reads by its key, and all that a step reads is known."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
from test_step_keys import every_step

from cushion.config import (
    ActivationConfig,
    CalibrationConfig,
    EvalConfig,
    QuantizerConfig,
    ReconstructionConfig,
    RunConfig,
    SearchConfig,
    TuningConfig,
    WeightConfig,
)
from cushion.config.latency import LatencyConfig
from cushion.config_reads import _steps, reads
from cushion.config_warnings import options_without_effect

SEARCH = SearchConfig(name="bos", method="bos")
PLAIN = QuantizerConfig("plain", weights=WeightConfig(bits=None), activations=ActivationConfig(bits=None))
LEARNING = {"static": {"ranges": "static"}, "learned": {"ranges": "learned"}, "dynamic": {}}


def tuned(**options: Any) -> TuningConfig:
    return TuningConfig("t", "prefix", **({} if "epochs" in options else {"steps": 7}) | options)


WITHOUT: list[tuple[RunConfig, list[str]]] = [
    (
        RunConfig(quantizer=QuantizerConfig(weights=WeightConfig(bits=None, granularity="per_channel"))),
        ["quantizer.weights.granularity='per_channel' has no effect with quantizer.weights.bits=null"],
    ),
    (
        RunConfig(quantizer=QuantizerConfig(activations=ActivationConfig(bits=None, symmetric=False))),
        ["quantizer.activations.symmetric=False has no effect with quantizer.activations.bits=null"],
    ),
    (
        RunConfig(quantizer=QuantizerConfig(activations=ActivationConfig(bits=None, clip_ratio=0.9))),
        ["quantizer.activations.clip_ratio=0.9 has no effect with quantizer.activations.bits=null"],
    ),
    (
        RunConfig(quantizer=replace(PLAIN, levels="paper")),
        [
            "quantizer.levels='paper' has no effect without quantized weights, activations, cache or "
            "attention on integers"
        ],
    ),
    (
        RunConfig(search=SEARCH, quantizer=PLAIN, tuning=tuned(prediction_model="full_precision")),
        ["tuning.prediction_model='full_precision' has no effect with a quantizer that rounds nothing"],
    ),
    (
        RunConfig(eval=EvalConfig(perplexity=False, tasks=["copa"], blocks=3, batch_size=2)),
        [f"eval.{key} has no effect with eval.perplexity=false" for key in ("blocks=3", "batch_size=2")],
    ),
    (
        RunConfig(eval=EvalConfig(limit=0.5, fewshot_as_multiturn=False)),
        [f"eval.{key} has no effect with eval.tasks=[]" for key in ("limit=0.5", "fewshot_as_multiturn=False")],
    ),
    (
        RunConfig(eval=EvalConfig(tasks=["copa"], fewshot_as_multiturn=False)),
        ["eval.fewshot_as_multiturn=False has no effect with eval.chat_template=false"],
    ),
    (
        RunConfig(eval=EvalConfig(attention_texts=0, attention_first=2)),
        ["eval.attention_first=2 has no effect with eval.attention_texts=0"],
    ),
    (
        RunConfig(eval=EvalConfig(sparsity_ppl=1.0, spike_ratio=9.0)),
        [
            "eval.sparsity_ppl=1.0 has no effect with eval.sparsity_texts=0",
            "eval.spike_ratio=9.0 has no effect with eval.spike_texts=0",
        ],
    ),
    (
        RunConfig(eval=EvalConfig(blocks=2, activation_blocks=3)),
        ["eval.activation_blocks=3 has no effect in this combination: every step of the run reads the same without it"],
    ),
    (
        RunConfig(tuning=TuningConfig(steps=4), execution="int8", quantizer=PLAIN),
        [
            "tuning.steps=4 has no effect with tuning.method=none",
            "execution='int8' has no effect with quantizer=plain",
        ],
    ),
]


@pytest.mark.parametrize(("config", "told"), WITHOUT, ids=[told[0].partition(" has")[0] for _, told in WITHOUT])
def test_what_no_step_reads_is_told_with_what_would_have_to_be_another(config: RunConfig, told: list[str]) -> None:
    assert options_without_effect(config) == told


@pytest.mark.parametrize("perplexity", [True, False])
def test_tasks_alone_are_asked_of_the_quantizer_with_all_its_options(perplexity: bool) -> None:
    quantizer = QuantizerConfig(
        levels="paper",
        weights=WeightConfig(4, "per_channel"),
        activations=ActivationConfig(6, symmetric=False),
        smoothing_alpha=0.6,
        calibration=CalibrationConfig(samples=3, length=16),
    )
    evaluation = EvalConfig(perplexity=perplexity, tasks=["copa"])
    assert options_without_effect(RunConfig(quantizer=quantizer, eval=evaluation)) == []


OTHER: dict[str, Any] = {
    "perplexity": False, "block_length": 9, "blocks": 9, "batch_size": 9, "predict_first": True,
    "prefix_in_block": True, "prefix_as_tokens": True, "tasks": ["rte"], "limit": 0.9, "shots": 9,
    "task_batch_size": "auto",
    "chat_template": "name", "system_instruction": "text", "fewshot_as_multiturn": False, "accuracy": "acc_norm",
    "include_path": "path", "samples": True, "activation_blocks": 9, "attention_texts": 3, "attention_first": 9,
    "sparsity_texts": 3, "sparsity_cett": [0.5], "sparsity_ppl": 9.0, "spike_texts": 3, "spike_ratio": 9.0,
    "controls": False, "latency": LatencyConfig([2], [9], 9, 9, 9),
    "method": "none", "steps": 9, "epochs": 9.0, "sequences": 9, "sequence_length": 9, "learning_rate": 0.9,
    "schedule": "linear", "warmup_steps": 9, "gradient_clip": 9.0, "lambda_q": 9.0, "gradient": "straight_through",
    "error_site": "linear_inputs", "reduction": "sum", "prediction_model": "full_precision", "loss": "kl",
    "ranges": "static", "ranges_every": 9, "scale_learning_rate": 0.9, "evaluate_every": 9, "held_out_sequences": 9,
    "weights": False, "weight_learning_rate": 0.9, "clipping": False, "clipping_learning_rate": 0.9,
    "transforms": False, "transform_learning_rate": 0.9, "transform_alpha": 0.9,
}  # fmt: skip
"""Another value of every option of `eval`, `tuning` and `reconstruction`."""


@pytest.mark.parametrize("section", ["eval", "tuning", "reconstruction"])
def test_every_option_is_read_by_a_run_that_uses_it(section: str) -> None:
    """An option that a step uses and its key does not hold would be told to have no effect: here none is."""
    evaluation = EvalConfig(
        tasks=["copa"], chat_template=True, latency=LatencyConfig([1], [4]), sparsity_texts=1, spike_texts=1
    )
    learning = ReconstructionConfig("r", "blockwise", weights=True)
    whole = [
        RunConfig(search=SEARCH, tuning=tuned(**ranges), reconstruction=learning, eval=evaluation)
        for ranges in LEARNING.values()
    ]
    whole.append(replace(whole[0], tuning=tuned(epochs=1.0)))
    if section == "reconstruction":
        token = QuantizerConfig(activations=ActivationConfig(4, "per_token", "dynamic"))
        whole.append(RunConfig(quantizer=token, reconstruction=ReconstructionConfig("r", "omniquant")))
    own = getattr(whole[0], section)
    for field in fields(own):
        if field.name == "name":
            continue
        value = 6 if (section, field.name) in (("reconstruction", "epochs"), ("reconstruction", "samples")) else None
        value = OTHER.get(field.name, 6) if value is None else value
        changed = [
            (config, replace(config, **{section: replace(getattr(config, section), **{field.name: value})}))
            for config in whole
            if section != "tuning" or field.name not in ("steps", "epochs") or getattr(config.tuning, field.name)
            if field.name != "prediction_model" or config.tuning.ranges == "dynamic"
        ]
        assert any(reads(before) != reads(after) for before, after in changed), f"{section}.{field.name}"


def test_every_step_of_a_run_is_asked_or_known_to_be_spoken_for() -> None:
    """A new step that reads options belongs among those of `config_reads`."""
    config = RunConfig(
        search=SEARCH,
        tuning=tuned(),
        reconstruction=ReconstructionConfig("r", "blockwise"),
        quantizer=QuantizerConfig(smoothing_alpha=0.5, rotation="hadamard"),
        eval=EvalConfig(
            tasks=["copa"], latency=LatencyConfig([1], [4]), prefix_as_tokens=True, sparsity_texts=1, spike_texts=1
        ),
    )
    lm: Any = type("Model", (), {"tokenizer_fingerprint": ""})
    asked = {step.name for step in _steps(config, lm)}
    by_declaration = {"search", "search_step", "proposal", "qfep", "prefixquant"}
    by_quantizer = {"fitting", "alpha", "inputs", "beyond_range", "rotation_sites", "smoothing"}
    without_options = {"activation_map"}
    assert asked | by_declaration | by_quantizer | without_options == every_step()
