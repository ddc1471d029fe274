"""Perplexity against an independent computation from log-probabilities over plain tokens, without cache or batches."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from conftest import UNLIKE
from helpers import random_texts
from torch import Tensor

from cushion.config import EvalConfig
from cushion.errors import ConfigError, NotFiniteError
from cushion.evaluation import perplexity as module
from cushion.evaluation.perplexity import BlockLoss, block_losses, check_evaluation, perplexity
from cushion.models import LanguageModel
from cushion.prefix import Prefix

Tiny = Callable[..., LanguageModel]
POLICIES = [(False, False), (True, False), (True, True)]
"""Whether BOS stands before a block, and whether the block's first token is predicted."""


@torch.no_grad()
def by_hand(lm: LanguageModel, prompt: list[int], blocks: Tensor, policy: tuple[bool, bool]) -> tuple[float, int]:
    """Perplexity and number of predicted tokens, one block at a time, over the tokens [prompt, BOS?, block]."""
    (bos, predict_first), total, count = policy, 0.0, 0
    for block in blocks.tolist():
        before = [*prompt, *([256] if bos else [])]
        logits = lm.model(input_ids=torch.tensor([before + block]), use_cache=False).logits[0]
        log_probabilities = torch.log_softmax(logits.double(), dim=-1)
        for index, token in enumerate(block):
            if index == 0 and not predict_first:
                continue
            total -= log_probabilities[len(before) + index - 1, token].item()
            count += 1
    return math.exp(total / count), count


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("prompt", [[], [7, 99]], ids=["bare", "prefix"])
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_perplexity_equals_log_probabilities(
    tiny: Tiny, policy: tuple[bool, bool], prompt: list[int], batch_size: int
) -> None:
    lm, blocks = tiny(), random_texts(5, 12)
    bos, predict_first = policy
    config = EvalConfig(batch_size=batch_size, block_length=12, predict_first=predict_first)
    run = lm.with_bos(blocks) if bos else blocks
    losses = list(block_losses(lm, Prefix.from_tokens(lm.model, prompt), run, config, bos=bos))
    expected, count = by_hand(lm, prompt, blocks, policy)
    assert len(losses) == math.ceil(5 / batch_size)
    assert sum(loss.tokens for loss in losses) == count
    assert perplexity(losses) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("family", UNLIKE)
def test_a_prefix_counts_as_its_tokens_in_families_unlike_each_other(tiny: Tiny, family: str) -> None:
    lm, blocks, prompt = tiny(family), random_texts(3, 12), [256, 10, 65]
    losses = list(block_losses(lm, Prefix.from_tokens(lm.model, prompt), blocks, EvalConfig(batch_size=2)))
    expected, _ = by_hand(lm, prompt, blocks, (False, False))
    bare, _ = by_hand(lm, [], blocks, (False, False))
    assert perplexity(losses) == pytest.approx(expected, rel=1e-4)
    assert abs(expected / bare - 1) > 1e-3  # the prefix is not without effect


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_chunks_of_positions_are_all_counted_once(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, policy: tuple[bool, bool]
) -> None:
    bos, predict_first = policy
    lm, blocks, config = tiny(), random_texts(5, 12), EvalConfig(batch_size=2, predict_first=predict_first)
    blocks = lm.with_bos(blocks) if bos else blocks
    whole = list(block_losses(lm, Prefix.empty(), blocks, config, bos=bos))
    for size in (1, 5, 11, 12):
        monkeypatch.setattr(module, "POSITIONS_PER_CHUNK", size)
        parts = list(block_losses(lm, Prefix.empty(), blocks, config, bos=bos))
        assert [part.tokens for part in parts] == [loss.tokens for loss in whole]
        assert perplexity(parts) == pytest.approx(perplexity(whole), rel=1e-6)


@pytest.mark.parametrize("start", [0, 1, 2, 3])
def test_start_leaves_out_the_batches_that_are_done(tiny: Tiny, start: int) -> None:
    lm, config = tiny(), EvalConfig(batch_size=2)
    prefix = Prefix.from_tokens(lm.model, [7])
    whole = list(block_losses(lm, prefix, random_texts(5, 12), config))
    assert len(whole) == 3
    assert list(block_losses(lm, prefix, random_texts(5, 12), config, start=start)) == whole[start:]


def test_mean_is_over_tokens_and_not_over_batches() -> None:
    assert perplexity([BlockLoss(30.0, 10), BlockLoss(1.0, 1)]) == pytest.approx(math.exp(31 / 11))


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), 1e9])
def test_perplexity_that_is_no_finite_number_is_an_error(loss: float) -> None:
    with pytest.raises(NotFiniteError, match=r"mean loss is .* nats per token.*model\.dtype"):
        perplexity([BlockLoss(1.0, 10), BlockLoss(loss, 10)])


# ---- what does not fit ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bos", "prefix_length", "longest"), [(False, 0, 256), (False, 6, 250), (True, 6, 249)])
def test_block_longer_than_the_context_is_refused(tiny: Tiny, bos: bool, prefix_length: int, longest: int) -> None:
    check_evaluation(tiny(), EvalConfig(block_length=longest), prefix_length, bos)
    behind = rf".*prefix of .*{prefix_length} tokens" if prefix_length else ""
    message = rf"eval.block_length={longest + 1}{behind} needs 257 positions.* has 256"
    with pytest.raises(ConfigError, match=message):
        check_evaluation(tiny(), EvalConfig(block_length=longest + 1), prefix_length, bos)


def test_prefix_longer_than_the_context_is_refused(tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match=r"a prefix of .*300 tokens.* has 256"):
        check_evaluation(tiny(), EvalConfig(block_length=12), 300)


def test_a_first_token_that_nothing_predicts_is_refused(tiny: Tiny) -> None:
    config = EvalConfig(block_length=12, predict_first=True)
    check_evaluation(tiny(), config, 0, bos=True)
    with pytest.raises(ConfigError, match=r"eval\.predict_first=true: .* no BOS before a text.*use bos=always"):
        check_evaluation(tiny(), config, 0, bos=False)
