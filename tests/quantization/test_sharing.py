"""Linears that read the very same tensor have it quantized once: the same bits and gradients, and nothing kept."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import calibrated, random_texts
from torch import Tensor

from cushion.config import ActivationConfig, QuantizerConfig, WeightConfig
from cushion.models import LanguageModel
from cushion.prefix import Prefix
from cushion.quantization import linear
from cushion.quantization.linear import ActivationQuantizer, QuantizedLinear
from cushion.quantization.numerics import Grid
from cushion.quantization.simulate import quantized

Tiny = Callable[..., LanguageModel]
SHARING = ("llama", "opt", "mixtral", "falcon")
ALONE = ("bloom", "gpt_neox")
GRANULARITIES = {
    "static": ActivationConfig(),
    "per_tensor": ActivationConfig(range="dynamic"),
    "per_token": ActivationConfig(granularity="per_token", range="dynamic", symmetric=False),
}


def quantizer(granularity: str, **changes: Any) -> QuantizerConfig:
    return QuantizerConfig("under_test", WeightConfig(), GRANULARITIES[granularity], **changes)


def quantizers(lm: LanguageModel) -> dict[str, ActivationQuantizer]:
    """The activation quantizers on the model by the full name of their linear."""
    modules = dict(lm.model.named_modules())
    found = {name: module.activation for name, module in modules.items() if isinstance(module, QuantizedLinear)}
    return {name: quantizer for name, quantizer in found.items() if quantizer is not None}


def unshare(lm: LanguageModel) -> None:
    """Let every linear quantize its own input, as the definition has it."""
    for one in quantizers(lm).values():
        one.readers = 1


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[weakref.ref[Tensor]]]:
    """References, which keep nothing alive, to all that is quantized by linears."""
    made: list[weakref.ref[Tensor]] = []
    original = linear.fake_quantize

    def noted(*args: Any) -> Tensor:
        result = original(*args)
        made.append(weakref.ref(result))
        return result

    monkeypatch.setattr(linear, "fake_quantize", noted)
    yield made


@pytest.mark.parametrize("family", SHARING + ALONE)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@torch.no_grad()
def test_logits_are_those_of_quantizing_for_every_linear_and_nothing_is_kept(
    tiny: Tiny, results: list[weakref.ref[Tensor]], family: str, granularity: str
) -> None:
    lm, texts = tiny(family), random_texts(2, 24)
    ranges = calibrated(lm, torch.cat([random_texts(2, 24, seed=1), random_texts(2, 24, seed=2)]))
    gc.disable()  # what is released is released at once, by its count of references
    try:
        with quantized(lm, quantizer(granularity), ranges):
            shared = lm.model(texts).logits
            fewer = len(results)
            assert fewer and all(result() is None for result in results)
            again = lm.model(texts).logits
            unshare(lm)
            expected = lm.model(texts).logits
            every = len(results) - 2 * fewer
    finally:
        gc.enable()
    assert torch.equal(shared, expected) and torch.equal(again, expected)
    assert fewer < every if family in SHARING else fewer == every
    if family in ("llama", "opt"):
        spared = {"llama": 3, "opt": 2}[family]  # of 7 (q, k, v, o, gate, up, down) and 6 (q, k, v, out, fc1, fc2)
        assert every - fewer == spared * len(lm.blocks)


@pytest.mark.parametrize("family", SHARING + ALONE)
@pytest.mark.parametrize("granularity", ["per_tensor", "per_token"])
def test_gradients_are_bit_equal_and_no_result_is_kept_after_the_backward_pass(
    tiny: Tiny, results: list[weakref.ref[Tensor]], family: str, granularity: str
) -> None:
    lm, texts = tiny(family), random_texts(2, 24)
    found = Prefix.from_tokens(lm.model, [1, 2, 3])

    def pass_() -> tuple[Tensor, list[Tensor]]:
        leaves = [tensor.clone().requires_grad_() for tensor in (*found.keys, *found.values)]
        prefix = replace(found, keys=tuple(leaves[:3]), values=tuple(leaves[3:]))
        logits = lm.model(texts, past_key_values=prefix.cache(lm.model, len(texts)), use_cache=True).logits
        logits.square().mean().backward()
        assert all(leaf.grad is not None for leaf in leaves)
        return logits.detach(), [leaf.grad for leaf in leaves if leaf.grad is not None]

    with quantized(lm, quantizer(granularity), straight_through=True):
        shared, gradients = pass_()
        fewer = len(results)
        gc.collect()
        assert fewer and all(result() is None for result in results)
        unshare(lm)
        expected, expected_gradients = pass_()
        every = len(results) - fewer
    assert torch.equal(shared, expected)
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected_gradients, strict=True))
    assert any(gradient.abs().max() > 0 for gradient in gradients)
    assert fewer < every if family in SHARING else fewer == every


def pair() -> tuple[ActivationQuantizer, Tensor]:
    """A quantizer with two readers, and something to quantize."""
    one = ActivationQuantizer(Grid(8, True), "per_token")
    others: list[ActivationQuantizer] = []
    assert one.shared_with(others) is one
    assert ActivationQuantizer(Grid(8, True), "per_token").shared_with(others) is one
    return one, torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_an_input_changed_in_place_between_two_readers_is_quantized_again() -> None:
    shared, values = pair()
    before = shared(values)
    values.mul_(3)
    alone = ActivationQuantizer(Grid(8, True), "per_token")
    assert torch.equal(shared(values), alone(values)) and not torch.equal(shared(values), before)
    shared, values = pair()
    shared(values)
    values[0].add_(1)  # through a view
    assert torch.equal(shared(values), alone(values))


@torch.no_grad()
def test_the_second_reader_gets_the_first_ones_result_and_the_third_a_new_one() -> None:
    shared, values = pair()
    first, second, third = shared(values), shared(values), shared(values)
    assert first is second and third is not first
    assert torch.equal(first, third)


@torch.no_grad()
def test_a_result_that_not_all_have_read_goes_with_its_input() -> None:
    shared, values = pair()
    result = weakref.ref(shared(values))
    assert result() is not None
    del values
    assert result() is None


@torch.no_grad()
def test_another_tensor_with_the_same_values_is_no_reason_to_share() -> None:
    shared, values = pair()
    first = weakref.ref(shared(values))
    assert shared(values.clone()) is not first()
    assert first() is None, "the last input alone is kept"


def test_tensors_of_inference_mode_are_quantized_for_every_reader() -> None:
    shared, values = pair()
    with torch.inference_mode():
        own = values.clone()
        first = shared(own)
        own.mul_(3)
        assert torch.equal(shared(own), ActivationQuantizer(Grid(8, True), "per_token")(own))
        assert not torch.equal(shared(own), first)


def test_ranges_grids_or_granularities_that_differ_are_never_shared() -> None:
    grid, others = Grid(8, True), list[ActivationQuantizer]()
    low, high = torch.tensor(-1.0), torch.tensor(2.0)
    different = [
        ActivationQuantizer(grid, "per_tensor"),
        ActivationQuantizer(grid, "per_token"),
        ActivationQuantizer(Grid(7, True), "per_tensor"),
        ActivationQuantizer(Grid(8, True, "paper"), "per_tensor"),
        ActivationQuantizer(grid, "per_tensor", None, straight_through=True),
        ActivationQuantizer(grid, "per_tensor", (low, high)),
        ActivationQuantizer(grid, "per_tensor", (low, high * 1.0001)),
        ActivationQuantizer(Grid(8, False), "per_tensor", (low, high)),
        ActivationQuantizer(Grid(8, False), "per_tensor", (low * 1.0001, high)),
    ]
    assert [one.shared_with(others) for one in different] == different
    assert all(one.readers == 1 for one in different)
    same = ActivationQuantizer(grid, "per_tensor", (low.clone(), high.clone()))
    assert same.shared_with(others) is different[5] and different[5].readers == 2


def test_a_linear_that_is_kept_or_no_target_is_no_reader(tiny: Tiny) -> None:
    lm = tiny("llama")
    block = "model.layers.1"
    with quantized(lm, quantizer("per_tensor"), keep=frozenset({f"{block}.self_attn.q_proj", f"{block}.mlp.up_proj"})):
        found = quantizers(lm)
    assert f"{block}.self_attn.q_proj" not in found
    assert found[f"{block}.self_attn.k_proj"] is found[f"{block}.self_attn.v_proj"]
    assert found[f"{block}.self_attn.k_proj"].readers == 2
    assert found[f"{block}.mlp.gate_proj"].readers == 1
    assert found["model.layers.0.self_attn.q_proj"].readers == 3
    with quantized(lm, quantizer("per_tensor", targets=["q_proj", "down_proj"])):
        assert all(one.readers == 1 for one in quantizers(lm).values())


def test_siblings_of_a_model_whose_static_ranges_differ_are_not_shared(tiny: Tiny) -> None:
    lm = tiny("llama")
    ranges = calibrated(lm, torch.cat([random_texts(2, 24, seed=1), random_texts(2, 24, seed=2)]))
    ranges.maximum["model.layers.0.self_attn.k_proj"] = ranges.maximum["model.layers.0.self_attn.k_proj"] + 100
    with quantized(lm, quantizer("static"), ranges):
        found = quantizers(lm)
    q, k, v = (found[f"model.layers.0.self_attn.{leaf}_proj"] for leaf in "qkv")
    assert q is v and q.readers == 2
    assert k is not q and k.readers == 1


@pytest.mark.parametrize("exception", [KeyboardInterrupt, RuntimeError])
@torch.no_grad()
def test_a_pass_that_stops_halfway_keeps_nothing_and_leaves_the_next_one_right(
    tiny: Tiny, results: list[weakref.ref[Tensor]], exception: type[BaseException]
) -> None:
    lm, texts = tiny("llama"), random_texts(2, 24)

    def stop(*_: Any) -> None:
        raise exception

    with quantized(lm, quantizer("per_tensor")):
        expected = lm.model(texts).logits
        handle = lm.model.get_submodule("model.layers.1.self_attn.k_proj").register_forward_pre_hook(stop)
        with pytest.raises(exception):
            lm.model(texts)
        handle.remove()
        gc.collect()
        assert all(result() is None for result in results)
        assert torch.equal(lm.model(texts).logits, expected)
