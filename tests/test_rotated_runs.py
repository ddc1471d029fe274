"""Whole runs with a rotation, an integer zero point and a quantized cache: their numbers, and what they share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_run import TUNED_ROWS, searching_config, small_config, tuning_config

from cushion import pipeline
from cushion.activations import ChannelRanges
from cushion.config import ActivationConfig, AttentionConfig, KvCacheConfig, QuantizerConfig, RunConfig
from cushion.errors import CalibrationError
from cushion.evaluation.perplexity import block_losses, perplexity
from cushion.models import load_language_model
from cushion.prefix import Prefix
from cushion.preparation import prepare
from cushion.quantization.calibration import calibrate
from cushion.quantization.fitted import FittedQuantizer
from cushion.quantization.rotation import rotated
from cushion.quantization.simulate import quantized
from cushion.tuning import tune_prefix
from cushion.tuning_ranges import tuning_quantizer


def turned(config: RunConfig, **changes: Any) -> RunConfig:
    config.quantizer = QuantizerConfig(
        name="turned", calibration=config.quantizer.calibration, rotation="hadamard", rotation_seed=3, **changes
    )
    return config


def folders(config: RunConfig, step: str) -> set[str]:
    return {path.name for path in (config.paths.cache / step).iterdir() if path.is_dir()}


def recomputed(config: RunConfig, prefix: Prefix, turn: bool = True) -> float:
    """The perplexity of the run's own row, from the parts: ranges of the rotated model, then the quantizer on it."""
    prepared = prepare(config, "cpu")
    lm, ranges = prepared.lm, ChannelRanges()
    assert prepared.texts.calibration is not None
    with rotated(lm, "hadamard" if turn else "none", 3):
        for _ in calibrate(lm, prefix, prepared.texts.calibration, ranges):
            pass
    with quantized(lm, config.quantizer, ranges):
        return perplexity(list(block_losses(lm, prefix, next(iter(prepared.blocks.values())), config.eval)))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"smoothing_alpha": 0.8, "kv_cache": KvCacheConfig(bits=4)},
        {"activations": ActivationConfig(bits=6, symmetric=False), "zero_point": "integer"},
    ],
    ids=["rotation", "rotation, smoothing and cache", "rotation and integer zero point"],
)
def test_a_run_with_search_tuning_and_rotation(text_file: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    config = turned(tuning_config(text_file, tmp_path / "out"), **changes)
    result = pipeline.run(config)
    assert result.status == "completed" and result.warnings == []
    assert [row.name for row in result.rows] == TUNED_ROWS
    assert result.rows[-1].label.startswith("turned W8A" + ("6" if "zero_point" in changes else "8"))
    assert ("KV4" in result.rows[-1].label) == ("kv_cache" in changes)
    assert result.tuning is not None and all(step["gradient_norm"] > 0 for step in result.tuning["steps"])

    prefix = Prefix.load(pipeline.run_folder(config) / "prefix")
    own = result.rows[-1].under("perplexity")["text"]
    assert recomputed(config, prefix) == pytest.approx(own, rel=1e-6)
    with pytest.raises(CalibrationError, match="those of a model with rotation"):
        recomputed(config, prefix, turn=False)


def test_a_rotated_run_shares_search_and_full_precision_but_no_calibration(text_file: Path, tmp_path: Path) -> None:
    plain = searching_config(text_file, tmp_path / "out")
    first = pipeline.run(plain)
    calibrations, searches = folders(plain, "calibration"), folders(plain, "search")
    config = turned(searching_config(text_file, tmp_path / "out"))
    second = pipeline.run(config)
    assert folders(config, "search") == searches
    assert folders(config, "calibration") > calibrations
    assert len(folders(config, "calibration")) == 2 * len(calibrations)
    shared = [[row for row in result.rows if not row.quantized] for result in (first, second)]
    assert shared[0] == shared[1]
    assert first.rows[-1].under("perplexity") != second.rows[-1].under("perplexity")

    other = turned(searching_config(text_file, tmp_path / "out"))
    other.quantizer.rotation_seed = 4
    assert pipeline.run(other).rows[-1].under("perplexity") != second.rows[-1].under("perplexity")
    assert len(folders(config, "calibration")) == 3 * len(calibrations)


def test_a_rotation_without_quantization_is_a_row_that_equals_full_precision(text_file: Path, tmp_path: Path) -> None:
    config = turned(small_config(text_file, tmp_path / "out"))
    config.quantizer.weights.bits = config.quantizer.activations.bits = None
    rows = pipeline.run(config).rows
    assert [row.name for row in rows] == ["full_precision", "quantized"]
    assert rows[1].under("perplexity")["text"] == pytest.approx(rows[0].under("perplexity")["text"], rel=1e-5)


def test_a_full_precision_loss_is_under_no_rotation_and_nothing_quantized_inside_attention(
    text_file: Path, tmp_path: Path
) -> None:
    config = turned(tuning_config(text_file, tmp_path), kv_cache=KvCacheConfig(4), attention=AttentionConfig(8))
    under = tuning_quantizer(config.tuning, config.quantizer)
    assert (under.rotation, under.kv_cache.bits, under.attention.bits) == ("hadamard", 4, 8)
    config.tuning.prediction_model = "full_precision"
    assert tuning_quantizer(config.tuning, config.quantizer).is_full_precision


def test_tuning_measures_the_error_where_the_quantizer_stands(text_file: Path, tmp_path: Path) -> None:
    """Under the rotated quantizer L_q is that of the rotated stream; with the full-precision loss, of the plain one."""
    config = turned(tuning_config(text_file, tmp_path / "out"))
    lm = load_language_model(config.model, config.paths)
    prepared = prepare(config, "cpu")
    texts, held_out = prepared.texts.tuning, prepared.texts.held_out
    assert texts is not None and held_out is not None
    errors: dict[tuple[str, str], float] = {}
    for model in ("quantized", "full_precision"):
        for rotation in ("none", "hadamard"):
            config.tuning.prediction_model, config.quantizer.rotation = model, rotation
            steps = tune_prefix(
                lm,
                Prefix.from_tokens(lm.model, [3, 4]),
                config.tuning,
                FittedQuantizer(config.quantizer),
                config.search,
                texts,
                held_out,
                0,
            )
            errors[model, rotation] = next(steps).steps[0].error
            steps.close()
    assert errors["full_precision", "none"] == errors["full_precision", "hadamard"]
    assert errors["quantized", "none"] != pytest.approx(errors["quantized", "hadamard"], rel=1e-3)
