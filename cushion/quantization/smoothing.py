"""SmoothQuant on a model: its scales folded into norms and the linears that read them."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from cushion.activations import ChannelRanges
from cushion.errors import CalibrationError
from cushion.models import LanguageModel
from cushion.quantization.replacements import Replacements
from cushion.quantization.smoothquant import smoothing_scales


def ranges_of(name: str, calibration: ChannelRanges | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of every channel of the input of the linear `name`.

    Raises:
        CalibrationError: there are none for it.

    """
    if calibration is None or name not in calibration.minimum:
        raise CalibrationError(
            f"the calibration statistics have no entry for {name}: calibrate this model again, with more text "
            "(quantizer.calibration.samples) if it belongs to an expert that no token was routed to"
        )
    return calibration.minimum[name].to(device), calibration.maximum[name].to(device)


def _shared_abs_max(readers: dict[str, nn.Linear], calibration: ChannelRanges | None) -> Tensor:
    """max|X_j| of the input that several linears share; experts see parts of it, and some of them perhaps nothing."""
    seen = [name for name in readers if calibration is not None and name in calibration.minimum]
    device = next(iter(readers.values())).weight.device
    ranges = [ranges_of(name, calibration, device) for name in seen or readers]
    return torch.stack([torch.maximum(-low, high) for low, high in ranges]).amax(0)


def smooth(
    lm: LanguageModel, alpha: float, calibration: ChannelRanges | None, replacements: Replacements
) -> dict[str, Tensor]:
    """Fold SmoothQuant's scales into norms and all that read them; the scale of each smoothed linear's input by name.

    A reader that stays in full precision, such as a router, is scaled with the others and has no say in the scale.
    """
    scales: dict[str, Tensor] = {}
    for index in range(len(lm.blocks)):
        for norm_name, readers in lm.norm_readers(index):
            linears = {name: cast(nn.Linear, reader) for name, reader in readers.items() if lm.is_quantized(name)}
            weights = [linear.weight.detach() for linear in linears.values()]
            scale = smoothing_scales(_shared_abs_max(linears, calibration), weights, alpha)
            _divide_norm(lm.model.get_submodule(norm_name), scale, lm.architecture.norm_offset, replacements)
            for name, reader in readers.items():
                weight = cast(Tensor, reader.weight)
                new = (weight.float() * scale.to(weight.device)).to(weight.dtype)
                replacements.put(reader, "weight", nn.Parameter(new, requires_grad=False))
                if name in linears:
                    scales[name] = scale
    return scales


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
