"""Models with planted spikes: a tiny llama in which chosen tokens, and no others, blow up one linear's input."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

MODULE = "model.layers.1.mlp.down_proj"
"""The linear whose input the planted tokens blow up."""

CHANNEL, MEMORY, SINK = 30, 29, 28
"""Channels of the residual stream that mark the spike tokens, hold what was seen of them, and mark BOS."""

UNIT = 7
"""The unit of the feed-forward part that spikes."""


@torch.no_grad()
def plant_spikes(model: nn.Module, tokens: dict[int, float]) -> None:
    """Let each token blow up the input of `MODULE` wherever it stands, in proportion to its value.

    One channel of the residual stream is kept for the spike tokens; one unit of the second block multiplies it with
    itself.
    """
    root = cast(Any, model)
    _reserve(root, CHANNEL)
    for token, strength in tokens.items():
        root.model.embed_tokens.weight[token, CHANNEL] = strength
    mlp = root.model.layers[1].mlp
    for linear in (mlp.gate_proj, mlp.up_proj):
        linear.weight[UNIT] = 0.0
        linear.weight[UNIT, CHANNEL] = 40.0


@torch.no_grad()
def plant_first_spike(model: nn.Module, token: int, bos: int = 256) -> None:
    """Let `token` blow up the input of `MODULE` at its first occurrence behind BOS, and at no later one.

    One head of the first block lets the token look for BOS and for itself: a half of its attention is on tokens like
    itself at the first occurrence, two thirds at the second one. The share is written to a channel of its own, and the
    spiking unit is open below 4/7.
    """
    root = cast(Any, model)
    for channel in (CHANNEL, MEMORY, SINK):
        _reserve(root, channel)
    embedding = root.model.embed_tokens.weight
    for marked, channel in ((token, CHANNEL), (bos, SINK)):
        embedding[marked] = 0.0
        embedding[marked, channel] = 4.0
    attention, slow, value = root.model.layers[0].self_attn, 3, 0  # the pair of features that rotates least
    root.model.layers[0].input_layernorm.weight[[CHANNEL, SINK]] = 1.0
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
        projection.weight[:8] = 0.0
    attention.q_proj.weight[slow, CHANNEL] = 2.0
    attention.k_proj.weight[slow, [CHANNEL, SINK]] = 2.0
    attention.v_proj.weight[value, CHANNEL] = 1.0
    attention.o_proj.weight[MEMORY] = 0.0
    attention.o_proj.weight[MEMORY, value] = 4.0 / 32**0.5  # the share of the attention, times 4
    block = root.model.layers[1]
    block.post_attention_layernorm.weight[[CHANNEL, MEMORY]] = 1.0
    block.mlp.gate_proj.weight[UNIT] = 0.0
    block.mlp.gate_proj.weight[UNIT, CHANNEL], block.mlp.gate_proj.weight[UNIT, MEMORY] = 160.0, -280.0
    block.mlp.up_proj.weight[UNIT] = 0.0
    block.mlp.up_proj.weight[UNIT, CHANNEL] = 40.0


def _reserve(root: Any, channel: int) -> None:
    """Take a channel of the residual stream away from every token and every block."""
    root.model.embed_tokens.weight[:, channel] = 0.0
    for block in root.model.layers:
        block.self_attn.o_proj.weight[channel] = 0.0
        block.mlp.down_proj.weight[channel] = 0.0
