"""Experts as linears: the same function and gradients as the fused module, and its weights, not copies of them."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from conftest import EXPERTS
from helpers import random_texts
from torch import Tensor, nn

from cushion.config import ModelConfig, PathsConfig
from cushion.errors import UnsupportedModelError
from cushion.models import load_language_model
from cushion.models.experts import LinearExperts, with_linear_experts
from cushion.models.tiny import tiny_model

NUMBER, CHOSEN, FEATURES = 4, 2, 32


def fused_experts() -> Any:
    return tiny_model("mixtral").get_submodule("model.layers.1.mlp.experts")


def routed(tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, the experts of each token and their weights."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, NUMBER, generator=generator).topk(CHOSEN)
    return torch.randn(tokens, FEATURES, generator=generator), scores.indices, scores.values


def by_hand(fused: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Token by token and expert by expert, from the fused tensors."""
    rows = []
    for token, experts, shares in zip(hidden, index.tolist(), weights, strict=True):
        row = torch.zeros_like(token)
        for expert, share in zip(experts, shares, strict=True):
            gate, up = (fused.gate_up_proj[expert] @ token).chunk(2)
            row = row + share * (fused.down_proj[expert] @ (fused.act_fn(gate) * up))
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("tokens", [1, 3, 50])
def test_linear_experts_compute_what_the_fused_ones_do(tokens: int) -> None:
    fused, inputs = fused_experts(), routed(tokens)
    linear = with_linear_experts(fused, "me/mine")
    expected = by_hand(fused, *inputs)
    assert expected.abs().max() > 1e-2
    for module in (linear, fused):
        torch.testing.assert_close(module(*inputs), expected, rtol=1e-4, atol=1e-5)


def test_weights_are_shared_and_called_by_what_they_are() -> None:
    fused = fused_experts()
    linear = with_linear_experts(fused, "me/mine")
    half = fused.gate_up_proj.shape[1] // 2
    for index in range(NUMBER):
        parts = dict(linear.get_submodule(str(index)).named_children())
        assert [name for name, m in parts.items() if isinstance(m, nn.Linear)] == ["gate_proj", "up_proj", "down_proj"]
        for name, expected in (
            ("gate_proj", fused.gate_up_proj[index, :half]),
            ("up_proj", fused.gate_up_proj[index, half:]),
            ("down_proj", fused.down_proj[index]),
        ):
            own = cast(nn.Linear, parts[name])
            assert torch.equal(own.weight, expected) and own.weight.data_ptr() == expected.data_ptr()
            assert (own.out_features, own.in_features) == tuple(expected.shape)


@torch.no_grad()
def test_the_experts_of_gpt_oss_take_turns_and_are_clamped() -> None:
    """Features first, gate and up by turns, with biases: at values that reach the limits."""
    fused: Any = tiny_model("gpt_oss").get_submodule("model.layers.1.mlp.experts")
    linear, (hidden, index, weights) = with_linear_experts(fused, "me/mine"), routed(20)
    hidden, limit = 20 * hidden, fused.limit
    expected, reached = torch.zeros_like(hidden), torch.zeros(2, dtype=torch.bool)
    for token, (experts, shares) in enumerate(zip(index.tolist(), weights, strict=True)):
        for expert, share in zip(experts, shares, strict=True):
            both = hidden[token] @ fused.gate_up_proj[expert] + fused.gate_up_proj_bias[expert]
            gate, up = both[0::2], both[1::2]
            reached |= torch.stack([(gate > limit).any(), (up.abs() > limit).any()])
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
            between = (up + 1) * gate * torch.sigmoid(fused.alpha * gate)
            expected[token] += share * (between @ fused.down_proj[expert] + fused.down_proj_bias[expert])
    assert reached.all()
    for module in (linear, fused):
        torch.testing.assert_close(module(hidden, index, weights), expected, rtol=1e-4, atol=1e-3)


def test_gradients_pass_to_hidden_states_and_router() -> None:
    fused, (hidden, index, weights) = fused_experts(), routed(9)
    gradients = []
    for call in (with_linear_experts(fused, "me/mine"), lambda *inputs: by_hand(fused, *inputs)):
        leaves = [hidden.clone().requires_grad_(), weights.clone().requires_grad_()]
        call(leaves[0], index, leaves[1]).square().sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5)


def test_an_expert_without_tokens_is_not_run() -> None:
    linear, (hidden, index, weights) = with_linear_experts(fused_experts(), "me/mine"), routed(5)
    seen: list[tuple[int, int]] = []
    for number, expert in enumerate(linear):
        expert.register_forward_hook(lambda _m, args, _o, number=number: seen.append((number, len(args[0]))))
    linear(hidden, index.clamp(max=1).fill_(1)[:, :1], weights[:, :1])
    assert seen == [(1, 5)]


@pytest.mark.parametrize(
    ("family", "implementation", "dtype"),
    [
        *((family, "eager", "float32") for family in EXPERTS),
        ("mixtral", "batched_mm", "float32"),
        ("mixtral", "grouped_mm", "float32"),
        ("mixtral", "eager", "bfloat16"),
    ],
)
@torch.no_grad()
def test_a_loaded_model_is_the_one_that_transformers_makes(family: str, implementation: str, dtype: str) -> None:
    """In half precision another order of additions sends some tokens to other experts: compared in the same order."""
    ids = random_texts(2, 12)
    plain: Any = cast(Any, tiny_model(family)).to(getattr(torch, dtype)).eval()
    plain.set_experts_implementation(implementation)
    lm = load_language_model(ModelConfig(path=f"tiny:{family}", dtype=dtype), PathsConfig())
    assert sum(isinstance(module, LinearExperts) for module in lm.model.modules()) == 3
    assert sum(p.numel() for p in lm.model.parameters()) == sum(p.numel() for p in plain.parameters())
    torch.testing.assert_close(lm.model(ids).logits, plain(ids).logits, rtol=0, atol=1e-4)


class Odd(nn.Module):
    """A module that passes for fused experts but for what is changed."""

    def __init__(self, **changes: Any) -> None:
        super().__init__()
        tensors = {"gate_up_proj": torch.zeros(2, 8, 4), "down_proj": torch.zeros(2, 4, 4)}
        for name, value in {**tensors, "act_fn": nn.SiLU(), **changes}.items():
            setattr(self, name, nn.Parameter(value) if isinstance(value, Tensor) else value)


def test_experts_of_another_make_are_refused_by_name() -> None:
    assert len(with_linear_experts(Odd(), "me/mine")) == 2
    for changes in (
        {"down_proj": None},
        {"gate_up_proj": nn.ModuleList()},
        {"gate_up_proj_bias": torch.zeros(2, 8)},
        {"router": torch.zeros(2, 4)},
        {"is_transposed": True},
        {"has_post_expert_norm": True},
        {"_apply_gate": lambda values: values.chunk(2)[0], "is_concatenated": True},
    ):
        with pytest.raises(UnsupportedModelError, match=r"model\.path='me/mine' has experts \(Odd\)"):
            with_linear_experts(Odd(**changes), "me/mine")


def test_a_fused_module_is_left_as_it_was() -> None:
    fused = fused_experts()
    before = {name: (id(p), p.clone()) for name, p in fused.named_parameters()}
    with_linear_experts(fused, "me/mine")(*routed(4))
    assert {name: id(p) for name, p in fused.named_parameters()} == {name: i for name, (i, _) in before.items()}
    assert all(torch.equal(p, before[name][1]) for name, p in fused.named_parameters())
