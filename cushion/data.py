"""Text for calibration, search, tuning and evaluation: shared out without overlap, cut into token tensors.

A corpus is a list of documents with its provenance, which goes into result.json; `cushion/sources.py` reads them.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cushion.config import DataConfig, PathsConfig
from cushion.errors import DataError
from cushion.sources import locate
from cushion.text_files import Render, has_fields

SHARES = {"evaluation": 4, "calibration": 1, "tuning": 3, "search": 2}
"""How a corpus that serves several purposes is divided, by characters; `data.further` gets as much as evaluation."""


@dataclass
class Corpus:
    """The documents that one purpose may use, and where they come from."""

    purpose: str
    documents: list[str]
    provenance: dict[str, Any]
    _tokens: dict[int, Tensor] = field(default_factory=dict, repr=False)

    def blocks(
        self, encode: Callable[[str], Tensor], length: int, count: int | None, keys: Sequence[str] = ()
    ) -> Tensor:
        """Non-overlapping blocks from the start of the corpus, its documents joined with blank lines.

        Args:
            encode: text to token ids, shape (tokens,).
            length: tokens per block.
            count: number of blocks; None for as many as the corpus fills.
            keys: those of the configuration that decide number and length, for the error.

        Returns:
            Token ids, shape (blocks, length). An incomplete last block is left out.

        Raises:
            DataError: the text is too short.

        """
        tokens = encode("\n\n".join(self.documents))
        available = len(tokens) // length
        if available < (count or 1):
            raise DataError(
                f"data.{self.purpose} ({self._where()}) fills {available} blocks of {length} tokens, but "
                f"{count or 1} were asked for{_by(keys)}: lower the number or the length of blocks, or name a longer "
                "text"
            )
        used = available if count is None else count
        return tokens[: used * length].reshape(used, length)

    def samples(
        self, encode: Callable[[str], Tensor], length: int, count: int, seed: int, keys: Sequence[str] = ()
    ) -> Tensor:
        """`count` texts of exactly `length` tokens, in a seeded order, no two overlapping.

        Documents are shuffled; the first `length` tokens of every document long enough come first, then their
        second windows, and so on. If these do not suffice, neighbouring documents that are too short are joined with
        blank lines, in their own order, and cut. `keys` are as for `blocks`.

        Returns:
            Token ids, shape (count, length).

        Raises:
            DataError: the documents do not hold that many texts of that length.

        """
        order = list(range(len(self.documents)))
        random.Random(seed).shuffle(order)
        found: list[Tensor] = []
        window = 0
        while len(found) < count and order:
            remaining = []
            for index in order:
                if len(found) == count:
                    break
                tokens = self.document_tokens(encode, index)
                if len(tokens) >= (window + 1) * length:
                    found.append(tokens[window * length : (window + 1) * length])
                    remaining.append(index)
            order, window = remaining, window + 1
        if len(found) < count:
            found += self._joined(encode, length)[: count - len(found)].unbind()
        if len(found) < count:
            raise DataError(
                f"data.{self.purpose} ({self._where()}) holds {len(found)} texts of {length} tokens, but {count} were "
                f"asked for{_by(keys)}: ask for fewer or shorter texts, or name a longer source"
            )
        return torch.stack(found)

    def windows(self, encode: Callable[[str], Tensor], length: int) -> Tensor:
        """All texts that `samples` could draw, in the order of the documents, those of joined short ones last.

        Returns:
            Token ids, shape (texts, length).

        """
        whole = [_cut(self.document_tokens(encode, index), length) for index in range(len(self.documents))]
        return torch.cat([*whole, self._joined(encode, length)])

    def _joined(self, encode: Callable[[str], Tensor], length: int) -> Tensor:
        """The documents of fewer than `length` tokens, joined with blank lines and cut: (texts, length)."""
        lengths = [len(self.document_tokens(encode, index)) for index in range(len(self.documents))]
        short = [text for text, own in zip(self.documents, lengths, strict=True) if own < length]
        return _cut(encode("\n\n".join(short)) if short else torch.empty(0, dtype=torch.long), length)

    def part(self, indices: Sequence[int]) -> Corpus:
        """The corpus of these documents alone."""
        tokens = {place: self._tokens[index] for place, index in enumerate(indices) if index in self._tokens}
        return replace(self, documents=[self.documents[index] for index in indices], _tokens=tokens)

    def token_counts(self, encode: Callable[[str], Tensor], vocabulary_size: int, documents: int = 64) -> Tensor:
        """How often each token occurs in the first `documents` documents; shape (vocabulary_size,)."""
        counts = torch.zeros(vocabulary_size, dtype=torch.long)
        for index in range(min(documents, len(self.documents))):
            tokens = self.document_tokens(encode, index)
            counts += torch.bincount(tokens[tokens < vocabulary_size], minlength=vocabulary_size)
        return counts

    def document_tokens(self, encode: Callable[[str], Tensor], index: int) -> Tensor:
        """The token ids of one document, (tokens,)."""
        if index not in self._tokens:
            self._tokens[index] = encode(self.documents[index])
        return self._tokens[index]

    def _where(self) -> str:
        return str(self.provenance.get("origin", self.provenance.get("source")))


def _by(keys: Sequence[str]) -> str:
    """Which keys ask for so much text, in words; empty where none is known."""
    return f" by {', '.join(keys)}" if keys else ""


def load_corpora(
    config: DataConfig, paths: PathsConfig, needed: Collection[str] | None = None, render: Render | None = None
) -> dict[str, Corpus]:
    """The corpora of the purposes that a run needs, disjoint by document.

    Args:
        needed: purposes to read; None for all four. No source is read for the others alone, but within a source that
            is read they keep their share, so that a purpose's share does not move with what else a run needs.
        render: makes text of a chat, by the tokenizer's chat template; called only where a file holds chats.

    Raises:
        DataError: a source is missing or damaged (the file and line are named), or nothing is left for a purpose.
    """
    purposes = config.purposes()
    located = {purpose: locate(corpus, paths, render) for purpose, corpus in purposes.items()}
    pool_of = {
        purpose: (located[purpose][0], corpus.text_field if _has_fields(located[purpose][0]) else "")
        for purpose, corpus in purposes.items()
    }
    wanted = {pool_of[purpose] for purpose in purposes if needed is None or purpose in needed}
    pools: dict[tuple[str, str], list[str]] = {}
    claimed: set[bytes] = set()
    corpora = {}
    for purpose, corpus in purposes.items():
        pool = pool_of[purpose]
        if pool not in wanted:
            continue
        if pool not in pools:
            try:
                pools[pool] = [document for document in located[purpose][1]() if document.strip()]
            except DataError as error:
                if corpus.source != "file":
                    raise
                key = "data.path" if corpus.path == config.path else f"data.{purpose}.path"
                raise DataError(f"{key}={corpus.path!r}: {error}") from error
        sharing = [p for p in purposes if pool_of[p] == pool]
        share = list(_share(pools[pool], sharing, purpose))
        documents = [document for document in share if _hash(document) not in claimed]
        claimed.update(_hash(document) for document in documents)
        if needed is not None and purpose not in needed:
            continue
        if not documents:
            raise DataError(
                f"data.{purpose} ({pool[0]}) has no document left for it: the source has {len(pools[pool])} documents, "
                f"shared by {', '.join(sharing)}, and {len(share)} of this share occur in another purpose's text; "
                "name another source or a longer one"
            )
        provenance: dict[str, Any] = {
            "source": corpus.source,
            "split": corpus.split if pool[0].startswith("hub:") or corpus.source == "wikitext2" else None,
            "origin": pool[0],
            "shared_by": sharing,
            "documents": len(documents),
            "duplicates_dropped": len(share) - len(documents),
            "characters": sum(map(len, documents)),
            "sha256": hashlib.sha256("\n\n".join(documents).encode()).hexdigest(),
        }
        corpora[purpose] = Corpus(purpose, documents, provenance)
    return corpora


def _has_fields(origin: str) -> bool:
    return Path(origin).is_absolute() and has_fields(Path(origin))


def _cut(tokens: Tensor, length: int) -> Tensor:
    """Token ids, (tokens,), as texts of `length` from the start: (texts, length)."""
    whole = len(tokens) // length * length
    return tokens[:whole].reshape(-1, length)


def _hash(document: str) -> bytes:
    return hashlib.sha256(document.strip().encode()).digest()


def _share(documents: list[str], sharing: list[str], purpose: str) -> Iterator[str]:
    """The neighbouring documents that are `purpose`'s share of a pool, by characters in proportion to `SHARES`."""
    total = sum(map(len, documents))
    weights = [SHARES.get(p, SHARES["evaluation"]) for p in sharing]
    position = sharing.index(purpose)
    low = total * sum(weights[:position]) / sum(weights)
    high = total * sum(weights[: position + 1]) / sum(weights)
    start = 0
    for document in documents:
        if low <= start < high:
            yield document
        start += len(document)
