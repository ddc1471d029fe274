"""Smoothing on a model: scales folded into norms and the linears that read them, those of SmoothQuant or others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from cushion.errors import ConfigError
from cushion.models import LanguageModel
from cushion.models.architectures import unmet
from cushion.quantization.effect import Effect, Work
from cushion.quantization.quantizer import QuantizerConfig
from cushion.quantization.replacements import Replacements
from cushion.quantization.smoothquant import smoothing_scales


class _Smoothing(Effect):
    def check(self, lm: LanguageModel, config: QuantizerConfig) -> None:
        """The norms stand before the linears, and have weights."""
        check_smoothable(lm, f"quantizer.smoothing_alpha={config.smoothing_alpha}", "quantizer.smoothing_alpha=null")

    @contextmanager
    def around(self, work: Work) -> Iterator[None]:
        """Scales folded into norms and all that read them; a linear's is told in `divisors`.

        A reader that stays in full precision, such as a router, is scaled with the others and has no say in the scale.
        """
        alpha = work.config.smoothing_alpha
        assert alpha is not None
        replacements = Replacements()
        try:
            self._fold(work, alpha, replacements)
            yield
        finally:
            replacements.undo()

    def _fold(self, work: Work, alpha: float, replacements: Replacements) -> None:
        lm = work.lm
        for index in range(len(lm.blocks)):
            for norm_name, readers in lm.norm_readers(index):
                linears = {name: cast(nn.Linear, reader) for name, reader in readers.items() if lm.is_quantized(name)}
                weights = [linear.weight.detach() for linear in linears.values()]
                scale = smoothing_scales(_shared_abs_max(linears, work), weights, alpha)
                fold_scale(work, norm_name, readers, scale, replacements)


SMOOTHING = _Smoothing()


def check_smoothable(lm: LanguageModel, key: str, way_out: str) -> None:
    """Raise `ConfigError` where a model has no norms, with weights, that stand before linears."""
    for name, value in unmet(lm.architecture.smoothing_requires, lm.model.config):
        raise ConfigError(
            f"{key} cannot be used with {lm.label}: its configuration has {name}={value}, so its norms do not "
            f"stand before the linears or have no weights; use {way_out}"
        )
    if not lm.architecture.smoothing:
        raise ConfigError(
            f"{key} has nothing to smooth in {lm.label}: its architecture names no norms that stand before "
            f"linears; use {way_out}"
        )


def fold_scale(
    work: Work, norm: str, readers: Mapping[str, nn.Module], scale: Tensor, replacements: Replacements
) -> None:
    """Divide the output of a norm by `scale`, (channels,), and multiply the columns of all that read it with it.

    Args:
        work: its `divisors` are told of every linear.
        norm: its full name.
        readers: by full name; a router among them follows the others.
        scale: positive, float32.
        replacements: where the new weights are put.

    """
    lm = work.lm
    _divide_norm(lm.model.get_submodule(norm), scale, lm.architecture.norm_offset, replacements)
    for name, reader in readers.items():
        new = scaled_weight(cast(Tensor, reader.weight), scale)
        replacements.put(reader, "weight", nn.Parameter(new, requires_grad=False))
        if lm.is_quantized(name):
            work.divisors[name] = scale


def fold_shift(
    work: Work, norm: str, readers: Mapping[str, nn.Module], shift: Tensor, replacements: Replacements, hooks: ExitStack
) -> None:
    """Take `shift`, (channels,), from the output of a norm, and give what is lost to the bias of all that read it.

    A linear's bias becomes `b + W z`, and one without gets it. The norm's bias becomes `b - z`; from the output of a
    norm without one z is taken while the model runs.

    Args:
        work: its `shifts` are told of every linear.
        norm: its full name.
        readers: by full name, all of them linears.
        shift: z, float32.
        replacements: where the new biases are put.
        hooks: closes what is done while the model runs.

    """
    module = work.lm.model.get_submodule(norm)
    old = getattr(module, "bias", None)
    if old is not None:
        new = (old.float() - shift.to(old.device)).to(old.dtype)
        replacements.put(module, "bias", nn.Parameter(new, requires_grad=False))
    else:
        hooks.callback(module.register_forward_hook(partial(_minus, shift)).remove)
    for name, reader in readers.items():
        linear = cast(nn.Linear, reader)
        added = linear.weight.float() @ shift.to(linear.weight.device)
        new = added if linear.bias is None else linear.bias.float() + added
        replacements.put(linear, "bias", nn.Parameter(new.to(linear.weight.dtype), requires_grad=False))
        work.shifts[name] = shift


def _minus(shift: Tensor, _module: nn.Module, _args: Any, output: Tensor) -> Tensor:
    return output - shift.to(output)


def scaled_weight(weight: Tensor, scale: Tensor) -> Tensor:
    """`W diag(s)`, a new tensor of the shape, (out_features, channels), and dtype of `weight`."""
    return (weight.float() * scale.to(weight.device)).to(weight.dtype)


def _shared_abs_max(readers: dict[str, nn.Linear], work: Work) -> Tensor:
    """max|X_j| of the input that several linears share; experts see parts of it, and some of them perhaps nothing."""
    seen = [name for name in readers if work.ranges is not None and name in work.ranges.minimum]
    device = next(iter(readers.values())).weight.device
    ranges = [work.ranges_of(name, device) for name in seen or readers]
    return torch.stack([torch.maximum(-low, high) for low, high in ranges]).amax(0)


def _divide_norm(norm: nn.Module, scale: Tensor, offset: float, replacements: Replacements) -> None:
    """Divide a norm's output by `scale`.

    The norm multiplies with `offset + weight`. With an offset the new weight is kept in float32: close to -1, half
    precision would leave next to nothing of `1 + weight`.
    """
    for parameter, added in (("weight", offset), ("bias", 0.0)):
        old = getattr(norm, parameter, None)
        if old is not None:
            new = (old.float() + added) / scale.to(old.device) - added
            replacements.put(norm, parameter, nn.Parameter(new if added else new.to(old.dtype), requires_grad=False))
