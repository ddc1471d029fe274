"""The search of alpha finds what a brute force over all thresholds finds, and goes on where it stopped."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import calibrated, random_texts
from planted_linears import PLANTED, own_texts, plant
from torch import Tensor, nn

from cushion.config import ActivationConfig, QFeMConfig, QuantizerConfig, WeightConfig
from cushion.errors import NotFiniteError
from cushion.evaluation.alpha_search import AlphaSearch, curve_numbers, per_token, search_alpha
from cushion.models import LanguageModel
from cushion.prefix import Prefix
from cushion.quantization.fitted import FittedQuantizer
from cushion.quantization.input_statistics import observe_fitted
from cushion.quantization.linear import QuantizedLinear
from cushion.quantization.qfem import ModuleRatios, RatioObserver

Tiny = Callable[..., LanguageModel]
EMPTY = Prefix.empty()
TARGETS = (0.5, 1.05, 2.0, 4.0, 7.0, 1e6)


def quantizer(qfem: QFeMConfig, **changes: Any) -> QuantizerConfig:
    activations = changes.pop("activations", ActivationConfig(bits=6, range="dynamic"))
    return QuantizerConfig(
        "under_test", weights=WeightConfig(granularity="per_channel"), activations=activations, qfem=qfem, **changes
    )


def ratios_of(lm: LanguageModel, texts: Tensor, config: QuantizerConfig, behind: Prefix = EMPTY) -> ModuleRatios:
    observer = RatioObserver()
    for _ in observe_fitted(lm, behind, texts, FittedQuantizer(config), [observer]):
        pass
    return observer.ratios()


@torch.no_grad()
def brute_force_perplexity(
    lm: LanguageModel, texts: Tensor, keep: list[str], token_wise: bool, static: bool = False
) -> float:
    """Perplexity of a copy of the model with rounded weights and hooks that round inputs; texts run without a cache."""
    model: Any = copy.deepcopy(lm.model)
    ranges: dict[str, float] = {}
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    linears = {name: module for name, module in linears.items() if "lm_head" not in name}
    if static:
        for name, module in linears.items():
            hook = lambda _m, args, n=name: ranges.update({n: max(ranges.get(n, 0.0), args[0].abs().max().item())})  # noqa: E731
            module.register_forward_pre_hook(hook)
        for text in texts:
            model(text[None])
        for module in linears.values():
            module._forward_pre_hooks.clear()
    for name, module in linears.items():
        step = (module.weight.abs().amax(1, keepdim=True) / 127).clamp(min=1e-30)
        module.weight.copy_(torch.round(module.weight / step) * step)
        if name in keep:
            continue

        def rounded(_module: nn.Module, args: tuple[Tensor], name: str = name) -> Tensor:
            (values,) = args
            top = values.abs().amax(-1, keepdim=True) if token_wise else values.abs().max()
            step = (torch.tensor(ranges[name]) if static and not token_wise else top) / 31
            step = step.clamp(min=1e-30)  # a token may be all zeros
            return torch.round(values / step).clamp(-31, 31) * step

        module.register_forward_pre_hook(rounded)
    losses = []
    for text in texts:
        scores = torch.log_softmax(model(text[None]).logits[0].double(), -1)
        losses += [-scores[position, text[position + 1]].item() for position in range(len(text) - 1)]
    return math.exp(sum(losses) / len(losses))


@pytest.fixture(scope="module")
def planted_model() -> tuple[LanguageModel, Tensor]:
    from cushion.config import ModelConfig, PathsConfig
    from cushion.models import load_language_model

    lm = plant(load_language_model(ModelConfig(path="tiny:llama"), PathsConfig()))
    return lm, own_texts(lm)


@pytest.mark.parametrize("static", [False, True])
def test_the_search_finds_what_a_brute_force_over_all_thresholds_finds(
    planted_model: tuple[LanguageModel, Tensor], static: bool
) -> None:
    lm, texts = planted_model
    activations = ActivationConfig(bits=6, range="static" if static else "dynamic")
    ratios = ratios_of(lm, texts, quantizer(QFeMConfig(), activations=activations))
    ranges = calibrated(lm, texts)
    alphas = ratios.thresholds()
    curve = [brute_force_perplexity(lm, texts, ratios.above(alpha), False, static) for alpha in alphas]
    reference = brute_force_perplexity(lm, texts, [], True)
    chosen = set()
    for target in TARGETS:
        config = quantizer(QFeMConfig(search=True, target=target), activations=activations)
        state = AlphaSearch()
        list(search_alpha(lm, EMPTY, FittedQuantizer(config, ranges), ratios, texts, state))
        assert state.reference == pytest.approx(reference, rel=1e-4)
        for number, value in state.points.items():
            assert value == pytest.approx(curve[number], rel=1e-4)
        within = [number for number, value in enumerate(curve) if value <= target * reference]
        assert state.reached == bool(within)
        # the largest alpha within the target; all linears where there is none
        assert state.found == (min(within) if within else len(alphas) - 1)
        assert len(state.points) <= 2 + math.ceil(math.log2(len(alphas)))
        chosen.add(state.found)
        if target == 1.05:
            assert set(ratios.above(alphas[state.found])) == PLANTED
    assert {0, 3, len(alphas) - 1} < chosen, "the targets lie on different sides of the planted thresholds"


def test_behind_a_prefix_the_same_search_runs_on_what_the_prefix_leaves(
    planted_model: tuple[LanguageModel, Tensor],
) -> None:
    lm, texts = planted_model
    behind = Prefix.from_tokens(lm.model, [17, 42])
    config = quantizer(QFeMConfig(search=True, target=1.1, curve=50))
    ratios, state = ratios_of(lm, texts, config, behind), AlphaSearch()
    list(search_alpha(lm, behind, FittedQuantizer(config), ratios, texts, state))
    assert sorted(state.points) == list(range(len(ratios.thresholds()))), "so long a curve has every point"
    assert state.found == min(number for number in state.points if state.within(number, 1.1))
    assert set(ratios.above(ratios.thresholds()[state.found])) == PLANTED
    assert state.contradictions(1.1) == []


@pytest.mark.parametrize("stop", [1, 3, 4, 7, 13])
def test_a_search_that_was_stopped_goes_on_with_the_next_point(
    planted_model: tuple[LanguageModel, Tensor], stop: int
) -> None:
    lm, texts = planted_model
    config = quantizer(QFeMConfig(search=True, curve=3))
    ratios = ratios_of(lm, texts, config)
    whole = AlphaSearch()
    steps = list(search_alpha(lm, EMPTY, FittedQuantizer(config), ratios, texts, whole))
    assert [done for done, _ in steps[:-1]] == list(range(1, len(steps)))
    assert all(done <= at_most == steps[-1][0] for done, at_most in steps)

    state, modules = AlphaSearch(), [id(module) for module in lm.model.modules()]
    broken = search_alpha(lm, EMPTY, FittedQuantizer(config), ratios, texts, state)
    for _ in range(stop):
        next(broken)
    broken.close()
    assert [id(module) for module in lm.model.modules()] == modules
    finished = stop // len(texts)  # whole points, the reference included
    assert len(state.points) + (state.reference is not None) == finished
    rest = list(search_alpha(lm, EMPTY, FittedQuantizer(config), ratios, texts, state))
    assert rest[0][0] == finished * len(texts) + 1
    assert len(rest) == len(steps) - finished * len(texts)
    assert state == whole


def test_points_that_contradict_the_assumption_are_named() -> None:
    points = {0: 9.0, 1: 1.0, 2: 5.0, 3: 1.0, 4: None, 5: 1.0}
    assert AlphaSearch(1.0, points, found=3, reached=True).contradictions(1.5) == [1, 4]
    assert AlphaSearch(1.0, {0: 9.0, 2: 1.2, 5: 2.0}, found=5, reached=False).contradictions(1.5) == [2]
    assert AlphaSearch(1.0, {0: 9.0, 5: 2.0}, found=5, reached=False).contradictions(1.5) == []


def test_a_quantizer_that_destroys_the_model_is_outside_every_target(tiny: Tiny) -> None:
    lm = tiny("llama")
    texts = random_texts(2, 12)
    config = quantizer(QFeMConfig(search=True, target=1e30))
    ratios = ratios_of(lm, texts, config)
    healthy = AlphaSearch()
    list(search_alpha(lm, EMPTY, FittedQuantizer(config), ratios, texts, healthy))
    assert healthy.found == 0
    assert healthy.within(0, 1e30)
    broken = AlphaSearch(healthy.reference, {0: None})  # the loss was not finite
    list(search_alpha(lm, EMPTY, FittedQuantizer(config), ratios, texts, broken))
    assert broken.found == 1
    lm.model.get_submodule("lm_head").weight.fill_(float("nan"))
    with pytest.raises(NotFiniteError, match="no finite perplexity"):
        list(search_alpha(lm, EMPTY, FittedQuantizer(config), ratios, texts, AlphaSearch()))
    assert not any(isinstance(module, QuantizedLinear) for module in lm.model.modules())


def test_the_reference_differs_in_the_scales_of_activations_alone() -> None:
    config = quantizer(QFeMConfig(search=True), activations=ActivationConfig(4, "per_tensor", "static", False))
    reference = per_token(config)
    assert reference.activations == ActivationConfig(4, "per_token", "dynamic", False)
    assert not reference.uses_qfem
    assert (reference.weights, reference.levels, reference.smoothing_alpha) == (config.weights, config.levels, None)
    assert config.uses_qfem, "the quantizer itself is left as it was"


def test_a_curve_reaches_from_none_to_all_and_is_denser_among_the_few() -> None:
    assert curve_numbers(210, 0) == []
    assert curve_numbers(210, 3) == [0, 4, 14, 55, 210]
    for last in (0, 1, 2, 13, 210):
        for points in (1, 5, 500):
            numbers = curve_numbers(last, points)
            assert numbers[0] == 0 and numbers[-1] == last
            assert numbers == sorted(set(numbers))
            assert len(numbers) <= points + 2
    assert curve_numbers(13, 500) == list(range(14))
