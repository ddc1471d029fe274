"""Greedy search for the prompt tokens of a prefix: Algorithm 1 of CushionCache (arXiv 2406.12016, section 4.1).

    p = []
    while len(p) < m:
        t ~ a fresh text of n tokens
        p* = argmin over candidates p' of L_q(t | p, p')
        if L_q(t | p, p*) > tau * L_q(t | p): break
        p.append(p*)

The keys and values of p are computed once per step and shared by all candidates, and lm_head is never run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor

from cushion.config import SearchConfig
from cushion.errors import NotFiniteError
from cushion.models import LanguageModel
from cushion.prefix import Prefix
from cushion.search.objective import Objective

TOKENS_PER_FORWARD = {"cpu": 2048, "cuda": 65536}
"""Tokens of the first batch that is tried, by device type; halved for as long as memory runs out."""


@dataclass(frozen=True)
class SearchStep:
    """One step of the greedy search. `objective_before` is L_q(t | p), `objective_after` L_q(t | p, p*), same t."""

    step: int
    token_id: int
    token: str
    objective_before: float
    objective_after: float
    accepted: bool
    candidates: int
    token_forwards: int
    seconds: float


@dataclass
class SearchState:
    """How far a search is: what a killed search goes on from. Plain data, ready for JSON."""

    token_ids: list[int]
    steps: list[SearchStep] = field(default_factory=list)
    objective_before: float | None = None
    scores: list[float | None] = field(default_factory=list)
    """Objectives of the first `len(scores)` candidates of the step under way; None where one is not finite."""
    seconds: float = 0.0
    """Time spent so far on the step under way."""
    finished: bool = False
    stop_reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The state as plain data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> SearchState:
        """The state that `to_dict` described; a `KeyError` when a field is missing."""
        missing = {f.name for f in fields(cls)} - set(record)
        if missing:
            raise KeyError(*sorted(missing))
        return cls(**{**record, "steps": [SearchStep(**step) for step in record["steps"]]})


@dataclass(frozen=True)
class Scored:
    """Progress within a step: `done` of `total` candidates are scored."""

    step: int
    done: int
    total: int


def greedy_search(
    lm: LanguageModel,
    config: SearchConfig,
    texts: Tensor,
    candidates: list[int],
    state: SearchState,
) -> Iterator[Scored | SearchStep]:
    """Run Algorithm 1 from `state` on, updating `state` as it goes.

    Args:
        config: tau, the maximum length, the objective.
        texts: one fresh text per step, token ids of shape (at least max_length, n).
        candidates: token ids that every step tries; ties go to the one that comes first.
        state: a new one holds the start of the prompt (empty, or BOS or a newline) in `token_ids`; an old one, as saved
            by a run that was killed, is continued. Its `token_ids` are the prompt found.

    Yields:
        `Scored` after every batch, and a `SearchStep` at the end of every step, also of the one that is rejected.

    """
    objective = Objective(config)
    sizer = BatchSizer(lm, config, texts.shape[1] + 1)
    if len(state.token_ids) >= config.max_length:  # the start of the prompt fills it already
        state.finished, state.stop_reason = True, "max_length"
    while not state.finished:
        step = len(state.steps)
        text = texts[step]
        prefix = Prefix.from_tokens(lm.model, state.token_ids)
        started = time.perf_counter() - state.seconds
        if state.objective_before is None:
            before = float(objective(lm, prefix, text[None], skip=0))
            if not math.isfinite(before):
                raise NotFiniteError(
                    f"the search objective of {lm.label} is {before} on text {step}: its activations overflow "
                    f"{lm.model.dtype}; use model.dtype=bfloat16 or float32"
                )
            state.objective_before = before
        while len(state.scores) < len(candidates):
            batch = candidates[len(state.scores) : len(state.scores) + sizer.size]
            rows = torch.cat([torch.tensor(batch)[:, None], text.expand(len(batch), -1)], dim=1)
            try:
                scores = objective(lm, prefix, rows, skip=1)
            except Exception as error:
                if not sizer.can_back_off(error):
                    raise
                scores = None
            if scores is None:  # outside of the handler, where nothing of the failed pass is held any more
                sizer.back_off()
                continue
            state.scores.extend(score if math.isfinite(score) else None for score in scores.tolist())
            state.seconds = time.perf_counter() - started
            yield Scored(step, len(state.scores), len(candidates))
        yield _finish_step(lm, config, candidates, text.numel(), state)


def _finish_step(
    lm: LanguageModel, config: SearchConfig, candidates: list[int], text_length: int, state: SearchState
) -> SearchStep:
    assert state.objective_before is not None
    finite = [(score, index) for index, score in enumerate(state.scores) if score is not None]
    if not finite:
        raise NotFiniteError(
            f"no candidate of search step {len(state.steps)} has a finite objective: the activations of {lm.label} "
            f"overflow {lm.model.dtype}; use model.dtype=bfloat16 or float32"
        )
    after, best = min(finite)
    accepted = after <= config.tau * state.objective_before
    record = SearchStep(
        step=len(state.steps),
        token_id=candidates[best],
        token=lm.decode([candidates[best]]),
        objective_before=state.objective_before,
        objective_after=after,
        accepted=accepted,
        candidates=len(candidates),
        token_forwards=text_length + len(candidates) * (text_length + 1),
        seconds=state.seconds,
    )
    state.steps.append(record)
    state.scores, state.objective_before, state.seconds = [], None, 0.0
    if accepted:
        state.token_ids.append(candidates[best])
    if not accepted:
        state.finished, state.stop_reason = True, "tau"
    elif len(state.token_ids) >= config.max_length:
        state.finished, state.stop_reason = True, "max_length"
    return record


class BatchSizer:
    """How many candidates go through the model at once: found by trying, halved whenever memory runs out."""

    def __init__(self, lm: LanguageModel, config: SearchConfig, row_length: int) -> None:
        budget = TOKENS_PER_FORWARD.get(lm.device.type, TOKENS_PER_FORWARD["cpu"])
        self.size = config.batch_size or max(1, budget // row_length)

    def can_back_off(self, error: Exception) -> bool:
        """Whether memory ran out and a smaller batch is left to try."""
        return self.size > 1 and bool(should_reduce_batch_size(error))

    def back_off(self) -> None:
        """Halve the batch and give memory back."""
        clear_device_cache(garbage_collection=True)
        self.size //= 2
