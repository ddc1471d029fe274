"""Copies of a model share the candidates out and find what one model finds. Here the devices are all the CPU."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import UNLIKE
from helpers import random_texts
from torch import Tensor

from cushion.config import ModelConfig, RunConfig, SearchConfig, SearchRound
from cushion.errors import ConfigError
from cushion.models import LanguageModel
from cushion.prefix import Prefix
from cushion.search import greedy as greedy_module
from cushion.search.greedy import greedy_search
from cushion.search.greedy_state import SearchState
from cushion.search.objective import Judged, Objective
from cushion.search.replicas import check_replicas, replica_devices, replicated
from cushion.search.rounds import rows_of

Tiny = Callable[..., LanguageModel]
CPU = torch.device("cpu")
VOCABULARY = list(range(260))


def some_texts(count: int = 2, length: int = 10) -> Tensor:
    return random_texts(count, length, seed=3)


def search(lm: LanguageModel, texts: Tensor, **options: Any) -> SearchState:
    rounds = [SearchRound(0.34, 4, 60, "spikes"), SearchRound(0.67, 8, 12, "start")]
    config = SearchConfig(**{"tau": 1.0, "max_length": 2, "rounds": rounds, "scoring": "exact", **options})
    state = SearchState([])
    for _ in greedy_search(lm, config, texts, VOCABULARY, state):
        pass
    return state


@pytest.mark.parametrize("family", UNLIKE)
def test_copies_judge_as_one_model_does(tiny: Tiny, family: str) -> None:
    lm = tiny(family)
    prefix, rows = Prefix.from_tokens(lm.model, [7, 8]), rows_of(list(range(40, 63)), some_texts()[0])
    objective = Objective(SearchConfig())
    alone = objective.judge(lm, prefix, rows, 1, 3)
    bound = float(alone.scores.sort().values[10:12].mean())  # no row's own score
    dropped = objective.judge(lm, prefix, rows, 1, 3, bound)
    assert not dropped.complete.all()
    with replicated(lm, objective, [CPU] * 3) as replicas:
        prefixes = replicas.place(prefix)
        assert (len(replicas), replicas.share(23)) == (3, 8)
        for expected, limit in ((alone, float("inf")), (dropped, bound)):
            judged = replicas.judge(prefixes, rows, 3, limit)
            torch.testing.assert_close(judged.scores, expected.scores, rtol=1e-5, atol=0)
            assert judged.blocks.tolist() == expected.blocks.tolist()
            assert judged.complete.tolist() == expected.complete.tolist()
        few = replicas.judge(prefixes, rows[:2], 3)  # fewer rows than copies
        torch.testing.assert_close(few.scores, alone.scores[:2], rtol=1e-5, atol=0)


def test_a_copy_shares_nothing_and_keeps_what_is_tied(tiny: Tiny) -> None:
    lm = tiny("gemma")
    assert lm.model.get_output_embeddings().weight is lm.model.get_input_embeddings().weight
    with replicated(lm, Objective(SearchConfig()), [CPU, CPU]) as replicas:
        first, second = replicas._lms
        assert first is lm
        assert second.model.get_output_embeddings().weight is second.model.get_input_embeddings().weight
        assert (second.architecture, second.fingerprint) == (lm.architecture, lm.fingerprint)
        mine, theirs = ([*one.model.parameters(), *one.model.buffers()] for one in (first, second))
        assert len(mine) == len(theirs)
        for own, copied in zip(mine, theirs, strict=True):
            assert torch.equal(own, copied)
            assert own.data_ptr() != copied.data_ptr()
            assert not copied.requires_grad


@pytest.mark.parametrize("family", UNLIKE)
def test_nothing_of_a_copy_stays_behind(tiny: Tiny, family: str) -> None:
    lm = tiny(family)
    meta = torch.device("meta")
    with replicated(lm, Objective(SearchConfig()), [CPU, meta]) as replicas:
        assert replicas.devices == {CPU, meta}
        for module in replicas._lms[1].model.modules():
            tensors = [*module._parameters.values(), *module._buffers.values(), *vars(module).values()]
            assert {tensor.device for tensor in tensors if isinstance(tensor, Tensor)} <= {meta}
        _, placed = replicas.place(Prefix.from_tokens(lm.model, [7, 8]))
        assert {tensor.device for tensor in (*placed.keys, *placed.values)} == {meta}
    assert len(replicas) == 0  # nothing holds the copies any more


def test_a_gpu_without_room_for_a_copy_is_named(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    lm = tiny()
    monkeypatch.setattr("copy.deepcopy", full)
    with (
        pytest.raises(ConfigError, match=r"search.replicas: cpu has no room for a copy of tiny.*use fewer"),
        replicated(lm, Objective(SearchConfig()), [CPU, CPU]),
    ):
        pass


def spread(monkeypatch: pytest.MonkeyPatch, copies: int) -> list[str]:
    """Let the search use that many copies; the threads that judged, one entry a batch of each."""
    judge, names = Objective.judge, []

    def observed(self: Objective, *others: Any, **named: Any) -> Judged:
        names.append(threading.current_thread().name)
        return judge(self, *others, **named)

    monkeypatch.setattr(greedy_module, "replica_devices", lambda count, first: [first] * copies)
    monkeypatch.setattr(Objective, "judge", observed)
    return names


@pytest.mark.parametrize("scoring", ["full", "pruned", "exact"])
def test_the_search_finds_the_same_with_copies(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, scoring: str) -> None:
    lm, texts = tiny(), some_texts()
    alone = search(lm, texts, scoring=scoring)
    names = spread(monkeypatch, 3)
    shared = search(lm, texts, scoring=scoring, batch_size=5)
    assert len({name for name in names if name != "MainThread"}) > 1
    assert shared.token_ids == alone.token_ids
    for mine, theirs in zip(shared.steps, alone.steps, strict=True):
        assert mine.objective_after == pytest.approx(theirs.objective_after, rel=1e-6)
        if scoring != "exact":  # a bound that is known later drops later
            assert mine.token_forwards == pytest.approx(theirs.token_forwards)


def test_one_copy_out_of_memory_halves_the_batch_of_all(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, texts = tiny(), some_texts()
    alone = search(lm, texts, scoring="full", max_length=1)
    spread(monkeypatch, 2)
    judge, passed = Objective.judge, []

    def limited(self: Objective, model: LanguageModel, prefix: Any, rows: Tensor, *others: Any) -> Judged:
        if model is not lm and len(rows) > 5:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        passed.append((model is lm, len(rows)))
        return judge(self, model, prefix, rows, *others)

    monkeypatch.setattr(Objective, "judge", limited)
    state = search(lm, texts, scoring="full", max_length=1, batch_size=16)
    assert state.token_ids == alone.token_ids
    assert {rows for own, rows in passed if not own} == {4, 2}  # 260 = 32 x 8 + 4, shared out by two
    assert state.steps[0].token_forwards == alone.steps[0].token_forwards


def test_another_error_of_a_copy_is_raised(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny()
    spread(monkeypatch, 2)
    judge = Objective.judge

    def broken(self: Objective, model: LanguageModel, *others: Any, **named: Any) -> Judged:
        if model is not lm:
            raise ValueError("the second one")
        return judge(self, model, *others, **named)

    monkeypatch.setattr(Objective, "judge", broken)
    with pytest.raises(ValueError, match="the second one"):
        search(lm, some_texts())


def test_a_search_that_has_ended_copies_nothing(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_devices(*_: Any) -> list[torch.device]:
        raise AssertionError("no copy is needed")

    monkeypatch.setattr(greedy_module, "replica_devices", no_devices)
    ended = SearchState([1], finished=True, stop_reason="tau")
    assert list(greedy_search(tiny(), SearchConfig(), some_texts(), VOCABULARY, ended)) == []


def test_devices_are_the_models_own_and_the_next_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    gpu = [torch.device("cuda", index) for index in range(4)]
    assert replica_devices(1, gpu[2]) == [gpu[2]]
    assert replica_devices(3, gpu[2]) == [gpu[2], gpu[0], gpu[1]]
    assert replica_devices(None, gpu[0]) == gpu
    assert replica_devices(None, CPU) == [CPU]


def test_more_copies_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = SearchConfig(method="greedy", replicas=2)
    with pytest.raises(ConfigError, match=r"search.replicas=2 needs as many GPUs, and this run has 0.*replicas=1"):
        check_replicas(config, "cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_replicas(config, "cuda:1")
    check_replicas(SearchConfig(method="greedy", replicas=None), "cpu")
    check_replicas(SearchConfig(replicas=2), "cpu")  # no greedy search: a warning tells
    with pytest.raises(ConfigError, match=r"search.replicas=0"):
        SearchConfig(replicas=0)


@pytest.mark.parametrize(("replicas", "written"), [(2, "2"), (None, "null")])
def test_copies_of_a_model_that_is_placed_otherwise_are_refused(replicas: int | None, written: str) -> None:
    spread_out = ModelConfig(device_map="auto")
    with pytest.raises(ConfigError, match=rf"search.replicas={written} .*model.device_map='auto' places"):
        RunConfig(model=spread_out, search=SearchConfig(method="greedy", replicas=replicas))
    RunConfig(model=spread_out, search=SearchConfig(replicas=replicas))
