"""lm-eval with a prefix: the harness's own Hugging Face model class, with a prefix in front of every request.

Only what a prefix changes is overridden: the forward pass, generation, and the room that is left for the context. What
is asked, how it is batched and padded, and every metric are lm-eval's.

lm-eval is slow to import: this module is imported where a task is asked, and not before.
"""

from __future__ import annotations

import copy
import math
import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import numpy
import torch
from lm_eval import evaluator
from lm_eval.models.huggingface import HFLM
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from cushion.errors import ConfigError, NotFiniteError
from cushion.evaluation.chat import Chat
from cushion.evaluation.lm_eval_log import silenced
from cushion.evaluation.task_scores import Metric
from cushion.evaluation.tasks import FEW_SHOT_SEED, EvaluationTask, records_asked
from cushion.models import LanguageModel
from cushion.prefix import Prefix

BOOTSTRAP = 1000
"""Resamples for the standard errors that have no closed form (perplexities); accuracies have one."""

SEEDS = (0, 1234, 1234)
"""lm-eval's own seeds for Python, NumPy and torch: tasks that draw, draw the same for every row."""


class PrefixedModel(HFLM):
    """A language model behind a prefix, as lm-eval asks it.

    Args:
        lm: the model; quantize it before it is asked, not before this object is made.
        prefix: stands before every request through the cache; the empty one changes nothing.
        batch_size: requests per forward pass; `auto` for as many as fit, from 64 down, as lm-eval finds them.
        bos: whether every context begins with BOS, also with a tokenizer that puts none there by itself. A BOS that a
            chat template writes stays, and gets no second one.
        chat: how lm-eval writes the prompts.

    Attributes:
        truncated: how many requests of the task under way lost the start of their context, for lack of room behind the
            prefix. The windows of a rolling log-likelihood become shorter instead, and lose nothing.

    """

    def __init__(
        self, lm: LanguageModel, prefix: Prefix, batch_size: int | str, bos: bool = False, chat: Chat | None = None
    ) -> None:
        tokenizer = copy.deepcopy(lm.tokenizer)  # its padding is set and changed
        self.chat = Chat() if chat is None else chat
        if self.chat.template is not None:
            tokenizer.chat_template = self.chat.template
        if bos:
            _put_bos_alone(tokenizer, lm)
        with silenced("lm_eval.models.huggingface"):  # it warns that a loaded model's options are taken as they are
            super().__init__(
                pretrained=lm.model,
                tokenizer=tokenizer,
                batch_size=batch_size,
                add_bos_token=bos,
            )
        self._check_embedded = lm.check_embedded
        self._check_embedded([self.tokenizer.pad_token_id])
        self._prefix = prefix
        self.begins_with_bos = bos
        self.truncated = 0

    @property
    def max_length(self) -> int:
        """Tokens that fit behind the prefix."""
        return int(super().max_length) - len(self._prefix)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A chat as the template writes it, without its system message where the template takes none."""
        with silenced("lm_eval.models.huggingface"):  # it would say the latter for every request
            text = super().apply_chat_template(chat_history, add_generation_prompt)
        return str(text)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], *args: Any, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Score requests, each the tokens of a context and of its continuation; the last one is never an input."""
        for _, context, continuation in requests:
            self._check_embedded((*context, *continuation))
        room = self.max_length
        longest = max((len(continuation) for _, _, continuation in requests), default=0)
        if longest > room:
            length = len(self._prefix)
            holds = (
                f"a prefix of {length} tokens leaves room for {room}" if length else f"the model's context holds {room}"
            )
            way_out = "shorten the prefix, or leave the task out" if length else "leave the task out"
            raise ConfigError(f"eval.tasks has an answer of {longest} tokens, and {holds}: {way_out}")
        self.truncated += sum(len(context) + len(continuation) - 1 > room for _, context, continuation in requests)
        scored: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, *args, **kwargs)
        return scored

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Tokens and mask of contexts to go on from, (requests, tokens), cut to their last `left_truncate_len`."""
        if left_truncate_len is not None:
            _, whole = super().tok_batch_encode(strings, padding_side, None, truncation)
            self.truncated += int((whole.sum(1) > left_truncate_len).sum())
        encoded: tuple[Tensor, Tensor] = super().tok_batch_encode(strings, padding_side, left_truncate_len, truncation)
        self._check_embedded(encoded[0].unique().tolist())
        return encoded

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Logits for `inps`, (requests, tokens), padded on the right."""
        if len(self._prefix) == 0:
            return super()._model_call(inps, attn_mask, labels)
        with torch.no_grad():
            cache = self._prefix.cache(self.model, len(inps))
            return self.model(input_ids=inps, past_key_values=cache, use_cache=True).logits

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any) -> Tensor:
        """Continue `context`, (requests, tokens), padded on the left; the prefix is not part of what is returned.

        Padding stands between the prefix and the text. A sliding window would count it and reach less of the prefix, so
        that an answer would depend on the other requests: models with windows get padded requests one by one.

        Raises:
            ConfigError: the task asks for several sequences a request, or the model drops the prefix on the way.

        """
        returned = int(generation_kwargs.get("num_return_sequences") or 1)
        if returned > 1:
            raise ConfigError(
                f"eval.tasks has a task with num_return_sequences={returned}, of which lm-eval would take the answers "
                "for those of other requests: ask for several answers by the task's `repeats`"
            )
        length = len(self._prefix)
        if length == 0:
            return super()._model_generate(context, max_length, stop, **generation_kwargs)
        mask = generation_kwargs.pop("attention_mask", None)
        if mask is not None and not bool(mask.all()) and self._has_windows():
            rows = []
            for row, seen in zip(context, mask.bool(), strict=True):
                padding = len(row) - int(seen.sum())
                own = self._model_generate(row[None, padding:], max_length - padding, stop, **generation_kwargs)
                rows.append(torch.cat([row[:padding], own[0]]))
            return pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.pad_token_id)
        inputs = self._prefix.prepend({"input_ids": context, "attention_mask": mask}, warn=False)
        with self._prefix.kept(self.model):
            generated = super()._model_generate(
                inputs["input_ids"],
                max_length + length,
                stop,
                attention_mask=inputs["attention_mask"],
                past_key_values=self._prefix.cache(self.model, len(context)),
                **generation_kwargs,
            )
        return generated[:, length:]

    def _has_windows(self) -> bool:
        layers: list[Any] = self._prefix.cache(self.model).layers
        return any(layer.is_sliding for layer in layers)


def _put_bos_alone(tokenizer: PreTrainedTokenizerBase, lm: LanguageModel) -> None:
    """Let a tokenizer put BOS in front of a text, and nothing else around it, where it is asked for special tokens.

    An EOS behind the text would be scored as a part of every answer.

    Raises:
        ConfigError: it is not one of the library `tokenizers`, and does something else by itself.

    """
    assert lm.bos_token_id is not None, "checked by preparation"
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        if not lm.adds_bos:
            raise ConfigError(
                f"bos=always does not reach eval.tasks: the tokenizer of {lm.label}, written in Python, puts no BOS "
                "before a text by itself; use bos=tokenizer"
            )
        if tokenizer("a")["input_ids"] != [lm.bos_token_id, *lm.encode("a").tolist()]:
            raise ConfigError(
                f"eval.tasks cannot have BOS alone: the tokenizer of {lm.label}, written in Python, puts other tokens "
                "around a text too, which would be scored; use bos=never"
            )
        return
    bos = str(tokenizer.convert_ids_to_tokens(lm.bos_token_id))
    lead = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, lm.bos_token_id)])
    backend.post_processor = lead  # what it had besides, such as trimmed offsets, changes no token


def run_task(
    model: PrefixedModel, task: EvaluationTask, limit: float | None
) -> tuple[dict[str, Metric], int, list[dict[str, Any]]]:
    """Ask the model one task; `model.truncated` then says how many of its requests were cut.

    Args:
        limit: number of records from the start, or a share below 1 of them, rounded up; None for all.

    Raises:
        ConfigError: an answer alone is longer than the room behind the prefix.
        NotFiniteError: the model answers with no numbers, of which accuracies would be made all the same.

    Returns:
        All metrics by name (with the filter behind a comma where it is not lm-eval's `none`), the number of records
        asked, and lm-eval's record of every sample.

    """
    task.task.set_fewshot_seed(seed=FEW_SHOT_SEED)  # its sampler goes on from where the last row left it
    model.truncated = 0
    with _seeded(), silenced("lm_eval.evaluator"), _undisturbed():
        found: Any = evaluator.evaluate(
            model,
            {"tasks": {task.name: task.task}, "groups": {}, "group_map": {}},
            limit=limit,
            bootstrap_iters=BOOTSTRAP,
            log_samples=True,
            system_instruction=model.chat.system,
            apply_chat_template=model.chat.template is not None,
            fewshot_as_multiturn=model.chat.multiturn,
        )
    assert found is not None
    samples = list(found["samples"][task.name])
    if _has_nan([sample["filtered_resps"] for sample in samples]):
        raise NotFiniteError(
            f"the answers to {task.name} are not numbers: the activations overflow (use model.dtype=bfloat16 or "
            "float32), or the quantizer destroys the model"
        )
    asked = int(found["n-samples"][task.name]["effective"])
    return _metrics(found["results"][task.name]), asked, samples


def longest_context(model: PrefixedModel, task: EvaluationTask, limit: float | None) -> int:
    """Tokens of the longest context that a task will ask to go on from, by the prompts themselves.

    Args:
        limit: as in `run_task`.

    """
    one, chat = task.task, model.chat
    one.set_fewshot_seed(seed=FEW_SHOT_SEED)
    with _seeded(), _undisturbed():
        one.build_all_requests(
            limit=records_asked(limit, len(one.eval_docs)),
            system_instruction=chat.system,
            apply_chat_template=chat.template is not None,
            fewshot_as_multiturn=chat.multiturn,
            chat_template=None if chat.template is None else model.apply_chat_template,
        )
    return max(len(model.tok_encode(request.args[0])) for request in one.instances)


def _has_nan(answers: Any) -> bool:
    """Whether there is a float that is no number anywhere in nested lists and tuples."""
    if isinstance(answers, (list, tuple)):
        return any(map(_has_nan, answers))
    return isinstance(answers, float) and math.isnan(answers)


def _metrics(found: dict[str, Any]) -> dict[str, Metric]:
    """lm-eval's `{"acc,none": .., "acc_stderr,none": ..}` as a dictionary by metric."""
    metrics: dict[str, Metric] = {}
    for key, value in found.items():
        name, comma, filtered = key.partition(",")
        if not comma or name.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        stderr = found.get(f"{name}_stderr,{filtered}")
        metrics[name if filtered == "none" else key] = {
            "value": float(value) if math.isfinite(value) else None,  # a perplexity can overflow
            "stderr": float(stderr) if isinstance(stderr, (int, float)) else None,
        }
    return metrics


@contextmanager
def _seeded() -> Iterator[None]:
    """lm-eval's seeds in the global generators, from which its tasks draw; on leaving, they are as they were."""
    states = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            random.seed(SEEDS[0])
            numpy.random.seed(SEEDS[1])
            torch.manual_seed(SEEDS[2])
            yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Bootstrap in this process, which has threads and must not fork; leave standard output to the run's own lines."""
    key = "DISABLE_MULTIPROC"
    before = os.environ.get(key)
    os.environ[key] = "1"
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        if before is None:
            del os.environ[key]
        else:
            os.environ[key] = before
