"""The cached fitting of a quantizer's parts, block by block; an interrupted one goes on with the next block."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from cushion.artifacts import Workspace, read_json, read_tensors, write_json
from cushion.hashing import tensor_digest
from cushion.prefix import Prefix
from cushion.quantization.calibration import Calibration
from cushion.quantization.fitted import FittedQuantizer
from cushion.quantization.fitting import Fits, fit_blocks
from cushion.quantization.identity import quantizer_identity
from cushion.quantization.quantizer import QuantizerConfig
from cushion.step import Context, Step


@dataclass(frozen=True)
class Fitted:
    """What was found, by part and linear; the artifact's key, and the seconds it took."""

    fits: Fits
    key: str
    seconds: float


@dataclass(frozen=True, eq=False)
class FittingStep(Step[Fitted]):
    """What the parts of a quantizer find where they are fitted block by block behind a prefix.

    Args:
        behind: the prefix.
        quantizer: at least one of its parts is `blockwise`.
        calibration: statistics behind the same prefix, where the quantizer needs them.
        keep: the linears that QFeM keeps in full precision.
        texts: token ids, (texts, tokens).

    """

    name = "fitting"
    """Files: `fits.safetensors`, `fitting.json`, where a part of the quantizer is fitted block by block
    Key: `prefix`, `quantizer`, `texts`
    Of that: the calibration texts
    """
    behind: Prefix
    quantizer: QuantizerConfig
    calibration: Calibration | None
    keep: frozenset[str]
    texts: Tensor

    def key(self, context: Context) -> dict[str, Any]:
        """Prefix, quantizer with what it was calibrated to, and texts."""
        return {
            "prefix": self.behind.fingerprint,
            "quantizer": quantizer_identity(self.quantizer, self.calibration, self.keep),
            "texts": tensor_digest([self.texts]),
        }

    def make(self, context: Context, workspace: Workspace) -> None:
        """Fit one block after another, from the checkpoint on where there is one."""
        saved = workspace.checkpoint.load()
        blocks, before, tensors = (0, 0.0, dict[str, Tensor]()) if saved is None else _progress(*saved)
        started = time.perf_counter() - before
        fits = self._fits({name: tensor.to(context.lm.device) for name, tensor in tensors.items()})
        fitted = replace(FittedQuantizer.of(self.quantizer, self.calibration, self.keep), fits=fits)
        for done in fit_blocks(context.lm, self.behind, fitted, self.texts, blocks):
            context.progress("fitting", done, len(context.lm.blocks), "block")
            if done > blocks and workspace.checkpoint.due():
                state = {"blocks": done, "seconds": time.perf_counter() - started}
                workspace.checkpoint.save(state, _flat(fits))
        copies = {name: tensor.cpu().contiguous() for name, tensor in _flat(fits).items()}
        save_file(copies, workspace.folder / "fits.safetensors")
        write_json(workspace.folder / "fitting.json", {"seconds": time.perf_counter() - started})

    def read(self, context: Context, folder: Path) -> Fitted:
        """What was found, on the model's device."""
        seconds = float(read_json(folder / "fitting.json")["seconds"])
        tensors = read_tensors(folder / "fits.safetensors", str(context.lm.device))
        return Fitted(self._fits(tensors), folder.name, seconds)

    def _fits(self, tensors: Mapping[str, Tensor]) -> Fits:
        fits: Fits = {part.name: {} for part in self.quantizer.blockwise}
        for name, tensor in tensors.items():
            part, _, linear = name.partition("/")
            fits[part][linear] = tensor
        return fits


def _progress(state: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[int, float, dict[str, Tensor]]:
    return int(state["blocks"]), float(state["seconds"]), tensors


def _flat(fits: Fits) -> dict[str, Tensor]:
    return {f"{part}/{linear}": tensor for part, found in fits.items() for linear, tensor in found.items()}
