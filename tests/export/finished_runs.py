"""Runs as they lie in their folders when they are done, made on the spot: a tiny model, a prefix, and a result."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from cushion.config import ModelConfig, RunConfig, SearchConfig, TuningConfig
from cushion.models import LanguageModel
from cushion.prefix import Prefix
from cushion.results import Row, RunResult

TOKENS = [91, 6, 8]
"""In the tokenizer of tiny models `|')`: text that Markdown would read as a cell's end."""


def tuned_prefix(lm: LanguageModel, tokens: list[int]) -> Prefix:
    """A prefix whose keys and values are not those of its tokens, and differ in every place."""
    found = Prefix.from_tokens(lm.model, tokens)
    generator = torch.Generator().manual_seed(0)

    def moved(tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return tuple(tensor + 0.3 * torch.randn(tensor.shape, generator=generator) for tensor in tensors)

    return replace(found, keys=moved(found.keys), values=moved(found.values), tuned=True)


def finished_run(folder: Path, lm: LanguageModel, prefix: Prefix | None, **model: Any) -> Path:
    """The folder of a run on `model` (keys of the configuration; by default the id of a hub) that found `prefix`."""
    config = RunConfig(
        model=ModelConfig(**{"path": "owner/base", **model}),
        search=SearchConfig(name="greedy_sampled", method="greedy"),
        tuning=TuningConfig(name="short", method="prefix", steps=5),
    )
    record = None
    if prefix is not None:
        prefix.save(folder / "prefix")
        ids = list(prefix.token_ids)
        record = {"token_ids": ids, "text": lm.decode(ids), "length": len(ids), "tuned": prefix.tuned,
                  "fingerprint": prefix.fingerprint}  # fmt: skip
    stage = "tuned" if prefix is not None and prefix.tuned else "found"
    rows = [
        Row("full_precision", "full precision", "", False, "none", {"perplexity/text": 30.125}),
        Row(f"full_precision_{stage}", f"full precision + {stage} prefix", "", False, stage, {"perplexity/text": 25.5}),
        Row(f"quantized_{stage}", f"W8A8 + {stage} prefix", "", True, stage, {"perplexity/text": None}),
    ]
    RunResult(
        status="completed",
        config=asdict(config),
        environment={"cushion": "1.2.3", "packages": {"torch": "2.0", "transformers": "5.0"}},
        model={"path": config.model.path, "architecture": "llama", "fingerprint": "abcd", "dtype": "float32"},
        evaluation={"block_length": 64, "bos": False},
        prefix=record,
        rows=rows,
    ).write(folder)
    return folder
