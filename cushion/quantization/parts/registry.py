"""All parts of a quantizer, and what is asked of them together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

from cushion.quantization.parts.base import Part
from cushion.registry import PLUGINS, Registry

PARTS: Registry[Part] = Registry("quantizer.plugins", "cushion.quantization.parts", PLUGINS)
"""Cushion's own, one to a module of this package, and those of users' packages."""

SHARED = ("levels", "zero_point", "shared_exponent", "targets")
"""The fields of a quantizer that several parts read."""

Q = TypeVar("Q")


def register(part: Part) -> Part:
    """Make a part known under its name.

    Raises:
        ConfigError: there is one of this name.

    """
    return PARTS.register(part.name, part)


def parts() -> list[Part]:
    """All parts, in the order in which they act."""
    return sorted((part for _, part in PARTS.items()), key=lambda part: part.order)


def mixes_channels(quantizer: Any) -> bool:
    """Whether any part that is on lets linears read mixtures of the channels that calibration saw."""
    return any(part.mixes_channels and part.is_on(quantizer) for part in parts())


def unread(quantizer: Q) -> tuple[str, ...]:
    """The shared fields that no part of this quantizer reads."""
    read = frozenset[str]().union(*(part.reads(quantizer) for part in parts()))
    return tuple(name for name in SHARED if name not in read)


def turned_off(quantizer: Q, which: Callable[[Part], bool]) -> Q:
    """The quantizer without the parts that `which` holds for; shared fields that nothing reads are at their defaults.

    Two quantizers that do the same with these parts off are equal then, but for name and calibration text.
    """
    for part in reversed(parts()):  # what stands on others goes before them
        if which(part):
            quantizer = part.off(quantizer)
    defaults = type(quantizer)()
    return replace(quantizer, **{name: getattr(defaults, name) for name in unread(quantizer)})  # type: ignore[type-var]


def rounds(quantizer: Any) -> bool:
    """Whether a part that is on does more than rotation and smoothing, which keep the function."""
    return any(part.is_on(quantizer) and not part.keeps_function for part in parts())


def rounds_activations(quantizer: Any) -> bool:
    """Whether anything that flows through the model is rounded."""
    return any(part.is_on(quantizer) and part.of_activations for part in parts())


def weights_alone(quantizer: Q) -> Q:
    """What a quantizer does to a model but for the rounding of what flows through it."""
    return turned_off(quantizer, lambda part: part.of_activations)


def transforms(quantizer: Any) -> bool:
    """Whether a part that is on changes the model and keeps its function: rotation or smoothing."""
    return any(part.is_on(quantizer) and part.keeps_function for part in parts())


def without_rounding(quantizer: Q) -> Q:
    """What a quantizer does to a model before anything is rounded: rotation and smoothing, which keep the function."""
    return turned_off(quantizer, lambda part: not part.keeps_function)
