"""QFeP, the quantization-free prefix: the search for a prefix [BOS, C, T] (arXiv 2405.14428, section 4.2).

## QFeP

ArXiv [2405.14428](https://arxiv.org/abs/2405.14428). The scale of a token at a linear is the largest magnitude of its
input there.

1. Over `search.texts` texts with BOS in front, the ratio of the largest to the median token scale is averaged per
   linear of the decoder blocks. The linear M with the largest mean is where the spikes are. Of linears that share an
   input the first counts.
2. The three tokens of each text with the largest scales at M, BOS left out, are ranked by their largest scale in any
   text. The `search.outlier_tokens` best distinct ones are the tokens T.
3. For each T, and each context C among the `search.contexts` most frequent tokens of these texts, the row [BOS, C, T,
   C, T] is run down to the block of M. Its score is the scale of T at position 2 (from 0) over its scale at position
   4: how much the second T is calmer than the first.
4. The prefix is [BOS, C, T] of the best score. Ties go to the larger scale of T and to the more frequent C.

BOS is the tokenizer's BOS, else its EOS. Experts count one by one, over the tokens that are routed to them. The
median of an even number is the lower of the middle two. `quantizer=qfep` is the default of the paper's public code.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cushion.config import SearchConfig
from cushion.models import LanguageModel
from cushion.search.rule_step import RuleSearch
from cushion.search.scan import Scanned, ratios, scan_texts, token_scales
from cushion.step import Context

TOP_TOKENS = 3
"""Tokens of each text, by scale, among which the best are chosen."""

REPORTED_RATIOS = 10
"""Linears whose ratio is kept in the record."""


@dataclass(frozen=True)
class SpikeToken:
    """A token T: its largest scale in any text, and its best context C with the score of that row.

    The score is the scale of T at position 2 of [BOS, C, T, C, T] over its scale at position 4.
    """

    token_id: int
    token: str
    scale: float
    context_id: int
    context: str
    score: float


@dataclass(frozen=True)
class QfepRecord:
    """What QFeP found.

    `ratios` are those of the linears with the largest ones, descending, and `module` is the first; a ratio over a
    median of zero is written as the largest number of float32.

    | field | content |
    |---|---|
    | `method` | `qfep` |
    | `token_ids` | the prefix, [BOS, C, T] |
    | `module` | the linear at which the tokens were judged: the one with the largest ratio |
    | `ratios` | the ten linears with the largest mean ratios of the maximal to the median token scale, descending |
    | `tokens` | a list, the tokens T, by scale |
    | `tokens[].token_id`, `token`, `scale` | the token, its text, its largest scale in any text |
    | `tokens[].context_id`, `context`, `score` | its best context, as id and text, and the score with it |
    | `contexts` | number of contexts tried |
    | `token_forwards` | tokens run through the blocks: the texts through all of them, the rows of five tokens down to `module`, each counting that share |
    | `seconds` | |
    """  # noqa: E501

    token_ids: list[int]
    module: str
    ratios: dict[str, float]
    tokens: list[SpikeToken]
    contexts: int
    token_forwards: float
    """Tokens run through the blocks: all of them for the texts, only those down to `module` for the rows of five."""
    seconds: float


def qfep_search(lm: LanguageModel, config: SearchConfig, texts: Tensor) -> Iterator[Scanned | QfepRecord]:
    """Run the four steps of QFeP.

    Args:
        config: the number of tokens T (`outlier_tokens`) and of contexts C (`contexts`).
        texts: token ids without BOS, (texts, tokens).

    Yields:
        `Scanned` after every text and every batch of contexts, and the `QfepRecord` at the end.

    Raises:
        NotFiniteError: an activation is not finite.
        UnsupportedModelError: a linear of the model does not read every token.

    """
    started = time.perf_counter()
    assert lm.bos_token_id is not None, "checked by preparation"
    with_bos, scales = lm.with_bos(texts), dict[str, Tensor]()
    yield from scan_texts(lm, list(lm.linears()), with_bos, scales)
    means = ratios(scales)
    ranked = sorted(means, key=lambda name: -means[name])  # stable: of linears with one input, the first
    module = ranked[0]
    spikes = spike_tokens(with_bos, scales[module], config.outlier_tokens)
    contexts = frequent_tokens(texts, config.contexts)
    batch_size = max(1, texts.shape[1] // 5)  # as many tokens at once as a text had
    tokens: list[SpikeToken] = []
    for number, (token, scale) in enumerate(spikes.items()):
        scores: list[float] = []
        for score in score_contexts(lm, module, token, contexts, batch_size):
            scores += score.tolist()
            yield Scanned(number * len(contexts) + len(scores), len(spikes) * len(contexts), "context")
        best = max(range(len(contexts)), key=scores.__getitem__)  # ties: the more frequent context
        context = contexts[best]
        tokens.append(SpikeToken(token, lm.decode([token]), scale, context, lm.decode([context]), scores[best]))
    winner = max(tokens, key=lambda spike: spike.score)  # ties: the token with the larger scale
    depth = (block_of(lm, module) + 1) / len(lm.blocks)
    yield QfepRecord(
        token_ids=[lm.bos_token_id, winner.context_id, winner.token_id],
        module=module,
        ratios={name: min(means[name], torch.finfo(torch.float32).max) for name in ranked[:REPORTED_RATIOS]},
        tokens=tokens,
        contexts=len(contexts),
        token_forwards=with_bos.numel() + 5 * len(contexts) * len(tokens) * depth,
        seconds=time.perf_counter() - started,
    )


def spike_tokens(texts: Tensor, scales: Tensor, count: int) -> dict[int, float]:
    """The `count` distinct tokens with the largest scales, and these, descending.

    Only the three tokens of each text with the largest scales take part; BOS, the first of each text, does not.

    Args:
        texts: token ids with BOS in front, (texts, tokens).
        scales: of the same shape; not a number where the linear does not read the token.

    """
    largest: dict[int, float] = {}
    read = scales[:, 1:].nan_to_num(nan=-1.0)
    top = read.topk(min(TOP_TOKENS, read.shape[1]), dim=1)
    tokens = texts[:, 1:].cpu().gather(1, top.indices)
    for token, scale in zip(tokens.flatten().tolist(), top.values.flatten().tolist(), strict=True):
        if scale >= 0:
            largest[token] = max(scale, largest.get(token, 0.0))
    ranked = sorted(largest.items(), key=lambda item: (-item[1], item[0]))
    return dict(ranked[:count])


def frequent_tokens(texts: Tensor, count: int) -> list[int]:
    """The `count` most frequent tokens of the texts, descending; ties go to the smaller token id."""
    counts = torch.bincount(texts.flatten().cpu())
    ranked = torch.argsort(counts, descending=True, stable=True)[:count]
    return ranked[counts[ranked] > 0].tolist()


def score_contexts(
    lm: LanguageModel, module: str, token: int, contexts: list[int], batch_size: int
) -> Iterator[Tensor]:
    """How much the second T of [BOS, C, T, C, T] is calmer than the first, for each context C in turn.

    The rows are run down to the block of `module` only.

    Args:
        batch_size: contexts per forward pass.

    Yields:
        Batch by batch: the scale of T at position 2 over its scale at position 4 at the input of `module`, float64
        on the CPU, shape (batch,). A row whose first scale is zero, or in which an expert does not read both, has 0.

    """
    assert lm.bos_token_id is not None, "checked by preparation"
    for batch in torch.tensor(contexts).split(batch_size):
        bos, spike = torch.full_like(batch, lm.bos_token_id), torch.full_like(batch, token)
        rows = torch.stack([bos, batch, spike, batch, spike], dim=1)
        with first_blocks(lm, block_of(lm, module) + 1):
            yield calming(token_scales(lm, [module], rows)[module])


def calming(scales: Tensor) -> Tensor:
    """The scale at position 2 over that at position 4, float64, shape (rows,), of `scales` of shape (rows, 5).

    It is 0 where one of them is not a number.
    """
    first, second = scales[:, 2].double(), scales[:, 4].double()
    return (first / second.clamp(min=torch.finfo(torch.float32).tiny)).nan_to_num(nan=0.0)


def block_of(lm: LanguageModel, module: str) -> int:
    """The number of the decoder block that a linear is in."""
    return int(module.removeprefix(f"{lm.architecture.blocks}.").partition(".")[0])


@contextmanager
def first_blocks(lm: LanguageModel, count: int) -> Iterator[None]:
    """The model cut down to its first `count` decoder blocks; on leaving, it has the very list it had before."""
    parent, _, leaf = lm.architecture.blocks.rpartition(".")
    owner, blocks = lm.model.get_submodule(parent), lm.blocks
    setattr(owner, leaf, nn.ModuleList(list(blocks)[:count]))
    try:
        yield
    finally:
        setattr(owner, leaf, blocks)


class QfepSearch(RuleSearch):
    """QFeP's search as a cached step."""

    name = "qfep"
    """Files: `search.json`, and `prefix.*`
    Key: `config.contexts`, `config.outlier_tokens`, `texts`
    Of that: the keys of `search` that have an effect
    """
    record = QfepRecord
    reads = ("contexts", "outlier_tokens")

    def find(self, context: Context) -> Iterator[Scanned | QfepRecord]:
        """The four steps of QFeP."""
        return qfep_search(context.lm, self.config, self.texts)
