"""Held-out text of the tuning: windows of documents that give no window to training.

A window beside a training window of the same document says little of other text: names and subjects recur. So the
texts that decide which step of the tuning was best come from documents of their own, wherever there are enough.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cushion.data import Corpus
from cushion.errors import DataError

Encode = Callable[[str], Tensor]


@dataclass(frozen=True)
class Split:
    """Training and held-out texts, token ids of shape (texts, tokens), and how they were kept apart.

    `by` is `document` where no document gives to both, `position` where one document is cut in two; `documents` are
    those that the held-out texts were taken from (None there).
    """

    training: Tensor
    held_out: Tensor
    by: str
    documents: int | None

    @property
    def record(self) -> dict[str, object]:
        """What result.json says of it."""
        return {"split": self.by, "documents": self.documents}


def split_texts(
    corpus: Corpus, encode: Encode, length: int, training: int, held_out: int, seed: int, keys: Sequence[str] = ()
) -> Split:
    """Draw `training` and `held_out` texts of `length` tokens, where possible from different documents, unequal ones.

    Held out are, in this order of preference:

    1. the first documents of a seeded order that are long enough for a text: one for each held-out text, or fewer where
       the others would not suffice for training;
    2. the last documents of the corpus, short ones joined as in `Corpus.samples`;
    3. the end of the text: the last windows of the corpus in its own order. Training gets a seeded draw of the others.

    `keys` are those of the configuration that decide number and length, for the error.

    Raises:
        DataError: the corpus does not hold that many texts of that length.

    """
    corpus.samples(encode, length, training + held_out, seed, keys)  # refuses a corpus that is too short either way
    for chosen in _candidates(corpus, encode, length, held_out, seed):
        held = {corpus.documents[index].strip() for index in chosen}  # the same text may come more than once
        others = [index for index, document in enumerate(corpus.documents) if document.strip() not in held]
        kept = _drawn(corpus.part(sorted(chosen)), encode, length, held_out, seed)
        trained = None if kept is None else _drawn(corpus.part(others), encode, length, training, seed)
        if kept is not None and trained is not None:
            return Split(trained, kept, "document", len(chosen))
    windows = corpus.windows(encode, length)
    last = len(windows) - held_out
    order = torch.randperm(last, generator=torch.Generator().manual_seed(seed))
    return Split(windows[order[:training]], windows[last:], "position", None)


def _candidates(corpus: Corpus, encode: Encode, length: int, held_out: int, seed: int) -> Iterator[set[int]]:
    """The documents that may be held out: ever fewer of a seeded order's first long ones, then the corpus's last."""
    order = list(range(len(corpus.documents)))
    random.Random(seed).shuffle(order)
    long: list[int] = []
    for index in order:
        if len(long) < held_out and len(corpus.document_tokens(encode, index)) >= length:
            long.append(index)
    for count in range(len(long), 0, -1):
        yield set(long[:count])
    for start in range(len(corpus.documents) - 1, 0, -1):
        tail = range(start, len(corpus.documents))
        if _drawn(corpus.part(tail), encode, length, held_out, seed) is not None:
            yield set(tail)
            return


def _drawn(corpus: Corpus, encode: Encode, length: int, count: int, seed: int) -> Tensor | None:
    """`Corpus.samples`, or None where there are not as many."""
    try:
        return corpus.samples(encode, length, count, seed)
    except DataError:
        return None
