"""Where attention goes: the shares on the prefix and on the first tokens of the text (CushionCache, Figure 3).

## Attention

CushionCache, Figure 3. For each block and head of the full-precision model, the attention probability that falls on
the positions of the prefix, and on the first tokens of the text (`eval.attention_first`), averaged over the queries
of all later tokens.

`sinks_in_prefix`: for each text, the five positions of prefix and text that get the most attention, averaged over
blocks, heads and those queries (a query that stands before a position gives it nothing); counted are those of the
prefix, averaged over the texts. Five sinks are what KVSink protects. At the smaller of 5 and the prefix's length, the
prefix has all the sinks that it has room for; at 5 the text has none that a quantized cache would have to protect.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from cushion.artifacts import Workspace, read_json, write_json
from cushion.hashing import tensor_digest
from cushion.models import LanguageModel
from cushion.prefix import Prefix
from cushion.step import Context, Step

ATTENTION_TOKENS = 512
"""Tokens of a text at most: the probabilities of all layers take tokens^2 per head and layer."""

SINKS = 5
"""How many positions count as sinks: what suffices for KVSink (arXiv 2508.04257)."""


@dataclass(frozen=True)
class AttentionShares:
    """Shares of attention, each (layers, heads), 0 to 1, averaged over queries and texts.

    `prefix`: on all positions of the prefix together (0 without one); `first`: on the first tokens of the text.
    `sinks_in_prefix`: how many of the `SINKS` positions that get the most attention, averaged over layers, heads and
    queries, are the prefix's, averaged over texts; None without a prefix.
    """

    prefix: list[list[float]]
    first: list[list[float]]
    sinks_in_prefix: float | None


@torch.no_grad()
def attention_shares(lm: LanguageModel, prefix: Prefix, texts: Tensor, first: int) -> AttentionShares:
    """Measure where the queries of `texts` look, on the model as it stands.

    The queries are those of all tokens but the first `first` ones, which see little else than themselves.

    Args:
        texts: token ids, (texts, tokens); no more than `ATTENTION_TOKENS` of each are used.
        first: how many tokens at the start of a text count as its first ones; fewer than a text has.

    """
    texts = texts[:, :ATTENTION_TOKENS]
    assert 0 < first < texts.shape[1]
    on_prefix: list[Tensor] = []
    on_first: list[Tensor] = []
    sinks: list[int] = []
    with _eager_attention(lm):
        for text in texts:
            probabilities = lm.body(
                text[None], past_key_values=prefix.cache(lm.model), use_cache=True, output_attentions=True
            ).attentions
            # each layer: (1, heads, queries, keys); the keys are the prefix's, as far as a sliding window holds them,
            # and then the text's own
            queries = [layer[0, :, first:].float() for layer in probabilities]
            kept = [layer.shape[-1] - len(text) for layer in queries]
            assert all(0 <= length <= len(prefix) for length in kept)
            on_prefix.append(_share(queries, [slice(0, length) for length in kept]))
            on_first.append(_share(queries, [slice(length, length + first) for length in kept]))
            sinks.append(int((sink_positions(queries, len(prefix) + len(text)) < len(prefix)).sum()))
    return AttentionShares(_mean(on_prefix), _mean(on_first), sum(sinks) / len(sinks) if len(prefix) else None)


def sink_positions(layers: list[Tensor], positions: int) -> Tensor:
    """The `SINKS` positions that get the most attention, or all of fewer, descending.

    Args:
        layers: probabilities of each layer, (heads, queries, keys); the keys are the last ones of all positions.
        positions: how many there are.

    """
    received = torch.zeros(positions)
    for layer in layers:
        received[positions - layer.shape[-1] :] += layer.mean((0, 1)).cpu()
    return received.topk(min(SINKS, positions)).indices


def _share(layers: list[Tensor], keys: list[slice]) -> Tensor:
    """The probability on each layer's `keys`, averaged over queries: (layers, heads)."""
    return torch.stack([layer[..., own].sum(-1).mean(-1).cpu() for layer, own in zip(layers, keys, strict=True)])


def _mean(texts: list[Tensor]) -> list[list[float]]:
    return cast("list[list[float]]", torch.stack(texts).mean(0).tolist())


@contextmanager
def _eager_attention(lm: LanguageModel) -> Iterator[None]:
    """Let the model compute attention in the one way that yields its probabilities, and put the old way back."""
    config, before = lm.model.config, lm.model.config._attn_implementation
    lm.model.set_attn_implementation("eager")
    config._attn_implementation = "eager"  # where a family has no interface for it, the call above changes nothing
    try:
        yield
    finally:
        lm.model.set_attn_implementation(before)
        config._attn_implementation = before


@dataclass(frozen=True, eq=False)
class AttentionStep(Step[AttentionShares]):
    """Where attention goes behind a prefix, on the full-precision model.

    Args:
        behind: the prefix.
        texts: token ids, (texts, tokens).
        first: how many tokens at the start of a text count as its first ones.
        title: how progress calls the prefix.

    """

    name = "attention"
    """Files: `attention.json`
    Key: `prefix`, `first`, `texts`
    Of that: the number of first tokens
    """
    behind: Prefix
    texts: Tensor
    first: int
    title: str

    def key(self, context: Context) -> dict[str, Any]:
        """Prefix, texts and the number of first tokens."""
        return {"prefix": self.behind.fingerprint, "first": self.first, "texts": tensor_digest([self.texts])}

    def make(self, context: Context, workspace: Workspace) -> None:
        """One pass."""
        context.progress(f"attention, {self.title}", 0, 1, "pass")
        shares = attention_shares(context.lm, self.behind, self.texts, self.first)
        write_json(workspace.folder / "attention.json", asdict(shares))
        context.progress(f"attention, {self.title}", 1, 1, "pass")

    def read(self, context: Context, folder: Path) -> AttentionShares:
        """The shares."""
        return AttentionShares(**read_json(folder / "attention.json"))
