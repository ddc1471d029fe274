"""The benchmark of the searches on tiny models: the rows it prints, and the steps it times on a shape."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers import load_script

from cushion.config import RunConfig

ROWS = ["none", "pruned", "sampled", "qfep", "prefixquant", "exhaustive", "exact"]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("bench_search")


def arguments(text_file: Path, output: Path) -> list[str]:
    return [
        "bench_search.py", "--length", "16", "--sample", "40", "--output", str(output), "model.path=tiny:llama",
        "data=file", f"data.path={text_file}", "eval.block_length=32", "eval.blocks=2", "eval.activation_blocks=1",
        "quantizer.calibration.samples=2", "quantizer.calibration.length=16",
    ]  # fmt: skip


@pytest.mark.usefixtures("blank_figures")
def test_every_row_is_measured_and_kept_at_once(
    script: ModuleType,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", arguments(text_file, tmp_path))
    monkeypatch.setattr(script, "LARGE", {"cpu": 256})
    run, calls = script.pipeline.run, list[RunConfig]()

    def run_three(config: RunConfig) -> object:
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(config)
        return run(config)

    monkeypatch.setattr(script.pipeline, "run", run_three)
    with pytest.raises(KeyboardInterrupt):
        script.main()
    assert [words.split()[0] for words in capsys.readouterr().out.splitlines()] == ["search", *ROWS[:3]]
    kept = json.loads((tmp_path / "bench_search.json").read_text(encoding="utf-8"))
    assert [row["search"] for row in kept["rows"]] == ROWS[:3]
    assert [config.search.verify_texts for config in calls] == [0, 0, 0], "all searches judge by one text"

    monkeypatch.setattr(script.pipeline, "run", run)
    script.main()
    printed = capsys.readouterr().out
    record = json.loads((tmp_path / "bench_search.json").read_text(encoding="utf-8"))
    rows = {row["search"]: row for row in record["rows"]}
    assert list(rows) == ROWS
    assert record["rows"][:3] == [
        {**row, "ratio_to_best": rows[row["search"]]["ratio_to_best"]} for row in kept["rows"]
    ]
    assert record["exhaustive"] == 16 + 260 * 17
    assert rows["exhaustive"]["token_forwards"] == 16 + 40 * 17
    assert rows["sampled"]["share_of_exhaustive"] == 1  # a sample as large as this vocabulary
    assert rows["exact"]["token_ids"] == rows["exhaustive"]["token_ids"]
    assert min(row["ratio_to_best"] for row in rows.values()) == 1
    assert all(row["perplexity"] > 1 for row in rows.values())
    assert rows["exact"]["sample"] == rows["exhaustive"]["sample"] == 40
    assert len(re.findall(r"^exact \(of 40 tokens\) ", printed, re.MULTILINE)) == 2  # when measured, and in the end
    assert f"exhaustive, all 260 tokens: {16 + 260 * 17} token-forwards (counted)" in printed
    assert 0 < record["utilisation"]["share_of_ceiling"] < 10
    assert (tmp_path / "bench_search.png").stat().st_size > 0


def test_steps_are_timed_on_a_shape(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # a processor without bfloat16 takes minutes for large products; the test above measures them in float32
    monkeypatch.setattr(script, "ceiling", lambda _device, dtype: {torch.bfloat16: 1.25e15}[dtype])
    shape = {
        "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3,
        "intermediate_size": 48, "vocab_size": 400,
    }  # fmt: skip
    options = argparse.Namespace(length=12, sample=20)
    script.bench_shape("LLaMA-2-7B", shape, options, torch.device("cpu"), torch.bfloat16)
    printed = capsys.readouterr().out
    assert "n = 12, bfloat16; published: 2.68 hours" in printed
    cost = 12 + 400 * 13
    assert re.search(rf"full +\d+\.\d s a step +{cost:.0f} token-forwards \(extrapolated from 20 candidates\)", printed)
    assert re.search(r"pruned +\d+\.\d s a step +\d+ token-forwards$", printed, re.MULTILINE)
    assert "FLOP/s of 1.25e+15 in a large matrix product" in printed


@pytest.mark.parametrize("name", ["LLaMA-2-7B", "LLaMA-3-8B"])
def test_the_shapes_are_those_of_the_models(script: ModuleType, name: str) -> None:
    with torch.device("meta"):
        model = script.AutoModelForCausalLM.from_config(script.LlamaConfig(**script.SHAPES[name]))
    billions = sum(weight.numel() for weight in model.parameters()) / 1e9
    assert billions == pytest.approx({"LLaMA-2-7B": 6.738, "LLaMA-3-8B": 8.030}[name], abs=1e-3)
