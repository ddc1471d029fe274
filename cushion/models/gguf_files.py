"""Models of GGUF files: read once, and dequantized for good."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch


@contextmanager
def read_once(file_name: str | None) -> Iterator[None]:
    """Configuration, weights and tokenizer share one pass over the file; without a file, nothing changes.

    transformers makes a reader for most of them, which reads the whole list of words, and a map of all names of weights
    for every module: seconds each.
    """
    if file_name is None:
        yield
        return
    import gguf

    with (
        patch("gguf.GGUFReader", cache(gguf.GGUFReader)),
        patch("gguf.get_tensor_name_map", cache(gguf.get_tensor_name_map)),
    ):
        yield


def as_dequantized(model: Any) -> None:
    """Say of a model with the weights of a GGUF file, which are dequantized by now, that it can be saved as others."""
    model.hf_quantizer, model.is_quantized = None, False
    del model.config.quantization_config
