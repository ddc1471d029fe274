"""QFeM's cached steps: the ratios of all linears behind a prefix, and the search for alpha."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from cushion.artifacts import Workspace, read_json, write_json
from cushion.config import QuantizerConfig
from cushion.hashing import tensor_digest
from cushion.prefix import Prefix
from cushion.quantization.calibration import Calibration
from cushion.quantization.fitted import FittedQuantizer
from cushion.quantization.identity import quantizer_identity
from cushion.quantization.qfem import ModuleRatios, RatioObserver, measure_ratios, without_rounding
from cushion.step import Context, Step


@dataclass(frozen=True)
class MeasuredRatios:
    """The ratios of all linears, the artifact's key, and the seconds they took."""

    ratios: ModuleRatios
    key: str
    seconds: float


@dataclass(frozen=True, eq=False)
class RatiosStep(Step[MeasuredRatios]):
    """QFeM's ratio of every linear, of the inputs that the quantizer finds.

    Args:
        behind: the prefix.
        quantizer: its smoothing and rotation are in place.
        calibration: statistics behind the same prefix, where the quantizer smooths.
        texts: token ids, (texts, tokens).
        title: how progress calls the prefix.

    """

    name = "ratios"
    behind: Prefix
    quantizer: QuantizerConfig
    calibration: Calibration | None
    texts: Tensor
    title: str

    def key(self, context: Context) -> dict[str, Any]:
        """Prefix, what the quantizer does before it rounds, and texts."""
        return {
            "prefix": self.behind.fingerprint,
            "quantizer": quantizer_identity(without_rounding(self.quantizer), self.calibration),
            "texts": tensor_digest([self.texts]),
        }

    def make(self, context: Context, workspace: Workspace) -> None:
        """Run the texts, and keep every ratio and which linears share an input."""
        started, observer = time.perf_counter(), RatioObserver()
        fitted = FittedQuantizer.of(self.quantizer, self.calibration)
        for done in measure_ratios(context.lm, self.behind, self.texts, fitted, observer):
            context.progress(f"ratios, {self.title}", done, len(self.texts), "text")
        record = {**asdict(observer.ratios()), "seconds": time.perf_counter() - started}
        write_json(workspace.folder / "ratios.json", record)

    def read(self, context: Context, folder: Path) -> MeasuredRatios:
        """The ratios."""
        record = read_json(folder / "ratios.json")
        ratios = ModuleRatios(record["ratios"], record["groups"])
        return MeasuredRatios(ratios, folder.name, float(record["seconds"]))
