"""What those cached steps share that find something before anything else is gathered, and add it to the calibration."""

from __future__ import annotations

import time
from abc import abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from cushion.artifacts import Workspace, read_json, write_json
from cushion.hashing import digest
from cushion.prefix import Prefix
from cushion.quantization.calibration import Calibration
from cushion.quantization.parts.base import Needed
from cushion.quantization.quantizer import QuantizerConfig
from cushion.step import Context, Step


@dataclass(frozen=True, eq=False)
class AddedStep(Step[Calibration]):
    """A step whose outcome is the calibration that stands before it, with what was found.

    A subclass names what it adds (`adds`), and the file of its artifact that has the seconds it took (`seconds_in`).

    Args:
        behind: the prefix.
        quantizer: whose errors decide.
        calibration: statistics behind the same prefix; None where none are needed before.
        texts: token ids, (texts, tokens).

    """

    adds: ClassVar[Needed]
    seconds_in: ClassVar[str]
    behind: Prefix
    quantizer: QuantizerConfig
    calibration: Calibration | None
    texts: Tensor

    @abstractmethod
    def found(self, folder: Path, device: torch.device) -> Any:
        """What was found, from the folder of a finished artifact."""

    @property
    def before(self) -> Calibration:
        """The calibration that stands before the step."""
        return self.calibration or Calibration(None, "", 0.0)

    def write_seconds(self, workspace: Workspace, started: float) -> None:
        """Keep what was taken since `started`, a reading of `time.perf_counter`."""
        write_json(workspace.folder / self.seconds_in, {"seconds": time.perf_counter() - started})

    def read(self, context: Context, folder: Path) -> Calibration:
        """What was known before, and what was found."""
        before = self.before
        return replace(
            before,
            key=digest([before.key, folder.name]),
            seconds=before.seconds + float(read_json(folder / self.seconds_in)["seconds"]),
            inputs={**before.inputs, self.adds: self.found(folder, context.lm.device)},
        )
