"""Perplexity: token-level, over non-overlapping blocks, each behind a fresh copy of the prefix.

## Perplexity

The evaluation documents are joined with blank lines, tokenized as one text without special tokens, and cut into
non-overlapping blocks of `eval.block_length` tokens.

    PPL = exp( sum of negative log-likelihoods / number of predicted tokens )

Each block is run behind a fresh copy of the prefix, which is not predicted and predicts nothing: every row counts
block_length - 1 tokens per block. BOS, where texts begin with it, stands between prefix and block;
`eval.predict_first=true` then counts the first token too.

The paper does not state block length or BOS. Its full-precision values agree with blocks of 2048 without BOS on the
WikiText-2 raw test split (`data=wikitext2 eval=full`; `data=cushioncache` evaluates on the same text).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from cushion.config import EvalConfig
from cushion.errors import ConfigError, NotFiniteError
from cushion.evaluation.attention import ATTENTION_TOKENS
from cushion.models import LanguageModel
from cushion.prefix import Prefix

MAXIMUM_LOSS = 700.0
"""Nats per token beyond which the perplexity is no finite number of double precision."""

POSITIONS_PER_CHUNK = 256
"""Positions of a block whose logits are formed at once: this times the vocabulary bounds memory, at any length."""


@dataclass(frozen=True)
class BlockLoss:
    """Summed negative log-likelihood (nats) of one batch of blocks, and how many tokens were predicted."""

    loss: float
    tokens: int


def perplexity(losses: list[BlockLoss]) -> float:
    """`exp` of the mean negative log-likelihood per predicted token.

    Raises:
        NotFiniteError: a loss is not finite, or too large for its exponential to be.
    """
    mean = sum(b.loss for b in losses) / sum(b.tokens for b in losses)
    if not mean < MAXIMUM_LOSS:  # also where it is not a number
        raise NotFiniteError(
            f"the mean loss is {mean} nats per token, which has no finite perplexity: the activations overflow (use "
            "model.dtype=bfloat16 or float32), or the quantizer destroys the model"
        )
    return math.exp(mean)


@torch.no_grad()
def block_losses(
    lm: LanguageModel,
    prefix: Prefix,
    blocks: Tensor,
    config: EvalConfig,
    start: int = 0,
    bos: bool = False,
    in_front: int = 0,
) -> Iterator[BlockLoss]:
    """Loss of each batch of blocks, in order.

    Args:
        blocks: token ids, (blocks, block length), or one more with BOS in front.
        config: batch size, and whether the first token is predicted.
        start: number of batches to leave out, because an earlier run has them.
        bos: whether the blocks begin with BOS.
        in_front: how many tokens stand before that in each block, which are not predicted either.

    """
    first = in_front + first_predicted(config, bos)
    for index in range(start, math.ceil(len(blocks) / config.batch_size)):
        batch = blocks[index * config.batch_size : (index + 1) * config.batch_size].to(lm.device)
        yield _batch_loss(lm, prefix, batch, first)


def _batch_loss(lm: LanguageModel, prefix: Prefix, batch: Tensor, first: int) -> BlockLoss:
    """The loss over the tokens of a batch, (blocks, tokens), from position `first` on."""
    targets = batch[:, first:]
    hidden = predicting_states(lm, prefix, batch)[:, -targets.shape[1] :]
    loss = sum(summed_loss(lm.logits(hidden[:, part]), targets[:, part]) for part in chunks(targets.shape[1]))
    return BlockLoss(loss, targets.numel())


def first_predicted(config: EvalConfig, bos: bool) -> int:
    """Position of the first token of a block that is predicted; `bos`: whether the blocks begin with BOS."""
    return 2 if bos and not config.predict_first else 1


def predicting_states(lm: LanguageModel, prefix: Prefix, batch: Tensor) -> Tensor:
    """The last hidden states of a batch of blocks, (blocks, tokens - 1, features): the last token predicts none."""
    cache = prefix.cache(lm.model, len(batch))
    hidden: Tensor = lm.body(batch, past_key_values=cache, use_cache=True).last_hidden_state
    return hidden[:, :-1]


def chunks(positions: int) -> Iterator[slice]:
    """The positions of a block in parts whose logits are formed at once."""
    for low in range(0, positions, POSITIONS_PER_CHUNK):
        yield slice(low, low + POSITIONS_PER_CHUNK)


def summed_loss(logits: Tensor, targets: Tensor) -> float:
    """Summed negative log-likelihood, in nats.

    Args:
        logits: (blocks, positions, vocabulary).
        targets: token ids, (blocks, positions).

    """
    wanted = targets.flatten().to(logits.device)
    return functional.cross_entropy(logits.flatten(0, 1).float(), wanted, reduction="sum").item()


def check_evaluation(lm: LanguageModel, config: EvalConfig, prefix_length: int, bos: bool = False) -> None:
    """Raise `ConfigError` when prefix, BOS and block do not fit the context, or nothing predicts the first token.

    Args:
        bos: whether the blocks begin with BOS.

    """
    if config.predict_first and not bos:
        raise ConfigError(
            f"eval.predict_first=true: the tokenizer of {lm.label} puts no BOS before a text, and a prefix predicts no "
            "token; use bos=always, or eval.predict_first=false"
        )
    if config.prefix_in_block and config.block_length - prefix_length < 2:
        raise ConfigError(
            f"eval.prefix_in_block=true leaves {config.block_length - prefix_length} of eval.block_length="
            f"{config.block_length} tokens behind a prefix of up to {prefix_length}: lengthen the blocks"
        )
    measured = min(config.block_length + bos, ATTENTION_TOKENS)
    if config.attention_texts and config.attention_first >= measured:
        raise ConfigError(
            f"eval.attention_first={config.attention_first} leaves no other token of the {measured} on which attention "
            "is measured: lower it, or set eval.attention_texts=0"
        )
    behind = 0 if config.prefix_in_block else prefix_length
    needed = behind + config.block_length + bos
    if lm.context_length is not None and needed > lm.context_length:
        raise ConfigError(
            f"eval.block_length={config.block_length}{named_in_front(bos, behind)} needs {needed} positions, but "
            f"{lm.label} has {lm.context_length}: shorten the blocks{' or the prefix' if behind else ''}"
        )


def named_in_front(bos: bool, prefix: int) -> str:
    """What stands in front of a text, in words: ` behind BOS and a prefix of up to 8 tokens`; empty for nothing."""
    found = ["BOS"] * bos + ([f"a prefix of up to {prefix} tokens"] if prefix else [])
    return f" behind {' and '.join(found)}" if found else ""
