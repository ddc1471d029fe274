"""Write docs/trouble.md: what each error of Cushion says, and the way out, as the code has them.

The messages are read from the source, as syntax trees: every call of a class of `cushion.errors`, every `require`
whose reason holds a way out, and every warning that is made in a function of that name. What a message fills in stands
in angle brackets. Usage: `python scripts/trouble.py`.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import cushion
from cushion import errors
from cushion.config import RunConfig

PACKAGE = Path(cushion.__file__).resolve().parent
PAGE = PACKAGE.parent / "docs" / "trouble.md"

CLASSES = [
    (name, one)
    for name, one in vars(errors).items()
    if inspect.isclass(one) and issubclass(one, errors.CushionError) and one is not errors.CushionError
]
"""The classes of errors, in the order in which `cushion/errors.py` has them."""

VERBS = (
    "ask calibrate check choose define delete download enlarge find fit gather generate give go install learn leave "
    "lengthen look lower make measure mend name pip put raise register rename run set shorten start take turn use write"
)
"""What a way out begins with."""
DEEPEST = 3
"""How many names a text is followed through."""
WAY_OUT = re.compile(rf"(?:: |; | -- |, )((?:or )?(?:{'|'.join(VERBS.split())})\b.*)$", re.DOTALL)

BLANK = re.compile(r"<[^>]*>")
ANYTHING = re.compile(r"(<[^>]*>|[\W\d])*|<key>=<\w+> is not allowed: <\w+>.*")
"""A message that the page does not list: it only passes on another, or is the one that the page begins with."""
FIRST_KEY = re.compile(rf"(?<![\w.])({'|'.join(field.name for field in fields(RunConfig))})(?=[.=])")
"""The group of the first key that a message names."""
OTHERS = "Others"

HEAD = """# Trouble

<!-- Written by scripts/trouble.py from the messages in the code: change them there. -->

A mistake that you can mend ends a command with exit status 1 and one line on standard error:
`cushion: error: <message>`. So do a full disk and a folder that cannot be written. Ctrl-C ends it with exit status 130.

From Python it is one of the exceptions below. All of them are `cushion.errors.CushionError`, and that is a
`ValueError`. Anything else with a traceback is a bug: please report it with the command.

To find a message, search this page for the words between the values. What a message fills in stands in angle
brackets: `<name>`.

- `<key>=<value> is not allowed: <what is allowed>`: a single value is out of range. [Configuration](config.md) lists
  what every key takes.
- `<key> is not a key of the configuration`: a misspelt key. `cushion --cfg job` prints them all.
- In a sweep, all runs are checked before the first one starts, and the message counts the invalid ones. A run that
  fails later is reported, and the others go on.
- The same command, started again, goes on from the steps that were finished.
- A run that was done may have [warnings](#warnings).
"""

WARNINGS = """## Warnings

They stand on standard error and in `warnings` of `result.json`, and the run goes on. `<key>=<value> has no
effect with <other key>=<value>` ([options without effect](config.md#options-without-effect)).

| most of the others |
|---|"""
TOLD = re.compile(r"_?\w*warnings?|_warn")
"""What functions are called that make or hand on warnings."""


def text_of(node: ast.expr | None, names: dict[str, ast.expr], depth: int = 0) -> str:
    """The text that an expression makes, with `<name>` for what is not known before it runs."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part, names, depth) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        known = names.get(node.value.id) if isinstance(node.value, ast.Name) else None
        if isinstance(known, ast.Constant) and isinstance(known.value, float) and node.format_spec is not None:
            return format(known.value, text_of(node.format_spec, names, depth))
        return text_of(node.value, names, depth)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Div):
        between = "" if isinstance(node.op, ast.Add) else "/"
        return text_of(node.left, names, depth) + between + text_of(node.right, names, depth)
    if isinstance(node, ast.Name):
        known = names.get(node.id)
        return text_of(known, names, depth + 1) if known is not None and depth < DEEPEST else _blank(node.id)
    if isinstance(node, ast.Attribute):
        return _blank(node.attr)
    if isinstance(node, ast.Subscript):
        return text_of(node.value, {}, depth)
    if isinstance(node, ast.IfExp):
        first = text_of(node.body, names, depth)
        return text_of(node.orelse, names, depth) if first in ("", "null") else first
    if isinstance(node, ast.BoolOp):
        return text_of(node.values[0], names, depth)
    if isinstance(node, ast.Call):
        return _call(node, names, depth)
    return "<value>"


def _blank(name: str) -> str:
    """What stands for a value that a message fills in."""
    return f"<{name.strip('_').lower()}>"


def _call(node: ast.Call, names: dict[str, ast.expr], depth: int) -> str:
    """What a call puts into a text: that of a function with one expression, of joined items, of its only argument."""
    called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    if called == "did_you_mean":
        return "<hint>"
    if called == "len":
        return "<number>"
    if called in names and depth < DEEPEST:
        return text_of(names[called], names, depth + 1)
    if node.args:
        if isinstance(node.func, ast.Attribute) and isinstance(node.args[0], ast.Constant):
            return _blank(str(node.args[0].value))
        return text_of(node.args[-1] if called == "map" else node.args[0], {}, depth)
    return text_of(node.func.value, {}, depth) if called in ("item", "split") else _blank(called)


def _texts(body: list[ast.stmt]) -> dict[str, ast.expr]:
    """What names stand for: each that is bound once to a text, and each function that only returns one."""
    found: dict[str, list[ast.expr]] = defaultdict(list)
    for statement in body:
        for node in [statement] if isinstance(statement, ast.FunctionDef) else ast.walk(statement):
            if isinstance(node, ast.FunctionDef) and isinstance(last := node.body[-1], ast.Return) and last.value:
                if len(node.body) <= 2:
                    found[node.name].append(last.value)
            elif isinstance(node, ast.Assign) and len(node.targets) == 1:
                for target, value in _pairs(node.targets[0], node.value):
                    found[target].append(value)
    kinds = (ast.JoinedStr, ast.Constant, ast.IfExp)
    return {name: values[0] for name, values in found.items() if len(values) == 1 and isinstance(values[0], kinds)}


def _pairs(target: ast.expr, value: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    if isinstance(target, ast.Name):
        yield target.id, value
    elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        for one, other in zip(target.elts, value.elts, strict=True):
            yield from _pairs(one, other)


def messages(path: Path, shared: dict[str, ast.expr]) -> Iterator[tuple[str, str]]:
    """The class and the text of every error that a module makes."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    known = {name for name, _ in CLASSES}
    own = {**shared, **_texts([node for node in tree.body if not isinstance(node, ast.ClassDef)])}

    def visit(node: ast.AST, names: dict[str, ast.expr]) -> Iterator[tuple[str, str]]:
        if isinstance(node, ast.FunctionDef):
            given = {argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)}
            names = {**{name: text for name, text in names.items() if name not in given}, **_texts(node.body)}
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
            if node.func.id in known:
                yield node.func.id, text_of(node.args[0], names)
            elif node.func.id == "require" and WAY_OUT.search(f": {text_of(node.args[3], names)}"):
                key, value, allowed = (text_of(argument, names) for argument in node.args[1:])
                yield "ConfigError", f"{key}={value} is not allowed: {allowed}"
        for child in ast.iter_child_nodes(node):
            yield from visit(child, names)

    return visit(tree, own)


def warnings_of(path: Path) -> Iterator[str]:
    """The text of every warning that a module makes: what such a function lists, appends or yields, or is given."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and TOLD.fullmatch(node.name):
            names = _texts(node.body)
            for one in (inner for statement in node.body for inner in ast.walk(statement)):
                found: list[ast.expr] = []
                if isinstance(one, ast.Return | ast.Yield) and one.value is not None:
                    found = one.value.elts if isinstance(one.value, ast.List) else [one.value]
                elif isinstance(one, ast.Call) and getattr(one.func, "attr", "") == "append":
                    found = one.args
                yield from (text_of(text, names) for text in found if isinstance(text, ast.JoinedStr | ast.Constant))
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "_warn":
            yield from (text_of(text, {}) for text in node.args if isinstance(text, ast.JoinedStr | ast.Constant))


def split(message: str) -> tuple[str, str]:
    """What a message says is wrong, and the way out that it names; that is empty where what is wrong says it."""
    found = WAY_OUT.search(message)
    return (message[: found.start()], found[1]) if found else (message, "")


def section(name: str, one: type[errors.CushionError], found: list[tuple[str, str]]) -> Iterator[str]:
    """The part of the page about a class of errors: what it means, and its messages, by the group of the first key."""
    yield f"## `{name}`\n\n{inspect.getdoc(one)}\n"
    groups: dict[str, list[str]] = defaultdict(list)
    for wrong, way_out in found:
        key = FIRST_KEY.search(wrong) if one is errors.ConfigError else None
        groups[f"`{key[1]}`" if key else OTHERS].append(f"| {_message(wrong)} | {_way_out(way_out)} |")
    for group in sorted(groups, key=lambda group: (group == OTHERS, group)):
        title = [f"### {group}", ""] if len(groups) > 1 else []
        different = {BLANK.sub("<>", row): row for row in groups[group]}
        yield "\n".join([*title, "| message, with its cause | way out |", "|---|---|", *different.values(), ""])


def page() -> str:
    """The text of docs/trouble.md."""
    rows: dict[str, list[tuple[str, str]]] = {name: [] for name, _ in CLASSES}
    schema = ast.parse((PACKAGE / "schema.py").read_text(encoding="utf-8"))
    shared = {name: value for name, value in _texts(schema.body).items() if name == "way_out"}
    for path in sorted(PACKAGE.rglob("*.py")):
        for kind, message in messages(path, shared):
            line = " ".join(message.replace("<hint>", "").split())
            if not ANYTHING.fullmatch(line):
                rows[kind].append(split(line))
    parts = [part for name, one in CLASSES for part in section(name, one, rows[name])]
    paths = sorted(PACKAGE.rglob("*.py"), key=lambda path: (path.name != "run_warnings.py", path))
    told = (" ".join(text.split()) for path in paths for text in warnings_of(path))
    lines = dict.fromkeys(f"| {_message(warning)} |" for warning in told)
    return "\n".join([HEAD, *parts, WARNINGS, *lines, ""])


def _message(text: str) -> str:
    """A message as a cell of a table."""
    fence = "``" if "`" in text else "`"
    return f"{fence}{text}{fence}".replace("|", "\\|")


def _way_out(text: str) -> str:
    """A way out as a cell of a table: prose, in which what is filled in reads neither as a tag nor as bold."""
    return BLANK.sub(r"`\g<0>`", text).replace("__", "\\_\\_").replace("|", "\\|") or "see the message"


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
