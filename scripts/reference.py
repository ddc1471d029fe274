"""Refresh what the pages of docs/ take from the code: tables of keys and options, and the sections of methods.

Usage: `python scripts/reference.py`. A page has blocks from `<!-- generated: KIND ARGUMENT -->` to `<!-- end -->`:

| kind | argument | what it gives |
|---|---|---|
| `keys` | a group | a line for each key, from the strings behind the fields of its dataclass |
| `options` | a group | a line for each file of `conf/<group>`, from the comment at its head |
| `doc` | `module:Object` or `module:Class.field` | the table in its docstring |
| `args` | `module:Class` | what the class takes |
| `columns` | | the columns of a row, from the tables in the docstrings of metrics |
| `steps` | | a line for each cached step, from `Files:`, `Key:` and `Of that:` behind its name |
| `sections` | a package or a module | docstrings from a heading on, but those of modules that the page names itself |
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any

import yaml

import cushion
from cushion.config import RunConfig
from cushion.config.data import CorpusConfig
from cushion.metrics.columns import metrics

PACKAGE = Path(cushion.__file__).resolve().parent
ROOT = PACKAGE.parent
PAGES = ROOT / "docs"

BLOCK = re.compile(r"^(<!-- generated: (\w+) ?(\S*) -->\n)(.*?)^(<!-- end -->)$", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#{2,} (.*)$", re.MULTILINE)
WORDS = ("Allowed", "Paper", "PrefixQuant", "Files", "Key", "Of that")
"""What a string says of its own behind a colon."""
PURPOSE = "<purpose>"
"""How the four purposes of `data` are written at once."""


def tree_of(module: str) -> ast.Module:
    """The syntax tree of a module of this package."""
    path = ROOT.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8"))


def said(node: ast.stmt | None) -> str | None:
    """The text of a string that stands alone."""
    is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    return node.value.value if is_text else None  # type: ignore[union-attr]


def described(one: type) -> dict[str, str]:
    """By field of a class, the string behind it."""
    tree = tree_of(one.__module__)
    (body,) = (node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == one.__name__)
    found = {}
    for node, after in pairwise(body):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and (text := said(after)) is not None:
            found[node.target.id] = text
    return found


def cells(text: str) -> dict[str, str]:
    """What a string says (under ""), and behind each of `WORDS` that starts a line, on one line each."""
    parts = re.split(rf"^({'|'.join(WORDS)}): ", inspect.cleandoc(text), flags=re.MULTILINE)
    pairs = [("", parts[0]), *zip(parts[1::2], parts[2::2], strict=True)]
    return {word: " ".join(content.split()) for word, content in pairs}


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table of Markdown."""
    lines = (f"| {' | '.join(row)} |" for row in [head, *rows])
    first, *others = (re.sub(r"\|  (?=\|)", "| ", line) for line in lines)
    return "\n".join([first, "|---" * len(head) + "|", *others])


def as_written(value: Any) -> str:
    """A value the way the command line takes it."""
    if dataclasses.is_dataclass(value):
        return f"{{{', '.join(f'{key}: {as_written(own)}' for key, own in vars(value).items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(as_written, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {as_written(own)}' for key, own in value.items())}}}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def documented(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, dict[str, str]]]:
    """Every key of a group that has a description, with its default; the purposes of `data` once."""
    texts, seen = described(type(config)), False
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, CorpusConfig):
            if not seen:
                yield from documented(value, f"{PURPOSE}.")
            seen = True
        elif dataclasses.is_dataclass(value):
            yield from documented(value, f"{prefix}{field.name}.")
        elif field.name in texts:
            yield prefix + field.name, value, cells(texts[field.name])


def keys(group: str) -> str:
    """The table of a group's keys; of `run`, those of `paths` and the single ones."""
    if group == "run":
        found = [*documented(RunConfig().paths, "paths."), *_single()]
    else:
        found = list(documented(getattr(RunConfig(), group)))
    words = dict.fromkeys(word for _, _, cell in found for word in cell if word not in ("", "Allowed"))
    rows = [
        [f"`{key}`", cell[""], cell["Allowed"], f"`{as_written(value)}`", *(cell.get(word, "") for word in words)]
        for key, value, cell in found
    ]
    titles = ("paper, and why" if word == "Paper" else word for word in words)
    return table(["key", "meaning", "allowed", "default", *titles], rows)


def _single() -> Iterator[tuple[str, Any, dict[str, str]]]:
    for key, text in described(RunConfig).items():
        yield key, getattr(RunConfig(), key), cells(text)


def options(group: str) -> str:
    """The table of a group's options, each with what its file sets; of models, path and dtype."""
    files = [(path.stem, path.read_text(encoding="utf-8")) for path in sorted((ROOT / "conf" / group).glob("*.yaml"))]
    if group == "model":
        models = [(name, yaml.safe_load(text)) for name, text in files]
        return table(
            ["option", "`path`", "`dtype`"],
            [[f"`{name}`", f"`{of['path']}`" if of["path"] else "yours", f"`{of['dtype']}`"] for name, of in models],
        )
    rows, defaults = [], dict(_flat(dataclasses.asdict(getattr(RunConfig(), group))))
    for name, text in files:
        head = " ".join(line.lstrip("# ") for line in takewhile(lambda line: line.startswith("#"), text.splitlines()))
        content = {key: value for key, value in yaml.safe_load(text).items() if key != "name"}
        sets = ", ".join(f"`{key}={value}`" for key, value in _flat(content) if defaults.get(key) != value)
        rows.append([f"`{name}`", head.replace("|", "\\|"), sets])
    width = 2 if group == "data" else 3
    return table(["option", "what it is", "what it sets"][:width], [row[:width] for row in rows])


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, as_written(value)


def said_by(name: str) -> str:
    """The table in the docstring of an object, or in the string behind a field of a class."""
    module, _, path = name.partition(":")
    owner, _, field = path.partition(".")
    found = getattr(importlib.import_module(module), owner)
    text = described(found)[field] if field else found.__doc__
    return "\n".join(line for line in inspect.cleandoc(text).splitlines() if line.startswith("|"))


def arguments(name: str) -> str:
    """The table of what a dataclass takes, from `Args:` of its docstring."""
    module, _, path = name.partition(":")
    found = getattr(importlib.import_module(module), path)
    listed = inspect.cleandoc(found.__doc__ or "").partition("Args:\n")[2].partition("\n\n")[0]
    texts = re.findall(r"^    (\w+): ((?:.*\n?)(?:^ {5,}.*\n?)*)", listed, re.MULTILINE)
    defaults = {field.name: field.default for field in dataclasses.fields(found)}
    shown = {
        key: f"`{value!r}`" for key, value in defaults.items() if isinstance(value, int | float | str | tuple | None)
    }
    return table(
        ["field", "meaning", "default"],
        [[f"`{key}`", " ".join(text.split()), shown.get(key, "")] for key, text in texts],
    )


def columns(_: str) -> str:
    """The table of the columns of a row, from the tables in the docstrings of metrics."""
    own = [metric for metric in metrics() if metric.columns.__module__.startswith("cushion.")]
    texts = (sys.modules[metric.columns.__module__].__doc__ or "" for metric in own)
    tables = (re.findall(r"^\| `.*$", text.partition("\n## ")[0], re.MULTILINE) for text in texts)
    return "\n".join(["| column | content |", "|---|---|", *(row for rows in tables for row in rows)])


def steps(_: str) -> str:
    """The table of cached steps, from the strings behind their names, and whether their code keeps a checkpoint."""
    rows = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            for one, after in pairwise(node.body) if isinstance(node, ast.ClassDef) else ():
                of = cells(said(after) or "")
                if isinstance(one, ast.Assign) and "Key" in of:
                    name, killed = ast.literal_eval(one.value), _killed(path, node.name)
                    rows.append([f"`{name}`", of["Files"], killed, of["Key"], of.get("Of that", "")])
    return table(["step", "files", "killed", "key", "what is in it"], sorted(rows))


def _killed(path: Path, name: str) -> str:
    """What a step does that was killed within: it goes on where the function that makes it loads a checkpoint."""
    module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    return "goes on" if "checkpoint.load()" in inspect.getsource(getattr(module, name).make) else "starts over"


def _docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


def sections(name: str, named: frozenset[Path] = frozenset()) -> str:
    """What the modules of a package say from a heading in their docstrings on, by title; not of those `named` alone."""
    place = ROOT.joinpath(*name.split("."))
    paths = sorted({*place.rglob("*.py")} - named) if place.is_dir() else [place.with_suffix(".py")]
    found = {}
    for path in paths:
        text = _docstring(path)
        if heading := HEADING.search(text):
            source = f"*`{path.relative_to(ROOT)}`*"
            title, body = text[heading.start() :].split("\n", 1)
            assert heading[1] not in found, f"{path.relative_to(ROOT)}: another module has the heading {heading[1]!r}"
            found[heading[1]] = f"{title}\n\n{source}\n\n{textwrap.dedent(body).strip()}"
    assert found, f"no docstring below {name} has a heading"
    return "\n\n".join(found[title] for title in sorted(found, key=str.lower))


KINDS = {"keys": keys, "options": options, "doc": said_by, "args": arguments, "columns": columns, "steps": steps}


def refreshed(text: str) -> str:
    """A page with its blocks made anew."""
    arguments = [match[3] for match in BLOCK.finditer(text) if match[2] == "sections"]
    named = frozenset(ROOT.joinpath(*name.split(".")).with_suffix(".py") for name in arguments)

    def block(match: re.Match[str]) -> str:
        content = sections(match[3], named) if match[2] == "sections" else KINDS[match[2]](match[3])
        return f"{match[1]}\n{content}\n\n{match[5]}"

    return BLOCK.sub(block, text)


def hand_written(text: str) -> str:
    """A page without its blocks."""
    return BLOCK.sub("", text)


def main() -> None:
    for path in sorted(PAGES.rglob("*.md")):
        text = path.read_text(encoding="utf-8")
        if (new := refreshed(text)) != text:
            path.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
