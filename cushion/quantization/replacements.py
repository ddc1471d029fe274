"""Attributes of modules put in place of others for a while, and the way back. Nothing is changed in place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


class Replacements:
    """Keeps what stood in a model before, so that `undo` puts the very same objects back."""

    def __init__(self) -> None:
        self._originals: list[tuple[nn.Module, str, Any]] = []

    def put(self, module: nn.Module, name: str, value: Any) -> None:
        """Set the attribute `name` of `module`: a parameter, a child module or None."""
        self._originals.append((module, name, getattr(module, name)))
        setattr(module, name, value)

    def undo(self) -> None:
        """Put everything back, the last replacement first."""
        for module, name, original in reversed(self._originals):
            setattr(module, name, original)
        self._originals.clear()

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Everything as it was before, for the length of a `with` block."""
        replaced = [getattr(module, name) for module, name, _ in self._originals]
        for module, name, original in reversed(self._originals):
            setattr(module, name, original)
        try:
            yield
        finally:
            for (module, name, _), value in zip(self._originals, replaced, strict=True):
                setattr(module, name, value)
