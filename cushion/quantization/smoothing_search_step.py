"""The cached search of smoothing scales behind a prefix (`quantizer.smoothing_search`)."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cushion.artifacts import Workspace
from cushion.hashing import tensor_digest
from cushion.quantization.added_step import AddedStep
from cushion.quantization.identity import quantizer_identity
from cushion.quantization.parts.smoothing_search import SEARCHED
from cushion.quantization.smoothing_search import SmoothingSearch, search_smoothing, searched_under
from cushion.step import Context


@dataclass(frozen=True, eq=False)
class SmoothingSearchStep(AddedStep):
    """The scales with which a quantizer smooths; the search reads nothing of the calibration before it."""

    name = "smoothing"
    """Files: `scales.safetensors`; `smoothing.json`, for each norm the grid that was searched, with the error of every
        point; `seconds.json`
    Key: `prefix`, `quantizer`, `texts`
    Of that: of the quantizer its weights, activations and what keeps the function
    """
    adds = SEARCHED
    seconds_in = "seconds.json"

    def key(self, context: Context) -> dict[str, Any]:
        """Prefix, what of the quantizer decides, and texts."""
        return {
            "prefix": self.behind.fingerprint,
            "quantizer": quantizer_identity(searched_under(self.quantizer)),
            "texts": tensor_digest([self.texts]),
        }

    def make(self, context: Context, workspace: Workspace) -> None:
        """Search one block after another."""
        started = time.perf_counter()
        for done, found in search_smoothing(context.lm, self.behind, self.texts, self.quantizer):
            context.progress("search of scales", done, len(context.lm.blocks), "block")
            if done == len(context.lm.blocks):
                found.write(workspace.folder)
        self.write_seconds(workspace, started)

    def found(self, folder: Path, device: torch.device) -> Any:
        """The scales."""
        return SmoothingSearch.read(folder, device)
