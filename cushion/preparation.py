"""Everything that is done, and refused, before any long work: model, texts, and what cannot work with them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cushion.config import RunConfig
from cushion.data import Corpus, load_corpora
from cushion.errors import ConfigError
from cushion.evaluation.perplexity import check_evaluation
from cushion.models import LanguageModel, check_model, load_language_model
from cushion.quantization.simulate import check_quantizer


@dataclass(frozen=True)
class Texts:
    """The token ids that a run uses, each (texts, tokens); None where the run has no such step."""

    blocks: Tensor
    activations: Tensor
    calibration: Tensor | None
    search: Tensor | None
    tuning: Tensor | None
    held_out: Tensor | None


@dataclass(frozen=True)
class Prepared:
    """A loaded model and the texts of a run. `start_tokens`: what the prefix starts with, or consists of."""

    lm: LanguageModel
    corpora: dict[str, Corpus]
    texts: Texts
    start_tokens: list[int]


def choose_device(config: RunConfig) -> str:
    """The device named in the configuration; `auto` is the GPU where there is one.

    Raises:
        ConfigError: the name is none of torch's, or there is no GPU.
    """
    if config.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(config.device)
    except RuntimeError as error:
        raise ConfigError(f"device={config.device!r} is not allowed: auto, cpu, cuda or cuda:<number>") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device={config.device!r} is not supported: auto, cpu, cuda or cuda:<number>")
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= seen:
        raise ConfigError(
            f"device={config.device!r} is not available here: torch sees {seen} GPUs; use device=cpu or auto"
        )
    return config.device


def prepare(config: RunConfig, device: str) -> Prepared:
    """Load the texts and the model, check that the configuration fits them, and draw every text of the run.

    Raises:
        CushionError: a source is missing or too short, the model cannot be loaded, or a size does not fit it.
    """
    check_model(config.model)
    corpora = load_corpora(config.data, config.paths, _needed(config))
    lm = load_language_model(config.model, config.paths, device)
    start_tokens = _start_tokens(lm, config)
    _check(lm, config, start_tokens)
    return Prepared(lm, corpora, _draw_texts(lm, config, corpora, len(start_tokens)), start_tokens)


def _needed(config: RunConfig) -> set[str]:
    """The purposes for which this run needs text."""
    needed = {
        "evaluation": True,
        "calibration": config.quantizer.needs_calibration_text,
        "tuning": config.tuning.method != "none",
        "search": config.search.method == "greedy",
    }
    return {purpose for purpose, is_needed in needed.items() if is_needed}


def _start_tokens(lm: LanguageModel, config: RunConfig) -> list[int]:
    search = config.search
    if search.method == "tokens":
        ids = search.token_ids if search.token_ids is not None else lm.encode(search.tokens or "").tolist()
        lm.check_token_ids(ids, "search.token_ids")
        return ids
    if search.method == "greedy" and search.start == "bos":
        if lm.bos_token_id is None:
            raise ConfigError(f"search.start=bos, but {lm.label} has no BOS token: use search.start=empty")
        return [lm.bos_token_id]
    if search.method == "greedy" and search.start == "newline":
        return lm.encode("\n").tolist()
    return []


def _check(lm: LanguageModel, config: RunConfig, start_tokens: list[int]) -> None:
    check_quantizer(lm, config.quantizer)
    search, longest = config.search, len(start_tokens)
    if search.method == "greedy":
        longest = max(longest, search.max_length)
        if lm.context_length is not None and longest + search.text_length > lm.context_length:
            raise ConfigError(
                f"search.max_length={search.max_length} and search.text_length={search.text_length} need "
                f"{longest + search.text_length} positions, but {lm.label} has {lm.context_length}: shorten one"
            )
    check_evaluation(lm, config.eval, longest)
    quantizer, tuning = config.quantizer, config.tuning
    with_bos = int(config.eval.bos == "block")
    for key, used, length, extra in (
        ("tuning.sequence_length", tuning.method != "none", tuning.sequence_length, 0),
        ("quantizer.calibration.length", quantizer.needs_calibration_text, quantizer.calibration.length, with_bos),
    ):
        if used and lm.context_length is not None and longest + length + extra > lm.context_length:
            raise ConfigError(
                f"{key}={length} and a prefix of up to {longest} tokens do not fit the {lm.context_length} positions "
                f"of {lm.label}: shorten the texts or the prefix"
            )


def _draw_texts(lm: LanguageModel, config: RunConfig, corpora: dict[str, Corpus], start_length: int) -> Texts:
    encode, seed = lm.encode, config.seed
    evaluation, search, tuning = config.eval, config.search, config.tuning
    blocks = corpora["evaluation"].blocks(encode, evaluation.block_length, evaluation.blocks)
    calibration_texts = search_texts = tuning_texts = held_out = None
    if config.quantizer.needs_calibration_text:
        calibration = config.quantizer.calibration
        calibration_texts = corpora["calibration"].samples(encode, calibration.length, calibration.samples, seed)
        if evaluation.bos == "block":  # ranges are taken from what the evaluation will run
            calibration_texts = lm.with_bos(calibration_texts)
    if search.method == "greedy":
        steps = max(1, search.max_length - start_length)
        search_texts = corpora["search"].samples(encode, search.text_length, steps, seed)
    if tuning.method != "none":
        parts = [tuning.sequences, tuning.held_out_sequences]
        drawn = corpora["tuning"].samples(encode, tuning.sequence_length, sum(parts), seed)
        tuning_texts, held_out = drawn.split(parts)
    activations = blocks[: evaluation.activation_blocks]
    return Texts(blocks, activations, calibration_texts, search_texts, tuning_texts, held_out)


def evaluation_name(config: RunConfig) -> str:
    """What the evaluation text is called in results: its source, or the name of the user's file."""
    corpus = config.data.evaluation
    return Path(corpus.path or "").stem if corpus.source == "file" else corpus.source
