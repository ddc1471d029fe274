"""Scales between two linears: the function stays behind a prefix, the scales recomputed, what does not fit refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from conftest import SMOOTHABLE
from helpers import calibrated, random_texts
from torch import Tensor
from untouched import assert_untouched, snapshot

from cushion.config import ActivationConfig, KvCacheConfig, QuantizerConfig, RunConfig, WeightConfig
from cushion.config_warnings import options_without_effect
from cushion.errors import ConfigError
from cushion.models import LanguageModel
from cushion.prefix import Prefix
from cushion.quantization.check import check_quantizer
from cushion.quantization.fitted import FittedQuantizer

Tiny = Callable[..., LanguageModel]
TEXTS = random_texts(4, 24)
PLAIN = QuantizerConfig(
    weights=WeightConfig(None), activations=ActivationConfig(None), smoothing_alpha=0.6, smoothing_pairs="all"
)
UNGATED = ("gpt_oss", "phi3", "starcoder2", "opt", "bloom", "gpt_neox", "falcon")
"""Families without an up projection of its own, or with a gate that clamps what it gives."""


def pairs_of(family: str) -> str:
    return "values" if family.startswith(UNGATED) else "all"


@torch.no_grad()
def logits(lm: LanguageModel, prefix: Prefix) -> Tensor:
    return lm.model(TEXTS, past_key_values=prefix.cache(lm.model, len(TEXTS)), use_cache=True).logits


@pytest.mark.parametrize("family", SMOOTHABLE)
def test_every_family_computes_the_same_behind_a_tuned_prefix(tiny: Tiny, family: str) -> None:
    lm, generator = tiny(family), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in lm.model.named_parameters():
            if name.endswith("bias"):
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    made = Prefix.from_tokens(lm.model, [17, 42])
    prefix = replace(
        made, values=tuple(one + torch.randn(one.shape, generator=generator) for one in made.values), tuned=True
    )
    before, plain = snapshot(lm), logits(lm, prefix)
    config = replace(PLAIN, smoothing_pairs=pairs_of(family), input_rotation="down")
    with FittedQuantizer(config, calibrated(lm, random_texts(32, 24))).on(lm):  # every expert reads
        torch.testing.assert_close(logits(lm, prefix), plain, rtol=0, atol=1e-4)
        weights = [lm.model.get_submodule(name).weight for name in lm.linears()]
        with pytest.raises(ConfigError, match="smoothing_pairs is on the model"):
            Prefix.from_tokens(lm.model, [17])
    changed = sum(one is not linear.weight for one, linear in zip(weights, lm.linears().values(), strict=True))
    assert changed >= 2 * len(lm.blocks)
    assert_untouched(lm, before)


def test_the_scales_recomputed(tiny: Tiny) -> None:
    lm = tiny("llama")
    block, ranges = lm.blocks[1], calibrated(lm, TEXTS)
    v, o, up, down = block.self_attn.v_proj, block.self_attn.o_proj, block.mlp.up_proj, block.mlp.down_proj
    config = replace(PLAIN, smoothing_alpha=0.5)
    with FittedQuantizer(replace(config, smoothing_pairs="none"), ranges).on(lm):  # columns scaled behind the norms
        old = [linear.weight.clone() for linear in (v, o, up, down)]
    with FittedQuantizer(config, ranges).on(lm):
        new = [linear.weight.clone() for linear in (v, o, up, down)]

    def largest(name: str) -> Tensor:
        return torch.maximum(-ranges.minimum[name], ranges.maximum[name])

    scale = (largest("model.layers.1.mlp.down_proj") / old[3].abs().amax(0)).sqrt()
    torch.testing.assert_close(new[2], old[2] / scale[:, None], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(new[3], old[3] * scale, rtol=1e-4, atol=1e-6)
    shape = (2, 2, 8)  # two heads read each of two value heads
    inputs, weight = (
        one.view(shape).amax(1) for one in (largest("model.layers.1.self_attn.o_proj"), old[1].abs().amax(0))
    )
    scale = (inputs / weight).sqrt()
    torch.testing.assert_close(new[0], old[0] / scale.flatten()[:, None], rtol=1e-4, atol=1e-6)
    expected = old[1] * scale.repeat_interleave(2, dim=0).flatten()
    torch.testing.assert_close(new[1], expected, rtol=1e-4, atol=1e-6)


def test_static_ranges_and_rounding_are_those_of_the_scaled_inputs(tiny: Tiny) -> None:
    """A channel of the down projection's input blown up: with the pair its error falls, per tensor and static."""
    lm = tiny("llama")
    with torch.no_grad():
        for block in lm.blocks:
            block.mlp.up_proj.weight[5] *= 50
            block.mlp.down_proj.weight[:, 5] /= 50
    plain, errors = logits(lm, Prefix.empty()), []
    for pairs in ("none", "all"):
        config = QuantizerConfig(smoothing_alpha=0.6, smoothing_pairs=pairs, activations=ActivationConfig(6))
        with FittedQuantizer(config, calibrated(lm, TEXTS)).on(lm):
            errors.append(float((logits(lm, Prefix.empty()) - plain).square().mean()))
    assert errors[1] < 0.7 * errors[0]


def test_what_does_not_fit_is_refused_and_what_does_nothing_told(tiny: Tiny) -> None:
    cache = KvCacheConfig(4)
    with pytest.raises(
        ConfigError, match=r"smoothing_pairs=all scales the channels that quantizer.head_rotation=values"
    ):
        replace(PLAIN, head_rotation="values", kv_cache=cache)
    replace(PLAIN, head_rotation="keys", kv_cache=cache)
    for family in ("phi3", "gpt_oss"):
        with pytest.raises(ConfigError, match=r"names no up projection of its own"):
            check_quantizer(tiny(family), PLAIN)
    config = RunConfig(quantizer=QuantizerConfig(smoothing_pairs="up"))
    assert any("smoothing_pairs='up' has no effect" in one for one in options_without_effect(config))
