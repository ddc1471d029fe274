"""Scales of clusters of channels (RPTQ), and of single channels: what K-means finds, and what is quantized with it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import calibrated, random_texts, random_values
from torch import Tensor
from torch.nn import functional
from untouched import assert_untouched, snapshot

from cushion.activations import observe_inputs
from cushion.config import (
    ActivationConfig,
    QuantizerConfig,
    ReconstructionConfig,
    RunConfig,
    TuningConfig,
    WeightConfig,
)
from cushion.config.search import SearchConfig
from cushion.config_warnings import options_without_effect
from cushion.errors import CalibrationError, ConfigError
from cushion.evaluation.prefix_as_tokens import beyond_range
from cushion.execution.int8 import unsupported
from cushion.export.schemes import scheme_of
from cushion.models import LanguageModel
from cushion.prefix import Prefix
from cushion.quantization.clusters import cluster_channels, cluster_ranges
from cushion.quantization.fitted import FittedQuantizer
from cushion.quantization.identity import quantizer_identity
from cushion.quantization.input_statistics import fitted_behind
from cushion.quantization.learned import Learned
from cushion.quantization.linear import ActivationQuantizer, QuantizedLinear
from cushion.quantization.numerics import Grid, fake_quantize
from cushion.quantization.simulate import quantized
from cushion.tuning_ranges import tuning_quantizer

Tiny = Callable[..., LanguageModel]
TEXTS = random_texts(3, 24)
FULL = WeightConfig(bits=None)


def quantizer(granularity: str, clusters: int = 32, **changes: Any) -> QuantizerConfig:
    own = ActivationConfig(bits=4, granularity=granularity, clusters=clusters, symmetric=False)
    return QuantizerConfig("under_test", **{"weights": FULL, "activations": own, **changes})


@torch.no_grad()
def logits(lm: LanguageModel, behind: Prefix | None = None) -> Tensor:
    cache = (behind or Prefix.empty()).cache(lm.model, len(TEXTS))
    return lm.model(TEXTS, past_key_values=cache, use_cache=True).logits


def under(lm: LanguageModel, fitted: FittedQuantizer, behind: Prefix | None = None) -> Tensor:
    with fitted.on(lm):
        return logits(lm, behind)


def test_three_separated_ranges_are_three_clusters() -> None:
    own = torch.randint(0, 3, (60,), generator=torch.Generator().manual_seed(1))
    noise = random_values(2, 60, seed=2).clamp(-2, 2)
    low = torch.tensor([-1.0, 0.0, -90.0])[own] + 0.1 * noise[0]
    high = torch.tensor([1.0, 40.0, -50.0])[own] + 0.1 * noise[1]
    labels = cluster_channels(low, high, 3, seed=0)
    assert len(set(zip(labels.tolist(), own.tolist(), strict=True))) == 3
    lowest, highest = cluster_ranges(low, high, 3, seed=0)
    for cluster in range(3):
        members = own == cluster
        assert (lowest[members] == low[members].min()).all()
        assert (highest[members] == high[members].max()).all()


def test_no_other_partition_of_a_few_points_is_better() -> None:
    low, high = -random_values(7, seed=3).abs(), random_values(7, seed=4).abs()
    points = torch.stack([high, low], dim=1).double()

    def spread(labels: Tensor) -> float:
        groups = [points[labels == label] for label in labels.unique()]
        return sum(float((group - group.mean(0)).square().sum()) for group in groups)

    every = [torch.tensor(labels) for labels in itertools.product(range(3), repeat=7)]
    found = cluster_channels(low, high, 3, seed=0)
    assert spread(found) == pytest.approx(min(spread(labels) for labels in every))


def test_clusters_join_ranges_and_depend_on_nothing_but_ranges_and_seed() -> None:
    low, high = -random_values(200, seed=5).exp(), random_values(200, seed=6).exp()
    lowest, highest = cluster_ranges(low, high, 8, seed=0)
    assert (lowest <= low).all() and (highest >= high).all()
    assert len(torch.unique(torch.stack([lowest, highest]), dim=1).T) <= 8
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    labels = cluster_channels(low, high, 8, seed=0)
    assert set(labels.tolist()) == set(range(8))
    assert torch.equal(labels, cluster_channels(low.clone(), high.clone(), 8, seed=0))
    assert set(cluster_channels(low[order], high[order], 8, seed=1).tolist()) == set(range(8))
    constant = torch.ones(5)
    for clusters in (1, 3, 5, 9):  # fewer points that differ than clusters
        assert torch.equal(cluster_ranges(constant, constant, clusters, seed=0)[0], constant)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_one_cluster_is_per_tensor_and_as_many_as_channels_are_per_channel(tiny: Tiny, family: str) -> None:
    lm = tiny(family)
    before, ranges = snapshot(lm), calibrated(lm, TEXTS)
    for changes in ({}, {"smoothing_alpha": 0.5}):
        found = {
            name: under(lm, FittedQuantizer(config, ranges))
            for name, config in {
                "tensor": quantizer("per_tensor", **changes),
                "one": quantizer("per_cluster", 1, **changes),
                "four": quantizer("per_cluster", 4, **changes),
                "every": quantizer("per_cluster", 64, **changes),
                "channel": quantizer("per_channel", **changes),
            }.items()
        }
        assert torch.equal(found["one"], found["tensor"])
        assert torch.equal(found["every"], found["channel"])
        assert not torch.equal(found["four"], found["tensor"]) and not torch.equal(found["four"], found["channel"])
    assert_untouched(lm, before)


def test_each_channel_is_rounded_in_the_range_of_its_cluster_and_readers_share_it(tiny: Tiny) -> None:
    lm, seen = tiny(), dict[str, Tensor]()
    ranges = calibrated(lm, TEXTS)
    names = [f"model.layers.0.self_attn.{kind}_proj" for kind in "qkvo"]
    linears = {name: lm.model.get_submodule(name) for name in names}
    with observe_inputs(linears, lambda name, values: seen.update({name: values.clone()})):
        logits(lm)
    with quantized(lm, quantizer("per_cluster", 4), ranges):
        placed = {name: lm.model.get_submodule(name) for name in names}
        for name, module in placed.items():
            values, low, high = seen[name], ranges.minimum[name], ranges.maximum[name]
            labels = cluster_channels(low, high, 4, seed=0)
            rounded = torch.empty_like(values)
            for cluster in range(4):
                own = labels == cluster
                scale = (high[own].max() - low[own].min()) / 15
                rounded[..., own] = fake_quantize(values[..., own], scale, low[own].min(), Grid(4, False))
            expected = functional.linear(rounded, linears[name].weight)
            torch.testing.assert_close(module(values), expected)
            order = labels.argsort(stable=True)  # as it is run: channels permuted, so that a cluster is a slice
            by_slice = functional.linear(rounded[..., order], linears[name].weight[:, order])
            torch.testing.assert_close(module(values), by_slice)
        query, key, value, output = (placed[name].activation for name in names)
        assert query is key is value is not output


@pytest.mark.parametrize("changes", [{"input_rotation": "all"}, {"rotation": "hadamard", "smoothing_alpha": 0.5}])
def test_rotated_inputs_have_the_ranges_of_what_is_read(tiny: Tiny, changes: dict[str, Any]) -> None:
    """Nothing is clipped on the calibration text, and the finer scales hold every channel tightly."""
    lm, prefix = tiny(), Prefix.from_tokens(tiny().model, [3, 5], {})
    config = quantizer("per_channel", **changes)
    fitted = fitted_behind(lm, prefix, config, TEXTS)
    linears, seen = list(lm.linears()), dict[str, list[Tensor]]()
    plain = replace(fitted, config=quantizer("per_channel", activations=ActivationConfig(bits=None), **changes))
    with plain.on(lm):
        modules = {name: lm.model.get_submodule(name) for name in linears}
        with observe_inputs(modules, lambda name, values: seen.setdefault(name, []).append(values.flatten(0, -2))):
            for text in TEXTS:
                lm.body(text[None], past_key_values=prefix.cache(lm.model), use_cache=True)
    with fitted.on(lm):
        for name in linears:
            module = lm.model.get_submodule(name)
            assert isinstance(module, QuantizedLinear) and module.activation is not None
            assert module.activation.parameters is not None
            scale, offset = module.activation.parameters
            values = torch.cat(seen[name])
            torch.testing.assert_close(offset, values.amin(0), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(scale * 15, values.amax(0) - values.amin(0), rtol=1e-4, atol=1e-5)


def test_a_prefix_changes_the_clusters_and_its_own_positions_enter_none(tiny: Tiny) -> None:
    lm, config = tiny(), quantizer("per_cluster", 4)
    prefix = Prefix.from_tokens(lm.model, [3, 5, 9], {})
    behind = fitted_behind(lm, prefix, config, TEXTS)
    assert torch.equal(
        under(lm, behind, prefix), under(lm, FittedQuantizer(config, calibrated(lm, TEXTS, prefix)), prefix)
    )
    assert not torch.equal(
        under(lm, behind, prefix), under(lm, fitted_behind(lm, Prefix.empty(), config, TEXTS), prefix)
    )


def test_gradients_pass_where_a_channel_is_not_clipped() -> None:
    low, high = torch.tensor([-1.0, -10.0]), torch.tensor([1.0, 10.0])
    own = ActivationQuantizer(Grid(8, False), "per_cluster", (low, high), straight_through=True)
    values = torch.tensor([[0.5, 0.5], [5.0, 5.0], [-20.0, -20.0]], requires_grad=True)
    own(values).sum().backward()
    assert values.grad is not None and values.grad.tolist() == [[1, 1], [0, 1], [0, 0]]
    assert beyond_range(own, values.detach()) == pytest.approx(20.0)  # of the first channel, not of the second


def test_clusters_are_in_the_identity_exactly_where_they_decide() -> None:
    def identity(config: QuantizerConfig) -> Any:
        return quantizer_identity(config)["activations"]

    one, other = quantizer("per_cluster", 4), quantizer("per_cluster", 8)
    assert identity(one) != identity(other)
    seeded = replace(one, activations=replace(one.activations, cluster_seed=1))
    assert identity(one) != identity(seeded)
    assert identity(quantizer("per_channel", 4)) == identity(quantizer("per_channel", 8))
    assert "clusters" not in identity(quantizer("per_tensor"))
    told = options_without_effect(RunConfig(quantizer=quantizer("per_tensor", 4)))
    assert "quantizer.activations.clusters=4 has no effect with quantizer.activations.granularity=per_tensor" in told
    assert one.scheme == "under_test W16A4 4 clusters" and "per channel" in quantizer("per_channel").scheme


def test_tuning_computes_one_range_for_each_tensor_on_the_fly_or_estimates_the_clusters_anew() -> None:
    config = quantizer("per_cluster", 4)
    dynamic = tuning_quantizer(TuningConfig(ranges="dynamic"), config).activations
    assert (dynamic.granularity, dynamic.range) == ("per_tensor", "dynamic")
    assert tuning_quantizer(TuningConfig(ranges="static"), config) == config


@pytest.mark.parametrize("granularity", ["per_cluster", "per_channel"])
def test_what_has_one_scale_for_each_input_is_refused_with_the_way_out(tiny: Tiny, granularity: str) -> None:
    own = quantizer(granularity, weights=WeightConfig())
    integers = replace(own, activations=replace(own.activations, bits=8, symmetric=True, narrow_range=False))
    assert "several scales within one sum: set it to per_tensor" in (unsupported(integers) or "")
    key = rf"quantizer\.activations\.granularity={granularity}"
    with pytest.raises(ConfigError, match=rf"{key}: an input has one scale there; run with .*=per_tensor"):
        scheme_of(integers)
    with pytest.raises(ConfigError, match=rf"reconstruction=scales learns one scale for each input, and {key}"):
        RunConfig(quantizer=own, reconstruction=ReconstructionConfig(name="scales", method="blockwise"))
    with pytest.raises(ConfigError, match=rf"{key} has several: use tuning\.ranges=dynamic or static"):
        search, tuning = SearchConfig(method="bos"), TuningConfig(method="prefix", ranges="learned", steps=1)
        RunConfig(quantizer=own, search=search, tuning=tuning)
    with pytest.raises(ConfigError, match=rf"rotation_sites=adaptive .*{key} has several: use .*=all"):
        replace(own, rotation_sites="adaptive", input_rotation="down")
    with pytest.raises(ConfigError, match=r"quantizer\.activations\.range='dynamic'.*set static"):
        ActivationConfig(granularity=granularity, range="dynamic")
    with pytest.raises(ConfigError, match=r"quantizer\.activations\.estimator='mse'.*choose minmax"):
        ActivationConfig(granularity=granularity, estimator="mse")
    lm, ends = tiny(), (torch.tensor(-1.0), torch.tensor(1.0))
    learned = Learned({"model.layers.0.mlp.up_proj": ends})
    with pytest.raises(CalibrationError, match=rf"ranges that were learned, .*{key} has several"):
        under(lm, FittedQuantizer(own, calibrated(lm, TEXTS), learned=learned))


def test_numbers_that_cannot_be_are_refused() -> None:
    for change in ({"clusters": 0}, {"cluster_seed": -1}, {"cluster_seed": 2**32}):
        (name,) = change
        with pytest.raises(ConfigError, match=rf"quantizer\.activations\.{name}="):
            ActivationConfig(granularity="per_cluster", **change)
