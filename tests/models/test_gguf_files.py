"""GGUF files are read once, while one model is loaded."""

from __future__ import annotations

import gguf
import pytest

from cushion.models.gguf_files import read_once


def test_a_file_is_read_once_for_configuration_weights_and_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def reader(path: str) -> object:
        read.append(path)
        return object()

    monkeypatch.setattr(gguf, "GGUFReader", reader)
    with read_once("a.gguf"):
        assert gguf.GGUFReader("a.gguf") is gguf.GGUFReader("a.gguf")
        gguf.GGUFReader("b.gguf")
        assert read == ["a.gguf", "b.gguf"]
    gguf.GGUFReader("a.gguf")
    with read_once(None):
        gguf.GGUFReader("a.gguf")
    assert read == ["a.gguf", "b.gguf", "a.gguf", "a.gguf"]
