"""A checkpoint of compressed-tensors, loaded without Cushion, gives the logits of the simulation, bit for bit."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from conftest import write_documents
from finished_runs import TOKENS, tuned_prefix
from helpers import calibrated, random_texts
from huggingface_hub.errors import OfflineModeIsEnabled
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from tiny_run import small_config, tuning_config
from torch import Tensor
from transformers import AutoModelForCausalLM

from cushion import pipeline
from cushion.checks import structured
from cushion.cli import config_folder
from cushion.config import (
    ActivationConfig,
    CalibrationConfig,
    CompensationConfig,
    KvCacheConfig,
    QFeMConfig,
    QuantizerConfig,
    ReconstructionConfig,
    RunConfig,
    SearchConfig,
    WeightConfig,
)
from cushion.errors import ArtifactError, ConfigError
from cushion.export import schemes
from cushion.export.checkpoint_card import Agreement, checkpoint_card
from cushion.export.cli import main
from cushion.export.finished import FinishedRun
from cushion.export.peft_adapter import prompt_embeddings
from cushion.export.refit import _on, refit
from cushion.export.targets import export
from cushion.models import LanguageModel
from cushion.prefix import Prefix
from cushion.preparation import prepare
from cushion.quantization.attention import static_cache_scales
from cushion.quantization.cache_ranges import keys_of, values_of
from cushion.quantization.fitted import FittedQuantizer
from cushion.quantization.formats.blocks import BlockQuantizer, quantize_weight_in_blocks
from cushion.quantization.formats.floats import round_to_float
from cushion.quantization.formats.nvfp4 import Nvfp4, tensor_scale
from cushion.quantization.input_statistics import fitted_behind
from cushion.quantization.numerics import Grid, QuantizedWeight
from cushion.quantization.rotation import rotated
from cushion.steps import Steps

pytest.importorskip("compressed_tensors")
checkpoint = pytest.importorskip("cushion.export.checkpoint")

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


def in_blocks(form: str, bits: int, **inputs: Any) -> QuantizerConfig:
    own = {"granularity": "per_block", "format": form}
    inputs = {"bits": bits, "range": "dynamic", "symmetric": True, **own, **inputs}
    return under(WeightConfig(bits=bits, **own), ActivationConfig(**inputs))


BLOCKS = {
    "nvfp4": in_blocks("nvfp4", 4, range="static"),
    "mxfp4": in_blocks("mxfp4", 4),
    "mxfp6": in_blocks("mxfp6", 6),
    "mxfp8": in_blocks("mxfp8", 8),
}


def with_cache(inputs: ActivationConfig, granularity: str) -> QuantizerConfig:
    own = KvCacheConfig(8, granularity, symmetric=True, range="static", format="fp8_e4m3")
    return under(weights(), inputs, kv_cache=own)


CACHES = {
    "cache per head": with_cache(ActivationConfig(bits=None), "per_head"),
    "cache per tensor": with_cache(ActivationConfig(bits=None), "per_tensor"),
}

LOADING = """
import json, sys
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache

PLAIN = ("int-quantized", "float-quantized", "pack-quantized", "mixed-precision")
torch.set_num_threads(1)
given, found, seen = load_file("given.safetensors"), {}, {}
layers = [(given[f"key {i}"], given[f"value {i}"]) for i in range(len(given) // 2)]
for name in sys.argv[1:]:
    own = {"attn_implementation": "eager"} if "cache" in name else {}
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **own)
    if not model.config.quantization_config.quantization_config.format in PLAIN:  # weights come out in bfloat16
        model.hf_quantizer.compressor.decompress_model(model)
        torch.nn.Module.float(model)
        found |= {f"{name} {n}": p.data for n, p in model.named_parameters() if n.endswith("_proj.weight")}
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
        for name, quantizer in {**EXACT, **OTHER_SCALES, **ZERO_POINT, **BLOCKS, **CACHES}.items():
            fitted = steps.model(prefix, quantizer).fitted
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


@pytest.mark.parametrize("name", CACHES)
def test_a_static_cache_in_fp8_is_in_the_file_and_rounds_as_it_did(name: str, written: Written) -> None:
    file, heads = load_file(written.folder / name / "model.safetensors"), written.lm.model.config.num_key_value_heads
    with written.fitted[name].on(written.lm):
        scales = static_cache_scales(written.lm)
    for layer in range(len(written.lm.blocks)):
        for own, of in (("k_scale", keys_of), ("v_scale", values_of)):
            stored = file[f"model.layers.{layer}.self_attn.{own}"]
            assert torch.equal(stored.flatten(), scales[of(layer)].flatten())
            assert len(stored) == (1 if name == "cache per tensor" else heads)
    with replace(written.fitted[name], config=replace(CACHES[name], kv_cache=KvCacheConfig(None))).on(written.lm):
        assert not torch.equal(logits(written.lm, written.texts, written.prefix), written.simulated[name])
    assert torch.equal(written.loaded[name], written.simulated[name])


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


def by_global_scale(values: Tensor, grid: Any, whole: Tensor) -> Tensor:
    """NVFP4 as the format has it: the scale of the tensor is a factor in front of those of blocks."""
    blocks, factor = values.unflatten(-1, (-1, 16)), 448 / (whole / 6)
    largest = torch.maximum(blocks.amax(-1, keepdim=True), -blocks.amin(-1, keepdim=True))
    scale = (factor * (largest / 6)).to(torch.float8_e4m3fn).float() / factor
    return (round_to_float(blocks / scale, 2, 1, 6.0) * scale).flatten(-2)


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_agree_where_the_model_stays_in_float32(
    name: str, written: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = list(written.lm.linears())
    assert torch.equal(written.loaded[name], written.simulated[name]) == (name != "nvfp4")
    with written.fitted[name].on(written.lm):
        if name == "nvfp4":
            monkeypatch.setattr("cushion.quantization.formats.blocks.fake_quantize_blocks", by_global_scale)
        for linear in names:
            own, loaded = written.lm.model.get_submodule(linear).weight, written.loaded[f"{name} {linear}.weight"]
            torch.testing.assert_close(loaded, own, rtol=2**-8 if name == "nvfp4" else 0, atol=0)
            own.copy_(loaded)
        assert torch.equal(written.loaded[name], logits(written.lm, written.texts, written.prefix))
    scheme = schemes.scheme_of(BLOCKS[name])
    assert scheme.dtype == "bfloat16" and "in bfloat16" in scheme.differs
    another = schemes.scheme_of(replace(BLOCKS[name], shared_exponent="floor")).differs
    assert ("rule of its own" in another, "rule of its own" in scheme.differs) == (name != "nvfp4", False)


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
    fp8 = load_file(written.folder / "fp8" / "model.safetensors")
    codes, scale = fp8[f"{linear}.weight"], fp8[f"{linear}.weight_scale"]
    assert codes.dtype == torch.float8_e4m3fn and scale.shape == (codes.shape[0], 1)
    assert scale.unique().numel() == 1, "one for the tensor, written once for each channel"
    settings = json.loads((written.folder / "kept" / "config.json").read_text())["quantization_config"]
    groups = settings["config_groups"].values()
    assert sorted(group["format"] for group in groups) == ["int-quantized", "pack-quantized"]
    assert settings["format"] == "mixed-precision" and settings["ignore"] == ["lm_head"]
    rotated = json.loads((written.folder / "rotated" / "config.json").read_text())
    assert rotated["tie_word_embeddings"] is False and "lm_head.weight" in load_file(
        written.folder / "rotated" / "model.safetensors"
    )
    blocks = load_file(written.folder / "nvfp4" / "model.safetensors")
    for part, names in {"self_attn": ("q", "k", "v"), "mlp": ("gate", "up")}.items():  # one, as servers read them
        places = [f"model.layers.0.{part}.{name}_proj.weight" for name in names]
        whole = torch.stack([written.lm.model.get_parameter(place).abs().max() for place in places]).max()
        for place in places:
            torch.testing.assert_close(1 / blocks[f"{place}_global_scale"], (whole / 448 / 6)[None])


NARROW, FULL = static(narrow_range=True), ActivationConfig(bits=None)
REFUSED = {
    "narrow_range=true: it clamps codes at -128, not at -127; run with .*narrow_range=false": under(weights(), NARROW),
    "zero_point=real: .* run with quantizer.zero_point=integer": under(weights(), replace(NARROW, symmetric=False)),
    "levels=paper: .* run with quantizer.levels=full": under(weights(), dynamic("per_token"), levels="paper"),
    "weights.bits=null: .* run with 8 bits": under(weights(bits=None), static()),
    "activations.range=dynamic of nvfp4: .*range=static": in_blocks("nvfp4", 4),
    "activations.format=mxfp4: .* one format for both": replace(in_blocks("mxfp4", 4), weights=weights()),
    "weights.format=fp8_e5m2: .* one of int, fp8_e4m3": under(weights(format="fp8_e5m2"), static()),
    "quantizer=it, which rounds nothing": under(weights(bits=None), FULL),
    "input_rotation: .* run with quantizer.input_rotation=none": under(weights(), static(), input_rotation="down"),
    "compensation: .* run with quantizer.compensation.method=none": under(
        weights(), static(), compensation=CompensationConfig("lqer")
    ),
    "kv_cache.granularity=per_token: .* run with per_head and .*bits=null": under(
        weights(), static(), kv_cache=KvCacheConfig(8)
    ),
    "kv_cache.format=int: of caches .* run with fp8_e4m3, or": under(
        weights(), static(), kv_cache=KvCacheConfig(8, "per_head", range="static")
    ),
    "kv_cache.protect=4: of caches .* run with 0, or": under(
        weights(), static(), kv_cache=replace(with_cache(FULL, "per_head").kv_cache, protect=4)
    ),
}


@pytest.mark.parametrize(("message", "quantizer"), REFUSED.items())
def test_what_the_format_does_not_express_is_refused(message: str, quantizer: QuantizerConfig) -> None:
    with pytest.raises(ConfigError, match=message):
        schemes.scheme_of(quantizer)


@pytest.mark.parametrize(
    ("family", "own"),
    [
        ("opt", {"smoothing_alpha": 0.8}),
        ("bloom", {"smoothing_alpha": 0.8}),
        ("gpt_neox", {"smoothing_alpha": 0.8}),
        ("phi3", {"smoothing_alpha": 0.8}),
        ("gemma2", {"smoothing_alpha": 0.8}),
        ("gemma", {"rotation": "hadamard"}),
    ],
)
@torch.no_grad()
def test_families_load_as_their_own_class(family: str, own: dict[str, Any], tiny: Tiny, tmp_path: Path) -> None:
    lm, texts = tiny(family), random_texts(2, 12)
    prefix, quantizer = tuned_prefix(lm, TOKENS), under(weights(), static(), **own)
    with rotated(lm, quantizer.rotation):
        fitted = FittedQuantizer(quantizer, calibrated(lm, random_texts(1, 12), prefix))
    checkpoint.check_architecture(lm, fitted)
    checkpoint.save(lm, fitted, schemes.scheme_of(quantizer), tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(loaded) is type(lm.model)
    with fitted.on(lm):
        assert torch.equal(loaded(texts, past_key_values=prefix.cache(loaded, 2)).logits, logits(lm, texts, prefix))


def test_the_page_says_of_the_options_what_the_code_does() -> None:
    page = (Path(__file__).parents[2] / "docs" / "export.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| (equal|equal with `.*`|differ|refused: .*) \|$", page, re.MULTILINE)
    assert len(rows) > 5
    for options, verdict in rows:
        for option in re.findall(r"`(\w+)`", options):
            file = config_folder() / "quantizer" / f"{option}.yaml"
            quantizer = structured(QuantizerConfig, OmegaConf.load(file), "quantizer")
            if verdict.startswith(("equal with", "refused")):
                words = {
                    "branch": "compensation",
                    "several": "granularity",
                    "rotate": "rotation|kv_cache",
                    "cache": "kv",
                    "shift": "smoothing_search",
                }
                refused = next((key for word, key in words.items() if word in verdict), "no reason that is known")
                reason = "narrow_range=false" if "with" in verdict else refused
                with pytest.raises(ConfigError, match=reason):
                    schemes.scheme_of(quantizer)
                if "with" in verdict:
                    quantizer.activations = replace(quantizer.activations, narrow_range=False)
            if "refused" not in verdict:
                assert (schemes.scheme_of(quantizer).differs is None) == verdict.startswith("equal"), option


def test_without_the_package_it_is_refused(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cushion.export.built_in.compressed_tensors.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"needs the package compressed-tensors: pip install compressed-tensors$"):
        export(FinishedRun.read(runs["plain"]), "compressed-tensors", tmp_path / "made")


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
    fitted = FittedQuantizer(under(weights(), static(), rotation=rotation))
    with pytest.raises(ConfigError, match=message):
        checkpoint.check_architecture(tiny(family), fitted)


def test_a_cache_is_refused_where_the_format_finds_none(tiny: Tiny, tmp_path: Path) -> None:
    quantizer = CACHES["cache per head"]
    with pytest.raises(ConfigError, match=r"quantizer\.kv_cache on tiny_opt: its configuration does not say"):
        checkpoint.check_architecture(tiny("opt"), FittedQuantizer(quantizer))
    lm = tiny("gpt_neox")
    fitted = fitted_behind(lm, Prefix.empty(), quantizer, random_texts(2, 16))
    before = list(lm.model.state_dict())
    with pytest.raises(ConfigError, match="finds the attention of 0 of its 3 blocks; run with"):
        checkpoint.save(lm, fitted, schemes.scheme_of(quantizer), tmp_path)
    assert list(lm.model.state_dict()) == before


def whole_runs(text: Path, output: Path) -> dict[str, RunConfig]:
    """Runs whose own row needs something of the run besides its configuration, and one that needs nothing."""
    runs = {}
    for name in ("learned", "reconstructed", "kept", "plain"):
        config = runs[name] = small_config(text, output)
        config.quantizer = under(weights(), static(), smoothing_alpha=0.8)
        config.search = SearchConfig(name="given", method="tokens", token_ids=TOKENS)
        config.eval.controls = False
    for name, ranges in (("learned", "learned"), ("kept", "static")):
        tuning = tuning_config(text, output).tuning
        runs[name].tuning = replace(tuning, ranges=ranges, learning_rate=0.05, scale_learning_rate=0.05, ranges_every=1)
    runs["reconstructed"].reconstruction = ReconstructionConfig(
        "it", "blockwise", True, epochs=1, weight_learning_rate=1e-3
    )
    runs["kept"].quantizer = under(weights(), static(), qfem=QFeMConfig(alpha=1.4))
    runs["plain"].search = SearchConfig()
    runs["plain"].quantizer = replace(runs["plain"].quantizer, kv_cache=CACHES["cache per head"].kv_cache)
    return runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of these runs."""
    base, found = tmp_path_factory.mktemp("runs"), {}
    for name, config in whole_runs(write_documents(base / "text.txt"), base / "out").items():
        assert pipeline.run(config).status == "completed"
        found[name] = pipeline.run_folder(config)
    return found


@pytest.mark.parametrize("name", ["learned", "reconstructed", "kept", "plain"])
def test_an_export_is_the_runs_own_row(name: str, runs: dict[str, Path], tmp_path: Path) -> None:
    made = tmp_path / "made"
    export(FinishedRun.read(runs[name]), "compressed-tensors", made)
    row = json.loads((runs[name] / "result.json").read_text())["rows"][-1]
    card = (made / "README.md").read_text()
    assert f"the model of the row {row['label']!r}" in card.replace("\\_", "_")
    perplexity = f"{row['values']['perplexity/text']:.4f}"
    assert "on the first 4 blocks of 32 tokens of 'text': the largest difference of a logit" in card
    agreed = f"is 0; perplexity {perplexity}, in the simulation {perplexity}. The run measured {perplexity} on these"
    assert agreed in card
    folded = "Folded into the weights: smoothing (alpha 0.8)" in card
    assert (folded, "(QFeM, arXiv 2405.14428)" in card) == (name != "kept", name == "kept")
    assert (made / "prefix").is_dir() == ("in `prefix/` as a PEFT adapter" in card) == (name != "plain")
    assert ('attn_implementation="eager"' in card) == (",attn_implementation=eager" in card) == (name == "plain")
    if name == "learned":
        adapter = json.loads((made / "prefix" / "adapter_config.json").read_text())
        assert adapter["base_model_name_or_path"] == "made"
        embeddings = load_file(made / "prefix" / "adapter_model.safetensors")["prompt_embeddings"]
        assert torch.equal(embeddings, prompt_embeddings(FinishedRun.read(runs[name]).prefix()))


def test_the_losses_of_a_row_are_those_of_whole_batches() -> None:
    own = {"nats": [1.0, 2.0, 3.0], "tokens": [10, 10, 5]}
    assert [(one.loss, one.tokens) for one in _on(20, own)] == [(1.0, 10), (2.0, 10)]
    assert len(_on(25, own)) == 3
    assert _on(15, own) == _on(20, None) == ()


@pytest.mark.parametrize("largest", [12.0, 0.0])
def test_the_tensor_scale_of_an_input_is_that_of_the_simulation(largest: float) -> None:
    """Also where all of calibration was zero: the simulation takes 1 then, and the file holds its inverse."""
    weight = quantize_weight_in_blocks(torch.randn(8, 16), Nvfp4(4, True), torch.tensor(4.0))
    linear: Any = SimpleNamespace(
        weight_scale=torch.zeros(8, 1), weight_global_scale=torch.zeros(1), input_global_scale=torch.zeros(1)
    )
    end = torch.tensor(largest)
    checkpoint._copy_scales(linear, weight, BlockQuantizer(Nvfp4(4, True), (-end, end)))
    assert 1 / linear.input_global_scale.item() == pytest.approx(float(tensor_scale(end)))


@torch.no_grad()
def test_checkpoint_and_adapter_give_the_row_without_us(runs: dict[str, Path], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    run = FinishedRun.read(runs["learned"])
    export(run, "compressed-tensors", tmp_path / "made")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "made", dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, tmp_path / "made" / "prefix")
    losses = []
    for block in refit(run).blocks:
        predicted = model(block[None]).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(predicted, block[1:]).item())
    row = run.record["rows"][-1]
    assert math.exp(statistics.fmean(losses)) == pytest.approx(row["values"]["perplexity/text"], rel=1e-6)


def changed(folder: Path, run: Path, **record: Any) -> Path:
    """A copy of a run whose record says something else."""
    shutil.copytree(run, folder)
    content = json.loads((folder / "result.json").read_text())
    del content["integrity"]
    (folder / "result.json").write_text(json.dumps({**content, **record}))
    return folder


def doubled(record: dict[str, Any]) -> dict[str, Any]:
    """The losses of a result as if its rows had lost twice as much."""
    return {
        row: {corpus: {**own, "nats": [2 * one for one in own["nats"]]} for corpus, own in by_corpus.items()}
        for row, by_corpus in record["evaluation"]["losses"].items()
    }


def test_a_run_that_cannot_be_made_again_is_refused(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = json.loads((runs["plain"] / "result.json").read_text())
    refused = {
        "model.path='tiny:llama' is not what it was": {"model": {**record["model"], "fingerprint": "another"}},
        "data.calibration='file' is not what it was": {
            "data": {**record["data"], "calibration": {**record["data"]["calibration"], "sha256": "another"}}
        },
        "does not express scales in bfloat16 exactly (model.dtype)": {
            "model": {**record["model"], "dtype": "bfloat16"}
        },
        "configuration this version does not read (seeds: Key 'seeds'": {"config": {**record["config"], "seeds": 1}},
        "and the run measured": {"evaluation": {**record["evaluation"], "losses": doubled(record)}},
    }
    for number, (message, changes) in enumerate(refused.items()):
        run = changed(tmp_path / str(number), runs["plain"], **changes)
        with pytest.raises(SystemExit):
            main([str(run), "--to", "compressed-tensors", str(tmp_path / "made")])
        assert message in capsys.readouterr().err
        assert not (tmp_path / "made").exists()


def test_a_checkpoint_with_other_logits_is_not_written(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = checkpoint._copy_scales

    def worse(weight: QuantizedWeight) -> QuantizedWeight:
        return replace(weight, scale=weight.scale * 1.01)

    monkeypatch.setattr(checkpoint, "_copy_scales", lambda linear, weight, own: copy(linear, worse(weight), own))
    with pytest.raises(ArtifactError, match=r"gives other logits than the simulation, by up to [\d.e-]+, where"):
        export(FinishedRun.read(runs["plain"]), "compressed-tensors", tmp_path / "made")
    assert list(tmp_path.iterdir()) == []


class Hub:
    """Stands for `HfApi`: it remembers what it was asked."""

    asked: ClassVar[list[tuple[str, Any]]] = []

    def create_repo(self, repository: str, **options: Any) -> str:
        self.asked.append((repository, options))
        if repository == "nobody/it":
            raise OfflineModeIsEnabled("the hub is out of reach")
        return f"https://hub/{repository}"

    def upload_folder(self, repo_id: str, folder_path: Path, **options: Any) -> None:
        self.asked.append((repo_id, sorted(path.name for path in folder_path.iterdir())))


def test_it_is_uploaded_where_that_is_asked_for(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr(Hub, "asked", [])
    command = [str(runs["kept"]), "--to", "peft", "--base-model", "owner/base"]
    main([*command, str(tmp_path / "alone")])
    assert not Hub.asked
    capsys.readouterr()
    main([*command, str(tmp_path / "made"), "--push", "owner/it"])
    assert capsys.readouterr().out.splitlines()[-1] == "https://hub/owner/it"
    files = sorted(path.name for path in (tmp_path / "made").iterdir())
    assert Hub.asked == [("owner/it", {"repo_type": "model", "private": True, "exist_ok": True}), ("owner/it", files)]
    for name, message in (
        ("nobody/it", "is written, but --push='nobody/it' failed: the hub is out of reach; log in with"),
        ("it", "--push='it' is not the id of a repository: write it as owner/name"),
    ):
        with pytest.raises(SystemExit):
            main([*command, str(tmp_path / name), "--push", name])
        assert message in capsys.readouterr().err
    assert (tmp_path / "nobody" / "it").is_dir() and not (tmp_path / "it").exists()


def test_the_card_names_where_it_is_published(runs: dict[str, Path]) -> None:
    run = FinishedRun.read(runs["learned"], "owner/base", "owner/it")
    card = checkpoint_card(
        run, "made", schemes.scheme_of(OTHER_SCALES["token"]), [], Agreement("text", 4, 32, 0.5, 9, 8)
    )
    assert card.startswith(
        '---\nbase_model: "owner/base"\nbase_model_relation: "quantized"\nlibrary_name: "transformers"'
    )
    assert 'from_pretrained("owner/it", dtype="float32")' in card
    assert 'PeftModel.from_pretrained(model, "owner/it", subfolder="prefix")' in card
    assert "pretrained=made,dtype=float32,add_bos_token=False,peft=made/prefix --tasks wikitext" in card
    assert "int8, one dynamic scale per token" in card and "is 0.5; perplexity 8.0000, in the simulation 9.0000" in card
