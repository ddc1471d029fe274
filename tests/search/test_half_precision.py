"""Rounds in bfloat16: only they are, what enters a result is the model's own, and a search keeps what it began with."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import FAMILIES
from helpers import random_texts
from searching import assert_it_goes_on_after_any_event
from torch import Tensor

from cushion.config import SearchConfig, SearchRound
from cushion.errors import ConfigError
from cushion.models import LanguageModel
from cushion.prefix import Prefix
from cushion.search import half_precision
from cushion.search.greedy import greedy_search
from cushion.search.greedy_state import SearchState
from cushion.search.half_precision import in_dtype, multiplies_bfloat16, resolved, rounds_dtype
from cushion.search.objective import Objective

Tiny = Callable[..., LanguageModel]
ROUNDS = [SearchRound(0.5, 4, 6, "start")]
CONFIG = SearchConfig(
    "pruned", method="greedy", scoring="pruned", rounds=ROUNDS, max_length=1, tau=1.0, rounds_dtype="bfloat16"
)


def test_rounds_are_ranked_by_the_copy_and_everything_else_is_the_models_own(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, (text, further) = tiny("llama"), random_texts(2, 10)
    judge, seen = Objective.judge, list[tuple[torch.dtype, int]]()

    def noted(own: Any, lm: LanguageModel, prefix: Prefix, rows: Tensor, *rest: Any, **named: Any) -> Any:
        seen.append((lm.model.dtype, rows.shape[1]))
        return judge(own, lm, prefix, rows, *rest, **named)

    monkeypatch.setattr(Objective, "judge", noted)
    state = SearchState([])
    list(greedy_search(lm, replace(CONFIG, verify_candidates=2), text[None], list(range(40)), state, further[None]))
    (step,) = state.steps
    assert {length for dtype, length in seen if dtype == torch.bfloat16} == {5}, "a round of 4 tokens"
    assert {length for dtype, length in seen if dtype == torch.float32} == {10, 11}
    alone = Objective(CONFIG)(lm, Prefix.empty(), torch.cat([torch.tensor([step.token_id]), text])[None], 1)
    assert step.objective_after == pytest.approx(float(alone), rel=1e-6)
    assert step.rounds_dtype == "bfloat16"
    assert lm.model.dtype == torch.float32


def test_it_goes_on_with_the_dtype_that_it_began_with(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, texts, config = tiny("llama"), random_texts(1, 10), replace(CONFIG, rounds_dtype="auto")
    monkeypatch.setattr(half_precision, "multiplies_bfloat16", lambda _: True)
    assert_it_goes_on_after_any_event(lm, config, texts, list(range(12)))
    state = SearchState([])
    for _ in itertools.islice(greedy_search(lm, config, texts, list(range(12)), state), 1):
        pass
    monkeypatch.setattr(half_precision, "multiplies_bfloat16", lambda _: False)
    resumed = SearchState.from_dict(json.loads(json.dumps(state.to_dict())))
    list(greedy_search(lm, config, texts, list(range(12)), resumed))
    assert resumed.steps[0].rounds_dtype == "bfloat16"


def test_auto_is_bfloat16_where_the_processor_multiplies_it(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny("llama")
    assert not multiplies_bfloat16(torch.device("meta"))
    for avx512, amx, amd in itertools.product((False, True), repeat=3):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=avx512: has)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda has=amx: has)
        maker = "AuthenticAMD" if amd else "GenuineIntel"
        monkeypatch.setattr(half_precision, "processor_name", lambda maker=maker: f"{maker} a processor")
        assert multiplies_bfloat16(torch.device("cpu")) == (avx512 and (amx or amd))
    auto = replace(CONFIG, rounds_dtype="auto")
    for has, wanted in ((False, torch.float32), (True, torch.bfloat16)):
        monkeypatch.setattr(half_precision, "multiplies_bfloat16", lambda _, has=has: has)
        assert rounds_dtype(auto, lm) == wanted
        assert resolved(auto, lm).rounds_dtype == ("bfloat16" if has else "model")
    assert rounds_dtype(replace(CONFIG, rounds_dtype="model"), lm) == torch.float32
    half = in_dtype(lm, torch.float16)
    assert rounds_dtype(auto, half) == torch.float16
    assert rounds_dtype(CONFIG, half) == torch.bfloat16
    monkeypatch.setattr(half_precision, "_is_spread", lambda _: True)
    assert rounds_dtype(auto, lm) == torch.float32
    with pytest.raises(ConfigError, match=r"search\.rounds_dtype=bfloat16 makes a copy of .* set it to model"):
        rounds_dtype(CONFIG, lm)
    with pytest.raises(ConfigError, match=r"search\.rounds_dtype='half' is not allowed"):
        replace(CONFIG, rounds_dtype="half")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_runs_in_half_precision_and_its_own_model_stays(tiny: Tiny, family: str) -> None:
    lm, rows = tiny(family), random_texts(3, 9)
    before = Objective(CONFIG)(lm, Prefix.empty(), rows, 1)
    half = in_dtype(lm, torch.bfloat16)
    found = Objective(CONFIG)(half, Prefix.empty(), rows, 1)
    assert {weight.dtype for weight in half.model.parameters()} == {torch.bfloat16}
    assert found.isfinite().all()
    assert torch.allclose(found.log(), before.log(), atol=0.7)
    assert torch.equal(Objective(CONFIG)(lm, Prefix.empty(), rows, 1), before)
