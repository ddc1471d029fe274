"""Low-rank compensation: the branch is the best of its rank in the norm of its method, and adds to any quantizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import calibrated, random_texts, random_values
from torch import Tensor

from cushion.activations import observe_inputs
from cushion.config import ActivationConfig, CompensationConfig, QuantizerConfig, RunConfig, WeightConfig
from cushion.config_warnings import options_without_effect
from cushion.errors import CalibrationError, ConfigError
from cushion.models import LanguageModel
from cushion.prefix import Prefix
from cushion.quantization.compensation import cholesky_factor, low_rank, outlier_scales, product
from cushion.quantization.fitted import FittedQuantizer
from cushion.quantization.fitting import fit_blocks
from cushion.quantization.numerics import Grid, quantize_weight
from cushion.quantization.parts.compensation import COMPENSATIONS
from cushion.quantization.parts.registry import PARTS
from cushion.quantization.rotation import rotated

Tiny = Callable[..., LanguageModel]
TEXTS = random_texts(3, 24, seed=5)
START = [256, 10]
W4 = WeightConfig(4, "per_channel")
FULL = ActivationConfig(bits=None)
TOKEN = ActivationConfig(8, "per_token", "dynamic")
FIRST = "model.layers.0.self_attn."


def size(values: Tensor) -> float:
    """The squared Frobenius norm."""
    return float(values.square().sum())


def test_the_branch_is_the_best_of_its_rank_for_the_outputs() -> None:
    """Eckart and Young on the outputs themselves, then least squares; the branch of plain SVD is worse there."""
    error = random_values(7, 6, seed=2).double()
    inputs = random_values(200, 6).double() @ random_values(6, 6, seed=1).double()
    factor = cholesky_factor(inputs.T @ inputs, 1e-14)
    before = size(error @ inputs.T)
    for rank in range(1, 7):
        branch = product(low_rank(error, factor, rank, None), 7)
        assert torch.linalg.matrix_rank(branch) == rank
        left, singular, right = torch.linalg.svd(error @ inputs.T, full_matrices=False)
        outputs = left[:, :rank] * singular[:rank] @ right[:rank]
        wanted = torch.linalg.lstsq(inputs, outputs.T).solution.T
        torch.testing.assert_close(branch, wanted, rtol=1e-6, atol=1e-9)
        plain = product(low_rank(error, torch.eye(6).double(), rank, None), 7)
        rest = size((error - branch) @ inputs.T)
        if rank < 6:
            assert rest < 0.95 * size((error - plain) @ inputs.T)
            assert size(error - plain) < size(error - branch)
        assert rest < before
        before = rest
    assert before < 1e-20


def test_a_share_of_the_singular_values_decides_the_rank() -> None:
    left, right = (torch.linalg.qr(random_values(5, 5, seed=seed).double())[0] for seed in (1, 2))
    error = left @ torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0, 0.0]).double()) @ right
    identity = torch.eye(5).double()
    for share, rank in ((0.4, 1), (0.41, 2), (0.7, 2), (0.9, 3), (0.91, 4)):
        assert len(low_rank(error, identity, None, share - 1e-9)) == rank
    assert len(low_rank(error, identity, 3, 1.0)) == 3
    assert len(low_rank(error, identity, None, 0.1, least=2)) == 2


def test_outliers_are_the_largest_in_input_and_weight_together_and_never_dead() -> None:
    magnitudes = torch.tensor([8.0, 1.0, 0.0, 2.0])
    weight = torch.tensor([[1.0, -1.0, 9.0, 1.0], [-1.0, 1.0, 9.0, -1.0]])
    assert outlier_scales(magnitudes, weight, 2).tolist() == [4.0, 0.0, 0.0, 1.0]
    assert outlier_scales(magnitudes, weight, 9).tolist() == [8.0, 1.0, 0.0, 2.0]
    assert outlier_scales(magnitudes, weight * torch.tensor([0.1, 1, 1, 1]), 1).tolist() == [0.0, 0.0, 0.0, 1.0]


def test_inputs_that_do_not_tell_columns_apart_are_refused() -> None:
    with pytest.raises(CalibrationError, match=r"not positive definite with quantizer.compensation.damping=1e-30"):
        cholesky_factor(torch.ones(4, 4).double(), 1e-30)


def fitted_to(lm: LanguageModel, config: QuantizerConfig) -> tuple[FittedQuantizer, Prefix]:
    prefix = Prefix.from_tokens(lm.model, START)
    with rotated(lm, config.rotation, config.rotation_seed):
        ranges = calibrated(lm, TEXTS, prefix)
    fitted = FittedQuantizer(config, ranges, fits={part.name: {} for part in config.blockwise})
    assert list(fit_blocks(lm, prefix, fitted, TEXTS)) == [1, 2, 3]
    return fitted, prefix


def logits(lm: LanguageModel, prefix: Prefix) -> Tensor:
    return lm.logits(lm.body(TEXTS[:1], past_key_values=prefix.cache(lm.model), use_cache=True).last_hidden_state)


FULL_RANK: dict[str, dict[str, Any]] = {
    "lqer": {},
    "l2qer": {"rank": None, "share": 1.0},
    "aser": {"damping": 1e-6},
    "outliers": {"method": "aser", "outliers": 5},
}


@torch.no_grad()
@pytest.mark.parametrize("name", FULL_RANK)
def test_a_branch_of_full_rank_leaves_no_error_of_the_weights(tiny: Tiny, name: str) -> None:
    lm = tiny()
    compensation = CompensationConfig(**{"method": name, "rank": 10_000, **FULL_RANK[name]})
    config = QuantizerConfig(weights=WeightConfig(8), activations=FULL, compensation=compensation)
    fitted, prefix = fitted_to(lm, config)
    before = logits(lm, prefix)
    with FittedQuantizer(PARTS["compensation"].off(config)).on(lm):
        assert not torch.allclose(logits(lm, prefix), before, atol=1e-3)
    with fitted.on(lm):
        torch.testing.assert_close(logits(lm, prefix), before, rtol=1e-4, atol=1e-4)


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gptq": {"weights": replace(W4, method="gptq")},
    "smoothed, 3 bits in groups": {"weights": WeightConfig(3, "per_group", 16), "smoothing_alpha": 0.5},
    "rotated": {"rotation": "hadamard", "input_rotation": "all"},
    "mxfp4": {"weights": WeightConfig(4, "per_block", format="mxfp4")},
}


def weights_and_inputs(lm: LanguageModel, fitted: FittedQuantizer, prefix: Prefix) -> dict[str, tuple[Tensor, Tensor]]:
    """What the linears of the first block multiply with before anything is rounded, and what they read then."""
    found = {}
    with fitted.surroundings(lm):
        linears = {name: lm.model.get_submodule(name) for name in lm.linears() if name.startswith(FIRST)}
        inputs: dict[str, list[Tensor]] = {name: [] for name in linears}
        with observe_inputs(linears, lambda name, values: inputs[name].append(values[0])):
            for text in TEXTS:
                lm.body(text[None], past_key_values=prefix.cache(lm.model), use_cache=True)
        for name, linear in linears.items():
            found[name] = linear.weight.detach().clone(), torch.cat(inputs[name])
    return found


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_each_method_is_the_best_in_its_own_norm_with_any_quantizer(tiny: Tiny, kind: str) -> None:
    """On linears whose inputs no rounding has touched yet: those of the first block that read its first norm."""
    lm = tiny()
    plain = QuantizerConfig(**{"weights": W4, "activations": FULL, "targets": ["q_proj", "v_proj"], **KINDS[kind]})
    names = [f"{FIRST}q_proj", f"{FIRST}v_proj"]
    errors = {}
    for method in COMPENSATIONS:
        config = replace(plain, compensation=CompensationConfig(method, 4, damping=1e-6))
        fitted, prefix = fitted_to(lm, config)
        before = weights_and_inputs(lm, fitted, prefix)
        with fitted.on(lm):
            errors[method] = {name: lm.model.get_submodule(name).weight - before[name][0] for name in names}
    for name in names:
        inputs = before[name][1]
        means = inputs.abs().unflatten(0, (len(TEXTS), -1)).mean(1)
        norms = {"lqer": torch.eye(inputs.shape[1]), "l2qer": means.amax(0).diag(), "aser": inputs.T}
        for method, norm in norms.items():
            found = {one: size(own[name] @ norm) for one, own in errors.items()}
            assert min(found, key=lambda one: found[one]) == method
            assert found[method] < 0.8 * found["none"]


@torch.no_grad()
def test_outliers_are_divided_before_the_input_is_rounded_and_left_to_the_branch(tiny: Tiny) -> None:
    lm, name = tiny(), f"{FIRST}q_proj"
    own = CompensationConfig("aser", 6, outliers=3)
    fitted, prefix = fitted_to(lm, QuantizerConfig(weights=W4, activations=TOKEN, compensation=own))
    weight, inputs = weights_and_inputs(lm, fitted, prefix)[name]
    score = inputs.abs().mean(0) * weight.abs().mean(0)
    chosen = score.topk(3).indices
    divisor = torch.ones(len(score))
    divisor[chosen] = inputs.abs().mean(0)[chosen] / inputs.abs().mean(0)[chosen].min()
    assert divisor.max() > 1.05
    kept = weight.clone()
    kept[:, chosen] = 0
    rounded = quantize_weight(kept, Grid(4, True), "per_channel").dequantize().double()
    smooth = inputs.double() / divisor
    gram = smooth.T @ smooth
    gram.diagonal().add_(0.01 * gram.diagonal().mean())
    factor = torch.linalg.cholesky(gram)
    left, singular, right = torch.linalg.svd((weight * divisor - rounded) @ factor)
    branch = (left[:, :6] * singular[:6]) @ torch.linalg.solve_triangular(factor, right[:6], upper=False, left=False)
    step = (inputs / divisor).abs().amax(-1, keepdim=True) / 127
    wanted = ((inputs / divisor) / step).round() * step @ (rounded + branch).float().T
    with fitted.on(lm):
        torch.testing.assert_close(lm.model.get_submodule(name)(inputs), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        (r"compensation.method='svd' is not allowed", {"method": "svd"}),
        (r"compensation.rank=0 is not allowed", {"rank": 0}),
        (r"compensation.share=1.5 is not allowed", {"share": 1.5}),
        (r"compensation.share=null .* with quantizer.compensation.rank=null give the share", {"rank": None}),
        (r"compensation.damping=0 is not allowed", {"damping": 0}),
        (r"compensation.outliers=65 .* at most quantizer.compensation.rank=64", {"outliers": 65}),
    ],
)
def test_options_are_checked(message: str, change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=message):
        CompensationConfig(**{"method": "aser", **change})


def test_outliers_are_refused_where_something_was_fixed_before_them() -> None:
    own = CompensationConfig("aser", outliers=4)
    with pytest.raises(ConfigError, match=r"outliers=4 changes the inputs .* quantizer.activations.range=dynamic"):
        QuantizerConfig(weights=W4, compensation=own)
    with pytest.raises(ConfigError, match=r"outliers=4 takes channels out of .* quantizer.weights.method=gptq"):
        QuantizerConfig(weights=replace(W4, method="gptq"), activations=TOKEN, compensation=own)
    with pytest.raises(ConfigError, match=r"outliers=4 rounds what it leaves .*estimator=output .*: use minmax or mse"):
        QuantizerConfig(weights=replace(W4, estimator="output"), activations=TOKEN, compensation=own)


def test_a_scheme_names_the_branch_and_idle_options_are_told() -> None:
    config = QuantizerConfig("mine", W4, TOKEN, compensation=CompensationConfig("aser", 32, outliers=4))
    assert config.scheme == "mine W4A8 ASER 32 smoothing 4 channels"
    shared = replace(config, compensation=CompensationConfig("l2qer", None, 0.9, damping=0.1))
    assert shared.scheme == "mine W4A8 L2QER 0.9"
    told = options_without_effect(RunConfig(quantizer=shared))
    assert told == ["quantizer.compensation.damping=0.1 has no effect with quantizer.compensation.method=l2qer"]
    off = replace(shared, weights=WeightConfig(None))
    assert off.scheme == "mine W16A8" and not off.blockwise
    assert "quantizer.compensation.method='l2qer' has no effect with quantizer.weights.bits=null" in (
        options_without_effect(RunConfig(quantizer=off))
    )
