"""Prefix tuning: what it lowers, what it leaves alone, which prefix it keeps, and how it stops and goes on."""

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
from helpers import random_texts
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from cushion import tuning as tuning_module
from cushion.config import ActivationConfig, QuantizerConfig, SearchConfig, TuningConfig, WeightConfig
from cushion.errors import TuningError
from cushion.models import LanguageModel
from cushion.prefix import Prefix
from cushion.quantization.fitted import FittedQuantizer
from cushion.quantization.numerics import Grid
from cushion.tuning import batch_indices, learning_rate_schedule, tune_prefix
from cushion.tuning_loss import TuningLoss, differentiable_error
from cushion.tuning_ranges import tuning_quantizer
from cushion.tuning_state import TuningState

Tiny = Callable[..., LanguageModel]
TOKENS = [256, 10]
NONE = QuantizerConfig(weights=WeightConfig(bits=None), activations=ActivationConfig(bits=None))
GRADIENTS = ("range", "nearest_grid_point", "straight_through")


def settings(**options: Any) -> TuningConfig:
    defaults = {"steps": 6, "warmup_steps": 2, "evaluate_every": 2, "batch_size": 3}
    rate = options.pop("learning_rate", 1e-2)
    config = TuningConfig(**{"method": "prefix", "sequences": 6, "held_out_sequences": 4, **defaults, **options})
    config.learning_rate = rate  # past the check: some tests drive the loss out of all bounds
    return config


def tuning(lm: LanguageModel, config: TuningConfig, state: TuningState | None = None, **options: Any) -> Any:
    """The generator of `tune_prefix` with the rest filled in."""
    given = {
        "quantizer": QuantizerConfig(),
        "texts": random_texts(6, 12),
        "held_out": random_texts(4, 12, seed=1),
        **options,
    }
    found = given.pop("found", None) or Prefix.from_tokens(lm.model, TOKENS, {"text": "kept"})
    fitted = FittedQuantizer(given.pop("quantizer"))
    return tune_prefix(lm, found, config, fitted, objective=SearchConfig(), seed=0, state=state, **given)


def last(states: Any) -> TuningState:
    for state in states:  # noqa: B007 - the last one is wanted
        pass
    return state


def same(one: Prefix, other: Prefix) -> bool:
    pairs = zip((*one.keys, *one.values), (*other.keys, *other.values), strict=True)
    return one.token_ids == other.token_ids and one.tuned == other.tuned and all(torch.equal(a, b) for a, b in pairs)


def without_seconds(state: TuningState) -> list[dict[str, Any]]:
    return [{k: v for k, v in asdict(step).items() if k != "seconds"} for step in state.steps]


# ---- what it lowers and what it leaves alone ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prediction_model": "full_precision"},
        {"error_site": "linear_inputs"},
        {"lambda_q": 0.0},
        {"schedule": "linear", "gradient": "nearest_grid_point"},
    ],
    ids=str,
)
def test_tuning_lowers_its_loss(tiny: Tiny, options: dict[str, Any]) -> None:
    texts = random_texts(4, 12)
    state = last(tuning(tiny(), settings(steps=25, **options), texts=texts, held_out=texts))
    assert state.best_loss < state.initial_loss - 0.02
    assert state.steps[-1].loss < state.steps[0].loss


def test_error_part_alone_can_be_lowered_through_the_range(tiny: Tiny) -> None:
    texts = random_texts(4, 12)
    config = settings(
        steps=25, batch_size=4, lambda_q=1e6, learning_rate=3e-2, prediction_model="full_precision"
    )  # fmt: skip
    state = last(tuning(tiny(), config, texts=texts, held_out=texts))
    assert state.steps[-1].error < 0.9 * state.steps[0].error


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_tuning_changes_keys_and_values_only(tiny: Tiny, family: str) -> None:
    lm = tiny(family)
    weights = {name: p.clone() for name, p in lm.model.state_dict().items()}
    modules = dict(lm.model.named_modules())
    found = Prefix.from_tokens(lm.model, TOKENS, {"text": "kept"})
    copy = Prefix.from_tokens(lm.model, TOKENS)
    state = last(tuning(lm, settings(), found=found))
    assert dict(lm.model.named_modules()) == modules
    assert lm.model.state_dict().keys() == weights.keys()
    assert all(torch.equal(p, weights[name]) for name, p in lm.model.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in lm.model.parameters())
    assert same(found, copy)
    assert state.prefix.token_ids == tuple(TOKENS) and state.prefix.tuned and state.prefix.metadata == {"text": "kept"}
    for layer in range(3):  # every layer learns
        assert not torch.equal(state.prefix.keys[layer], found.keys[layer])
        assert not torch.equal(state.prefix.values[layer], found.values[layer])
    assert not any(t.requires_grad for t in (*state.prefix.keys, *state.best.values))


@pytest.mark.parametrize("seed", [1, 4])
def test_best_prefix_is_the_one_with_the_lowest_held_out_loss(tiny: Tiny, seed: int) -> None:
    lm, held_out = tiny(), random_texts(4, 12, seed=seed)
    found = Prefix.from_tokens(lm.model, TOKENS)
    seen = {0: found}
    # one text learnt by heart: the loss on others falls at first and then rises
    config = settings(steps=12, learning_rate=0.5, schedule="constant", warmup_steps=0, batch_size=1)
    for state in tuning(lm, config, found=found, texts=random_texts(1, 12), held_out=held_out):
        seen[len(state.steps)] = state.prefix
    losses = {0: state.initial_loss}
    losses |= {s.step + 1: s.held_out_loss for s in state.steps if s.held_out_loss is not None}
    assert list(losses) == [0, 2, 4, 6, 8, 10, 12]
    best = min(losses, key=lambda step: losses[step])
    assert 0 < best < 12
    assert (state.best_step, state.best_loss) == (best, losses[best])
    assert same(state.best, seen[best])


def test_tuning_that_only_harms_gives_the_found_prefix_back(tiny: Tiny) -> None:
    lm = tiny()
    found = Prefix.from_tokens(lm.model, TOKENS)
    state = last(tuning(lm, settings(learning_rate=100.0, warmup_steps=0), found=found, quantizer=NONE))
    assert all(s.held_out_loss > state.initial_loss for s in state.steps if s.held_out_loss is not None)
    assert state.best_step == 0 and same(state.best, found) and not state.best.tuned


# ---- the loss -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", ["block_outputs", "linear_inputs"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "token"])
def test_loss_equals_the_formula_over_plain_tokens(tiny: Tiny, reduction: str, site: str) -> None:
    lm, texts = tiny(), random_texts(3, 12)
    config = settings(lambda_q=0.5, reduction=reduction, error_site=site)
    with torch.no_grad():
        found = Prefix.from_tokens(lm.model, TOKENS)
        actual = TuningLoss(lm, config, SearchConfig(), found)(found, texts)
    predictions, errors = [], []
    for text in texts:  # one at a time, as tokens, without a cache
        seen: list[Tensor] = []
        if site == "block_outputs":
            handles = [b.register_forward_hook(lambda _m, _a, out, seen=seen: seen.append(out[0])) for b in lm.blocks]
        else:
            linears = [m for m in lm.blocks.modules() if isinstance(m, nn.Linear)]
            handles = [m.register_forward_pre_hook(lambda _m, a, seen=seen: seen.append(a[0][0])) for m in linears]
        with torch.no_grad():
            logits = lm.model(input_ids=torch.cat([torch.tensor(TOKENS), text])[None], use_cache=False).logits[0]
        for handle in handles:
            handle.remove()
        predictions.append(functional.cross_entropy(logits[len(TOKENS) : -1], text[1:]).item())
        total = 0.0
        for x in seen:
            x = x[len(TOKENS) :].double()
            scale = (x.max() - x.min()) / 255
            error = x - (((x - x.min()) / scale).round() * scale + x.min())
            total += error.square().sum().item() / {"mean": x.numel(), "sum": 1, "token": len(text)}[reduction]
        errors.append(total)
    prediction, error = sum(predictions) / 3, sum(errors) / 3
    assert actual[1].item() == pytest.approx(prediction, rel=1e-4)
    assert actual[2].item() == pytest.approx(error, rel=2e-3)
    assert actual[0].item() == pytest.approx(prediction + 0.5 * error, rel=2e-3)


@pytest.mark.parametrize("quantizer", [NONE, QuantizerConfig(activations=ActivationConfig(range="dynamic"))])
def test_nothing_frozen_is_computed_twice(tiny: Tiny, quantizer: QuantizerConfig) -> None:
    """A step: every linear once forwards, and once backwards towards its input; none towards a weight, and none where
    the prefix has had no influence yet (the first block's queries, keys and values). A measurement: once forwards."""
    lm = tiny()
    head = lm.model.get_output_embeddings()
    of_linears = {name: 2 * linear.weight.numel() for name, linear in lm.linears().items()}
    forwards = sum(of_linears.values()) + 2 * head.weight.numel()
    untouched = sum(of_linears[f"model.layers.0.self_attn.{name}_proj"] for name in "qkv")
    tokens, held_out, found = 12, random_texts(4, 12, seed=1), Prefix.from_tokens(lm.model, TOKENS)
    with FlopCounterMode(display=False) as counter:
        last(tuning(lm, settings(steps=4), quantizer=quantizer, held_out=held_out, found=found))
    steps = 4 * 3 * tokens * (2 * forwards - untouched)
    measurements = 3 * held_out.numel() * forwards  # before the first step, after the second and after the last
    assert counter.get_flop_counts()["Global"][torch.ops.aten.mm] == steps + measurements


def test_prediction_runs_under_the_quantizer_with_dynamic_ranges_or_in_full_precision() -> None:
    quantizer = QuantizerConfig(smoothing_alpha=0.8)
    assert tuning_quantizer(settings(prediction_model="full_precision"), quantizer).is_full_precision
    used = tuning_quantizer(settings(), quantizer)
    assert (used.activations.range, used.weights, used.smoothing_alpha) == ("dynamic", quantizer.weights, 0.8)
    assert quantizer == QuantizerConfig(smoothing_alpha=0.8)


# ---- three gradients ------------------------------------------------------------------------------------------------


def example(requires_grad: bool = True) -> Tensor:
    values = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    values[0, 2, 3], values[1, 0, 0] = 9.0, -7.0
    return values.requires_grad_(requires_grad)


def gradient_of(values: Tensor, grid: Grid, gradient: str) -> Tensor:
    return torch.autograd.grad(differentiable_error(values, grid, gradient).sum(), values)[0]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("levels", ["full", "paper"])
def test_value_is_the_same_with_every_gradient(symmetric: bool, levels: str) -> None:
    values, grid = example(False), Grid(4, symmetric, levels)
    reference = differentiable_error(values, grid, "nearest_grid_point")
    assert reference.shape == (2,) and (reference > 0).all()
    for gradient in GRADIENTS:
        torch.testing.assert_close(differentiable_error(values, grid, gradient), reference, rtol=1e-4, atol=0)


def test_straight_through_gradient_is_exactly_zero() -> None:
    for symmetric in (False, True):
        assert gradient_of(example(), Grid(4, symmetric), "straight_through").eq(0).all()


@pytest.mark.parametrize("symmetric", [False, True])
def test_nearest_grid_point_gradient_is_twice_the_error(symmetric: bool) -> None:
    values = example()
    expected = []
    for text in values.detach().double():
        scale = text.abs().max() / 7 if symmetric else (text.max() - text.min()) / 15
        offset = 0 if symmetric else text.min()
        expected.append(2 * (text - (((text - offset) / scale).round() * scale + offset)))
    actual = gradient_of(values, Grid(4, symmetric), "nearest_grid_point")
    torch.testing.assert_close(actual.double(), torch.stack(expected), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("symmetric", [False, True])
def test_range_gradient_is_that_of_the_squared_scale_times_a_constant(symmetric: bool) -> None:
    values, grid = example(), Grid(4, symmetric)
    actual = gradient_of(values, grid, "range")
    with torch.no_grad():  # error in units of the scale, constant
        scale = [t.abs().max() / 7 if symmetric else (t.max() - t.min()) / 15 for t in values]
        offset = [0.0 if symmetric else t.min() for t in values]
        unit = [(u := (t - o) / s) - u.round() for t, s, o in zip(values, scale, offset, strict=True)]
    again = example().double().detach().requires_grad_()
    free = [t.abs().max() / 7 if symmetric else (t.max() - t.min()) / 15 for t in again]
    sum(s.square() * e.double().square().sum() for s, e in zip(free, unit, strict=True)).backward()
    torch.testing.assert_close(actual.double(), again.grad, atol=1e-5, rtol=1e-3)
    assert actual.ne(0).sum() == (2 if symmetric else 4)  # only the extremes of each text are pulled
    outlier = values.detach()[0, 2, 3]
    assert actual[0, 2, 3] * outlier > 0  # a step against the gradient brings the outlier in


def test_range_gradient_agrees_with_finite_differences_of_a_scaled_text() -> None:
    """Blowing up a whole text by (1 + h) leaves its codes as they are, so there the gradient is that of the value."""
    grid, h = Grid(4, False), 1e-3
    values = example()
    slope = (gradient_of(values, grid, "range") * values.detach()).sum((1, 2))
    with torch.no_grad():
        up, down = (differentiable_error(values * f, grid, "range") for f in (1 + h, 1 - h))
    torch.testing.assert_close(slope, (up - down) / (2 * h), rtol=1e-2, atol=1e-4)


# ---- interruptions and failures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [1, 3, 6])
def test_tuning_goes_on_from_a_checkpoint_bit_for_bit(tiny: Tiny, tmp_path: Path, stop: int) -> None:
    lm = tiny()
    whole = last(tuning(lm, settings()))
    states = tuning(lm, settings())
    *_, broken = itertools.islice(states, stop)
    scalars, tensors = broken.to_checkpoint()
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "checkpoint.safetensors")
    (tmp_path / "checkpoint.json").write_text(json.dumps(scalars), encoding="utf-8")
    states.close()
    saved = json.loads((tmp_path / "checkpoint.json").read_text(encoding="utf-8"))
    found = Prefix.from_tokens(lm.model, TOKENS, {"text": "kept"})
    resumed = TuningState.from_checkpoint(saved, load_file(tmp_path / "checkpoint.safetensors"), found)
    for _ in tuning(lm, settings(), state=resumed):
        pass
    assert without_seconds(resumed) == without_seconds(whole)
    assert same(resumed.prefix, whole.prefix) and same(resumed.best, whole.best)
    assert (resumed.best_step, resumed.best_loss, resumed.initial_loss) == (
        whole.best_step, whole.best_loss, whole.initial_loss,
    )  # fmt: skip
    assert resumed.best.metadata == {"text": "kept"}
    assert resumed.optimizer.keys() == whole.optimizer.keys()
    assert all(torch.equal(resumed.optimizer[key], whole.optimizer[key]) for key in whole.optimizer)


def test_loss_that_is_not_finite_keeps_the_last_good_prefix(tiny: Tiny) -> None:
    lm = tiny()
    linears = lm.linears()
    state = None
    with pytest.raises(TuningError, match=r"stopped at step \d.*the loss is .*lower tuning.learning_rate"):
        for state in tuning(lm, settings(learning_rate=1e37, warmup_steps=0)):  # noqa: B007 - the last one is wanted
            pass
    assert state is not None and len(state.steps) >= 1
    for prefix in (state.prefix, state.best):
        assert all(t.isfinite().all() for t in (*prefix.keys, *prefix.values))
    assert math.isfinite(state.best_loss)
    assert all(lm.linears()[name] is linear for name, linear in linears.items())  # the quantizer is off again


def test_broken_model_is_refused_before_the_first_step(tiny: Tiny) -> None:
    lm = tiny()
    found = Prefix.from_tokens(lm.model, TOKENS)
    lm.blocks[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(TuningError, match=r"the loss before tuning is nan: .*use model\.dtype=bfloat16 or float32"):
        next(tuning(lm, settings(), found=found))
    with pytest.raises(TuningError, match=r"L_q before tuning is nan: .*use model\.dtype=bfloat16 or float32"):
        next(tuning(lm, settings(reduction="relative"), found=found))


def test_gradient_clip_bounds_nothing_but_the_step(tiny: Tiny) -> None:
    free, clipped = (last(tuning(tiny(), settings(steps=1, gradient_clip=clip))) for clip in (None, 1e-6))
    assert free.steps[0].gradient_norm == clipped.steps[0].gradient_norm  # the norm on record is before clipping
    first = {name: state.optimizer["0.exp_avg"].norm() for name, state in (("free", free), ("clipped", clipped))}
    assert first["clipped"] <= 1e-7 < first["free"]


# ---- learning rate and batches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_learning_rate_warms_up_and_is_never_zero(schedule: str) -> None:
    for where in itertools.product((1, 6, 30), (0, 1, 5, 40)):
        steps, warmup = where
        config = settings(steps=steps, warmup_steps=warmup, schedule=schedule)
        optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
        factor = learning_rate_schedule(config, optimizer)
        factors = [factor(step) for step in range(steps)]
        assert all(0 < f <= 1 for f in factors), where
        rising = factors[:warmup]
        assert rising == pytest.approx([(step + 1) / warmup for step in range(len(rising))]), where
        falling = factors[max(warmup - 1, 0) :]
        assert falling == sorted(falling, reverse=True), where
        if schedule == "constant":
            assert set(falling) <= {1.0}, where
        elif len(falling) > 2:
            assert falling[-1] < 0.5, where


def test_learning_rate_on_record_is_the_one_used(tiny: Tiny) -> None:
    config = settings(steps=3, warmup_steps=3)
    states = tuning(tiny(), config, quantizer=NONE)
    found = Prefix.from_tokens(tiny().model, TOKENS)
    first = next(states)
    rate = first.steps[0].learning_rate
    assert rate == pytest.approx(config.learning_rate / 3)
    moved = (first.prefix.values[0] - found.values[0]).abs().max().item()
    assert moved == pytest.approx(rate, rel=1e-2)  # Adam's first step is the learning rate, whatever the gradient
    states.close()


@pytest.mark.parametrize("sequences", [5, 6])
def test_batches_pass_over_all_sequences_in_seeded_order(sequences: int) -> None:
    config = replace(settings(), batch_size=2)
    drawn = torch.cat([batch_indices(config, sequences, step, seed=3) for step in range(sequences)]).tolist()
    first, second = drawn[:sequences], drawn[sequences:]
    assert sorted(first) == sorted(second) == list(range(sequences))
    assert first != second
    assert drawn[:2] == batch_indices(config, sequences, 0, seed=3).tolist()
    other = torch.cat([batch_indices(config, sequences, step, seed=4) for step in range(sequences)]).tolist()
    assert drawn != other


# ---- numbers that are not finite, and half precision ----------------------------------------------------------------


@pytest.mark.parametrize("step", [0, 1])
def test_held_out_loss_that_is_not_finite_keeps_the_last_good_prefix(tiny: Tiny, step: int) -> None:
    """The texts of the failing step are well; what it leaves behind is not, and only the held-out texts show it."""
    lm = tiny()
    found = Prefix.from_tokens(lm.model, TOKENS)
    rates = {"learning_rate": 3e37, "warmup_steps": 0} if step == 0 else {"learning_rate": 1e-2, "warmup_steps": 0}
    config = settings(**rates, evaluate_every=1, steps=4)
    states = tuning(lm, config, found=found)
    state = None
    if step:
        state = next(states)
        kept = Prefix(state.best.token_ids, state.best.keys, state.best.values, tuned=state.best.tuned)
        states.close()
        states = tuning(lm, settings(learning_rate=3e37, warmup_steps=0, evaluate_every=1, steps=4), state, found=found)
    with pytest.raises(TuningError, match=rf"stopped at step {step}: the held-out loss is (nan|inf); lower tuning\."):
        list(states)
    if state is not None:
        assert len(state.steps) == step
        assert math.isfinite(state.best_loss) and same(state.best, kept)
    assert not any(p.requires_grad for p in lm.model.parameters())


def half_precision(lm: LanguageModel, dtype: torch.dtype, shrink: float) -> LanguageModel:
    """The model in a dtype, with the gradients of everything before lm_head made smaller by `shrink`."""
    lm.model.get_output_embeddings().weight.mul_(shrink)
    lm.model.to(dtype)
    return lm


@pytest.mark.parametrize("scaling", [1.0, 2.0**4, 2.0**10])
def test_scaled_loss_gives_the_gradients_of_the_plain_one(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, scaling: float
) -> None:
    monkeypatch.setattr(tuning_module, "HALF_PRECISION_SCALING", scaling)
    config = settings(steps=3, prediction_model="full_precision", lambda_q=0.0, gradient_clip=None)
    full = last(tuning(half_precision(tiny(), torch.float32, 1.0), config))
    half = last(tuning(half_precision(tiny(), torch.float16, 1.0), config))
    for one, other in zip(full.steps, half.steps, strict=True):
        assert other.gradient_norm == pytest.approx(one.gradient_norm, rel=0.02)
        assert other.loss == pytest.approx(one.loss, rel=0.01)


def test_scaling_keeps_gradients_that_half_precision_would_lose(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(steps=1, prediction_model="full_precision", lambda_q=0.0, gradient_clip=None)
    expected = last(tuning(half_precision(tiny(), torch.float32, 2e-3), config)).steps[0].gradient_norm
    scaled = last(tuning(half_precision(tiny(), torch.float16, 2e-3), config)).steps[0].gradient_norm
    assert scaled == pytest.approx(expected, rel=0.05)
    monkeypatch.setattr(tuning_module, "HALF_PRECISION_SCALING", 1.0)
    unscaled = last(tuning(half_precision(tiny(), torch.float16, 2e-3), config)).steps[0].gradient_norm
    assert abs(unscaled - expected) > 2 * abs(scaled - expected)


def test_a_clipped_step_is_clipped_after_the_scaling_is_taken_out(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = half_precision(tiny(), torch.float16, 1.0)
    config = settings(steps=2, prediction_model="full_precision", lambda_q=0.0, gradient_clip=1e3)
    prefixes = []
    for scaling in (1.0, 2.0**10):  # with the scaling left in, the second one would be clipped
        monkeypatch.setattr(tuning_module, "HALF_PRECISION_SCALING", scaling)
        prefixes.append(last(tuning(lm, config)).optimizer)
    for key, value in prefixes[0].items():
        torch.testing.assert_close(prefixes[1][key], value, rtol=0.1, atol=1e-4)
