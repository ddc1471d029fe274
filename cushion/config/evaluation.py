"""Group `eval`: what is measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from cushion.checks import at_least, check_values, one_of, require
from cushion.config.latency import LatencyConfig

ACCURACIES = ("acc", "acc_norm")
AUTO: Final = "auto"
"""The value of `eval.task_batch_size` for the largest batch that fits."""


@dataclass
class EvalConfig:
    """Group `eval`: what is measured on the finished model, and on which controls beside it.

    Perplexity over blocks, accuracy on lm-eval tasks, and the share of attention that the prefix takes.
    """

    name: str = "short"
    perplexity: bool = True
    block_length: int = 512
    blocks: int | None = 16
    batch_size: int = 1
    predict_first: bool = False
    prefix_in_block: bool = False
    prefix_as_tokens: bool = False
    tasks: list[str] = field(default_factory=list)
    limit: int | float | None = None
    shots: int | None = None
    task_batch_size: int | str | None = None
    chat_template: bool | str = False
    system_instruction: str | None = None
    fewshot_as_multiturn: bool = True
    accuracy: str = "acc"
    include_path: str | None = None
    samples: bool = False
    activation_blocks: int = 4
    attention_texts: int = 1
    attention_first: int = 4
    sparsity_texts: int = 0
    sparsity_cett: list[float] = field(default_factory=lambda: [0.1, 0.2, 0.3])
    sparsity_ppl: float | None = None
    spike_texts: int = 0
    spike_ratio: float = 64.0
    controls: bool = True
    latency: LatencyConfig = field(default_factory=LatencyConfig)

    def __post_init__(self) -> None:
        check_values("eval", self)
        at_least("eval.block_length", self.block_length, 2)
        at_least("eval.activation_blocks", self.activation_blocks, 1)
        for key in ("blocks", "batch_size", "attention_first"):
            at_least(f"eval.{key}", getattr(self, key), 1)
        limit, size = self.limit, self.task_batch_size
        is_limit = limit is None or (0 < limit < 1 if isinstance(limit, float) else limit >= 1)
        reason = "a whole number of at least 1, a share of each task's records (above 0, below 1), or null for all"
        require(is_limit, "eval.limit", limit, reason)
        is_size = size is None or size == AUTO or (isinstance(size, int) and size >= 1)
        require(is_size, "eval.task_batch_size", size, "a whole number of at least 1, auto, or null")
        at_least("eval.shots", self.shots, 0)
        require(self.chat_template != "", "eval.chat_template", "", "false, true, or the name of a template")
        for key in ("attention_texts", "sparsity_texts", "spike_texts"):
            at_least(f"eval.{key}", getattr(self, key), 0)
        targets = self.sparsity_cett
        is_right = len(targets) > 0 and all(0 <= cett < 1 for cett in targets) and len(set(targets)) == len(targets)
        reason = "numbers from 0 on and below 1, at least one, each of them once"
        require(is_right, "eval.sparsity_cett", targets, reason)
        above = self.sparsity_ppl is None or self.sparsity_ppl > 0
        require(above, "eval.sparsity_ppl", self.sparsity_ppl, "a number of percent above 0, or null for none")
        at_least("eval.spike_ratio", self.spike_ratio, 1)
        one_of("eval.accuracy", self.accuracy, ACCURACIES)
        reason = "name tasks in eval.tasks, or leave perplexity on: nothing would be measured"
        is_measured = self.perplexity or len(self.tasks) > 0 or self.latency.is_on
        require(is_measured, "eval.perplexity", self.perplexity, reason)
        twice = sorted({task for task in self.tasks if self.tasks.count(task) > 1})
        require(not twice, "eval.tasks", self.tasks, f"{', '.join(twice)} stands there more than once")
