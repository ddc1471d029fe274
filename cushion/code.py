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

from functools import lru_cache
from pathlib import Path

from cushion.errors import ConfigError
from cushion.hashing import digest
from cushion.syntax import Sources, source_of

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
        "cushion.integrity",
        "cushion.models.embedded",  # weights stand in the keys by the model's fingerprint
        "cushion.models.gguf_files",
        "cushion.models.tiny",
        "cushion.quantization.estimators.base",  # their code stands in the identity of a quantizer
        "cushion.quantization.estimators.registry",
        "cushion.quantization.formats",
        "cushion.quantization.parts",  # with its modules; what they decide stands in the identity of a quantizer
        "cushion.quantization.quantizer",
        "cushion.registry",
        "cushion.sources",
        "cushion.step",
        "cushion.syntax",
        "cushion.text_files",
    }
)
"""Modules that are in no step's version, whoever imports them."""

SHOWN = (
    "__main__", "cli", "composition", "export", "final_numbers", "generate", "journal", "launching", "preflight",
    "progress", "remade", "reporting", "rerun", "start", "sweeps", "system_errors", "tracking", "words",
)  # fmt: skip
"""Modules and packages of Cushion that only show what was computed: they are in no version at all."""


_OWN = Sources(PACKAGE, [Path(__file__).parent])


def _sources(package: str) -> Sources:
    """The source of Cushion, or of a user's package or module."""
    if package == PACKAGE:
        return _OWN
    found = source_of(package)
    if found is None:
        raise ConfigError(
            f"the source of {package}, which defines a cached step, cannot be found, so nothing could tell when it "
            "changes: define the step in a file"
        )
    return found


def version_at(place: str) -> str:
    """The version of what `module:attribute` names: of its module."""
    return version_of(place.partition(":")[0])


@lru_cache
def version_of(module: str) -> str:
    """Hash of everything in a module's import closure that can decide a number.

    A module of a user's package counts with what it imports of its own package, and with the closure of what these
    import of Cushion. One of a package of `INFRASTRUCTURE`, which stands in keys by itself, counts with what it imports
    of that package.
    """
    package = module.partition(".")[0]
    sources = _sources(package)
    names = sources.closure(module, _left_out(module))
    hashes = {name: sources.hash_of(name) for name in names}
    if sources is not _OWN:
        for own in {own for name in names for own in sources.imports(name, _OWN)} - INFRASTRUCTURE:
            hashes |= {name: _OWN.hash_of(name) for name in _OWN.closure(own, _left_out(own))}
    return digest(sorted(hashes.items()))


def _left_out(module: str) -> frozenset[str]:
    """`INFRASTRUCTURE` without a package that the module is of, but for the root."""
    return frozenset(one for one in INFRASTRUCTURE if "." not in one or not module.startswith(f"{one}."))


@lru_cache(maxsize=1)
def package_version() -> str:
    """Hash of the whole package but for what only shows results: part of the name of a run's folder."""
    shown = tuple(f"{PACKAGE}.{name}" for name in SHOWN)
    kept = [name for name in _OWN.modules if not any(name == one or name.startswith(f"{one}.") for one in shown)]
    return digest([[name, _OWN.hash_of(name)] for name in kept])
