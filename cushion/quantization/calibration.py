"""Calibration: the ranges of every linear's input over real text, on the full-precision model.

The prefix stands before each text through the cache, so its own positions are never seen by a linear and enter no
range. One pass serves every quantizer: smoothing only divides channels by constants.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from cushion.activations import ChannelRanges, observe_inputs
from cushion.artifacts import Workspace, read_json, read_tensors, write_json
from cushion.errors import input_not_finite
from cushion.hashing import tensor_digest
from cushion.models import LanguageModel
from cushion.prefix import Prefix
from cushion.quantization.parts.base import Needed
from cushion.quantization.rotation import rotated
from cushion.step import Context, Step


@torch.no_grad()
def calibrate(lm: LanguageModel, prefix: Prefix, texts: Tensor, ranges: ChannelRanges) -> Iterator[int]:
    """Run `texts` through the model and widen `ranges` by what every linear of the blocks sees.

    Args:
        texts: token ids, (texts, tokens). Each text is run alone, behind the prefix.
        ranges: filled in place, by linear name.

    Yields:
        The number of texts done.

    Raises:
        CalibrationError: an activation is not finite.

    """
    ranges.rotation = lm.rotation
    for done, text in enumerate(texts, start=1):
        with observe_inputs(lm.linears(), ranges):
            lm.body(text[None], past_key_values=prefix.cache(lm.model), use_cache=True)
        yield done
    for name, low in ranges.minimum.items():
        if not (torch.isfinite(low).all() and torch.isfinite(ranges.maximum[name]).all()):
            raise input_not_finite(name)


@dataclass(frozen=True)
class Calibration:
    """What a quantizer needs to know of the linears' inputs behind one prefix.

    Args:
        ranges: of every channel; None where none are needed.
        key: of the artifacts that hold it.
        seconds: what it took.
        inputs: what else was gathered, by what was needed.
        fits: what was found block by block, by part and linear.

    """

    ranges: ChannelRanges | None
    key: str
    seconds: float
    inputs: Mapping[Needed, Any] = field(default_factory=dict)
    fits: Mapping[str, dict[str, Tensor]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class CalibrationStep(Step[Calibration]):
    """Channel ranges over the calibration texts behind a prefix.

    Args:
        behind: the prefix.
        rotation: of the model while it is calibrated, and its seed.
        texts: token ids, (texts, tokens).

    """

    name = "calibration"
    """Files: `ranges.safetensors`, `calibration.json`
    Key: `prefix`, `rotation`, `texts`
    Of that: the rotation and its seed
    """
    behind: Prefix
    rotation: tuple[str, int]
    texts: Tensor

    def key(self, context: Context) -> dict[str, Any]:
        """Prefix, rotation and texts."""
        return {
            "prefix": self.behind.fingerprint,
            "rotation": list(self.rotation),
            "texts": tensor_digest([self.texts]),
        }

    def make(self, context: Context, workspace: Workspace) -> None:
        """Run the texts, and keep minimum and maximum of every channel."""
        started = time.perf_counter()
        ranges = ChannelRanges()
        with rotated(context.lm, *self.rotation):
            for done in calibrate(context.lm, self.behind, self.texts, ranges):
                context.progress("calibration", done, len(self.texts), "text")
        tensors = {f"minimum.{name}": low.cpu() for name, low in ranges.minimum.items()}
        tensors |= {f"maximum.{name}": high.cpu() for name, high in ranges.maximum.items()}
        save_file(tensors, workspace.folder / "ranges.safetensors")
        write_json(workspace.folder / "calibration.json", {"seconds": time.perf_counter() - started})

    def read(self, context: Context, folder: Path) -> Calibration:
        """The ranges, on the model's device."""
        seconds = float(read_json(folder / "calibration.json")["seconds"])
        tensors = read_tensors(folder / "ranges.safetensors", str(context.lm.device))
        ranges = ChannelRanges()
        for name, tensor in tensors.items():
            kind, _, linear_name = name.partition(".")
            (ranges.minimum if kind == "minimum" else ranges.maximum)[linear_name] = tensor
        ranges.rotation = self.rotation
        return Calibration(ranges, folder.name, seconds)
