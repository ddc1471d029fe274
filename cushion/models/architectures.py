"""The families that are known, Cushion's own and those of plugins, and which entry holds for a configuration.

A user's package registers a family in one file; docs/extending.md walks through it. Plugins import this module, so it
is light: no torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from cushion.errors import ConfigError, UnsupportedModelError, did_you_mean
from cushion.models.entry import Architecture, Requirements, ResidualStream, Values, cache_shape
from cushion.models.families import BEYOND_AN_ENTRY, ENTRIES
from cushion.registry import PLUGINS, Registry

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "ResidualStream",
    "Values",
    "cache_shape",
    "expand",
    "find_architecture",
    "register",
]

ARCHITECTURES: Registry[tuple[Architecture, ...]] = Registry("model_type", __package__, PLUGINS)
"""The entries of each family, in the order in which they are tried: Cushion's own, then those of plugins."""


def register(*entries: Architecture) -> None:
    """Make a family known: all of its entries, in the order in which they are to be tried.

    Raises:
        ConfigError: they are not of one family, or the family is known already.

    """
    families = list(dict.fromkeys(entry.model_type for entry in entries))
    if len(families) != 1:
        raise ConfigError(f"model_type={', '.join(families)}: register the entries of one family, and of one alone")
    try:
        ARCHITECTURES.register(families[0], entries)
    except ConfigError as error:
        raise ConfigError(
            f"model_type={families[0]} is registered twice: all entries of a family are registered in one place"
        ) from error


for _model_type in dict.fromkeys(entry.model_type for entry in ENTRIES):
    register(*(entry for entry in ENTRIES if entry.model_type == _model_type))


def plugin_identity(architecture: Architecture) -> dict[str, Any] | None:
    """What an entry says, as plain JSON, where it is not one of this file: no version of code speaks for those."""
    return None if architecture in ENTRIES else asdict(replace(architecture, tiny=None))


def expand(block: nn.Module, path: str) -> list[str]:
    """The paths that a path of the table stands for in `block`, every `*` replaced by the name of each child there."""
    parent, star, rest = path.partition(".*.")
    if not star:
        return [path]
    children = [name for name, _ in block.get_submodule(parent).named_children()]
    return [expanded for child in children for expanded in expand(block, f"{parent}.{child}.{rest}")]


def unmet(requirements: Requirements, config: Any) -> Iterable[tuple[str, Any]]:
    """The keys that a configuration does not have as required, with the values that it has."""
    for key, needed in requirements:
        value = getattr(config, key, None)
        if value != needed:
            yield key, value


def find_architecture(config: Any, model: str) -> Architecture:
    """The entry of the table for a transformers configuration.

    Args:
        config: of the model, or of its text part; of a multimodal model, the entry is that of its text part.
        model: `model.path`, for the message.

    Raises:
        UnsupportedModelError: naming the model, its architecture and what there is.

    """
    model_type = str(config.model_type)
    if model_type not in ARCHITECTURES:
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        if any(model_type in entry.multimodal for entry in ARCHITECTURES.get(text.model_type) or ()):
            return find_architecture(text, model)
        raise UnsupportedModelError(
            f"model.path={model!r} has the architecture {model_type!r}, which is not supported{_way_out(model_type)}"
        )
    for entry in ARCHITECTURES[model_type]:
        if not any(unmet(entry.requires, config)):
            return entry
    keys = dict.fromkeys(key for entry in ARCHITECTURES[model_type] for key, _ in entry.requires)
    values = ", ".join(f"{key}={getattr(config, key, None)}" for key in keys)
    raise UnsupportedModelError(
        f"model.path={model!r} is a variant of {model_type!r} that is not supported ({values}); an entry of the "
        "table may add it, see docs/extending.md"
    )


def _way_out(model_type: str) -> str:
    """What can be done about a family that is not in the table."""
    if model_type in BEYOND_AN_ENTRY:
        return f"; an entry of the architecture table cannot add it: {BEYOND_AN_ENTRY[model_type]}"
    known = ", ".join(sorted(ARCHITECTURES))
    hint = did_you_mean(model_type, ARCHITECTURES)
    return f" (supported: {known}){hint}; a plugin of one file adds it, see docs/extending.md"
