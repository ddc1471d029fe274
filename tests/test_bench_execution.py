"""The benchmark of executions on tiny shapes: every side is timed, and the ratios are those of the same round."""

from __future__ import annotations

import re

import pytest
from helpers import load_script


def test_every_side_of_linears_and_decoder_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    script = load_script("bench_execution")
    options = "--shapes tiny --rows 1,17 --repeats 2 --model tiny:llama --length 8 --new-tokens 3 --decoder-repeats 1"
    script.main(options.split())
    shown = capsys.readouterr().out
    sides = ["float32", "bfloat16", "simulated", "int8 static", "int8 token"]
    for heading, names in {
        "1 x 16 x 24": [*sides, "codes alone"],
        "17 x 16 x 24": [*sides, "codes alone"],
        "decoder, first token, prompt of 8": sides,
        "decoder, further tokens, batch 1": sides,
    }.items():
        part = shown.partition(f"\n{heading}\n")[2]
        found = re.findall(r"^  (.+?) +[\d.]+ ms +[\d.]+$", re.split(r"^\S", part, flags=re.MULTILINE)[0], re.MULTILINE)
        assert [name for name in found if not name.startswith("torchao")] == names, heading
    with pytest.raises(SystemExit):
        script.main(["--shapes", "13b"])
    assert "--shapes names '13b': known are smollm2, 7b, tiny" in capsys.readouterr().err


def test_a_ratio_is_the_median_of_the_rounds() -> None:
    script = load_script("bench_execution")
    found = script.rows_of({"float32": [1.0, 2.0, 6.0], "other": [2.0, 1.0, 2.0]})
    assert found == [("float32", 2000.0, 1.0), ("other", 2000.0, 2.0)]
