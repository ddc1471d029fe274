"""One pass over the search texts that collects token scales: what QFeP and PrefixQuant's rule start from."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cushion.activations import TokenScales, observe_inputs
from cushion.errors import NotFiniteError, UnsupportedModelError
from cushion.models import LanguageModel


@dataclass(frozen=True)
class Scanned:
    """Progress of a search: `done` of `total` texts, or contexts, as `unit` says."""

    done: int
    total: int
    unit: str


@torch.no_grad()
def scan_texts(lm: LanguageModel, linears: Collection[str], texts: Tensor, scales: TokenScales) -> Iterator[Scanned]:
    """Run each text alone through the full-precision model, without a prefix, and add its token scales to `scales`.

    Args:
        linears: names of the linears whose inputs are read.
        texts: token ids, (texts, tokens).

    Yields:
        The number of texts done.

    Raises:
        NotFiniteError: an activation is not finite.
        UnsupportedModelError: a linear does not read every token of a text, so that its scales have no positions.

    """
    observed = {name: linear for name, linear in lm.linears().items() if name in linears}
    for done, text in enumerate(texts, start=1):
        with observe_inputs(observed, scales):
            lm.body(text[None], use_cache=False)
        yield Scanned(done, len(texts), "text")
    for name in observed:
        rows = scales.rows(name) if name in scales.names else []
        if len(rows) != len(texts) or any(len(row) != texts.shape[1] for row in rows):
            raise UnsupportedModelError(
                f"{name} of {lm.label} does not read every token of a text, so its outliers cannot be assigned to "
                "tokens: use search=greedy_sampled"
            )
        if not torch.isfinite(scales.scales(name)).all():
            raise NotFiniteError(
                f"the input of {name} is not finite on the search text: its activations overflow {lm.model.dtype}; use "
                "model.dtype=float32 or bfloat16"
            )
