"""Options that are set but have no effect in the combination at hand: worth a warning, not an error."""

from __future__ import annotations

import dataclasses
from typing import Any

from cushion.checks import without_effect
from cushion.config import QuantizerConfig, RunConfig
from cushion.quantization.parts.registry import PARTS, unread

_USED_BY_RULE = {
    "qfep": ("texts", "text_length", "contexts", "outlier_tokens"),
    "prefixquant": ("texts", "text_length", "eta", "max_length"),
}
"""The search keys that have an effect with a rule."""


def options_without_effect(config: RunConfig) -> list[str]:
    """Warnings about options that are set away from their default but have no effect in this combination."""
    found: list[str] = []

    def changed(section: str, part: Any, keys: tuple[str, ...], why: str) -> None:
        found.extend(without_effect(section, part, keys, why))

    search, tuning, quantizer = config.search, config.tuning, config.quantizer
    if config.model.path.partition(":")[0] in ("embedded", "tiny"):
        changed("model", config.model, ("revision", "gguf_file"), f"with model.path={config.model.path}")
    if search.method != "greedy":
        shared = ("name", "method", "tokens", "token_ids", "length", "bits", "symmetric", "levels")
        used = (*shared, *(("seed",) if search.method == "random" else _USED_BY_RULE.get(search.method, ())))
        keys = tuple(f.name for f in dataclasses.fields(search) if f.name not in used)
        changed("search", search, keys, f"with search.method={search.method}")
    else:
        changed("search", search, ("texts", "contexts", "outlier_tokens", "eta"), "with search.method=greedy")
        if search.proposal in ("vocabulary", "user"):
            changed("search", search, ("candidates",), f"with search.proposal={search.proposal}")
        if search.proposal != "sampled":
            changed("search", search, ("frequent", "seed"), f"with search.proposal={search.proposal}")
        if search.proposal != "user":
            changed("search", search, ("user_tokens",), f"with search.proposal={search.proposal}")
        if search.scoring == "full":
            changed("search", search, ("rounds",), "with search.scoring=full")
    if search.method == "greedy" and search.proposal == "sampled" and search.frequent >= search.candidates:
        found.append(
            f"search.candidates={search.candidates} leaves no room for a seeded draw beside "
            f"search.frequent={search.frequent}: the seed has no effect on the candidates"
        )
    if search.method != "tokens":
        changed("search", search, ("tokens", "token_ids"), f"with search.method={search.method}")
    if search.method != "random":
        changed("search", search, ("length",), f"with search.method={search.method}")
    if not config.eval.tasks:
        keys = ("limit", "shots", "task_batch_size", "add_bos", "accuracy", "include_path", "samples")
        changed("eval", config.eval, keys, "without eval.tasks")
    if not config.eval.perplexity:
        keys = ("batch_size", "predict_first", "prefix_in_block")
        changed("eval", config.eval, keys, "with eval.perplexity=false")
        if config.data.further:
            found.append(
                f"data.further={sorted(config.data.further)} is not measured with eval.perplexity=false; it only keeps "
                "its share where another purpose names the same source"
            )
    if search.method == "greedy" and search.objective == "maximum_activation":
        grid_keys = ("bits", "symmetric", "levels")
        changed("search", search, grid_keys, "on the search with search.objective=maximum_activation")
    if tuning.method == "none":
        keys = tuple(f.name for f in dataclasses.fields(tuning) if f.name not in ("name", "method"))
        changed("tuning", tuning, keys, "with tuning.method=none")
    elif tuning.lambda_q == 0:
        changed("tuning", tuning, ("gradient", "error_site", "reduction"), "with tuning.lambda_q=0")
    elif tuning.gradient == "straight_through":
        found.append(
            "tuning.gradient=straight_through gives L_q a gradient of exactly zero: tuning.lambda_q has no effect on it"
        )
    found += _of_quantizer(quantizer)
    return found


_WITHOUT_A_READER = {
    "levels": "without quantized weights, activations, cache or attention",
    "zero_point": "without an asymmetric grid",
    "targets": "without quantized weights or activations",
}


def _of_quantizer(quantizer: QuantizerConfig) -> list[str]:
    found = [
        warning
        for key in unread(quantizer)
        for warning in without_effect("quantizer", quantizer, (key,), _WITHOUT_A_READER[key])
    ]
    for part in PARTS.values():
        found += part.warnings(quantizer)
    if not quantizer.needs_calibration_text:
        keys, why = ("samples", "length"), "without static ranges, smoothing or QFeM"
        found += without_effect("quantizer.calibration", quantizer.calibration, keys, why)
    return found
