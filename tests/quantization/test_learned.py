"""What was learned for a quantizer: the values and gradients of the quantizer that learns, and where its ranges go."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import calibrated, random_texts, random_values
from torch import Tensor

from cushion.config import ActivationConfig, QuantizerConfig, WeightConfig
from cushion.errors import ArtifactError, CalibrationError
from cushion.models import LanguageModel
from cushion.prefix import Prefix
from cushion.quantization.fitted import FittedQuantizer
from cushion.quantization.identity import quantizer_identity
from cushion.quantization.lazily import QuantizedLazily
from cushion.quantization.learned import LearnableQuantizer, Learned
from cushion.quantization.linear import ActivationQuantizer
from cushion.quantization.numerics import Grid

Tiny = Callable[..., LanguageModel]
GRIDS = (Grid(4, True), Grid(4, True, "paper"), Grid(4, False), Grid(4, False, "full", "integer"))
INITIAL = torch.tensor(-1.1), torch.tensor(1.4)
"""Narrower than normally distributed values: both ends clip."""
DOWN = "model.layers.1.mlp.down_proj"
RANGE = {DOWN: (torch.tensor(-0.25), torch.tensor(0.5))}


def learnable(grid: Grid, *moved: float) -> LearnableQuantizer:
    """A quantizer whose relative steps have moved."""
    quantizer = LearnableQuantizer(grid, INITIAL)
    with torch.no_grad():
        for parameter, value in zip(quantizer.learned, moved, strict=False):
            parameter.fill_(value)
    return quantizer


# ---- values and gradients -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_values_are_those_of_a_static_quantizer_with_its_range(grid: Grid, dtype: torch.dtype) -> None:
    values = random_values(5, 16).to(dtype)
    assert torch.equal(learnable(grid)(values), ActivationQuantizer(grid, "per_tensor", INITIAL)(values))
    moved = learnable(grid, 0.37, -0.11)
    assert torch.equal(moved(values), ActivationQuantizer(grid, "per_tensor", moved.range())(values))
    assert not torch.equal(moved(values), learnable(grid)(values))


def surrogate(values: Tensor, scale: Tensor, offset: Tensor, rounding: Tensor, grid: Grid) -> Tensor:
    """q(X) with the rounding as a constant, `s (clamp(u) + r) + z`: what LSQ differentiates."""
    return scale * (((values - offset) / scale).clamp(*grid.bounds) + rounding) + offset


@pytest.mark.parametrize("grid", GRIDS[:3], ids=str)
def test_its_gradients_are_the_differences_of_the_quantizer_with_constant_rounding(grid: Grid) -> None:
    values, weights = 2 * random_values(6, 8), random_values(6, 8, seed=1).double()
    quantizer = learnable(grid, 0.2, -0.1)
    given = values.clone().requires_grad_()
    (quantizer(given).double() * weights).sum().backward()

    def parameters(moved: list[float]) -> tuple[Tensor, Tensor]:
        low, high = (end.double() for end in INITIAL)
        width = high - low
        if grid.symmetric:
            return grid.parameters(low * math.exp(moved[0]), high * math.exp(moved[0]))
        low = low + moved[1] * width
        return width * math.exp(moved[0]) / grid.steps, low

    at = [0.2, -0.1]
    scale, offset = parameters(at)
    units = ((values.double() - offset) / scale).clamp(*grid.bounds)
    rounding = units.round() - units

    def value(inputs: Tensor, moved: list[float]) -> float:
        return float((surrogate(inputs.double(), *parameters(moved), rounding, grid) * weights).sum())

    h = 1e-6
    for index, parameter in enumerate(quantizer.learned):
        up, down = ([at[0] + h * (index == 0) * sign, at[1] + h * (index == 1) * sign] for sign in (1, -1))
        slope = (value(values, up) - value(values, down)) / (2 * h)
        assert parameter.grad is not None and slope != 0
        assert parameter.grad.item() == pytest.approx(slope / math.sqrt(values.numel() * grid.bounds[1]), rel=1e-4)
    assert given.grad is not None
    clipped = 0
    for place in ((0, 0), (2, 3), (4, 7), *(tuple(p.tolist()) for p in (values.abs() > 3.2).nonzero())):
        up, down = values.double(), values.double()
        up[place], down[place] = up[place] + h, down[place] - h
        slope = (value(up, at) - value(down, at)) / (2 * h)
        assert given.grad[place].item() == pytest.approx(slope, abs=1e-5)
        clipped += slope == 0
    assert clipped > 0


def test_an_integer_offset_learns_as_if_it_were_not_rounded() -> None:
    grid, values = GRIDS[3], random_values(40, 8)
    quantizer = learnable(grid)
    quantizer(values).sum().backward()
    scale, offset = grid.parameters(*INITIAL)
    clipped = ((values <= offset) | (values >= offset + 15 * scale)).sum().item()
    assert 0 < clipped < values.numel()
    moved = quantizer.learned[1].grad
    assert moved is not None
    assert moved.item() == pytest.approx(clipped * 2.5 / math.sqrt(values.numel() * 15), rel=1e-4)


def test_a_static_range_passes_the_gradient_of_what_it_does_not_clip() -> None:
    values = random_values(6, 8).requires_grad_()
    assert values.detach().lt(-1.4).any() and values.detach().gt(1.4).any()
    ActivationQuantizer(Grid(4, True), "per_tensor", INITIAL, straight_through=True)(values).sum().backward()
    assert torch.equal(values.grad, (values.detach().abs() < 1.4).float())


def test_learning_finds_a_better_range_than_the_extremes() -> None:
    values = random_values(400, 16)
    values[0, 0] = 60.0
    low, high = torch.aminmax(values)
    quantizer = LearnableQuantizer(Grid(4, True), (low, high))
    optimizer = torch.optim.Adam(quantizer.learned, lr=0.05)
    losses = []
    for _ in range(80):
        optimizer.zero_grad()
        loss = (quantizer(values) - values).square()[1:].mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


# ---- on a model -----------------------------------------------------------------------------------------------------


def inputs_of(lm: LanguageModel, name: str) -> ActivationQuantizer:
    return lm.model.get_submodule(name).activation  # type: ignore[return-value]


def test_learned_ranges_and_weights_win_where_there_are_any(tiny: Tiny) -> None:
    lm, config = tiny(), QuantizerConfig()
    weight = lm.linears()[DOWN].weight.detach() * 1.5
    fitted = FittedQuantizer(config, calibrated(lm, random_texts(2, 16)))
    learned = replace(fitted, learned=Learned(RANGE, {DOWN: weight}))
    with fitted.on(lm):
        plain = {
            name: (inputs_of(lm, name).parameters[0], lm.model.get_submodule(name).weight) for name in lm_names(lm)
        }
    with learned.on(lm):
        assert inputs_of(lm, DOWN).parameters[0].item() == pytest.approx(0.5 / 127)
        torch.testing.assert_close(lm.model.get_submodule(DOWN).weight, plain[DOWN][1] * 1.5)
        for name in plain.keys() - {DOWN}:
            assert torch.equal(inputs_of(lm, name).parameters[0], plain[name][0])
            assert torch.equal(lm.model.get_submodule(name).weight, plain[name][1])


def lm_names(lm: LanguageModel) -> list[str]:
    return [name for name, module in lm.model.named_modules() if hasattr(module, "activation")]


def test_readers_of_one_norm_learn_one_range(tiny: Tiny) -> None:
    lm = tiny()
    names = lm.linears().keys()
    found: dict[str, LearnableQuantizer] = {}
    with FittedQuantizer(QuantizerConfig(), calibrated(lm, random_texts(2, 16))).on(lm, learnable=found):
        assert found.keys() == names
        assert all(inputs_of(lm, name) is quantizer for name, quantizer in found.items())
    assert len({id(quantizer) for quantizer in found.values()}) == 4 * len(lm.blocks)
    layer = "model.layers.0."
    assert found[f"{layer}self_attn.q_proj"] is found[f"{layer}self_attn.v_proj"]
    assert found[f"{layer}mlp.gate_proj"] is not found[f"{layer}mlp.down_proj"]


@pytest.mark.parametrize(
    ("learned", "changes", "message"),
    [
        (Learned({"model.layers.9.mlp.up_proj": RANGE[DOWN]}), {}, r"model\.layers\.9\.mlp\.up_proj, which is not"),
        (Learned(RANGE), {"targets": ["q_proj"]}, r"quantizer\.targets"),
        (Learned(RANGE), {"activations": ActivationConfig(range="dynamic")}, r"activations\.range=dynamic"),
        (Learned({}, {DOWN: torch.zeros(2, 3)}), {}, r"shape \(2, 3\), and that of the model"),
    ],
)
def test_what_was_learned_for_something_else_is_refused(
    tiny: Tiny, learned: Learned, changes: dict, message: str
) -> None:
    lm = tiny()
    fitted = FittedQuantizer(QuantizerConfig(**changes), calibrated(lm, random_texts(2, 16)), learned=learned)
    with pytest.raises(CalibrationError, match=message), fitted.on(lm):
        pass


# ---- kept -----------------------------------------------------------------------------------------------------------


def test_what_was_learned_survives_a_file(tmp_path: Path) -> None:
    learned = Learned(RANGE, {DOWN: random_values(3, 4).to(torch.bfloat16)})
    learned.save(tmp_path / "learned.safetensors")
    again = Learned.load(tmp_path / "learned.safetensors")
    assert again.fingerprint == learned.fingerprint
    assert torch.equal(again.weights[DOWN], learned.weights[DOWN]) and again.ranges[DOWN] == learned.ranges[DOWN]
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    with pytest.raises(ArtifactError, match="damaged"):
        Learned.load(tmp_path / "broken.safetensors")


def test_no_cached_row_is_shared_between_different_learned_ranges(tiny: Tiny) -> None:
    wider = Learned({DOWN: (torch.tensor(-0.25), torch.tensor(0.5000001))})
    moved = Learned({DOWN.replace("1", "0"): RANGE[DOWN]})
    candidates = [None, Learned(), Learned(RANGE), wider, moved, Learned(RANGE, {DOWN: torch.ones(1)})]
    config = QuantizerConfig(weights=WeightConfig(bits=None))
    rows = [QuantizedLazily(tiny(), Prefix.empty(), config, learned=learned).identity() for learned in candidates]
    assert len({str(row) for row in rows}) == len(candidates)
    assert rows[0]["quantizer"] == quantizer_identity(config)
