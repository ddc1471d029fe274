"""Where text comes from: named sets from the hub or a folder, the embedded text, and the user's own files."""

from __future__ import annotations

import bz2
import importlib.metadata
import os
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path

from cushion.config import CorpusConfig, DataConfig, PathsConfig
from cushion.errors import DataError
from cushion.text_files import Render, files_of, read_documents, read_lines

HUB_DOCUMENTS = 4000
"""How many documents are read from the head of a hub split that is too large to read whole (C4)."""

_EMBEDDED_PACKAGE, _EMBEDDED_VERSION = "gensim", "4.4.0"
_EMBEDDED_FILE = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
_WIKITEXT_TITLE = re.compile(r"^ = [^=].* = \n?$")


def local_files(config: DataConfig, paths: PathsConfig) -> list[Path]:
    """The files that the four corpora are read from, where they are files of the user's and not sets from elsewhere."""
    origins = {locate(corpus, paths)[0] for corpus in config.purposes().values()}
    return [file for origin in sorted(origins) if Path(origin).is_absolute() for file in files_of(Path(origin))]


def locate(
    corpus: CorpusConfig, paths: PathsConfig, render: Render | None = None
) -> tuple[str, Callable[[], Iterable[str]]]:
    """A name that is the same for the same text, and a function that reads it; `render` makes text of chats."""
    if corpus.source == "embedded":
        return f"{_EMBEDDED_PACKAGE}:{_EMBEDDED_FILE}", _read_embedded
    if corpus.source == "file":
        path = Path(corpus.path or "").expanduser()
        return os.path.realpath(path), lambda: read_documents(path, corpus.text_field, render)
    if paths.data_dir is not None:
        root = Path(paths.data_dir).expanduser()
        if not root.is_dir():
            raise DataError(f"paths.data_dir={paths.data_dir!r} is not a folder: check the path")
        if corpus.source == "c4":
            path = root / "c4" / "c4.utf8"
            return os.path.realpath(path), lambda: read_lines(path)
        names = {"train": "train.head.rows.jsonl", "test": "test.rows.jsonl", "validation": "validation.rows.jsonl"}
        path = root / "wikitext2_raw" / names[corpus.split]
        return os.path.realpath(path), lambda: wikitext_articles(read_documents(path, "text"), "\n\n")
    if corpus.source == "c4":
        return f"hub:allenai/c4/en/{corpus.split}", lambda: _read_hub("allenai/c4", "en", corpus.split, HUB_DOCUMENTS)
    name, subset = "Salesforce/wikitext", "wikitext-2-raw-v1"
    return f"hub:{name}/{subset}/{corpus.split}", lambda: wikitext_articles(
        _read_hub(name, subset, corpus.split, None), "\n\n"
    )


def wikitext_articles(rows: Iterable[str], separator: str = "") -> Iterator[str]:
    """Rows of WikiText joined to articles, such that joining the articles with `separator` joins all rows so."""
    article: list[str] = []
    for row in rows:
        if _WIKITEXT_TITLE.match(row) and any(line.strip() for line in article):
            yield separator.join(article)
            article = []
        article.append(row)
    if article:
        yield separator.join(article)


def _read_hub(name: str, subset: str, split: str, limit: int | None) -> Iterator[str]:
    import datasets  # slow to import, and not needed for local text

    try:
        rows = datasets.load_dataset(name, subset, split=split, streaming=limit is not None)
        for row in rows if limit is None else islice(rows, limit):
            yield row["text"]
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise DataError(
            f"the set {name} ({subset}, {split}) cannot be read from the hub: {reason} -- "
            "check the network, or set paths.data_dir to a folder that holds it"
        ) from error


@lru_cache(maxsize=1)
def _read_embedded() -> list[str]:
    """English Wikipedia articles (CC BY-SA) out of gensim's test data, with the wiki markup taken out.

    Kept for the next run of a sweep: taking the markup out needs some seconds.
    """
    hint = f"pip install {_EMBEDDED_PACKAGE}=={_EMBEDDED_VERSION}"
    try:
        files = importlib.metadata.files(_EMBEDDED_PACKAGE) or []
        from gensim.corpora.wikicorpus import filter_wiki
    except ImportError as error:  # PackageNotFoundError is an ImportError
        raise DataError(f"source=embedded needs the text in the PyPI package {_EMBEDDED_PACKAGE}: {hint}") from error
    path = next((Path(str(f.locate())) for f in files if f.name == _EMBEDDED_FILE), None)
    if path is None or not path.is_file():
        raise DataError(f"the installed {_EMBEDDED_PACKAGE} does not carry {_EMBEDDED_FILE}: {hint}")
    pages = ElementTree.fromstring(bz2.decompress(path.read_bytes())).findall("{*}page")
    markups = [page.findtext("{*}revision/{*}text") or "" for page in pages]
    return [_plain_text(filter_wiki(text)) for text in markups if not text.lstrip().lower().startswith("#redirect")]


def _plain_text(filtered: str) -> str:
    """What `filter_wiki` leaves of the markup taken out too: quotes for bold, headings, list marks, empty brackets."""
    text = re.sub(r"'{2,}", "", filtered)
    text = re.sub(r"\(\s*[;,\s]*\)", "", text)
    text = re.sub(r"^[*#:;]+\s*", "", text, flags=re.MULTILINE)
    text = re.sub(r"^\s*=+\s*(.*?)\s*=+\s*$", r"\1", text, flags=re.MULTILINE)
    text = re.sub(r"[ \t]+", " ", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()
