"""Quantized inputs of the linears in the decoder blocks."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from cushion.checks import at_least, one_of, require, without_effect
from cushion.errors import ConfigError
from cushion.quantization.estimators.base import Estimator
from cushion.quantization.estimators.registry import ESTIMATORS
from cushion.quantization.formats.registry import FORMATS, check_format
from cushion.quantization.parts.base import GRANULARITIES, NOTHING, RANGES, Needed, Part, Quantizer
from cushion.quantization.parts.grids import check_clip_ratio, grid_keys, width
from cushion.quantization.parts.registry import PARTS, mixes_channels, register

KINDS_OF_RANGE = ("static", "dynamic")
BY_CHANNEL = ("per_channel", "per_cluster")
"""Granularities whose scales differ between the channels of an input: static, and simulated alone."""
LARGEST_SEED = 2**32 - 1

EXTREMES = Needed("cushion.quantization.statistics.extremes:Extremes")
"""What min-max needs where the ranges of channels are not the range of a linear's input."""
CHANNEL_EXTREMES = Needed("cushion.quantization.statistics.channel_extremes:ChannelExtremes")
"""The same where the channels that are read have ranges of their own."""


@dataclass
class ActivationConfig:
    """`quantizer.activations`: the grid of every linear's input. `bits: null` leaves them in full precision.

    `estimator` says how a static range follows from calibration text, `estimator_options` has what it reads.
    `narrow_range: false` lets static symmetric codes reach -2^(N-1), as integer kernels do. `clusters` of channels have
    one range each with `granularity: per_cluster`, found by K-means from `cluster_seed`. `clip_ratio` is the share of a
    dynamic range that is kept.
    """

    bits: int | None = 8
    """Bits of each linear's input; as `weights.bits`

    Allowed: 2 to 8, null
    """
    granularity: str = "per_tensor"
    """One scale per tensor, or per token (needs `range=dynamic`); `per_block` as for weights. A scale for each cluster
    of channels (RPTQ, arXiv [2304.01089](https://arxiv.org/abs/2304.01089)), or for each channel, the finest there
    is, needs `range=static` and is simulated, never executed ([method](method.md#clusters-of-channels))

    Allowed: `per_tensor`, `per_token`, `per_block`, `per_cluster`, `per_channel`
    Paper: both
    """
    range: str = "static"
    """Fixed by calibration, or from each input; `mxfp8`, `mxfp6` and `mxfp4` are dynamic, and in `nvfp4` it is the
    scale of the tensor that may be static

    Allowed: `static`, `dynamic`
    Paper: both
    """
    symmetric: bool = True
    """Offset 0, or offset min X; formats other than `int` have no offset

    Allowed: true, false
    Paper: asymmetric
    """
    estimator: str = "minmax"
    """How a static range follows from calibration text: all values fit (`minmax`), a `percentile` of the magnitudes
    (on asymmetric grids cut in equal shares from both ends), the smallest squared error (`mse`), the smallest KL
    divergence (`entropy`), a moving average of each text's range, or the factor on min-max with the smallest error
    of the block's output (`block_output`, [method](method.md#ranges-by-block-output)). `entropy` is for `int`
    alone; the static scale of `nvfp4` has neither `mse`, `entropy` nor `block_output`

    Allowed: `minmax`, `percentile`, `mse`, `entropy`, `moving_average`, `block_output`, and what packages of yours add
        ([extending](extending.md#a-range-estimator))
    """
    estimator_options: dict[str, Any] = field(default_factory=dict)
    """What the estimator reads: `percentile` (above 50, at most 100; default 99.99), `averaging` of `moving_average`
    (above 0, at most 1; default 0.01), or `texts` of `block_output`: how many of the calibration texts decide (1
    and more; default 8, PrefixQuant has 8 of 1024 tokens). On the command line with a plus:
    `"+quantizer.activations.estimator_options={percentile: 99.9}"`

    Allowed: a mapping
    """
    format: str = "int"
    """Number format

    Allowed: as `weights.format`
    """
    narrow_range: bool = True
    """Whether symmetric codes leave out the lowest one, -128 of 8 bits: a static or clipped range that is exceeded is
    clamped at -127, or at -128 as integer kernels do. The scale is the same

    Allowed: true, false
    Paper: **open**; true is the symmetric grid as it is defined, `int8_static` has what kernels have
    """
    clusters: int = 32
    """With `per_cluster`: how many clusters each linear's input has, or as many as its channels where these are fewer

    Allowed: 1 and more
    Paper: RPTQ's code: 32 behind norms and before fc2
    """
    cluster_seed: int = 0
    """With `per_cluster`: what K-means starts from; `'${seed}'` for the run's own

    Allowed: 0 to 4294967295
    Paper: RPTQ's code: 0
    """
    clip_ratio: float = 1.0
    """The share of a dynamic range that is kept: both ends times this, what lies beyond is clipped; 0.9 in QuaRot.
    Formats of blocks and static ranges have 1

    Allowed: above 0, at most 1
    Paper: not in the paper
    """

    def __post_init__(self) -> None:
        reason = f"quantizer.activations.format={self.format} has no such code: only int has, or leave it true"
        require(self.narrow_range or self.format == "int", "quantizer.activations.narrow_range", False, reason)
        one_of("quantizer.activations.granularity", self.granularity, (*GRANULARITIES, *BY_CHANNEL))
        one_of("quantizer.activations.range", self.range, KINDS_OF_RANGE)
        check_format("quantizer.activations", self.format, self.bits, self.symmetric, self.granularity)
        self.estimation()
        at_least("quantizer.activations.clusters", self.clusters, 1)
        reason = f"from 0 to {LARGEST_SEED}"
        require(0 <= self.cluster_seed <= LARGEST_SEED, "quantizer.activations.cluster_seed", self.cluster_seed, reason)
        check_clip_ratio("quantizer.activations", self)
        if self.bits is not None and self.range == "static":
            self._check_static()
        if self.granularity == "per_token":
            reason = "per-token scales are computed on the fly: set quantizer.activations.range=dynamic"
            require(self.range == "dynamic", "quantizer.activations.range", self.range, reason)
        if self.by_channel:
            self._check_by_channel()

    @property
    def by_channel(self) -> bool:
        """Whether the channels of one input have several scales."""
        return self.granularity in BY_CHANNEL

    def _check_by_channel(self) -> None:
        """Refuse ranges of channels that are not those of calibration, or that an estimator would have to find."""
        reason = f"with quantizer.activations.granularity={self.granularity} scales come from calibration: set static"
        require(self.range == "static", "quantizer.activations.range", self.range, reason)
        works = [name for name, other in ESTIMATORS.items() if other.statistic is None and not other.options]
        reason = (
            f"with quantizer.activations.granularity={self.granularity} ranges are those of channels, and it finds one "
            f"for the whole input: choose {', '.join(works)}"
        )
        require(self.estimator in works, "quantizer.activations.estimator", self.estimator, reason)

    def _check_static(self) -> None:
        """Refuse static ranges that the format cannot have, and estimators that cannot work for it."""
        form = FORMATS[self.format]
        has_range = form.block is None or form.tensor_scale
        reason = (
            f"quantizer.activations.format={self.format} computes every scale on the fly: set "
            "quantizer.activations.range=dynamic"
        )
        require(has_range, "quantizer.activations.range", self.range, reason)
        works = [
            name
            for name, other in ESTIMATORS.items()
            if (form.equal_steps or not other.equal_steps) and (form.block is None or not other.rounds)
        ]
        reason = f"with quantizer.activations.format={self.format} choose one of {', '.join(works)}"
        require(self.estimator in works, "quantizer.activations.estimator", self.estimator, reason)

    def estimation(self) -> tuple[Estimator, dict[str, Any]]:
        """The estimator of a static range, and all of its options.

        Raises:
            ConfigError: there is none of this name, or an option that it does not read or allow.

        """
        estimator = ESTIMATORS[self.estimator]
        return estimator, estimator.values(self.estimator_options, "quantizer.activations.estimator_options")


def _reaches_lowest(activations: ActivationConfig) -> bool:
    """Whether a symmetric code can be below -(2^(N-1) - 1) at all: only where a range can be exceeded."""
    return activations.symmetric and (activations.range == "static" or activations.clip_ratio != 1)


def range_from(quantizer: Quantizer) -> Needed:
    """What the static range of a linear's input follows from: what its estimator needs, or extremes for min-max."""
    estimator, options = quantizer.activations.estimation()
    needed = estimator.needed(options)
    if needed != RANGES or not mixes_channels(quantizer):
        return needed
    return CHANNEL_EXTREMES if quantizer.activations.by_channel else EXTREMES


class Activations(Part):
    """The inputs of the targeted linears."""

    name = "activations"
    order = 20
    of_activations = True
    effect = "cushion.quantization.inputs:INPUTS"
    fields = ("activations",)
    in_linears = True

    def is_on(self, quantizer: Quantizer) -> bool:
        """Whether there are bits."""
        return quantizer.activations.bits is not None

    def off(self, quantizer: Quantizer) -> Quantizer:
        """Inputs in full precision."""
        return replace(quantizer, activations=ActivationConfig(bits=None))

    def check(self, quantizer: Quantizer) -> None:
        """A choice of rotated sites goes by errors with one scale for each input, which is not what would be used."""
        if self.is_on(quantizer) and quantizer.activations.by_channel and PARTS["rotation_sites"].is_on(quantizer):
            raise ConfigError(
                "quantizer.rotation_sites=adaptive compares errors with one scale for each input, and "
                f"quantizer.activations.granularity={quantizer.activations.granularity} has several: use "
                "quantizer.rotation_sites=all, or another granularity"
            )

    def statistics(self, quantizer: Quantizer) -> frozenset[Needed]:
        """What the estimator of static ranges needs."""
        if not (self.is_on(quantizer) and quantizer.activations.range == "static"):
            return NOTHING
        return frozenset({range_from(quantizer)})

    def identity(self, quantizer: Quantizer) -> dict[str, Any]:
        """The grid, and the estimator of a static range."""
        own = dict(vars(quantizer.activations))
        del own["estimator"], own["estimator_options"]
        if own["narrow_range"] or not _reaches_lowest(quantizer.activations):  # keys of before there was a choice
            del own["narrow_range"]
        if own["granularity"] != "per_cluster":
            del own["clusters"], own["cluster_seed"]
        if own["clip_ratio"] == 1:
            del own["clip_ratio"]
        if own["range"] == "static":
            estimator, options = quantizer.activations.estimation()
            own["estimator"] = estimator.identity(options)
        own["format"] = FORMATS[own["format"]].identity()
        return {"activations": own}

    def warnings(self, quantizer: Quantizer) -> list[str]:
        """The estimator of static ranges without such ranges."""
        key, activations = "quantizer.activations", quantizer.activations
        if self.is_on(quantizer) and activations.range == "static":
            why = f"with {key}.symmetric=false"
            return [] if activations.symmetric else without_effect(key, activations, ("narrow_range",), why)
        keys: tuple[str, ...] = ("estimator", "estimator_options")
        if not self.is_on(quantizer):
            keys = (*keys, "narrow_range", "format", "clip_ratio")
            return without_effect(key, activations, keys, f"with {key}.bits=null")
        found = without_effect(key, activations, keys, f"with {key}.range=dynamic")
        if not _reaches_lowest(activations):
            why = f"with {key}.range=dynamic, unless {key}.symmetric=true and {key}.clip_ratio is below 1"
            found += without_effect(key, activations, ("narrow_range",), why)
        return found

    def reads(self, quantizer: Quantizer) -> frozenset[str]:
        """The targets, and the keys of the grid."""
        activations = quantizer.activations
        keys = grid_keys(activations.format, activations.symmetric) | {"targets"}
        return keys if self.is_on(quantizer) else NOTHING

    def spans_batch(self, quantizer: Quantizer) -> bool:
        """One dynamic range per tensor, or a dynamic scale for the tensor that blocks are a part of."""
        activations = quantizer.activations
        spans = activations.granularity == "per_tensor" or FORMATS[activations.format].tensor_scale
        return self.is_on(quantizer) and activations.range == "dynamic" and spans

    def label(self, quantizer: Quantizer) -> str:
        """`A8`, an estimator that is neither min-max nor in the quantizer's name, and scales of channels."""
        own, named = quantizer.activations, [name for name, _ in ESTIMATORS.items() if name in quantizer.name]
        is_said = not self.is_on(quantizer) or own.range != "static" or own.estimator == (named or ["minmax"])[0]
        words = [] if is_said else [own.estimator]
        if self.is_on(quantizer) and own.clip_ratio != 1:
            words.append(f"clipped to {own.clip_ratio:g}")
        if self.is_on(quantizer) and own.by_channel:
            words.append(f"{own.clusters} clusters" if own.granularity == "per_cluster" else "A per channel")
        return " ".join([f"A{width(own)}", *words])


register(Activations())
