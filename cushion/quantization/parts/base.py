"""What a part of a quantizer declares. Nothing here or in the parts needs torch."""

from __future__ import annotations

from abc import ABC
from dataclasses import is_dataclass, replace
from typing import Any, ClassVar, NamedTuple

from cushion.checks import structured
from cushion.errors import ConfigError

Quantizer = Any
"""A `QuantizerConfig`. It is made of the configurations of the parts, so they cannot import it."""

GRANULARITIES = ("per_tensor", "per_token", "per_block")
"""Of scales for what flows through a model; blocks belong to formats that fix them."""


class Needed(NamedTuple):
    """Something that must be known of the linears' inputs before a quantizer goes on a model.

    Args:
        place: `module:class` of an `InputObserver`, or of a `Statistic` of each linear's input.
        options: it is made with these, by name.

    """

    place: str
    options: tuple[tuple[str, Any], ...] = ()


RANGES = Needed("ranges")
"""The range of every channel, taken before smoothing: one calibration serves all quantizers."""

NOTHING: frozenset[Any] = frozenset()


class Part(ABC):
    """One part of a quantizer; `PARTS` in `registry` has one object of each kind."""

    name: ClassVar[str]

    fields: ClassVar[tuple[str, ...]] = ()
    """The fields of `QuantizerConfig` that belong to this part and to no other: of Cushion's own parts."""

    config: ClassVar[type[Any] | None] = None
    """The dataclass of `quantizer.plugins.<name>`: of a part that a user's package adds. Its checks are its own."""

    effect: ClassVar[str | None] = None
    """`module:attribute` of what it does to a model, an `Effect` of `cushion.quantization.effect`."""

    order: ClassVar[int] = 100
    """The place among the parts, ascending: in which they act, and stand in the label of a scheme."""

    keeps_function: ClassVar[bool] = False
    """Whether the model computes the same with this part on, but for rounding errors of its own precision."""

    blockwise: ClassVar[bool] = False
    """Whether its effect is fitted (`Effect.fit`) to one decoder block after another, those before it quantized."""

    of_activations: ClassVar[bool] = False
    """Whether it rounds what flows through the model, or says how that is rounded, and leaves the weights alone."""

    weights_may_learn: ClassVar[bool] = False
    """Whether what a `blockwise` part found still holds where the weights learn after it."""

    mixes_channels: ClassVar[bool] = False
    """Whether a linear reads mixtures of the channels that calibration saw, so that their ranges are not its range."""

    in_linears: ClassVar[bool] = False
    """Whether codes, scales and the choice of linears hold all that it does: a plain checkpoint then expresses it."""

    def in_linears_of(self, quantizer: Quantizer) -> bool:
        """`in_linears` for one quantizer, where that depends on its options."""
        return self.in_linears

    @property
    def key(self) -> str:
        """What messages call it."""
        return f"quantizer.{self.fields[0]}" if self.fields else f"quantizer.plugins.{self.name}"

    def of(self, quantizer: Quantizer) -> Any:
        """The configuration of a part that a user's package adds; None where the quantizer does not name it."""
        return quantizer.plugins.get(self.name)

    def configured(self, own: Any) -> Any:
        """The configuration of a part that a user's package adds, from what stands in `quantizer.plugins`.

        Raises:
            ConfigError: a key or a value that its dataclass does not have, or does not allow.

        """
        key = f"quantizer.plugins.{self.name}"
        if self.config is None:
            keys = ", ".join(f"quantizer.{field}" for field in self.fields)
            raise ConfigError(f"{key}={own!r} is not allowed: this part is Cushion's own, set {keys}")
        return own if isinstance(own, self.config) else structured(self.config, own, key)

    def is_on(self, quantizer: Quantizer) -> bool:
        """Whether this part does anything to a model: one of a user's package where the quantizer names it."""
        return self.of(quantizer) is not None

    def off(self, quantizer: Quantizer) -> Quantizer:
        """The same quantizer with this part off and nothing set in it."""
        return replace(quantizer, plugins={name: own for name, own in quantizer.plugins.items() if name != self.name})

    def check(self, quantizer: Quantizer) -> None:
        """Raise `ConfigError` for what the configuration of the part could not check by itself."""
        return

    def statistics(self, quantizer: Quantizer) -> frozenset[Needed]:
        """What must be known of the linears' inputs: `RANGES`, and what is gathered behind rotation and smoothing."""
        return NOTHING

    def reads(self, quantizer: Quantizer) -> frozenset[str]:
        """Which of the keys that parts have in common (`SHARED` in `registry`) this one reads.

        A part of a user's package reads the targets unless it says otherwise: its effect sees targeted linears alone.
        """
        return frozenset({"targets"}) if self.config is not None and self.is_on(quantizer) else NOTHING

    def identity(self, quantizer: Quantizer) -> dict[str, Any]:
        """What of this part, while it is on, decides an outcome: for the keys of cached steps, as plain JSON."""
        values = {name: getattr(quantizer, name) for name in self.fields}
        if self.config is not None:
            values[self.name] = self.of(quantizer)
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
