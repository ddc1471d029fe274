"""Put a quantizer on a model for the length of a `with` block, and take it off again without a trace."""

from __future__ import annotations

from collections.abc import Iterator, Set
from contextlib import ExitStack, contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from cushion.activations import ChannelRanges
from cushion.config import ActivationConfig, QuantizerConfig
from cushion.errors import CalibrationError, ConfigError
from cushion.models import LanguageModel
from cushion.models.architectures import unmet
from cushion.quantization.attention import check_attention, quantized_attention
from cushion.quantization.linear import ActivationQuantizer, QuantizedLinear
from cushion.quantization.numerics import Grid, quantize_weight
from cushion.quantization.replacements import Replacements
from cushion.quantization.rotation import check_rotation, rotated
from cushion.quantization.smoothquant import smoothing_scales


@contextmanager
@torch.no_grad()
def quantized(
    lm: LanguageModel,
    config: QuantizerConfig,
    calibration: ChannelRanges | None = None,
    straight_through: bool = False,
    keep: Set[str] | None = None,
) -> Iterator[LanguageModel]:
    """The model under the quantizer; on leaving, every weight and module is the very object it was before.

    Args:
        config: the quantizer.
        calibration: ranges of the linears' inputs with the prefix in place, of the rotated model where the quantizer
            rotates; needed for static ranges and smoothing.
        straight_through: let gradients pass the rounding of activations and inside attention (for tuning).
        keep: full names of linears whose input stays in full precision; their weights are quantized all the same.
            Needed where `config` uses QFeM, which finds them (`cushion.quantization.qfem`).

    Raises:
        CalibrationError: `calibration` or `keep` is needed and missing, or `calibration` lacks a linear, or `keep`
            names what is no linear of the blocks.
        ConfigError: a target, the group size or the rotation does not fit the model.

    """
    assert not any(isinstance(module, QuantizedLinear) for module in lm.blocks.modules()), "already quantized"
    check_quantizer(lm, config)
    if config.needs_calibration and calibration is None:
        raise CalibrationError(f"quantizer={config.name} needs calibration statistics, and none were given")
    _check_rotation_of(calibration, config, lm)
    _check_keep(lm, config, keep)
    replacements, surroundings = Replacements(), ExitStack()
    try:
        surroundings.enter_context(rotated(lm, config.rotation, config.rotation_seed))
        surroundings.enter_context(quantized_attention(lm, config, straight_through))
        scales = _smooth(lm, config, calibration, replacements) if config.smoothing_alpha is not None else {}
        weight_grid = None if config.weights.bits is None else Grid(config.weights.bits, True, config.levels)
        siblings = _siblings(lm)
        for name, linear in lm.linears(config.targets).items():
            weight = linear.weight.detach()
            if weight_grid is not None:
                weight = quantize_weight(weight, weight_grid, config.weights.granularity, config.weights.group_size)
            activation = _activation_quantizer(
                name, config, calibration, scales.get(name), straight_through, weight.device
            )
            if keep is not None and name in keep:
                activation = None
            if activation is not None:
                activation = activation.shared_with(siblings.get(name, []))
            if weight_grid is None and activation is None:
                continue
            bias = None if linear.bias is None else linear.bias.detach()
            parent, _, leaf = name.rpartition(".")
            replacements.put(lm.model.get_submodule(parent), leaf, QuantizedLinear(weight, bias, activation))
        yield lm
    finally:
        replacements.undo()
        surroundings.close()


def check_quantizer(lm: LanguageModel, config: QuantizerConfig) -> None:
    """Raise `ConfigError` when targets, group size, rotation or smoothing do not fit this model, without computing."""
    check_rotation(lm, config.rotation)
    check_attention(lm, config)
    required = lm.architecture.smoothing_requires if config.smoothing_alpha is not None else ()
    for key, value in unmet(required, lm.model.config):
        raise ConfigError(
            f"quantizer.smoothing_alpha={config.smoothing_alpha} cannot be used with {lm.label}: its configuration "
            f"has {key}={value}, so its norms do not stand before the linears or have no weights; use "
            "quantizer.smoothing_alpha=null"
        )
    if config.smoothing_alpha is not None and not lm.architecture.smoothing:
        raise ConfigError(
            f"quantizer.smoothing_alpha={config.smoothing_alpha} has nothing to smooth in {lm.label}: its architecture "
            "names no norms that stand before linears; use quantizer.smoothing_alpha=null"
        )
    if not config.is_full_precision and not lm.linears(config.targets):
        raise ConfigError(f"quantizer={config.name} finds no linear layer in the decoder blocks of {lm.label}")
    size = config.weights.group_size
    in_groups = config.weights.bits is not None and config.weights.granularity == "per_group"
    for name, linear in lm.linears(config.targets).items():
        if in_groups and linear.in_features % size:
            raise ConfigError(
                f"quantizer.weights.group_size={size} does not divide the {linear.in_features} inputs of {name}: "
                "choose a divisor"
            )


def _ranges(name: str, calibration: ChannelRanges | None, device: torch.device) -> tuple[Tensor, Tensor]:
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
    ranges = [_ranges(name, calibration, device) for name in seen or readers]
    return torch.stack([torch.maximum(-low, high) for low, high in ranges]).amax(0)


def _smooth(
    lm: LanguageModel, config: QuantizerConfig, calibration: ChannelRanges | None, replacements: Replacements
) -> dict[str, Tensor]:
    """Fold SmoothQuant's scales into norms and all that read them; the scale of each smoothed linear's input by name.

    A reader that stays in full precision, such as a router, is scaled with the others and has no say in the scale.
    """
    assert config.smoothing_alpha is not None
    scales: dict[str, Tensor] = {}
    for index in range(len(lm.blocks)):
        for norm_name, readers in lm.norm_readers(index):
            linears = {name: cast(nn.Linear, reader) for name, reader in readers.items() if lm.is_quantized(name)}
            weights = [linear.weight.detach() for linear in linears.values()]
            scale = smoothing_scales(_shared_abs_max(linears, calibration), weights, config.smoothing_alpha)
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


def _activation_quantizer(
    name: str,
    config: QuantizerConfig,
    calibration: ChannelRanges | None,
    smoothing: Tensor | None,
    straight_through: bool,
    device: torch.device,
) -> ActivationQuantizer | None:
    activations: ActivationConfig = config.activations
    if activations.bits is None:
        return None
    grid = Grid(activations.bits, activations.symmetric, config.levels, config.zero_point)
    if activations.range == "dynamic":
        return ActivationQuantizer(grid, activations.granularity, None, straight_through)
    low, high = _ranges(name, calibration, device)
    if smoothing is not None:  # dividing by positive constants commutes with taking the extremes of a channel
        low, high = low / smoothing.to(device), high / smoothing.to(device)
    return ActivationQuantizer(grid, activations.granularity, (low.amin(), high.amax()), straight_through)


def _siblings(lm: LanguageModel) -> dict[str, list[ActivationQuantizer]]:
    """For each linear that reads a norm, a list, still empty, that it has in common with all that read this norm.

    It is for the quantizers of their inputs. Whether two of them get the very same tensor shows when they run: each
    expert gets its own.
    """
    groups: dict[str, list[ActivationQuantizer]] = {}
    for index in range(len(lm.blocks)):
        for _, readers in lm.norm_readers(index):
            quantizers: list[ActivationQuantizer] = []
            groups |= dict.fromkeys(readers, quantizers)
    return groups


def _check_rotation_of(calibration: ChannelRanges | None, config: QuantizerConfig, lm: LanguageModel) -> None:
    turned = lm.rotation if config.rotation == "none" else (config.rotation, config.rotation_seed)
    if config.needs_calibration and calibration is not None and calibration.rotation != turned:
        raise CalibrationError(
            f"the calibration statistics are those of a model with rotation {calibration.rotation}, and "
            f"quantizer={config.name} needs them with {turned}: calibrate inside cushion.quantization.rotation.rotated"
        )


def _check_keep(lm: LanguageModel, config: QuantizerConfig, keep: Set[str] | None) -> None:
    if config.uses_qfem and keep is None:
        raise CalibrationError(
            f"quantizer={config.name} uses QFeM, and the linears that it keeps in full precision were not given: "
            "measure their ratios behind the prefix first (cushion.quantization.qfem)"
        )
    unknown = sorted((keep or frozenset()) - lm.linears().keys())
    if unknown:
        raise CalibrationError(
            f"{unknown[0]} is to be kept in full precision, but {lm.label} has no such linear in its decoder blocks: "
            "measure the ratios of this model again"
        )
