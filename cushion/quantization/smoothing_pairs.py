"""SmoothQuant's scales between two linears: values and output projection, up and down projection.

## Smoothing between two linears

With `quantizer.smoothing_pairs` a scale s of each channel, that of SmoothQuant for the linear that reads, is divided
out of the rows of the linear before it and multiplied into its columns. That keeps the function where only what is
linear in each channel stands between them: attention averages values over positions, and the gate of an MLP multiplies
the outputs of the up projection. AWQ (arXiv [2306.00978](https://arxiv.org/abs/2306.00978)) and OmniQuant (arXiv
[2308.13137](https://arxiv.org/abs/2308.13137)) scale values, AWQ and I-LLM (arXiv
[2405.17849](https://arxiv.org/abs/2405.17849)) up projections.

Query heads that read the same values share their scale. The cache then holds v / s, and so do the values of a prefix,
tuned ones too. Not covered: pairs of queries and keys, the gate's own side of SwiGLU, ReLU without a gate, a fused or
clamped up projection (Phi-3, gpt-oss).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from cushion.errors import ConfigError
from cushion.models import LanguageModel
from cushion.quantization.effect import Effect, Work
from cushion.quantization.head_rotation import changed_values, rows_of_values, value_heads, value_linears
from cushion.quantization.parts.smoothing_pairs import scales_up, scales_values
from cushion.quantization.quantizer import QuantizerConfig
from cushion.quantization.replacements import Replacements
from cushion.quantization.smoothing import scaled_weight
from cushion.quantization.smoothquant import smoothing_scales


class _SmoothingPairs(Effect):
    def check(self, lm: LanguageModel, config: QuantizerConfig) -> None:
        """The architecture names the linears of each pair."""
        key, kind = f"quantizer.smoothing_pairs={config.smoothing_pairs}", lm.architecture.model_type
        if scales_values(config) and lm.architecture.values is None:
            raise ConfigError(
                f"{key} cannot be used with {lm.label}: the architecture {kind!r} does not name where its values are "
                "made and read; use quantizer.smoothing_pairs=up or none"
            )
        if scales_up(config) and not lm.gated_pairs():
            raise ConfigError(
                f"{key} cannot be used with {lm.label}: the architecture {kind!r} names no up projection of its own "
                "whose outputs a gate multiplies; use quantizer.smoothing_pairs=values or none"
            )

    @contextmanager
    def around(self, work: Work) -> Iterator[None]:
        """Scales folded into both linears of each pair; a reader's is told in `divisors`."""
        replacements, changes = Replacements(), dict[int, Callable[[Tensor], Tensor]]()
        with ExitStack() as stack:
            stack.callback(replacements.undo)
            if scales_up(work.config):
                for up, down in work.lm.gated_pairs():
                    _fold_up(work, up, down, replacements)
            if scales_values(work.config):
                for layer in range(len(work.lm.blocks)):
                    changes[layer] = partial(_divided, scale=_fold_values(work, layer, replacements))
                what = "quantizer.smoothing_pairs, which keeps scaled values"
                stack.enter_context(changed_values(work.lm, changes, what))
            yield


def _divided(values: Tensor, scale: Tensor) -> Tensor:
    """Values of a prefix, (batch, cached heads, positions, head size), by `scale`, (value heads, head size)."""
    scale = scale.repeat_interleave(values.shape[1] // len(scale), dim=0)
    return (values.float() / scale[:, None].to(values.device)).to(values.dtype)


def _largest(work: Work, name: str) -> tuple[Tensor, Tensor]:
    """max|X_j| and max|W_j| of a linear that reads, (in_features,) each."""
    linear = _linear(work, name)
    low, high = work.ranges_of(name, linear.weight.device)
    return torch.maximum(-low, high), linear.weight.detach().float().abs().amax(0)


def _linear(work: Work, name: str) -> nn.Linear:
    return cast(nn.Linear, work.lm.model.get_submodule(name))


def _alpha(work: Work) -> float:
    assert work.config.smoothing_alpha is not None
    return work.config.smoothing_alpha


def _put(linear: nn.Linear, name: str, new: Tensor, replacements: Replacements) -> None:
    replacements.put(linear, name, nn.Parameter(new, requires_grad=False))


def _fold_up(work: Work, up: str, down: str, replacements: Replacements) -> None:
    inputs, weight = _largest(work, down)
    scale = smoothing_scales(inputs, [weight[None]], _alpha(work))
    maker, reader = _linear(work, up), _linear(work, down)
    for name in ("weight", "bias"):
        old = cast("Tensor | None", getattr(maker, name))
        if old is not None:
            rows = scale.to(old.device).view(-1, *[1] * (old.dim() - 1))
            _put(maker, name, (old.detach().float() / rows).to(old.dtype), replacements)
    _put(reader, "weight", scaled_weight(reader.weight.detach(), scale), replacements)
    work.divisors[down] = scale


def _fold_values(work: Work, layer: int, replacements: Replacements) -> Tensor:
    """Fold the scale of one layer, and return it, (value heads, head size)."""
    maker_name, reader_name = value_linears(work.lm, layer)
    maker, reader = _linear(work, maker_name), _linear(work, reader_name)
    _, _, size = work.lm.architecture.cache_shape(work.lm.model.config.get_text_config())
    heads = value_heads(work.lm)
    inputs, weight = (one.view(heads, -1, size).amax(1) for one in _largest(work, reader_name))
    scale = smoothing_scales(inputs.flatten(), [weight.flatten()[None]], _alpha(work)).view(heads, size)
    for name in ("weight", "bias"):
        old = cast("Tensor | None", getattr(maker, name))
        if old is not None:
            new = old.detach().float().clone()
            rows = rows_of_values(work.lm, new)
            rows /= scale.to(new.device).view(*rows.shape[:3], 1)
            _put(maker, name, new.to(old.dtype), replacements)
    whole = scale.repeat_interleave(reader.in_features // (heads * size), dim=0).flatten()
    _put(reader, "weight", scaled_weight(reader.weight.detach(), whole), replacements)
    work.divisors[reader_name] = whole
    return scale


SMOOTHING_PAIRS = _SmoothingPairs()
