"""scripts/compare_results.py and reference_runs.py: equal trees are equal, and every difference is told."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from helpers import load_script


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`called("compare_results", "old", "new")`: the exit status of a script."""
    for name in ("OMP_NUM_THREADS", "HF_HUB_OFFLINE", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "")  # a script sets them, and they are set back after the test
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "path", list(sys.path))

    def call(script: str, *arguments: object) -> int:
        monkeypatch.setitem(sys.modules, script, ModuleType(script))
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        try:
            load_script(script).main()
        except SystemExit as end:
            assert isinstance(end.code, int)
            return end.code
        finally:
            logging.disable(logging.NOTSET)
        return 0

    return call


def result(tree: Path, value: Any = 1.5, **config: Any) -> dict[str, Any]:
    words = {"name": "quantized_found", "label": "W8A8", "prefix": "a", "quantized": True}
    row = {**words, "perplexity": {"text": value}, "accuracy": None, "seconds": 3.0}
    return {
        "schema_version": 1,
        "status": "completed",
        "config": {"seed": 0, "data": {"path": f"{tree}/text.txt"}, "paths": {"output_dir": str(tree)}, **config},
        "environment": {"git": str(tree)},
        "prefix": {"fingerprint": str(tree), "text": "a"},
        "search": {"proposal_seconds": len(str(tree)), "steps": [{"seconds": 1.0, "token_id": 3}]},
        "rows": [row],
        "timings": {"total": 1.0},
        "warnings": [f"{tree}/text.txt is short"],
    }


def put(tree: Path, place: str, record: dict[str, Any]) -> None:
    path = tree / "runs" / place / "result.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(record))


@pytest.fixture
def trees(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "old", tmp_path / "newer" / "tree"


def test_runs_are_paired_by_configuration_and_the_clock_and_places_do_not_count(
    trees: tuple[Path, Path], called: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    for tree, order in zip(trees, ((0, 1), (1, 0)), strict=True):
        for place, seed in zip("ab", order, strict=True):  # the folders say nothing
            put(tree, place, result(tree, value=seed + 0.5, seed=seed))
    assert called("compare_results", *trees) == 0
    assert capsys.readouterr().out == "2 runs, 6 numbers, 0 differences\n"
    assert called("compare_results", *trees, "--fingerprints") == 1
    assert "a / prefix/fingerprint: " in capsys.readouterr().out


@pytest.mark.parametrize("value", [1.5000000000000002, None, "1.5", float("nan"), [1.5]])
def test_every_difference_of_a_value_is_told(
    trees: tuple[Path, Path], called: Callable[..., int], capsys: pytest.CaptureFixture[str], value: Any
) -> None:
    for tree, found in zip(trees, (1.5, value), strict=True):
        put(tree, "a", result(tree, found))
    assert called("compare_results", *trees) == 1
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first.startswith("runs/a / rows/0/values/perplexity/text: 1.5 -> ")
    assert last.startswith("1 runs, 3 numbers, ")


def test_integers_and_signs_of_zero_are_told_apart_and_what_is_no_number_is_itself(
    trees: tuple[Path, Path], called: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    for tree, values in zip(trees, ([1, 0.0, float("nan")], [1.0, -0.0, float("nan")]), strict=True):
        put(tree, "a", result(tree, values))
    assert called("compare_results", *trees) == 1
    assert capsys.readouterr().out.splitlines() == [
        "runs/a / rows/0/values/perplexity/text/0: 1 -> 1.0",
        "runs/a / rows/0/values/perplexity/text/1: 0.0 -> -0.0",
        "1 runs, 5 numbers, 2 differences",
    ]


def test_a_run_without_its_pair_and_another_refusal_are_differences(
    trees: tuple[Path, Path], called: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = trees
    for tree, seeds in ((old, (0, 1)), (new, (0, 2))):
        for seed in seeds:
            put(tree, f"seed{seed}", result(tree, seed=seed))
        (tree / "refused.json").write_text(json.dumps({"some": f"because of {seeds[1]}"}))
    assert called("compare_results", old, new) == 1
    assert capsys.readouterr().out.splitlines() == [
        "not a pair of runs: runs/seed1 -> absent",
        "not a pair of runs: absent -> runs/seed2",
        'refused.json / some: "because of 1" -> "because of 2"',
        "1 runs, 3 numbers, 3 differences",
    ]
    assert called("compare_results", old, new, "--partial") == 1
    assert "seed1" not in capsys.readouterr().out


def test_a_key_that_only_the_newer_code_has_does_not_part_the_pairs(
    trees: tuple[Path, Path], called: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = trees
    for seed in (0, 1):
        put(old, f"{seed}", result(old, seed=seed))
        put(new, f"{seed}", result(new, seed=seed, execution={"name": "simulated"}))
    assert called("compare_results", old, new) == 0
    assert capsys.readouterr().out.splitlines() == [
        "only one of the trees has this key of the configuration: execution/name",
        "2 runs, 6 numbers, 0 differences",
    ]


def test_a_result_of_version_2_is_compared_by_its_values(
    trees: tuple[Path, Path], called: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = trees
    put(old, "a", result(old))
    words = {"name": "quantized_found", "label": "W8A8", "prefix": "a", "quantized": True, "stage": "found"}
    row = {**words, "values": {"perplexity/text": 1.25, "seconds": 1.0}, "tokens": {}, "tasks": {}}
    put(new, "a", {**result(new), "schema_version": 2, "rows": [row]})
    assert called("compare_results", old, new) == 1
    assert capsys.readouterr().out.splitlines() == [
        "runs/a / rows/0/values/perplexity/text: 1.5 -> 1.25",
        "1 runs, 3 numbers, 1 differences",
    ]


def test_a_folder_without_results_is_refused(
    tmp_path: Path, called: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert called("compare_results", tmp_path, tmp_path) == 2
    assert f"{tmp_path}: there is no result.json below it" in capsys.readouterr().err


def test_reference_runs_give_the_same_numbers_in_another_folder(
    tmp_path: Path, called: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    assert called("reference_runs", one, "--only", "llama/tun") == 0
    assert called("reference_runs", other, "--like", one, "--only", "r nothing") == 0
    assert set(json.loads((other / "cases.json").read_text())) == {"llama/tuned for nothing"}
    assert list(json.loads((one / "refused.json").read_text())) == ["llama/tuning none"]
    capsys.readouterr()
    assert called("compare_results", one, other, "--partial", "--fingerprints") == 0
    assert capsys.readouterr().out.startswith("1 runs, ")
