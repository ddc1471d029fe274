"""Mixtures of experts as linears: what transformers keeps in tensors of three dimensions, taken apart on loading.

Hooks, calibration, smoothing and quantizers work on `nn.Linear`; the replacement computes the same function with one
linear for each projection of each expert.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from cushion.errors import UnsupportedModelError


class Expert(nn.Module):
    """One gated MLP: `down(act(gate(x)) * up(x))`.

    Args:
        gate, up: (features -> intermediate).
        down: (intermediate -> features).
        activation: applied to the gate.

    """

    def __init__(self, gate: nn.Linear, up: nn.Linear, down: nn.Linear, activation: nn.Module | None) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate, up, down
        self.act_fn = activation

    def forward(self, values: Tensor) -> Tensor:
        """`values`: (tokens, features) -> (tokens, features)."""
        return cast(Tensor, self.down_proj(self.gated(self.gate_proj(values), self.up_proj(values))))

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        """What the down projection reads, from what the two others give; all of them (tokens, intermediate)."""
        return cast(Tensor, cast(nn.Module, self.act_fn)(gate) * up)


class ClampedExpert(Expert):
    """One gated MLP of gpt-oss: `down((up + 1) * gate * sigmoid(alpha * gate))`, of gate and up that are clamped.

    Args:
        gate, up, down: as those of `Expert`.
        alpha: slope of the sigmoid.
        limit: the gate is at most this, and the other factor, before 1 is added, no farther than this from 0.

    """

    def __init__(self, gate: nn.Linear, up: nn.Linear, down: nn.Linear, alpha: float, limit: float) -> None:
        super().__init__(gate, up, down, None)
        self.alpha, self.limit = alpha, limit

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        """What the down projection reads."""
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return (up + 1) * (gate * torch.sigmoid(gate * self.alpha))


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
    """The replacement of a fused module, sharing the memory of its weights where they are stored as a linear has them.

    Args:
        fused: has `gate_up_proj`, (experts, 2 * intermediate, features), and `down_proj`, (experts, features,
            intermediate), or both with their last two dimensions swapped (`is_transposed`); gate and up are halves
            (`is_concatenated`), or take turns; with or without `gate_up_proj_bias` and `down_proj_bias`; and either
            `act_fn`, as Mixtral's in transformers, or `alpha` and `limit`, as gpt-oss's.
        model: `model.path`, for the message.

    Raises:
        UnsupportedModelError: the module is built in another way, or its gate computes something else.

    """
    weights = [getattr(fused, name, None) for name in ("gate_up_proj", "down_proj")]
    biases = [getattr(fused, f"{name}_bias", None) for name in ("gate_up_proj", "down_proj")]
    known = {id(tensor) for tensor in (*weights, *biases)}
    strange = any(id(parameter) not in known for parameter in fused.parameters())
    strange |= getattr(fused, "has_post_expert_norm", False) or (biases[0] is None) != (biases[1] is None)
    if strange or not all(isinstance(tensor, Tensor) for tensor in weights):
        raise _unknown(fused, model)
    experts = [_expert(fused, index) for index in range(len(cast(Tensor, weights[0])))]
    if not (_fits(experts[0]) and _gates_alike(fused, experts[0])):
        raise _unknown(fused, model)
    return LinearExperts(experts).train(fused.training)


def _unknown(fused: nn.Module, model: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"model.path={model!r} has experts ({type(fused).__name__}) that this version of transformers stores in an "
        "unknown way: use a tested version (requirements/constraints.txt)"
    )


def _expert(fused: Any, index: int) -> Expert:
    def parts(tensor: Tensor) -> tuple[Tensor, ...]:
        """What belongs to the gate, and what to the other factor, of their common tensor of one expert."""
        return tensor.chunk(2) if getattr(fused, "is_concatenated", True) else (tensor[::2], tensor[1::2])

    def own(name: str) -> tuple[Tensor, Tensor | None]:
        weight, bias = getattr(fused, name).detach()[index], getattr(fused, f"{name}_bias", None)
        return weight.mT if getattr(fused, "is_transposed", False) else weight, bias if bias is None else bias[index]

    weight, bias = own("gate_up_proj")
    gate, up = map(_linear, parts(weight), (None, None) if bias is None else parts(bias.detach()))
    down = _linear(*own("down_proj"))
    if hasattr(fused, "act_fn"):
        return Expert(gate, up, down, fused.act_fn)
    return ClampedExpert(gate, up, down, fused.alpha, fused.limit)


def _fits(expert: Expert) -> bool:
    gate, down = expert.gate_proj, expert.down_proj
    return (gate.in_features, gate.out_features) == (down.out_features, down.in_features)


@torch.no_grad()
def _gates_alike(fused: Any, expert: Expert) -> bool:
    """Whether the replacement computes what the fused module does between the projections, tried on a few numbers."""
    if not hasattr(fused, "_apply_gate"):
        return True
    values = torch.linspace(-20, 20, 14)
    gate, up = values.chunk(2) if fused.is_concatenated else (values[::2], values[1::2])
    return torch.allclose(fused._apply_gate(values), expert.gated(gate, up))


def _linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.contiguous(), requires_grad=False)
    return linear
