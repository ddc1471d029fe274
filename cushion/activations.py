"""Scoped hooks, and running statistics of what flows through a model: magnitudes per block, ranges per linear.

Hooks live exactly as long as the `with` block that made them, also when the code inside fails.

## Activation curves

For each block, the magnitudes |X| at its input over all tokens and features of a text: the three largest, the 90th
percentile (`top10_percent`) and the median, averaged over texts, on the full-precision model, for no prefix, the
found and the tuned one. These are the quantities of the paper's Figure 2; the percentile and the `maximum` without
averaging are added. Curves are at block **inputs**, L_q at block **outputs**.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Observer = Callable[[str, Tensor], None]


def hidden_states(value: Any) -> Tensor:
    """The hidden states in a block's output, which some architectures wrap in a tuple."""
    return value[0] if isinstance(value, tuple) else value


@contextmanager
def observe_outputs(modules: Mapping[str, nn.Module], observer: Observer) -> Iterator[None]:
    """Call `observer(name, output)` after every forward of each module, while the block runs."""

    def hook(name: str) -> Callable[..., None]:
        def call(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            observer(name, hidden_states(output))

        return call

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def observe_inputs(modules: Mapping[str, nn.Module], observer: Observer) -> Iterator[None]:
    """Call `observer(name, input)` before every forward of each module, while the block runs."""

    def hook(name: str) -> Callable[..., None]:
        def call(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            observer(name, args[0] if args else kwargs["hidden_states"])

        return call

    handles = [module.register_forward_pre_hook(hook(name), with_kwargs=True) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class MagnitudeCurve:
    """Magnitudes |X| of each block's input, per layer, averaged over texts (CushionCache, Table 5 and Figure 2).

    Every field has one entry per block. `top1`, `top2`, `top3` are the three largest magnitudes of a text,
    `top10_percent` is the 90th percentile, `median` the 50th; `maximum` is the largest `top1` of any text, no average.
    """

    top1: list[float]
    top2: list[float]
    top3: list[float]
    top10_percent: list[float]
    median: list[float]
    maximum: list[float]

    @property
    def largest(self) -> float:
        """The largest magnitude at any block's input in any text; not a number where any of them is none."""
        return float(torch.tensor(self.maximum).max())

    @property
    def worst_block(self) -> int:
        """The number of the block whose `top1` is largest; of several the first."""
        return self.top1.index(max(self.top1))


class MagnitudeStatistics:
    """Collects a `MagnitudeCurve`. Feed it whole texts: (texts, tokens, features) per call and layer."""

    def __init__(self) -> None:
        self._rows: dict[str, list[Tensor]] = {}

    def __call__(self, name: str, values: Tensor) -> None:
        """Add the texts in `values`, shape (texts, tokens, features)."""
        magnitudes = values.detach().flatten(1).abs().float()
        count = magnitudes.shape[1]
        percentiles = [round(0.9 * (count - 1)) + 1, (count - 1) // 2 + 1]  # ranks, counted from the smallest
        top = magnitudes.topk(3, dim=1).values
        rest = [magnitudes.kthvalue(rank, dim=1).values for rank in percentiles]
        self._rows.setdefault(name, []).append(torch.cat([top, torch.stack(rest, dim=1)], dim=1).cpu())

    def curve(self) -> MagnitudeCurve:
        """The statistics so far, layers in the order in which they were first seen."""
        means, maxima = [], []
        for rows in self._rows.values():
            texts = torch.cat(rows)
            means.append(texts.mean(0))
            maxima.append(texts[:, 0].max())
        columns = [*torch.stack(means).T.tolist(), torch.stack(maxima).tolist()]
        return MagnitudeCurve(*columns)


class ChannelRanges:
    """Per linear, the minimum and maximum of every input channel over all tokens seen.

    Whatever a quantizer needs follows from these: SmoothQuant's abs-max per channel, and, divided by its scales, the
    per-tensor range of a static quantizer.
    """

    def __init__(self) -> None:
        self.minimum: dict[str, Tensor] = {}
        self.maximum: dict[str, Tensor] = {}
        self.rotation: tuple[str, int] = ("none", 0)
        """Under which rotation of the model they were taken, and its seed: they fit no other."""

    def __call__(self, name: str, values: Tensor) -> None:
        """Add `values`, shape (..., channels)."""
        flat = values.detach().flatten(0, -2)
        low, high = flat.amin(0).float(), flat.amax(0).float()
        if name in self.minimum:
            low, high = torch.minimum(low, self.minimum[name]), torch.maximum(high, self.maximum[name])
        self.minimum[name], self.maximum[name] = low, high


class TokenScales:
    """Per linear, the abs-max of every token's input: the token scales of QFeP and QFeM (arXiv 2405.14428, section 4).

    Each call adds the input of one forward pass. Texts that go through the model alone may differ in length, and a
    linear that reads only some of the tokens (an expert) has only those.

    Args:
        texts: how many texts go through the model at once, all of one length. Needed because some architectures lay
            the tokens of all texts in one row before a linear (OPT).

    """

    def __init__(self, texts: int = 1) -> None:
        self.texts = texts
        self._rows: dict[str, list[Tensor]] = {}

    def __call__(self, name: str, values: Tensor) -> None:
        """Add `values`, shape (texts, tokens, channels) or (texts x tokens, channels)."""
        scales = values.detach().abs().amax(-1).reshape(self.texts, -1)
        self._rows.setdefault(name, []).extend(scales.float().cpu())

    @property
    def names(self) -> list[str]:
        """The linears seen, in the order in which they were first seen."""
        return list(self._rows)

    def rows(self, name: str) -> list[Tensor]:
        """The token scales of one linear: per text, in order, float32 on the CPU, shape (tokens,)."""
        return self._rows[name]

    def scales(self, name: str) -> Tensor:
        """The token scales of one linear over texts of one length: float32 on the CPU, shape (texts, tokens)."""
        return torch.stack(self._rows[name])

    def ratios(self) -> dict[str, float]:
        """Per linear, max / median of a text's token scales, averaged over the texts: how far its outliers stand out.

        Not finite where an activation is not.
        """
        means = {}
        for name, rows in self._rows.items():
            seen = [max_over_median(row) for row in rows if len(row)]
            means[name] = sum(seen) / len(seen) if seen else 1.0
        return means


def max_over_median(scales: Tensor) -> float:
    """The ratio of the largest to the median token scale of one text, shape (tokens,), at least 1.

    The median of an even number is the lower of the middle two. Where it is zero the ratio is infinite, or 1 when all
    scales are zero; a scale that is no number makes the ratio none.
    """
    largest, median = float(scales.max()), float(scales.median())
    if median == 0:
        return 1.0 if largest == 0 else math.inf
    return largest / median
