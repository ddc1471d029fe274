"""Hashes of plain data and of tensors: what cache keys and fingerprints are made of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:  # the configuration is hashed without importing torch
    from torch import Tensor


def digest(value: Any, length: int = 16) -> str:
    """The first `length` hex digits of the SHA-256 of `value` as canonical JSON (keys sorted)."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def file_digest(path: Path) -> str:
    """The SHA-256 of a file's content, in hex.

    Raises:
        OSError: it cannot be read, or is not a file.

    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensor_digest(tensors: Iterable[Tensor], label: Any = "") -> str:
    """The first 16 hex digits of the SHA-256 of `label` (plain JSON) and the shape, dtype and bytes of each tensor."""
    import torch

    state = hashlib.sha256(digest(label).encode())
    for tensor in tensors:
        state.update(str((tuple(tensor.shape), tensor.dtype)).encode())
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        state.update(cast(Any, data.numpy()))
    return state.hexdigest()[:16]
