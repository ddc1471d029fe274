"""Magnitudes over token positions and channels at one block's input (CushionCache, Figure 1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cushion.activations import observe_inputs
from cushion.artifacts import Workspace, read_json, write_json
from cushion.blockwise import run_blocks
from cushion.errors import NotFiniteError
from cushion.hashing import tensor_digest
from cushion.models import LanguageModel
from cushion.prefix import Prefix
from cushion.step import Context, Step

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


@dataclass(frozen=True, eq=False)
class ActivationMapStep(Step[ActivationMap]):
    """A map behind a prefix, on the full-precision model.

    Args:
        behind: the prefix.
        block: number of the decoder block, from 0.
        channels: which channels; None for those with the largest magnitudes behind this prefix.
        text: token ids, (tokens,).
        title: how progress calls the prefix.

    """

    name = "activation_map"
    """Files: `activation_map.json`
    Key: `prefix`, `block`, `channels`, `text`
    Of that: the channels where they are given; the part of the text that is run
    """
    behind: Prefix
    block: int
    channels: list[int] | None
    text: Tensor
    title: str

    def key(self, context: Context) -> dict[str, Any]:
        """Prefix, block, channels and text."""
        return {
            "prefix": self.behind.fingerprint,
            "block": self.block,
            "channels": self.channels,
            "text": tensor_digest([self._used()]),
        }

    def make(self, context: Context, workspace: Workspace) -> None:
        """One pass."""
        context.progress(f"activation map, {self.title}", 0, 1, "pass")
        found = activation_map(context.lm, self.behind, self._used(), self.block, self.channels)
        write_json(workspace.folder / "activation_map.json", asdict(found))
        context.progress(f"activation map, {self.title}", 1, 1, "pass")

    def read(self, context: Context, folder: Path) -> ActivationMap:
        """The map."""
        return ActivationMap(**read_json(folder / "activation_map.json"))

    def _used(self) -> Tensor:
        return self.text[:MAP_POSITIONS]
