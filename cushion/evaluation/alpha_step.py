"""The cached search for QFeM's alpha."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from cushion.artifacts import Workspace, read_json, write_json
from cushion.config import QuantizerConfig
from cushion.evaluation.alpha_search import AlphaSearch, search_alpha
from cushion.hashing import tensor_digest
from cushion.prefix import Prefix
from cushion.quantization.calibration import Calibration
from cushion.quantization.fitted import FittedQuantizer
from cushion.quantization.identity import quantizer_identity
from cushion.quantization.qfem import ModuleRatios
from cushion.step import Context, Step

_KEYS = (
    "target",
    "texts",
    "reference_perplexity",
    "points",
    "found",
    "reached",
    "contradictions",
    "seconds",
)


@dataclass(frozen=True, eq=False)
class AlphaStep(Step[dict[str, Any]]):
    """The search for alpha behind a prefix; gives `qfem.<stage>.alpha_search` of result.json.

    Args:
        behind: the prefix.
        quantizer: the quantizer, with the target in its `qfem`.
        ratios: of the targeted linears behind the same prefix.
        ratios_key: of the artifact that holds them.
        calibration: statistics behind the same prefix, where the quantizer needs them.
        texts: token ids, (texts, tokens); the first `qfem.texts` are used.
        title: how progress calls the prefix.

    """

    name = "alpha"
    """Files: `alpha.json`
    Key: `prefix`, `quantizer`, `ratios`, `texts`, `target`, `curve`
    Of that: the ratios; `quantizer.qfem.target` and `curve`
    """
    behind: Prefix
    quantizer: QuantizerConfig
    ratios: ModuleRatios
    ratios_key: str
    calibration: Calibration | None
    texts: Tensor
    title: str

    def key(self, context: Context) -> dict[str, Any]:
        """Prefix, quantizer, ratios, texts, target and points of the curve."""
        settings = self.quantizer.qfem
        return {
            "prefix": self.behind.fingerprint,
            "quantizer": quantizer_identity(self.quantizer, self.calibration),
            "ratios": [self.ratios_key, list(self.ratios.ratios)],
            "texts": tensor_digest([self._used()]),
            "target": settings.target,
            "curve": settings.curve,
        }

    def make(self, context: Context, workspace: Workspace) -> None:
        """Bisect; every evaluated point is kept in the checkpoint."""
        saved = workspace.checkpoint.load()
        state, before = AlphaSearch(), 0.0
        if saved is not None:
            state.reference, before = saved[0]["reference"], saved[0]["seconds"]
            state.points = {int(number): value for number, value in saved[0]["points"].items()}
        started, kept_points = time.perf_counter() - before, -1
        fitted = FittedQuantizer.of(self.quantizer, self.calibration)
        for done, at_most in search_alpha(context.lm, self.behind, fitted, self.ratios, self._used(), state):
            context.progress(f"alpha search, {self.title}", done, at_most, "text")
            if state.reference is not None and len(state.points) != kept_points:
                seconds = time.perf_counter() - started
                progress = {"reference": state.reference, "points": state.points, "seconds": seconds}
                workspace.checkpoint.save(progress)
                kept_points = len(state.points)
        record = self._record(state, time.perf_counter() - started)
        write_json(workspace.folder / "alpha.json", record)

    def read(self, context: Context, folder: Path) -> dict[str, Any]:
        """The record of the search."""
        record = read_json(folder / "alpha.json")
        float(record["points"][record["found"]]["alpha"]), float(record["seconds"])
        return {key: record[key] for key in _KEYS}

    def _used(self) -> Tensor:
        return self.texts[: self.quantizer.qfem.texts]

    def _record(self, state: AlphaSearch, seconds: float) -> dict[str, Any]:
        target, ratios = self.quantizer.qfem.target, self.ratios
        alphas, points = ratios.thresholds(), []
        for number, value in sorted(state.points.items()):
            kept = ratios.above(alphas[number])
            groups = sum(set(group) <= set(kept) for group in ratios.groups)
            point = {"alpha": alphas[number], "kept_groups": groups, "kept_modules": len(kept), "perplexity": value}
            points.append((number, point))
        numbers = [number for number, _ in points]
        assert state.found is not None
        return {
            "target": target,
            "texts": len(self._used()),
            "reference_perplexity": state.reference,
            "points": [point for _, point in points],
            "found": numbers.index(state.found),
            "reached": state.reached,
            "contradictions": [numbers.index(number) for number in state.contradictions(target)],
            "seconds": seconds,
        }
