"""The objective against an independent formula, and against plain forward passes over [p, p', t] without a cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import UNLIKE
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from cushion.config import SearchConfig
from cushion.models import LanguageModel
from cushion.prefix import Prefix
from cushion.quantization.numerics import Grid
from cushion.search import objective as objective_module
from cushion.search.objective import Objective, quantization_error

Tiny = Callable[..., LanguageModel]
GRIDS = [(bits, symmetric, levels) for bits in (2, 4, 8) for symmetric in (False, True) for levels in ("full", "paper")]


def squared_error(values: Tensor, bits: int = 8, symmetric: bool = False, levels: str = "full") -> float:
    """||X - q(X)||^2 of one text in float64, straight from the definition."""
    x = values.double().numpy().ravel()
    half = 2 ** (bits - 1) - 1
    if symmetric:
        scale = abs(x).max() / half if levels == "full" else (x.max() - x.min()) / half
        quantized = scale * np.clip(np.round(x / scale), -half, half)
    else:
        steps = 2**bits - 1 if levels == "full" else half
        scale = (x.max() - x.min()) / steps
        quantized = scale * np.round((x - x.min()) / scale) + x.min()
    return float(((x - quantized) ** 2).sum())


@torch.no_grad()
def block_outputs(lm: LanguageModel, ids: list[int]) -> list[Tensor]:
    """The output of every block for one row of tokens, by hooks of our own and without a cache."""
    outputs: list[Tensor] = []

    def keep(_module: object, _args: object, output: Tensor | tuple[Tensor, ...]) -> None:
        outputs.append((output[0] if isinstance(output, tuple) else output)[0].clone())

    handles = [block.register_forward_hook(keep) for block in lm.blocks]
    lm.model(input_ids=torch.tensor([ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    return outputs


@pytest.mark.parametrize(("bits", "symmetric", "levels"), GRIDS)
def test_error_equals_the_formula(bits: int, symmetric: bool, levels: str) -> None:
    values = torch.randn(3, 11, 16, generator=torch.Generator().manual_seed(0))
    values[1, 4, 5] = 300.0  # an outlier in one text must not reach the others
    actual = quantization_error(values, Grid(bits, symmetric, levels))
    expected = [squared_error(text, bits, symmetric, levels) for text in values]
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-3)


def test_values_on_the_grid_have_no_error_and_the_input_is_left_alone() -> None:
    values = torch.arange(16.0).reshape(1, 4, 4)
    before = values.clone()
    assert quantization_error(values, Grid(4, False)).item() < 1e-9
    assert quantization_error(torch.full((1, 2, 2), 3.7), Grid(4, False)).item() == 0
    assert torch.equal(values, before)


@pytest.mark.parametrize("start", [(), (256, 10)])
@pytest.mark.parametrize("family", UNLIKE)
def test_objective_equals_plain_forward_passes(tiny: Tiny, family: str, start: tuple[int, ...]) -> None:
    lm = tiny(family)
    text, candidates = [65, 66, 200, 67, 13, 90, 7], [5, 256]
    prefix = Prefix.from_tokens(lm.model, start)
    rows = torch.tensor([[candidate, *text] for candidate in candidates])
    alone = [output[-len(text) :] for output in block_outputs(lm, [*start, *text])]
    behind = [
        [output[-len(text) :] for output in block_outputs(lm, [*start, candidate, *text])] for candidate in candidates
    ]
    judges: dict[str, Callable[[list[Tensor]], float]] = {
        "quantization_error": lambda outputs: sum(squared_error(output) for output in outputs),
        "maximum_activation": lambda outputs: max(output.abs().max().item() for output in outputs),
    }
    for name, judge in judges.items():
        objective = Objective(SearchConfig(objective=name))
        scores = objective(lm, prefix, rows, skip=1)
        assert scores.dtype == torch.float64
        np.testing.assert_allclose(scores.numpy(), [judge(outputs) for outputs in behind], rtol=1e-3)
        without = objective(lm, prefix, torch.tensor([text]), skip=0)
        np.testing.assert_allclose(without.numpy(), [judge(alone)], rtol=1e-3)


@pytest.mark.parametrize("name", ["quantization_error", "maximum_activation"])
def test_positions_before_the_text_never_enter_a_range(tiny: Tiny, name: str) -> None:
    lm = tiny()
    lm.embeddings[5] *= 1e4  # a token with a massive activation of its own
    text = [65, 66, 200, 67, 13, 90, 7]
    objective = Objective(SearchConfig(objective=name))
    rows = torch.tensor([[5, *text]])
    excluded = objective(lm, Prefix.empty(), rows, skip=1).item()
    assert objective(lm, Prefix.empty(), rows, skip=0).item() > 10 * excluded
    behind = objective(lm, Prefix.from_tokens(lm.model, [5]), torch.tensor([text]), skip=0).item()
    assert behind == pytest.approx(excluded, rel=1e-3)


def test_lm_head_is_not_run_and_no_hook_is_left(tiny: Tiny) -> None:
    lm = tiny()

    def fail(*_: object) -> None:
        raise AssertionError("lm_head was run")

    lm.model.get_output_embeddings().register_forward_hook(fail)
    Objective(SearchConfig())(lm, Prefix.empty(), torch.tensor([[1, 2, 3]]), skip=0)
    assert not any(block._forward_hooks for block in lm.blocks)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [False, True])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype, symmetric: bool) -> None:
    values = torch.randn(2, 40, 64, generator=torch.Generator().manual_seed(0)).mul(3).to(dtype)
    values[:, 3, 5] = 20000.0  # a sum of squares that float16 cannot hold
    actual = quantization_error(values, Grid(8, symmetric))
    assert actual.dtype == torch.float32
    assert torch.equal(actual, quantization_error(values.float(), Grid(8, symmetric)))
    np.testing.assert_allclose(actual.numpy(), [squared_error(text, 8, symmetric) for text in values], rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("skip", [0, 1])
def test_no_bit_depends_on_how_many_texts_are_worked_on_together(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, skip: int
) -> None:
    values = torch.randn(9, 33, 48, generator=torch.Generator().manual_seed(0)).to(dtype)[:, skip:]
    results = []
    for at_once in (1, 4 * values[0].numel(), 2**30):
        monkeypatch.setitem(objective_module.ELEMENTS_AT_ONCE, "cpu", at_once)
        results.append(quantization_error(values, Grid(8, False)))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    one_range = values.flatten(1)  # all of a text in one row, as the definition has it
    low, high = torch.aminmax(one_range, dim=1, keepdim=True)
    scale, offset = Grid(8, False).parameters(low.float(), high.float())
    codes = (one_range.float() - offset) / scale
    error = torch.linalg.vector_norm(codes - codes.round(), dim=1)
    assert torch.equal(results[0], (error * scale[:, 0]).square())


@pytest.mark.parametrize("length", [0, 3])
def test_judging_computes_the_linears_of_the_blocks_once_for_every_row(tiny: Tiny, length: int) -> None:
    """Neither the prefix nor lm_head is among them, and a block that is not asked for is not either."""
    lm = tiny()
    prefix = Prefix.from_tokens(lm.model, [7] * length)
    rows = torch.tensor([[candidate, 65, 66, 67] for candidate in range(5)])
    of_block = sum(2 * linear.weight.numel() for name, linear in lm.linears().items() if ".0." in name)
    for depth in (1, 3):
        with FlopCounterMode(display=False) as counter:
            Objective(SearchConfig()).judge(lm, prefix, rows, skip=1, depth=depth)
        counts = counter.get_flop_counts()["Global"]
        assert counts[torch.ops.aten.mm] == depth * of_block * rows.numel()


def test_the_prefix_is_shared_by_all_rows(tiny: Tiny) -> None:
    lm = tiny()
    prefix = Prefix.from_tokens(lm.model, [7, 8])
    seen: list[tuple[Tensor, Tensor]] = []

    def look(_module: object, _args: object, kwargs: dict[str, Any]) -> None:
        seen.extend((layer.keys, layer.values) for layer in kwargs["past_key_values"].layers[len(seen) :])

    lm.blocks[0].register_forward_pre_hook(look, with_kwargs=True)
    Objective(SearchConfig())(lm, prefix, torch.tensor([[candidate, 65, 66] for candidate in range(50)]), skip=1)
    assert len(seen) == len(lm.blocks)
    for pair in seen:
        for tensor in pair:
            assert tensor.shape[0] == 50 and tensor.stride(0) == 0  # views of one row
