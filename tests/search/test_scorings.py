"""Pruned and exact scoring against the exhaustive one: the same token, the cost they say, budgets, interruptions."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import FEW, UNLIKE
from helpers import random_texts
from searching import assert_it_goes_on_after_any_event, comparable
from torch import Tensor

from cushion.activations import observe_outputs
from cushion.config import SearchConfig, SearchRound
from cushion.errors import ConfigError
from cushion.models import LanguageModel
from cushion.prefix import Prefix
from cushion.search import greedy as greedy_module
from cushion.search.greedy import greedy_search
from cushion.search.greedy_state import Scored, SearchState
from cushion.search.objective import Objective
from cushion.search.rounds import find_spikes, plan_stages, reference_positions, rows_of, spike_text

Tiny = Callable[..., LanguageModel]
VOCABULARY = list(range(260))
ROUNDS = [SearchRound(0.34, 4, 60, "spikes"), SearchRound(0.67, 8, 12, "start")]


def search(
    lm: LanguageModel, texts: Tensor, scoring: str, candidates: list[int] = VOCABULARY, **options: Any
) -> SearchState:
    options = {"tau": 1.0, "max_length": 2, "rounds": ROUNDS, "scoring": scoring, **options}
    state = SearchState([])
    for _ in greedy_search(lm, SearchConfig(**options), texts, candidates, state):
        pass
    return state


# ---- exact ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", UNLIKE)
def test_exact_finds_what_exhaustive_finds(tiny: Tiny, family: str) -> None:
    lm = tiny(family)
    for seed, objective in enumerate(("quantization_error", "maximum_activation")):
        texts = random_texts(3, 10, seed=seed)
        full = search(lm, texts, "full", objective=objective)
        exact = search(lm, texts, "exact", objective=objective, batch_size=50)
        assert exact.token_ids == full.token_ids
        assert [step.token_id for step in exact.steps] == [step.token_id for step in full.steps]
        for mine, theirs in zip(exact.steps, full.steps, strict=True):
            assert mine.objective_after == pytest.approx(theirs.objective_after, rel=1e-6)
            assert mine.accepted == theirs.accepted


def plant_sink(lm: LanguageModel, sink: int) -> None:
    """A token that every query of block 0 looks at and whose values are zero: it calms all tokens that follow it."""
    attention = lm.blocks[0].self_attn
    with torch.no_grad():
        attention.o_proj.weight.mul_(8)
        lm.embeddings[:, 0] = 0
        lm.embeddings[:, 1] = 2.0
        lm.embeddings[sink] = 0
        lm.embeddings[sink, 0] = 5.0
        attention.v_proj.weight[:, 0] = 0
        attention.k_proj.weight[:, 0] = 0
        attention.k_proj.weight[3::4, 0] = 20.0
        attention.q_proj.weight[3::4, 1] = 20.0


def test_exact_drops_candidates_on_the_way(tiny: Tiny) -> None:
    lm, texts = tiny(), random_texts(3, 24)
    plant_sink(lm, 77)
    full, exact = (search(lm, texts, scoring, max_length=1) for scoring in ("full", "exact"))
    assert exact.token_ids == full.token_ids == [77]
    step = exact.steps[0]
    sweep = step.token_forwards - 24 - 4 * 25 - 260 * 5 / 3 - 60 * 9 * 2 / 3 - 12 * 25
    assert 0 < sweep < 0.8 * (260 - 16) * 25
    assert step.verified < 260


@pytest.mark.parametrize("scoring", ["full", "exact"])
@pytest.mark.parametrize("batch_size", [None, 7])
def test_ties_go_to_the_candidate_that_comes_first(tiny: Tiny, scoring: str, batch_size: int | None) -> None:
    lm, texts = tiny(), random_texts(3, 10) % 64
    pool = list(range(64, 256))
    winner = search(lm, texts, "full", pool, max_length=1).token_ids[0]
    for twin in (66, 250):
        with torch.no_grad():
            lm.embeddings[twin] = lm.embeddings[winner]
        for candidates in (pool, pool[::-1]):
            state = search(lm, texts, scoring, candidates, max_length=1, batch_size=batch_size)
            assert state.token_ids == [min(winner, twin, key=candidates.index)]
        lm = tiny()


# ---- pruned ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FEW)
def test_pruned_that_keeps_everything_is_exhaustive(tiny: Tiny, family: str) -> None:
    lm, texts = tiny(family), random_texts(3, 10, seed=2)
    rounds = [SearchRound(0.4, 4, 260, "spikes"), SearchRound(0.4, 4, 500, "start")]
    full, pruned = search(lm, texts, "full"), search(lm, texts, "pruned", rounds=rounds)
    assert pruned.token_ids == full.token_ids
    for mine, theirs in zip(pruned.steps, full.steps, strict=True):
        assert mine.objective_after == pytest.approx(theirs.objective_after, rel=1e-6)
        assert (mine.verified, theirs.verified) == (260, 260)
        assert mine.token_forwards == pytest.approx(theirs.token_forwards)  # rounds that drop nothing are not run


def test_a_round_ranks_by_the_first_terms_of_the_objective(tiny: Tiny) -> None:
    """Which candidates are verified, computed once more with the sum over the first blocks of single forward passes."""
    lm, texts = tiny(), random_texts(3, 10)
    text, proxy = texts[0], []
    terms: list[Tensor] = []
    for candidate in VOCABULARY:
        with torch.no_grad(), observe_outputs({"1": lm.blocks[1], "0": lm.blocks[0]}, lambda _, x: terms.append(x)):
            lm.body(rows_of([candidate], text[:5]), use_cache=False)
        total = 0.0
        for x in (term[0, 1:].double() for term in terms):
            scale = (x.max() - x.min()) / 255
            total += (x - (scale * ((x - x.min()) / scale).round() + x.min())).square().sum().item()
        proxy.append((total, candidate))
        terms.clear()
    kept = sorted(candidate for _, candidate in sorted(proxy)[:9])
    state = SearchState([])
    config = SearchConfig(tau=1.0, max_length=1, scoring="pruned", rounds=[SearchRound(0.67, 5, 9, "start")])
    events = greedy_search(lm, config, texts, VOCABULARY, state)
    next(event for event in events if isinstance(event, Scored) and event.stage == 1)
    assert state.under_way.pool == kept
    best = min(VOCABULARY, key=lambda c: (Objective(config)(lm, Prefix.empty(), rows_of([c], text), 1).item(), c))
    if best in kept:
        list(events)
        assert state.token_ids == [best]


@pytest.mark.parametrize("family", UNLIKE)
def test_a_truncated_objective_is_the_sum_of_the_first_terms(tiny: Tiny, family: str) -> None:
    lm, rows = tiny(family), rows_of([5, 99, 256], random_texts(3, 10)[0])
    objective, terms = Objective(SearchConfig()), []
    for blocks in (1, 2, 3):
        terms.append(objective.judge(lm, Prefix.empty(), rows, 1, depth=blocks).scores)
    assert (torch.diff(torch.stack(terms), dim=0) > 0).all()
    whole = objective(lm, Prefix.empty(), rows, 1)
    torch.testing.assert_close(terms[2], whole)
    seen: list[Tensor] = []

    def keep(_block: int, following: Tensor) -> None:
        x = following.double().flatten(1)
        low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
        scale = (high - low) / 255
        seen.append((x - (scale * ((x - low) / scale).round() + low)).square().sum(1))

    objective.judge(lm, Prefix.empty(), rows, 1, observe=keep)
    torch.testing.assert_close(torch.stack(terms), torch.stack(seen).cumsum(0), rtol=1e-3, atol=0.0)


def test_a_bound_drops_rows_that_end_above_it_and_no_others(tiny: Tiny) -> None:
    lm, rows = tiny(), rows_of(VOCABULARY[:40], random_texts(3, 10)[0])
    objective = Objective(SearchConfig())
    whole = objective(lm, Prefix.empty(), rows, 1)
    parts = torch.stack([objective.judge(lm, Prefix.empty(), rows, 1, depth=d).scores for d in (1, 2, 3)])
    bound = whole.median().item()
    judged = objective.judge(lm, Prefix.empty(), rows, 1, bound=bound)
    assert torch.equal(judged.complete, whole <= bound)
    torch.testing.assert_close(judged.scores[judged.complete], whole[judged.complete], rtol=1e-6, atol=0.0)
    expected = 1 + (parts[:2] <= bound).long().cumprod(0).sum(0)
    assert torch.equal(judged.blocks, expected)


def test_planted_sink_is_found_by_pruned_search(tiny: Tiny) -> None:
    lm, texts = tiny(), random_texts(3, 24)
    plant_sink(lm, 77)
    rounds = [SearchRound(0.34, 5, 26, "spikes"), SearchRound(0.67, 16, 4, "start")]
    pruned = search(lm, texts, "pruned", max_length=1, rounds=rounds)
    assert pruned.token_ids == [77]
    assert pruned.steps[0].token_forwards < 0.2 * 260 * 25


# ---- cost -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scoring", ["full", "pruned", "exact"])
def test_token_forwards_are_the_tokens_that_went_through_the_blocks(tiny: Tiny, scoring: str) -> None:
    lm, texts = tiny(), random_texts(3, 10)
    seen: Counter[int] = Counter()
    for index, block in enumerate(lm.blocks):
        block.register_forward_hook(lambda _m, _a, output, i=index: seen.update({i: output[..., 0].numel()}))
    state = search(lm, texts, scoring, batch_size=16)
    prefixes = 3 * sum(range(len(state.steps)))  # the prefix so far, once per step and block
    assert sum(step.token_forwards for step in state.steps) == pytest.approx((seen.total() - prefixes) / 3)


def test_token_forwards_of_a_pruned_step_by_hand(tiny: Tiny) -> None:
    state = search(tiny(), random_texts(3, 10), "pruned", max_length=1)
    # 60 of 260 after 1 of 3 blocks with 4 tokens, 12 after 2 blocks with 8 tokens, then all 10 tokens and 3 blocks;
    # up to four of the twelve are references, which are verified already
    step = state.steps[0]
    spiking = (step.token_forwards - 10 - 4 * 11 - 60 * 9 * 2 / 3 - (step.verified - 4) * 11) * 3 / 260
    assert spiking in (4, 5)  # the candidate, and three or four tokens: not all spikes stand side by side
    assert 8 + 4 <= step.verified <= 12 + 4


class Clock:
    """Time that passes by one second with every pass of the model, and not otherwise."""

    seconds = 0.0

    def perf_counter(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock, judge = Clock(), Objective.judge

    def judge_for_a_second(*args: Any, **kwargs: Any) -> Any:
        clock.seconds += 1
        return judge(*args, **kwargs)

    monkeypatch.setattr(Objective, "judge", judge_for_a_second)
    monkeypatch.setattr(greedy_module, "time", clock)
    return clock


# ---- budgets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scoring", ["full", "pruned", "exact"])
def test_a_budget_of_token_forwards_is_kept_to_the_row(tiny: Tiny, scoring: str) -> None:
    lm, texts = tiny(), random_texts(3, 10)
    whole = search(lm, texts, scoring, max_length=1)
    need = whole.steps[0].token_forwards
    enough = search(lm, texts, scoring, max_length=1, budget_token_forwards=need)
    assert comparable(enough) == comparable(whole)
    results = []
    for batch_size in (None, 9):
        state = search(lm, texts, scoring, max_length=1, budget_token_forwards=need - 12, batch_size=batch_size)
        assert (state.finished, state.stop_reason) == (True, "budget")
        spent = sum(step.token_forwards for step in state.steps)
        assert need - 12 - 11 < spent <= need - 12
        assert scoring == "exact" or state.steps[0].verified < whole.steps[0].verified
        results.append(state.token_ids)
    assert results[0] == results[1]


def test_a_search_out_of_budget_has_the_best_it_verified(tiny: Tiny) -> None:
    lm, texts = tiny(), random_texts(3, 10)
    budget = 10 + 100 * 11
    state = search(lm, texts, "full", budget_token_forwards=budget + 5)
    first = search(lm, texts, "full", VOCABULARY[:100], max_length=1)
    assert (state.token_ids, state.stop_reason) == (first.token_ids, "budget")
    assert state.steps[0].verified == 100
    assert state.steps[0].objective_after == pytest.approx(first.steps[0].objective_after, rel=1e-6)


def test_a_pruned_search_out_of_budget_in_a_round_has_its_best_reference(tiny: Tiny) -> None:
    lm, texts = tiny(), random_texts(3, 10)
    references = [VOCABULARY[position] for position in reference_positions(260)]
    state = search(lm, texts, "pruned", budget_token_forwards=10 + 4 * 11 + 50)
    expected = search(lm, texts, "full", references, max_length=1)
    assert (state.steps[0].token_id, state.stop_reason) == (expected.steps[0].token_id, "budget")
    assert state.steps[0].verified == 4
    nothing = search(lm, texts, "pruned", budget_token_forwards=5)
    assert (nothing.token_ids, nothing.steps, nothing.stop_reason) == ([], [], "budget")
    assert nothing.token_forwards_done == 0
    in_a_round = search(lm, texts, "pruned", rounds=[SearchRound(0.34, 4, 60, "start")], budget_token_forwards=100)
    assert (in_a_round.steps, in_a_round.stop_reason) == ([], "budget")
    assert 95 < in_a_round.token_forwards_done <= 100  # nothing was verified, but it was run
    assert in_a_round.seconds_done > 0


def test_steps_that_were_accepted_before_the_budget_ended_stay(tiny: Tiny) -> None:
    lm, texts = tiny(), random_texts(3, 10)
    one = search(lm, texts, "full", max_length=1)
    state = search(lm, texts, "full", budget_token_forwards=one.steps[0].token_forwards + 12)
    assert state.token_ids == one.token_ids
    assert (len(state.steps), state.stop_reason) == (1, "budget")


def test_a_budget_of_seconds_ends_the_search(tiny: Tiny) -> None:
    state = search(tiny(), random_texts(3, 10), "full", budget_seconds=1e-9)
    assert (state.token_ids, state.stop_reason) == ([], "budget")
    generous = search(tiny(), random_texts(3, 10), "full", budget_seconds=1e9)
    assert generous.stop_reason != "budget"


def test_a_budget_of_seconds_ends_with_the_best_verified_by_then(tiny: Tiny, clock: Clock) -> None:
    lm, texts = tiny(), random_texts(3, 10)
    state = search(lm, texts, "full", batch_size=20, budget_seconds=5)  # one for L_q(t | p), four for batches
    first = search(lm, texts, "full", VOCABULARY[:80], max_length=1)
    assert (state.token_ids, state.stop_reason) == (first.token_ids, "budget")
    assert (state.steps[0].verified, state.steps[0].seconds) == (80, 5)


@pytest.mark.parametrize(("tokens", "seconds", "verified"), [(10 + 45 * 11, 5, 45), (10 + 45 * 11, 3, 40)])
def test_of_two_budgets_the_first_that_is_spent_ends_the_search(
    tiny: Tiny, clock: Clock, tokens: int, seconds: int, verified: int
) -> None:
    options = {"batch_size": 20, "budget_token_forwards": tokens, "budget_seconds": seconds}
    state = search(tiny(), random_texts(3, 10), "full", **options)
    assert (state.steps[0].verified, state.stop_reason) == (verified, "budget")


@pytest.mark.parametrize("scoring", ["full", "pruned", "exact"])
@pytest.mark.parametrize("budget", [{"budget_token_forwards": 1200}, {"budget_seconds": 8}])
def test_what_was_spent_before_a_kill_counts(tiny: Tiny, clock: Clock, scoring: str, budget: dict[str, int]) -> None:
    lm, texts, pool = tiny(), random_texts(3, 10), VOCABULARY[::3]
    config = SearchConfig(tau=1.0, max_length=3, batch_size=20, scoring=scoring, rounds=ROUNDS, **budget)
    whole = SearchState([])
    events = list(greedy_search(lm, config, texts, pool, whole))
    assert whole.stop_reason == "budget"
    assert whole.token_forwards_done <= 1200 or "budget_seconds" in budget
    for stop in range(len(events)):
        killed = SearchState([])
        for _ in itertools.islice(greedy_search(lm, config, texts, pool, killed), stop):
            pass
        resumed = SearchState.from_dict(json.loads(json.dumps(killed.to_dict())))
        clock.seconds += 1e6  # while nothing ran
        list(greedy_search(lm, config, texts, pool, resumed))
        assert comparable(resumed) == comparable(whole)
        assert resumed.seconds_done == whole.seconds_done


def test_what_the_proposal_cost_counts(tiny: Tiny, clock: Clock) -> None:
    lm, texts = tiny(), random_texts(3, 10)
    for spent, budget in (
        ({"proposal_token_forwards": 700}, {"budget_token_forwards": 700 + 10 + 40 * 11}),
        ({"proposal_seconds": 100.0}, {"budget_seconds": 103}),
    ):
        state = SearchState([], **spent)
        config = SearchConfig(tau=1.0, max_length=1, batch_size=20, **budget)
        list(greedy_search(lm, config, texts, VOCABULARY, state))
        assert (state.steps[0].verified, state.stop_reason) == (40, "budget")


# ---- interruptions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scoring", ["pruned", "exact"])
def test_a_search_goes_on_after_any_event(tiny: Tiny, scoring: str) -> None:
    lm, texts = tiny(), random_texts(3, 10)
    config = SearchConfig(tau=1.0, max_length=2, batch_size=40, scoring=scoring, rounds=ROUNDS)
    events = assert_it_goes_on_after_any_event(lm, config, texts, VOCABULARY[::3])
    assert {event.stage for event in events if isinstance(event, Scored)} == set(range(4 if scoring == "exact" else 3))


@pytest.mark.parametrize("scoring", ["pruned", "exact"])
def test_a_search_with_a_round_that_a_later_step_skips_goes_on_too(tiny: Tiny, scoring: str) -> None:
    rounds = [SearchRound(0.34, 1, 0.8, "first"), *ROUNDS]
    config = SearchConfig(tau=1.0, max_length=2, batch_size=40, scoring=scoring, rounds=rounds)
    events = assert_it_goes_on_after_any_event(tiny(), config, random_texts(3, 10), VOCABULARY[::3])
    stages = [{event.stage for event in events if isinstance(event, Scored) and event.step == step} for step in (0, 1)]
    every = set(range(5 if scoring == "exact" else 4))
    assert stages == [every, every - {0}]


def test_behind_a_start_of_the_prompt_the_first_token_judges_nobody(tiny: Tiny) -> None:
    lm, texts = tiny(), random_texts(3, 10)
    with_it = [SearchRound(0.34, 1, 0.1, "first"), *ROUNDS]
    found = []
    for rounds in (ROUNDS, with_it):
        state = SearchState([5])
        list(
            greedy_search(
                lm, SearchConfig(tau=1.0, max_length=2, scoring="pruned", rounds=rounds), texts, VOCABULARY, state
            )
        )
        found.append((state.token_ids, state.steps[0].token_forwards))
    assert found[0] == found[1]


# ---- spikes ---------------------------------------------------------------------------------------------------------


def test_spikes_are_found_where_they_were_planted(tiny: Tiny) -> None:
    lm, text = tiny(), random_texts(3, 20)[0] % 100
    text[[6, 13]] = torch.tensor([200, 201])
    with torch.no_grad():
        lm.embeddings[200] *= 100
        lm.embeddings[201] *= 30
    order, scores = find_spikes(Objective(SearchConfig()), lm, Prefix.empty(), text, [5, 9])
    assert order[:2] == [6, 13]
    assert sorted(order) == list(range(20))
    torch.testing.assert_close(scores, Objective(SearchConfig())(lm, Prefix.empty(), rows_of([5, 9], text), 1))
    assert spike_text(text, order, 5).tolist() == text[[0, 5, 6, 12, 13]].tolist()
    assert spike_text(text, order, 3).tolist() == text[[0, 5, 6]].tolist()


def test_spike_text_keeps_the_order_and_the_length() -> None:
    text = torch.arange(100, 120)
    assert spike_text(text, [9, 1, 0], 4).tolist() == [100, 101, 108, 109]
    assert spike_text(text, [9, 4, 1, 2], 4).tolist() == [100, 101, 108, 109]  # 4 does not fit, 1 does
    assert spike_text(text, [1, 2, 0], 2).tolist() == [100, 101]
    assert spike_text(text, list(range(20)), 64).tolist() == text.tolist()


def test_stages_scale_with_the_model(tiny: Tiny) -> None:
    config = SearchConfig(scoring="exact", rounds=[SearchRound(0.1, 4, 9, "start"), SearchRound(1.0, 99, 3, "start")])
    stages = plan_stages(config, 30, 0, 60, torch.arange(16), [])
    assert [(stage.kind, stage.depth, len(stage.text), stage.keep) for stage in stages] == [
        ("round", 3, 4, 9), ("round", 30, 16, 3), ("verify", 30, 16, 0), ("sweep", 30, 16, 0),
    ]  # fmt: skip
    assert plan_stages(config, 3, 0, 60, torch.arange(16), [])[0].depth == 1


def test_the_first_token_judges_from_an_empty_prompt_alone(tiny: Tiny) -> None:
    lm, texts = tiny(), random_texts(3, 10)
    rounds = [SearchRound(0.67, 1, 40 / 260, "first"), SearchRound(1.0, 5, 9, "start")]
    state = search(lm, texts, "pruned", rounds=rounds)
    rows = torch.tensor([[token, int(texts[0, 0])] for token in VOCABULARY])
    scores = Objective(SearchConfig()).judge(lm, Prefix.empty(), rows, 1, depth=2).scores
    kept = torch.argsort(scores)[:40].tolist()
    longer = torch.cat([torch.tensor(kept)[:, None], texts[:1, :5].expand(40, -1)], dim=1)
    finalists = torch.argsort(Objective(SearchConfig())(lm, Prefix.empty(), longer, 1))[:9].tolist()
    whole = Objective(SearchConfig())(lm, Prefix.empty(), rows_of([kept[i] for i in finalists], texts[0]), 1)
    assert state.token_ids[0] == kept[finalists[int(whole.argmin())]]
    one, two = state.steps
    assert one.token_forwards == pytest.approx(10 + 260 * 2 * 2 / 3 + 40 * 6 + 9 * 11)
    assert two.token_forwards == pytest.approx(10 + 260 * 6 + 9 * 11)  # behind a prompt that round is not run


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scoring": "prunde"}, "mean 'pruned'"),
        ({"scoring": "exact", "rounds": []}, "search.rounds=.*at least one"),
        ({"budget_token_forwards": 0}, "search.budget_token_forwards=0"),
        ({"budget_seconds": -1.0}, "search.budget_seconds=-1.0"),
        ({"proposal": "user"}, "search.user_tokens=null.*needs a list"),
        ({"proposal": "user", "user_tokens": [3, -1]}, "not negative"),
        ({"rounds": [{"depth": 1.5}]}, "search.rounds.depth=1.5"),
        ({"rounds": [{"tokens": 1}]}, "search.rounds.tokens=1"),
        ({"rounds": [{"text": "first", "tokens": 8}]}, "search.rounds.tokens=8.*text=first"),
        ({"rounds": [{"keep": 0}]}, "search.rounds.keep=0"),
        ({"rounds": [{"keep": 2.5}]}, "search.rounds.keep=2.5.*a share of them below 1"),
        (
            {"scoring": "pruned", "rounds": [{"text": "first", "tokens": 1}]},
            "search.rounds=.*of another text behind it",
        ),
        ({"rounds": [{"text": "spike"}]}, "mean 'spikes'"),
    ],
)
def test_values_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SearchConfig(**options)
