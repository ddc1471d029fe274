"""Group `reconstruction`: block-wise reconstruction of a static quantizer."""

from __future__ import annotations

from dataclasses import dataclass

from cushion.checks import at_least, check_rate, check_values, one_of
from cushion.errors import ConfigError
from cushion.quantization.formats.registry import FORMATS
from cushion.quantization.quantizer import QuantizerConfig

RECONSTRUCTION_METHODS = ("none", "blockwise")


def check_learns(what: str, quantizer: QuantizerConfig, way_out: str) -> None:
    """Raise `ConfigError` where an input does not have one static range of single values, which could learn."""
    form = FORMATS[quantizer.activations.format]
    if quantizer.activations.bits is not None and form.block is not None:
        raise ConfigError(
            f"{what} learns one scale for each input, and quantizer.activations.format={form.name} has scales for "
            f"blocks: {way_out}"
        )
    if quantizer.activations.bits is not None and quantizer.activations.by_channel:
        raise ConfigError(
            f"{what} learns one scale for each input, and quantizer.activations.granularity="
            f"{quantizer.activations.granularity} has several: {way_out}"
        )


@dataclass
class ReconstructionConfig:
    """Group `reconstruction`: static ranges, and as an option weights, learned block by block (PrefixQuant).

    Each decoder block is fitted to the output of the full-precision one behind the same prefix. See docs/method.md.
    """

    name: str = "none"
    method: str = "none"
    """No reconstruction, or block by block

    Allowed: `none`, `blockwise`
    """
    weights: bool = False
    """Whether the weights learn too

    Allowed: `true`, `false`
    PrefixQuant: true
    """
    samples: int | None = None
    """Texts that it learns from, of `quantizer.calibration.length` tokens, drawn from the calibration text; null: the
    calibration texts themselves

    Allowed: 1 and more, null
    PrefixQuant: 512 of 1024 tokens
    """
    epochs: int = 4
    """Passes over the texts for each block; 0 leaves everything as it is

    Allowed: 0 and more
    PrefixQuant: 10 to 20
    """
    batch_size: int = 1
    """Texts per step

    Allowed: 1 and more
    PrefixQuant: 4
    """
    scale_learning_rate: float = 1e-2
    """Of Adam, at the first step, for ranges; it moves the logarithm of the width of a range, and the low end in units
    of the width

    Allowed: positive, at most 1000
    PrefixQuant: 5e-5 on the scales themselves, in 1280 to 2560 steps; `prefixquant`: 1e-4, about the same for the
        inputs behind a norm, whose scale is near 0.5 at 4 bits
    """
    weight_learning_rate: float = 1e-5
    """Of Adam, at the first step, for weights

    Allowed: positive, at most 1000
    PrefixQuant: 5e-6, likewise
    """

    def __post_init__(self) -> None:
        check_values("reconstruction", self)
        one_of("reconstruction.method", self.method, RECONSTRUCTION_METHODS)
        at_least("reconstruction.samples", self.samples, 1)
        at_least("reconstruction.epochs", self.epochs, 0)
        at_least("reconstruction.batch_size", self.batch_size, 1)
        for key in ("scale_learning_rate", "weight_learning_rate"):
            check_rate(f"reconstruction.{key}", getattr(self, key))

    @property
    def is_on(self) -> bool:
        """Whether anything is reconstructed."""
        return self.method != "none"

    def check(self, quantizer: QuantizerConfig) -> None:
        """Raise `ConfigError` where there is nothing in this quantizer that could be learned."""
        if not self.is_on:
            return
        activations, way_out = quantizer.activations, "or reconstruction=none"
        if activations.bits is None:
            raise ConfigError(
                f"reconstruction={self.name} learns the ranges of quantized activations, and quantizer="
                f"{quantizer.name} has none (quantizer.activations.bits=null): choose quantizer=per_tensor_static, "
                f"{way_out}"
            )
        if activations.range != "static":
            raise ConfigError(
                f"reconstruction={self.name} learns static ranges, and quantizer={quantizer.name} has none "
                f"(quantizer.activations.range={activations.range}): choose quantizer=per_tensor_static, {way_out}"
            )
        check_learns(f"reconstruction={self.name}", quantizer, "choose another quantizer, or reconstruction=none")
        if self.weights and quantizer.weights.bits is None:
            raise ConfigError(
                f"reconstruction.weights=true learns quantized weights, and quantizer={quantizer.name} has none "
                "(quantizer.weights.bits=null): set reconstruction.weights=false"
            )
        fixed = [part for part in quantizer.blockwise if not part.weights_may_learn]
        if self.weights and fixed:
            raise ConfigError(
                f"reconstruction.weights=true cannot be used with {fixed[0].key}, which "
                "was fitted to the weights as they are: set reconstruction.weights=false"
            )
