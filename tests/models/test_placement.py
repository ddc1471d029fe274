"""Where a model computes and how finely: maps of devices, a model on two devices, half precision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from helpers import calibrated, random_texts
from pretended_device import THERE, pretend_devices, spread
from torch import Tensor

from cushion import float64
from cushion.activations import MagnitudeStatistics, observe_inputs
from cushion.config import (
    EvalConfig,
    KvCacheConfig,
    ModelConfig,
    PathsConfig,
    QuantizerConfig,
    SearchConfig,
    TuningConfig,
    WeightConfig,
)
from cushion.errors import ConfigError
from cushion.evaluation.perplexity import block_losses
from cushion.models import LanguageModel, load_language_model
from cushion.models.language_model import _refuse_offloading
from cushion.models.tiny import tiny_model
from cushion.prefix import Prefix
from cushion.quantization.fitted import FittedQuantizer
from cushion.quantization.fitting import fit_blocks
from cushion.quantization.input_statistics import fitted_behind
from cushion.quantization.linear import QuantizedLinear
from cushion.quantization.simulate import quantized
from cushion.search.greedy import greedy_search
from cushion.search.greedy_state import SearchState
from cushion.search.objective import Objective
from cushion.tuning import tune_prefix

Tiny = Callable[..., LanguageModel]
TUNING = TuningConfig(
    method="prefix", steps=3, sequences=4, sequence_length=10, batch_size=2, warmup_steps=1, evaluate_every=2,
    held_out_sequences=2,
)  # fmt: skip
SMOOTHED = QuantizerConfig(smoothing_alpha=0.5)


def found(lm: LanguageModel, texts: Tensor) -> SearchState:
    state = SearchState([])
    config = SearchConfig(tau=1.0, max_length=2, batch_size=4)
    for _ in greedy_search(lm, config, texts, list(range(3, 260, 43)), state):
        pass
    return state


def everything(lm: LanguageModel) -> dict[str, Any]:
    """Search, calibration, smoothing, static quantization, perplexity and tuning, as plain numbers."""
    texts = random_texts(4, 10, seed=1)
    state = found(lm, texts)
    prefix = Prefix.from_tokens(lm.model, state.token_ids)
    ranges = calibrated(lm, texts, prefix)
    for side in (ranges.minimum, ranges.maximum):  # as they are read from the cache of steps
        side.update({name: values.to(lm.device) for name, values in side.items()})
    statistics = MagnitudeStatistics()
    with observe_inputs(lm.named_blocks, statistics):
        error = Objective(SearchConfig())(lm, prefix, texts[:1], skip=0)
    with quantized(lm, SMOOTHED, ranges):
        losses = [loss.loss for loss in block_losses(lm, prefix, texts, EvalConfig())]
    *_, tuned = tune_prefix(lm, prefix, TUNING, FittedQuantizer(SMOOTHED, ranges), SearchConfig(), texts, texts[:2], 0)
    return {
        "tokens": state.token_ids,
        "objectives": [step.objective_after for step in state.steps],
        "error": error.tolist(),
        "curve": statistics.curve(),
        "losses": losses,
        "tuning": [value for step in tuned.steps for value in (step.loss, step.gradient_norm)],
    }


def assert_same(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    """Bit for bit but for the tuning, in which gradients may be added up in another order."""
    assert actual.pop("tuning") == pytest.approx(expected.pop("tuning"), rel=1e-4)
    assert actual == expected


# ---- several devices ------------------------------------------------------------------------------------------------


def spread_model(tiny: Tiny, family: str, blocks: str = "model.layers", **parts: str) -> LanguageModel:
    """The second of three blocks and the head are elsewhere."""
    lm = tiny(family)
    cast(Any, lm.model).set_attn_implementation("eager")  # the fused kernels look behind what a tensor says of itself
    there = {f"{blocks}.1", "lm_head"}
    names = [
        "model.embed_tokens",
        "model.rotary_emb",
        *(f"{blocks}.{index}" for index in range(3)),
        "model.norm",
        "lm_head",
    ]
    spread(lm.model, {name: str(THERE) if name in there else "cpu" for name in names})
    return lm


@pytest.mark.parametrize("family", ["mixtral", "gemma2"])
def test_a_model_on_two_devices_gives_the_numbers_of_one(tiny: Tiny, family: str) -> None:
    here = tiny(family)
    cast(Any, here.model).set_attn_implementation("eager")
    with pretend_devices():
        assert_same(everything(spread_model(tiny, family)), everything(here))


NAMES = ("model.embed_tokens", "model.rotary_emb", *(f"model.layers.{i}" for i in range(3)), "model.norm", "lm_head")


@pytest.mark.parametrize(
    "quantizer",
    [
        SMOOTHED,
        QuantizerConfig(rotation="hadamard", input_rotation="down"),
        QuantizerConfig(head_rotation="all", kv_cache=KvCacheConfig(8)),
        QuantizerConfig(weights=WeightConfig(4, "per_channel", method="gptq"), targets=["o_proj"]),
    ],
    ids=["smoothed", "rotated", "heads rotated", "gptq"],
)
def test_a_device_without_float64_gives_the_numbers_of_one_with_it(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, quantizer: QuantizerConfig
) -> None:
    monkeypatch.setattr(float64, "WITHOUT", frozenset({THERE.type}))

    def losses(lm: LanguageModel) -> Any:
        cast(Any, lm.model).set_attn_implementation("eager")
        if quantizer is SMOOTHED:
            return everything(lm)
        texts = random_texts(4, 10, seed=1)
        fitted = fitted_behind(lm, Prefix.empty(), quantizer, texts)
        if quantizer.blockwise:
            fitted = replace(fitted, fits={part.name: {} for part in quantizer.blockwise})
            assert list(fit_blocks(lm, Prefix.empty(), fitted, texts))[-1] == len(lm.blocks)
        with fitted.on(lm):
            return {"tuning": [loss.loss for loss in block_losses(lm, Prefix.empty(), texts, EvalConfig())]}

    with pretend_devices(lack_float64=True):
        there = tiny("llama")
        spread(there.model, dict.fromkeys(NAMES, str(THERE)))
        assert there.device == THERE
        with pytest.raises(TypeError, match="no float64"):
            torch.ones(2, dtype=torch.float64).to(THERE)
        found = losses(there)
    assert_same(found, losses(tiny("llama")))


def test_a_prefix_goes_where_each_layer_is(tiny: Tiny, tmp_path: Path) -> None:
    with pretend_devices():
        lm = spread_model(tiny, "mistral")
        prefix = Prefix.from_tokens(lm.model, [1, 2, 3])
        expected = [torch.device("cpu"), THERE, torch.device("cpu")]
        assert [key.device for key in prefix.keys] == [value.device for value in prefix.values] == expected
        on_cpu = Prefix(prefix.token_ids, *(tuple(t.to("cpu") for t in part) for part in (prefix.keys, prefix.values)))
        cache = on_cpu.cache(lm.model, 2)
        assert [cast(Any, layer).keys.device for layer in cache.layers] == expected


def test_tensors_of_two_pretended_devices_do_not_mix() -> None:
    """The trap works: what these tests rely on to find a tensor that was left behind."""
    with pretend_devices():
        there = torch.ones(2).to(THERE)
        assert there.device == (there * 2).device == THERE
        assert (there * 3).to("cpu").tolist() == [3, 3]
        with pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
            there + torch.ones(2)


# ---- maps -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tiny: Tiny, tmp_path: Path) -> Path:
    tiny_model("mixtral").save_pretrained(tmp_path / "saved")
    tiny("mixtral").tokenizer.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


BY_MODULE = dict.fromkeys(("model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "lm_head"), "cpu")


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, BY_MODULE], ids=["device", "whole model", "modules"])
def test_a_map_to_the_cpu_gives_the_same_model(tiny: Tiny, folder: Path, device_map: Any) -> None:
    lm = load_language_model(ModelConfig(path=str(folder), device_map=device_map), PathsConfig())
    assert_same(everything(lm), everything(tiny("mixtral")))


def test_offloading_to_disk_is_refused(folder: Path, tmp_path: Path) -> None:
    device_map = {**BY_MODULE, "lm_head": "disk"}
    config = ModelConfig(path=str(folder), device_map=device_map)
    with pytest.raises(ConfigError, match=r"model\.device_map=.* offloads part of saved to disk") as caught:
        load_language_model(config, PathsConfig())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("places", "idle"),
    [
        ([0, 1], ""),
        (["cuda:0", "cuda:1"], ""),
        (["cpu"], ""),
        ([0, "cpu"], "cpu"),
        ([0, "cpu", "disk"], "cpu and disk"),
    ],
)
def test_several_gpus_are_accepted_and_offloading_is_not(places: list[Any], idle: str) -> None:
    model = cast(Any, SimpleNamespace(hf_device_map={f"part{i}": place for i, place in enumerate(places)}))
    config = ModelConfig(path="me/mine", device_map="auto")
    if not idle:
        _refuse_offloading(model, config)
    else:
        with pytest.raises(ConfigError, match=f"model.device_map='auto' offloads part of mine to {idle}, which"):
            _refuse_offloading(model, config)


@pytest.mark.parametrize("value", [{}, {"lm_head": None}, {"lm_head": [0]}, 1.5, True, ["cpu"]])
def test_a_map_that_is_none_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"model\.device_map=.* is not allowed: name a device, a strategy"):
        ModelConfig(device_map=value)


# ---- half precision -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family",
    [
        "llama", "mixtral", "gemma3_text", "bloom", "falcon_alibi", "gpt_oss", "qwen2_moe", "qwen3_moe", "granite",
        "starcoder2",
    ],
)  # fmt: skip
def test_half_precision_weights_have_statistics_of_32_bits(family: str) -> None:
    half, full = (
        load_language_model(ModelConfig(path=f"tiny:{family}", dtype=dtype), PathsConfig())
        for dtype in ("bfloat16", "float32")
    )
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.bfloat16}
    texts, tokens = random_texts(4, 10, seed=1), [7, 8]
    prefix = Prefix.from_tokens(half.model, tokens)
    assert {tensor.dtype for tensor in (*prefix.keys, *prefix.values)} == {torch.bfloat16}
    ranges = calibrated(half, texts, prefix)
    reference = calibrated(full, texts, Prefix.from_tokens(full.model, tokens))
    for name, low in ranges.minimum.items():
        assert low.dtype == ranges.maximum[name].dtype == torch.float32
        assert low.amin().item() == pytest.approx(reference.minimum[name].amin().item(), rel=0.3)
    errors = [Objective(SearchConfig())(lm, Prefix.from_tokens(lm.model, tokens), texts, 0) for lm in (half, full)]
    assert errors[0].dtype == torch.float64
    assert errors[0].tolist() == pytest.approx(errors[1].tolist(), rel=0.3)
    with quantized(half, SMOOTHED, ranges):
        quantizers = [cast(Any, m).activation for m in half.blocks.modules() if isinstance(m, QuantizedLinear)]
    assert len(quantizers) == len(half.linears())
    assert {values.dtype for quantizer in quantizers for values in quantizer.parameters} == {torch.float32}


@pytest.mark.parametrize(
    "family",
    [
        "llama", "mixtral", "gemma2", "gpt_neox", "gpt_oss", "qwen2_moe", "qwen3_moe", "granite", "starcoder2",
        "gemma3_text",
    ],
)  # fmt: skip
def test_everything_runs_in_half_precision(family: str) -> None:
    lm = load_language_model(ModelConfig(path=f"tiny:{family}", dtype="bfloat16"), PathsConfig())
    numbers = everything(lm)
    losses = torch.tensor([*numbers["losses"], *numbers["objectives"], *numbers["tuning"]])
    assert torch.isfinite(losses).all() and (losses > 0).all()
    assert len(numbers["objectives"]) == 2 and len(numbers["curve"].top1) == 3
    assert {parameter.dtype for parameter in lm.model.parameters()} == {torch.bfloat16}
