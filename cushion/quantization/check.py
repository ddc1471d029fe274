"""Whether a quantizer fits a model: refused before anything is computed."""

from __future__ import annotations

from cushion.errors import ConfigError
from cushion.models import LanguageModel
from cushion.quantization.effect import Effect
from cushion.quantization.parts.base import Part
from cushion.quantization.parts.registry import parts
from cushion.quantization.quantizer import QuantizerConfig
from cushion.registry import located


def acting_parts(config: QuantizerConfig) -> dict[Part, Effect]:
    """The parts of a quantizer that are on and what they do to a model, in order; what two of them name is there once.

    It stands with the first of them.
    """
    found: dict[str, Part] = {}
    for part in parts():
        if part.effect is not None and part.is_on(config):
            found.setdefault(part.effect, part)
    return {part: located(place) for place, part in found.items()}


def effects_of(config: QuantizerConfig) -> list[Effect]:
    """What the parts of a quantizer that are on do to a model, in order."""
    return list(acting_parts(config).values())


def check_quantizer(lm: LanguageModel, config: QuantizerConfig) -> None:
    """Raise `ConfigError` when a part or a target of a quantizer does not fit this model, without computing."""
    targeted = lm.linears(config.targets)  # a target that is not there is refused here
    if not targeted and not config.is_full_precision:
        raise ConfigError(f"quantizer={config.name} finds no linear layer in the decoder blocks of {lm.label}")
    for effect in effects_of(config):
        effect.check(lm, config)


def surrounds(config: QuantizerConfig) -> list[str]:
    """The parts that round something besides weights and inputs of linears, by name: inside attention, for example."""
    return [
        part.name
        for part in parts()
        if part.is_on(config) and part.effect is not None and not part.keeps_function
        and type(located(part.effect)).around is not Effect.around
    ]  # fmt: skip
