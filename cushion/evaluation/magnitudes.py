"""The magnitude curve and L_q behind a prefix, on the full-precision model (CushionCache, Figures 1 and 2)."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from cushion.activations import MagnitudeCurve, MagnitudeStatistics, observe_inputs
from cushion.artifacts import Workspace, read_json, write_json
from cushion.config import SearchConfig
from cushion.errors import NotFiniteError
from cushion.hashing import tensor_digest
from cushion.prefix import Prefix
from cushion.quantization.text_errors import error_identity
from cushion.search.objective import Objective
from cushion.step import Context, Step


@dataclass(frozen=True, eq=False)
class MagnitudesStep(Step[tuple[MagnitudeCurve, float]]):
    """The curve, and the mean L_q per text.

    Args:
        behind: the prefix.
        objective: gives the grid of q in L_q.
        texts: token ids, (texts, tokens).
        title: how progress calls the prefix.

    """

    name = "activations"
    """Files: `activations.json`
    Key: `prefix`, `grid`, `texts`
    Of that: the grid of L_q
    """
    behind: Prefix
    objective: SearchConfig
    texts: Tensor
    title: str

    def key(self, context: Context) -> dict[str, Any]:
        """Prefix, grid and texts."""
        return {
            "prefix": self.behind.fingerprint,
            "grid": error_identity(self.objective),
            "texts": tensor_digest([self.texts]),
        }

    def make(self, context: Context, workspace: Workspace) -> None:
        """Run the texts one by one.

        Raises:
            NotFiniteError: an activation is not finite.

        """
        lm, statistics, errors = context.lm, MagnitudeStatistics(), []
        error_of = Objective(replace(self.objective, objective="quantization_error"))
        for done, text in enumerate(self.texts, start=1):
            with observe_inputs(lm.named_blocks, statistics):
                errors.append(error_of(lm, self.behind, text[None], skip=0).item())
            context.progress(f"activations, {self.title}", done, len(self.texts), "text")
        curve, error = statistics.curve(), sum(errors) / len(errors)
        if not (math.isfinite(curve.largest) and math.isfinite(error)):
            raise NotFiniteError(
                f"the activations of {lm.label} are not finite ({self.title}: largest {curve.largest}, L_q "
                f"{error}): use model.dtype=bfloat16 or float32"
            )
        write_json(workspace.folder / "activations.json", {"curve": asdict(curve), "quantization_error": error})

    def read(self, context: Context, folder: Path) -> tuple[MagnitudeCurve, float]:
        """The curve and the error."""
        record = read_json(folder / "activations.json")
        return MagnitudeCurve(**record["curve"]), float(record["quantization_error"])
