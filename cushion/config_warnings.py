"""Options that are set but have no effect in the combination at hand: worth a warning, not an error."""

from __future__ import annotations

import dataclasses
from typing import Any

from cushion.config import RunConfig


def options_without_effect(config: RunConfig) -> list[str]:
    """Warnings about options that are set away from their default but have no effect in this combination."""
    found: list[str] = []

    def changed(section: str, part: Any, keys: tuple[str, ...], why: str) -> None:
        defaults = type(part)()
        found.extend(f"{section}.{k}={getattr(part, k)!r} has no effect {why}"
                     for k in keys if getattr(part, k) != getattr(defaults, k))  # fmt: skip

    search, tuning, quantizer = config.search, config.tuning, config.quantizer
    if config.model.path.partition(":")[0] in ("embedded", "tiny"):
        changed("model", config.model, ("revision", "gguf_file"), f"with model.path={config.model.path}")
    if search.method != "greedy":
        shared = ("name", "method", "tokens", "token_ids", "bits", "symmetric", "levels")
        keys = tuple(f.name for f in dataclasses.fields(search) if f.name not in shared)
        changed("search", search, keys, f"with search.method={search.method}")
    else:
        if search.proposal in ("vocabulary", "user"):
            changed("search", search, ("candidates",), f"with search.proposal={search.proposal}")
        if search.proposal != "sampled":
            changed("search", search, ("frequent",), f"with search.proposal={search.proposal}")
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
    if quantizer.weights.granularity != "per_group":
        changed("quantizer.weights", quantizer.weights, ("group_size",),
                f"with quantizer.weights.granularity={quantizer.weights.granularity}")  # fmt: skip
    if not quantizer.needs_calibration:
        changed("quantizer.calibration", quantizer.calibration, ("samples", "length"),
                "without static ranges or smoothing")  # fmt: skip
    return found
