"""What a part of a quantizer does to a model: around all of it, and to one linear after another."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from cushion.activations import ChannelRanges, observe_inputs
from cushion.errors import CalibrationError
from cushion.models import LanguageModel
from cushion.quantization.learned import Learned
from cushion.quantization.linear import ActivationQuantizer
from cushion.quantization.numerics import QuantizedWeight
from cushion.quantization.parts.base import Needed
from cushion.quantization.parts.registry import PARTS
from cushion.quantization.quantizer import QuantizerConfig
from cushion.quantization.replacements import Replacements


@dataclass(frozen=True, eq=False)
class Work:
    """A quantizer on its way onto a model, with all that was measured for it.

    Args:
        lm: the model.
        config: the quantizer.
        ranges: of every channel of the linears' inputs, None where none were measured.
        inputs: what else was gathered of them, by what was needed.
        keep: linears whose input stays in full precision; None where nothing was said of them.
        straight_through: let gradients pass all rounding.
        learned: what takes the place of estimated ranges.
        learns: whether the static ranges are to learn.
        replacements: where an effect puts what stands in a module's place for the time being.
        divisors: by linear, (in_features,): what its input was divided by. Filled by smoothing.
        shifts: by linear, (in_features,): what was taken from its input after that. Filled by smoothing.
        fits: by part and linear, what `Effect.fit` found. Filled block by block while the parts are fitted.
        input_hooks: by linear, a hook before its forward pass, which whatever stands for the linear keeps.

    """

    lm: LanguageModel
    config: QuantizerConfig
    ranges: ChannelRanges | None = None
    inputs: Mapping[Needed, Any] = field(default_factory=dict)
    keep: frozenset[str] | None = None
    straight_through: bool = False
    learned: Learned = field(default_factory=Learned)
    learns: bool = False
    replacements: Replacements = field(default_factory=Replacements)
    divisors: dict[str, Tensor] = field(default_factory=dict)
    shifts: dict[str, Tensor] = field(default_factory=dict)
    fits: Mapping[str, dict[str, Tensor]] = field(default_factory=dict)
    input_hooks: dict[str, Callable[..., Any]] = field(default_factory=dict)

    def weight_of(self, name: str, linear: nn.Module) -> Tensor:
        """The weight of the linear `name` before it is quantized, (out_features, in_features): its own, or learned.

        Where a divisor of the input was learned, the columns of the weight are multiplied with it.
        """
        weight = cast(Tensor, linear.weight).detach()
        learned, divisor = self.learned.weights.get(name), self.learned.divisors.get(name)
        weight = weight if learned is None else learned.to(weight)
        return weight if divisor is None else (weight.float() * divisor.to(weight.device)).to(weight.dtype)

    def ranges_of(self, name: str, device: torch.device) -> tuple[Tensor, Tensor]:
        """Minimum and maximum of every channel of the input of the linear `name`, each (in_features,).

        Raises:
            CalibrationError: there are none for it.

        """
        if self.ranges is None or name not in self.ranges.minimum:
            raise not_seen(name)
        return self.ranges.minimum[name].to(device), self.ranges.maximum[name].to(device)

    def gathered(self, kind: Needed, name: str) -> Any:
        """What was gathered of the input of the linear `name`.

        Raises:
            CalibrationError: there is nothing of it.

        """
        if name not in self.inputs.get(kind, {}):
            raise not_seen(name)
        return self.inputs[kind][name]

    def fit_of(self, part: str, name: str) -> Tensor:
        """What `Effect.fit` of the part found for the linear `name`.

        Raises:
            CalibrationError: the part was not fitted to it.

        """
        if name not in self.fits.get(part, {}):
            raise CalibrationError(
                f"{PARTS[part].key} found nothing for {name}: fit it to this model again, with more text "
                "(quantizer.calibration.samples) if it belongs to an expert that no token was routed to"
            )
        return self.fits[part][name]


def not_seen(name: str) -> CalibrationError:
    """What is wrong where calibration text never reached a linear."""
    return CalibrationError(
        f"the calibration statistics have no entry for {name}: calibrate this model again, with more text "
        "(quantizer.calibration.samples) if it belongs to an expert that no token was routed to"
    )


@dataclass(eq=False)
class Site:
    """A targeted linear, and what is to stand for it: the parts fill it in one after another.

    Args:
        name: its full name.
        linear: as it is now, behind rotation and smoothing.
        weight: (out_features, in_features), or quantized.
        bias: (out_features,) or None.
        activation: the quantizer of its input; None leaves the input in full precision.
        divisor: (in_features,): what its input is divided by before that; None for nothing.
        fused: by full name, the weights before rounding of the linears that servers compute as one, itself among them:
            query, key and value, or gate and up of one expert. They share what there is one of for a tensor. Empty
            where it is judged alone.

    """

    name: str
    linear: nn.Linear
    weight: Tensor | QuantizedWeight
    bias: Tensor | None
    activation: ActivationQuantizer | None = None
    divisor: Tensor | None = None
    fused: Mapping[str, Callable[[], Tensor]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Turn:
    """A decoder block whose turn it is: those before it are quantized, it and those behind it are not.

    All hidden states are behind the same prefix, and those of a model that is rotated and smoothed as the quantizer
    says.

    Args:
        work: the quantizer, with what was found for the blocks before.
        index: the block's number.
        texts: token ids, (texts, tokens).
        inputs: of the block in the full-precision model, (texts, tokens, features).
        targets: what the full-precision block makes of them, (texts, tokens, features).
        quantized: its inputs where the blocks before are quantized, (texts, tokens, features).
        run: the block, as it stands at the moment, on texts and hidden states as those above.
        sites: the block's targeted linears by full name, as they are; where a part is fitted, as the parts before have
            filled them in.

    """

    work: Work
    index: int
    texts: Tensor
    inputs: Tensor
    targets: Tensor
    quantized: Tensor
    run: Callable[[Tensor, Tensor], Tensor]
    sites: Mapping[str, Site] = field(default_factory=dict)

    def linear_inputs(self, full_precision: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Name and input of every targeted linear, text by text: (1, tokens, channels) or (tokens, channels).

        The blocks before are quantized, unless `full_precision`; this one is not. An expert that no token of a text is
        routed to is left out.
        """
        for names, values in self.shared_inputs(full_precision):
            yield from ((name, values) for name in names)

    @torch.no_grad()
    def called(self) -> list[str]:
        """The targeted linears in the order in which the block calls them, experts that no text reaches at the end."""
        names: list[str] = []
        linears = {name: site.linear for name, site in self.sites.items()}
        with observe_inputs(linears, lambda name, _: names.append(name)):
            for text, hidden in zip(self.texts, self.quantized, strict=True):
                self.run(text[None], hidden[None])
                if len(set(names)) == len(self.sites):
                    break
        return list(dict.fromkeys([*names, *self.sites]))

    @torch.no_grad()
    def shared_inputs(
        self, full_precision: bool = False, among: Collection[str] | None = None
    ) -> Iterator[tuple[tuple[str, ...], Tensor]]:
        """As `linear_inputs`, with the names of all linears that read the very same tensor.

        Args:
            full_precision: as there.
            among: the linears to look at; None for all that are targeted.

        """
        names = self.sites if among is None else among
        linears, seen = {name: self.sites[name].linear for name in names}, dict[int, tuple[list[str], Tensor]]()

        def see(name: str, values: Tensor) -> None:
            seen.setdefault(id(values), ([], values))[0].append(name)

        for text, hidden in zip(self.texts, self.inputs if full_precision else self.quantized, strict=True):
            with observe_inputs(linears, see):
                self.run(text[None], hidden[None])
            yield from ((tuple(readers), values) for readers, values in seen.values())
            seen.clear()


class Effect:
    """What a part does to a model. One object serves all quantizers, and is asked where the part is on."""

    def check(self, lm: LanguageModel, config: QuantizerConfig) -> None:
        """Raise `ConfigError` where the part does not fit this model, without computing."""
        return

    def ready(self, work: Work) -> None:
        """Raise `CalibrationError` where something that it needs was not measured."""
        return

    def around(self, work: Work) -> AbstractContextManager[Any]:
        """What is done to the model as a whole, before any linear is replaced; it is undone on leaving."""
        return nullcontext()

    def at(self, work: Work, site: Site) -> None:
        """What is done to one targeted linear."""
        return

    def fit(self, turn: Turn) -> dict[str, Tensor]:
        """What is found for the linears of one block, by full name, where the part is `blockwise`.

        It is asked once for every block, in order; `at` then reads it from `Work.fit_of`.
        """
        raise NotImplementedError(f"{type(self).__name__} belongs to a part with blockwise=True and has no fit")
