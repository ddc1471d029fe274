"""What the steps of a run read of its configuration: their own keys, with stand-ins for all that no option is.

Two configurations whose steps read the same are the same run. That is how `config_warnings` knows an option without
effect: nothing that is read changes when it goes back to its default. Nothing is loaded, drawn or computed for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from cushion.config import RunConfig
from cushion.evaluation.attention import AttentionStep
from cushion.evaluation.chat import Chat
from cushion.evaluation.latency_step import LatencyStep
from cushion.evaluation.magnitudes import MagnitudesStep
from cushion.evaluation.perplexity_step import PerplexityStep
from cushion.evaluation.prefix_as_tokens import TokensPerplexityStep
from cushion.evaluation.sparsity import SparsityStep
from cushion.evaluation.spikes import SpikesStep
from cushion.evaluation.task_step import TaskStep
from cushion.evaluation.tasks import EvaluationTask
from cushion.hashing import digest
from cushion.prefix import Prefix
from cushion.quantization.calibration import Calibration, CalibrationStep
from cushion.quantization.identity import rotation_of
from cushion.quantization.input_statistics import InputStatisticsStep
from cushion.quantization.lazily import QuantizedLazily
from cushion.quantization.reconstruction_step import ReconstructionStep
from cushion.registry import SEARCH_METHODS
from cushion.step import Step
from cushion.tuning_ranges import tuning_quantizer
from cushion.tuning_step import TuningRun

NONE = Prefix.empty()


class _NoTemplate(Chat):
    """A chat whose key names the options, since no tokenizer is there to write one."""

    def key(self, lm: Any) -> dict[str, Any]:
        return asdict(self) if self.template is not None else {"system": self.system}


def reads(config: RunConfig) -> list[Any]:
    """All that the steps of a run read, as plain JSON.

    A search method says by its declaration what it reads; every other step says it by its key.
    """
    lm: Any = SimpleNamespace(device=torch.device("cpu"), tokenizer_fingerprint="")
    context: Any = SimpleNamespace(lm=lm)
    search = config.search
    found: list[Any] = [
        ["search", search.method, *(repr(getattr(search, key)) for key in SEARCH_METHODS[search.method].reads)],
        ["rows", config.eval.controls],
    ]
    found += [[step.name, step.key(context)] for step in _steps(config, lm)]
    if config.quantizer.uses_qfem:
        found.append(["qfem", *_qfem(config)])
    if config.eval.tasks:
        found.append(["scores", config.eval.accuracy])
    return found


def _steps(config: RunConfig, lm: Any) -> Iterator[Step[Any]]:
    evaluation, tuning, search, quantizer = config.eval, config.tuning, config.search, config.quantizer
    count = evaluation.activation_blocks
    if evaluation.perplexity and evaluation.blocks is not None:  # they are the first of the blocks
        count = min(count, evaluation.blocks)
    first = _text(evaluation.block_length, count)
    yield MagnitudesStep(NONE, search, first, "")
    if evaluation.attention_texts:
        texts = _text(evaluation.block_length, min(count, evaluation.attention_texts))
        yield AttentionStep(NONE, texts, evaluation.attention_first, "")
    if evaluation.sparsity_texts:
        texts, cett = _text(evaluation.block_length, min(count, evaluation.sparsity_texts)), evaluation.sparsity_cett
        yield SparsityStep(NONE, texts[:, None], tuple(cett), evaluation.sparsity_ppl, False, "")
    if evaluation.spike_texts:
        texts = _text(evaluation.block_length, min(count, evaluation.spike_texts))
        yield SpikesStep(NONE, texts, evaluation.spike_ratio, "")
    calibration = _text(quantizer.calibration.samples, quantizer.calibration.length)
    calibrated: Calibration | None = None
    if quantizer.needs_calibration_text:
        measured: list[Step[Any]] = []
        if quantizer.needs_calibration:
            measured.append(CalibrationStep(NONE, cast(Any, rotation_of(quantizer)), calibration))
        if quantizer.gathered:
            measured.append(InputStatisticsStep(NONE, quantizer, None, calibration, ""))
        yield from measured
        keys = [step.key(cast(Any, SimpleNamespace(lm=lm))) for step in measured]
        calibrated = Calibration(None, digest([keys, quantizer.calibration.samples, quantizer.calibration.length]), 0.0)
    if tuning.method != "none":
        texts, held_out = _text(tuning.sequence_length, tuning.sequences), _text(tuning.held_out_sequences)
        under = tuning_quantizer(tuning, quantizer)
        needed = calibrated if under.needs_calibration_text else None
        static = calibration if tuning.ranges == "static" else None
        yield TuningRun(NONE, tuning, quantizer, search, texts, held_out, 0, Path(), needed, None, static)
    if config.reconstruction.is_on:
        samples = config.reconstruction.samples or quantizer.calibration.samples
        texts = _text(samples, quantizer.calibration.length)
        yield ReconstructionStep(NONE, quantizer, calibrated, frozenset(), config.reconstruction, texts, 0, "")
    own = None if quantizer.is_full_precision else quantizer
    yield from _of_row(config, QuantizedLazily(lm, NONE, own, calibrated, frozenset(), config.execution))


def _of_row(config: RunConfig, model: QuantizedLazily) -> Iterator[Step[Any]]:
    """What is measured on the run's own row."""
    evaluation = config.eval
    if evaluation.perplexity:
        blocks = _text(evaluation.block_length, evaluation.blocks, evaluation.prefix_in_block, *config.data.further)
        yield PerplexityStep(model, evaluation, blocks, "")
        is_untuned = config.search.method != "none" and (config.tuning.method == "none" or evaluation.controls)
        if evaluation.prefix_as_tokens and is_untuned and model.quantizer is not None:
            yield TokensPerplexityStep(model, evaluation, blocks, "")
    if evaluation.tasks:
        named = evaluation.chat_template is not False
        chat = _NoTemplate(
            str(evaluation.chat_template) if named else None,
            evaluation.system_instruction,
            evaluation.fewshot_as_multiturn,
        )
        asked: Any = SimpleNamespace(begins_with_bos=False, chat=chat)
        task = EvaluationTask("", None, digest([evaluation.tasks, evaluation.include_path]), "")
        size = evaluation.task_batch_size
        yield TaskStep(model, asked, evaluation, task, str(size), Path() if evaluation.samples else None)
    if evaluation.latency.is_on:
        yield LatencyStep(model, evaluation.latency)


def _qfem(config: RunConfig) -> list[Any]:
    """What decides which linears QFeM keeps, beside the quantizer."""
    settings = config.quantizer.qfem
    return [settings.alpha, settings.search, *([settings.target, settings.texts, settings.curve] * settings.search)]


@lru_cache(typed=True)
def _text(*drawn_by: Any) -> Tensor:
    """A stand-in for texts: another one for other numbers by which they are drawn."""
    return torch.tensor([int(digest([str(item) for item in drawn_by], 15), 16)])
