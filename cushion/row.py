"""One row of the comparison: perplexity of every corpus and score of every task, each an artifact of its own.

A row that was measured before is read from the cache without the quantizer being put on the model at all; an evaluation
that was killed goes on with the next block, or the next task.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from cushion.config import EvalConfig, QuantizerConfig
from cushion.evaluation.chat import chat_of
from cushion.evaluation.perplexity_step import PerplexityStep
from cushion.evaluation.task_checks import task_batch_size
from cushion.evaluation.task_scores import TaskScore, group_score
from cushion.evaluation.task_step import TaskStep
from cushion.evaluation.tasks import TaskSet
from cushion.execution.registry import SIMULATED
from cushion.metrics.columns import Losses, RowContext, Values, metrics
from cushion.quantization.lazily import QuantizedLazily
from cushion.registry import located
from cushion.step import Context, compute


@dataclass(frozen=True)
class Measured:
    """What a row gave: perplexity and number of predicted tokens by corpus, scores by task, and seconds."""

    perplexity: dict[str, float]
    tokens: dict[str, int]
    tasks: dict[str, TaskScore]
    seconds: float
    further: dict[str, Values] = field(default_factory=dict)
    """Values of the metrics that run the model themselves, by their names."""
    losses: dict[str, Losses] = field(default_factory=dict)
    """By corpus, what the perplexity is the mean of."""
    records: dict[str, tuple[float, ...]] = field(default_factory=dict)
    """By single task whose score is a mean over its records, its metric on each."""


def row_label(quantizer: QuantizerConfig | None, execution: str, prefix: str) -> str:
    """The label of a row, such as `qfep W8A8 (int8) + tuned prefix`: an execution that is simulated is not named.

    Args:
        quantizer: None for full precision.
        execution: how its linears are computed.
        prefix: what the row's prefix is called, empty without one.

    """
    label = "full precision" if quantizer is None else quantizer.scheme
    if quantizer is not None and execution != SIMULATED:
        label += f" ({execution})"
    return f"{label} + {prefix}" if prefix else label


def measure_row(
    context: Context,
    model: QuantizedLazily,
    config: EvalConfig,
    blocks: dict[str, Tensor],
    tasks: TaskSet,
    label: str,
    samples: Path | None = None,
    bos: bool = False,
) -> Measured:
    """Measure everything, in order; on leaving, the model is as it was before.

    Args:
        context: with the model.
        model: the row's prefix and quantizer.
        config: how it is measured.
        blocks: by corpus, (blocks, block length), or one more with BOS in front.
        tasks: what lm-eval asks.
        label: what progress bars call the row.
        samples: folder for lm-eval's record of every sample, one JSON-lines file per task; None for none.
        bos: whether the blocks begin with BOS, and the contexts of tasks are to.

    """
    perplexities, tokens, losses, seconds = {}, {}, {}, 0.0
    scores: dict[str, TaskScore] = {}
    records: dict[str, tuple[float, ...]] = {}
    asked = None
    if tasks.tasks:  # before the quantizer is on: lm-eval ties the weights of a model that it is given
        from cushion.evaluation.harness import PrefixedModel  # slow to import, and not needed without tasks

        batch_size = task_batch_size(config, model.quantizer, context.lm.device.type)
        asked = PrefixedModel(context.lm, model.behind, batch_size, bos, chat_of(context.lm, config))
    with model:
        for corpus, text in blocks.items():
            stage = f"perplexity, {corpus}, {label}" if len(blocks) > 1 else f"perplexity, {label}"
            found = compute(PerplexityStep(model, config, text, stage, bos), context)
            perplexities[corpus], tokens[corpus] = found.value, found.tokens
            losses[corpus] = Losses([one.loss for one in found.losses], [one.tokens for one in found.losses])
            seconds += found.seconds
        for done, (name, task) in enumerate(tasks.tasks.items()):
            assert asked is not None
            context.progress(f"tasks, {label}", done, len(tasks.tasks), "task")
            answered = compute(TaskStep(model, asked, config, task, batch_size, samples), context)
            scores[name], records[name] = answered.score, answered.records
            seconds += answered.seconds
            context.progress(f"tasks, {label}", done + 1, len(tasks.tasks), "task")
        row = RowContext(context, model, config, blocks, bos)
        further = {metric.name: located(metric.measure)(row) for metric in metrics() if metric.measure is not None}
    for name, group in tasks.groups.items():
        grouped = group_score(group, scores)
        if grouped is not None:
            scores[name] = grouped
    return Measured(perplexities, tokens, scores, seconds, further, losses, records)
