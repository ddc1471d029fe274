"""Spike tokens behind the norm: planted ones are one vector, and cosines are those of all pairs one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from helpers import random_texts
from planted import plant_spikes
from torch import Tensor

from cushion.errors import ConfigError
from cushion.evaluation.spikes import spike_cosines
from cushion.models import LanguageModel
from cushion.prefix import Prefix

Tiny = Callable[..., LanguageModel]
TOKENS = {5: 2.0, 9: 3.0, 200: 2.5}


def spiking_texts() -> Tensor:
    texts = random_texts(3, 24)
    for token in TOKENS:
        texts[texts == token] = 77
    texts[0, [3, 11]], texts[1, 8] = torch.tensor([5, 9]), 200
    return texts


def test_planted_spikes_are_one_vector_behind_the_norm(tiny: Tiny) -> None:
    """One unit of block 1 blows up: whatever the token, its output is that unit's column, and so is its unit vector."""
    lm = tiny()
    plant_spikes(lm.model, TOKENS)
    found = spike_cosines(lm, Prefix.empty(), spiking_texts(), 100.0)
    assert found.counts == [0.0, 0.0, 1.0]
    assert found.cosines[:2] == [None, None]
    assert found.cosines[2] == pytest.approx(1, abs=1e-3)
    assert found.others[2] is not None and found.others[2] < 0.5


@pytest.mark.parametrize("prompt", [[], [256, 10, 65]], ids=["bare", "prefix"])
@torch.no_grad()
def test_cosines_are_those_of_all_pairs(tiny: Tiny, prompt: list[int]) -> None:
    lm, texts, ratio = tiny(), random_texts(2, 20), 1.3
    found = spike_cosines(lm, Prefix.from_tokens(lm.model, prompt), texts, ratio)
    states = [
        lm.model(input_ids=torch.tensor([prompt + text]), use_cache=False, output_hidden_states=True).hidden_states
        for text in texts.tolist()
    ]
    for block in range(3):
        norm, groups = cast(Any, lm.blocks[block]).input_layernorm, (list[Tensor](), list[Tensor]())
        for state in states:
            values = state[block][0, len(prompt) :]
            largest = values.abs().amax(-1)
            spike = largest > ratio * largest.sort().values[9]  # the lower of the middle two of 20
            for group, own in zip(groups, (spike, ~spike), strict=True):
                group.extend(norm(values[own]).double())
        assert found.counts[block] == len(groups[0]) / 2 > 1
        for group, mean in zip(groups, (found.cosines[block], found.others[block]), strict=True):
            vectors = torch.stack(group)
            pairs = torch.nn.functional.cosine_similarity(vectors[:, None], vectors[None], dim=-1)
            off = pairs[~torch.eye(len(vectors), dtype=torch.bool)]
            assert mean == pytest.approx(off.mean().item(), abs=1e-5)


def test_a_model_without_norms_before_its_linears_is_refused(tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match=r"eval\.spike_texts: .* no norm before their linears.*eval\.spike_texts=0"):
        spike_cosines(tiny("olmo2"), Prefix.empty(), random_texts(1, 9), 64.0)
