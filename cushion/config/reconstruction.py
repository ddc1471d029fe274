"""Group `reconstruction`: block-wise reconstruction of a static quantizer."""

from __future__ import annotations

from dataclasses import dataclass

from cushion.checks import at_least, check_rate, check_values, one_of, require
from cushion.errors import ConfigError
from cushion.quantization.formats.registry import FORMATS
from cushion.quantization.quantizer import QuantizerConfig

RECONSTRUCTION_METHODS = ("none", "blockwise", "omniquant")

_READ = {
    "none": (),
    "blockwise": ("weights", "epochs", "batch_size", "scale_learning_rate"),
    "omniquant": ("method", "clipping", "transforms", "epochs", "batch_size"),
}
"""The keys that decide what each method learns; those that hang on another of its keys are not among them."""


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
    """Group `reconstruction`: what of a quantizer is learned block by block.

    Each decoder block is fitted to the output of the full-precision one behind the same prefix. `blockwise` learns
    static ranges, and as an option weights (PrefixQuant), `omniquant` the ranges of weights (`clipping`) and a scale of
    each channel of inputs (`transforms`). See docs/method.md.
    """

    name: str = "none"
    method: str = "none"
    """No reconstruction, or block by block: ranges and weights (`blockwise`), or OmniQuant's (arXiv
    [2308.13137](https://arxiv.org/abs/2308.13137), [method](method.md#omniquant))

    Allowed: `none`, `blockwise`, `omniquant`
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
    clipping: bool = True
    """With `omniquant`: whether the ranges of the weights learn

    Allowed: `true`, `false`
    """
    clipping_learning_rate: float = 1e-2
    """Of Adam, for the logits of their shares

    Allowed: positive, at most 1000
    Paper: OmniQuant: 1e-2
    """
    transforms: bool = True
    """With `omniquant`: whether scales of channels learn; its code has none for weights alone of LLaMA

    Allowed: `true`, `false`
    """
    transform_learning_rate: float = 5e-3
    """Of Adam, for the logarithms of the scales

    Allowed: positive, at most 1000
    Paper: OmniQuant: 5e-3, on the scales themselves
    """
    transform_alpha: float = 0.5
    """The alpha of SmoothQuant's scales, from which they start

    Allowed: 0 to 1
    Paper: OmniQuant: 0.5
    """

    def __post_init__(self) -> None:
        check_values("reconstruction", self)
        one_of("reconstruction.method", self.method, RECONSTRUCTION_METHODS)
        at_least("reconstruction.samples", self.samples, 1)
        at_least("reconstruction.epochs", self.epochs, 0)
        at_least("reconstruction.batch_size", self.batch_size, 1)
        rates = ("scale", "weight", "clipping", "transform")
        for key in (f"{what}_learning_rate" for what in rates):
            check_rate(f"reconstruction.{key}", getattr(self, key))
        alpha = self.transform_alpha
        require(0 <= alpha <= 1, "reconstruction.transform_alpha", alpha, "0 to 1")
        if self.method == "omniquant":
            reason = "true, or reconstruction.transforms=true: else nothing learns"
            require(self.clipping or self.transforms, "reconstruction.clipping", self.clipping, reason)

    @property
    def is_on(self) -> bool:
        """Whether anything is reconstructed."""
        return self.method != "none"

    @property
    def read(self) -> tuple[str, ...]:
        """The keys that decide what is learned."""
        found: tuple[str, ...] = _READ[self.method]
        if self.method == "blockwise" and self.weights:
            found = (*found, "weight_learning_rate")
        if self.method == "omniquant":
            found += ("clipping_learning_rate",) if self.clipping else ()
            found += ("transform_learning_rate", "transform_alpha") if self.transforms else ()
        return found

    def check(self, quantizer: QuantizerConfig) -> None:
        """Raise `ConfigError` where there is nothing in this quantizer that could be learned."""
        if self.method == "omniquant":
            self._check_omniquant(quantizer)
        if self.method != "blockwise":
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

    def _check_omniquant(self, quantizer: QuantizerConfig) -> None:
        """Raise `ConfigError` for what its ranges and scales do not fit."""
        what, weights = f"reconstruction={self.name}", quantizer.weights
        if weights.bits is None or weights.format != "int" or weights.estimator != "minmax":
            key, value = next(
                (key, value)
                for key, value, fits in (
                    ("bits", "null", weights.bits is not None),
                    ("format", weights.format, weights.format == "int"),
                    ("estimator", weights.estimator, weights.estimator == "minmax"),
                )
                if not fits
            )
            raise ConfigError(
                f"{what} learns the ranges of integer weights, and quantizer={quantizer.name} has quantizer.weights."
                f"{key}={value}: choose quantizer=omniquant, or reconstruction=none"
            )
        if quantizer.activations.bits is not None and quantizer.activations.range == "static":
            raise ConfigError(
                f"{what} changes what linears read, and quantizer={quantizer.name} has static ranges of what they read "
                "before (quantizer.activations.range=static): set it to dynamic, or use reconstruction=scales"
            )
        if quantizer.blockwise:
            raise ConfigError(
                f"{what} cannot be used with {quantizer.blockwise[0].key}, which was fitted to the weights as they "
                "are: choose quantizer=omniquant, or reconstruction=none"
            )
