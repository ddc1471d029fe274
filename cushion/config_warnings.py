"""Options that are set but have no effect in the combination at hand: worth a warning, not an error."""

from __future__ import annotations

import dataclasses
from typing import Any

from cushion.checks import without_effect
from cushion.config import QuantizerConfig, RunConfig, SearchConfig, TuningConfig
from cushion.quantization.formats.registry import FORMATS
from cushion.quantization.parts.registry import parts, unread
from cushion.registry import SEARCH_METHODS

_GRID = ("bits", "symmetric", "levels", "format")
"""The search keys that have an effect with every method: the activations are measured with them."""


def options_without_effect(config: RunConfig) -> list[str]:
    """Warnings about options that are set away from their default but have no effect in this combination."""
    found: list[str] = []

    def changed(section: str, part: Any, keys: tuple[str, ...], why: str) -> None:
        found.extend(without_effect(section, part, keys, why))

    keys: tuple[str, ...]
    search, tuning, quantizer = config.search, config.tuning, config.quantizer
    if config.model.path.partition(":")[0] in ("embedded", "tiny"):
        changed("model", config.model, ("revision", "gguf_file"), f"with model.path={config.model.path}")
    found.extend(_search_keys(search))
    if not config.eval.tasks:
        keys = ("limit", "shots", "task_batch_size", "accuracy", "include_path", "samples")
        changed("eval", config.eval, keys, "without eval.tasks")
    if not config.eval.perplexity:
        keys = ("batch_size", "predict_first", "prefix_in_block", "prefix_as_tokens")
        changed("eval", config.eval, keys, "with eval.perplexity=false")
        if config.data.further:
            found.append(
                f"data.further={sorted(config.data.further)} is not measured with eval.perplexity=false; it only keeps "
                "its share where another purpose names the same source"
            )
    else:
        why = _never_as_tokens(config)
        changed("eval", config.eval, ("prefix_as_tokens",) if why else (), why)
    if not config.eval.latency.is_on:
        keys, why = ("prompt_lengths", "new_tokens", "repeats", "warmup"), "with eval.latency.batch_sizes=[]"
        changed("eval.latency", config.eval.latency, keys, why)
    if tuning.method == "none":
        keys = tuple(f.name for f in dataclasses.fields(tuning) if f.name not in ("name", "method"))
        changed("tuning", tuning, keys, "with tuning.method=none")
    else:
        found += _tuning_keys(tuning)
    reconstruction = config.reconstruction
    if not reconstruction.is_on:
        keys = tuple(f.name for f in dataclasses.fields(reconstruction) if f.name not in ("name", "method"))
        changed("reconstruction", reconstruction, keys, "with reconstruction.method=none")
    elif not reconstruction.weights:
        changed("reconstruction", reconstruction, ("weight_learning_rate",), "with reconstruction.weights=false")
    found += _of_quantizer(quantizer)
    if quantizer.is_full_precision:
        changed_execution = without_effect("", config, ("execution",), f"with quantizer={quantizer.name}")
        found += [warning.removeprefix(".") for warning in changed_execution]
    return found


def _never_as_tokens(config: RunConfig) -> str:
    """Why no row of a run has a prefix that could be tokens, and a quantizer; empty where one may have."""
    if config.quantizer.is_full_precision:
        return f"with quantizer={config.quantizer.name}"
    if SEARCH_METHODS[config.search.method].find is None:
        return f"with search={config.search.name}"
    tuning, controls = config.tuning, config.eval.controls
    return f"with tuning={tuning.name} and eval.controls=false" if tuning.method != "none" and not controls else ""


_WITHOUT_A_READER = {
    "levels": "without quantized weights, activations, cache or attention on integers",
    "zero_point": "without an asymmetric grid",
    "shared_exponent": "without an MX format (mxfp8, mxfp6, mxfp4)",
    "targets": "without quantized weights or activations",
}


def _of_quantizer(quantizer: QuantizerConfig) -> list[str]:
    found = [
        warning
        for key in unread(quantizer)
        for warning in without_effect("quantizer", quantizer, (key,), _WITHOUT_A_READER[key])
    ]
    for part in parts():
        found += part.warnings(quantizer)
    if not quantizer.needs_calibration_text:
        keys, why = ("samples", "length"), "without static ranges, smoothing or QFeM"
        found += without_effect("quantizer.calibration", quantizer.calibration, keys, why)
    return found


def _tuning_keys(tuning: TuningConfig) -> list[str]:
    found, why = list[str](), f"with tuning.ranges={tuning.ranges}"
    if tuning.lambda_q == 0:
        found += without_effect("tuning", tuning, ("gradient", "error_site", "reduction"), "with tuning.lambda_q=0")
    elif tuning.gradient == "straight_through":
        found.append(
            "tuning.gradient=straight_through gives L_q a gradient of exactly zero: tuning.lambda_q has no effect on it"
        )
    if tuning.ranges != "static":
        found += without_effect("tuning", tuning, ("ranges_every",), why)
    if tuning.ranges != "learned":
        found += without_effect("tuning", tuning, ("scale_learning_rate",), why)
    return found


def _search_keys(search: SearchConfig) -> list[str]:
    method = SEARCH_METHODS[search.method]
    used = ("name", "method", *_GRID, *method.reads)
    unread = tuple(field.name for field in dataclasses.fields(search) if field.name not in used)
    found = without_effect("search", search, unread, f"with search.method={search.method}")
    if "levels" not in FORMATS[search.format].reads:
        found += without_effect("search", search, ("levels",), f"with search.format={search.format}")
    return [*found, *method.idle(search)]
