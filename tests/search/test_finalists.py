"""Finalists of a search are judged on further texts: by brute force, against a planted fooler, within budgets."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import random_texts
from searching import assert_it_goes_on_after_any_event, comparable
from tiny_run import searching_config
from torch import Tensor

from cushion.config import SearchConfig, SearchRound
from cushion.models import LanguageModel
from cushion.prefix import Prefix
from cushion.preparation import prepare
from cushion.search.finalists import best, finalists, mean_ratio, scores
from cushion.search.greedy import greedy_search
from cushion.search.greedy_prefix import split_texts
from cushion.search.greedy_state import SearchState, SearchStep
from cushion.search.greedy_steps import GreedyStep
from cushion.search.methods import METHODS
from cushion.search.objective import Objective
from cushion.search.rounds import rows_of

Tiny = Callable[..., LanguageModel]
CANDIDATES = list(range(3, 260, 11))
SINK, FOOLER, MARKED = 77, 88, 64
"""A token that calms all texts; one that calms only texts of tokens below 64."""


def search(
    lm: LanguageModel, texts: Tensor, further: Tensor | None, candidates: list[int], **options: Any
) -> SearchState:
    options = {"tau": 1.0, "max_length": 1, "verify_texts": 0 if further is None else len(further), **options}
    state = SearchState([])
    for _ in greedy_search(lm, SearchConfig(**options), texts, candidates, state, further):
        pass
    return state


def plant(lm: LanguageModel) -> None:
    """Sinks by features: every token asks for what SINK has, tokens below 64 ask more for what FOOLER has.

    What attention writes is most of the range of a block's output, and neither sink has values.
    """
    attention = lm.blocks[0].self_attn
    with torch.no_grad():
        attention.o_proj.weight.mul_(8)
        lm.embeddings[:, :4] = 0
        lm.embeddings[:, 1] = 2.0
        lm.embeddings[:MARKED, 3] = 4.0
        for token, feature in ((SINK, 0), (FOOLER, 2)):
            lm.embeddings[token] = 0
            lm.embeddings[token, feature] = 5.0
        attention.v_proj.weight[:, [0, 2]] = 0
        attention.k_proj.weight[:, [0, 2]] = 0
        attention.q_proj.weight[:, [1, 3]] = 0
        slow = slice(3, None, 4)  # the slowest rotary features, which hardly turn
        attention.k_proj.weight[slow, 0] = 10.0
        attention.q_proj.weight[slow, 1] = 10.0
        other = slice(2, None, 4)
        attention.k_proj.weight[other, 2] = 40.0
        attention.q_proj.weight[other, 3] = 40.0


def fooled_and_not(lm: LanguageModel) -> tuple[Tensor, Tensor]:
    plant(lm)
    return random_texts(1, 24) % MARKED, 130 + random_texts(3, 24, seed=1) % 60


def test_a_token_that_is_best_on_the_search_text_alone_is_rejected(tiny: Tiny) -> None:
    lm = tiny()
    texts, further = fooled_and_not(lm)
    pool = [*CANDIDATES, SINK, FOOLER]
    assert search(lm, texts, None, pool).token_ids == [FOOLER]
    state = search(lm, texts, further, pool, verify_candidates=3)
    assert state.token_ids == [SINK]
    by_token = {finalist.token_id: finalist for finalist in state.steps[0].finalists}
    assert set(by_token) > {SINK, FOOLER}
    fooler, sink = by_token[FOOLER], by_token[SINK]
    assert fooler.objectives[0] < sink.objectives[0]
    assert all(mine < theirs for mine, theirs in zip(sink.objectives[1:], fooler.objectives[1:], strict=True))
    assert search(lm, texts, further, pool, verify_candidates=1).steps[0].token_id == FOOLER


@pytest.mark.parametrize("scoring", ["full", "exact"])
def test_the_choice_is_the_mean_over_texts_computed_once_more(tiny: Tiny, scoring: str) -> None:
    """Every objective from a pass of its own; the prompt grows by what was chosen."""
    lm, texts, further = tiny(), random_texts(2, 10), random_texts(4, 10, seed=7)
    config = SearchConfig(max_length=2)
    state = search(lm, texts, further, CANDIDATES, max_length=2, verify_candidates=6, scoring=scoring)
    prompt: list[int] = []
    moved = 0
    for step, text in zip(state.steps, texts, strict=True):
        prefix, judge = Prefix.from_tokens(lm.model, prompt), Objective(config)
        of_all = [text, *further]
        before = [judge(lm, prefix, each[None], 0).item() for each in of_all]
        after = {c: [judge(lm, prefix, rows_of([c], each), 1).item() for each in of_all] for c in CANDIDATES}
        last = sorted(CANDIDATES, key=lambda c: after[c][0])[:6]
        ratios = {c: sum(new / old for new, old in zip(after[c], before, strict=True)) / 5 for c in last}
        medians = [sorted(after[c][text] for c in last)[2] for text in range(5)]
        scores = {c: sum(new / middle for new, middle in zip(after[c], medians, strict=True)) / 5 for c in last}
        assert [finalist.token_id for finalist in step.finalists] == sorted(last)
        assert {f.token_id: f.ratio for f in step.finalists} == pytest.approx(ratios, rel=1e-4)
        assert {f.token_id: f.score for f in step.finalists} == pytest.approx(scores, rel=1e-4)
        assert step.token_id == min(scores, key=scores.__getitem__)
        assert step.ratio == pytest.approx(ratios[step.token_id], rel=1e-4)
        assert step.objective_after == pytest.approx(after[step.token_id][0], rel=1e-4)
        assert step.further_before == pytest.approx(before[1:], rel=1e-4)
        moved += step.token_id != last[0]
        prompt.append(step.token_id)
    assert moved, "somewhere the search text alone would have chosen another token"


def test_exact_scoring_has_the_finalists_of_full_whatever_the_batch(tiny: Tiny) -> None:
    lm = tiny()
    texts, further = fooled_and_not(lm)
    rounds = [SearchRound(0.34, 4, 1, "start")]
    pool = [*range(2, 64, 2), SINK, FOOLER]
    full = search(lm, texts, further, pool, verify_candidates=4).steps[0]
    for batch_size in (1, 5):
        options: dict[str, Any] = {"scoring": "exact", "rounds": rounds, "batch_size": batch_size}
        exact = search(lm, texts, further, pool, verify_candidates=4, **options).steps[0]
        assert [finalist.token_id for finalist in exact.finalists] == [finalist.token_id for finalist in full.finalists]
        assert exact.token_id == full.token_id
        assert exact.verified < full.verified == len(pool), "some are dropped on the way"


def test_further_texts_move_neither_with_the_length_nor_with_the_start(text_file: Path, tmp_path: Path) -> None:
    """The first step of a longer search is that of a shorter one, to its key; and no text is used twice."""
    config = searching_config(text_file, tmp_path)
    places = METHODS["greedy"].places
    assert places is not None
    keys, outcomes, others = [], [], []
    for max_length, start in ((1, "empty"), (8, "empty"), (3, "bos")):
        own = replace(config.search, max_length=max_length, start=start, verify_texts=3)
        prepared = prepare(replace(config, search=own), "cpu")
        assert prepared.texts.search is not None
        steps, further = split_texts(own, prepared.texts.search)
        assert len(steps) == max_length - (start == "bos")
        context: Any = None  # a key asks it for nothing
        keys.append(GreedyStep(own, steps[0], CANDIDATES, [], [], further).key(context))
        state = SearchState([])
        next(step for step in greedy_search(prepared.lm, own, steps, CANDIDATES, state, further) if step in state.steps)
        outcomes.append(replace(state.steps[0], seconds=0.0))
        others.append(steps)
    assert keys[0] == keys[1] == keys[2]
    assert outcomes[0] == outcomes[1] == outcomes[2]
    none = prepare(replace(config, search=replace(config.search, max_length=8)), "cpu").texts.search
    assert none is not None and torch.equal(none, others[1]), "the steps' texts are those without further ones"
    for max_length, started in ((1, 0), (8, 0), (12, 0), (12, 2), (2, 5)):
        own = replace(config.search, max_length=max_length, verify_texts=3)
        found = places(own, started)
        assert found[-3:] == [8, 9, 10]
        assert len(set(found)) == len(found) == max(1, max_length - started) + 3
        assert places(replace(own, verify_texts=0), started) == list(range(max(1, max_length - started)))


def test_tau_bounds_the_mean_ratio(tiny: Tiny) -> None:
    lm = tiny()
    texts, further = fooled_and_not(lm)
    only = search(lm, texts, further, [FOOLER]).steps[0]
    alone = only.objective_after / only.objective_before
    assert only.ratio is not None
    assert alone < only.ratio
    between = (alone + only.ratio) / 2
    assert search(lm, texts, None, [FOOLER], tau=between).token_ids == [FOOLER]
    rejected = search(lm, texts, further, [FOOLER], tau=between)
    assert (rejected.token_ids, rejected.stop_reason) == ([], "tau")
    assert search(lm, texts, further, [FOOLER], tau=only.ratio).token_ids == [FOOLER], "at exactly tau it is accepted"


def test_the_cost_is_counted_and_a_search_goes_on_after_any_event(tiny: Tiny) -> None:
    lm, texts, further = tiny(), random_texts(2, 10), random_texts(2, 10, seed=3)
    seen: Counter[str] = Counter()
    lm.blocks[0].register_forward_hook(lambda _m, _a, output: seen.update({"tokens": output[..., 0].numel()}))
    plain, verified = (search(lm, texts, each, CANDIDATES) for each in (None, further))
    assert verified.steps[0].token_forwards - plain.steps[0].token_forwards == 2 * (10 + 12 * 11)
    assert seen["tokens"] == plain.steps[0].token_forwards + verified.steps[0].token_forwards
    config = SearchConfig(tau=1.0, max_length=2, batch_size=10, verify_texts=2)
    assert_it_goes_on_after_any_event(lm, config, texts, CANDIDATES, further)


def test_a_budget_that_ends_between_further_texts_counts_those_that_are_done(tiny: Tiny) -> None:
    lm, texts, further = tiny(), random_texts(1, 10), random_texts(3, 10, seed=3)
    need = search(lm, texts, None, CANDIDATES).steps[0].token_forwards
    one = search(lm, texts, further[:1], CANDIDATES).steps[0]
    for left_over, done in ((0, 0), (10 + 5 * 11, 0), (10 + 12 * 11, 1), (2 * (10 + 12 * 11) - 1, 1)):
        state = search(lm, texts, further, CANDIDATES, budget_token_forwards=need + left_over)
        assert state.stop_reason == "budget"
        step = state.steps[0]
        assert len(step.further_before) == done
        assert (step.finalists, step.ratio) == ((one.finalists, one.ratio) if done else ([], None))
    assert comparable(state)["steps"][0]["token_id"] == one.token_id


def test_a_finalist_without_a_number_on_a_further_text_is_never_chosen(tiny: Tiny) -> None:
    lm, texts, further = tiny(), random_texts(1, 10), random_texts(1, 10, seed=3)
    first = search(lm, texts, further, CANDIDATES).steps[0]
    whole = Objective.judge

    def judge(self: Objective, lm: LanguageModel, prefix: Prefix, rows: Tensor, skip: int, *others: Any) -> Any:
        judged = whole(self, lm, prefix, rows, skip, *others)
        if skip and torch.equal(rows[0, 1:], further[0]):
            judged.scores[rows[:, 0] == first.token_id] = float("nan")
        return judged

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Objective, "judge", judge)
        step = search(lm, texts, further, CANDIDATES).steps[0]
    assert step.token_id != first.token_id
    assert {f.token_id for f in step.finalists if f.score is None or f.ratio is None} == {first.token_id}
    assert SearchStep.from_dict(json.loads(json.dumps(asdict(step)))) == step


def test_pieces_by_hand() -> None:
    assert mean_ratio([10.0, 4.0], [5.0, 1.0]) == 0.375
    assert mean_ratio([10.0, 4.0], [5.0, None]) is None
    assert (mean_ratio([0.0], [0.0]), mean_ratio([0.0], [1.0])) == (1.0, None)
    assert scores([[1.0, 4.0], [2.0, 2.0], [3.0, None], [4.0, 8.0]]) == [0.75, 0.75, None, 2.0]
    lucky = scores([[0.001, 9.0, 9.0], [9.0, 8.0, 8.0], [9.0, 9.0, 9.0]])
    assert None not in lucky and lucky[0] == pytest.approx(2 / 3, abs=1e-3), "one text gains a third at most, of three"
    assert finalists([(4, 3.0), (1, 2.0), (9, 1.0), (7, 2.0)], 3) == [1, 7, 9]
    assert best([(9, 1.0), (4, 1.0 + 1e-8), (1, 2.0)]) == (4, 1.0 + 1e-8)
    assert best([]) is None
    step = SearchStep(0, 5, "a", 4.0, 1.0, False, 9, 90.0, 0.1, ratio=None, further_before=[0.0])
    assert not step.is_accepted(1.0), "an infinite ratio on a further text"
    assert replace(step, ratio=0.5).is_accepted(0.5) and not replace(step, ratio=0.5).is_accepted(0.4)
    assert replace(step, further_before=[]).is_accepted(0.25), "without further texts the search text decides"
    idle = METHODS["greedy"].idle(SearchConfig(verify_candidates=3))
    assert "search.verify_candidates=3 has no effect with search.verify_texts=0" in idle
    config = SearchConfig(max_length=3, verify_texts=4)
    steps, further = split_texts(config, random_texts(7, 5))
    assert (len(steps), len(further)) == (3, 4)
