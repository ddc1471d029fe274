"""What runs have in common in words: every setting of a configuration is either stated, varies or does not apply."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from records import record, write

from cushion.reporting.collect import collect
from cushion.reporting.settings import numbered, shared_settings

WHOLE: dict[str, Any] = {
    "data.evaluation": {"source": "wikitext2", "split": "test"},
    "data.calibration": {"source": "embedded", "split": None},
    "data.tuning": {"source": "file", "path": "/some/where/mine.txt", "split": None},
    "data.search": {"source": "c4", "split": "train"},
    "data.further": {"news": {"source": "c4", "split": "validation"}},
    "quantizer.calibration": {"samples": 16, "length": 512},
    "search.method": "greedy", "search.scoring": "pruned",
    "search.budget_token_forwards": 1e6, "search.budget_seconds": None,
    "tuning.method": "prefix", "tuning.steps": 60, "tuning.epochs": None,
    "eval.block_length": 512, "eval.blocks": 16, "eval.tasks": ["piqa", "copa"], "eval.limit": 40,
    "eval.chat_template": False, "eval.system_instruction": None,
    "reconstruction.name": "none", "config.execution": "simulated", "config.bos": "tokenizer",
    "evaluation": {"bos": False},
}  # fmt: skip


def parts(folder: Path, *records: dict[str, Any]) -> tuple[str, list[str]]:
    runs = collect([write(folder, *records)])
    (note,) = shared_settings(runs, numbered(runs))
    assert note.endswith(".")
    who, _, what = note[:-1].partition(": ")
    return who, what.split("; ")


def test_everything_shared_is_stated(tmp_path: Path) -> None:
    who, what = parts(tmp_path, *(record(seed=seed, **WHOLE) for seed in range(3)))
    assert who == "Runs 1 to 3"
    assert what == [
        "evaluation text wikitext2 (test), news: c4 (validation)", "calibration text embedded",
        "calibration 16 x 512 tokens", "search text c4 (train)", "tuning text file mine.txt", "search greedy_sampled",
        "search.scoring pruned", "search budget 1e+06 token-forwards", "tuning short", "tuning steps 60",
        "reconstruction none", "execution simulated",
        "perplexity 512 x 16 (block_length x blocks)", "tasks piqa, copa", "eval.limit 40",
        "eval.chat_template none",
        "BOS before every text no",
    ]  # fmt: skip


def test_what_differs_varies_and_nothing_else_does(tmp_path: Path) -> None:
    changes: dict[str, dict[str, Any]] = {
        "search text": {"data.search": {"source": "wikitext2", "split": "train"}},
        "search.scoring": {"search.scoring": "full"},
        "search budget": {"search.budget_token_forwards": None},
        "tuning steps": {"tuning.steps": None, "tuning.epochs": 2.0},
        "perplexity": {"eval.blocks": None},
        "tasks": {"eval.tasks": ["piqa"]},
        "eval.limit": {"eval.limit": None},
        "eval.chat_template": {"eval.chat_template": True},
        "reconstruction": {"reconstruction.name": "scales"},
        "execution": {"config.execution": "int8"},
        "BOS before every text": {"config.bos": "always", "evaluation": {"bos": True}},
    }
    for title, change in changes.items():
        _, what = parts(tmp_path / title, record(**WHOLE), record(**{**WHOLE, **change}))
        assert [part for part in what if part.endswith(" varies")] == [f"{title} varies"]


def test_what_does_not_apply_to_a_run_is_not_asked_of_it(tmp_path: Path) -> None:
    idle = {**WHOLE, "search.method": "none", "search.name": "none", "tuning.method": "none", "tuning.name": "none"}
    who, what = parts(tmp_path / "one", record(**{**idle, "eval.tasks": [], "eval.perplexity": False}))
    assert who == "Run 1"
    assert what[-8:] == [
        "calibration 16 x 512 tokens", "search none", "tuning none", "reconstruction none", "execution simulated",
        "perplexity none", "tasks none", "BOS before every text no",
    ]  # fmt: skip
    _, what = parts(tmp_path / "two", record(**WHOLE), record(**idle))
    assert [part for part in what if part.endswith(" varies")] == ["search varies", "tuning varies"]
    assert "search.scoring pruned" in what and "tuning steps 60" in what


def test_an_old_or_empty_configuration_has_a_note_of_what_it_says_or_none(tmp_path: Path) -> None:
    assert parts(tmp_path / "old", record())[1] == ["search greedy_sampled", "tuning short"]
    empty = record()
    empty["config"] = {"experiment": "default", "model": {"path": "m"}}
    runs = collect([write(tmp_path / "empty", empty)])
    assert shared_settings(runs, numbered(runs)) == []


def test_the_numbers_of_runs_are_spans_of_neighbours(tmp_path: Path) -> None:
    runs = collect([write(tmp_path, *(record(seed=seed) for seed in range(6)))])
    numbers = dict(zip((run.path for run in runs), (1, 2, 4, 5, 6, 9), strict=True))
    (note,) = shared_settings(runs, numbers)
    assert note.startswith("Runs 1, 2, 4 to 6, 9: ")
