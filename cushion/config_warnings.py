"""Options that are set but have no effect in the combination at hand: worth a warning, not an error.

Which these are is known from what the steps of the run read (`cushion.config_reads`): an option that is away from its
default has no effect where its default would be read as the same. What a warning gives as the reason is the one option
that would have to be another, or what a part of the quantizer or a search method says of itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

from cushion.checks import without_effect, written
from cushion.config import RunConfig
from cushion.errors import ConfigError
from cushion.quantization.formats.registry import FORMATS
from cushion.quantization.parts.registry import parts
from cushion.registry import SEARCH_METHODS

_SECTIONS = ("search", "quantizer", "tuning", "reconstruction", "eval", "execution")
"""What of a configuration only steps read. Models, texts and places are read before there is a step."""

_SWITCHES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("eval.chat_template", {"eval.chat_template": True}),
    ("eval.tasks", {"eval.tasks": ["copa"], "eval.chat_template": True}),
    ("eval.perplexity", {"eval.perplexity": True}),
    ("eval.attention_texts", {"eval.attention_texts": 1}),
    ("eval.sparsity_texts", {"eval.sparsity_texts": 1}),
    ("eval.spike_texts", {"eval.spike_texts": 1}),
    ("eval.latency.batch_sizes", {"eval.latency.batch_sizes": [1]}),
    ("search.method", {"search.method": "bos"}),
    ("eval.controls", {"eval.controls": True}),
    ("tuning.method", {"tuning.method": "prefix", "tuning.steps": 1, "tuning.epochs": None, "search.method": "bos"}),
    ("tuning.method", {"tuning.method": "prefix", "tuning.steps": None, "tuning.epochs": 1.0, "search.method": "bos"}),
    ("tuning.lambda_q", {"tuning.lambda_q": 1.0}),
    ("tuning.ranges", {"tuning.ranges": "static"}),
    ("tuning.ranges", {"tuning.ranges": "learned"}),
    ("reconstruction.method", {"reconstruction.method": "blockwise"}),
    ("reconstruction.weights", {"reconstruction.weights": True}),
    ("reconstruction.method", {"reconstruction.method": "omniquant"}),
    ("quantizer.weights.bits", {"quantizer.weights.bits": 8}),
    ("quantizer.weights.granularity", {"quantizer.weights.granularity": "per_group"}),
    ("quantizer.weights.method", {"quantizer.weights.method": "gptq"}),
    ("quantizer.activations.bits", {"quantizer.activations.bits": 8}),
    ("quantizer.activations.range", {"quantizer.activations.range": "static"}),
    ("quantizer.activations.granularity", {"quantizer.activations.granularity": "per_cluster"}),
    ("quantizer.activations.symmetric", {"quantizer.activations.symmetric": True}),
    ("quantizer.kv_cache.bits", {"quantizer.kv_cache.bits": 8}),
    ("quantizer.attention.bits", {"quantizer.attention.bits": 8}),
    ("quantizer.rotation", {"quantizer.rotation": "hadamard"}),
    ("quantizer.qfem.search", {"quantizer.qfem.search": True}),
)
"""The options on which the effect of others hangs, each with a change of it that can let them have one."""

_WITHOUT_A_READER = {
    "levels": "without quantized weights, activations, cache or attention on integers",
    "zero_point": "without an asymmetric grid",
    "shared_exponent": "without an MX format (mxfp8, mxfp6, mxfp4)",
    "targets": "without quantized weights or activations",
}
_SEVERAL = {
    **{f"quantizer.{key}": reason for key, reason in _WITHOUT_A_READER.items()},
    "quantizer.calibration.samples": "without static ranges, smoothing or QFeM",
    "quantizer.calibration.length": "without static ranges, smoothing or QFeM",
    "tuning.prediction_model": "with a quantizer that rounds nothing",
}
"""Reasons where any of several options would do; the first ones are of what the parts of a quantizer share."""


def options_without_effect(config: RunConfig) -> list[str]:
    """Warnings about options that are set away from their default but have no effect in this combination."""
    found = list(_told(config))
    named, read = {warning.partition("=")[0] for warning in found}, _read(config)
    for key, value, default in _set(config):
        if key not in named and _has_no_effect(config, key, default, read):
            found.append(f"{key}={value!r} has no effect {_reason(config, key, value, default)}")
    return found


def _told(config: RunConfig) -> Iterator[str]:
    """What the search method and the parts of the quantizer say of their options, and what no key of a step tells."""
    model, search, quantizer = config.model, config.search, config.quantizer
    if model.path.partition(":")[0] in ("embedded", "tiny"):
        yield from without_effect("model", model, ("revision", "gguf_file"), f"with model.path={model.path}")
    yield from SEARCH_METHODS[search.method].idle(search)
    for part in parts():
        yield from part.warnings(quantizer)
    weights = quantizer.weights
    holds_all = (weights.estimator, weights.method) == ("minmax", "rtn") and config.reconstruction.method != "omniquant"
    if weights.bits is not None and holds_all:
        why = "with quantizer.weights.estimator=minmax and quantizer.weights.method=rtn"
        yield from without_effect("quantizer.weights", weights, ("narrow_range",), why)
    if config.data.further and not config.eval.perplexity:
        yield (
            f"data.further={sorted(config.data.further)} is not measured with eval.perplexity=false; it only keeps "
            "its share where another purpose names the same source"
        )
    if config.tuning.method != "none" and config.tuning.gradient == "straight_through" and config.tuning.lambda_q:
        yield (
            "tuning.gradient=straight_through gives L_q a gradient of exactly zero: tuning.lambda_q has no effect on it"
        )


def _set(config: RunConfig) -> Iterator[tuple[str, Any, Any]]:
    """The options away from their default, but for names: key, value and default."""

    def below(key: str, value: Any, default: Any) -> Iterator[tuple[str, Any, Any]]:
        if not is_dataclass(value):
            if value != default:
                yield key, value, default
            return
        for field in fields(value):
            if field.name != "name":
                yield from below(f"{key}.{field.name}", getattr(value, field.name), getattr(default, field.name))

    defaults = RunConfig()
    for section in _SECTIONS:
        yield from below(section, getattr(config, section), getattr(defaults, section))


def _read(config: RunConfig) -> list[Any]:
    from cushion.config_reads import reads  # imports torch, which a configuration does without

    return reads(config)


def _has_no_effect(config: RunConfig, key: str, default: Any, read: list[Any]) -> bool:
    try:
        return _read(_changed(config, {key: default})) == read
    except ConfigError:  # the rest of the configuration needs the option
        return False


def _reason(config: RunConfig, key: str, value: Any, default: Any) -> str:
    """The first option that would have to be another for this one to have an effect."""
    search = config.search
    if key == "search.levels" and "levels" not in FORMATS[search.format].reads:
        return f"with search.format={search.format}"
    if key.startswith("search."):
        return f"with search.method={search.method}"
    if key == "execution":
        return f"with quantizer={config.quantizer.name}"
    if key in _SEVERAL and (config.tuning.method != "none" or not key.startswith("tuning.")):
        return _SEVERAL[key]
    for switch, changes in _SWITCHES:
        try:
            switched = _changed(config, {**changes, key: value})
            read = _read(switched)
        except ConfigError:
            continue
        if not _has_no_effect(switched, key, default, read):
            current = _value(config, switch)
            return f"with {switch}={current if isinstance(current, str) else written(current)}"
    return "in this combination: every step of the run reads the same without it"


def _value(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = getattr(config, name)
    return config


def _changed(config: Any, changes: dict[str, Any]) -> Any:
    """The configuration with other values of some keys, all checked together."""
    own: dict[str, Any] = {}
    below: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        name, _, rest = key.partition(".")
        if rest:
            below.setdefault(name, {})[rest] = value
        else:
            own[name] = value
    own |= {name: _changed(getattr(config, name), inner) for name, inner in below.items()}
    return replace(config, **own)
