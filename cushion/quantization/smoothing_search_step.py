"""The cached search of smoothing scales behind a prefix (`quantizer.smoothing_search`)."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from cushion.artifacts import Workspace, read_json, write_json
from cushion.hashing import digest, tensor_digest
from cushion.prefix import Prefix
from cushion.quantization.calibration import Calibration
from cushion.quantization.identity import quantizer_identity
from cushion.quantization.parts.smoothing_search import SEARCHED
from cushion.quantization.quantizer import QuantizerConfig
from cushion.quantization.smoothing_search import SmoothingSearch, search_smoothing, searched_under
from cushion.step import Context, Step


@dataclass(frozen=True, eq=False)
class SmoothingSearchStep(Step[Calibration]):
    """The scales with which a quantizer smooths, with the calibration that stands before the search.

    Args:
        behind: the prefix.
        quantizer: whose errors decide.
        calibration: statistics behind the same prefix; the search reads none of them.
        texts: token ids, (texts, tokens).

    """

    name = "smoothing"
    behind: Prefix
    quantizer: QuantizerConfig
    calibration: Calibration | None
    texts: Tensor

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
        write_json(workspace.folder / "seconds.json", {"seconds": time.perf_counter() - started})

    def read(self, context: Context, folder: Path) -> Calibration:
        """What was known before, and the scales."""
        before = self.calibration or Calibration(None, "", 0.0)
        return replace(
            before,
            key=digest([before.key, folder.name]),
            seconds=before.seconds + float(read_json(folder / "seconds.json")["seconds"]),
            inputs={**before.inputs, SEARCHED: SmoothingSearch.read(folder, context.lm.device)},
        )
