"""The map of magnitudes over positions and channels, against a plain forward pass with its hidden states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from conftest import UNLIKE
from torch import Tensor

from cushion.errors import NotFiniteError
from cushion.evaluation.activation_map import MAP_CHANNELS, MAP_POSITIONS, activation_map
from cushion.models import LanguageModel
from cushion.prefix import Prefix

Tiny = Callable[..., LanguageModel]
BLOCK, CHANNEL, OUTLIER = 1, 21, 77
"""The block whose input is mapped, and the channel in which the planted token is large."""


def text_of(tokens: int = 80, outliers: tuple[int, ...] = (5, 40)) -> Tensor:
    text = torch.randint(100, 250, (tokens,), generator=torch.Generator().manual_seed(0))
    text[list(outliers)] = OUTLIER
    return text


@torch.no_grad()
def plant(lm: LanguageModel) -> LanguageModel:
    lm.embeddings[OUTLIER, CHANNEL] = -900.0
    return lm


@torch.no_grad()
def plainly(lm: LanguageModel, prefix: list[int], text: Tensor) -> Tensor:
    """|X| at the input of `BLOCK` of the whole text behind the prefix's tokens: (tokens, channels)."""
    states = lm.model(input_ids=torch.cat([torch.tensor(prefix, dtype=torch.long), text])[None],
                      output_hidden_states=True).hidden_states  # fmt: skip
    return cast("tuple[Tensor, ...]", states)[BLOCK][0, len(prefix) :].abs()


@pytest.mark.parametrize("tokens", [[], [11, 12, 13]])
@pytest.mark.parametrize("family", UNLIKE)
def test_a_map_is_that_of_a_plain_forward_pass(tiny: Tiny, family: str, tokens: list[int]) -> None:
    lm, text = tiny(family), text_of()
    expected = plainly(lm, tokens, text)[:MAP_POSITIONS]
    channels = [0, 3, CHANNEL]
    found = activation_map(lm, Prefix.from_tokens(lm.model, tokens), text, BLOCK, channels)
    assert found.channels == channels
    torch.testing.assert_close(torch.tensor(found.values), expected[:, channels], rtol=6e-4, atol=1e-5)


def test_a_planted_outlier_stands_at_its_positions_in_its_channel(tiny: Tiny) -> None:
    lm, text = plant(tiny()), text_of()
    found = activation_map(lm, Prefix.empty(), text, BLOCK)
    expected = plainly(lm, [], text)[:MAP_POSITIONS]
    largest = sorted(range(expected.shape[1]), key=lambda channel: -expected[:, channel].max().item())[:MAP_CHANNELS]
    assert found.channels == sorted(largest) and CHANNEL in found.channels
    column = [row[found.channels.index(CHANNEL)] for row in found.values]
    assert [position for position, value in enumerate(column) if value > 800] == [5, 40]
    assert column[5] == float(f"{expected[5, CHANNEL].item():.4g}"), "4 significant digits"
    assert (len(found.values), {len(row) for row in found.values}) == (MAP_POSITIONS, {MAP_CHANNELS})


def test_the_first_block_and_a_short_text(tiny: Tiny) -> None:
    lm, text = plant(tiny()), text_of(7, (2,))
    found = activation_map(lm, Prefix.empty(), text, 0, [CHANNEL])
    expected = lm.embeddings[text, CHANNEL].abs()
    torch.testing.assert_close(torch.tensor(found.values)[:, 0], expected.detach(), rtol=6e-4, atol=0.0)
    assert found.values[2] == [900.0]


def test_blocks_behind_the_mapped_one_are_not_run_and_no_hook_stays(tiny: Tiny) -> None:
    lm = tiny()
    ran: list[int] = []
    handles = [
        block.register_forward_hook(lambda *_, index=index: ran.append(index)) for index, block in enumerate(lm.blocks)
    ]
    activation_map(lm, Prefix.from_tokens(lm.model, [5]), text_of(), BLOCK)
    for handle in handles:
        handle.remove()
    assert ran == [0, 1, 2, 0, 1], "all for the prefix's keys and values, two for the map"
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in lm.model.modules())


@torch.no_grad()
def test_what_is_not_finite_is_refused(tiny: Tiny) -> None:
    lm: Any = tiny()
    lm.embeddings[OUTLIER, CHANNEL] = float("inf")
    with pytest.raises(NotFiniteError, match=r"tiny_llama are not finite \(input of block 0\).*model\.dtype=bfloat16"):
        activation_map(lm, Prefix.empty(), text_of(), 0)
