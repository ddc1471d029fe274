"""All parts of a quantizer, and what is asked of them together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from cushion.quantization.parts.activations import Activations
from cushion.quantization.parts.attention import Attention
from cushion.quantization.parts.base import Part
from cushion.quantization.parts.kv_cache import KvCache
from cushion.quantization.parts.qfem import QFeM
from cushion.quantization.parts.rotation import Rotation
from cushion.quantization.parts.smoothing import Smoothing
from cushion.quantization.parts.weights import Weights

PARTS: dict[str, Part] = {
    "weights": Weights(),
    "activations": Activations(),
    "kv_cache": KvCache(),
    "attention": Attention(),
    "smoothing": Smoothing(),
    "rotation": Rotation(),
    "qfem": QFeM(),
}
"""By name, in the order in which they stand in the label of a scheme."""

SHARED = ("levels", "zero_point", "targets")
"""The fields of a quantizer that several parts read."""

Q = TypeVar("Q")


def unread(quantizer: Q) -> tuple[str, ...]:
    """The shared fields that no part of this quantizer reads."""
    read = frozenset[str]().union(*(part.reads(quantizer) for part in PARTS.values()))
    return tuple(name for name in SHARED if name not in read)


def turned_off(quantizer: Q, which: Callable[[Part], bool]) -> Q:
    """The quantizer without the parts that `which` holds for; shared fields that nothing reads are at their defaults.

    Two quantizers that do the same with these parts off are equal then, but for name and calibration text.
    """
    for part in PARTS.values():
        if which(part):
            quantizer = part.off(quantizer)
    defaults = type(quantizer)()
    return replace(quantizer, **{name: getattr(defaults, name) for name in unread(quantizer)})  # type: ignore[type-var]
