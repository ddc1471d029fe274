"""OmniQuant: the function stays, the error of each block falls, what is learned is what the quantizer then has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import UNLIKE
from helpers import random_texts, random_values
from torch import Tensor
from untouched import assert_untouched, snapshot

from cushion.artifacts import ArtifactStore
from cushion.config import (
    ActivationConfig,
    KvCacheConfig,
    QuantizerConfig,
    ReconstructionConfig,
    RunConfig,
    WeightConfig,
)
from cushion.config_warnings import options_without_effect
from cushion.errors import CalibrationError, ConfigError
from cushion.models import LanguageModel
from cushion.prefix import Prefix
from cushion.quantization.effect import Turn
from cushion.quantization.fitted import FittedQuantizer
from cushion.quantization.fitting import walk
from cushion.quantization.learned import Learned
from cushion.quantization.numerics import Grid, quantize_weight
from cushion.quantization.omniquant import clipped_weight, transforms_of
from cushion.quantization.reconstruction_step import Reconstructed, ReconstructionStep
from cushion.step import Context, compute

Tiny = Callable[..., LanguageModel]
TEXTS = random_texts(3, 16, seed=2)
TOKEN = ActivationConfig(4, "per_token", "dynamic", symmetric=False)
W4A4 = QuantizerConfig(weights=WeightConfig(4, "per_channel"), activations=TOKEN, kv_cache=KvCacheConfig(4))
CONFIG = ReconstructionConfig(
    "omniquant", "omniquant", epochs=8, batch_size=3, clipping_learning_rate=0.15, transform_learning_rate=0.05
)
W4 = replace(W4A4, activations=ActivationConfig(None), kv_cache=KvCacheConfig(None))
KINDS: dict[str, tuple[QuantizerConfig, dict[str, Any]]] = {
    "both": (W4A4, {}),
    "clipping, weights alone, in groups": (replace(W4, weights=WeightConfig(3, "per_group", 8)), {"transforms": False}),
    "transforms, rotated": (replace(W4A4, head_rotation="values", input_rotation="down"), {"clipping": False}),
}


def planted(lm: LanguageModel) -> LanguageModel:
    """A model with one large channel behind each norm, and one large weight in each row."""
    with torch.no_grad():
        for block in lm.blocks:
            block.input_layernorm.weight[3] *= 20
            block.post_attention_layernorm.weight[5] *= 20
            for linear in (block.mlp.down_proj, block.self_attn.v_proj):
                linear.weight[:, 7] *= 8
    return lm


def made(
    lm: LanguageModel, folder: Path, quantizer: QuantizerConfig, config: ReconstructionConfig, prefix: Prefix
) -> Reconstructed:
    step = ReconstructionStep(prefix, quantizer, None, frozenset(), config, TEXTS, 0, "no prefix")
    return compute(step, Context(lm, ArtifactStore(folder), lambda event: None))


def test_a_block_in_which_no_input_can_be_scaled_has_nothing_to_learn(tiny: Tiny, tmp_path: Path) -> None:
    rotated = replace(W4A4, input_rotation="all")
    found = made(planted(tiny()), tmp_path, rotated, replace(CONFIG, clipping=False), Prefix.empty())
    assert all(block["before"] == block["after"] > 0 for block in found.record["blocks"])
    assert not found.learned.divisors


@torch.no_grad()
def hidden(lm: LanguageModel, behind: Prefix) -> Tensor:
    return torch.cat([lm.body(text[None], past_key_values=behind.cache(lm.model), use_cache=True)[0] for text in TEXTS])


@pytest.mark.parametrize("kind", KINDS)
def test_the_outputs_come_nearer_to_full_precision(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    lm, (quantizer, options) = planted(tiny()), KINDS[kind]
    lm.model.base_model.norm = torch.nn.Identity()  # the final norm is not part of a block
    prefix, before = Prefix.from_tokens(lm.model, [256, 10]), snapshot(lm)
    found = made(lm, tmp_path, quantizer, replace(CONFIG, **options), prefix)
    assert_untouched(lm, before)
    plain = hidden(lm, prefix) if quantizer.rotation == "none" else None
    errors = []
    for learned in (None, found.learned):
        fitted = FittedQuantizer(quantizer, learned=learned)
        if plain is None:
            with fitted.surroundings(lm):
                plain = hidden(lm, prefix)
        with fitted.on(lm):
            errors.append(float((hidden(lm, prefix) - plain).square().mean()))
    records = found.record["blocks"]
    assert records[0]["kept"] and records[0]["after"] < (1.0 if "transforms" in options else 0.8) * records[0]["before"]
    last = records[-1]
    assert (last["after"] if last["kept"] else last["before"]) == pytest.approx(errors[1], rel=1e-2)
    assert bool(found.learned.shares) == ("clipping" not in options)
    assert bool(found.learned.divisors) == ("transforms" not in options)
    assert not found.learned.ranges and not found.learned.weights
    assert Learned.of(found.learned.tensors()).fingerprint == found.learned.fingerprint


@pytest.mark.parametrize("family", UNLIKE)
def test_scales_keep_the_function_of_every_family(tiny: Tiny, family: str) -> None:
    """With nothing rounded; heads that read the same values have one scale, which the values could take over."""
    lm, turns = tiny(family), list[Turn]()
    nothing = QuantizerConfig(weights=WeightConfig(None), activations=ActivationConfig(None))
    found: dict[str, Tensor] = {}

    def take(turn: Turn) -> None:
        turns.append(turn)
        found.update({name: own.scale.detach() for own in transforms_of(turn, 0.5) for name in own.names})

    for _ in walk(lm, Prefix.empty(), FittedQuantizer(nothing), TEXTS, take):
        pass
    readers = {
        name for index in range(3) for _, group in lm.norm_readers(index) for name in group if lm.is_quantized(name)
    }
    values = lm.architecture.values
    assert values is not None
    outputs = [f"{lm.architecture.blocks}.{index}.{values.reader}" for index in range(3)]
    assert found.keys() == {*readers, *outputs}
    _, heads, size = lm.architecture.cache_shape(lm.model.config.get_text_config())
    for name in outputs:
        grouped = found[name].view(heads, -1, size)
        assert torch.equal(grouped, grouped[:, :1].expand_as(grouped)) and grouped.std() > 0
    plain, learned = hidden(lm, Prefix.empty()), Learned(divisors=found)
    barely = QuantizerConfig(weights=WeightConfig(8, "per_channel"), activations=ActivationConfig(None))
    with FittedQuantizer(barely, learned=learned).on(lm):
        scaled = hidden(lm, Prefix.empty())
    with FittedQuantizer(barely).on(lm):
        unscaled = hidden(lm, Prefix.empty())
    assert float((scaled - plain).square().mean()) < 4 * float((unscaled - plain).square().mean())


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel", "per_group"])
def test_what_learns_has_the_value_of_what_the_quantizer_has(granularity: str) -> None:
    weight, grid = random_values(6, 12), Grid(3, True, narrow_range=False)
    shaped, dims = (weight.unflatten(1, (-1, 4)), (-1,)) if granularity == "per_group" else (weight, (-1,))
    dims = (0, 1) if granularity == "per_tensor" else dims
    share = torch.full_like(shaped.amax(dims, keepdim=True), 0.7).requires_grad_()
    found = clipped_weight(shaped, dims, share, grid)
    limit = 0.7 * shaped.abs().amax(dims, keepdim=True)
    expected = quantize_weight(weight, grid, granularity, 4, lambda *_: (-limit, limit)).dequantize()
    torch.testing.assert_close(found.reshape(6, 12), expected, rtol=1e-6, atol=1e-7)
    (found - shaped).square().sum().backward()
    assert share.grad is not None and share.grad.abs().min() > 0


def test_what_it_does_not_fit_is_refused(tiny: Tiny) -> None:
    for quantizer, message in (
        (QuantizerConfig(), r"quantizer.activations.range=static\): set it to dynamic"),
        (replace(W4A4, weights=WeightConfig(None)), r"has quantizer.weights.bits=null"),
        (replace(W4A4, weights=WeightConfig(4, "per_channel", estimator="mse")), r"quantizer.weights.estimator=mse"),
        (
            replace(W4A4, weights=WeightConfig(4, "per_channel", method="gptq")),
            r"cannot be used with quantizer.weights",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            RunConfig(quantizer=quantizer, reconstruction=CONFIG)
    with pytest.raises(ConfigError, match=r"reconstruction.clipping=false is not allowed: true, or"):
        ReconstructionConfig("omniquant", "omniquant", clipping=False, transforms=False)
    config = RunConfig(
        quantizer=W4A4, reconstruction=replace(CONFIG, transforms=False, transform_alpha=0.7, weights=True)
    )
    told = "\n".join(options_without_effect(config))
    assert "reconstruction.transform_alpha=0.7 has no effect" in told and "reconstruction.weights=True has no" in told
    wrong = Learned(divisors={"model.layers.0.mlp.down_proj": torch.ones(3)})
    message = r"has shape \(3,\), and the linear 64 inputs"
    with pytest.raises(CalibrationError, match=message), FittedQuantizer(W4A4, learned=wrong).on(tiny()):
        pass
