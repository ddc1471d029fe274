"""Greedy search for the prompt tokens of a prefix: Algorithm 1 of CushionCache (arXiv 2406.12016, section 4.1).

The keys and values of p are computed once per step and shared by all candidates, and lm_head is never run. How the
argmin is found is `search.scoring`: `full` judges every candidate, `pruned` judges by rounds of successive halving and
verifies what is left, `exact` does so too and then sweeps over all others, dropping each at the block at which its
partial objective exceeds the best one (with further texts, the worst of as many as are judged on them).

## Greedy search

Algorithm 1 of the paper (section 4.1):

    p = start                                             (empty by default)
    while len(p) < m:
        t = a fresh text of n tokens
        p* = argmin over candidates c of L_q(t | p, c)    (ties: the smallest token id)
        if L_q(t | p, p*) > tau * L_q(t | p): stop
        p = p, p*

A candidate that yields no number ranks last; if L_q(t | p) is not finite, the run stops. Objectives that differ by
less than a millionth count as equal. A step costs n + C (n + 1) token-forwards for C candidates.

`greedy_exhaustive` lets C be the whole vocabulary, as the paper does. `greedy_sampled` is ours: special tokens, the
most frequent ones of the search text, and a seeded draw of the others; n is 64 in place of 512.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import Tensor

from cushion.config import SearchConfig
from cushion.errors import NotFiniteError
from cushion.models import LanguageModel
from cushion.prefix import Prefix
from cushion.search.batching import BatchSizer
from cushion.search.finalists import TIE, best, finalists, mean_ratio, scores
from cushion.search.greedy_state import Finalist, Scored, SearchState, SearchStep, StepState
from cushion.search.half_precision import in_dtype, rounds_dtype
from cushion.search.objective import Objective
from cushion.search.replicas import Replicas, moved, replica_devices, replicated
from cushion.search.rounds import Stage, find_spikes, plan_stages, reference_positions, rounds_of, rows_of


def greedy_search(
    lm: LanguageModel,
    config: SearchConfig,
    texts: Tensor,
    candidates: list[int],
    state: SearchState,
    further: Tensor | None = None,
) -> Iterator[Scored | SearchStep]:
    """Run Algorithm 1 from `state` on, updating `state` as it goes.

    A search that reaches `search.budget_token_forwards` or `search.budget_seconds`, the proposal included, ends the
    step with the best candidate that it has verified by then, if there is one, and stops with the reason `budget`.

    Args:
        config: tau, the maximum length, the objective, the scoring and its budget.
        texts: one fresh text per step, token ids of shape (at least max_length, n).
        candidates: token ids that every step tries; ties go to the one that comes first.
        state: a new one holds the start of the prompt (empty, or BOS or a newline) in `token_ids`, and what the
            proposal cost; an old one, as saved by a run that was killed, is continued. Its `token_ids` are the prompt
            found.
        further: token ids of shape (texts, n) that the best candidates of every step are judged on too; None for none.

    Yields:
        `Scored` after every batch, and a `SearchStep` at the end of every step, also of the one that is rejected.

    """
    if len(state.token_ids) >= config.max_length:  # the start of the prompt fills it already
        state.finished, state.stop_reason = True, "max_length"
    if state.finished:
        return
    started = time.perf_counter()
    if state.rounds_dtype is None and rounds_of(config):
        state.rounds_dtype = str(rounds_dtype(config, lm)).removeprefix("torch.")
    with ExitStack() as stack:
        replicas, of_rounds = _copies(lm, config, state.rounds_dtype, stack)
        state.under_way.seconds += time.perf_counter() - started
        sizer = BatchSizer(replicas.devices, config.batch_size)
        while not state.finished:
            text = texts[len(state.steps)]
            yield from _Step(lm, config, text, further, candidates, state, replicas, of_rounds, sizer).run()


def _copies(lm: LanguageModel, config: SearchConfig, dtype: str | None, stack: ExitStack) -> tuple[Replicas, Replicas]:
    """What judges candidates, and what ranks them in rounds, within `stack`; the same where the dtype is."""
    objective, devices = Objective(config), replica_devices(config.replicas, lm.device)
    replicas = stack.enter_context(replicated(lm, objective, devices))
    model = lm if dtype is None else in_dtype(lm, getattr(torch, dtype))
    return replicas, replicas if model is lm else stack.enter_context(replicated(model, objective, devices))


class _OutOfBudgetError(Exception):
    """The next batch does not fit the budget; never leaves this module."""


class _Step:
    """One step under way."""

    def __init__(
        self,
        lm: LanguageModel,
        config: SearchConfig,
        text: Tensor,
        further: Tensor | None,
        candidates: list[int],
        state: SearchState,
        replicas: Replicas,
        of_rounds: Replicas,
        sizer: BatchSizer,
    ) -> None:
        self.lm, self.config, self.text, self.candidates = lm, config, text, candidates
        self.state, self.step, self.replicas, self.sizer = state, state.under_way, replicas, sizer
        self.further = [] if further is None else list(further)
        self.objective, self.blocks = Objective(config), len(lm.blocks)
        self.started = time.perf_counter() - self.step.seconds
        self.prefix = Prefix.from_tokens(lm.model, state.token_ids)
        self.judges = replicas, replicas.place(self.prefix)
        self.ranks = of_rounds, of_rounds.place(moved(self.prefix, of_rounds.dtype))

    def run(self) -> Iterator[Scored | SearchStep]:
        """All stages that are left, then the record of the step."""
        step, out_of_budget = self.step, False
        stages: list[Stage] = []
        try:
            self._begin()
            prompt, candidates = len(self.prefix), len(self.candidates)
            stages = plan_stages(self.config, self.blocks, prompt, candidates, self.text, step.spikes, self.further)
            while step.stage < len(stages):
                yield from self._score(stages[step.stage], len(stages))
                self._close(stages[step.stage], stages[step.stage + 1 :])
        except _OutOfBudgetError:
            out_of_budget = True
            if stages and stages[step.stage].judges:  # what is verified of the stage under way counts
                step.verified += self._scored()
        record = self._finish(out_of_budget)
        if record is not None:
            yield record

    def _begin(self) -> None:
        """L_q(t | p), and where the text spikes."""
        step, length = self.step, self.text.numel()
        if step.objective_before is None:
            step.objective_before = self._before(self.text, f"text {len(self.state.steps)}")
        if not step.spikes and any(item.text == "spikes" for item in rounds_of(self.config)):
            references = reference_positions(len(self.candidates))
            cost = len(references) * (length + 1) * self.blocks
            self._afford(cost)
            tokens = [self.candidates[position] for position in references]
            step.spikes, scores = find_spikes(self.objective, self.lm, self.prefix, self.text, tokens)
            step.verified += [
                (position, score)
                for position, score in zip(references, scores.tolist(), strict=True)
                if math.isfinite(score)
            ]
            step.token_blocks += cost
        step.seconds = time.perf_counter() - self.started

    def _before(self, text: Tensor, title: str) -> float:
        """L_q(t | p)."""
        cost = text.numel() * self.blocks
        self._afford(cost)
        before = float(self.objective(self.lm, self.prefix, text[None], skip=0))
        if not math.isfinite(before):
            raise NotFiniteError(
                f"the search objective of {self.lm.label} is {before} on {title}: its activations overflow "
                f"{self.lm.model.dtype}; use model.dtype=bfloat16 or float32"
            )
        self.step.token_blocks += cost
        return before

    def _pool(self) -> list[int]:
        return list(range(len(self.candidates))) if self.step.pool is None else self.step.pool

    def _scored(self) -> list[tuple[int, float]]:
        """The candidates of the stage under way that have a score."""
        scores = zip(self._pool(), self.step.scores, strict=False)
        return [(position, score) for position, score in scores if score is not None]

    def _bound(self) -> float:
        """What no candidate of the sweep may exceed: the highest of the best objectives known, as many as are taken.

        Without further texts one is taken, with them all finalists are. Of the candidates whose objective is among the
        lowest none exceeds it, however many are known yet, so that the outcome does not depend on the batches.
        """
        taken = self.config.verify_candidates if self.further else 1
        lowest = heapq.nsmallest(taken, (score for _, score in self.step.verified + self._scored()))
        return lowest[-1] * (1 + 2 * TIE) if len(lowest) == taken else math.inf

    def _score(self, stage: Stage, stages: int) -> Iterator[Scored]:
        """Score the pool of one stage, batch by batch."""
        step, pool = self.step, self._pool()
        if stage.kind == "round" and (stage.skipped or len(pool) <= stage.keep):
            return  # nothing would be dropped
        number = len(step.further)
        if stage.kind == "further" and len(step.further_before) == number:
            step.further_before.append(self._before(stage.text, f"further text {number}"))
        row_cost = (stage.text.numel() + 1) * stage.depth
        while len(step.scores) < len(pool):
            start, size = len(step.scores), len(self.replicas) * self.sizer.size(stage.text.numel() + 1)
            batch = pool[start : start + min(size, self._afford(row_cost))]
            bound = self._bound() if stage.kind == "sweep" else math.inf
            rows = rows_of([self.candidates[position] for position in batch], stage.text)
            replicas, prefixes = self.ranks if stage.kind == "round" else self.judges
            self.sizer.begin()
            try:
                judged = replicas.judge(prefixes, rows, stage.depth, bound)
            except Exception as error:
                if not self.sizer.can_back_off(error, self.replicas.share(len(batch))):
                    raise
                judged = None
            if judged is None:  # outside of the handler, where nothing of the failed pass is held any more
                self.sizer.back_off(self.replicas.share(len(batch)), rows.shape[1])
                continue
            if len(batch) == size:
                self.sizer.grow(self.replicas.share(len(batch)), rows.shape[1])
            results = zip(judged.scores.tolist(), judged.complete.tolist(), strict=True)
            step.scores.extend(score if complete and math.isfinite(score) else None for score, complete in results)
            step.token_blocks += int(judged.blocks.sum()) * (stage.text.numel() + 1)
            step.seconds = time.perf_counter() - self.started
            yield Scored(len(self.state.steps), len(step.scores), len(pool), step.stage, stages)

    def _close(self, stage: Stage, following: list[Stage]) -> None:
        """Make the pool of the next stage, the first of those that follow."""
        step, pool = self.step, self._pool()
        if stage.kind == "round":
            if step.scores:  # otherwise it was not run
                ranked = sorted((score, position) for position, score in self._scored())
                pool = sorted(position for _, position in ranked[: stage.keep])
        elif stage.judges:
            step.verified += self._scored()
            pool = list(range(len(self.candidates)))  # a sweep is over all
        else:
            step.further.append(step.scores)
        step.scores, step.stage = [], step.stage + 1
        if following and following[0].judges:  # no candidate is judged by the whole objective twice
            verified = {position for position, _ in step.verified}
            pool = [position for position in pool if position not in verified]
        elif following and following[0].kind == "further" and stage.judges:
            pool = step.finalists = finalists(step.verified, self.config.verify_candidates)
        step.pool = pool

    def _afford(self, cost: int) -> int:
        """How many rows of `cost` tokens times blocks the budget has room for.

        Raises:
            _OutOfBudgetError: for none.
        """
        limit = self.config.budget_token_forwards
        seconds = self.config.budget_seconds
        spent = self.state.seconds_done + time.perf_counter() - self.started
        if seconds is not None and spent >= seconds:
            raise _OutOfBudgetError
        if limit is None:
            return len(self.candidates)
        before = round(self.state.token_forwards_done * self.blocks)
        rows = int(limit * self.blocks - before - self.step.token_blocks) // cost
        if rows < 1:
            raise _OutOfBudgetError
        return rows

    def _finish(self, out_of_budget: bool) -> SearchStep | None:
        """The record of the step, if any candidate was verified, and whether the search ends with it."""
        state, step = self.state, self.step
        record = self._record()
        if record is not None:
            state.steps.append(record)
            if record.accepted:
                state.token_ids.append(record.token_id)
        elif out_of_budget:
            state.unrecorded_token_forwards, state.unrecorded_seconds = step.token_blocks / self.blocks, step.seconds
        else:
            raise NotFiniteError(
                f"no candidate of search step {len(state.steps)} has a finite objective: the activations of "
                f"{self.lm.label} overflow {self.lm.model.dtype}; use model.dtype=bfloat16 or float32"
            )
        if out_of_budget:
            state.finished, state.stop_reason = True, "budget"
        elif record is not None and not record.accepted:
            state.finished, state.stop_reason = True, "tau"
        elif len(state.token_ids) >= self.config.max_length:
            state.finished, state.stop_reason = True, "max_length"
        state.under_way = StepState()
        return record

    def _record(self) -> SearchStep | None:
        """What is taken: the best of the finalists where a further text is done, else the best on the search text."""
        state, step, objectives = self.state, self.step, dict(self.step.verified)
        judged = self._judged(objectives)
        scored = [(position, own.score) for position, own in judged.items() if own.score is not None]
        chosen = best(scored if step.further else step.verified)
        if chosen is None:
            return None
        assert step.objective_before is not None, "it comes before any candidate"
        token = self.candidates[chosen[0]]
        record = SearchStep(
            step=len(state.steps),
            token_id=token,
            token=self.lm.decode([token]),
            objective_before=step.objective_before,
            objective_after=objectives[chosen[0]],
            accepted=False,
            candidates=len(self.candidates),
            token_forwards=step.token_blocks / self.blocks,
            seconds=step.seconds,
            verified=len(step.verified),
            replicas=len(self.replicas),
            rounds_dtype=state.rounds_dtype,
            ratio=judged[chosen[0]].ratio if step.further else None,
            further_before=step.further_before[: len(step.further)],
            finalists=list(judged.values()),
        )
        return replace(record, accepted=record.is_accepted(self.config.tau))

    def _judged(self, objectives: dict[int, float]) -> dict[int, Finalist]:
        """The finalists by position, as far as the further texts are done; none where none of these is."""
        step = self.step
        if not step.further:
            return {}
        assert step.objective_before is not None, "it comes before any candidate"
        before = [step.objective_before, *step.further_before[: len(step.further)]]
        found = {}
        rows = [
            [objectives[position], *(text[place] for text in step.further)]
            for place, position in enumerate(step.finalists)
        ]
        for position, row, score in zip(step.finalists, rows, scores(rows), strict=True):
            token = self.candidates[position]
            found[position] = Finalist(token, self.lm.decode([token]), score, mean_ratio(before, row), row)
        return found
