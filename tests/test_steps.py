"""Cached steps: what is not finite is never kept; what is damaged is named with the folder to delete."""

from __future__ import annotations

import ast
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from tiny_run import overflow_in_half_precision, saved_model, searching_config, small_config, tuning_config
from torch import nn

import cushion
from cushion import pipeline
from cushion.artifacts import Checkpoint
from cushion.errors import ArtifactError, NotFiniteError
from cushion.events import Event, RunFailed
from cushion.results import FILE_NAME, RunResult


def plant(name: str, value: float) -> Callable[[nn.Module], object]:
    """Set one weight of a module."""
    return lambda model: model.get_submodule(name).weight[3, 5].fill_(value)  # type: ignore[index, operator]


def kept(cache: Path, step: str) -> list[Path]:
    """The finished artifacts of a step, and what was left of unfinished ones."""
    return [path for path in cache.glob(f"{step}/*") if path.suffix != ".lock"]


# ---- numbers that are not finite ----------------------------------------------------------------------------------

FAULTS = {
    "too large for float16": (overflow_in_half_precision, "float16", "activations"),
    "infinite weight": (plant("model.layers.1.mlp.up_proj", float("inf")), "auto", "activations"),
    "weight that is no number": (plant("model.layers.2.self_attn.o_proj", float("nan")), "auto", "activations"),
    "infinite weight of the last layer": (plant("lm_head", float("inf")), "auto", "perplexity"),
}
"""What is wrong with the model, the dtype it is loaded in, and the step that finds it out."""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_model_that_overflows_ends_the_run_and_nothing_of_the_step_is_kept(
    text_file: Path, tmp_path: Path, fault: str
) -> None:
    change, dtype, step = FAULTS[fault]
    config = searching_config(text_file, tmp_path / "out")
    config.model.path, config.model.dtype = str(saved_model(tmp_path / "model", change)), dtype
    events: list[Event] = []
    with pytest.raises(NotFiniteError, match=r"model\.dtype=bfloat16 or float32"):
        pipeline.run(config, [events.append])
    result = RunResult.read(pipeline.run_folder(config) / FILE_NAME)
    assert result.status == "failed"
    assert result.error is not None
    assert result.error["type"] == "NotFiniteError"
    assert "model.dtype" in result.error["message"]
    assert isinstance(events[-1], RunFailed)
    cache = tmp_path / "out" / "cache"
    assert kept(cache, step) == []
    assert bool(kept(cache, "activations")) == (step != "activations")


def test_what_overflows_in_half_precision_runs_in_the_dtype_that_the_error_names(
    text_file: Path, tmp_path: Path
) -> None:
    config = small_config(text_file, tmp_path / "out")
    config.model.path = str(saved_model(tmp_path / "model", overflow_in_half_precision))
    result = pipeline.run(config)
    assert result.status == "completed"
    assert result.metrics["largest_activation"] > 65504  # the largest number of float16


def test_a_candidate_that_overflows_neither_wins_nor_ends_the_search(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpoint, "due", lambda self: True)  # the checkpoints of a search that takes long
    config = searching_config(text_file, tmp_path / "out")
    config.search.proposal = "vocabulary"
    broken = ord("~")  # a token that no text has
    change = lambda model: model.get_input_embeddings().weight[broken].fill_(float("inf"))  # noqa: E731
    config.model.path = str(saved_model(tmp_path / "model", change))
    result = pipeline.run(config)
    assert result.search is not None
    assert len(result.search["token_ids"]) == 2
    assert [step["candidates"] for step in result.search["steps"]] == [260, 260]


# ---- damaged steps ------------------------------------------------------------------------------------------------


def outcome(value: Any) -> Any:
    """What a run found out, without seconds."""
    if isinstance(value, RunResult):
        record = asdict(value)
        keys = ("status", "prefix", "search", "tuning", "activations", "metrics", "rows")
        return {key: outcome(record[key]) for key in keys}
    if isinstance(value, dict):
        return {key: outcome(item) for key, item in value.items() if key != "seconds"}
    return [outcome(item) for item in value] if isinstance(value, list) else value


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "empty record": lambda path: path.write_text("{}") if path.suffix == ".json" else None,
    "list": lambda path: path.write_text("[]") if path.suffix == ".json" else None,
    "text": lambda path: path.write_text('"text"') if path.suffix == ".json" else None,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-30]),
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_deleting_the_folder_that_is_named_mends_a_damaged_step(text_file: Path, tmp_path: Path, damage: str) -> None:
    config = tuning_config(text_file, tmp_path / "out")
    sound = outcome(pipeline.run(config))
    result, cache = pipeline.run_folder(config) / FILE_NAME, tmp_path / "out" / "cache"
    seen = set()
    for step in ("search", "tuning", "calibration", "activations", "activation_map", "perplexity"):
        folder = kept(cache, step)[0]
        for name in sorted(
            {path.name for path in folder.iterdir()} - {"depends_on.json", "made.json"}
        ):  # nothing reads these
            content = (folder / name).read_bytes()
            DAMAGES[damage](folder / name)
            if (folder / name).is_file() and (folder / name).read_bytes() == content:
                continue
            seen.add(f"{step}/{name}")
            result.unlink()
            with pytest.raises(ArtifactError, match=r"damaged|missing|no prefix|not found") as caught:
                pipeline.run(config)
            assert "\n" not in str(caught.value)
            assert re.search(rf"{re.escape(str(folder))}(?![/\w])", str(caught.value)), str(caught.value)
            assert "delete" in str(caught.value)
            shutil.rmtree(folder)
            assert outcome(pipeline.run(config)) == sound
    jsons = {"search/search.json", "search/prefix.json", "tuning/tuning.json", "tuning/prefix.json",
             "calibration/calibration.json", "activations/activations.json",
             "activation_map/activation_map.json", "perplexity/perplexity.json"}  # fmt: skip
    tensors = {"search/prefix.safetensors", "tuning/prefix.safetensors", "calibration/ranges.safetensors"}
    assert seen == (jsons | tensors if damage in ("truncated", "gone") else jsons)


def test_a_record_that_lacks_a_key_is_refused_or_makes_no_difference(text_file: Path, tmp_path: Path) -> None:
    config = tuning_config(text_file, tmp_path / "out")
    sound = outcome(pipeline.run(config))
    result, cache = pipeline.run_folder(config) / FILE_NAME, tmp_path / "out" / "cache"
    failures = []
    for step in ("search", "tuning", "calibration", "activations", "activation_map", "perplexity"):
        path = kept(cache, step)[0] / f"{step}.json"
        content = path.read_text(encoding="utf-8")
        for key in json.loads(content):
            path.write_text(json.dumps({k: v for k, v in json.loads(content).items() if k != key}), encoding="utf-8")
            result.unlink()
            try:
                if outcome(pipeline.run(config)) != sound:
                    failures.append(f"{step}.json without {key}: another result")
            except ArtifactError as error:
                assert str(path.parent) in str(error)
            except Exception as error:  # noqa: BLE001 - every one of them is a failure of this test
                failures.append(f"{step}.json without {key}: {error!r}")
        path.write_text(content, encoding="utf-8")
    assert not failures, "\n".join(failures)


def test_lm_eval_is_imported_only_where_a_task_is_asked() -> None:
    """It and the packages behind it take seconds, which every start of a run would pay."""
    at_the_top: dict[str, set[str]] = {}
    for path in Path(cushion.__file__).parent.rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                module = getattr(node, "module", None)
                for name in [module] if module else [alias.name for alias in node.names]:
                    at_the_top.setdefault(name.partition(".")[0], set()).add(path.stem)
                    at_the_top.setdefault(name, set()).add(path.stem)
    assert at_the_top["lm_eval"] == {"harness"}
    assert not {"datasets", "cushion.evaluation.harness"} & at_the_top.keys()
