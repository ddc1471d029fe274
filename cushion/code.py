"""Versions of code: what of the source can decide a number, by step and for the whole package.

A cached result must not outlive the code that made it, and must outlive everything else. The version of a module is a
hash over its import closure: its own syntax tree and those of all modules of the same package that it imports, directly
or through others, also inside of functions, or lazily by the name `module:attribute`. Comments, docstrings and layout
are not in a syntax tree, so they change no version; neither do the modules of `INFRASTRUCTURE`, which decide no number,
or only through what stands in the keys themselves.

The sources are read once, when this module is imported: code that changes on disk during a run never labels what the
code before it computed.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

from cushion.errors import ConfigError
from cushion.hashing import digest

PACKAGE = __package__

INFRASTRUCTURE = frozenset(
    {
        "cushion",  # its version and names for users
        "cushion.artifacts",  # how a step is stored, locked and read
        "cushion.checks",
        "cushion.code",
        "cushion.config",  # what it holds stands in the keys, value by value
        "cushion.config_warnings",
        "cushion.data",  # texts stand in the keys as digests of their token ids
        "cushion.errors",
        "cushion.events",
        "cushion.hashing",
        "cushion.models.embedded",  # weights stand in the keys by the model's fingerprint
        "cushion.models.tiny",
        "cushion.quantization.parts",  # with its modules; what they decide stands in the identity of a quantizer
        "cushion.quantization.quantizer",
        "cushion.registry",
        "cushion.sources",
        "cushion.step",
    }
)
"""Modules that are in no step's version, whoever imports them."""

SHOWN = ("cli", "export", "launching", "preflight", "progress", "reporting", "tracking")
"""Modules and packages of Cushion that only show what was computed: they are in no version at all."""


class Sources:
    """The source of a package, or of a module that stands alone, as it was when this object was made.

    Args:
        origin: the package's `__init__.py`, or the module's file.
        package: the name it is imported by.

    """

    def __init__(self, origin: Path, package: str) -> None:
        is_package = origin.name == "__init__.py"
        self._tree: dict[str, ast.Module] = {}
        self._hash: dict[str, str] = {}
        self._named: dict[str, set[str]] = {}
        self._packages: set[str] = set()
        for path in sorted(origin.parent.rglob("*.py")) if is_package else [origin]:
            parts = [package, *(path.relative_to(origin.parent).with_suffix("").parts if is_package else ())]
            if parts[-1] == "__init__":
                parts.pop()
                self._packages.add(".".join(parts))
            self._tree[".".join(parts)] = _without_docstrings(ast.parse(path.read_text(encoding="utf-8")))

    @property
    def modules(self) -> list[str]:
        """The names of all modules, ascending by their files."""
        return list(self._tree)

    def hash_of(self, module: str) -> str:
        """Hash of a module's syntax tree."""
        if module not in self._hash:
            self._hash[module] = digest(ast.dump(self._tree[module]))
        return self._hash[module]

    def imports(self, module: str, of: Sources | None = None) -> set[str]:
        """The modules of this package (or those `of` another) that a module imports itself, type checkers' aside."""
        known = (of or self)._tree.keys()
        return {part for name in self._imported(module) for part in _and_packages_above(name)} & known - {module}

    def _imported(self, module: str) -> set[str]:
        """All names that a module imports, those of attributes of modules among them."""
        if module not in self._named:
            names: set[str] = set()
            for node in _imports(self._tree[module].body):
                if isinstance(node, ast.Import):
                    names |= {alias.name for alias in node.names}
                else:
                    base = self._absolute(module, node)
                    names |= {f"{base}.{alias.name}" for alias in node.names}
            names |= {match[1] for node in ast.walk(self._tree[module]) if (match := _lazily_named(node))}
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


_OWN = Sources(Path(__file__).with_name("__init__.py"), PACKAGE)


@lru_cache
def _sources(package: str) -> Sources:
    """The source of Cushion, or of a user's package or module."""
    if package == PACKAGE:
        return _OWN
    place = getattr(sys.modules.get(package), "__file__", None)
    if place is None:
        raise ConfigError(
            f"the source of {package}, which defines a cached step, cannot be found, so nothing could tell when it "
            "changes: define the step in a file, and give a package an __init__.py"
        )
    return Sources(Path(place), package)


@lru_cache
def version_of(module: str) -> str:
    """Hash of everything in a module's import closure that can decide a number.

    A module of a user's package counts with what it imports of its own package, and with the closure of what these
    import of Cushion.
    """
    package = module.partition(".")[0]
    sources = _sources(package)
    names = sources.closure(module, INFRASTRUCTURE)
    hashes = {name: sources.hash_of(name) for name in names}
    if sources is not _OWN:
        for own in {own for name in names for own in sources.imports(name, _OWN)} - INFRASTRUCTURE:
            hashes |= {name: _OWN.hash_of(name) for name in _OWN.closure(own, INFRASTRUCTURE)}
    return digest(sorted(hashes.items()))


@lru_cache(maxsize=1)
def package_version() -> str:
    """Hash of the whole package but for what only shows results: part of the name of a run's folder."""
    shown = tuple(f"{PACKAGE}.{name}" for name in SHOWN)
    kept = [name for name in _OWN.modules if not any(name == one or name.startswith(f"{one}.") for one in shown)]
    return digest([[name, _OWN.hash_of(name)] for name in kept])
