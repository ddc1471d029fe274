"""Static ranges chosen by the output of their block: the grid search of PrefixQuant (arXiv 2410.05265).

## Ranges by block output

After the grid search of PrefixQuant (arXiv [2410.05265](https://arxiv.org/abs/2410.05265)). For each static quantizer
of a linear's input, with all others in full precision,

    f* = argmin_f  || F_f(X) - F(X) ||^2          range = f* (min, max)

F is the full-precision block behind the prefix, rotated and smoothed where the quantizer says so, X its input in the
full-precision model, F_f the block in which this quantizer alone rounds. Factors: 1, .95, .85, ..., .25; then, around
the best, +-.01 to +-.05, none above 1.

- Linears that read one norm have one factor, and so have the linears of one place in all experts: four searches for a
  block of a LLaMA, of at most 19 passes each, whatever the number of experts. With `estimator_options.texts` at 8 of
  16 calibration texts this costs what 38 calibrations cost.
- `fits.safetensors` of the step `fitting` has three numbers for each linear: the factor, and the mean squared error
  of the block's output with factor 1 and with this one.
- Unlike PrefixQuant's code: 1 is tried; a factor multiplies the min-max range and not what was found so far;
  attention is masked at all times; the range that it starts from is that of all texts and not a moving average. Keys
  and values of a static cache keep min-max for each head, where PrefixQuant searches theirs by scores and values;
  `weights.estimator=mse` stands for its search of the weights' scales by the output of the linear; dynamic scales
  have no clipping; symmetric scales are max / (2^(N-1) - 1), where it has 2 max / (2^N - 1), and cached values leave
  the lowest code out, which it reaches.
- `quantizer=prefixquant` is of the frozen model. PrefixQuant's published figures are those after its training
  (`reconstruction=prefixquant`), a row of its own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cushion.errors import CalibrationError
from cushion.float64 import in_float64
from cushion.quantization.effect import Effect, Site, Turn, Work
from cushion.quantization.inputs import input_quantizer, static_range
from cushion.quantization.linear import ActivationQuantizer

COARSE = (1.0, 0.95, 0.85, 0.75, 0.65, 0.55, 0.45, 0.35, 0.25)
"""The factors that are tried first: the eight of PrefixQuant's code, and 1."""
FINE = (0.05, 0.04, 0.03, 0.02, 0.01, -0.01, -0.02, -0.03, -0.04, -0.05)
"""What is then added to the best of them; a sum above 1 is not tried."""


class _BlockOutput(Effect):
    def fit(self, turn: Turn) -> dict[str, Tensor]:
        """The factors of the block's linears, by full name.

        Returns:
            (3,), float32, on the CPU: the factor, and the mean squared error of the block's output with factor 1 and
            with this one. A linear whose input stays in full precision is left out.

        Raises:
            CalibrationError: the error is not finite.

        """
        texts = int(turn.work.config.activations.estimation()[1]["texts"])
        found = dict[str, Tensor]()
        for group in groups_of(turn):
            ranges = {site.name: static_range(turn.work, site) for site in group}
            errors = {factor: _error(turn, group, ranges, factor, texts) for factor in COARSE}
            if not math.isfinite(errors[1.0]):
                raise CalibrationError(
                    f"the output of block {turn.index} is not finite when the input of {group[0].name} is quantized: "
                    "use model.dtype=float32 or bfloat16"
                )
            coarse = min(errors, key=lambda factor: errors[factor])
            for factor in (round(coarse + step, 2) for step in FINE):
                if factor <= 1 and factor not in errors:
                    errors[factor] = _error(turn, group, ranges, factor, texts)
            best = min(errors, key=lambda factor: errors[factor])  # of equal ones, the one that was tried first
            found |= {site.name: torch.tensor([best, errors[1.0], errors[best]]) for site in group}
        return found

    def at(self, work: Work, site: Site) -> None:
        """The quantizer of the min-max range times the factor; a range that was learned stays as it is."""
        if site.activation is None or site.name in work.learned.ranges:
            return
        factor = float(work.fit_of("block_output", site.name)[0])
        site.activation = input_quantizer(work, _times(static_range(work, site), factor))


def groups_of(turn: Turn) -> list[list[Site]]:
    """The sites of a block whose inputs are rounded, those together that have one factor, in forward order."""
    norms = {name: norm for norm, readers in turn.work.lm.norm_readers(turn.index) for name in readers}
    groups: dict[str, list[Site]] = {}
    for name, site in turn.sites.items():
        if site.activation is not None:
            groups.setdefault(norms.get(name, re.sub(r"\d+", "*", name)), []).append(site)
    return list(groups.values())


def _error(turn: Turn, group: list[Site], ranges: dict[str, tuple[Tensor, Tensor]], factor: float, texts: int) -> float:
    """The mean squared error of the block's output where the inputs of one group alone are rounded."""
    shared: list[ActivationQuantizer] = []
    quantizers = [
        (site.linear, input_quantizer(turn.work, _times(ranges[site.name], factor)).shared_with(shared))
        for site in group
    ]
    total, count = 0.0, 0
    rows = zip(turn.texts[:texts], turn.inputs[:texts], turn.targets[:texts], strict=True)
    with _rounding(quantizers):
        for text, hidden, target in rows:
            output = turn.run(text[None], hidden[None])[0]
            total += float(in_float64((output.float() - target.float()).square()).sum())
            count += target.numel()
    return total / count


@contextmanager
def _rounding(quantizers: Iterable[tuple[nn.Linear, ActivationQuantizer]]) -> Iterator[None]:
    """Linears that read their input rounded, behind what else is done to it, for the length of a `with` block."""

    def hook(quantizer: ActivationQuantizer) -> Any:
        return lambda _module, args: (quantizer(args[0]),)

    handles = [linear.register_forward_pre_hook(hook(quantizer)) for linear, quantizer in quantizers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _times(ends: tuple[Tensor, Tensor], factor: float) -> tuple[Tensor, Tensor]:
    return ends[0] * factor, ends[1] * factor


BLOCK_OUTPUT = _BlockOutput()
