"""Blocks one after another: early stop, rows that leave on the way, and a model that is left as it was."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import UNLIKE
from helpers import random_texts
from torch import Tensor

from cushion.activations import observe_outputs
from cushion.blockwise import BlockRunner, run_blocks
from cushion.models import LanguageModel
from cushion.prefix import Prefix

Tiny = Callable[..., LanguageModel]
ROWS = random_texts(6, 9, seed=3)


@torch.no_grad()
def plain_outputs(lm: LanguageModel, start: list[int], rows: Tensor) -> list[Tensor]:
    """The outputs of all blocks at the positions of `rows`, from forward passes of one row each without a cache."""
    outputs: list[list[Tensor]] = [[] for _ in lm.blocks]
    for row in rows.tolist():
        with observe_outputs(lm.named_blocks, lambda name, output: outputs[int(name)].append(output[0, len(start) :])):
            lm.body(torch.tensor([[*start, *row]]), use_cache=False)
    return [torch.stack(block) for block in outputs]


@pytest.mark.parametrize("start", [[], [256, 10]])
@pytest.mark.parametrize("family", [*UNLIKE, "gpt_oss", "qwen2_moe"])
def test_rows_that_stay_are_what_they_would_have_been_alone(tiny: Tiny, family: str, start: list[int]) -> None:
    lm = tiny(family)
    expected = plain_outputs(lm, start, ROWS)
    leaving = {0: [0, 2, 3, 5], 1: [1, 3]}  # positions among those alive after blocks 0 and 1
    alive = list(range(6))
    visited = []

    def visit(block: int, output: Tensor) -> Tensor | None:
        nonlocal alive
        visited.append(block)
        torch.testing.assert_close(output, expected[block][alive], rtol=1e-4, atol=1e-4)
        if block not in leaving:
            return None
        alive = [alive[position] for position in leaving[block]]
        return torch.tensor(leaving[block])

    run_blocks(lm, Prefix.from_tokens(lm.model, start), ROWS, visit)
    assert (visited, alive) == ([0, 1, 2], [2, 5])


@pytest.mark.parametrize("depth", [1, 2, 3, None])
def test_no_block_behind_the_last_one_is_run(tiny: Tiny, depth: int | None) -> None:
    lm, ran = tiny(), []
    handles = [block.register_forward_pre_hook(lambda *_, i=i: ran.append(i)) for i, block in enumerate(lm.blocks)]
    lm.model.base_model.norm.register_forward_hook(lambda *_: pytest.fail("the final norm was run"))
    run_blocks(lm, Prefix.empty(), ROWS, lambda _block, _output: None, depth)
    assert ran == list(range(depth or 3))
    for handle in handles:
        handle.remove()
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in lm.blocks)


def test_it_ends_where_no_row_is_left(tiny: Tiny) -> None:
    visited: list[int] = []

    def visit(block: int, _output: Tensor) -> Tensor:
        visited.append(block)
        return torch.arange(0)

    run_blocks(tiny(), Prefix.empty(), ROWS, visit)
    assert visited == [0]


def test_an_error_inside_goes_out_and_leaves_no_hook(tiny: Tiny) -> None:
    lm = tiny()

    def visit(_block: int, _output: Tensor) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        run_blocks(lm, Prefix.empty(), ROWS, visit)
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in lm.blocks)


@torch.no_grad()
def test_the_prefix_and_the_model_are_left_alone(tiny: Tiny) -> None:
    lm = tiny()
    prefix = Prefix.from_tokens(lm.model, [256, 10])
    before, logits = prefix.fingerprint, lm.model(input_ids=ROWS).logits
    run_blocks(lm, prefix, ROWS, lambda block, output: torch.arange(len(output) - 1), 2)
    assert prefix.fingerprint == before
    assert torch.equal(lm.model(input_ids=ROWS).logits, logits)


@pytest.mark.parametrize("start", [[], [256, 10]])
@pytest.mark.parametrize("family", [*UNLIKE, "falcon_alibi", "gpt_oss", "qwen2_moe"])
def test_blocks_run_alone_give_what_the_whole_pass_gives(tiny: Tiny, family: str, start: list[int]) -> None:
    lm = tiny(family)
    expected = plain_outputs(lm, start, ROWS)
    runner = BlockRunner(lm, Prefix.from_tokens(lm.model, start))
    with torch.no_grad():
        hidden = runner.inputs(ROWS)
        for block, output in enumerate(expected):
            hidden = runner(block, ROWS, hidden)
            torch.testing.assert_close(hidden, output, rtol=1e-4, atol=1e-4)
            hidden = output
    assert not any(block._forward_hooks or "forward" in vars(block) for block in lm.blocks)


def test_gradients_pass_a_block_that_runs_alone(tiny: Tiny) -> None:
    lm = tiny()
    runner = BlockRunner(lm, Prefix.from_tokens(lm.model, [256, 10]))
    hidden = runner.inputs(ROWS[:1]).requires_grad_()
    runner(1, ROWS[:1], hidden)[0, 3].sum().backward()
    assert hidden.grad is not None
    touched = hidden.grad[0].abs().sum(-1) > 0
    assert touched.tolist() == [True] * 4 + [False] * 5  # attention is causal
