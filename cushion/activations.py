"""Scoped hooks, and running statistics of what flows through a model: magnitudes per block, ranges per linear.

Hooks live exactly as long as the `with` block that made them, also when the code inside fails.
"""

from __future__ import annotations

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

    def __call__(self, name: str, values: Tensor) -> None:
        """Add `values`, shape (..., channels)."""
        flat = values.detach().flatten(0, -2)
        low, high = flat.amin(0).float(), flat.amax(0).float()
        if name in self.minimum:
            low, high = torch.minimum(low, self.minimum[name]), torch.maximum(high, self.maximum[name])
        self.minimum[name], self.maximum[name] = low, high
