"""Nested records as flat ones."""

from __future__ import annotations

from typing import Any


def flatten(value: Any, name: str = "", separator: str = ".") -> dict[str, Any]:
    """Nested dictionaries as one, keys joined with `separator` below `name`; any other value by its name."""
    if not isinstance(value, dict):
        return {name: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= flatten(inner, f"{name}{separator}{key}" if name else str(key), separator)
    return flat
