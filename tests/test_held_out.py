"""Held-out texts of the tuning come from documents that give no training text, wherever there are enough."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from cushion.data import Corpus
from cushion.errors import DataError
from cushion.held_out import split_texts
from cushion.run_warnings import data_warnings


def encode(text: str) -> Tensor:
    """A token a word; the number of the document is the thousands of it: document 3's fifth word is 3005."""
    words = [re.fullmatch(r"d(\d+)w(\d+)", word) for word in text.split()]
    return torch.tensor([1000 * int(word[1]) + int(word[2]) for word in words if word], dtype=torch.long)


def corpus(*lengths: int) -> Corpus:
    texts = [" ".join(f"d{number}w{word}" for word in range(length)) for number, length in enumerate(lengths)]
    return Corpus("tuning", texts, {"origin": "planted"})


def documents_of(texts: Tensor) -> set[int]:
    return set((texts // 1000).flatten().tolist())


def test_one_document_for_each_held_out_text_and_none_of_them_trains() -> None:
    planted = corpus(*[100] * 20)
    chosen = set()
    for seed in range(4):
        split = split_texts(planted, encode, 10, 60, 8, seed)
        assert (split.training.shape, split.held_out.shape) == ((60, 10), (8, 10))
        assert not documents_of(split.training) & documents_of(split.held_out)
        assert split.record == {"split": "document", "documents": 8}
        assert len(documents_of(split.held_out)) == 8
        assert torch.equal(split.training, split_texts(planted, encode, 10, 60, 8, seed).training)
        chosen.add(frozenset(documents_of(split.held_out)))
    assert len(chosen) == 4, "which documents is a seeded draw"


def test_a_document_that_comes_twice_does_not_train_where_it_is_held_out() -> None:
    planted = corpus(*[100] * 20)
    twice = Corpus("tuning", [text for text in planted.documents for _ in range(2)], {"origin": "planted"})
    for seed in range(4):
        split = split_texts(twice, encode, 10, 60, 4, seed)
        assert split.by == "document"
        assert not documents_of(split.training) & documents_of(split.held_out)


def test_training_gets_the_documents_that_it_needs() -> None:
    """Of ten documents of ten texts each, 85 training texts need nine: the held-out ones share the tenth."""
    split = split_texts(corpus(*[100] * 10), encode, 10, 85, 8, seed=0)
    assert not documents_of(split.training) & documents_of(split.held_out)
    assert split.record == {"split": "document", "documents": 1}


def test_short_documents_are_held_out_at_the_end_of_the_text() -> None:
    split = split_texts(corpus(*[6] * 40), encode, 10, 15, 3, seed=0)
    assert split.by == "document"
    assert documents_of(split.held_out) == set(range(35, 40))
    assert documents_of(split.training) < set(range(35))


@pytest.mark.parametrize("lengths", [(200,), (100, 100)], ids=["one running text", "two documents, both needed"])
def test_too_few_documents_are_cut_by_position_and_the_split_says_so(lengths: tuple[int, ...]) -> None:
    split = split_texts(corpus(*lengths), encode, 10, 15, 5, seed=0)
    assert split.record == {"split": "position", "documents": None}
    last = len(lengths) - 1
    assert split.held_out[:, 0].tolist() == [1000 * last + lengths[-1] - 50 + 10 * window for window in range(5)]
    both = torch.cat([split.training, split.held_out]).flatten()
    assert len(both.unique()) == len(both), "no word of the text in both"


def test_text_that_is_too_short_is_refused() -> None:
    with pytest.raises(DataError, match=r"data\.tuning \(planted\) holds 20 texts of 10 tokens, but 21 were asked for"):
        split_texts(corpus(100, 100), encode, 10, 16, 5, seed=0)


@pytest.mark.parametrize(("lengths", "warned"), [((200,), True), ((100, 100, 100), False)])
def test_a_split_within_a_document_is_warned_of(lengths: tuple[int, ...], warned: bool) -> None:
    planted = corpus(*lengths)
    planted.provenance["held_out"] = split_texts(planted, encode, 10, 10, 5, seed=0).record
    prepared = cast(Any, SimpleNamespace(corpora={"tuning": planted}))
    assert ["too few documents to hold any out" in text for text in data_warnings(prepared)] == [True] * warned
