"""Rotation of the residual stream: the function stays, outliers spread, and the model comes back bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from conftest import FAMILIES, FEW, POST_NORM, SMOOTHABLE, UNLIKE
from helpers import calibrated, random_texts
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    PreTrainedConfig,
)
from untouched import assert_untouched, snapshot

from cushion.activations import observe_inputs, observe_outputs
from cushion.config import ActivationConfig, QuantizerConfig, WeightConfig
from cushion.errors import CalibrationError, ConfigError
from cushion.models import LanguageModel
from cushion.models.architectures import ARCHITECTURES, Architecture, ResidualStream
from cushion.models.tiny import VOCABULARY_SIZE, byte_tokenizer
from cushion.prefix import Prefix
from cushion.quantization.check import check_quantizer
from cushion.quantization.fitted import FittedQuantizer
from cushion.quantization.hadamard import randomized_hadamard
from cushion.quantization.input_statistics import fitted_behind, observe_fitted
from cushion.quantization.rotation import check_rotation, rotated
from cushion.quantization.simulate import quantized
from cushion.quantization.statistics.gathered import GatheredStatistics
from cushion.registry import located

Tiny = Callable[..., LanguageModel]
ROTATABLE = SMOOTHABLE  # the families and the variants whose norms stand before their readers
LAYER_NORMS = ("starcoder2", "opt", "bloom", "gpt_neox", "falcon")
TEXTS = random_texts(3, 24)
MORE_TEXTS = random_texts(12, 24, seed=1)


def rotation_only(**changes: Any) -> QuantizerConfig:
    return QuantizerConfig(
        name="under_test",
        weights=WeightConfig(bits=None),
        activations=ActivationConfig(bits=None),
        rotation="hadamard",
        **changes,
    )


def randomize(model: nn.Module) -> None:
    """Give every norm a weight, every bias a value, and the stream a mean, that folding cannot miss unnoticed."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln_f" in name or name.endswith("bias"):
                parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
            elif "embed" in name:
                parameter.add_(0.3)


@torch.no_grad()
def logits(lm: LanguageModel, prefix: Prefix | None = None) -> Tensor:
    prefix = prefix or Prefix.empty()
    return lm.model(TEXTS, past_key_values=prefix.cache(lm.model, len(TEXTS)), use_cache=True).logits


@torch.no_grad()
def block_inputs(lm: LanguageModel, prefix: Prefix | None = None) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}
    with observe_inputs(lm.named_blocks, lambda name, values: seen.update({name: values.detach().clone()})):
        logits(lm, prefix)
    return seen


# The function stays as it was.


def test_every_family_can_be_rotated_but_those_without_norms_before_the_readers() -> None:
    assert set(FAMILIES) - set(ROTATABLE) == set(FAMILIES) & set(POST_NORM)


@pytest.mark.parametrize("family", ROTATABLE)
@pytest.mark.parametrize(("seed", "prompt"), [(0, []), (5, [17, 42, 99])], ids=["plain", "prefix"])
def test_rotation_leaves_the_function_unchanged(tiny: Tiny, family: str, seed: int, prompt: list[int]) -> None:
    lm = tiny(family)
    randomize(lm.model)
    prefix = Prefix.from_tokens(lm.model, prompt)
    untouched, inputs = logits(lm, prefix), block_inputs(lm, prefix)
    with rotated(lm, "hadamard", seed):
        torch.testing.assert_close(logits(lm, prefix), untouched, rtol=0, atol=1e-4)
        changed = block_inputs(lm, prefix)
    for name, values in inputs.items():
        assert not torch.allclose(changed[name], values, atol=0.1), "the stream itself is another one"


@pytest.mark.parametrize("family", ROTATABLE)
def test_in_double_precision_the_function_is_unchanged_to_rounding(tiny: Tiny, family: str) -> None:
    lm = tiny(family)
    randomize(lm.model)
    lm.model.double()
    untouched = logits(lm)
    with rotated(lm):
        difference = (logits(lm) - untouched).abs().max()
    assert difference < (1e-10 if family == "opt" else 1e-5)  # norms and softmax of the others compute in float32


@pytest.mark.parametrize("family", ROTATABLE)
def test_a_prefix_made_by_the_rotated_model_is_the_same(tiny: Tiny, family: str) -> None:
    lm = tiny(family)
    randomize(lm.model)
    plain = Prefix.from_tokens(lm.model, [17, 42, 99])
    with rotated(lm):
        turned = Prefix.from_tokens(lm.model, [17, 42, 99])
    for one, other in zip((*plain.keys, *plain.values), (*turned.keys, *turned.values), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ROTATABLE)
def test_rotated_blocks_see_the_stream_times_the_matrix(tiny: Tiny, family: str) -> None:
    lm = tiny(family)
    randomize(lm.model)
    matrix = randomized_hadamard(32, seed=2).float()
    inputs = block_inputs(lm)
    with rotated(lm, "hadamard", seed=2):
        turned = block_inputs(lm)
    for name, values in inputs.items():
        centred = values - values.mean(-1, keepdim=True) if family.startswith(LAYER_NORMS) else values
        torch.testing.assert_close(turned[name], centred @ matrix, rtol=1e-4, atol=1e-4)


# Shapes of architecture beyond those of the table: norms with an offset, norms before the stream, parallel branches,
# fused experts.

COMMON: dict[str, Any] = {"vocab_size": VOCABULARY_SIZE, "hidden_size": 24, "num_hidden_layers": 2}
HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 40}
LLAMA, READERS_OF_LLAMA = ARCHITECTURES["llama"][0].residual, ARCHITECTURES["llama"][0].smoothing
OTHERS: dict[str, tuple[PreTrainedConfig, str, Any, ResidualStream]] = {
    "gemma": (
        GemmaConfig(**COMMON, **HEADS),
        "model.layers",
        READERS_OF_LLAMA,
        LLAMA,
    ),
    "gemma2": (
        Gemma2Config(**COMMON, **HEADS, sliding_window=8, query_pre_attn_scalar=8),
        "model.layers",
        (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("pre_feedforward_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ),
        ResidualStream(
            embeddings=("model.embed_tokens",),
            final_norm="model.norm",
            post_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
        ),
    ),
    "gpt_neox": (
        GPTNeoXConfig(**COMMON, num_attention_heads=4, intermediate_size=40, tie_word_embeddings=False),
        "gpt_neox.layers",
        (
            ("input_layernorm", ("attention.query_key_value",)),
            ("post_attention_layernorm", ("mlp.dense_h_to_4h",)),
        ),
        ResidualStream(
            embeddings=("gpt_neox.embed_in",),
            final_norm="gpt_neox.final_layer_norm",
            writers=("attention.dense", "mlp.dense_4h_to_h"),
        ),
    ),
    "mixtral": (
        MixtralConfig(**COMMON, **HEADS, num_local_experts=3, num_experts_per_tok=2),
        "model.layers",
        (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("post_attention_layernorm", ("mlp.gate", "mlp.experts.gate_up_proj")),
        ),
        ResidualStream(
            embeddings=("model.embed_tokens",),
            final_norm="model.norm",
            writers=("self_attn.o_proj", "mlp.experts.down_proj"),
        ),
    ),
    "opt": (  # norms without weights, linears without biases
        OPTConfig(
            **COMMON,
            word_embed_proj_dim=24,
            ffn_dim=40,
            num_attention_heads=4,
            max_position_embeddings=64,
            layer_norm_elementwise_affine=False,
            enable_bias=False,
        ),
        "model.decoder.layers",
        ARCHITECTURES["opt"][0].smoothing,
        cast(ResidualStream, ARCHITECTURES["opt"][0].residual),
    ),
    "tied": (LlamaConfig(**COMMON, **HEADS, tie_word_embeddings=True), "model.layers", READERS_OF_LLAMA, LLAMA),
}


def other(name: str) -> LanguageModel:
    """A tiny random model of another family, with an entry of the table made on the spot."""
    config, blocks, readers, stream = OTHERS[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    randomize(model)
    model.eval().requires_grad_(False)
    offset = 1.0 if name.startswith("gemma") else 0.0
    architecture = Architecture(config.model_type, blocks, readers, norm_offset=offset, residual=stream)
    return LanguageModel(model, byte_tokenizer(), architecture, name, name)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("prompt", [[], [17, 42, 99]], ids=["plain", "prefix"])
def test_other_architectures_are_described_by_data_alone(name: str, prompt: list[int]) -> None:
    lm = other(name)
    prefix, before = Prefix.from_tokens(lm.model, prompt), snapshot(lm)
    untouched, inputs = logits(lm, prefix), block_inputs(lm, prefix)
    with rotated(lm):
        torch.testing.assert_close(logits(lm, prefix), untouched, rtol=1e-4, atol=1e-4)
        changed = block_inputs(lm, prefix)
        assert all(not torch.allclose(changed[key], values, atol=0.05) for key, values in inputs.items())
    assert_untouched(lm, before)


@torch.no_grad()
def test_a_star_stands_for_every_expert() -> None:
    """Experts whose projections are linears of their own, as a list of modules."""

    class Experts(nn.ModuleList):
        def forward(self, values: Tensor) -> Tensor:
            return sum((expert.down(torch.relu(expert.up(values))) for expert in self), torch.zeros_like(values))

    lm = other("tied")
    for block in lm.blocks:
        experts = [nn.ModuleDict({"up": nn.Linear(24, 40), "down": nn.Linear(40, 24)}) for _ in range(3)]
        block.mlp = nn.Sequential(Experts(expert.requires_grad_(False) for expert in experts))
    stream = lm.architecture.residual
    assert stream is not None
    readers = (lm.architecture.smoothing[0], ("post_attention_layernorm", ("mlp.0.*.up",)))
    described = replace(stream, writers=("self_attn.o_proj", "mlp.0.*.down"))
    lm.architecture = replace(lm.architecture, smoothing=readers, residual=described)
    untouched = logits(lm)
    with rotated(lm):
        torch.testing.assert_close(logits(lm), untouched, rtol=1e-4, atol=1e-4)


def test_tied_embeddings_are_untied_for_the_length_of_the_block_alone() -> None:
    lm = other("tied")
    head, table = lm.model.lm_head, lm.model.model.embed_tokens
    assert head.weight is table.weight
    with rotated(lm):
        assert head.weight is not table.weight
        assert not torch.allclose(head.weight, table.weight)
    assert head.weight is table.weight


# The way back, and what is refused.


@pytest.mark.parametrize("family", UNLIKE)
@pytest.mark.parametrize("raises", [False, True], ids=["returns", "raises"])
def test_leaving_restores_the_very_same_objects_and_bits(tiny: Tiny, family: str, raises: bool) -> None:
    lm = tiny(family)
    before, untouched = snapshot(lm), logits(lm)
    try:
        with quantized(lm, rotation_only()) as same:
            assert same is lm
            if raises:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert raises
    assert_untouched(lm, before)
    assert torch.equal(logits(lm), untouched)


def test_a_failure_half_way_in_is_undone(tiny: Tiny) -> None:
    lm = tiny("opt")
    stream = lm.architecture.residual
    assert stream is not None
    lm.architecture = replace(lm.architecture, residual=replace(stream, writers=("self_attn.out_proj", "absent")))
    before = snapshot(lm)
    with pytest.raises(AttributeError, match="absent"), rotated(lm):
        pytest.fail("the body must not run")
    assert_untouched(lm, before)


def test_rotation_none_touches_nothing(tiny: Tiny) -> None:
    lm = tiny()
    lm.architecture = replace(lm.architecture, residual=None)
    before = snapshot(lm)
    with rotated(lm, "none"):
        assert_untouched(lm, before)


@pytest.mark.parametrize("use", [check_quantizer, lambda lm, config: quantized(lm, config).__enter__()])
@pytest.mark.parametrize(
    ("family", "attribute", "value"),
    [
        ("opt", "do_layer_norm_before", False),
        ("opt", "_remove_final_layer_norm", True),
        ("bloom", "apply_residual_connection_post_layernorm", True),
    ],
)
def test_variants_whose_norms_stand_in_the_way_are_refused_by_name(
    tiny: Tiny, use: Callable[..., object], family: str, attribute: str, value: bool
) -> None:
    lm = tiny(family)
    setattr(lm.model.config, attribute, value)
    expected = rf"quantizer\.rotation=hadamard cannot be used with tiny_{family}.*{attribute}={value}.*rotation=none"
    with pytest.raises(ConfigError, match=expected):
        use(lm, rotation_only())


def test_embeddings_behind_a_projection_are_refused(tiny: Tiny) -> None:
    lm = tiny("opt")
    config = OPTConfig(**{**lm.model.config.to_dict(), "word_embed_proj_dim": 16})
    lm.model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ConfigError, match=r"embed_tokens has 16 features and the residual stream 32"):
        check_rotation(lm, "hadamard")


def test_a_family_whose_stream_is_not_in_the_table_is_refused_by_name(tiny: Tiny) -> None:
    lm = tiny()
    lm.architecture = replace(lm.architecture, residual=None)
    with pytest.raises(ConfigError, match=r"'llama' does not name where its residual stream.*quantizer\.rotation=none"):
        check_quantizer(lm, rotation_only())


def test_a_family_whose_norms_stand_behind_the_linears_is_refused_by_name(tiny: Tiny) -> None:
    lm = tiny("olmo2")
    with pytest.raises(ConfigError, match=r"'olmo2' names no norms that stand before .*quantizer\.rotation=none"):
        check_quantizer(lm, rotation_only())
    with pytest.raises(ConfigError, match=r"smoothing_alpha=0.5 has nothing to smooth in tiny_olmo2.*=null"):
        check_quantizer(lm, QuantizerConfig(smoothing_alpha=0.5))


# What it is good for, and what it composes with.


def peak(values: Tensor) -> float:
    return float(values.abs().max() / values.abs().mean())


@pytest.mark.parametrize("family", UNLIKE)
def test_a_planted_outlier_channel_is_spread_over_the_stream(tiny: Tiny, family: str) -> None:
    lm = tiny(family)
    stream = lm.architecture.residual
    assert stream is not None
    with torch.no_grad():
        first = stream.embedding_norm or stream.embeddings[0]
        lm.model.get_submodule(first).weight[..., 5] += 100.0
    before = block_inputs(lm)
    with rotated(lm):
        after = block_inputs(lm)
    for name, values in before.items():
        assert peak(values) > 10
        assert peak(after[name]) < peak(values) / 3


READERS = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]


def planted(lm: LanguageModel) -> None:
    """A channel of the stream thirty times larger than the others, to which every reader gives a thirtieth."""
    with torch.no_grad():
        lm.model.get_submodule("model.embed_tokens").weight[:, 5] *= 30
        for linear in lm.linears(READERS).values():
            linear.weight[:, 5] /= 30
        lm.model.lm_head.weight[:, 5] /= 30


def test_rotation_rescues_per_token_four_bits_from_an_outlier_channel(tiny: Tiny) -> None:
    lm = tiny("llama")
    planted(lm)
    names = [f"model.layers.0.mlp.{name}" for name in ("gate_proj", "up_proj")]

    def outputs() -> Tensor:
        """What the readers of the first MLP compute: no rotation touches their output side."""
        seen: list[Tensor] = []
        with observe_outputs({n: lm.model.get_submodule(n) for n in names}, lambda _name, out: seen.append(out)):
            logits(lm)
        return torch.cat(seen, dim=-1)

    untouched = outputs()
    coarse = QuantizerConfig(
        name="w8a4",
        activations=ActivationConfig(bits=4, granularity="per_token", range="dynamic"),
        weights=WeightConfig(granularity="per_channel"),
        targets=READERS,
    )
    errors = {}
    for rotation in ("none", "hadamard"):
        with quantized(lm, replace(coarse, rotation=rotation)):
            errors[rotation] = float((outputs() - untouched).square().mean())
    assert errors["hadamard"] < errors["none"] / 3


@pytest.mark.parametrize("family", [family for family in UNLIKE if family != "mixtral"])  # an expert is not reached
@pytest.mark.parametrize("alpha", [None, 0.8])
def test_static_quantization_with_rotation_smoothing_and_prefix_recomputed(
    tiny: Tiny, family: str, alpha: float | None
) -> None:
    """Rotate, then smooth, then quantize: the same as smoothing and quantizing a model that is rotated already."""
    lm = tiny(family)
    randomize(lm.model)
    prefix = Prefix.from_tokens(lm.model, [17, 42])
    plain = logits(lm, prefix)
    with rotated(lm, "hadamard", seed=4):
        ranges = calibrated(lm, MORE_TEXTS, prefix)
        with quantized(lm, QuantizerConfig(smoothing_alpha=alpha), ranges):
            expected = logits(lm, prefix)
    with quantized(lm, QuantizerConfig(smoothing_alpha=alpha, rotation="hadamard", rotation_seed=4), ranges):
        assert torch.equal(logits(lm, prefix), expected)
    with quantized(lm, QuantizerConfig(smoothing_alpha=alpha), calibrated(lm, MORE_TEXTS, prefix)):
        assert not torch.allclose(logits(lm, prefix), expected)
    if alpha is not None:
        with quantized(lm, rotation_only(smoothing_alpha=alpha, rotation_seed=4), ranges):
            torch.testing.assert_close(logits(lm, prefix), plain, rtol=0, atol=1e-3)


@pytest.mark.parametrize("family", FEW)
def test_gradients_reach_the_prefix_through_a_rotated_quantized_model(tiny: Tiny, family: str) -> None:
    lm = tiny(family)
    found = Prefix.from_tokens(lm.model, [1, 2, 3])
    keys = tuple(key.clone().requires_grad_() for key in found.keys)
    prefix = Prefix(found.token_ids, keys, found.values)
    config = QuantizerConfig(activations=ActivationConfig(range="dynamic"), rotation="hadamard")
    with quantized(lm, config, straight_through=True):
        lm.model(TEXTS[:1], past_key_values=prefix.cache(lm.model), use_cache=True).logits.square().sum().backward()
    assert all(key.grad is not None and torch.isfinite(key.grad).all() and key.grad.abs().max() > 0 for key in keys)
    assert all(parameter.grad is None for parameter in lm.model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_stay_half_and_the_function_nearly_the_same(tiny: Tiny, dtype: torch.dtype) -> None:
    for family in ("llama", "opt", "bloom"):
        lm = tiny(family)
        lm.model.to(dtype)
        untouched = logits(lm).float()
        with rotated(lm):
            assert {parameter.dtype for parameter in lm.model.parameters()} == {dtype}
            error = (logits(lm).float() - untouched).square().mean() / untouched.square().mean()
        assert error < (2e-2 if dtype == torch.bfloat16 else 1e-3)


def test_ranges_of_another_rotation_are_refused(tiny: Tiny) -> None:
    lm = tiny("llama")
    plain = calibrated(lm, MORE_TEXTS)
    with rotated(lm, "hadamard", seed=4):
        turned = calibrated(lm, MORE_TEXTS)
    for ranges, config in (
        (plain, QuantizerConfig(rotation="hadamard", rotation_seed=4)),
        (turned, QuantizerConfig(rotation="hadamard", rotation_seed=5)),
        (turned, QuantizerConfig()),
    ):
        with pytest.raises(CalibrationError, match="calibrate inside"), quantized(lm, config, ranges):
            pytest.fail("the body must not run")
    with quantized(lm, QuantizerConfig(rotation="hadamard", rotation_seed=4), turned):
        assert torch.isfinite(logits(lm)).all()
    assert lm.rotation == ("none", 0)


def test_statistics_of_another_rotation_are_refused(tiny: Tiny) -> None:
    lm, texts = tiny("llama"), random_texts(2, 8)
    static = ActivationConfig(range="static", estimator="percentile")
    configs = [
        QuantizerConfig(activations=static, rotation=rotation, rotation_seed=seed)
        for rotation, seed in (("none", 0), ("hadamard", 4), ("hadamard", 5))
    ]
    for own in configs:
        fitted = fitted_behind(lm, Prefix.empty(), own, texts)
        (needed,) = own.gathered
        gathered = GatheredStatistics(located(needed.place))
        for _ in observe_fitted(lm, Prefix.empty(), texts, FittedQuantizer(own), [gathered]):
            pass
        for inputs in (fitted.inputs, {needed: gathered.by_linear}):
            for other in configs:
                with ExitStack() as stack:
                    if other is not own:
                        stack.enter_context(pytest.raises(CalibrationError, match="gather them under this quantizer"))
                    with FittedQuantizer(other, inputs=inputs).on(lm):
                        assert torch.isfinite(logits(lm)).all()
