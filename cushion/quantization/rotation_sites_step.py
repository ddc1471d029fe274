"""The cached choice of the sites that are rotated behind a prefix (`quantizer.rotation_sites=adaptive`)."""

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
from cushion.quantization.input_statistics import observe_sites
from cushion.quantization.parts.rotation_sites import LEFT_ALONE
from cushion.quantization.quantizer import QuantizerConfig
from cushion.quantization.rotation_sites import SiteErrors
from cushion.step import Context, Step


@dataclass(frozen=True, eq=False)
class RotationSitesStep(Step[Calibration]):
    """The sites that are better left alone, with the calibration that stands before the choice.

    Args:
        behind: the prefix.
        quantizer: whose errors decide.
        calibration: statistics behind the same prefix, where the quantizer smooths.
        texts: token ids, (texts, tokens).

    """

    name = "rotation_sites"
    behind: Prefix
    quantizer: QuantizerConfig
    calibration: Calibration | None
    texts: Tensor

    def key(self, context: Context) -> dict[str, Any]:
        """Prefix, quantizer with what smooths it, and texts."""
        return {
            "prefix": self.behind.fingerprint,
            "quantizer": quantizer_identity(self.quantizer, self.calibration),
            "texts": tensor_digest([self.texts]),
        }

    def make(self, context: Context, workspace: Workspace) -> None:
        """Run the texts once."""
        started = time.perf_counter()
        before = self.calibration or Calibration(None, "", 0.0)
        seen = observe_sites(context.lm, self.behind, self.texts, self.quantizer, before.ranges, before.inputs)
        for done, errors in seen:
            context.progress("sites of rotations", done, len(self.texts), "text")
            if done == len(self.texts):
                errors.write(workspace.folder)
        write_json(workspace.folder / "choice.json", {"seconds": time.perf_counter() - started})

    def read(self, context: Context, folder: Path) -> Calibration:
        """What was known before, and the sites."""
        before = self.calibration or Calibration(None, "", 0.0)
        return replace(
            before,
            key=digest([before.key, folder.name]),
            seconds=before.seconds + float(read_json(folder / "choice.json")["seconds"]),
            inputs={**before.inputs, LEFT_ALONE: SiteErrors.read(folder, context.lm.device)},
        )
