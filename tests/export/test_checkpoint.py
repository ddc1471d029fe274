"""A checkpoint of compressed-tensors, loaded without Cushion, gives the logits of the simulation, bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_documents
from finished_runs import TOKENS, tuned_prefix
from helpers import random_texts
from safetensors.torch import load_file, save_file
from tiny_run import small_config
from torch import Tensor

from cushion.config import ActivationConfig, CalibrationConfig, QuantizerConfig, WeightConfig
from cushion.errors import ConfigError
from cushion.models import LanguageModel
from cushion.preparation import prepare
from cushion.quantization.numerics import Grid
from cushion.steps import Steps

pytest.importorskip("compressed_tensors")
checkpoint = pytest.importorskip("cushion.export.checkpoint")
schemes = pytest.importorskip("cushion.export.schemes")

Tiny = Callable[..., LanguageModel]
KEPT = ["model.layers.1.mlp.down_proj", "model.layers.2.self_attn.o_proj"]


def static(**changes: Any) -> ActivationConfig:
    return ActivationConfig(**{"range": "static", "symmetric": True, "narrow_range": False, **changes})


def dynamic(granularity: str, **changes: Any) -> ActivationConfig:
    return ActivationConfig(range="dynamic", symmetric=True, granularity=granularity, **changes)


def weights(granularity: str = "per_channel", **changes: Any) -> WeightConfig:
    return WeightConfig(granularity=granularity, **changes)


def under(own: WeightConfig, inputs: ActivationConfig, **changes: Any) -> QuantizerConfig:
    calibration = CalibrationConfig(samples=2, length=16)
    return QuantizerConfig("it", own, inputs, calibration=calibration, **changes)


FP8 = {"format": "fp8_e4m3", "narrow_range": True}
EXACT = {
    "tensor": under(weights("per_tensor"), static()),
    "channel": under(weights(), static()),
    "group": under(weights("per_group", group_size=8), static()),
    "smoothed": under(weights(), static(), smoothing_alpha=0.8),
    "rotated": under(weights(), static(), rotation="hadamard"),
    "mse": under(weights(estimator="mse"), static(estimator="mse")),
    "gptq": under(weights(bits=4, method="gptq"), static()),
    "6 bits": under(weights(bits=6), static(bits=6)),
    "kept": under(weights("per_tensor"), static()),
    "few": under(weights(), static(), targets=["down_proj", "q_proj"]),
    "weights": under(weights("per_tensor"), ActivationConfig(bits=None)),
    "fp8": under(weights("per_tensor", format="fp8_e4m3"), static(**FP8)),
    "fp8 kept": under(weights("per_tensor", format="fp8_e4m3"), static(**FP8)),
    "fp8 token": under(weights(format="fp8_e4m3"), dynamic("per_token", format="fp8_e4m3")),
}
OTHER_SCALES = {
    "token": under(weights(), dynamic("per_token")),
    "4 bits": under(weights(bits=4), dynamic("per_token", bits=4)),
    "dynamic": under(weights(), dynamic("per_tensor")),
}
OFFSET = {"symmetric": False, "narrow_range": True}
ZERO_POINT = {
    "zero point": under(weights(), static(**OFFSET), zero_point="integer"),
    "zero points": under(weights(), static(**OFFSET, range="dynamic", granularity="per_token"), zero_point="integer"),
}

LOADING = """
import json, sys
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache

torch.set_num_threads(1)
given, found, seen = load_file("given.safetensors"), {}, {}
layers = [(given[f"key {i}"], given[f"value {i}"]) for i in range(len(given) // 2)]
for name in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    cache = DynamicCache([tuple(part.clone() for part in layer) for layer in layers])
    with torch.no_grad():
        found[name] = model(given["texts"], past_key_values=cache).logits
    schemes = {n: getattr(m, "quantization_scheme", None) for n, m in model.named_modules()}
    seen[name] = {n: s.input_activations is not None for n, s in schemes.items() if s is not None}
save_file(found, "found.safetensors")
assert not [name for name in sys.modules if name.partition(".")[0] == "cushion"]
print(json.dumps(seen))
"""


def logits(lm: LanguageModel, texts: Tensor, prefix: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = lm.model(texts, past_key_values=prefix.cache(lm.model)).logits
    return found


class Written:
    """What all quantizers give here, and what another process makes of their checkpoints."""

    def __init__(self, folder: Path) -> None:
        config = small_config(write_documents(folder / "text.txt"), folder / "out")
        config.quantizer = EXACT["channel"]
        prepared = prepare(config, "cpu")
        self.lm, self.texts = prepared.lm, random_texts(1, 24)
        prefix = self.prefix = tuned_prefix(self.lm, TOKENS)
        steps = Steps(config, prepared, lambda _: None, folder)
        self.fitted, self.simulated = {}, {}
        before = {name: value.clone() for name, value in self.lm.model.state_dict().items()}
        for name, quantizer in {**EXACT, **OTHER_SCALES, **ZERO_POINT}.items():
            fitted = steps.fit(prefix, quantizer)
            if "kept" in name:
                fitted = replace(fitted, keep=frozenset(KEPT))
            self.fitted[name] = fitted
            with fitted.on(self.lm):
                self.simulated[name] = logits(self.lm, self.texts, prefix)
            checkpoint.save(self.lm, fitted, schemes.scheme_of(quantizer), folder / name)
        after = self.lm.model.state_dict()
        assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
        cache = {f"key {i}": key[None] for i, key in enumerate(prefix.keys)}
        cache |= {f"value {i}": value[None] for i, value in enumerate(prefix.values)}
        save_file({**cache, "texts": self.texts}, folder / "given.safetensors")
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        done = subprocess.run(
            [sys.executable, "-P", "-c", LOADING, *self.simulated],
            cwd=folder, env=environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        self.seen: dict[str, dict[str, bool]] = json.loads(done.stdout.splitlines()[-1])
        self.loaded = load_file(folder / "found.safetensors")
        self.folder = folder


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return Written(tmp_path_factory.mktemp("written"))


@pytest.mark.parametrize("name", EXACT)
def test_loaded_logits_are_those_of_the_simulation(name: str, written: Written) -> None:
    assert torch.equal(written.loaded[name], written.simulated[name])
    assert not torch.equal(written.simulated[name], logits(written.lm, written.texts, written.prefix))
    linears = written.lm.linears(EXACT[name].targets)
    kept = KEPT if "kept" in name else list(linears) if name == "weights" else []
    assert written.seen[name] == {linear: linear not in kept for linear in linears}


@pytest.mark.parametrize("name", OTHER_SCALES)
def test_dynamic_integer_scales_differ_by_half_a_step_and_nothing_else(
    name: str, written: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    bits = OTHER_SCALES[name].activations.bits
    assert bits is not None
    assert not torch.equal(written.loaded[name], written.simulated[name])
    with written.fitted[name].on(written.lm):
        monkeypatch.setattr(Grid, "steps", 2 ** (bits - 1) - 0.5)
        monkeypatch.setattr(Grid, "bounds", (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1))
        assert torch.equal(written.loaded[name], logits(written.lm, written.texts, written.prefix))
    assert f"over {2 ** (bits - 1) - 1}.5" in schemes.scheme_of(OTHER_SCALES[name]).differs


def with_zero_point(values: Tensor, scale: Tensor, offset: Tensor, grid: Grid) -> Tensor:
    """Quantize and dequantize as the format has it: a signed whole number is added to the codes."""
    zero = torch.round(-offset / scale) - 128
    return ((values / scale + zero).round().clamp(-128, 127) - zero) * scale


@pytest.mark.parametrize("name", ZERO_POINT)
def test_a_zero_point_differs_by_the_order_of_operations_and_nothing_else(
    name: str, written: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not torch.equal(written.loaded[name], written.simulated[name])
    with written.fitted[name].on(written.lm):
        monkeypatch.setattr("cushion.quantization.linear.fake_quantize", with_zero_point)
        assert torch.equal(written.loaded[name], logits(written.lm, written.texts, written.prefix))
    assert "zero point" in schemes.scheme_of(ZERO_POINT[name]).differs


def test_the_files_hold_codes_and_the_scales_of_the_run(written: Written) -> None:
    linear = "model.layers.0.mlp.up_proj"
    tensors = load_file(written.folder / "channel" / "model.safetensors")
    codes, scale = tensors[f"{linear}.weight"], tensors[f"{linear}.weight_scale"]
    assert codes.dtype == torch.int8 and scale.shape == (codes.shape[0], 1)
    own = written.lm.linears()[linear].weight
    assert torch.equal(scale, own.abs().amax(1, keepdim=True) / 127)
    assert torch.equal(codes.float(), (own / scale).round())
    low, high = (
        ends[linear] for ends in (written.fitted["channel"].ranges.minimum, written.fitted["channel"].ranges.maximum)
    )
    largest = torch.maximum(high.amax(), -low.amin())
    assert torch.equal(tensors[f"{linear}.input_scale"], (largest / 127)[None])
    settings = json.loads((written.folder / "kept" / "config.json").read_text())["quantization_config"]
    groups = settings["config_groups"].values()
    assert sorted(group["format"] for group in groups) == ["int-quantized", "pack-quantized"]
    assert settings["format"] == "mixed-precision" and settings["ignore"] == ["lm_head"]
    rotated = json.loads((written.folder / "rotated" / "config.json").read_text())
    assert rotated["tie_word_embeddings"] is False and "lm_head.weight" in load_file(
        written.folder / "rotated" / "model.safetensors"
    )


NARROW, FULL = static(narrow_range=True), ActivationConfig(bits=None)
REFUSED = {
    "narrow_range=true: it clamps codes at -128, not at -127; run with .*narrow_range=false": under(weights(), NARROW),
    "zero_point=real: .* run with quantizer.zero_point=integer": under(weights(), replace(NARROW, symmetric=False)),
    "levels=paper: .* run with quantizer.levels=full": under(weights(), dynamic("per_token"), levels="paper"),
    "weights.bits=null: .* run with 8 bits": under(weights(bits=None), static()),
    "weights.format=fp8_e5m2: .* one of int, fp8_e4m3": under(weights(format="fp8_e5m2"), static()),
    "quantizer=it, which rounds nothing": under(weights(bits=None), FULL),
    "input_rotation: .* run with quantizer.input_rotation=none": under(weights(), static(), input_rotation="down"),
}


@pytest.mark.parametrize(("message", "quantizer"), REFUSED.items())
def test_what_the_format_does_not_express_is_refused(message: str, quantizer: QuantizerConfig) -> None:
    with pytest.raises(ConfigError, match=message):
        schemes.scheme_of(quantizer)


@pytest.mark.parametrize(
    ("family", "rotation", "message"),
    [
        ("mixtral", "none", "experts as .*'mixtral'.*fused"),
        ("opt", "hadamard", "rotation=hadamard on .*'opt' has norms"),
        ("gemma2", "hadamard", "rotation=hadamard on .*'gemma2' has norms"),
        ("bloom", "hadamard", "rotation=hadamard on .*'bloom' has norms"),
    ],
)
def test_models_that_transformers_does_not_build_are_refused(
    family: str, rotation: str, message: str, tiny: Tiny
) -> None:
    from cushion.quantization.fitted import FittedQuantizer

    fitted = FittedQuantizer(under(weights(), static(), rotation=rotation))
    with pytest.raises(ConfigError, match=message):
        checkpoint.check_architecture(tiny(family), fitted)
