"""Mixtures of experts as linears: what transformers keeps in tensors of three dimensions, taken apart on loading.

Hooks, calibration, smoothing and quantizers work on `nn.Linear`; the replacement computes the same function with one
linear for each projection of each expert.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from cushion.errors import UnsupportedModelError


class Expert(nn.Module):
    """One gated MLP: `down(act(gate(x)) * up(x))`.

    Args:
        gate, up: weights, (intermediate, features).
        down: weight, (features, intermediate).
        activation: applied to the gate.

    """

    def __init__(self, gate: Tensor, up: Tensor, down: Tensor, activation: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = _linear(gate), _linear(up), _linear(down)
        self.act_fn = activation

    def forward(self, values: Tensor) -> Tensor:
        """`values`: (tokens, features) -> (tokens, features)."""
        return cast(Tensor, self.down_proj(self.act_fn(self.gate_proj(values)) * self.up_proj(values)))


class LinearExperts(nn.ModuleList):
    """Experts 0, 1, ... in place of a fused module of transformers: called alike, computing the same.

    An expert that no token is routed to is not run, so its linears see no input.
    """

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Send every token through its experts and add up what they return.

        Args:
            hidden_states: (tokens, features).
            top_k_index: the experts of each token, (tokens, k), without repetition.
            top_k_weights: the weight of each of them, (tokens, k).

        Returns:
            (tokens, features), in the dtype of `hidden_states`.

        """
        result = torch.zeros_like(hidden_states)
        for index in top_k_index.unique().tolist():
            tokens, position = torch.where(top_k_index == index)
            output = self[index](hidden_states[tokens]) * top_k_weights[tokens, position, None]
            result.index_add_(0, tokens, output.to(result.dtype))
        return result


def with_linear_experts(fused: nn.Module, model: str) -> LinearExperts:
    """The replacement of a fused module, sharing the memory of its weights.

    Args:
        fused: has `gate_up_proj`, (experts, 2 * intermediate, features), with the gate in the first half, `down_proj`,
            (experts, features, intermediate), and `act_fn`, without biases, as Mixtral's in transformers.
        model: `model.path`, for the message.

    Raises:
        UnsupportedModelError: the module is built in another way.

    """
    gate_up, down = getattr(fused, "gate_up_proj", None), getattr(fused, "down_proj", None)
    biased = any("bias" in name for name, _ in fused.named_parameters())
    swapped = getattr(fused, "is_transposed", False) or not getattr(fused, "is_concatenated", True)
    if not (isinstance(gate_up, Tensor) and isinstance(down, Tensor)) or biased or swapped:
        raise UnsupportedModelError(
            f"model.path={model!r} has experts ({type(fused).__name__}) that this version of transformers stores in an "
            "unknown way: use a tested version (requirements/constraints.txt)"
        )
    halves = [part.chunk(2, dim=0) for part in gate_up.detach()]
    activation = cast(nn.Module, fused.act_fn)
    experts = [Expert(gate, up, part, activation) for (gate, up), part in zip(halves, down.detach(), strict=True)]
    return LinearExperts(experts).train(fused.training)


def _linear(weight: Tensor) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear
