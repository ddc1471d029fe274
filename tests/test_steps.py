"""Cached steps: what is not finite is never kept; what is damaged is named with the folder to delete."""

from __future__ import annotations

import ast
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from conftest import write_documents
from tiny_run import overflow_in_half_precision, saved_model, searching_config, small_config, tuning_config
from torch import nn

import cushion
from cushion import pipeline
from cushion.artifacts import Checkpoint, reading
from cushion.config import PathsConfig, RunConfig
from cushion.errors import ArtifactError, NotFiniteError
from cushion.events import Event, RunFailed
from cushion.results import FILE_NAME, RunResult
from cushion.step import Context, Step


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
    config.search.proposal, config.search.batch_size = "vocabulary", 20
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


@dataclass
class SoundRun:
    """A finished run with every step, what it found out, and its steps by the folder that they were kept in."""

    config: RunConfig
    found: Any
    steps: dict[Path, tuple[Step[Any], Context]]

    def folders(self) -> dict[str, Path]:
        """The first folder of each kind of step whose damage is tried out."""
        wanted = ("search", "tuning", "calibration", "activations", "activation_map", "perplexity")
        return {name: next(folder for folder in self.steps if folder.parent.name == name) for name in wanted}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> SoundRun:
    """One run for all that is damaged below; what damages it, mends it."""
    folder = tmp_path_factory.mktemp("sound")
    config = tuning_config(write_documents(folder / "text.txt"), folder / "out")
    asked: list[tuple[Step[Any], Context]] = []
    depends_on = Step.depends_on

    def noted(step: Step[Any], context: Context) -> dict[str, Any]:
        asked.append((step, context))
        return depends_on(step, context)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Step, "depends_on", noted)
        result = pipeline.run(config)

    def never(_: object) -> None:
        raise AssertionError("a step of a finished run is made again")

    steps = {
        context.store.get_or_make(step.name, step.depends_on(context), never): (step, context)
        for step, context in asked
    }  # fmt: skip
    return SoundRun(config, outcome(result), steps)


@contextmanager
def replaced(path: Path, change: Callable[[Path], Any]) -> Iterator[None]:
    """Change a file, and write it back in the end."""
    content = path.read_bytes()
    change(path)
    try:
        yield
    finally:
        path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "empty record": lambda path: path.write_text("{}"),
    "list": lambda path: path.write_text("[]"),
    "text": lambda path: path.write_text('"text"'),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-30]),
    "gone": lambda path: path.unlink(),
}


def assert_names(error: pytest.ExceptionInfo[ArtifactError], folder: Path) -> None:
    """One line, with the folder and that it is to be deleted."""
    message = str(error.value)
    assert "\n" not in message
    assert re.search(rf"{re.escape(str(folder))}(?![/\w])", message), message
    assert "delete" in message


def read(folder: Path, step: Step[Any], context: Context) -> Any:
    """What a step reads from a folder that the store took for whole: written by other code, for one."""
    with reading(folder):
        return step.read(context, folder)


@pytest.mark.parametrize("damage", DAMAGES)
def test_reading_a_damaged_step_names_the_folder_to_delete(sound: SoundRun, damage: str) -> None:
    seen = set()
    for name, folder in sound.folders().items():
        for path in sorted(folder.iterdir()):
            unread = path.name in ("depends_on.json", "made.json")
            if unread or (path.suffix != ".json" and damage not in ("truncated", "gone")):
                continue
            seen.add(f"{name}/{path.name}")
            message = r"damaged|missing|no prefix|not found"
            with replaced(path, DAMAGES[damage]), pytest.raises(ArtifactError, match=message) as caught:
                read(folder, *sound.steps[folder])
            assert_names(caught, folder)
    jsons = {"search/search.json", "search/prefix.json", "tuning/tuning.json", "tuning/prefix.json",
             "calibration/calibration.json", "activations/activations.json",
             "activation_map/activation_map.json", "perplexity/perplexity.json"}  # fmt: skip
    tensors = {"search/prefix.safetensors", "tuning/prefix.safetensors", "calibration/ranges.safetensors"}
    assert seen == (jsons | tensors if damage in ("truncated", "gone") else jsons)


def test_a_run_whose_every_kind_of_step_is_damaged_mends_itself_and_says_so(
    sound: SoundRun, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / "out"
    shutil.copytree(sound.config.paths.output_dir, output)
    config = replace(sound.config, paths=PathsConfig(output_dir=str(output), cache_dir=str(output / "cache")))
    (pipeline.run_folder(config) / FILE_NAME).unlink()
    folders = {output / "cache" / name / folder.name for name, folder in sound.folders().items()}
    for number, folder in enumerate(sorted(folders)):
        file = next(path for path in sorted(folder.iterdir()) if path.name not in ("depends_on.json", "made.json"))
        DAMAGES["truncated" if number % 2 else "gone"](file)
    with caplog.at_level(logging.WARNING):
        assert outcome(pipeline.run(config)) == sound.found
    named = {message.split()[4] for message in caplog.messages if message.startswith("the cached step in ")}
    assert named == set(map(str, folders)), "each once, and no other"


def test_a_record_that_lacks_a_key_is_read_or_refused_by_name(sound: SoundRun) -> None:
    refused, failures = set(), []
    for name, folder in sound.folders().items():
        path = folder / f"{name}.json"
        record = json.loads(path.read_text(encoding="utf-8"))
        for key in record:
            lacking = json.dumps({other: value for other, value in record.items() if other != key})
            with replaced(path, lambda path, lacking=lacking: path.write_text(lacking, encoding="utf-8")):
                try:
                    read(folder, *sound.steps[folder])
                except ArtifactError as error:
                    assert str(folder) in str(error)
                    refused.add(name)
                except Exception as error:  # noqa: BLE001 - every one of them is a failure of this test
                    failures.append(f"{name}.json without {key}: {error!r}")
    assert not failures, "\n".join(failures)
    assert refused == set(sound.folders())


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
