"""What there is to know of a model family: where the decoder blocks, their linears and the norms before them are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Requirements = tuple[tuple[str, Any], ...]


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
        requires: values that the model's configuration must have for all this to be right.

    """

    embeddings: tuple[str, ...]
    final_norm: str
    writers: tuple[str, ...] = ()
    embedding_norm: str | None = None
    post_norms: tuple[str, ...] = ()
    requires: Requirements = ()


@dataclass(frozen=True)
class Values:
    """The linears of a block between which the values of attention are, for the rotation of its heads.

    Args:
        maker: the linear whose outputs hold the values, alone or with queries and keys. Path from the block.
        reader: the linear that reads what attention makes of them, all heads side by side. Path from the block.
        groups: key of the configuration with the number of groups that the outputs of `maker` fall into, where each
            group ends with one head of values; None where all values stand together at the end.

    """

    maker: str
    reader: str
    groups: str | None = None


@dataclass(frozen=True)
class Architecture:
    """Where the parts of one model family, or of one variant of it, are.

    Args:
        model_type: `config.model_type` of the family in transformers.
        blocks: path of the `ModuleList` of decoder blocks, from the causal language model.
        smoothing: for each norm of a block, all modules that read its output: the pairs into which SmoothQuant's scale
            is folded (arXiv 2211.10438, section 4). Paths from the block; `*` stands for every child there.
        smoothing_requires: values that the model's configuration must have for those pairs to be right: variants of a
            family that put their norms elsewhere cannot be smoothed.
        down_projection: the last linear of a block's feed-forward part, whose input PrefixQuant's rule reads; path from
            the block, in which `*` stands for any one part (the number of an expert). Several paths, where parts run
            side by side, as routed and shared experts do: each is a down projection of its own.
        up_projection: the linear whose outputs a gate multiplies, channel by channel, into the inputs of the down
            projection; as many paths as down projections, in their order. Empty where there is no linear of this kind
            alone: no scale can move from the one into the other there.
        norm_offset: what the norms named in `smoothing`, and the last one, add to their weight before they multiply
            with it: 0, or 1 where they compute `(1 + weight)`. Norms with an offset must do so in float32.
        requires: values of the model's configuration by which this entry holds, where the variants of a family need
            entries of their own; the first entry of the family that holds is taken.
        experts: path, from the block, of experts whose weights are fused into tensors of three dimensions; they are
            replaced by linears on loading.
        full_precision: modules of a block that multiply with a weight and are no linears to quantize: routers, whose
            few weights the field leaves alone. Paths from the block.
        key_value_heads: how many heads the cache of a layer has: a number, or a key of the configuration. None:
            `num_key_value_heads` where the configuration has it, else `num_attention_heads`.
        residual: where the residual stream is written and read; None where it is not known: rotation is refused.
        values: where the values of attention are made and read; None where it is not known: rotating them is refused.
        multimodal: model types whose text part is of this family and is loaded alone (`cushion.models.multimodal`).
        tiny: a function that makes the configuration of a tiny model of the family, `model.path=tiny:<model_type>`;
            it imports transformers by itself. Cushion's own families have theirs in `cushion.models.tiny`.

    """

    model_type: str
    blocks: str
    smoothing: tuple[tuple[str, tuple[str, ...]], ...]
    smoothing_requires: Requirements = ()
    down_projection: str | tuple[str, ...] = ""
    up_projection: str | tuple[str, ...] = ""
    norm_offset: float = 0.0
    requires: Requirements = ()
    experts: str | None = None
    full_precision: tuple[str, ...] = ()
    key_value_heads: str | int | None = None
    residual: ResidualStream | None = None
    values: Values | None = None
    multimodal: tuple[str, ...] = ()
    tiny: Callable[[], PreTrainedConfig] | None = field(default=None, compare=False)

    def cache_shape(self, config: Any) -> tuple[int, int, int]:
        """Layers, key-value heads and head size of the cache of a model with this configuration."""
        return cache_shape(config, self.key_value_heads)


def cache_shape(config: Any, key_value_heads: str | int | None = None) -> tuple[int, int, int]:
    """Layers, key-value heads and head size of a cache; `key_value_heads` as in the table."""
    heads = key_value_heads
    if heads is None:
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    elif isinstance(heads, str):
        heads = getattr(config, heads)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers, int(heads), size
