"""Token scales of the search texts, each in the place of its token: what QFeP and PrefixQuant's rule start from.

Experts read only the tokens that are routed to them; their scales are put back in place by the router's decisions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cushion.activations import TokenScales, max_over_median, observe_inputs
from cushion.errors import NotFiniteError, UnsupportedModelError
from cushion.models import LanguageModel


@dataclass(frozen=True)
class Scanned:
    """Progress of a search: `done` of `total` texts, or contexts, as `unit` says."""

    done: int
    total: int
    unit: str


def scan_texts(
    lm: LanguageModel, linears: Collection[str], texts: Tensor, scales: dict[str, Tensor]
) -> Iterator[Scanned]:
    """Run each text alone through the full-precision model, without a prefix, and put its token scales into `scales`.

    Args:
        linears: names of the linears whose inputs are read.
        texts: token ids, (texts, tokens).
        scales: filled in place when all texts are done, by name, as `token_scales` describes them.

    Yields:
        The number of texts done.

    Raises:
        NotFiniteError: an activation is not finite.
        UnsupportedModelError: it is not known which tokens a linear reads.

    """
    found: list[dict[str, Tensor]] = []
    for text in texts:
        found.append(token_scales(lm, linears, text[None]))
        yield Scanned(len(found), len(texts), "text")
    scales.update({name: torch.cat([each[name] for each in found]) for name in linears})


@torch.no_grad()
def token_scales(lm: LanguageModel, linears: Collection[str], texts: Tensor) -> dict[str, Tensor]:
    """The abs-max of each token's input at each linear, from one forward pass of `texts`, (texts, tokens).

    Returns:
        By name, float32 on the CPU, of the shape of `texts`: not a number where a linear does not read the token.

    Raises:
        NotFiniteError: an activation is not finite.
        UnsupportedModelError: it is not known which tokens a linear reads.

    """
    rows, routes = TokenScales(), dict[str, Tensor]()
    observed = {name: linear for name, linear in lm.linears().items() if name in linears}
    with observe_inputs(observed, rows), _observe_routes(lm, routes):
        lm.body(texts, use_cache=False)
    result = {}
    for name in observed:
        read = rows.rows(name)[0] if name in rows.names else torch.empty(0)
        if not torch.isfinite(read).all():
            raise NotFiniteError(
                f"the input of {name} is not finite on the search text: its activations overflow {lm.model.dtype}; use "
                "model.dtype=float32 or bfloat16"
            )
        places = _places(name, routes, texts.numel())
        if len(places) != len(read):
            raise UnsupportedModelError(
                f"{name} of {lm.label} does not read every token of a text, so its outliers cannot be assigned to "
                "tokens: use search=greedy_sampled"
            )
        placed = torch.full((texts.numel(),), math.nan)
        placed[places] = read
        result[name] = placed.reshape(texts.shape)
    return result


def ratios(scales: dict[str, Tensor]) -> dict[str, float]:
    """Per linear, max / median of the scales that it has of a text, averaged over the texts of which it has any.

    Args:
        scales: by name, as `token_scales` returns them.

    """
    means = {}
    for name, texts in scales.items():
        seen = [max_over_median(text[~text.isnan()]) for text in texts if not text.isnan().all()]
        means[name] = sum(seen) / len(seen) if seen else 1.0
    return means


@contextmanager
def _observe_routes(lm: LanguageModel, routes: dict[str, Tensor]) -> Iterator[None]:
    """Note, by the name of each block's experts, which experts every token is routed to, (tokens, k)."""

    def hook(name: str) -> Callable[..., None]:
        def call(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            routes[name] = (args[1] if len(args) > 1 else kwargs["top_k_index"]).detach().cpu()

        return call

    path, handles = lm.architecture.experts, []
    try:
        for index, block in lm.named_blocks.items() if path is not None else ():
            name = f"{lm.architecture.blocks}.{index}.{path}."
            experts = block.get_submodule(path or "")
            handles.append(experts.register_forward_pre_hook(hook(name), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _places(name: str, routes: dict[str, Tensor], tokens: int) -> Tensor:
    """Which tokens a linear reads, in the order in which it reads them."""
    for experts, chosen in routes.items():
        if name.startswith(experts):
            number = int(name.removeprefix(experts).partition(".")[0])
            return torch.where(chosen == number)[0]
    return torch.arange(tokens)
