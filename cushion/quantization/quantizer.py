"""The configuration of a quantizer: its parts, what they share, and what is asked of all of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cushion.checks import at_least, check_values, one_of, require
from cushion.errors import ConfigError
from cushion.quantization.formats.base import SHARED_EXPONENTS
from cushion.quantization.parts.activations import ActivationConfig
from cushion.quantization.parts.attention import AttentionConfig
from cushion.quantization.parts.base import RANGES, Needed, Part
from cushion.quantization.parts.compensation import CompensationConfig
from cushion.quantization.parts.kv_cache import KvCacheConfig
from cushion.quantization.parts.qfem import QFeMConfig
from cushion.quantization.parts.registry import PARTS, parts
from cushion.quantization.parts.weights import WeightConfig

LEVELS = ("full", "paper")
ZERO_POINTS = ("real", "integer")


@dataclass
class CalibrationConfig:
    """`quantizer.calibration`: how much text the static ranges and the smoothing statistics are taken from."""

    samples: int = 16
    length: int = 512

    def __post_init__(self) -> None:
        at_least("quantizer.calibration.samples", self.samples, 1)
        at_least("quantizer.calibration.length", self.length, 2)


@dataclass
class QuantizerConfig:
    """Group `quantizer`: simulated quantization of the linears in the decoder blocks (lm_head stays as it is).

    Every field but `name`, `calibration`, `plugins` and those of `SHARED` belongs to one part of `PARTS`. The parts of
    users' packages have their options in `plugins`, by their names; null turns one off.
    """

    name: str = "per_tensor_static"
    weights: WeightConfig = field(default_factory=WeightConfig)
    activations: ActivationConfig = field(default_factory=ActivationConfig)
    compensation: CompensationConfig = field(default_factory=CompensationConfig)
    kv_cache: KvCacheConfig = field(default_factory=KvCacheConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    levels: str = "full"
    zero_point: str = "real"
    shared_exponent: str | None = None
    smoothing_alpha: float | None = None
    smoothing_pairs: str = "none"
    smoothing_search: str = "none"
    smoothing_steps: int = 20
    rotation: str = "none"
    rotation_seed: int = 0
    head_rotation: str = "none"
    rotation_sites: str = "all"
    input_rotation: str = "none"
    targets: list[str] = field(default_factory=lambda: ["all"])
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    qfem: QFeMConfig = field(default_factory=QFeMConfig)
    plugins: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_values("quantizer", self)
        named = {name: own for name, own in self.plugins.items() if own is not None}
        self.plugins = {name: PARTS[name].configured(own) for name, own in named.items()}
        one_of("quantizer.levels", self.levels, LEVELS)
        one_of("quantizer.zero_point", self.zero_point, ZERO_POINTS)
        if self.shared_exponent is not None:
            one_of("quantizer.shared_exponent", self.shared_exponent, SHARED_EXPONENTS)
        require(len(self.targets) > 0, "quantizer.targets", self.targets, "name linears, or [all]")
        for part in parts():
            part.check(self)
        if self.blockwise and self.uses_qfem and self.qfem.search:
            raise ConfigError(
                f"quantizer.qfem.search=true cannot be used with {self.blockwise[0].key}, which is "
                "fitted anew for every set of linears that is kept: give quantizer.qfem.alpha"
            )

    @property
    def is_full_precision(self) -> bool:
        """Whether this quantizer leaves the model as it is."""
        return not any(part.is_on(self) for part in parts())

    @property
    def statistics(self) -> frozenset[Needed]:
        """What must be measured on calibration text for all parts together."""
        return frozenset[Needed]().union(*(part.statistics(self) for part in parts()))

    @property
    def needs_calibration(self) -> bool:
        """Whether channel ranges over calibration text are needed: for static ranges and for smoothing."""
        return RANGES in self.statistics

    @property
    def gathered(self) -> frozenset[Needed]:
        """What is gathered of the linears' inputs beside the ranges of channels."""
        return self.statistics - {RANGES}

    @property
    def is_fitted(self) -> bool:
        """Whether anything must be measured before it goes on a model, besides the linears that QFeM keeps."""
        return bool(PARTS["qfem"].off(self).statistics) or bool(self.blockwise)

    @property
    def blockwise(self) -> list[Part]:
        """The parts that are on and must be fitted to one decoder block after another, in order."""
        return [part for part in parts() if part.blockwise and part.is_on(self)]

    @property
    def needs_calibration_text(self) -> bool:
        """Whether calibration text is needed: for channel ranges, for QFeM's ratios, or to fit parts block by block."""
        return bool(self.statistics) or bool(self.blockwise)

    @property
    def uses_qfem(self) -> bool:
        """Whether QFeM decides which linears keep full-precision activations."""
        return PARTS["qfem"].is_on(self)

    @property
    def spans_batch(self) -> bool:
        """Whether a range depends on the texts that happen to stand in the same batch."""
        return any(part.spans_batch(self) for part in parts())

    @property
    def scheme(self) -> str:
        """`per_tensor_static W8A8`, the way the field writes it; words of the parts stand behind the bits of all."""
        bits, words = zip(*(part.label(self).partition(" ")[::2] for part in parts()), strict=True)
        return " ".join([self.name + " " + "".join(bits), *(word for word in words if word)])
