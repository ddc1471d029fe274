"""What the tests of whole runs share: a small configuration on a tiny model, and processes that start quickly."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cushion.config import (
    CalibrationConfig,
    CorpusConfig,
    DataConfig,
    EvalConfig,
    ModelConfig,
    PathsConfig,
    QuantizerConfig,
    RunConfig,
    SearchConfig,
    TuningConfig,
)
from cushion.models import load_language_model

TUNED_ROWS = [f"{kind}{stage}" for kind in ("full_precision", "quantized") for stage in ("", "_found", "_tuned")]


def file_data(path: Path) -> DataConfig:
    """One text file for all four purposes."""
    corpora = [CorpusConfig(source="file", path=str(path)) for _ in range(4)]
    return DataConfig("file", *corpora, path=str(path))


def small_config(text: Path, output: Path) -> RunConfig:
    """Perplexity of a tiny model with and without a quantizer: no search, no tuning."""
    return RunConfig(
        model=ModelConfig(path="tiny:llama"),
        data=file_data(text),
        quantizer=QuantizerConfig(calibration=CalibrationConfig(samples=2, length=16)),
        eval=EvalConfig(block_length=32, blocks=4, activation_blocks=2),
        paths=PathsConfig(output_dir=str(output), cache_dir=str(output / "cache")),
    )


def searching_config(text: Path, output: Path) -> RunConfig:
    """The small run with a greedy search whose steps are accepted (tau is 1), in several batches a step."""
    config = small_config(text, output)
    config.search = SearchConfig(
        name="greedy_sampled",
        method="greedy",
        candidates=24,
        frequent=8,
        text_length=16,
        max_length=2,
        tau=1.0,
        batch_size=4,
    )
    return config


def tuning_config(text: Path, output: Path) -> RunConfig:
    """The searching run with a few steps of tuning: every step that a run can have."""
    config = searching_config(text, output)
    config.tuning = TuningConfig(
        name="short",
        method="prefix",
        steps=5,
        sequences=6,
        sequence_length=16,
        batch_size=2,
        warmup_steps=1,
        evaluate_every=2,
        held_out_sequences=2,
    )
    return config


def without_seconds(value: Any) -> Any:
    """A record without what depends on the clock."""
    if isinstance(value, dict):
        return {key: without_seconds(item) for key, item in value.items() if key != "seconds"}
    return [without_seconds(item) for item in value] if isinstance(value, list) else value


_IMPORTED = [
    "cushion.pipeline", "cushion.cli", "cushion.reporting.cli", "cushion.config_reads",
    "transformers.models.llama.modeling_llama", "pytest",
]  # fmt: skip


def processes() -> ForkServerContext:
    """Real processes that share one start-up: Cushion is imported once, and every process is forked from there."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    return context


def saved_model(folder: Path, change: Callable[[nn.Module], object] = lambda model: None) -> Path:
    """A tiny llama with changed weights, saved the usual way: for runs that need a model with a planted fault."""
    lm = load_language_model(ModelConfig(path="tiny:llama"), PathsConfig())
    with torch.no_grad():
        change(lm.model)
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return folder


def overflow_in_half_precision(model: nn.Module) -> None:
    """Make the first block's output larger than float16 can hold, and no trouble for float32."""
    for name, factor in (("up_proj", 1e2), ("down_proj", 1e4)):
        parameters = dict(model.get_submodule(f"model.layers.0.mlp.{name}").named_parameters())
        parameters["weight"].mul_(factor)
