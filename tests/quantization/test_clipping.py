"""AWQ's clipping: the error of the outputs recomputed for every share, the least taken, queries and keys left alone."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from helpers import random_texts, random_values
from torch import Tensor

from cushion.config import ActivationConfig, QuantizerConfig, WeightConfig
from cushion.errors import ConfigError
from cushion.models import LanguageModel
from cushion.prefix import Prefix
from cushion.quantization.clipping import SHARES, clipped_shares
from cushion.quantization.fitted import FittedQuantizer
from cushion.quantization.fitting import fit_blocks
from cushion.quantization.numerics import Grid, min_max, quantize_weight
from cushion.quantization.omniquant import clipped_weight
from cushion.quantization.weights import KeptShare

TEXTS = random_texts(3, 16)


def rounded(weight: Tensor, limit: Tensor) -> Tensor:
    return (weight / (limit / 7)).round().clamp(-7, 7) * (limit / 7)


def test_each_group_takes_the_share_with_the_least_error_of_its_part_of_the_output() -> None:
    weight, inputs = random_values(5, 3, 8), random_values(40, 3, 8, seed=1) * torch.logspace(-1, 1, 8)
    products = torch.stack([inputs[:, group].T @ inputs[:, group] for group in range(3)])
    found, shares = clipped_shares(weight, products, Grid(4, True)), set[float]()
    for row in range(5):
        for group in range(3):
            own, read = weight[row, group], inputs[:, group]
            errors = {}
            for share in SHARES:
                lost = rounded(own, own.abs().max() * share) - own
                errors[share] = float((read @ lost).square().sum())
            best = min(errors, key=errors.__getitem__)
            assert float(found[row, group]) == pytest.approx(best)
            shares.add(best)
    assert len(shares) > 3


@pytest.mark.parametrize("levels", ["full", "paper"])
def test_all_of_a_range_is_min_max(levels: str) -> None:
    weight, grid = random_values(5, 24) + 0.5, Grid(4, True, levels)
    all_of_it = KeptShare(torch.ones(5, 3, 1))
    for granularity, ranges in (("per_group", all_of_it), ("per_channel", KeptShare(torch.ones(5, 1)))):
        found, expected = (quantize_weight(weight, grid, granularity, 8, one) for one in (ranges, min_max))
        assert torch.equal(found.scale, expected.scale) and torch.equal(found.codes, expected.codes)
    plain = quantize_weight(weight, grid, "per_channel").dequantize()
    torch.testing.assert_close(clipped_weight(weight, (-1,), None, grid), plain)


@pytest.mark.parametrize("granularity", ["per_channel", "per_group"])
def test_the_linears_of_a_model_are_clipped_but_for_queries_and_keys(
    tiny: Callable[..., LanguageModel], granularity: str
) -> None:
    lm = tiny("llama")
    linears = lm.linears()
    prefix = Prefix.from_tokens(lm.model, [17, 42])
    plain = QuantizerConfig(
        weights=WeightConfig(3, granularity, 16), activations=ActivationConfig(None), smoothing_alpha=None
    )
    clipped = replace(plain, weights=replace(plain.weights, estimator="output"))
    fitted = FittedQuantizer(clipped, fits={"clipping": {}})
    deque(fit_blocks(lm, prefix, fitted, TEXTS), maxlen=0)
    kept = {name for name in linears if name.endswith(("q_proj", "k_proj"))}
    assert fitted.fits["clipping"].keys() == linears.keys() - kept
    weights = []
    for one in (FittedQuantizer(plain), fitted):
        with one.on(lm):
            weights.append({name: lm.model.get_submodule(name).weight.detach() for name in linears})
    assert {name for name in kept if torch.equal(weights[0][name], weights[1][name])} == kept
    for name in linears.keys() - kept:
        shares = fitted.fits["clipping"][name]
        expected = rounded_to_three_bits(linears[name].weight.detach(), shares)
        torch.testing.assert_close(weights[1][name], expected)
        assert bool((shares < 0.99).any()) and bool((shares <= 1).all())


def rounded_to_three_bits(weight: Tensor, shares: Tensor) -> Tensor:
    groups = weight.unflatten(1, (shares.shape[1], -1))
    limit = groups.abs().amax(2, keepdim=True) * shares
    return ((groups / (limit / 3)).round().clamp(-3, 3) * (limit / 3)).flatten(1)


def test_it_goes_with_gptq_and_is_refused_per_tensor(tiny: Callable[..., LanguageModel]) -> None:
    lm = tiny("llama")
    weights = WeightConfig(3, "per_channel", estimator="output", method="gptq")
    config = QuantizerConfig(weights=weights, activations=ActivationConfig(None))
    fitted = FittedQuantizer(config, fits={"clipping": {}, "gptq": {}})
    deque(fit_blocks(lm, Prefix.empty(), fitted, TEXTS), maxlen=0)
    name = "model.layers.0.mlp.up_proj"
    limit = lm.linears()[name].weight.abs().amax(1, keepdim=True) * fitted.fits["clipping"][name][:, 0]
    with fitted.on(lm):
        values = lm.model.get_submodule(name).weight / (limit / 3)
    torch.testing.assert_close(values, fitted.fits["gptq"][name], atol=1e-4, rtol=0)
    with pytest.raises(ConfigError, match=r"weights.granularity='per_tensor'.*per_channel or per_group"):
        QuantizerConfig(weights=WeightConfig(4, estimator="output"))
