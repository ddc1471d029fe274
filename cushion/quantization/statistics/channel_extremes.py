"""Minimum and maximum of every channel of all inputs seen: as `Extremes`, where channels have ranges of their own."""

from __future__ import annotations

import torch
from torch import Tensor

from cushion.quantization.statistics.extremes import Extremes


class ChannelExtremes(Extremes):
    """Minimum and maximum of every channel over all texts; `range` is (channels,) each."""

    @staticmethod
    def reduced(values: Tensor) -> Tensor:
        """Minimum and maximum of a text's channels, (2, channels) float32."""
        flat = values.detach().flatten(0, -2)
        return torch.stack([flat.amin(0), flat.amax(0)]).float().cpu()
