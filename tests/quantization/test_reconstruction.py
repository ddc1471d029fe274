"""Block-wise reconstruction: the error of the outputs falls, a killed one goes on, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import calibrated, random_texts
from torch import Tensor
from torch.nn import functional

from cushion.artifacts import ArtifactStore, Checkpoint
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
from cushion.quantization import reconstruction_step
from cushion.quantization.calibration import Calibration
from cushion.quantization.effect import Turn
from cushion.quantization.fitted import FittedQuantizer
from cushion.quantization.input_statistics import fitted_behind
from cushion.quantization.learned import Learned
from cushion.quantization.reconstruction import BlockRecord, batches, learning_rate_factor
from cushion.quantization.reconstruction_step import Reconstructed, ReconstructionStep
from cushion.step import Context, compute

Tiny = Callable[..., LanguageModel]
TEXTS = random_texts(8, 32, seed=2)
W4A6 = QuantizerConfig(weights=WeightConfig(4, "per_channel"), activations=ActivationConfig(6))
KINDS = {
    "symmetric": W4A6,
    "asymmetric": replace(W4A6, activations=ActivationConfig(6, symmetric=False)),
    "smoothed with its cache": replace(W4A6, smoothing_alpha=0.5, kv_cache=KvCacheConfig(6)),
    "rotated": replace(W4A6, rotation="hadamard"),
    "inputs rotated": replace(W4A6, input_rotation="down"),
}
CONFIG = ReconstructionConfig("scales", "blockwise", scale_learning_rate=0.03, weight_learning_rate=1e-3)
BRIEF = replace(CONFIG, epochs=1)
"""Where it is not asked how well it learns."""
DOWN = "model.layers.1.mlp.down_proj"


def planted(lm: LanguageModel) -> LanguageModel:
    """A model in which one token blows up one channel of the last linear of a block, so that min-max is too wide."""
    with torch.no_grad():
        for block in lm.blocks:
            for linear in (block.mlp.gate_proj, block.mlp.up_proj):
                linear.weight[7] *= 6.0
            block.mlp.down_proj.weight[:, 7] = 0.0
    return lm


def step_of(
    lm: LanguageModel,
    quantizer: QuantizerConfig = W4A6,
    config: ReconstructionConfig = CONFIG,
    start: tuple[int, ...] = (),
    keep: frozenset[str] = frozenset(),
) -> ReconstructionStep:
    prefix = Prefix.from_tokens(lm.model, start)
    fitted = fitted_behind(lm, prefix, quantizer, TEXTS)
    calibration = Calibration(fitted.ranges, "ranges", 0.0, fitted.inputs)
    return ReconstructionStep(prefix, quantizer, calibration, keep, config, TEXTS, 0, "no prefix")


def made(lm: LanguageModel, step: ReconstructionStep, folder: Path) -> Reconstructed:
    return compute(step, Context(lm, ArtifactStore(folder), lambda event: None))


@torch.no_grad()
def outputs(lm: LanguageModel, behind: Prefix) -> tuple[Tensor, Tensor]:
    """What the decoder makes of the texts, (texts, tokens, features), and the logits."""
    hidden = [lm.body(text[None], past_key_values=behind.cache(lm.model), use_cache=True)[0] for text in TEXTS]
    return torch.cat(hidden), lm.logits(torch.cat(hidden))


def errors(lm: LanguageModel, step: ReconstructionStep, found: Reconstructed | None) -> tuple[float, float]:
    """Of the quantized model with what was found: squared error of its output, and divergence of its predictions."""
    fitted = FittedQuantizer.of(step.quantizer, step.calibration, step.keep, None if found is None else found.learned)
    with fitted.surroundings(lm):
        hidden, logits = outputs(lm, step.behind)
    with fitted.on(lm):
        own, predicted = outputs(lm, step.behind)
    lost = functional.kl_div(predicted.log_softmax(-1), logits.log_softmax(-1), reduction="sum", log_target=True)
    return float((own - hidden).square().mean()), float(lost)


@pytest.mark.parametrize(
    ("kind", "weights"), [("symmetric", False), ("asymmetric", False), *((kind, True) for kind in KINDS)]
)
def test_outputs_and_predictions_come_nearer_to_full_precision(
    tiny: Tiny, tmp_path: Path, kind: str, weights: bool
) -> None:
    lm = planted(tiny())
    step = step_of(lm, KINDS[kind], replace(CONFIG, weights=weights, epochs=2), start=(256, 10))
    found = made(lm, step, tmp_path)
    for before, after in zip(errors(lm, step, None), errors(lm, step, found), strict=True):
        assert after < 0.95 * before
    blocks = found.record["blocks"]
    assert [block["block"] for block in blocks] == [0, 1, 2]
    assert all(block["after"] < block["before"] for block in blocks if block["kept"])
    assert blocks[0]["kept"]
    assert found.learned.ranges.keys() <= lm.linears().keys()
    assert found.learned.weights.keys() == (found.learned.ranges.keys() if weights else set())


IN_NVFP4 = replace(W4A6, weights=WeightConfig(4, "per_block", format="nvfp4"))
"""Query, key and value have one tensor scale, and gate and up."""


@pytest.mark.parametrize("quantizer", [W4A6, IN_NVFP4], ids=["int", "nvfp4"])
def test_the_recorded_error_of_the_last_block_is_that_of_the_quantized_model(
    tiny: Tiny, tmp_path: Path, quantizer: QuantizerConfig
) -> None:
    lm = planted(tiny())
    with torch.no_grad():
        lm.blocks[-1].self_attn.v_proj.weight[0, 0] = 5.0  # far above all of query and key
    step = step_of(lm, quantizer, replace(BRIEF, weights=True, batch_size=3), start=(256,))
    found = made(lm, step, tmp_path)
    lm.model.base_model.norm = torch.nn.Identity()  # the final norm is not part of a block
    error, _ = errors(lm, step, found)
    assert found.record["blocks"][-1]["after"] == pytest.approx(error, rel=1e-4)


def test_linears_that_read_one_norm_keep_one_range_and_kept_ones_get_none(tiny: Tiny, tmp_path: Path) -> None:
    lm = planted(tiny())
    found = made(lm, step_of(lm, config=BRIEF, keep=frozenset({DOWN})), tmp_path)
    query, key = (found.learned.ranges[f"model.layers.0.self_attn.{name}_proj"] for name in "qk")
    assert query == key
    assert DOWN not in found.learned.ranges
    start = calibrated(lm, TEXTS)
    moved = {name for name, (_, high) in found.learned.ranges.items() if high != start.maximum[name].max()}
    assert moved == found.learned.ranges.keys()


def test_a_block_whose_inputs_are_all_kept_has_nothing_to_learn(tiny: Tiny, tmp_path: Path) -> None:
    lm = planted(tiny())
    keep = frozenset(name for name in lm.linears() if name.startswith("model.layers.0."))
    found = made(lm, step_of(lm, config=BRIEF, keep=keep), tmp_path)
    first, *others = found.record["blocks"]
    assert first["before"] == first["after"] > 0 and not first["kept"]
    assert all(other["before"] != other["after"] for other in others)
    assert keep.isdisjoint(found.learned.ranges)


class KilledError(Exception):
    pass


def test_a_killed_reconstruction_goes_on_with_the_next_block(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = planted(tiny())
    step = step_of(lm, config=replace(BRIEF, weights=True))
    whole = made(lm, step, tmp_path / "whole")
    monkeypatch.setattr(Checkpoint, "due", lambda self: True)
    done: list[int] = []

    def interrupted(stop: int) -> Callable[[Turn, ReconstructionConfig, int], BlockRecord]:
        def reconstruct(turn: Turn, config: ReconstructionConfig, seed: int) -> BlockRecord:
            if turn.index == stop:
                raise KilledError
            done.append(turn.index)
            return own(turn, config, seed)

        return reconstruct

    own = reconstruction_step.reconstruct_block
    monkeypatch.setattr(reconstruction_step, "reconstruct_block", interrupted(2))
    with pytest.raises(KilledError):
        made(lm, step, tmp_path / "killed")
    monkeypatch.setattr(reconstruction_step, "reconstruct_block", interrupted(-1))
    again = made(lm, step, tmp_path / "killed")
    assert done == [0, 1, 2]
    assert again.learned.fingerprint == whole.learned.fingerprint
    assert again.record["blocks"] == whole.record["blocks"]


def test_without_an_epoch_nothing_is_learned(tiny: Tiny, tmp_path: Path) -> None:
    lm = planted(tiny())
    step = step_of(lm, config=replace(CONFIG, epochs=0, weights=True))
    found = made(lm, step, tmp_path)
    assert not found.learned.ranges and not found.learned.weights
    assert errors(lm, step, found) == errors(lm, step, None)


def test_a_block_whose_error_does_not_fall_keeps_what_it_had(tiny: Tiny, tmp_path: Path) -> None:
    lm = planted(tiny())
    found = made(lm, step_of(lm, config=replace(BRIEF, scale_learning_rate=30.0)), tmp_path)
    assert not any(block["kept"] for block in found.record["blocks"])
    assert not found.learned.ranges


def test_what_decides_the_outcome_is_in_the_key(tiny: Tiny) -> None:
    lm = tiny()
    step, context = step_of(lm), Context(lm, ArtifactStore(Path()), lambda event: None)
    others = [
        replace(step, seed=1),
        replace(step, texts=TEXTS[:4]),
        replace(step, keep=frozenset({DOWN})),
        replace(step, config=replace(CONFIG, epochs=5)),
        replace(step, config=replace(CONFIG, weights=True)),
        replace(step, behind=Prefix.from_tokens(lm.model, [256])),
        replace(step, start=Learned({DOWN: (torch.tensor(-1.0), torch.tensor(1.0))})),
        replace(step, calibration=replace(step.calibration, key="others")),
    ]
    keys = [str(one.key(context)) for one in (step, *others)]
    assert len(set(keys)) == len(keys)
    renamed = replace(step, title="found prefix", config=replace(CONFIG, name="mine", weight_learning_rate=1.0))
    assert renamed.key(context) == step.key(context)


def test_the_texts_come_in_an_order_of_their_own_in_every_pass_and_the_rate_falls_to_a_tenth() -> None:
    config = replace(CONFIG, epochs=2, batch_size=3)
    orders = [torch.cat(list(batches(7, config, block, seed))).tolist() for block, seed in ((0, 0), (1, 0), (0, 1))]
    passes = [order[start : start + 7] for order in orders for start in (0, 7)]
    assert all(sorted(one) == list(range(7)) for one in passes)
    assert len({tuple(one) for one in passes}) == 6
    assert [len(one) for one in batches(7, config, 0, 0)] == [3, 3, 1] * 2
    assert [learning_rate_factor(step, 3) for step in range(3)] == pytest.approx([1.0, 0.55, 0.1])


@torch.no_grad()
def test_a_model_that_is_broken_before_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    lm = tiny()
    step = step_of(lm, config=BRIEF)
    lm.linears()[DOWN].weight[0, 0] = float("nan")
    with pytest.raises(CalibrationError, match="the quantized block 1 is not finite before reconstruction"):
        made(lm, step, tmp_path)


@pytest.mark.parametrize(
    ("quantizer", "config", "message"),
    [
        (
            QuantizerConfig("mine", activations=ActivationConfig(range="dynamic")),
            CONFIG,
            r"reconstruction=scales learns static ranges, and quantizer=mine has none "
            r"\(quantizer.activations.range=dynamic\): choose quantizer=per_tensor_static, or reconstruction=none",
        ),
        (
            QuantizerConfig(activations=ActivationConfig(bits=None)),
            CONFIG,
            r"has none \(quantizer.activations.bits=null\)",
        ),
        (
            QuantizerConfig(weights=WeightConfig(None)),
            replace(CONFIG, weights=True),
            r"reconstruction.weights=true learns quantized weights, and quantizer=per_tensor_static has none",
        ),
    ],
)
def test_a_quantizer_with_nothing_to_learn_is_refused(
    quantizer: QuantizerConfig, config: ReconstructionConfig, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        RunConfig(quantizer=quantizer, reconstruction=config)


def test_keys_without_effect_are_warned_about() -> None:
    idle = replace(CONFIG, weight_learning_rate=1e-4)
    (warning,) = options_without_effect(RunConfig(reconstruction=idle))
    assert warning == "reconstruction.weight_learning_rate=0.0001 has no effect with reconstruction.weights=false"
    (warning,) = options_without_effect(RunConfig(reconstruction=ReconstructionConfig(samples=4)))
    assert warning == "reconstruction.samples=4 has no effect with reconstruction.method=none"
