"""Everything that is done, and refused, before any long work: model, texts, and what cannot work with them.

## BOS

The key `bos`. Either every text of a run begins with BOS, or none does; by default as the tokenizer does by itself.
The prefix p comes first, and BOS belongs to the text behind it: [p, BOS, t]. So L_q, static ranges, smoothing, curves
and attention are those of BOS and t. For the paper's other reading, a prompt that begins with BOS, there is
`search.start=bos`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from cushion.chats import chat_text
from cushion.config import EvalConfig, RunConfig
from cushion.data import Corpus, load_corpora
from cushion.errors import ConfigError
from cushion.evaluation.latency import check_latency
from cushion.evaluation.perplexity import check_evaluation, named_in_front
from cushion.evaluation.sparsity import feed_forward
from cushion.evaluation.spikes import input_norms
from cushion.evaluation.task_checks import check_tasks
from cushion.evaluation.tasks import TaskSet, load_tasks
from cushion.execution.registry import load_execution
from cushion.held_out import split_texts
from cushion.models import LanguageModel, check_model, load_language_model
from cushion.quantization.check import check_quantizer
from cushion.search.methods import METHODS
from cushion.search.replicas import check_replicas
from cushion.tuning_ranges import check_tuning


@dataclass(frozen=True)
class Texts:
    """The token ids that a run uses, each (texts, tokens); None where the run has no such step.

    `reconstruction` are the calibration texts, or as many as it asks for. `activations` are the first blocks of the
    evaluation text; the blocks for perplexity are in `Prepared.blocks`. All begin with BOS where the run's texts do,
    one token more, but for the search texts of a method that puts it there.
    """

    activations: Tensor
    calibration: Tensor | None
    search: Tensor | None
    tuning: Tensor | None
    held_out: Tensor | None
    reconstruction: Tensor | None = None


_BLOCKS = ("eval.blocks", "eval.block_length")
"""The keys that decide how much text perplexity is measured on."""


@dataclass(frozen=True)
class Prepared:
    """A loaded model, and the texts and tasks of a run.

    Args:
        measured: the corpora whose perplexity is measured: name in results to purpose.
        blocks: of each of them, by name: token ids, (blocks, block length), or one more with BOS in front.
        start_tokens: what the prefix starts with, or consists of.
        bos: whether every text of the run begins with BOS, behind the prefix.

    """

    lm: LanguageModel
    corpora: dict[str, Corpus]
    texts: Texts
    measured: dict[str, str]
    blocks: dict[str, Tensor]
    tasks: TaskSet
    start_tokens: list[int]
    bos: bool = False

    def blocks_behind(self, config: EvalConfig, prefix_length: int) -> dict[str, Tensor]:
        """The blocks that are evaluated behind a prefix: shorter where it takes positions of the block itself."""
        if not config.prefix_in_block or prefix_length == 0:
            return self.blocks
        length, count = config.block_length - prefix_length, config.blocks
        return {
            name: _led(
                self.lm, self.bos, self.corpora[purpose].blocks(_encoder(self.lm, self.bos), length, count, _BLOCKS)
            )
            for name, purpose in self.measured.items()
        }


def choose_device(config: RunConfig) -> str:
    """The device named in the configuration; `auto` is the GPU where there is one.

    Raises:
        ConfigError: the name is none of torch's, or there is no such GPU.
    """
    if config.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(config.device)
    except RuntimeError as error:
        raise ConfigError(f"device={config.device!r} is not allowed: auto, cpu, cuda, cuda:<number> or mps") from error
    if device.type not in ("cpu", "cuda", "mps"):
        raise ConfigError(f"device={config.device!r} is not supported: auto, cpu, cuda, cuda:<number> or mps")
    if device.type == "mps" and not (torch.backends.mps.is_available() and not device.index):
        built = torch.backends.mps.is_built()
        reason = "torch sees no such GPU of Apple" if built else "this torch is built without it"
        raise ConfigError(f"device={config.device!r} is not available here: {reason}; use device=cpu or auto")
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= seen:
        raise ConfigError(
            f"device={config.device!r} is not available here: torch sees {seen} GPUs; use device=cpu or auto"
        )
    return config.device


def begins_with_bos(lm: LanguageModel, policy: str) -> bool:
    """Whether the texts of a run begin with BOS: `always`, `never`, or as the `tokenizer` does by itself.

    Raises:
        ConfigError: they always should, and the model has no BOS token.

    """
    if policy == "always" and lm.bos_token_id is None:
        raise ConfigError(f"bos=always, but {lm.label} has no BOS token: use bos=tokenizer or bos=never")
    return lm.adds_bos if policy == "tokenizer" else policy == "always"


def _led(lm: LanguageModel, bos: bool, texts: Tensor) -> Tensor:
    """Token ids, (texts, tokens), with BOS in front of each where the run has it."""
    return lm.with_bos(texts) if bos else texts


def _encoder(lm: LanguageModel, bos: bool) -> Callable[[str], Tensor]:
    """Text to token ids, (tokens,): without a BOS that the text itself begins with where the run puts one in front.

    A chat template may write it, and the texts would have two. Where a text is cut at a later chat's, it still does.
    """

    def encode(text: str) -> Tensor:
        tokens = lm.encode(text)
        return tokens[1:] if bos and tokens[:1].tolist() == [lm.bos_token_id] else tokens

    return encode


def prepare(config: RunConfig, device: str) -> Prepared:
    """Load the texts and the model, check that the configuration fits them, and draw every text of the run.

    Raises:
        CushionError: a source is missing or too short, the model cannot be loaded, or a size does not fit it.
    """
    check_replicas(config.search, device)
    check_model(config.model)
    measured = measured_corpora(config)

    @cache
    def model() -> LanguageModel:  # what is wrong with plain texts is told before it is loaded
        return load_language_model(config.model, config.paths, device)

    corpora = load_corpora(
        config.data, config.paths, _needed(config, measured), lambda messages: chat_text(model(), messages)
    )
    tasks = load_tasks(config.eval, config.paths)
    lm = model()
    method = METHODS[config.search.method]
    start_tokens = method.start_tokens(lm, config)
    bos = begins_with_bos(lm, config.bos)
    try:
        _check(lm, config, tasks, start_tokens, bos)
    except ConfigError as error:
        if not config.model.path.startswith("tiny:"):
            raise
        raise ConfigError(f"{error} (experiment=smoke has sizes for the tiny models)") from error
    encode = _encoder(lm, bos)
    blocks = {
        name: _led(lm, bos, corpora[purpose].blocks(encode, config.eval.block_length, config.eval.blocks, _BLOCKS))
        for name, purpose in measured.items()
    }
    texts = _draw_texts(lm, config, corpora, blocks, len(start_tokens), bos)
    if texts.search is not None:
        method.check_texts(config.search, texts.search)
    return Prepared(lm, corpora, texts, measured, blocks, tasks, start_tokens, bos)


def _needed(config: RunConfig, measured: dict[str, str]) -> set[str]:
    """The purposes for which this run needs text, those of the `measured` corpora among them."""
    needed = {
        "evaluation": True,
        "calibration": config.needs_calibration_text,
        "tuning": config.tuning.method != "none",
        "search": METHODS[config.search.method].texts is not None,
    }
    return {purpose for purpose, is_needed in needed.items() if is_needed} | set(measured.values())


def _check(lm: LanguageModel, config: RunConfig, tasks: TaskSet, start_tokens: list[int], bos: bool) -> None:
    check_quantizer(lm, config.quantizer)
    check_tuning(config.tuning, config.quantizer)
    load_execution(config.execution).check(lm, config.quantizer)
    method, started = METHODS[config.search.method], len(start_tokens)
    method.check_model(config.search, lm, started)
    longest = method.longest(config.search, started)
    check_evaluation(lm, config.eval, longest, bos)
    if config.eval.sparsity_texts:
        feed_forward(lm)
    if config.eval.spike_texts:
        input_norms(lm)
    check_tasks(lm, config.eval, tasks, config.quantizer, longest, bos)
    check_latency(lm, config.eval.latency, config.quantizer, longest)
    quantizer, tuning = config.quantizer, config.tuning
    searched = bos and method.texts is not None and not method.leads_texts  # without BOS the method has checked it
    read_behind = longest if method.behind_prefix else 0
    for key, used, length, behind in (
        ("search.text_length", searched, config.search.text_length, read_behind),
        ("tuning.sequence_length", tuning.method != "none", tuning.sequence_length, longest),
        ("quantizer.calibration.length", config.needs_calibration_text, quantizer.calibration.length, longest),
    ):
        if used and lm.context_length is not None and behind + length + bos > lm.context_length:
            raise ConfigError(
                f"{key}={length}{named_in_front(bos, behind)} does not fit the {lm.context_length} positions of "
                f"{lm.label}: shorten the {'texts or the prefix' if behind else 'text'}"
            )


def _draw_texts(
    lm: LanguageModel,
    config: RunConfig,
    corpora: dict[str, Corpus],
    blocks: dict[str, Tensor],
    start_length: int,
    bos: bool,
) -> Texts:
    encode, seed = _encoder(lm, bos), config.seed
    evaluation, search, tuning = config.eval, config.search, config.tuning
    count = evaluation.activation_blocks
    first = blocks.get(evaluation_name(config))
    if first is None:  # no perplexity is measured
        keys = ("eval.activation_blocks", "eval.block_length")
        first = _led(lm, bos, corpora["evaluation"].blocks(encode, evaluation.block_length, count, keys))
    calibration_texts = search_texts = tuning_texts = held_out = reconstruction_texts = None
    if config.needs_calibration_text:
        calibration, length = config.quantizer.calibration, "quantizer.calibration.length"
        keys = ("quantizer.calibration.samples", length)
        drawn = corpora["calibration"].samples(encode, calibration.length, calibration.samples, seed, keys)
        calibration_texts = reconstruction_texts = _led(lm, bos, drawn)
        if config.reconstruction.samples is not None:
            wanted = config.reconstruction.samples
            keys = ("reconstruction.samples", length)
            drawn = corpora["calibration"].samples(encode, calibration.length, wanted, seed, keys)
            reconstruction_texts = _led(lm, bos, drawn)
    method = METHODS[search.method]
    if method.texts is not None:
        places = list(range(method.texts(search, start_length)))
        if method.places is not None:
            places = method.places(search, start_length)
        of_search = [f"search.{key}" for key in (*method.texts_by, "text_length")]
        drawn = corpora["search"].samples(encode, search.text_length, max(places) + 1, seed, of_search)
        search_texts = _led(lm, bos and not method.leads_texts, drawn[places])
    if tuning.method != "none":
        numbers = tuning.sequences, tuning.held_out_sequences
        of_tuning = ("tuning.sequences", "tuning.held_out_sequences", "tuning.sequence_length")
        split = split_texts(corpora["tuning"], encode, tuning.sequence_length, *numbers, seed, of_tuning)
        tuning_texts, held_out = (_led(lm, bos, texts) for texts in (split.training, split.held_out))
        corpora["tuning"].provenance["held_out"] = split.record
    return Texts(first[:count], calibration_texts, search_texts, tuning_texts, held_out, reconstruction_texts)


def measured_corpora(config: RunConfig) -> dict[str, str]:
    """The corpora whose perplexity is measured: the name in results and the purpose in `data`.

    Raises:
        ConfigError: a further corpus has the name of the first.

    """
    if not config.eval.perplexity:
        return {}
    names = {evaluation_name(config): "evaluation"}
    for name in config.data.further:
        if name in names:
            raise ConfigError(f"data.further names {name!r}, but that is what data.evaluation is called: rename it")
        names[name] = f"further.{name}"
    return names


def evaluation_name(config: RunConfig) -> str:
    """What the evaluation text is called in results: its source, or the name of the user's file."""
    corpus = config.data.evaluation
    return Path(corpus.path or "").stem if corpus.source == "file" else corpus.source
