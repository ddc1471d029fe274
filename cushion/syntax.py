"""The source of a package as it is on disk: read at once, and looked at as syntax trees, without what says nothing.

Comments, docstrings and layout are not in these trees, so they change no hash.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

from cushion.hashing import digest


class Sources:
    """The source of a package, or of a module that stands alone, as it was when this object was made.

    The files are read at once, and parsed when something is asked of them.

    Args:
        package: the name it is imported by.
        places: the package's folders, or the module's file.

    """

    def __init__(self, package: str, places: Iterable[Path]) -> None:
        self._text: dict[str, bytes] = {}
        self._tree: dict[str, ast.Module] = {}
        self._hash: dict[str, str] = {}
        self._named: dict[str, set[str]] = {}
        self._packages: set[str] = set()
        for place in places:
            for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
                parts = [package, *(path.relative_to(place).with_suffix("").parts if path != place else ())]
                if parts[-1] == "__init__":
                    parts.pop()
                    self._packages.add(".".join(parts))
                self._text.setdefault(".".join(parts), path.read_bytes())  # the first of two is imported

    @property
    def modules(self) -> list[str]:
        """The names of all modules, ascending by their files."""
        return list(self._text)

    def hash_of(self, module: str) -> str:
        """Hash of a module's syntax tree, or of the text of a file that cannot be parsed, which nothing can import."""
        if module not in self._hash:
            try:
                what = ast.dump(self._parsed(module))
            except SyntaxError:
                what = f"text {self._text[module].hex()}"
            self._hash[module] = digest(what)
        return self._hash[module]

    def _parsed(self, module: str) -> ast.Module:
        if module not in self._tree:
            self._tree[module] = _without_docstrings(ast.parse(self._text[module]))
        return self._tree[module]

    def imports(self, module: str, of: Sources | None = None) -> set[str]:
        """The modules of this package (or those `of` another) that a module imports itself, type checkers' aside."""
        known = (of or self)._text.keys()
        return {part for name in self._imported(module) for part in _and_packages_above(name)} & known - {module}

    def _imported(self, module: str) -> set[str]:
        """All names that a module imports, those of attributes of modules among them."""
        if module not in self._named:
            names: set[str] = set()
            for node in _imports(self._parsed(module).body):
                if isinstance(node, ast.Import):
                    names |= {alias.name for alias in node.names}
                else:
                    base = self._absolute(module, node)
                    names |= {f"{base}.{alias.name}" for alias in node.names}
            names |= {match[1] for node in ast.walk(self._parsed(module)) if (match := _lazily_named(node))}
            self._named[module] = names
        return self._named[module]

    def closure(self, module: str, without: frozenset[str]) -> set[str]:
        """A module and all that it imports, directly or through others, but for `without` and what only they import.

        A package that is left out is left out with its modules, but for the root, which is its own `__init__` alone.
        """
        found, left = {module}, [module]
        while left:
            for name in self.imports(left.pop()) - found:
                package = name.rpartition(".")[0]
                if name not in without and not ("." in package and package in without):
                    found.add(name)
                    left.append(name)
        return found

    def _absolute(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parts = module.split(".")
        parts = parts[: len(parts) - node.level + (module in self._packages)]
        return ".".join([*parts, *([node.module] if node.module else [])])


def _and_packages_above(name: str) -> list[str]:
    """A module's name and those of the packages above it, which are run with it."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def _imports(body: Iterable[ast.AST]) -> Iterator[ast.Import | ast.ImportFrom]:
    for node in body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from _imports(node.orelse)
        else:
            yield from _imports(ast.iter_child_nodes(node))


def _lazily_named(node: ast.AST) -> re.Match[str] | None:
    """What a string `module:attribute` names, to be imported when it is used."""
    if not (isinstance(node, ast.Constant) and isinstance(node.value, str)):
        return None
    return re.fullmatch(r"([\w.]+):\w+", node.value)


def _without_docstrings(tree: ast.Module) -> ast.Module:
    """The tree without statements that are only a string: docstrings of modules, classes, functions and attributes."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [item for item in body if not _is_string(item)]  # type: ignore[attr-defined]
    return tree


def _is_string(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def source_of(package: str) -> Sources | None:
    """The source of a package or module that is imported, read when it is first asked for; None if it has no file."""
    module = sys.modules.get(package)
    folders, file = getattr(module, "__path__", None), getattr(module, "__file__", None)
    if folders is not None:
        return _read(package, tuple(map(str, folders)))
    return None if file is None else _read(package, (str(file),))


@lru_cache
def _read(package: str, places: tuple[str, ...]) -> Sources:
    return Sources(package, map(Path, places))
