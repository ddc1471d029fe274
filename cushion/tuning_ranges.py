"""The quantizer under which a prefix is tuned, and where the ranges of its activations come from (`tuning.ranges`).

## Ranges while tuning

| `tuning.ranges` | range of a linear's input | gradient towards X |
|---|---|---|
| `dynamic` (default) | of the input itself, whatever the run's quantizer has; one for the tensor where that has several for its channels | 1; 0 where `clip_ratio` clips |
| `static` | the run's own, fitted anew behind the prefix every `ranges_every` steps and before each held-out measurement | 1 inside the range, 0 where it clips |
| `learned` | the run's own behind the found prefix, times what is learned | likewise |

Under `static` and `learned` the held-out loss is that of the very quantizer that the row is measured with, and QFeM
keeps the linears that it chose behind the found prefix. Learned ranges follow LSQ (arXiv
[1902.08153](https://arxiv.org/abs/1902.08153)), and LSQ+ (arXiv [2004.09576](https://arxiv.org/abs/2004.09576)) for
the offset z of asymmetric grids. With u = (X - z) / s and c the code:

| | inside the range | outside |
|---|---|---|
| dq/dX | 1 | 0 |
| dq/ds (LSQ, equation 3) | c - u | c |
| dq/dz | 0 | 1 |

The gradients of s and z are multiplied with 1 / sqrt(N Q_P), N being the number of values and Q_P the largest code
(LSQ, section 2.2). Steps are relative: s = s_0 exp(t), and z moves by b initial widths of the range; t and b start at
0. Adam's epsilon is 1e-15 for them. A symmetric range keeps the proportion of its ends.
"""  # noqa: E501

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from types import TracebackType

import torch
from torch import Tensor

from cushion.config import QuantizerConfig, TuningConfig
from cushion.errors import ConfigError
from cushion.models import LanguageModel
from cushion.prefix import Prefix
from cushion.quantization.check import surrounds
from cushion.quantization.fitted import FittedQuantizer
from cushion.quantization.input_statistics import fitted_behind
from cushion.quantization.learned import LearnableQuantizer, Learned, parameters_of
from cushion.quantization.parts.registry import turned_off
from cushion.quantization.replacements import Replacements


def tuning_quantizer(config: TuningConfig, quantizer: QuantizerConfig) -> QuantizerConfig:
    """The quantizer under which L_pred is computed: the run's own, with the ranges of `tuning.ranges`, or none."""
    if config.prediction_model == "full_precision":
        return turned_off(quantizer, lambda part: True)
    if config.ranges == "dynamic":
        own = quantizer.activations
        granularity = "per_tensor" if own.by_channel else own.granularity
        return replace(quantizer, activations=replace(own, range="dynamic", granularity=granularity))
    return quantizer


def check_tuning(config: TuningConfig, quantizer: QuantizerConfig) -> None:
    """Raise `ConfigError` where the loss needs the model without a quantizer that cannot be taken off for a moment."""
    if config.method == "none" or config.loss != "kl":
        return
    names = surrounds(quantizer)
    if names:
        raise ConfigError(
            f"tuning.loss=kl needs full precision beside the quantized model at every step, and quantizer."
            f"{names[0]} changes more than the linears: turn it off, or use tuning.loss=next_token"
        )


class TunedUnder:
    """The quantizer under which L_pred is computed, on the model for the length of a `with` block.

    Rounding is straight-through. What it learns starts anew with every `with` block (`set_learned`).

    Args:
        lm: the model, in full precision.
        config: says where the ranges come from.
        fitted: the run's quantizer, fitted behind the found prefix.
        texts: the calibration texts, token ids (texts, tokens); needed for static ranges.

    """

    def __init__(self, lm: LanguageModel, config: TuningConfig, fitted: FittedQuantizer, texts: Tensor | None) -> None:
        self._lm, self._texts = lm, texts
        self._fitted = replace(fitted, config=tuning_quantizer(config, fitted.config))
        self.learns, self.is_estimated = config.ranges == "learned", config.ranges == "static"
        self._stack = ExitStack()
        self._learnable: dict[str, LearnableQuantizer] = {}
        self._replacements = Replacements()

    def __enter__(self) -> TunedUnder:
        self._learnable.clear()
        learnable = self._learnable if self.learns else None
        put_on = self._fitted.on(
            self._lm, straight_through=True, learnable=learnable, replacements=self._replacements
        )  # fmt: skip
        self._stack.enter_context(put_on)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def estimate(self, behind: Prefix) -> None:
        """Fit the quantizer anew behind a prefix: static ranges, and smoothing.

        Raises:
            CalibrationError: an activation is not finite.

        """
        assert self._texts is not None, "static ranges need calibration texts"
        self._stack.close()
        self._fitted = fitted_behind(self._lm, behind, self._fitted.config, self._texts, self._fitted.keep)
        self.__enter__()

    def parameters(self) -> list[Tensor]:
        """What the learned ranges are made of: float32 scalars that need a gradient, in a fixed order."""
        return parameters_of(self._learnable.values())

    @torch.no_grad()
    def set_learned(self, values: list[Tensor]) -> None:
        """Give the parameters the values of an earlier tuning."""
        for parameter, value in zip(self.parameters(), values, strict=True):
            parameter.copy_(value)

    def learned(self) -> Learned | None:
        """The ranges as they are now; None where they do not learn."""
        if not self.learns:
            return None
        return Learned({name: quantizer.range() for name, quantizer in self._learnable.items()})

    def without_quantizer(self) -> AbstractContextManager[None]:
        """The full-precision linears for the length of a `with` block, behind rotation and smoothing."""
        return self._replacements.suspended()
