"""What of a quantizer the format of compressed-tensors expresses: the one table, and what it refuses.

compressed-tensors describes a linear by arguments of its weight and of its input (bits, type, symmetry, strategy), by
which software computes it as it likes. Where the arithmetic of compressed-tensors itself, which transformers runs,
differs from the simulation, `Scheme.differs` says how.
"""

from __future__ import annotations

from dataclasses import dataclass, is_dataclass
from typing import Any

from cushion.checks import written
from cushion.errors import ConfigError
from cushion.export.finished import FinishedRun
from cushion.quantization.formats.registry import FORMATS
from cushion.quantization.parts.base import Part
from cushion.quantization.parts.registry import parts, rounds
from cushion.quantization.quantizer import QuantizerConfig
from cushion.remade import run_config

TARGET = "compressed-tensors"

WEIGHT_STRATEGIES = {"per_tensor": "tensor", "per_channel": "channel", "per_group": "group"}
INPUT_STRATEGIES = {"per_tensor": "tensor", "per_token": "token"}
FITTING_CACHE = {
    "bits": 8, "format": "fp8_e4m3", "symmetric": True, "range": "static", "layout": "token", "protect": 0,
}  # fmt: skip
"""What `quantizer.kv_cache` must be for the scales of its cache to be written."""
CACHE_STRATEGIES = {"per_tensor": "tensor", "per_head": "attn_head"}
TYPES = {"int": "int", "fp8_e4m3": "float"}
"""Formats of numbers whose scales are free, and the type that they are there."""
BLOCKS = {
    "nvfp4": ("nvfp4-pack-quantized", "tensor_group", 16, "torch.float8_e4m3fn"),
    "mxfp4": ("mxfp4-pack-quantized", "group", 32, "torch.uint8"),
    "mxfp6": ("mxfp6-pack-quantized", "group", 32, "torch.uint8"),
    "mxfp8": ("mxfp8-quantized", "group", 32, "torch.uint8"),
}
"""Formats of blocks: how weights lie in the file, the strategy, the size of a block, and the type of its scale."""


@dataclass(frozen=True)
class Scheme:
    """How compressed-tensors describes the linears of a quantizer.

    Args:
        weights: arguments of `QuantizationArgs`.
        inputs: as `weights`; None where inputs stay in floating point.
        format: how the weights lie in the file.
        kept_format: the same for linears whose input QFeM keeps in floating point.
        differs: why a loaded checkpoint does not give the simulated logits bit for bit; None where it does.
        dtype: what transformers loads it in.
        cache: as `weights`, of cached keys and values; None where they stay in floating point.

    """

    weights: dict[str, Any]
    inputs: dict[str, Any] | None
    format: str
    kept_format: str
    differs: str | None = None
    dtype: str = "float32"
    cache: dict[str, Any] | None = None

    @property
    def attention(self) -> dict[str, str]:
        """How transformers is told to compute attention as the simulation does, where that is not its default."""
        return {} if self.cache is None else {"attn_implementation": "eager"}

    @property
    def kept_weights(self) -> dict[str, Any]:
        """Arguments of the weights of linears whose input stays in floating point.

        Servers run these with a scale for each output or group; one for the tensor is written once for each output.
        """
        return {**self.weights, "strategy": "channel"} if self.weights["strategy"] == "tensor" else self.weights


def check_run(run: FinishedRun) -> None:
    """Raise `ConfigError` where the format does not express a run's own row, as far as its configuration tells."""
    config = run_config(run.folder, run.record)
    scheme_of(config.quantizer)
    if config.reconstruction.method == "omniquant" and config.reconstruction.transforms:
        why, way_out = "the division stands before each linear", "run with reconstruction.transforms=false"
        raise _refusal("reconstruction.transforms=true", why, way_out)
    if not config.eval.perplexity:
        raise ConfigError(
            f"--to={TARGET} compares the checkpoint with the run on its evaluation text, and eval.perplexity=false "
            "left the run without one: run with eval.perplexity=true, then export that run"
        )
    dtype = run.record["model"]["dtype"]
    if dtype != "float32":
        raise ConfigError(
            f"--to={TARGET} does not express scales in {dtype} exactly (model.dtype): software that loads them rounds "
            "them to the model's own precision; run with model.dtype=float32, then export that run"
        )


def scheme_of(quantizer: QuantizerConfig) -> Scheme:
    """The scheme of a quantizer.

    Raises:
        ConfigError: the format does not express it; the message names key, value and the way out.

    """
    if not rounds(quantizer):
        raise ConfigError(f"--to={TARGET} has nothing to write of quantizer={quantizer.name}, which rounds nothing")
    cache = _cache(quantizer)
    for part in parts():
        if part.is_on(quantizer) and not part.in_linears_of(quantizer) and part.name != "kv_cache":
            why = "it is neither in the codes nor in the scales of linears"
            raise _refusal(part.key, why, f"run with {_switched_off(part, quantizer)}")
    weights, inputs = _weights(quantizer), _inputs(quantizer)
    if quantizer.weights.format in BLOCKS:
        form = BLOCKS[quantizer.weights.format][0]
        return Scheme(weights, inputs, form, form, _difference_of_blocks(quantizer), "bfloat16", cache)
    forms = _format(weights, inputs), _format(weights, None)
    return Scheme(weights, inputs, *forms, _difference(quantizer), cache=cache)


def _cache(quantizer: QuantizerConfig) -> dict[str, Any] | None:
    """Arguments of cached keys and values: static scales of FP8, for a tensor or for each head."""
    own = quantizer.kv_cache
    if own.bits is None:
        return None
    if own.granularity not in CACHE_STRATEGIES:
        why, way_out = "a cache has scales for a tensor or for each head", "run with per_head and range=static"
        raise _refusal(f"quantizer.kv_cache.granularity={own.granularity}", why, f"{way_out}, or with bits=null")
    for key, wanted in FITTING_CACHE.items():
        value = getattr(own, key)
        if value != wanted:
            why = "of caches it has static symmetric scales of FP8 alone"
            found, fits = (one if isinstance(one, str) else written(one) for one in (value, wanted))
            way_out = f"run with {fits}, or with quantizer.kv_cache.bits=null"
            raise _refusal(f"quantizer.kv_cache.{key}={found}", why, way_out)
    strategy = CACHE_STRATEGIES[own.granularity]
    return {"num_bits": own.bits, "type": "float", "symmetric": True, "strategy": strategy, "dynamic": False}


def _weights(quantizer: QuantizerConfig) -> dict[str, Any]:
    own = quantizer.weights
    if own.bits is None:
        raise _refusal("quantizer.weights.bits=null", "a scheme needs quantized weights", "run with 8 bits")
    _check_type("quantizer.weights.format", own.format)
    if own.format in BLOCKS:
        return _in_blocks(own.format, own.bits, dynamic=False)
    found = {
        "num_bits": own.bits,
        "type": TYPES[own.format],
        "symmetric": True,
        "strategy": WEIGHT_STRATEGIES[own.granularity],
        "dynamic": False,
    }
    if own.format != "int" and own.granularity == "per_tensor":
        found["strategy"] = "channel"  # servers round a fused layer anew to the largest of its scales per tensor
    return {**found, "group_size": own.group_size} if own.granularity == "per_group" else found


def _inputs(quantizer: QuantizerConfig) -> dict[str, Any] | None:
    own, is_static = quantizer.activations, quantizer.activations.range == "static"
    if own.bits is None:
        return None
    _check_type("quantizer.activations.format", own.format)
    if own.format != quantizer.weights.format and BLOCKS.keys() & {own.format, quantizer.weights.format}:
        why = (
            f"the weights are in another format, {quantizer.weights.format}, and blocks of one need those of the other"
        )
        raise _refusal(f"quantizer.activations.format={own.format}", why, "run with one format for both")
    if own.format == "nvfp4":
        if not is_static:
            why = "the scale of a whole input is in the file"
            way_out = "run with quantizer.activations.range=static"
            raise _refusal("quantizer.activations.range=dynamic of nvfp4", why, way_out)
        return _in_blocks(own.format, own.bits, dynamic="local")
    if own.format in BLOCKS:
        return _in_blocks(own.format, own.bits, dynamic=True)
    if own.by_channel:
        why = "an input has one scale there"
        way_out = "run with quantizer.activations.granularity=per_tensor"
        raise _refusal(f"quantizer.activations.granularity={own.granularity}", why, way_out)
    if own.format == "int" and own.symmetric and is_static and own.narrow_range:
        raise _refusal(
            "quantizer.activations.narrow_range=true",
            f"it clamps codes at {-(2 ** (own.bits - 1))}, not at {1 - 2 ** (own.bits - 1)}",
            "run with quantizer.activations.narrow_range=false",
        )
    if own.clip_ratio != 1:
        why, way_out = "scales on the fly hold all values", "run with quantizer.activations.clip_ratio=1"
        raise _refusal(f"quantizer.activations.clip_ratio={own.clip_ratio:g}", why, way_out)
    if not own.symmetric and quantizer.zero_point == "real":
        why, way_out = "an offset there is a whole number of steps", "run with quantizer.zero_point=integer"
        raise _refusal("quantizer.zero_point=real", why, way_out)
    if quantizer.levels == "paper" and own.format == "int" and not (own.symmetric and is_static):
        raise _refusal("quantizer.levels=paper", "it uses all codes", "run with quantizer.levels=full")
    return {
        "num_bits": own.bits,
        "type": TYPES[own.format],
        "symmetric": own.symmetric,
        "strategy": INPUT_STRATEGIES[own.granularity],
        "dynamic": not is_static,
    }


def _in_blocks(form: str, bits: int, dynamic: bool | str) -> dict[str, Any]:
    _, strategy, size, scale = BLOCKS[form]
    found = {"num_bits": bits, "type": "float", "symmetric": True, "strategy": strategy, "dynamic": dynamic}
    return {**found, "group_size": size, "scale_dtype": scale}


def _check_type(key: str, form: str) -> None:
    if form not in TYPES and form not in BLOCKS:
        known = ", ".join([*TYPES, *BLOCKS])
        raise _refusal(f"{key}={form}", "it has no such numbers", f"run with one of {known}")


def _format(weights: dict[str, Any], inputs: dict[str, Any] | None) -> str:
    """How weights lie in the file: bytes where servers have kernels for both sides of 8 bits, else packed."""
    if weights["type"] == "float":
        return "float-quantized"
    # servers read weights of less than 8 bits packed, but not 6 bits, which none of them runs
    return "pack-quantized" if inputs is None or weights["num_bits"] == 4 else "int-quantized"


def _difference(quantizer: QuantizerConfig) -> str | None:
    own = quantizer.activations
    if own.bits is None:
        return None
    if not own.symmetric:
        return (
            "With a zero point compressed-tensors computes (code - zero point) times scale, and the simulation code "
            "times scale plus offset, which round differently in the last bit."
        )
    if own.format == "int" and own.range == "dynamic":
        half = 2 ** (own.bits - 1) - 1
        return (
            f"Dynamic scales are not in the file. transformers computes them as the largest magnitude over {half}.5, "
            f"the run and vLLM as the largest magnitude over {half}."
        )
    return None


def _difference_of_blocks(quantizer: QuantizerConfig) -> str:
    own, form = quantizer.activations, FORMATS[quantizer.weights.format]
    said = (
        "transformers takes weights of this format out of the file in bfloat16, and so runs the whole model in it; the "
        "simulation ran in float32."
    )
    rule = (quantizer.shared_exponent or form.shared_exponent) if form.shared_exponent else None
    if own.bits is not None and rule != form.shared_exponent:
        said += (
            f" The scales of inputs are not in the file: the run computed them by the rule {rule!r}, and "
            "compressed-tensors rounds the largest magnitude of a block to a power of two by a rule of its own."
        )
    return said


def _switched_off(part: Part, quantizer: QuantizerConfig) -> str:
    """What turns a part off, as it is written: `quantizer.kv_cache.bits=null`, by the first key that is another."""
    if not part.fields:
        return f"{part.key}=null"
    on, off = (getattr(one, part.fields[0]) for one in (quantizer, part.off(quantizer)))
    if not is_dataclass(off):
        return f"{part.key}={off}"
    name = next(key for key, value in vars(off).items() if value != getattr(on, key))
    value = getattr(off, name)
    return f"{part.key}.{name}={value if isinstance(value, str) else written(value)}"


def _refusal(what: str, why: str, way_out: str) -> ConfigError:
    return ConfigError(f"--to={TARGET} does not express {what}: {why}; {way_out}, then export that run")
