"""Whole runs with QFeM: every row keeps linears of its own, the search resumes, and what it found is found again."""

from __future__ import annotations

import json
import math
import os
import signal
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from planted_linears import PLANTED, TOKEN, plant_in
from tiny_run import processes, saved_model, small_config, tuning_config, without_seconds

from cushion import pipeline
from cushion.config import ActivationConfig, CalibrationConfig, QFeMConfig, QuantizerConfig, RunConfig, SearchConfig
from cushion.errors import ConfigError
from cushion.events import Event, Progress
from cushion.models import load_language_model
from cushion.prefix import Prefix
from cushion.quantization.simulate import quantized
from cushion.reporting.figures import draw_figures
from cushion.results import FILE_NAME, RunResult, finished_result

SEARCHED = QFeMConfig(search=True, target=1.02, curve=2)


def quantizer(qfem: QFeMConfig, **changes: Any) -> QuantizerConfig:
    plain = QuantizerConfig(
        "qfem", activations=ActivationConfig(bits=3, range="dynamic"), calibration=CalibrationConfig(3, 16), qfem=qfem
    )
    return replace(plain, **changes)


def with_tokens(text: Path, output: Path, qfem: QFeMConfig, **changes: Any) -> RunConfig:
    config = small_config(text, output)
    config.search = SearchConfig(name="tokens", method="tokens", tokens="ab")
    config.quantizer = quantizer(qfem, **changes)
    return config


def stages(events: list[Event]) -> list[str]:
    return list(dict.fromkeys(event.stage for event in events if isinstance(event, Progress)))


def test_a_fixed_alpha_keeps_exactly_the_planted_linears_in_every_row(text_file: Path, tmp_path: Path) -> None:
    config = with_tokens(text_file, tmp_path / "out", QFeMConfig(alpha=10.0))
    config.model.path = str(saved_model(tmp_path / "model", plant_in))
    lm = load_language_model(config.model, config.paths)
    character = lm.decode([TOKEN])
    text_file.write_text(text_file.read_text().replace(" ", character))  # the token that stands out, in every text
    result = pipeline.run(config)
    assert result.qfem is not None
    assert list(result.qfem) == ["none", "found"]
    behind = Prefix.from_tokens(lm.model, result.prefix["token_ids"] if result.prefix else [])
    blocks = lm.encode(text_file.read_text())[:128].reshape(4, 32)
    for row, stage, prefix in ((2, "none", Prefix.empty()), (3, "found", behind)):
        record = result.qfem[stage]
        assert set(record["kept"]) == PLANTED == {n for n, ratio in record["ratios"].items() if ratio > 10}
        assert (record["alpha"], record["alpha_search"]) == (10.0, None)
        losses = []
        with quantized(lm, config.quantizer, keep=frozenset(PLANTED)), torch.no_grad():
            for block in blocks:
                cache = prefix.cache(lm.model)
                scores = lm.model(block[None], past_key_values=cache, use_cache=True).logits[0].log_softmax(-1)
                losses += [-scores[position, block[position + 1]].item() for position in range(31)]
        expected = math.exp(sum(losses) / len(losses))
        assert result.rows[row].under("perplexity")["text"] == pytest.approx(expected, rel=1e-5)
    assert result.qfem["none"]["ratios"] != result.qfem["found"]["ratios"]
    assert result.warnings == []


@pytest.mark.usefixtures("blank_figures")
def test_a_found_alpha_given_again_keeps_the_same_linears_and_shares_the_rows(text_file: Path, tmp_path: Path) -> None:
    config, events = with_tokens(text_file, tmp_path / "out", SEARCHED), []  # type: tuple[RunConfig, list[Event]]
    result = pipeline.run(config, [events.append])
    folder = pipeline.run_folder(config)
    assert RunResult.read(folder / FILE_NAME) == result
    assert {
        "statistics, no prefix",
        "alpha search, no prefix",
        "statistics, given prefix",
        "alpha search, given prefix",
    } < {*stages(events)}
    assert result.qfem is not None
    for stage, row in (("none", 2), ("found", 3)):
        record = result.qfem[stage]
        search = record["alpha_search"]
        found = search["points"][search["found"]]
        assert record["kept"] == [name for name, ratio in record["ratios"].items() if ratio > record["alpha"]]
        assert list(record["ratios"]) == [name for name, _ in load_linears(config)]
        assert (found["alpha"], found["kept_modules"]) == (record["alpha"], len(record["kept"]))
        assert found["kept_groups"] == sum(set(group) <= set(record["kept"]) for group in record["groups"])
        limit = search["target"] * search["reference_perplexity"]
        assert search["reached"] == (found["perplexity"] <= limit)
        kept = [point["kept_modules"] for point in search["points"]]
        assert kept == sorted(set(kept))
        assert (kept[0], kept[-1]) == (0, len(record["ratios"])), "a curve reaches from none to all"
        assert (result.rows[row].values["seconds"] or 0.0) >= record["seconds"] > 0

        again = with_tokens(text_file, tmp_path / "out", QFeMConfig(alpha=record["alpha"]))
        again.quantizer.name = "fixed"
        later: list[Event] = []
        fixed = pipeline.run(again, [later.append])
        assert fixed.qfem is not None
        assert fixed.qfem[stage]["kept"] == record["kept"]
        assert fixed.rows[row].under("perplexity") == result.rows[row].under("perplexity")
        assert not any(s.startswith(("statistics", "alpha")) for s in stages(later)), "the ratios are shared"

    draw_figures(asdict(result), tmp_path / "drawn")
    names = {path.stem for path in (tmp_path / "drawn" / "figures").iterdir()}
    assert names == {"activation_curves", "activation_map", "attention_maps", "qfem_tradeoff"}


def test_a_row_tuned_under_static_ranges_keeps_the_linears_it_was_tuned_with(text_file: Path, tmp_path: Path) -> None:
    config = tuning_config(text_file, tmp_path / "out")
    config.quantizer = quantizer(QFeMConfig(alpha=1.3), activations=ActivationConfig(bits=4))
    config.tuning = replace(config.tuning, ranges="static")
    config.eval = replace(config.eval, controls=False)
    result = pipeline.run(config)
    assert result.qfem is not None and list(result.qfem) == ["found"]
    (key,) = [json.loads(path.read_text()) for path in (tmp_path / "out/cache/perplexity").glob("*/depends_on.json")]
    assert key["quantizer"]["keep"] == sorted(result.qfem["found"]["kept"]) != []


def load_linears(config: RunConfig) -> list[tuple[str, Any]]:
    return list(load_language_model(config.model, config.paths).linears().items())


def test_keeping_none_shares_every_row_with_the_plain_quantizer(text_file: Path, tmp_path: Path) -> None:
    plain = pipeline.run(with_tokens(text_file, tmp_path / "out", QFeMConfig()))
    assert plain.qfem is None
    events: list[Event] = []
    none = pipeline.run(with_tokens(text_file, tmp_path / "out", QFeMConfig(alpha=1e9)), [events.append])
    assert stages(events) == ["statistics, no prefix", "statistics, given prefix"]
    assert [row.under("perplexity") for row in none.rows] == [row.under("perplexity") for row in plain.rows]
    assert [("keeps no linear in full precision" in warning) for warning in none.warnings] == [True, True]
    every = pipeline.run(with_tokens(text_file, tmp_path / "out", QFeMConfig(alpha=0.0)))
    assert [row.under("perplexity") for row in every.rows[2:]] != [row.under("perplexity") for row in plain.rows[2:]]
    assert [row.under("perplexity") for row in every.rows[:2]] == [row.under("perplexity") for row in plain.rows[:2]]


def test_targets_limit_what_is_measured_and_kept(text_file: Path, tmp_path: Path) -> None:
    config = with_tokens(text_file, tmp_path / "out", QFeMConfig(alpha=0.0), targets=["down_proj", "q_proj"])
    result = pipeline.run(config)
    assert result.qfem is not None
    expected = [f"model.layers.{i}.{leaf}" for i in range(3) for leaf in ("self_attn.q_proj", "mlp.down_proj")]
    assert result.qfem["none"]["kept"] == list(result.qfem["none"]["ratios"]) == expected


def test_a_target_out_of_reach_keeps_all_linears_and_says_so(text_file: Path, tmp_path: Path) -> None:
    qfem = QFeMConfig(search=True, target=1e-6, texts=2)
    result = pipeline.run(with_tokens(text_file, tmp_path / "out", qfem, smoothing_alpha=0.5))
    assert result.qfem is not None
    for record in result.qfem.values():
        assert record["kept"] == list(record["ratios"])
        assert (record["alpha"], record["alpha_search"]["reached"], record["alpha_search"]["texts"]) == (0.0, False, 2)
    expected = r"quantizer.qfem.target=1e-06 is not reached (no prefix)"
    assert [warning.startswith(expected) for warning in result.warnings] == [True, False]
    assert "raise the target" in result.warnings[0]


def test_the_tuning_keeps_what_was_kept_behind_the_found_prefix(text_file: Path, tmp_path: Path) -> None:
    losses = {}
    for name, qfem in (("plain", QFeMConfig()), ("none", QFeMConfig(alpha=1e9)), ("all", QFeMConfig(alpha=0.0))):
        config = tuning_config(text_file, tmp_path / "out")
        config.quantizer = quantizer(qfem)
        events: list[Event] = []
        result = pipeline.run(config, [events.append])
        assert ("tuning" in stages(events)) == (name != "none"), "with nothing kept it is the same tuning"
        assert result.tuning is not None
        losses[name] = [step["loss"] for step in result.tuning["steps"]]
        assert (list(result.qfem) if result.qfem else None) == (None if name == "plain" else ["none", "found", "tuned"])
    assert losses["plain"] == losses["none"]
    assert losses["plain"] != losses["all"]
    config.tuning.prediction_model = "full_precision"
    config.eval.controls = False
    result = pipeline.run(config)
    assert result.qfem is not None
    assert list(result.qfem) == ["tuned"], "a tuning in full precision needs no linears to keep"


# ---- interrupted, damaged -----------------------------------------------------------------------------------------


def run_until_killed(text: Path, output: Path, done: int) -> None:
    """In a process of its own: run, and die without a word in the middle of the search of alpha."""
    torch.set_num_threads(1)

    def listen(event: Event) -> None:
        if isinstance(event, Progress) and (event.stage, event.done) == ("alpha search, given prefix", done):
            os.kill(os.getpid(), signal.SIGKILL)

    pipeline.run(with_tokens(text, output, SEARCHED), [listen])


def outcome(result: RunResult) -> Any:
    record = asdict(result)
    return without_seconds({key: record[key] for key in ("status", "prefix", "qfem", "metrics", "rows", "warnings")})


def test_a_killed_search_of_alpha_goes_on_with_the_next_point(text_file: Path, tmp_path: Path) -> None:
    unbroken = pipeline.run(with_tokens(text_file, tmp_path / "unbroken", SEARCHED))
    worker = processes().Process(target=run_until_killed, args=(text_file, tmp_path / "broken", 8))
    worker.start()
    worker.join(300)
    assert worker.exitcode == -signal.SIGKILL
    config = with_tokens(text_file, tmp_path / "broken", SEARCHED)
    assert finished_result(pipeline.run_folder(config)) is None
    events: list[Event] = []
    resumed = pipeline.run(config, [events.append])
    assert outcome(resumed) == outcome(unbroken)
    progress = [event for event in events if isinstance(event, Progress)]
    # of three texts each: the per-token reference and the first point were done, the second point was under way
    assert (progress[0].stage, progress[0].done) == ("alpha search, given prefix", 7)
    assert list((tmp_path / "broken" / "cache").rglob("*.partial")) == []


@pytest.mark.parametrize("step", ["inputs", "alpha"])
def test_a_damaged_step_is_made_again_and_changes_nothing(
    text_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, step: str
) -> None:
    config = with_tokens(text_file, tmp_path / "out", SEARCHED)
    sound = outcome(pipeline.run(config))
    (path,) = sorted((tmp_path / "out" / "cache" / step).glob(f"*/{step}.json"))[:1]
    path.write_text(f"{path.read_text()} ")
    (pipeline.run_folder(config) / FILE_NAME).unlink()
    assert outcome(pipeline.run(config)) == sound
    assert f"{path.parent} was changed after it was made ({step}.json)" in caplog.text


def test_a_search_of_alpha_needs_scales_of_tokens_to_compare_with() -> None:
    activations = ActivationConfig(4, "per_block", "static", format="nvfp4")
    with pytest.raises(ConfigError, match=r"qfem\.search=true compares .*activations\.format=nvfp4 does .*qfem\.alpha"):
        QuantizerConfig(activations=activations, qfem=QFeMConfig(search=True))
