"""The user's own text: files of plain text, JSON, JSON lines, CSV and Parquet, folders of them, and chats."""

from __future__ import annotations

import glob
import gzip
import json
import re
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from cushion.errors import DataError

Render = Callable[[list[dict[str, str]]], str]
"""A chat as text: from its messages, each with `role` and `content`, by a tokenizer's chat template."""

TEXT = (".txt", ".text", ".md", ".utf8", ".raw", ".tokens")
"""Names of files that are plain text end so; behind every name but Parquet's may stand `.gz`."""
_RECORDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet"}
_CHATS = ("messages", "conversations")
_ROLES = {"human": "user", "gpt": "assistant"}


def has_fields(path: Path) -> bool:
    """Whether the documents are a field of records, so that another field is another corpus."""
    return any(_format(file) not in ("text", None) for file in files_of(path))


def files_of(path: Path) -> list[Path]:
    """A file itself; of a folder all files in it and below it, by name, without hidden ones."""
    if not path.is_dir():
        return [path]
    inside = (file for file in path.rglob("*") if file.is_file())
    return sorted(file for file in inside if not any(part.startswith(".") for part in file.relative_to(path).parts))


def read_documents(path: Path, field: str, render: Render | None = None) -> Iterator[str]:
    """The documents of a file, or of all files of a folder one after another.

    Plain text is divided by blank lines, or has a document a line. Of records, the document is the text in `field`; a
    list of messages there, or in `messages` or `conversations` where there is no field `text`, is a chat.

    Args:
        path: of the file or folder.
        field: of a record that holds its document.
        render: makes text of a chat; None where there is no chat template.

    Raises:
        DataError: a file is missing, damaged or of no known format, or a record has no such text; the message names the
            file and the line or record.

    """
    files = files_of(path)
    if not files:
        raise DataError(f"the folder {path} holds no files: name one with text")
    for file in files:
        kind = _format(file)
        if kind is None:
            known = ", ".join([*TEXT, *_RECORDS])
            raise DataError(
                f"{file} is of no format that is read: its name must end in one of {known} (or these with .gz); "
                "rename plain text to end in .txt"
            )
        if kind == "text":
            lines = read_lines(file)
            paragraphs = re.split(r"\n\s*\n", "\n".join(lines).strip())
            yield from paragraphs if len(paragraphs) > 1 else lines
        else:
            for place, record in _read(file, kind, field):
                yield _document(record, field, f"{file} {place}", render)


def _format(path: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    last = suffixes[-1] if suffixes else ""
    if last == ".gz":
        last = suffixes[-2] if len(suffixes) > 1 and suffixes[-2] != ".parquet" else ""
    return "text" if last in TEXT else _RECORDS.get(last)


def _read(path: Path, kind: str, field: str) -> Iterable[tuple[str, Any]]:
    """Where each record of a file stands, in words, and the record."""
    if kind == "jsonl":
        return ((f"line {number}", record) for number, record in read_records(path))
    if kind == "json":
        return _read_json(path)
    return _read_table(path, kind, field)


def _read_json(path: Path) -> Iterator[tuple[str, Any]]:
    """Of a list of records or texts, or of JSON lines."""
    lines = read_lines(path)
    text = "\n".join(lines)
    if not text.lstrip().startswith("["):
        yield from ((f"line {number}", record) for number, record in _records(path, lines))
        return
    for number, record in enumerate(_parsed(text, str(path), "a JSON list"), start=1):
        if not isinstance(record, dict | str):
            raise DataError(f"{path} record {number} is not a JSON record or text but {type(record).__name__}")
        yield f"record {number}", record


def _read_table(path: Path, kind: str, field: str) -> Iterator[tuple[str, Any]]:
    """The rows of a CSV or Parquet file, read by `datasets` without its cache."""
    import datasets  # slow to import

    if not path.is_file():
        raise DataError(f"no data file {path}: check the path")
    options: dict[str, Any] = {}
    if kind != "parquet":
        options = {"sep": "\t" if kind == "tsv" else ",", "keep_default_na": False, "converters": {field: str}}
    with tempfile.TemporaryDirectory() as folder:  # of lock files: a home may be read-only
        try:
            rows = datasets.load_dataset(
                "parquet" if kind == "parquet" else "csv",
                data_files=glob.escape(str(path.resolve())),
                split="train",
                streaming=True,
                cache_dir=folder,
                **options,
            )
            for number, row in enumerate(rows, start=1):
                yield f"record {number}", row
        except DataError:
            raise
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise DataError(f"{path} cannot be read as {kind}: {reason}") from error


def _document(record: Any, field: str, where: str, render: Render | None) -> str:
    if isinstance(record, str):
        return record
    chat = next((name for name in _CHATS if name in record), None)
    name = chat if chat is not None and field == "text" and field not in record else field
    if name not in record:
        raise DataError(
            f"{where} has no field {name!r}, only {sorted(record)}: name one of them in data.<purpose>.text_field"
        )
    value = record[name]
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise DataError(f"{where}: the field {name!r} is no text but {type(value).__name__}")
    messages = [_message(item, f"{where}, message {number}") for number, item in enumerate(value, start=1)]
    if render is None:
        raise DataError(f"{where}: the field {name!r} is a chat, and there is no tokenizer to make text of it")
    try:
        return render(messages)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def _message(item: dict[str, Any], where: str) -> dict[str, str]:
    """A message with `role` and `content`, or with `from` and `value` as ShareGPT has them."""
    role, content = (item.get(name, item.get(other)) for name, other in (("role", "from"), ("content", "value")))
    if not isinstance(role, str) or not isinstance(content, str):
        raise DataError(
            f"{where} has {sorted(item)}, and a message has the texts 'role' and 'content', or 'from' and 'value'"
        )
    return {"role": _ROLES.get(role, role), "content": content}


def read_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number, from 1, and record of every line of a JSON-lines file that is not blank.

    Raises:
        DataError: the file is missing, or a line is no JSON record; the file and line are named.

    """
    yield from _records(path, read_lines(path))


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 file, without their ends and a byte-order mark, unpacked where its name ends in `.gz`.

    Raises:
        DataError: the file is missing, or is no such text.

    """
    if not path.is_file():
        raise DataError(f"no data file {path}: check the path")
    try:
        if path.suffix.lower() == ".gz":
            with gzip.open(path, "rt", encoding="utf-8-sig", newline=None) as file:
                return file.read().split("\n")
        return path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _records(path: Path, lines: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        record = _parsed(line, f"{path} line {number}", "a JSON record")
        if not isinstance(record, dict):
            raise DataError(f"{path} line {number} is not a JSON record but {type(record).__name__}")
        yield number, record


def _parsed(text: str, where: str, what: str) -> Any:
    """What a JSON text holds; half of a surrogate pair in it can be no text, nor be hashed."""
    try:
        value = json.loads(text)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start : error.end]
        raise DataError(f"{where} holds half of a surrogate pair, {half!a}, which is not text: take it out") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not {what}: {error}") from error
    return value
