"""Greedy search against a brute-force loop without caches or batches; its stop rule, interruptions and batch size."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
import torch
from conftest import UNLIKE
from helpers import random_texts
from searching import assert_it_goes_on_after_any_event, comparable
from torch import Tensor

from cushion.config import SearchConfig
from cushion.models import LanguageModel
from cushion.search.greedy import greedy_search
from cushion.search.greedy_state import Scored, SearchState, SearchStep, StepState
from cushion.search.objective import Judged, Objective

Tiny = Callable[..., LanguageModel]
CANDIDATES = list(range(3, 260, 11))
STARTS = {"empty": [], "bos": [256], "newline": [10]}


def some_texts(count: int = 4, length: int = 10, seed: int = 0) -> Tensor:
    return random_texts(count, length, seed)


def search(
    lm: LanguageModel, texts: Tensor, candidates: list[int] = CANDIDATES, start: tuple[int, ...] = (), **options: Any
) -> SearchState:
    options = {"tau": 1.0, "max_length": 3, **options}
    state = SearchState(list(start))
    for _ in greedy_search(lm, SearchConfig(**options), texts, candidates, state):
        pass
    return state


# ---- Algorithm 1, once more -----------------------------------------------------------------------------------------


@torch.no_grad()
def judge_plainly(lm: LanguageModel, prompt: list[int], text: list[int], objective: str) -> float:
    """L_q (8 bits, asymmetric) or the maximum activation over the positions of the text, from one forward pass."""
    outputs: list[Tensor] = []

    def keep(_module: object, _args: object, output: Tensor | tuple[Tensor, ...]) -> None:
        outputs.append((output[0] if isinstance(output, tuple) else output)[0, -len(text) :].double())

    handles = [block.register_forward_hook(keep) for block in lm.blocks]
    lm.model(input_ids=torch.tensor([[*prompt, *text]]), use_cache=False)
    for handle in handles:
        handle.remove()
    if objective == "maximum_activation":
        return max(x.abs().max().item() for x in outputs)
    total = 0.0
    for x in outputs:
        scale = (x.max() - x.min()) / 255
        total += (x - (scale * ((x - x.min()) / scale).round() + x.min())).square().sum().item()
    return total


def brute_force(
    lm: LanguageModel, start: list[int], texts: Tensor, candidates: list[int], objective: str, tau: float, longest: int
) -> tuple[list[int], list[tuple[int, float, float]]]:
    """The tokens found, and of every step its best candidate and the objective before and after."""
    prompt, steps = list(start), []
    while len(prompt) < longest:
        text = texts[len(steps)].tolist()
        before = judge_plainly(lm, prompt, text, objective)
        after, best = min((judge_plainly(lm, [*prompt, c], text, objective), c) for c in candidates)
        steps.append((best, before, after))
        if after > tau * before:
            break
        prompt.append(best)
    return prompt, steps


def assert_same_search(state: SearchState, expected: tuple[list[int], list[tuple[int, float, float]]]) -> None:
    tokens, steps = expected
    assert state.token_ids == tokens
    assert [step.token_id for step in state.steps] == [best for best, _, _ in steps]
    for step, (_, before, after) in zip(state.steps, steps, strict=True):
        assert step.objective_before == pytest.approx(before, rel=1e-3)
        assert step.objective_after == pytest.approx(after, rel=1e-3)


@pytest.mark.parametrize("objective", ["quantization_error", "maximum_activation"])
@pytest.mark.parametrize("start", STARTS)
def test_search_equals_brute_force(tiny: Tiny, start: str, objective: str) -> None:
    lm, texts = tiny(), some_texts()
    expected = brute_force(lm, STARTS[start], texts, CANDIDATES, objective, 1.0, 3)
    assert len(expected[1]) >= 2  # a search of more than one step
    for batch_size in (None, 1, 7):
        state = search(lm, texts, start=tuple(STARTS[start]), objective=objective, batch_size=batch_size)
        assert_same_search(state, expected)


@pytest.mark.parametrize("family", UNLIKE)
def test_search_equals_brute_force_in_families_unlike_each_other(tiny: Tiny, family: str) -> None:
    lm, texts, candidates = tiny(family), some_texts(seed=1), CANDIDATES[::3]
    for tau in (0.6, 1.0):
        expected = brute_force(lm, [], texts, candidates, "quantization_error", tau, 3)
        assert_same_search(search(lm, texts, candidates, tau=tau, batch_size=5), expected)


def test_planted_sink_is_found_in_the_whole_vocabulary(tiny: Tiny) -> None:
    """A token that every query of block 0 looks at and whose values are zero calms all tokens that follow it."""
    lm, texts, sink = tiny(), some_texts(length=24), 77
    attention = lm.blocks[0].self_attn
    with torch.no_grad():
        attention.o_proj.weight.mul_(8)  # what attention writes is most of the range
        lm.embeddings[:, 0] = 0  # feature 0 belongs to the sink alone, feature 1 to all others
        lm.embeddings[:, 1] = 2.0
        lm.embeddings[sink] = 0
        lm.embeddings[sink, 0] = 5.0
        attention.v_proj.weight[:, 0] = 0
        attention.k_proj.weight[:, 0] = 0
        attention.k_proj.weight[3::4, 0] = 20.0  # the slowest rotary features, which hardly turn
        attention.q_proj.weight[3::4, 1] = 20.0
    state = search(lm, texts, list(range(260)), max_length=1)
    assert state.token_ids == [sink]
    assert_same_search(state, brute_force(lm, [], texts, [*CANDIDATES, sink], "quantization_error", 1.0, 1))


# ---- records and the stop rule --------------------------------------------------------------------------------------


def test_stop_rule_holds_at_exactly_tau(tiny: Tiny) -> None:
    lm = tiny()
    for seed in range(20):  # until a ratio turns up that times `before` gives `after` again, to the last bit
        texts = some_texts(1, seed=seed)
        step = search(lm, texts, max_length=1).steps[0]
        before, after = step.objective_before, step.objective_after
        near = after / before
        exact = [t for t in (math.nextafter(near, 0), near, math.nextafter(near, 1)) if t * before == after]
        if after < before and exact:
            break
    assert exact[0] * before == after
    state = search(lm, texts, max_length=1, tau=exact[0])
    assert (state.token_ids, state.steps[0].accepted, state.stop_reason) == ([step.token_id], True, "max_length")
    below = exact[0]
    while below * before >= after:
        below = math.nextafter(below, 0)
    assert exact[0] - below < 1e-15
    state = search(lm, texts, max_length=1, tau=below)
    assert (state.token_ids, state.steps[0].accepted, state.stop_reason) == ([], False, "tau")
    assert state.steps[0].token_id == step.token_id  # the rejected step is on record


def test_every_step_is_recorded_with_its_own_text_and_cost(tiny: Tiny) -> None:
    lm, texts = tiny(), some_texts()
    seen: list[int] = []
    lm.blocks[0].register_forward_hook(lambda _m, _a, output: seen.append(output[..., 0].numel()))
    state = search(lm, texts, max_length=3)
    computed_prefixes = 0 + 1 + 2  # tokens of the prefix so far, once per step
    assert sum(step.token_forwards for step in state.steps) == sum(seen) - computed_prefixes
    assert [step.step for step in state.steps] == [0, 1, 2]
    assert {step.candidates for step in state.steps} == {len(CANDIDATES)}
    assert all(step.seconds > 0 and step.token == lm.decode([step.token_id]) for step in state.steps)
    swapped = search(lm, texts[[1, 0, 2, 3]], max_length=1)
    assert swapped.steps[0].objective_before != state.steps[0].objective_before


@pytest.mark.parametrize("start", [(256,), (256, 10)])
def test_start_of_the_full_length_is_left_alone(tiny: Tiny, start: tuple[int, ...]) -> None:
    """`while len(p) < m` does nothing when p is as long as allowed from the beginning."""
    state = search(tiny(), some_texts(), start=start, max_length=1)
    assert (state.token_ids, state.steps) == (list(start), [])


def test_candidate_without_a_number_for_a_score_is_never_chosen(tiny: Tiny) -> None:
    lm, texts = tiny(), some_texts() % 64
    expected = search(lm, texts, [100, 101, 102])
    lm.embeddings[103] = float("nan")
    state = search(lm, texts, [103, 100, 101, 102])
    assert state.token_ids == expected.token_ids
    assert all(math.isfinite(step.objective_after) for step in state.steps)


def test_ties_go_to_the_candidate_that_comes_first(tiny: Tiny) -> None:
    lm, texts = tiny(), some_texts() % 64
    winner = search(lm, texts, max_length=1).token_ids[0]
    twin = next(c for c in range(100, 260) if c not in CANDIDATES)
    lm.embeddings[twin] = lm.embeddings[winner]
    for pair in ([winner, twin], [twin, winner]):
        assert search(lm, texts, pair, max_length=1, batch_size=1).token_ids == pair[:1]


# ---- interruptions --------------------------------------------------------------------------------------------------


def test_search_goes_on_after_any_event(tiny: Tiny) -> None:
    lm, texts = tiny(), some_texts()
    config = SearchConfig(tau=1.0, max_length=2, batch_size=10)
    events = assert_it_goes_on_after_any_event(lm, config, texts, CANDIDATES)
    assert sum(isinstance(event, SearchStep) for event in events) == 2
    assert len(events) == 8  # batches of 10, 10 and 4, then the step, twice


def test_progress_counts_candidates(tiny: Tiny) -> None:
    config = SearchConfig(tau=1.0, max_length=1, batch_size=10)
    events = list(greedy_search(tiny(), config, some_texts(), CANDIDATES, SearchState([])))
    assert [asdict(e) for e in events if isinstance(e, Scored)] == [
        {"step": 0, "done": done, "total": 24, "stage": 0, "stages": 1} for done in (10, 20, 24)
    ]


# ---- memory ---------------------------------------------------------------------------------------------------------

OUT_OF_MEMORY = [
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:119] err == 0. DefaultCPUAllocator: can't allocate memory"),
]


def fail_above(monkeypatch: pytest.MonkeyPatch, limit: int, error: BaseException) -> list[int]:
    """Let the objective fail for batches of more than `limit` rows; the sizes of the batches that passed."""
    judge, passed = Objective.judge, []

    def limited(self: Objective, lm: LanguageModel, prefix: Any, rows: Tensor, skip: int, *others: Any) -> Judged:
        if len(rows) > limit:
            raise error
        if skip:
            passed.append(len(rows))
        return judge(self, lm, prefix, rows, skip, *others)

    monkeypatch.setattr(Objective, "judge", limited)
    return passed


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["gpu", "cpu"])
def test_batch_backs_off_when_memory_runs_out(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    lm, texts = tiny(), some_texts()
    expected = search(lm, texts, batch_size=4, max_length=2)
    passed = fail_above(monkeypatch, 5, error)
    state = search(lm, texts, batch_size=16, max_length=2)
    assert comparable(state) == comparable(expected)
    assert passed == [4] * 12  # halved twice, and it stays there


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["gpu", "cpu"])
def test_memory_error_at_one_candidate_is_raised(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    fail_above(monkeypatch, 0, error)
    lm, texts = tiny(), some_texts()
    state = SearchState([], under_way=StepState(objective_before=1.0))
    with pytest.raises(type(error), match="memory"):
        list(greedy_search(lm, SearchConfig(batch_size=8), texts, CANDIDATES, state))
    assert state.under_way.scores == []


@pytest.mark.parametrize("error", [RuntimeError("shapes do not match"), ValueError("memory"), KeyboardInterrupt()])
def test_other_errors_are_not_swallowed(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    fail_above(monkeypatch, 1, error)
    with pytest.raises(type(error)) as caught:
        search(tiny(), some_texts(), batch_size=8)
    assert caught.value is error
