"""Magnitudes over token positions and channels at one block's input (CushionCache, Figure 1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cushion.activations import observe_inputs
from cushion.errors import NotFiniteError
from cushion.models import LanguageModel
from cushion.prefix import Prefix
from cushion.search.blockwise import run_blocks

MAP_POSITIONS, MAP_CHANNELS = 64, 16
"""The size of a map at most: first positions of a text, channels with the largest magnitudes."""
_DIGITS = 4


@dataclass(frozen=True)
class ActivationMap:
    """|X| of one text at a block's input: `values` has a list per position, with a magnitude for each of `channels`.

    Magnitudes have 4 significant digits; channels are ascending.
    """

    channels: list[int]
    values: list[list[float]]


def activation_map(
    lm: LanguageModel, prefix: Prefix, text: Tensor, block: int, channels: Sequence[int] | None = None
) -> ActivationMap:
    """Map |X| at the input of a block, on the model as it stands. No block behind it is run.

    Args:
        text: token ids, (tokens,); no more than the first `MAP_POSITIONS` are used, which see nothing of the others.
        block: number of the decoder block, from 0.
        channels: which channels; None for the `MAP_CHANNELS` ones with the largest magnitudes here.

    Raises:
        NotFiniteError: a magnitude there is none.

    """
    name, module = list(lm.named_blocks.items())[block]
    seen: list[Tensor] = []
    with observe_inputs({name: module}, lambda _name, values: seen.append(values[0].detach().abs().float().cpu())):
        run_blocks(lm, prefix, text[None, :MAP_POSITIONS], lambda _block, _output: None, depth=block + 1)
    (magnitudes,) = seen
    if not magnitudes.isfinite().all():
        raise NotFiniteError(
            f"the activations of {lm.label} are not finite (input of block {block}): use model.dtype=bfloat16 or "
            "float32"
        )
    if channels is None:
        count = min(MAP_CHANNELS, magnitudes.shape[1])
        channels = sorted(magnitudes.amax(0).topk(count).indices.tolist())
    kept = magnitudes[:, torch.tensor(channels)].tolist()
    return ActivationMap(list(channels), [[float(f"{value:.{_DIGITS}g}") for value in row] for row in kept])
