"""A tiny llama with outliers planted where a test wants them: one token stands out, and its outliers go nowhere.

Channel 31 of the residual stream belongs to one token alone. Norms and gates blow it up at the input of the planted
linears, whose weights ignore it: the function is that of an ordinary model, and only a quantizer sees the outliers.
"""

from __future__ import annotations

import torch
from helpers import random_texts
from torch import Tensor, nn

from cushion.models import LanguageModel

TOKEN = 7
CHANNEL = 31
HIDDEN_CHANNEL = 5

GATES = "model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"
QUERIES = "model.layers.2.self_attn.q_proj", "model.layers.2.self_attn.k_proj", "model.layers.2.self_attn.v_proj"
DOWN = ("model.layers.0.mlp.down_proj",)
PLANTED = {*DOWN, *GATES, *QUERIES}
"""Three groups of linears, their ratios falling in the order DOWN, GATES, QUERIES."""


def plant(lm: LanguageModel) -> LanguageModel:
    """Plant outliers of `TOKEN` at the inputs of `PLANTED` and nowhere else. Changes `lm` and returns it."""
    plant_in(lm.model)
    return lm


@torch.no_grad()
def plant_in(model: nn.Module) -> None:
    """Plant the outliers in a tiny llama."""

    def weight(name: str) -> Tensor:
        return model.get_submodule(name).weight  # type: ignore[return-value]

    embeddings = weight("model.embed_tokens")
    embeddings[:, CHANNEL] = 0
    embeddings[TOKEN, CHANNEL] = embeddings[TOKEN].norm() / 4
    weight("lm_head")[:, CHANNEL] = 0
    weight("lm_head").mul_(3)  # a model that is sure of something, so that rounding can cost it something
    for block in range(3):
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            weight(f"model.layers.{block}.{name}")[CHANNEL] = 0
    for norm, factor, readers in (
        ("model.layers.1.post_attention_layernorm", 8000.0, GATES),
        ("model.layers.2.input_layernorm", 4000.0, QUERIES),
    ):
        weight(norm)[CHANNEL] = factor
        for name in readers:
            weight(name)[:, CHANNEL] = 0
    for name in ("gate_proj", "up_proj"):
        row = weight(f"model.layers.0.mlp.{name}")[HIDDEN_CHANNEL]
        row.zero_()
        row[CHANNEL] = 200.0
    weight(DOWN[0])[:, HIDDEN_CHANNEL] = 0


@torch.no_grad()
def own_texts(lm: LanguageModel, rows: int = 3, length: int = 24) -> Tensor:
    """Texts that the model itself goes on with, so that it predicts them well; `TOKEN` is the second one of each."""
    tokens = random_texts(rows, 6, seed=1)
    tokens[tokens == TOKEN] = TOKEN + 1
    tokens[:, 1] = TOKEN
    while tokens.shape[1] < length:
        scores = lm.model(tokens).logits[:, -1]
        scores[:, TOKEN] = -torch.inf
        tokens = torch.cat([tokens, scores.argmax(-1, keepdim=True)], dim=1)
    return tokens
