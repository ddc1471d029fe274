"""Which of the places that can be rotated are: all, or those where it helps. Its key is `rotation_sites`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from cushion.checks import one_of, without_effect
from cushion.quantization.parts.base import NOTHING, Needed, Part, Quantizer
from cushion.quantization.parts.head_rotation import rotates_values
from cushion.quantization.parts.registry import register

SITES = ("all", "adaptive")

LEFT_ALONE = Needed("cushion.quantization.rotation_sites:SiteErrors")
"""The sites that are not rotated, found before anything else is gathered."""


def input_site(name: str) -> str:
    """The site that is the input of the linear of this full name."""
    return f"input of {name}"


def values_site(layer: int) -> str:
    """The site that the values of a layer are."""
    return f"values of layer {layer}"


def left_alone(quantizer: Quantizer, inputs: Mapping[Needed, Any]) -> frozenset[str]:
    """The sites that are not rotated, from what was gathered for the quantizer; none where all are rotated."""
    return frozenset(inputs[LEFT_ALONE]) if PART.is_on(quantizer) else frozenset()


def rotated_nowhere(quantizer: Quantizer) -> Quantizer:
    """The quantizer with none of the sites rotated that there are to choose among."""
    return replace(quantizer, input_rotation="none", head_rotation="none", rotation_sites="all")


class RotationSites(Part):
    """The choice among the inputs of `input_rotation` and the layers of `head_rotation`."""

    name = "rotation_sites"
    order = 52
    fields = ("rotation_sites",)
    keeps_function = True

    def is_on(self, quantizer: Quantizer) -> bool:
        """Whether there are sites to choose among."""
        chosen_among = quantizer.input_rotation != "none" or rotates_values(quantizer)
        return bool(quantizer.rotation_sites == "adaptive" and chosen_among)

    def off(self, quantizer: Quantizer) -> Quantizer:
        """All of them."""
        return replace(quantizer, rotation_sites="all")

    def check(self, quantizer: Quantizer) -> None:
        """A known choice."""
        one_of("quantizer.rotation_sites", quantizer.rotation_sites, SITES)

    def statistics(self, quantizer: Quantizer) -> frozenset[Needed]:
        """The errors that decide are those of calibration text."""
        return frozenset({LEFT_ALONE}) if self.is_on(quantizer) else NOTHING

    def label(self, quantizer: Quantizer) -> str:
        """` adaptive`, before what may be rotated."""
        return " adaptive" if self.is_on(quantizer) else ""

    def warnings(self, quantizer: Quantizer) -> list[str]:
        """Nothing to choose among."""
        if self.is_on(quantizer):
            return []
        reason = "with quantizer.input_rotation=none and without rotated values (quantizer.head_rotation)"
        return without_effect("quantizer", quantizer, ("rotation_sites",), reason)


PART = register(RotationSites())
