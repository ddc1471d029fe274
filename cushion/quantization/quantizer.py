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
from cushion.quantization.parts.registry import PARTS, parts, weights_alone
from cushion.quantization.parts.weights import WeightConfig

LEVELS = ("full", "paper")
ZERO_POINTS = ("real", "integer")


@dataclass
class CalibrationConfig:
    """`quantizer.calibration`: how much text the static ranges and the smoothing statistics are taken from."""

    samples: int = 16
    """Number of calibration texts

    Allowed: 1 and more
    Paper: **open**
    """
    length: int = 512
    """Tokens per calibration text

    Allowed: 2 and more
    Paper: **open**; the length of the paper's search texts
    """

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
    """Denominator of the scale on integers, for weights, activations, `kv_cache` and `attention`; `full` uses all
    codes, `paper` is the formula as printed

    Allowed: `full`, `paper`
    Paper: **open**: taken literally, the printed formula leaves half of the codes of an asymmetric grid unused, so
        `full` is the default
    """
    zero_point: str = "real"
    """Offset of an asymmetric grid: `real`, min X itself, or `integer`, a whole number of steps with zero on the grid

    Allowed: `real`, `integer`
    Paper: `real`, as printed
    """
    shared_exponent: str | None = None
    """Rule by which the scale of an MX block follows from its largest magnitude; null: `rceil` for `mxfp8`, `even` for
    `mxfp6` and `mxfp4` ([method](method.md#number-formats))

    Allowed: `floor`, `even`, `ceil`, `rceil`, null
    """
    smoothing_alpha: float | None = None
    """SmoothQuant's migration strength

    Allowed: 0 to 1, null
    Paper: 0.8
    """
    smoothing_pairs: str = "none"
    """SmoothQuant's scales also where no norm stands before the linear that reads: between values and output projection
    (on every family, with the values of a prefix), between up and down projection (families with a gated MLP whose up
    projection is a linear of its own), or both ([method](method.md#smoothing-between-two-linears))

    Allowed: `none`, `values`, `up`, `all`
    Paper: not in the paper
    """
    smoothing_search: str = "none"
    """Scales of each norm searched on the calibration texts behind the prefix, with the least output error of the
    linears behind it ([method](method.md#searched-smoothing)): those of SmoothQuant, alpha searched
    (`smoothquant`), of AWQ (`awq`, arXiv [2306.00978](https://arxiv.org/abs/2306.00978)), or shift and scales of
    Outlier Suppression+ (`os_plus`, arXiv [2304.09145](https://arxiv.org/abs/2304.09145)); goes without
    `smoothing_alpha`

    Allowed: `none`, `smoothquant`, `awq`, `os_plus`
    Paper: not in the paper
    """
    smoothing_steps: int = 20
    """How many steps the grid of the search has

    Allowed: 1 and more
    Paper: not in the paper
    """
    rotation: str = "none"
    """Rotate the residual stream by a Hadamard matrix that is folded into the weights, as QuaRot does

    Allowed: `none`, `hadamard`
    Paper: not in the paper
    """
    rotation_seed: int = 0
    """Decides the random signs of the matrix (and the part of it that is no Hadamard matrix)

    Allowed: 0 to 4294967295
    Paper: not in the paper; rotations differ in quality, so a comparison should try several
    """
    head_rotation: str = "none"
    """Multiply each head's values by a Hadamard matrix that is folded into the linears around them (R2), its queries
    and keys behind the rotary positions (R3), or both; R3 decides nothing where no keys are rounded

    Allowed: `none`, `values`, `keys`, `all`
    Paper: not in the paper
    """
    rotation_sites: str = "all"
    """Rotate every input that `input_rotation` names and the values of every layer, or only those where it lowers the
    error of rounding on the calibration texts behind the prefix (RoSTE, arXiv
    [2502.09003](https://arxiv.org/abs/2502.09003))

    Allowed: `all`, `adaptive`
    Paper: not in the paper
    """
    input_rotation: str = "none"
    """Multiply the input of the down projections, of these and (over the heads alone) of the output projections, or of
    every linear, by a Hadamard matrix while the model runs, and the weight with the transposed one (QuaRot's online
    transforms)

    Allowed: `none`, `down`, `down_and_heads`, `all`
    Paper: not in the paper
    """
    targets: list[str] = field(default_factory=lambda: ["all"])
    """Last parts of the names of the linears to quantize, or `[all]`

    Allowed: names of the model's linears
    Paper: **open**: all linears of the blocks, as lm_head and attention products are often left out by integer
        kernels
    """
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    qfem: QFeMConfig = field(default_factory=QFeMConfig)
    plugins: dict[str, Any] = field(default_factory=dict)
    """Options of parts that a package of yours adds, by their names ([extending](extending.md#a-part))

    Allowed: a mapping
    """

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
    def fitted_under(self) -> QuantizerConfig:
        """What the blocks before have while such a part is fitted to one: this quantizer, or its weights alone."""
        return self if self.weights.fitted_with == "everything" else weights_alone(self)

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
