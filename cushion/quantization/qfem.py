"""QFeM (arXiv 2405.14428, section 4.2): linears with outlier tokens at their input keep full-precision activations.

## QFeM

Section 4.2 of arXiv [2405.14428](https://arxiv.org/abs/2405.14428). The scale of a token at a linear is the abs-max
of its input there. For a linear m, over the tokens of one text and averaged over the calibration texts:

    r(m) = max(token scales) / median(token scales)

Linears with r(m) > alpha keep full-precision activations; their weights are quantized as all others. The ratios are
measured on the full-precision model behind the row's own prefix, so every row has its own; with SmoothQuant they are
those of the smoothed inputs. Linears that read the very same tensor have one ratio. A ratio over a median of zero is
the largest double.

The paper leaves open how alpha is found. Ours is in `cushion/evaluation/alpha_search.py`. Looked for is the largest
alpha with

    perplexity(linears above alpha kept) <= target * perplexity(per-token dynamic scales)

on `qfem.texts` of the calibration texts, behind the row's prefix, with the same bits, weights and smoothing on both
sides: alpha above all ratios first, then 0, then bisection. That assumes that the perplexity falls with every linear
that is kept. Everything evaluated is reported, and a warning names points that contradict this. Where even alpha = 0
is outside the target, all linears are kept, with a warning.
"""

from __future__ import annotations

import math
import sys
import weakref
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from cushion.activations import TokenScales
from cushion.artifacts import read_json, write_json
from cushion.errors import CalibrationError, input_not_finite
from cushion.quantization.effect import Effect, Work
from cushion.quantization.statistics.observer import InputObserver


@dataclass(frozen=True)
class ModuleRatios:
    """The ratio of every linear that read calibration tokens, and which linears read the very same tensor.

    Every ratio is at least 1; one that is infinite, because the median is 0, stands as the largest double. A linear
    that no token reached (an expert that was never chosen) has none, and is never kept.
    """

    ratios: dict[str, float]
    groups: list[list[str]]

    def of(self, names: list[str]) -> ModuleRatios:
        """The part of it that concerns `names`, in their order."""
        groups = [[name for name in group if name in names] for group in self.groups]
        return ModuleRatios(
            {name: self.ratios[name] for name in names if name in self.ratios}, [group for group in groups if group]
        )

    def above(self, alpha: float) -> list[str]:
        """The linears with a ratio above `alpha`."""
        return [name for name, ratio in self.ratios.items() if ratio > alpha]

    def thresholds(self) -> list[float]:
        """The smallest alpha of every set that can be kept, from none of the linears (the largest ratio) to all (0)."""
        return [*sorted(set(self.ratios.values()), reverse=True), 0.0]


class RatioObserver(InputObserver):
    """Collects the token scales of every linear's input, and which linears read the very same tensor.

    Feed it texts one by one.
    """

    def __init__(self) -> None:
        self._scales = TokenScales()
        self._group: dict[str, list[str]] = {}
        self._alive: list[tuple[weakref.ref[Tensor], str]] = []

    def __call__(self, name: str, values: Tensor) -> None:
        """Add the input of one linear, shape (1, tokens, channels) or (tokens, channels)."""
        self._scales(name, values)
        self._group.setdefault(name, [name])
        # a reference to a tensor that is gone never compares equal, so memory that is used again joins nothing
        self._alive = [(reader, first) for reader, first in self._alive if reader() is not None]
        for reader, first in self._alive:
            if reader() is values:
                return self._join(first, name)
        self._alive.append((weakref.ref(values), name))
        return None

    def _join(self, first: str, second: str) -> None:
        if self._group[first] is self._group[second]:
            return
        self._group[first].extend(self._group[second])
        for name in self._group[second]:
            self._group[name] = self._group[first]

    def ratios(self) -> ModuleRatios:
        """The ratios so far.

        Raises:
            CalibrationError: an activation is not finite.
        """
        for name in self._scales.names:
            if not all(torch.isfinite(row).all() for row in self._scales.rows(name)):
                raise input_not_finite(name)
        own = {name: min(ratio, sys.float_info.max) for name, ratio in self._scales.ratios().items()}
        groups = list({id(group): group for group in self._group.values()}.values())
        shared = {name: max(own[member] for member in group) for group in groups for name in group}
        assert all(math.isfinite(ratio) and ratio >= 1 for ratio in shared.values())
        return ModuleRatios({name: shared[name] for name in own}, groups)

    def write(self, folder: Path) -> None:
        """Keep the ratios, `ratios.json`."""
        write_json(folder / "ratios.json", asdict(self.ratios()))

    @classmethod
    def read(cls, folder: Path, device: torch.device) -> ModuleRatios:
        """The ratios that were kept."""
        record = read_json(folder / "ratios.json", folder.parent)
        return ModuleRatios(record["ratios"], record["groups"])


class _QFeM(Effect):
    def ready(self, work: Work) -> None:
        """The linears to be kept are known."""
        if work.keep is None:
            raise CalibrationError(
                f"quantizer={work.config.name} uses QFeM, and the linears that it keeps in full precision were not "
                "given: measure their ratios behind the prefix first (cushion.quantization.qfem)"
            )


QFEM = _QFeM()
