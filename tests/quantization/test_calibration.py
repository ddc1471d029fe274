"""Calibration: the ranges against plain forward passes without a cache, and what the prefix may do to them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import UNLIKE
from helpers import calibrated, random_texts
from torch import Tensor, nn

from cushion.activations import ChannelRanges
from cushion.errors import CalibrationError
from cushion.models import LanguageModel
from cushion.prefix import Prefix
from cushion.quantization.calibration import calibrate

Tiny = Callable[..., LanguageModel]
PLANTED = 200
"""A token that no text contains unless it is put there."""


def recomputed(lm: LanguageModel, texts: Tensor, prefix_ids: list[int]) -> dict[str, tuple[Tensor, Tensor]]:
    """Ranges by name from whole forward passes over [prefix, text], the prefix's positions cut off afterwards."""
    seen: dict[str, list[Tensor]] = {}
    positions: dict[str, list[Tensor]] = {}  # which tokens an expert sees is what the router says
    blocks = lm.architecture.blocks
    handles = []

    def route(name: str, output: tuple[Tensor, ...]) -> None:
        for expert in range(lm.model.config.num_local_experts):
            chosen = (output[-1] == expert).any(1).nonzero()[:, 0]
            positions.setdefault(name.removesuffix("gate") + f"experts.{expert}.", []).append(chosen)

    for name, module in lm.model.named_modules():
        if name.endswith("mlp.gate"):
            handles.append(module.register_forward_hook(lambda _m, _a, output, name=name: route(name, output)))
        if isinstance(module, nn.Linear) and name.startswith(blocks + "."):
            handles.append(
                module.register_forward_pre_hook(lambda _m, args, name=name: seen.setdefault(name, []).append(args[0]))
            )
    with torch.no_grad():
        for text in texts:
            lm.model(torch.cat([torch.tensor(prefix_ids, dtype=torch.long), text])[None], use_cache=False)
    for handle in handles:
        handle.remove()
    following = {}
    for name, calls in seen.items():
        rows = [values.reshape(-1, values.shape[-1]) for values in calls]
        routed = [tokens for tokens in positions.get(name.rpartition(".")[0] + ".", []) if len(tokens)]
        where = routed or [torch.arange(len(values)) for values in rows]
        kept = [values[tokens >= len(prefix_ids)] for values, tokens in zip(rows, where, strict=True)]
        following[name] = torch.cat(kept)
    return {name: (values.amin(0), values.amax(0)) for name, values in following.items()}


def plant_outlier(lm: LanguageModel, channel: int = 7) -> None:
    """Channel `channel` of the embeddings is silent for every token but PLANTED, and the first norm amplifies it."""
    lm.embeddings[:, channel] = 0
    lm.embeddings[PLANTED, channel] = 1000
    norm_name, _ = lm.architecture.smoothing[0]
    lm.blocks[0].get_submodule(norm_name).weight[channel] = 50


@pytest.mark.parametrize("family", UNLIKE)
@pytest.mark.parametrize("prefix_ids", [[], [PLANTED, 5]], ids=["no_prefix", "prefix"])
def test_ranges_are_those_of_plain_forward_passes(tiny: Tiny, family: str, prefix_ids: list[int]) -> None:
    lm, texts = tiny(family), random_texts(3, 20, below=PLANTED)
    ranges = calibrated(lm, texts, Prefix.from_tokens(lm.model, prefix_ids))
    expected = recomputed(lm, texts, prefix_ids)
    assert set(ranges.minimum) == set(ranges.maximum) == set(expected) == set(lm.linears())
    assert not any("lm_head" in name for name in expected)
    for name, (low, high) in expected.items():
        torch.testing.assert_close(ranges.minimum[name], low, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ranges.maximum[name], high, rtol=1e-4, atol=1e-5)


def test_an_outlier_in_the_prefix_enters_no_range_but_in_the_text_it_does(tiny: Tiny) -> None:
    lm, texts = tiny("llama"), random_texts(3, 20, below=PLANTED)
    plant_outlier(lm)
    inputs_of_the_norm = [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]
    without = calibrated(lm, texts)
    behind = calibrated(lm, texts, Prefix.from_tokens(lm.model, [PLANTED]))
    inside = texts.clone()
    inside[1, 0] = PLANTED
    within = calibrated(lm, inside)
    for name in inputs_of_the_norm:
        # the inputs of the first block's attention depend on the token alone: behind the prefix they are the very same
        assert torch.equal(behind.minimum[name], without.minimum[name])
        assert torch.equal(behind.maximum[name], without.maximum[name])
        assert behind.maximum[name][7] == 0
        assert within.maximum[name][7] > 200
    expected = recomputed(lm, texts, [PLANTED])
    for name, (low, high) in expected.items():  # deeper down the prefix acts through attention, and only so
        torch.testing.assert_close(behind.minimum[name], low, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(behind.maximum[name], high, rtol=1e-4, atol=1e-5)


def test_more_text_only_widens_and_the_order_does_not_matter(tiny: Tiny) -> None:
    lm, texts = tiny("llama"), random_texts(6, 20, below=PLANTED)
    some, more, backwards = (calibrated(lm, rows) for rows in (texts[:2], texts, texts.flip(0)))
    widened = False
    for name in lm.linears():
        assert (more.minimum[name] <= some.minimum[name]).all()
        assert (more.maximum[name] >= some.maximum[name]).all()
        widened = widened or bool((more.maximum[name] > some.maximum[name]).any())
        assert torch.equal(more.minimum[name], backwards.minimum[name])
        assert torch.equal(more.maximum[name], backwards.maximum[name])
    assert widened


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_activations_that_are_not_finite_are_an_error_that_names_the_linear(tiny: Tiny, value: float) -> None:
    lm, texts = tiny("llama"), random_texts(3, 20, below=PLANTED)
    lm.embeddings[PLANTED, 3] = value
    calibrated(lm, texts)  # the token does not occur
    texts[1, 4] = PLANTED
    with pytest.raises(
        CalibrationError, match=r"the input of model\.layers\.0\.self_attn\.q_proj is not finite.*model\.dtype"
    ):
        calibrated(lm, texts)


def test_overflow_deep_inside_is_found_too(tiny: Tiny) -> None:
    lm = tiny("llama")
    lm.blocks[2].get_submodule("mlp.up_proj").weight.mul_(1e20)
    lm.blocks[2].get_submodule("mlp.gate_proj").weight.mul_(1e20)
    with pytest.raises(CalibrationError, match=r"the input of model\.layers\.2\.mlp\.down_proj is not finite"):
        calibrated(lm, random_texts(3, 20, below=PLANTED))


@pytest.mark.parametrize("side", ["minimum", "maximum"])
def test_one_side_of_a_range_that_is_not_finite_is_enough(tiny: Tiny, side: str) -> None:
    lm, ranges = tiny("llama"), ChannelRanges()
    list(calibrate(lm, Prefix.empty(), random_texts(3, 20, below=PLANTED), ranges))
    getattr(ranges, side)["model.layers.1.mlp.up_proj"][4] = float("-inf") if side == "minimum" else float("inf")
    with pytest.raises(CalibrationError, match=r"model\.layers\.1\.mlp\.up_proj is not finite"):
        list(calibrate(lm, Prefix.empty(), random_texts(3, 20, seed=1, below=PLANTED), ranges))


def test_between_two_texts_the_callers_gradients_and_the_model_are_as_ever(tiny: Tiny) -> None:
    lm, texts = tiny("llama"), random_texts(3, 20, below=PLANTED)
    before = [parameter.clone() for parameter in lm.model.parameters()]
    prefix = Prefix.from_tokens(lm.model, [1, 2])
    keys = prefix.keys[0].clone()
    steps = calibrate(lm, prefix, texts, ChannelRanges())
    for _ in steps:
        assert torch.is_grad_enabled()
        assert not any(module._forward_pre_hooks for module in lm.model.modules())
    assert torch.equal(prefix.keys[0], keys), "the prefix is the same for every text"
    assert all(torch.equal(new, old) for new, old in zip(lm.model.parameters(), before, strict=True))


def test_hooks_are_gone_after_a_failure(tiny: Tiny) -> None:
    lm = tiny("llama")
    texts = random_texts(3, 20, below=PLANTED)
    texts[1, 3] = 10_000  # outside the table of embeddings
    with pytest.raises(IndexError):
        calibrated(lm, texts)
    assert not any(module._forward_pre_hooks for module in lm.model.modules())
