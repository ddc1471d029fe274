"""Calibration: the ranges of every linear's input over real text, on the full-precision model.

The prefix stands before each text through the cache, so its own positions are never seen by a linear and enter no
range. One pass serves every quantizer: smoothing only divides channels by constants.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cushion.activations import ChannelRanges, observe_inputs
from cushion.errors import CalibrationError
from cushion.models import LanguageModel
from cushion.prefix import Prefix


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
            raise CalibrationError(
                f"the input of {name} is not finite on the calibration text: use model.dtype=float32 or bfloat16"
            )
