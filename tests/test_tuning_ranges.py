"""Tuning under the quantizer that judges it: static ranges that follow the prefix, ranges that learn, and losses."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import calibrated, random_texts
from planted import plant_spikes
from safetensors.torch import load_file, save_file
from tiny_run import tuning_config
from torch import Tensor
from torch.nn import functional

from cushion import pipeline
from cushion.artifacts import ArtifactStore
from cushion.config import ActivationConfig, AttentionConfig, QuantizerConfig, SearchConfig, TuningConfig, WeightConfig
from cushion.errors import ConfigError, TuningError
from cushion.models import LanguageModel
from cushion.prefix import Prefix
from cushion.quantization.calibration import Calibration, CalibrationStep
from cushion.quantization.fitted import FittedQuantizer
from cushion.quantization.input_statistics import InputStatisticsStep, fitted_behind
from cushion.quantization.learned import Learned
from cushion.step import Context, compute
from cushion.tuning import _optimizer, tune_prefix
from cushion.tuning_loss import TuningLoss
from cushion.tuning_ranges import TunedUnder, check_tuning
from cushion.tuning_state import TuningState
from cushion.tuning_step import TuningRun

Tiny = Callable[..., LanguageModel]
TOKENS = [256, 10]
SPIKE = 7
COARSE = QuantizerConfig(weights=WeightConfig(bits=None), activations=ActivationConfig(bits=4))
TEXTS, HELD_OUT, CALIBRATION = random_texts(6, 12), random_texts(4, 12, seed=1), random_texts(3, 16, seed=2)


def settings(**options: Any) -> TuningConfig:
    defaults = {"steps": 6, "warmup_steps": 2, "evaluate_every": 3, "ranges_every": 2, "lambda_q": 0.0}
    return TuningConfig(method="prefix", **{**defaults, **options})


def tuning(lm: LanguageModel, config: TuningConfig, state: TuningState | None = None, **options: Any) -> Any:
    quantizer = options.get("quantizer", COARSE)
    found = Prefix.from_tokens(lm.model, TOKENS)
    fitted = fitted_behind(lm, found, quantizer, options.get("calibration", CALIBRATION))
    texts, held_out = options.get("texts", TEXTS), options.get("held_out", HELD_OUT)
    return tune_prefix(lm, found, config, fitted, SearchConfig(), texts, held_out, 0, state, CALIBRATION)


def last(states: Any) -> TuningState:
    *_, state = states
    return state


def cross_entropy(lm: LanguageModel, prefix: Prefix, texts: Tensor, fitted: FittedQuantizer) -> float:
    """The mean loss of texts, each run alone, under a quantizer as a row has it."""
    losses = []
    with fitted.on(lm), torch.no_grad():
        for text in texts:
            cache = prefix.cache(lm.model)
            logits = lm.model(input_ids=text[None], past_key_values=cache, use_cache=True).logits[0]
            losses.append(functional.cross_entropy(logits[:-1], text[1:]).item())
    return sum(losses) / len(losses)


# ---- the quantizer that is tuned under ------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [None, 0.5])
@pytest.mark.parametrize("ranges", ["static", "learned"])
def test_the_tuned_quantizer_is_the_one_that_judges(tiny: Tiny, ranges: str, smoothing: float | None) -> None:
    lm = tiny()
    quantizer = replace(COARSE, activations=ActivationConfig(bits=6), smoothing_alpha=smoothing)
    config = settings(ranges=ranges, steps=8, evaluate_every=8, scale_learning_rate=0.03, batch_size=4)
    state = last(tuning(lm, config, quantizer=quantizer, texts=HELD_OUT))
    assert state.best_step == 8 and state.best_loss < state.initial_loss
    found = Prefix.from_tokens(lm.model, TOKENS)
    behind = state.best if ranges == "static" else found
    fitted = FittedQuantizer(quantizer, calibrated(lm, CALIBRATION, behind), learned=state.best_learned)
    assert state.best_loss == pytest.approx(cross_entropy(lm, state.best, HELD_OUT, fitted), rel=1e-5)
    without = FittedQuantizer(quantizer, calibrated(lm, CALIBRATION, found))
    assert state.best_loss != pytest.approx(cross_entropy(lm, state.best, HELD_OUT, without), rel=1e-5)
    assert state.initial_loss == pytest.approx(cross_entropy(lm, found, HELD_OUT, without), rel=1e-5)


def test_ranges_that_learn_lower_the_loss_of_a_model_with_spikes(tiny: Tiny) -> None:
    lm = tiny()
    plant_spikes(lm.model, {SPIKE: 6.0})
    texts, calibration = random_texts(4, 12), CALIBRATION.clone()
    texts[:, 3] = calibration[:, 5] = SPIKE
    rates = {"learning_rate": 1e-9, "scale_learning_rate": 0.05}  # keys and values stand still: the ranges alone
    config = settings(ranges="learned", loss="kl", steps=30, evaluate_every=10, batch_size=4, **rates)
    state = last(tuning(lm, config, texts=texts, held_out=texts, calibration=calibration))
    assert state.best_loss < 0.9 * state.initial_loss
    assert state.best_learned is not None and state.best_learned.ranges.keys() == lm.linears().keys()


def test_small_gradients_of_ranges_are_not_held_back() -> None:
    values, ranges = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    optimizer = _optimizer(settings(ranges="learned", scale_learning_rate=0.5), [values], [ranges])
    for group in optimizer.param_groups:
        group["lr"] = group["peak"]
    values.grad, ranges.grad = torch.ones(1), torch.full((1,), 1e-10)
    optimizer.step()
    assert (values.item(), ranges.item()) == (pytest.approx(-1e-2), pytest.approx(-0.5, rel=1e-3))


def test_static_ranges_follow_the_prefix_as_often_as_asked(tiny: Tiny) -> None:
    seen = []
    for state in tuning(tiny(), settings(ranges="static", steps=7, ranges_every=2, evaluate_every=5)):
        seen.append(state.fitted_behind is state.prefix)
    assert seen == [False, True, False, True, True, True, True]  # steps 2, 4, 6; 5 and 7 are measured


@pytest.mark.parametrize("estimator", ["minmax", "mse"])
def test_what_is_fitted_on_the_way_is_what_the_cached_steps_give(tiny: Tiny, tmp_path: Path, estimator: str) -> None:
    lm = tiny()
    behind = Prefix.from_tokens(lm.model, TOKENS)
    activations = ActivationConfig(estimator=estimator)
    quantizer = QuantizerConfig(activations=activations, smoothing_alpha=0.5, rotation="hadamard")
    context = Context(lm, ArtifactStore(tmp_path), lambda event: None)
    calibration = compute(CalibrationStep(behind, ("hadamard", 0), CALIBRATION), context)
    cached = FittedQuantizer.of(quantizer, calibration)
    if quantizer.gathered:
        gathered = compute(InputStatisticsStep(behind, quantizer, calibration, CALIBRATION, ""), context)
        cached = replace(cached, inputs=gathered.found)
    fitted = fitted_behind(lm, behind, quantizer, CALIBRATION)
    scales = []
    for one in (cached, fitted):
        with one.on(lm):
            linears = [module for module in lm.blocks.modules() if hasattr(module, "activation")]
            scales.append(torch.stack([linear.activation.parameters[0] for linear in linears]))
    assert len(scales[0]) and torch.equal(*scales)


@pytest.mark.parametrize(
    "options",
    [
        {"ranges": "static", "evaluate_every": 4},
        {"ranges": "learned", "reduction": "relative", "lambda_q": 0.1},
        {"ranges": "learned", "loss": "kl"},
    ],
    ids=str,
)
def test_tuning_goes_on_from_a_checkpoint_bit_for_bit(tiny: Tiny, tmp_path: Path, options: dict[str, Any]) -> None:
    lm, config = tiny(), settings(**options)
    asymmetric = replace(COARSE, activations=replace(COARSE.activations, symmetric=False))
    whole = last(tuning(lm, config, quantizer=asymmetric))
    states = tuning(lm, config, quantizer=asymmetric)
    *_, broken = itertools.islice(states, 3)
    scalars, tensors = broken.to_checkpoint()
    states.close()
    save_file({k: v.clone().contiguous() for k, v in tensors.items()}, tmp_path / "checkpoint.safetensors")
    saved = json.loads(json.dumps(scalars)), load_file(tmp_path / "checkpoint.safetensors")
    resumed = TuningState.from_checkpoint(*saved, Prefix.from_tokens(lm.model, TOKENS))
    last(tuning(lm, config, resumed, quantizer=asymmetric))
    assert len(whole.steps) == len(resumed.steps) == 6
    for one, other in zip(whole.steps, resumed.steps, strict=True):
        assert replace(one, seconds=0.0) == replace(other, seconds=0.0)
    (scalars, tensors), (resumed_scalars, resumed_tensors) = whole.to_checkpoint(), resumed.to_checkpoint()
    assert tensors.keys() == resumed_tensors.keys()
    assert all(torch.equal(value, resumed_tensors[key]) for key, value in tensors.items())
    without_steps = [{k: v for k, v in one.items() if k != "steps"} for one in (scalars, resumed_scalars)]
    assert without_steps[0] == without_steps[1]


# ---- losses ---------------------------------------------------------------------------------------------------------


def test_relative_error_is_one_before_tuning(tiny: Tiny) -> None:
    config = settings(reduction="relative", lambda_q=0.25, steps=1, learning_rate=1e-12)
    state = last(tuning(tiny(), config, texts=HELD_OUT[:2], held_out=HELD_OUT[:2]))
    plain = last(tuning(tiny(), replace(config, lambda_q=0.0), texts=HELD_OUT[:2], held_out=HELD_OUT[:2]))
    summed = last(tuning(tiny(), replace(config, reduction="sum"), texts=HELD_OUT[:2], held_out=HELD_OUT[:2]))
    assert state.steps[0].error == pytest.approx(1.0, rel=1e-6)
    assert state.initial_loss == pytest.approx(plain.initial_loss + 0.25, rel=1e-6)
    assert state.error_unit == pytest.approx(summed.steps[0].error, rel=1e-6)


def test_divergence_is_from_full_precision_behind_the_found_prefix(tiny: Tiny) -> None:
    lm = tiny()
    found = Prefix.from_tokens(lm.model, TOKENS)
    tuned = replace(found, keys=tuple(key * 1.3 for key in found.keys))

    def distributions(behind: Prefix) -> Tensor:
        rows = []
        for text in HELD_OUT:
            cache = behind.cache(lm.model)
            rows.append(lm.model(input_ids=text[None], past_key_values=cache, use_cache=True).logits[0].double())
        return torch.stack(rows).log_softmax(-1)

    quantizer = replace(COARSE, smoothing_alpha=0.5)
    fitted = fitted_behind(lm, found, quantizer, CALIBRATION)
    states = tuning(lm, settings(ranges="static", loss="kl"), quantizer=quantizer)
    with torch.no_grad():
        p = distributions(found)
        with fitted.on(lm):
            q = distributions(tuned)
    expected = (p.exp() * (p - q)).sum(-1).mean().item()
    assert expected > 1e-4
    config = settings(ranges="static", loss="kl")
    under = TunedUnder(lm, config, fitted, CALIBRATION)
    loss_of = TuningLoss(lm, config, SearchConfig(), found, under.without_quantizer)
    before = dict(lm.model.named_modules())
    with under, torch.no_grad():
        assert loss_of(tuned, HELD_OUT)[0].item() == pytest.approx(expected, rel=1e-3)
        assert loss_of(tuned, HELD_OUT)[0].item() == pytest.approx(expected, rel=1e-3)  # the quantizer is on again
    assert dict(lm.model.named_modules()) == before
    state = last(states)
    assert 0 < state.best_loss < state.initial_loss


def test_a_smaller_divergence_is_not_a_larger_cross_entropy(tiny: Tiny) -> None:
    lm, rows = tiny(), 8
    lm.model.base_model.norm.weight.data.mul_(4.0)  # predictions that are surer than at random
    found = Prefix.from_tokens(lm.model, TOKENS)
    drawn, texts = torch.Generator().manual_seed(0), random_texts(2 * rows, 1)
    with torch.no_grad():
        while texts.shape[1] < 16:  # texts of the model itself: on random ones its cross entropy says nothing
            logits = lm.model(input_ids=texts, past_key_values=found.cache(lm.model, 2 * rows), use_cache=True).logits
            texts = torch.cat([texts, torch.multinomial(logits[:, -1].softmax(-1), 1, generator=drawn)], dim=1)
    training, held_out = texts.split(rows)
    quantizer = QuantizerConfig(weights=WeightConfig(4), activations=ActivationConfig(4))
    schedule = {"steps": 20, "evaluate_every": 5, "ranges_every": 5, "batch_size": 4, "learning_rate": 0.05}
    config = settings(loss="kl", ranges="static", **schedule)
    state = last(tuning(lm, config, quantizer=quantizer, texts=training, held_out=held_out))
    assert state.best_loss < state.initial_loss
    before, after = (
        cross_entropy(lm, prefix, held_out, fitted_behind(lm, prefix, quantizer, CALIBRATION))
        for prefix in (found, state.best)
    )
    assert after < before + 0.1  # of 120 tokens; with p behind the prefix that learns it rises by 0.7 and more


def test_kl_is_refused_where_the_quantizer_cannot_be_taken_off() -> None:
    quantizer = QuantizerConfig(attention=AttentionConfig(bits=8))
    with pytest.raises(ConfigError, match=r"tuning\.loss=kl .*quantizer\.attention"):
        check_tuning(settings(loss="kl"), quantizer)
    check_tuning(settings(), quantizer)
    check_tuning(settings(loss="kl"), QuantizerConfig(smoothing_alpha=0.5, rotation="hadamard"))


def test_an_error_that_is_zero_has_no_share(tiny: Tiny) -> None:
    lm = tiny()
    for block in lm.blocks:
        block.self_attn.o_proj.weight.zero_()
        block.mlp.down_proj.weight.zero_()
    lm.model.get_input_embeddings().weight.zero_()
    with pytest.raises(TuningError, match=r"L_q before tuning is 0\.0.*tuning\.reduction=relative"):
        next(tuning(lm, settings(reduction="relative", lambda_q=0.1)))


# ---- the key ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "changes"),
    [
        ({}, {"loss": "kl"}),
        ({}, {"ranges": "static"}),
        ({"ranges": "static"}, {"ranges": "learned"}),
        ({"ranges": "static"}, {"ranges_every": 3}),
        ({"ranges": "learned"}, {"scale_learning_rate": 0.5}),
        ({"ranges": "static"}, {"calibration_texts": CALIBRATION[:2]}),
    ],
    ids=str,
)
def test_what_decides_the_outcome_is_in_the_key(tiny: Tiny, base: dict[str, Any], changes: dict[str, Any]) -> None:
    lm = tiny()
    context = Context(lm, ArtifactStore(Path()), lambda event: None)

    def key(options: dict[str, Any]) -> dict[str, Any]:
        texts = options.pop("calibration_texts", CALIBRATION)
        found, search, config = Prefix.from_tokens(lm.model, TOKENS), SearchConfig(), settings(**options)
        calibration = Calibration(None, "ranges", 0.0)
        step = TuningRun(
            found, config, COARSE, search, TEXTS, HELD_OUT, 0, Path(), calibration, calibration_texts=texts
        )
        return step.key(context)

    assert key(base | changes) != key(dict(base)) == key(base | {"name": "mine"})


# ---- whole runs -----------------------------------------------------------------------------------------------------


def test_the_quantized_row_with_the_tuned_prefix_has_the_learned_ranges(text_file: Path, tmp_path: Path) -> None:
    config = tuning_config(text_file, tmp_path)
    config.tuning = replace(config.tuning, ranges="learned", scale_learning_rate=0.2, learning_rate=0.1)
    result = pipeline.run(config)
    assert result.tuning is not None and result.tuning["best_step"] > 0
    folder = pipeline.run_folder(config)
    learned = Learned.load(folder / "learned.safetensors")
    tuned = Prefix.load(folder / "prefix").fingerprint
    keys = [json.loads(path.read_text()) for path in (tmp_path / "cache" / "perplexity").glob("*/depends_on.json")]
    assert len(keys) == 6
    with_learned = [key for key in keys if "learned" in (key["quantizer"] or {})]
    assert [(key["prefix"], key["quantizer"]["learned"]) for key in with_learned] == [(tuned, learned.fingerprint)]
    assert sum(key["prefix"] == tuned and key["quantizer"] is None for key in keys) == 1
    assert math.isfinite(asdict(result.rows[-1])["values"][f"perplexity/{result.evaluation['corpus']}"])
