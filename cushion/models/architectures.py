"""The architecture table: where the decoder blocks, their linears and the norms before them are. Data, no code.

A new family is one entry here and one row in `tests/models/test_architectures.py`; docs/extending.md walks through it.
"""

from __future__ import annotations

from dataclasses import dataclass

from cushion.errors import UnsupportedModelError, did_you_mean


@dataclass(frozen=True)
class ResidualStream:
    """Where the residual stream of one model family is written: with who reads it, what rotation folds its matrix into.

    The readers are those of `Architecture.smoothing`: a norm that reads the stream, and all that reads its output.

    Args:
        embeddings: the embedding tables whose sum starts the stream, learned positions included. Paths from the causal
            language model.
        final_norm: path of the norm that lm_head reads, from the causal language model.
        writers: the linears of a block whose output is added to the stream, or parameters whose last dimension but one
            is the stream's. Paths from the block. `*` stands for every child there.
        embedding_norm: path of a norm that stands between the embeddings and the stream, from the model.
        post_norms: norms of a block that stand between a writer and the stream; their writers are then not named.
        norm_offset: what is added to a norm's weight before it multiplies (1 where the norm computes `1 + weight`).
        requires: values that the model's configuration must have for all this to be right.

    """

    embeddings: tuple[str, ...]
    final_norm: str
    writers: tuple[str, ...] = ()
    embedding_norm: str | None = None
    post_norms: tuple[str, ...] = ()
    norm_offset: float = 0.0
    requires: tuple[tuple[str, bool], ...] = ()


@dataclass(frozen=True)
class Architecture:
    """Where the parts of one model family are.

    Args:
        model_type: `config.model_type` of the family in transformers.
        blocks: path of the `ModuleList` of decoder blocks, from the causal language model.
        smoothing: for each norm of a block, the linears that read its output: the pairs into which SmoothQuant's scale
            is folded (arXiv 2211.10438, section 4). Paths from the block.
        smoothing_requires: values that the model's configuration must have for those pairs to be right: variants of a
            family that put their norms elsewhere cannot be smoothed.
        residual: where the residual stream is written and read; None where it is not known: rotation is refused.

    """

    model_type: str
    blocks: str
    smoothing: tuple[tuple[str, tuple[str, ...]], ...]
    smoothing_requires: tuple[tuple[str, bool], ...] = ()
    residual: ResidualStream | None = None


_LLAMA_SMOOTHING = (
    ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
)

_LLAMA_RESIDUAL = ResidualStream(
    embeddings=("model.embed_tokens",),
    final_norm="model.norm",
    writers=("self_attn.o_proj", "mlp.down_proj"),
)

ARCHITECTURES = {
    entry.model_type: entry
    for entry in (
        Architecture("llama", "model.layers", _LLAMA_SMOOTHING, residual=_LLAMA_RESIDUAL),
        Architecture("mistral", "model.layers", _LLAMA_SMOOTHING, residual=_LLAMA_RESIDUAL),
        Architecture("qwen2", "model.layers", _LLAMA_SMOOTHING, residual=_LLAMA_RESIDUAL),
        Architecture(
            "opt",
            "model.decoder.layers",
            (
                ("self_attn_layer_norm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
                ("final_layer_norm", ("fc1",)),
            ),
            smoothing_requires=(("do_layer_norm_before", True),),
            residual=ResidualStream(
                embeddings=("model.decoder.embed_tokens", "model.decoder.embed_positions"),
                final_norm="model.decoder.final_layer_norm",
                writers=("self_attn.out_proj", "fc2"),
                requires=(("do_layer_norm_before", True), ("_remove_final_layer_norm", False)),
            ),
        ),
        Architecture(
            "bloom",
            "transformer.h",
            (
                ("input_layernorm", ("self_attention.query_key_value",)),
                ("post_attention_layernorm", ("mlp.dense_h_to_4h",)),
            ),
            smoothing_requires=(("apply_residual_connection_post_layernorm", False),),
            residual=ResidualStream(
                embeddings=("transformer.word_embeddings",),
                embedding_norm="transformer.word_embeddings_layernorm",
                final_norm="transformer.ln_f",
                writers=("self_attention.dense", "mlp.dense_4h_to_h"),
                requires=(("apply_residual_connection_post_layernorm", False),),
            ),
        ),
    )
}


def find_architecture(model_type: str, model: str) -> Architecture:
    """The entry of the table for `model_type`; raises `UnsupportedModelError` naming the model and what there is."""
    if model_type not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise UnsupportedModelError(
            f"model.path={model!r} has the architecture {model_type!r}, which is not supported (supported: {known})"
            f"{did_you_mean(model_type, ARCHITECTURES)}; docs/extending.md says how to add one"
        )
    return ARCHITECTURES[model_type]
