"""What a part of a quantizer declares. Nothing here or in the parts needs torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import is_dataclass
from typing import Any, ClassVar

Quantizer = Any
"""A `QuantizerConfig`. It is made of the configurations of the parts, so they cannot import it."""

GRANULARITIES = ("per_tensor", "per_token")
"""Of scales for what flows through a model."""

NOTHING: frozenset[str] = frozenset()


class Part(ABC):
    """One part of a quantizer; `PARTS` in `registry` has one object of each kind."""

    fields: ClassVar[tuple[str, ...]]
    """The fields of `QuantizerConfig` that belong to this part and to no other."""

    keeps_function: ClassVar[bool] = False
    """Whether the model computes the same with this part on, but for rounding errors of its own precision."""

    @abstractmethod
    def is_on(self, quantizer: Quantizer) -> bool:
        """Whether this part does anything to a model."""

    @abstractmethod
    def off(self, quantizer: Quantizer) -> Quantizer:
        """The same quantizer with this part off and nothing set in it."""

    def check(self, quantizer: Quantizer) -> None:
        """Raise `ConfigError` for what the configuration of the part could not check by itself."""
        return

    def statistics(self, quantizer: Quantizer) -> frozenset[str]:
        """What must be known of the linears' inputs: `ranges` (of channels), `token_scales`, or nothing."""
        return NOTHING

    def reads(self, quantizer: Quantizer) -> frozenset[str]:
        """Which of the keys that parts have in common this one reads: `levels`, `zero_point`, `targets`."""
        return NOTHING

    def identity(self, quantizer: Quantizer) -> dict[str, Any]:
        """What of this part, while it is on, decides an outcome: for the keys of cached steps, as plain JSON."""
        values = {name: getattr(quantizer, name) for name in self.fields}
        return {name: dict(vars(value)) if is_dataclass(value) else value for name, value in values.items()}

    def spans_batch(self, quantizer: Quantizer) -> bool:
        """Whether a range depends on the texts that happen to stand in the same batch, and on their padding."""
        return False

    def label(self, quantizer: Quantizer) -> str:
        """What it adds to the name of a scheme, such as `W8`."""
        return ""

    def warnings(self, quantizer: Quantizer) -> list[str]:
        """Warnings about options of this part that are set and have no effect."""
        return []
