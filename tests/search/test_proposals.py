"""Which tokens a search tries: all of them, or a seeded sample with the special and the frequent ones in it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import random_texts

from cushion.config import SearchConfig
from cushion.errors import ConfigError
from cushion.models import LanguageModel
from cushion.search.proposals import propose

Tiny = Callable[..., LanguageModel]
SPECIAL = {256, 257, 258, 259}
TEXTS = random_texts(2, 12)


@pytest.fixture
def counts() -> torch.Tensor:
    """Token 100 + k occurs k times, for k up to 40; all others never."""
    counts = torch.zeros(260, dtype=torch.long)
    counts[100:141] = torch.arange(41)
    return counts


def test_vocabulary_is_the_whole_vocabulary(tiny: Tiny, counts: torch.Tensor) -> None:
    lm = tiny()
    config = SearchConfig(proposal="vocabulary", candidates=3)
    assert propose(lm, config, lambda: counts, TEXTS, 0).token_ids == list(range(lm.vocabulary_size))


@pytest.mark.parametrize("proposal", ["vocabulary", "user", "outlier"])
def test_the_text_is_counted_only_where_that_matters(tiny: Tiny, proposal: str) -> None:
    def count() -> torch.Tensor:
        raise AssertionError("nobody needs it")

    config = SearchConfig(proposal=proposal, user_tokens=[9])
    assert propose(tiny(), config, count, TEXTS, 0).token_ids
    with pytest.raises(AssertionError, match="nobody needs it"):
        propose(tiny(), SearchConfig(proposal="frequent"), count, TEXTS, 0)


@pytest.mark.parametrize("asked", [260, 1000])
def test_a_sample_as_large_as_the_vocabulary_is_the_vocabulary(tiny: Tiny, counts: torch.Tensor, asked: int) -> None:
    assert propose(tiny(), SearchConfig(candidates=asked), lambda: counts, TEXTS, 0).token_ids == list(range(260))


@pytest.mark.parametrize("size", [1, 4, 17, 64, 259])
def test_sample_has_the_size_asked_for(tiny: Tiny, counts: torch.Tensor, size: int) -> None:
    found = propose(tiny(), SearchConfig(candidates=size, frequent=8), lambda: counts, TEXTS, 0).token_ids
    assert len(found) == size
    assert found == sorted(set(found))
    assert all(0 <= token < 260 for token in found)


def test_sample_holds_special_and_most_frequent_tokens(tiny: Tiny, counts: torch.Tensor) -> None:
    for seed in range(5):
        found = set(propose(tiny(), SearchConfig(candidates=30, frequent=10), lambda: counts, TEXTS, seed).token_ids)
        assert found >= SPECIAL | set(range(131, 141))


def test_tokens_that_never_occur_are_not_frequent(tiny: Tiny) -> None:
    counts = torch.zeros(260, dtype=torch.long)
    counts[200] = 1
    drawn = [
        set(propose(tiny(), SearchConfig(candidates=40, frequent=30), lambda: counts, TEXTS, seed).token_ids)
        for seed in range(4)
    ]
    assert set.intersection(*drawn) >= SPECIAL | {200}
    assert len(set.intersection(*drawn)) < 20  # the rest is a draw, not the first tokens of the vocabulary


def test_draw_follows_the_seed(tiny: Tiny, counts: torch.Tensor) -> None:
    config = SearchConfig(candidates=60, frequent=8)
    one, same, other = (propose(tiny(), config, lambda: counts, TEXTS, seed).token_ids for seed in (3, 3, 4))
    assert one == same != other


def test_frequent_is_the_most_frequent_tokens(tiny: Tiny, counts: torch.Tensor) -> None:
    lm = tiny()
    assert propose(lm, SearchConfig(proposal="frequent", candidates=7), lambda: counts, TEXTS, 0).token_ids == list(
        range(134, 141)
    )
    everything = propose(lm, SearchConfig(proposal="frequent", candidates=999), lambda: counts, TEXTS, 0).token_ids
    assert everything == list(range(101, 141))  # those that occur


def test_outlier_is_the_tokens_that_spike(tiny: Tiny, counts: torch.Tensor) -> None:
    lm, texts = tiny(), TEXTS % 100
    texts[0, 4], texts[1, 9] = 200, 7
    with torch.no_grad():
        lm.embeddings[[200, 7]] *= 100
    config = SearchConfig(proposal="outlier", candidates=2)
    assert propose(lm, config, lambda: counts, texts, 0).token_ids == [7, 200]
    everything = propose(lm, SearchConfig(proposal="outlier", candidates=500), lambda: counts, texts, 0)
    assert everything.token_ids == sorted(set(texts.flatten().tolist()))


@pytest.mark.parametrize("proposal", ["vocabulary", "sampled", "frequent", "outlier", "user"])
def test_a_proposal_costs_what_it_runs(tiny: Tiny, counts: torch.Tensor, proposal: str) -> None:
    lm, seen = tiny(), []
    for block in lm.blocks:
        block.register_forward_hook(lambda _m, _a, output: seen.append(output[..., 0].numel()))
    found = propose(lm, SearchConfig(proposal=proposal, user_tokens=[3]), lambda: counts, TEXTS, 0)
    assert found.token_forwards == sum(seen) / len(lm.blocks) == (2 * 13 if proposal == "outlier" else 0)
    assert (found.seconds > 0) == (proposal == "outlier")


def test_user_tokens_keep_their_order_and_are_checked(tiny: Tiny, counts: torch.Tensor) -> None:
    config = SearchConfig(proposal="user", user_tokens=[9, 3, 9, 250])
    assert propose(tiny(), config, lambda: counts, TEXTS, 0).token_ids == [9, 3, 250]
    with pytest.raises(ConfigError, match=r"search.user_tokens=260 is outside the vocabulary"):
        propose(tiny(), SearchConfig(proposal="user", user_tokens=[260]), lambda: counts, TEXTS, 0)
