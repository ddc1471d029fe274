"""Put a quantizer on a model for the length of a `with` block, from a configuration and what was measured for it."""

from __future__ import annotations

from collections.abc import Set
from contextlib import AbstractContextManager

from cushion.activations import ChannelRanges
from cushion.models import LanguageModel
from cushion.quantization.fitted import FittedQuantizer
from cushion.quantization.quantizer import QuantizerConfig


def quantized(
    lm: LanguageModel,
    config: QuantizerConfig,
    calibration: ChannelRanges | None = None,
    straight_through: bool = False,
    keep: Set[str] | None = None,
) -> AbstractContextManager[LanguageModel]:
    """`FittedQuantizer(config, calibration, keep).on(lm, straight_through)`."""
    fitted = FittedQuantizer(config, calibration, None if keep is None else frozenset(keep))
    return fitted.on(lm, straight_through)
