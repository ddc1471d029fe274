"""What of `eval.tasks` cannot be asked right, and how many requests go into one forward pass."""

from __future__ import annotations

from typing import Literal

from cushion.config import EvalConfig, QuantizerConfig
from cushion.config.evaluation import AUTO
from cushion.errors import ConfigError
from cushion.evaluation.chat import Chat, chat_of
from cushion.evaluation.tasks import EvaluationTask, TaskSet
from cushion.models import LanguageModel
from cushion.prefix import ASSISTED, Prefix, dropped_beyond, keeps_cache

BATCH_SIZE = 8
"""Requests per forward pass where `eval.task_batch_size` names none and the quantizer allows several."""

MEASURED_ON = "cuda"
"""The kind of device whose memory says when it is full, so that `eval.task_batch_size=auto` can try; others have 8."""

GENERATED_TOKENS = 256
"""What lm-eval lets a task generate that does not say how much."""


def task_batch_size(config: EvalConfig, quantizer: QuantizerConfig | None, device_type: str) -> int | Literal["auto"]:
    """Requests per forward pass: as configured, else one where a dynamic per-tensor range would span a batch.

    A dynamic per-tensor range is that of the whole batch: other requests and padding would decide a request's scale.
    So would padding where a cache counts tokens from the start of a row.

    Returns:
        A number, or `auto`, on a GPU alone: as many as fit, from lm-eval's 64 down, found anew for every task.

    """
    if isinstance(config.task_batch_size, int):
        return config.task_batch_size
    if quantizer is not None and quantizer.spans_batch:
        return 1
    return AUTO if config.task_batch_size == AUTO and device_type == MEASURED_ON else BATCH_SIZE


def check_tasks(
    lm: LanguageModel,
    config: EvalConfig,
    tasks: TaskSet,
    quantizer: QuantizerConfig,
    prefix_length: int,
    bos: bool = False,
) -> None:
    """Refuse what cannot be evaluated right: a chat without template, no room behind the prefix, scales over a batch.

    Args:
        prefix_length: of the longest prefix that the run may have.
        bos: whether every context begins with BOS.

    Raises:
        ConfigError: names the key.

    """
    if not config.tasks:
        return
    chat = chat_of(lm, config)
    if lm.context_length is not None and lm.context_length - prefix_length < 2:
        raise ConfigError(
            f"a prefix of up to {prefix_length} tokens leaves no room for the context of eval.tasks in the "
            f"{lm.context_length} positions of {lm.label}: shorten the prefix"
        )
    for name, one in tasks.tasks.items():
        if getattr(one.task, "UNSAFE_CODE", False) or getattr(one.task, "MULTIMODAL", False):
            kind = "runs code that the model writes" if getattr(one.task, "UNSAFE_CODE", False) else "shows images"
            raise ConfigError(f"eval.tasks={name} {kind}, which is not supported: leave it out")
        if one.task.OUTPUT_TYPE != "generate_until":
            continue
        given = one.task.get_config("generation_kwargs") or {}
        assisted = [key for key in ASSISTED if given.get(key) is not None]
        if prefix_length and assisted:
            raise ConfigError(
                f"eval.tasks={name} asks for assisted generation ({assisted[0]}={given[assisted[0]]!r} in its "
                "generation_kwargs), whose first pass would run the prefix once more: leave it out there, or use "
                "search=none"
            )
        if lm.context_length is None:
            continue
        keys = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
        generated = next((int(given[key]) for key in keys if given.get(key) is not None), GENERATED_TOKENS)
        if lm.context_length - prefix_length - generated < 1:
            raise ConfigError(
                f"eval.tasks={name} generates up to {generated} tokens, and behind a prefix of up to {prefix_length} "
                f"no room is left for its context in the {lm.context_length} positions of {lm.label}: "
                "shorten the prefix"
            )
        if prefix_length and not keeps_cache(lm.model, lm.context_length):
            _check_growth(lm, config, one, prefix_length, generated, bos, chat)
    if isinstance(config.task_batch_size, int) and config.task_batch_size > 1 and quantizer.spans_batch:
        raise ConfigError(
            f"eval.task_batch_size={config.task_batch_size} with quantizer={quantizer.name}: one dynamic range per "
            "tensor would span all requests of a batch and their padding (groups and protected tokens of "
            "quantizer.kv_cache would be counted from the padding); set eval.task_batch_size=1, auto or null"
        )


def _check_growth(
    lm: LanguageModel,
    config: EvalConfig,
    task: EvaluationTask,
    prefix_length: int,
    generated: int,
    bos: bool,
    chat: Chat,
) -> None:
    """Refuse a task whose texts may grow to where `generate` drops the cache, and with it the prefix."""
    from cushion.evaluation.harness import PrefixedModel, longest_context  # slow to import

    assert lm.context_length is not None
    room = lm.context_length - prefix_length - generated
    context = min(room, longest_context(PrefixedModel(lm, Prefix.empty(), 1, bos, chat), task, config.limit))
    length = prefix_length + context + generated - 1  # what is generated last is not run
    if not keeps_cache(lm.model, length):
        raise ConfigError(
            f"eval.tasks={task.name} may grow to {length} tokens, a prefix of up to {prefix_length}, a context of "
            f"up to {context} and what it generates, and generate of {lm.model.config.model_type!r} drops the cache "
            f"that holds the prefix on the way{dropped_beyond(lm.model)}: shorten the prefix, lower eval.shots, leave "
            "the task out, or use search=none"
        )
