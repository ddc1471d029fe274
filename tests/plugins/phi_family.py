"""A model family in one file: Phi-1, Phi-1.5 and Phi-2, with a tiny model of it to try a configuration on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cushion.models.architectures import Architecture, ResidualStream, register

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def tiny() -> PreTrainedConfig:
    """The configuration of `model.path=tiny:phi`: the sizes of Cushion's own tiny models."""
    from transformers import PhiConfig  # imports torch: only here

    return PhiConfig(
        vocab_size=260,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=258,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=256,
    )


register(
    Architecture(
        model_type="phi",
        blocks="model.layers",
        smoothing=(  # attention and MLP side by side behind one norm
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1")),
        ),
        down_projection="mlp.fc2",
        residual=ResidualStream(
            embeddings=("model.embed_tokens",),
            final_norm="model.final_layernorm",
            writers=("self_attn.dense", "mlp.fc2"),
        ),
        tiny=tiny,
    )
)
