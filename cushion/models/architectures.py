"""The architecture table: where the decoder blocks, their linears and the norms before them are. Data, no code.

A new family is one entry here and one row in `tests/models/test_architectures.py`; docs/extending.md walks through it.
"""

from __future__ import annotations

from dataclasses import dataclass

from cushion.errors import UnsupportedModelError, did_you_mean


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
        down_projection: the last linear of a block's feed-forward part, whose input PrefixQuant's rule reads; path from
            the block, in which `*` stands for any one part (the number of an expert).

    """

    model_type: str
    blocks: str
    smoothing: tuple[tuple[str, tuple[str, ...]], ...]
    smoothing_requires: tuple[tuple[str, bool], ...] = ()
    down_projection: str = ""


_LLAMA_SMOOTHING = (
    ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
)

ARCHITECTURES = {
    entry.model_type: entry
    for entry in (
        Architecture("llama", "model.layers", _LLAMA_SMOOTHING, down_projection="mlp.down_proj"),
        Architecture("mistral", "model.layers", _LLAMA_SMOOTHING, down_projection="mlp.down_proj"),
        Architecture("qwen2", "model.layers", _LLAMA_SMOOTHING, down_projection="mlp.down_proj"),
        Architecture(
            "opt",
            "model.decoder.layers",
            (
                ("self_attn_layer_norm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
                ("final_layer_norm", ("fc1",)),
            ),
            smoothing_requires=(("do_layer_norm_before", True),),
            down_projection="fc2",
        ),
        Architecture(
            "bloom",
            "transformer.h",
            (
                ("input_layernorm", ("self_attention.query_key_value",)),
                ("post_attention_layernorm", ("mlp.dense_h_to_4h",)),
            ),
            smoothing_requires=(("apply_residual_connection_post_layernorm", False),),
            down_projection="mlp.dense_4h_to_h",
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
