"""The cached choice of the sites that are rotated behind a prefix (`quantizer.rotation_sites=adaptive`)."""

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
from cushion.quantization.input_statistics import observe_sites
from cushion.quantization.parts.rotation_sites import LEFT_ALONE
from cushion.quantization.rotation_sites import SiteErrors
from cushion.step import Context


@dataclass(frozen=True, eq=False)
class RotationSitesStep(AddedStep):
    """The sites that are better left alone; its calibration is needed where the quantizer smooths."""

    name = "rotation_sites"
    """Files: `sites.json`, for each site its error plain and rotated; `choice.json`
    Key: `prefix`, `quantizer`, `texts`
    Of that: the quantizer whose errors decide
    """
    adds = LEFT_ALONE
    seconds_in = "choice.json"

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
        before = self.before
        seen = observe_sites(context.lm, self.behind, self.texts, self.quantizer, before.ranges, before.inputs)
        for done, errors in seen:
            context.progress("sites of rotations", done, len(self.texts), "text")
            if done == len(self.texts):
                errors.write(workspace.folder)
        self.write_seconds(workspace, started)

    def found(self, folder: Path, device: torch.device) -> Any:
        """The sites."""
        return SiteErrors.read(folder, device)
