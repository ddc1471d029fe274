"""Fitting block by block: what a part is given, where its result goes, and GPTQ."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import calibrated, random_texts, random_values
from safetensors.torch import load_file
from tiny_run import small_config
from torch import Tensor
from untouched import assert_untouched, snapshot

from cushion import pipeline
from cushion.activations import observe_inputs, observe_outputs
from cushion.artifacts import ArtifactStore, Checkpoint
from cushion.config import (
    ActivationConfig,
    CompensationConfig,
    KvCacheConfig,
    QFeMConfig,
    QuantizerConfig,
    RunConfig,
    SearchConfig,
    TuningConfig,
    WeightConfig,
)
from cushion.config_warnings import options_without_effect
from cushion.errors import CalibrationError, ConfigError
from cushion.models import LanguageModel
from cushion.prefix import Prefix
from cushion.quantization import gptq
from cushion.quantization.calibration import Calibration
from cushion.quantization.effect import Turn
from cushion.quantization.fitted import FittedQuantizer
from cushion.quantization.fitting import fit_block, fit_blocks, walk
from cushion.quantization.fitting_step import FittingStep
from cushion.quantization.numerics import Grid, QuantizedWeight, quantize_weight
from cushion.quantization.parts.registry import PARTS
from cushion.quantization.parts.weights import COLUMN_ORDERS
from cushion.quantization.rotation import rotated
from cushion.step import Context, compute

Tiny = Callable[..., LanguageModel]
TEXTS = random_texts(3, 24, seed=5)
START = [256, 10]
W4 = WeightConfig(4, "per_channel")
PLAIN = QuantizerConfig(weights=WeightConfig(None), activations=ActivationConfig(None))
LEAVES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
KINDS = {
    "static": QuantizerConfig(weights=W4),
    "kv_cache": QuantizerConfig(weights=W4, kv_cache=KvCacheConfig(4), smoothing_alpha=0.5),
    "rotated": QuantizerConfig(weights=W4, rotation="hadamard"),
}


def fitted_behind(lm: LanguageModel, prefix: Prefix, config: QuantizerConfig) -> FittedQuantizer:
    with rotated(lm, config.rotation, config.rotation_seed):
        return FittedQuantizer(config, calibrated(lm, TEXTS, prefix))


def block_outputs(lm: LanguageModel, prefix: Prefix) -> list[Tensor]:
    """The outputs of all blocks, (texts, tokens, features), from passes of one text each."""
    found: list[list[Tensor]] = [[] for _ in lm.blocks]
    for text in TEXTS:
        with observe_outputs(lm.named_blocks, lambda name, output: found[int(name)].append(output[0])):
            lm.body(text[None], past_key_values=prefix.cache(lm.model), use_cache=True)
    return [torch.stack(block) for block in found]


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_turn_has_the_streams_of_the_plain_and_of_the_quantized_model(tiny: Tiny, kind: str) -> None:
    lm = tiny()
    prefix = Prefix.from_tokens(lm.model, START)
    fitted, turns = fitted_behind(lm, prefix, KINDS[kind]), list[Turn]()
    assert list(walk(lm, prefix, fitted, TEXTS, turns.append)) == [1, 2, 3]
    with fitted.surroundings(lm):
        plain = block_outputs(lm, prefix)
    with fitted.on(lm):
        quantized = block_outputs(lm, prefix)
    for index, turn in enumerate(turns):
        torch.testing.assert_close(turn.targets, plain[index], rtol=1e-4, atol=1e-4)
        if index:
            torch.testing.assert_close(turn.inputs, plain[index - 1], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(turn.quantized, quantized[index - 1], rtol=1e-4, atol=1e-4)
            assert not torch.allclose(turn.quantized, turn.inputs, atol=1e-3)
    assert torch.equal(turns[0].quantized, turns[0].inputs)


def with_gptq(config: QuantizerConfig, **options: Any) -> QuantizerConfig:
    return replace(config, weights=replace(config.weights, method="gptq", **options))


def inputs_of(lm: LanguageModel, prefix: Prefix) -> dict[str, Tensor]:
    """What each linear reads, (tokens, channels)."""
    found: dict[str, list[Tensor]] = {}
    linears = {name: lm.model.get_submodule(name) for name in lm.linears()}
    with observe_inputs(linears, lambda name, values: found.setdefault(name, []).append(values[0])):
        for text in TEXTS:
            lm.body(text[None], past_key_values=prefix.cache(lm.model), use_cache=True)
    return {name: torch.cat(rows) for name, rows in found.items()}


@torch.no_grad()
def test_gptq_is_nearer_to_the_outputs_than_the_nearest_codes(tiny: Tiny) -> None:
    lm = tiny()
    prefix = Prefix.from_tokens(lm.model, START)
    config = with_gptq(QuantizerConfig(weights=W4, activations=ActivationConfig(bits=None)))
    fitted = FittedQuantizer(config, fits={"gptq": {}})
    list(fit_blocks(lm, prefix, fitted, TEXTS))
    weights = {name: linear.weight.clone() for name, linear in lm.linears().items()}
    plain = block_outputs(lm, prefix)
    with fitted.on(lm):
        own = {name: lm.model.get_submodule(name).weight for name in weights}
        assert (block_outputs(lm, prefix)[-1] - plain[-1]).square().mean() > 0
    with FittedQuantizer(PARTS["gptq"].off(config)).on(lm):
        nearest = {name: lm.model.get_submodule(name).weight for name in weights}
    first = "model.layers.0."  # the inputs of the first block's first linears are those of the plain model
    inputs = inputs_of(lm, prefix)
    for name in (f"{first}self_attn.q_proj", f"{first}self_attn.v_proj"):
        own_error, error = ((inputs[name] @ (given[name] - weights[name]).T).square().sum() for given in (own, nearest))
        assert own_error < 0.9 * error
        assert (own[name] - weights[name]).square().sum() > (nearest[name] - weights[name]).square().sum()


def test_gptq_loses_less_than_the_nearest_codes_over_all_linears(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the outputs on the inputs that each was fitted to: (W - Q) X^T X (W - Q)^T, in the mean over the linears."""
    hessians, ratios = list[Tensor](), list[float]()
    of, codes_of = gptq.Columns.of, gptq.gptq_codes

    def error(weight: Tensor, rounded: QuantizedWeight) -> float:
        lost = weight.double() - rounded.dequantize().double()
        return float(((lost @ hessians[-1]) * lost).sum())

    def judged(weight: Tensor, nearest: QuantizedWeight, *rest: Any) -> Tensor:
        codes = codes_of(weight, nearest, *rest)
        ratios.append(error(weight, replace(nearest, codes=codes)) / error(weight, nearest))
        return codes

    monkeypatch.setattr(gptq.Columns, "of", lambda h, *options: hessians.append(h) or of(h, *options))
    monkeypatch.setattr(gptq, "gptq_codes", judged)
    lm = tiny()
    list(
        fit_blocks(lm, Prefix.empty(), FittedQuantizer(with_gptq(replace(PLAIN, weights=W4)), fits={"gptq": {}}), TEXTS)
    )
    assert len(ratios) == len(lm.linears())
    assert sum(ratios) / len(ratios) < 0.9


@torch.no_grad()
@pytest.mark.parametrize("order", COLUMN_ORDERS)
@pytest.mark.parametrize("groups", [None, 3])
def test_gptq_gives_the_codes_of_repeated_least_squares(
    monkeypatch: pytest.MonkeyPatch, order: str, groups: int | None
) -> None:
    """Each column is rounded, and all that follow it become the least-squares fit to what is left of the output."""
    monkeypatch.setattr(gptq, "COLUMNS", 4)  # 6 columns: one whole block and part of another
    weight = random_values(5, 6, seed=2).double()
    inputs = random_values(200, 6).double() @ random_values(6, 6, seed=1).double()
    grid = Grid(3, True)
    granularity = "per_channel" if groups is None else "per_group"
    nearest = quantize_weight(weight, grid, granularity, groups or 128)
    found = gptq.Columns.of(2 * inputs.T @ inputs, 1e-12, order)
    codes = gptq.gptq_codes(weight, nearest, found, grid).reshape(5, 6)
    scale = nearest.scale.double().expand(nearest.codes.shape).reshape(5, 6)
    columns = list(range(6)) if order == "given" else inputs.square().sum(0).argsort(descending=True).tolist()
    assert order == "given" or columns != list(range(6))
    wanted, left = torch.empty(5, 6).double(), weight @ inputs.T  # (out, tokens): what is not yet made
    for place, column in enumerate(columns):
        rest = torch.linalg.lstsq(inputs[:, columns[place:]], left.T).solution.T  # (out, columns that are left)
        wanted[:, column] = (rest[:, 0] / scale[:, column]).round().clamp(-3, 3)
        left = left - (wanted[:, column] * scale[:, column])[:, None] * inputs[:, column]
    assert torch.equal(codes.double(), wanted)
    assert not torch.equal(codes, nearest.codes.reshape(5, 6))


def test_inputs_of_zero_or_of_no_common_part_have_the_nearest_codes_and_those_that_say_nothing_are_refused() -> None:
    weight, grid = random_values(5, 6).double(), Grid(3, True)
    nearest = quantize_weight(weight, grid, "per_channel")
    inputs = gptq.Columns.of(torch.zeros(6, 6).double(), 0.01, "diagonal")
    codes = gptq.gptq_codes(weight, nearest, inputs, grid)
    assert torch.equal(codes, nearest.codes)
    for order in COLUMN_ORDERS:  # inputs that do not depend on each other: no column can make good another's error
        alone = gptq.Columns.of(3 * torch.eye(6).double(), 0.01, order)
        assert torch.equal(gptq.gptq_codes(weight, nearest, alone, grid), nearest.codes)
    with pytest.raises(CalibrationError, match=r"not positive definite with quantizer.weights.damping=1e-30"):
        gptq.Columns.of(torch.ones(6, 6).double(), 1e-30, "given")


def test_one_gram_matrix_serves_all_linears_that_read_one_input(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a block of four experts: one for query, key and value, one for output, and two for every expert."""
    formed: list[int] = []
    of = gptq.Columns.of
    monkeypatch.setattr(
        gptq.Columns, "of", lambda hessian, *options: formed.append(len(hessian)) or of(hessian, *options)
    )
    for family, count in (("llama", 4), ("mixtral", 2 + 2 * 4)):
        lm = tiny(family)
        fitted = FittedQuantizer(with_gptq(replace(PLAIN, weights=W4)), fits={"gptq": {}})
        list(fit_blocks(lm, Prefix.empty(), fitted, TEXTS))
        assert fitted.fits["gptq"].keys() == lm.linears().keys()
        assert len(formed) == count * len(lm.blocks)
        formed.clear()


@pytest.mark.parametrize(
    ("family", "of_one_kind"),
    [
        ("mixtral", ["self_attn.[qkv]_proj", "self_attn.o_proj", r"mlp.experts.\d.(gate|up)_proj", ".*down_proj"]),
        ("qwen2_moe", ["self_attn.[qkv]_proj", "self_attn.o_proj", ".*(gate|up)_proj", ".*down_proj"]),
        ("starcoder2", ["self_attn.[qkv]_proj", "self_attn.c_proj", "mlp.c_fc", "mlp.c_proj"]),
    ],
)
def test_a_stage_has_readers_of_one_norm_or_one_place_in_all_experts(
    tiny: Tiny, family: str, of_one_kind: list[str]
) -> None:
    """One name at two places, such as `c_proj` here, is two stages."""
    lm, first = tiny(family), "model.layers.1."
    names = [name.replace("attn.o_proj", "attn.c_proj") if "c_" in of_one_kind[1] else name for name in lm.linears()]
    own = [name.removeprefix(first) for name in names if name.startswith(first)]
    called = list(map(first.__add__, own))
    turn: Any = SimpleNamespace(work=SimpleNamespace(lm=lm), index=1, sites=dict.fromkeys(called))
    expected = [[first + name for name in own if re.fullmatch(pattern, name)] for pattern in of_one_kind]
    assert gptq.stages(turn, called) == expected
    assert sum(map(len, expected)) == len(own)


@pytest.mark.parametrize(
    ("family", "in_order"),
    [
        ("phi3", [["qkv_proj"], ["o_proj"], ["gate_up_proj"], ["down_proj"]]),  # which defines o_proj first
        ("mixtral", [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"] * 4, ["down_proj"] * 4]),
    ],
)
def test_stages_are_in_the_order_in_which_a_block_calls_its_linears(
    tiny: Tiny, family: str, in_order: list[list[str]]
) -> None:
    lm, fitted = tiny(family), FittedQuantizer(with_gptq(replace(PLAIN, weights=W4)), fits={"gptq": {}})
    found: list[list[str]] = []

    def take(turn: Turn) -> None:
        found.extend(gptq.stages(turn, turn.called()))
        fit_block(turn)

    next(walk(lm, Prefix.empty(), fitted, TEXTS, take))
    assert [sorted(name.rpartition(".")[2] for name in stage) for stage in found] == list(map(sorted, in_order))


@torch.no_grad()
def test_true_sequential_rounds_a_linear_to_what_those_before_it_have_become(tiny: Tiny) -> None:
    """The codes of the last linear of a block follow from its input behind the rounded weights of all others."""
    lm, codes = tiny(), dict[bool, dict[str, Tensor]]()
    before = snapshot(lm)
    for sequential in (False, True):
        config = with_gptq(replace(PLAIN, weights=W4), true_sequential=sequential)
        fitted = FittedQuantizer(config, fits={"gptq": {}})
        list(fit_blocks(lm, Prefix.empty(), fitted, TEXTS))
        codes[sequential] = fitted.fits["gptq"]
    assert_untouched(lm, before)
    name = "model.layers.0.mlp.down_proj"
    linear = lm.linears()[name]
    weight = linear.weight.clone()
    with replace(fitted, config=replace(config, targets=[one for one in LEAVES if one != "down_proj"])).on(lm):
        inputs = inputs_of(lm, Prefix.empty())[name].double()
    nearest = quantize_weight(weight, Grid(4, True), "per_channel")
    columns = gptq.Columns.of(2 * inputs.T @ inputs, 0.01, "given")
    expected = gptq.gptq_codes(weight, nearest, columns, Grid(4, True))
    assert (codes[True][name] != expected).float().mean() < 0.01
    first = [name.replace("mlp.down_proj", f"self_attn.{leaf}_proj") for leaf in "qkv"]
    assert all(torch.equal(codes[True][one], codes[False][one]) for one in first)
    assert not torch.equal(codes[True][name], codes[False][name])


class KilledError(Exception):
    pass


def test_a_killed_fitting_goes_on_with_the_next_block(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, config = tiny(), with_gptq(QuantizerConfig(weights=W4))
    calibration = Calibration(calibrated(lm, TEXTS), "ranges", 0.0)
    step = FittingStep(Prefix.empty(), config, calibration, frozenset(), TEXTS)
    monkeypatch.setattr(Checkpoint, "due", lambda self: True)
    fits: list[int] = []

    def fit(turn: Turn, stop: int = 1) -> dict[str, Tensor]:
        if turn.index == stop:
            raise KilledError
        fits.append(turn.index)
        return whole_fit(turn)

    whole_fit = gptq.GPTQ.fit
    whole = compute(step, Context(lm, ArtifactStore(tmp_path / "whole"), lambda event: None))
    interrupted = Context(lm, ArtifactStore(tmp_path / "interrupted"), lambda event: None)
    monkeypatch.setattr(gptq.GPTQ, "fit", fit)
    with pytest.raises(KilledError):
        compute(step, interrupted)
    monkeypatch.setattr(gptq.GPTQ, "fit", lambda turn: fit(turn, stop=-1))
    again = compute(step, interrupted)
    assert fits == [0, 1, 2]
    assert again.fits["gptq"].keys() == lm.linears().keys()
    assert all(torch.equal(codes, again.fits["gptq"][name]) for name, codes in whole.fits["gptq"].items())


def test_what_is_not_fitted_is_refused(tiny: Tiny) -> None:
    config = with_gptq(QuantizerConfig(weights=W4, activations=ActivationConfig(bits=None)))
    message = r"quantizer.weights.method=gptq, which was not fitted: fit it block by block"
    with pytest.raises(CalibrationError, match=message), FittedQuantizer(config).on(tiny()):
        pass
    message = r"quantizer.weights.method=gptq found nothing for model.layers.0.self_attn.q_proj"
    with pytest.raises(CalibrationError, match=message), FittedQuantizer(config, fits={"gptq": {}}).on(tiny()):
        pass
    assert config.is_fitted and config.needs_calibration_text
    with pytest.raises(
        ConfigError, match=r"quantizer.qfem.search=true cannot be used with quantizer.weights.method=gptq"
    ):
        with_gptq(QuantizerConfig(weights=W4, qfem=QFeMConfig(search=True)))
    with pytest.raises(
        ConfigError, match=r"quantizer.weights.method=gptq is fitted block by block, which takes too long"
    ):
        RunConfig(
            quantizer=with_gptq(QuantizerConfig(weights=W4)),
            search=SearchConfig(method="greedy"),
            tuning=TuningConfig(method="prefix", steps=1, ranges="static"),
        )
    with pytest.raises(ConfigError, match=r"no weights to round with quantizer.weights.bits=null"):
        with_gptq(QuantizerConfig(weights=WeightConfig(None)))


KEPT_ALONE = {"rotation": "hadamard", "input_rotation": "down_and_heads", "head_rotation": "values"}


def test_one_fitting_of_weights_alone_serves_all_that_differs_in_activations(text_file: Path, tmp_path: Path) -> None:
    """And it is that of the quantizer without activations."""

    def fittings(**changes: Any) -> tuple[RunConfig, list[str]]:
        config = small_config(text_file, tmp_path / "out")
        weights = replace(W4, method="gptq", fitted_with=changes.pop("fitted_with", "weights"))
        config.quantizer = QuantizerConfig("mine", weights, calibration=config.quantizer.calibration, **changes)
        result = pipeline.run(config)
        assert result.status == "completed" and result.warnings == []
        return config, sorted(path.name for path in (tmp_path / "out" / "cache" / "fitting").iterdir() if path.is_dir())

    static, token = ActivationConfig(8), ActivationConfig(4, "per_token", "dynamic")
    _, alone = fittings(fitted_with="everything", activations=ActivationConfig(None))
    for changes in ({"activations": static}, {"activations": token, "kv_cache": KvCacheConfig(4)}):
        assert fittings(**changes)[1] == alone
    assert len(fittings(activations=static, smoothing_alpha=0.5)[1]) == 2
    assert len(fittings(activations=token, smoothing_alpha=0.5)[1]) == 2
    assert len(fittings(activations=static, rotation_sites="adaptive", **KEPT_ALONE)[1]) == 3
    searched = replace(static, estimator="mse")
    _, before = fittings(activations=searched, rotation_sites="adaptive", **KEPT_ALONE)
    assert len(before) == 3
    config, after = fittings(fitted_with="everything", activations=token)
    (everything,) = set(after) - set(before)
    own, other = (
        load_file(config.paths.cache / "fitting" / name / "fits.safetensors") for name in (*alone, everything)
    )
    assert own.keys() == other.keys() and any(not torch.equal(own[name], other[name]) for name in own)


def test_what_is_rounded_meanwhile_is_told_where_it_decides_nothing_and_refused_with_searched_ranges() -> None:
    weights = replace(W4, fitted_with="weights")
    message = r"estimator=block_output searches ranges while .* quantizer.weights.fitted_with=weights rounds no act"
    with pytest.raises(ConfigError, match=message):
        QuantizerConfig(weights=replace(weights, method="gptq"), activations=ActivationConfig(estimator="block_output"))
    for changes, why in (
        ({}, "with quantizer.weights.method=rtn"),
        ({"activations": None}, "with nothing else rounded"),
    ):
        activations = ActivationConfig(None if "activations" in changes else 8)
        own = replace(weights, method="gptq") if "activations" in changes else weights
        told = options_without_effect(RunConfig(quantizer=QuantizerConfig(weights=own, activations=activations)))
        assert f"quantizer.weights.fitted_with='weights' has no effect {why}" in told
    branch = QuantizerConfig(weights=weights, compensation=CompensationConfig("aser", 4))
    assert not [line for line in options_without_effect(RunConfig(quantizer=branch)) if "fitted_with" in line]
