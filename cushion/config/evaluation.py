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
    """Measure perplexity over blocks

    Allowed: true, false
    """
    block_length: int = 512
    """Tokens per block

    Allowed: 2 and more
    Paper: **open**; its full-precision values agree with 2048
    """
    blocks: int | None = 16
    """Number of blocks from the start of the corpus; null: all that it fills

    Allowed: 1 and more, null
    """
    batch_size: int = 1
    """Blocks per forward pass

    Allowed: 1 and more
    """
    predict_first: bool = False
    """Count the first token of each block; only where BOS stands before it

    Allowed: true, false
    Paper: **open**: every row counts the same tokens
    """
    prefix_in_block: bool = False
    """Whether the prefix takes positions of the block: the text behind it is then shorter by its length, and rows with
    and without a prefix no longer count the same tokens

    Allowed: true, false
    Paper: **open**
    """
    prefix_as_tokens: bool = False
    """Measure every quantized row whose prefix was not tuned once more with the prefix as tokens in front of the text,
    as a server has it ([method.md](method.md#the-prefix-as-tokens))

    Allowed: true, false
    """
    tasks: list[str] = field(default_factory=list)
    """Tasks, groups or tags of lm-eval, by name

    Allowed: list
    Paper: seven zero-shot tasks
    """
    limit: int | float | None = None
    """Records per task, from its start; a number below 1 is a share of each task's records, rounded up, as in lm-eval;
    null: all

    Allowed: whole numbers from 1 on, shares above 0 and below 1, null
    Paper: all
    """
    shots: int | None = None
    """Examples before each question; null: the task's own number, mostly 0

    Allowed: 0 and more, null
    Paper: 0
    """
    task_batch_size: int | str | None = None
    """Requests per forward pass; null: 8, or 1 with one dynamic range per tensor, which would span the batch and its
    padding. `auto`, on a GPU: as many as fit, which lm-eval finds anew for every task, from 64 down; elsewhere
    memory does not say when it is full, and `auto` is what null is. The size changes the order in which
    floating-point numbers are summed, and nothing else

    Allowed: 1 and more, `auto`, null
    """
    chat_template: bool | str = False
    """Write the prompts of tasks as chats, by the template of the model's tokenizer, or by the one of that name where
    it has several

    Allowed: false, true, a name
    Paper: **open**
    """
    system_instruction: str | None = None
    """System instruction in front of every prompt, also without a template

    Allowed: text, null
    """
    fewshot_as_multiturn: bool = True
    """With a template: whether examples are turns of the chat, not parts of one question

    Allowed: true, false
    Paper: as in lm-eval
    """
    accuracy: str = "acc"
    """Which accuracy of a task enters the mean; `acc_norm` where the task has it, else `acc`

    Allowed: `acc`, `acc_norm`
    Paper: **open**; papers of the time of SmoothQuant report `acc`
    """
    include_path: str | None = None
    """Folder with task definitions of your own, in lm-eval's format

    Allowed: text, null
    """
    samples: bool = False
    """Keep lm-eval's record of every sample as JSON lines, `samples/<row>/<task>.jsonl` in the run folder

    Allowed: true, false
    """
    activation_blocks: int = 4
    """On how many of the first blocks magnitudes and L_q are measured

    Allowed: 1 and more
    """
    attention_texts: int = 1
    """On how many of those blocks attention is measured, on their first 512 tokens; 0 for none. Where a model has
    learned sinks in the softmax (gpt-oss), what they take is in no share

    Allowed: 0 and more
    Paper: Figure 3
    """
    attention_first: int = 4
    """How many tokens count as the first ones of a text

    Allowed: 1 and more
    """
    sparsity_texts: int = 0
    """On how many of those blocks activation sparsity is measured, on their first 512 tokens, all of them at once; 0
    for none ([method.md](method.md#activation-sparsity))

    Allowed: 0 and more
    """
    sparsity_cett: list[float] = field(default_factory=lambda: [0.1, 0.2, 0.3])
    """The cumulative errors of tail truncation at which the share of active neurons is taken

    Allowed: a list of numbers from 0 on and below 1
    """
    sparsity_ppl: float | None = None
    """Besides, at the largest CETT with which perplexity grows by at most so many percent (CETT-PPL-p%; the paper
    recommends 1); 18 passes over the texts for each prefix. null: not

    Allowed: numbers above 0, null
    """
    spike_texts: int = 0
    """On how many of those blocks spike tokens are counted and compared behind each block's norm; 0 for none
    ([method.md](method.md#spike-tokens-behind-the-norm))

    Allowed: 0 and more
    """
    spike_ratio: float = 64.0
    """Above how many times the median of its text a token's largest magnitude is a spike

    Allowed: 1 and more
    """
    controls: bool = True
    """Evaluate the control rows too

    Allowed: true, false
    """
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
