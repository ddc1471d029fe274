"""Put a quantizer on a model for the length of a `with` block, and take it off again without a trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from cushion.activations import ChannelRanges
from cushion.config import ActivationConfig, QuantizerConfig
from cushion.errors import CalibrationError, ConfigError
from cushion.models import LanguageModel
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
) -> Iterator[LanguageModel]:
    """The model under the quantizer; on leaving, every weight and module is the very object it was before.

    Args:
        config: the quantizer.
        calibration: ranges of the linears' inputs with the prefix in place, of the rotated model where the quantizer
            rotates; needed for static ranges and smoothing.
        straight_through: let gradients pass the rounding of activations and inside attention (for tuning).

    Raises:
        CalibrationError: `calibration` is needed and missing, or lacks a linear.
        ConfigError: a target, the group size or the rotation does not fit the model.

    """
    assert not any(isinstance(module, QuantizedLinear) for module in lm.blocks.modules()), "already quantized"
    check_quantizer(lm, config)
    if config.needs_calibration and calibration is None:
        raise CalibrationError(f"quantizer={config.name} needs calibration statistics, and none were given")
    replacements, surroundings = Replacements(), ExitStack()
    try:
        surroundings.enter_context(rotated(lm, config.rotation, config.rotation_seed))
        surroundings.enter_context(quantized_attention(lm, config, straight_through))
        scales = _smooth(lm, config, calibration, replacements) if config.smoothing_alpha is not None else {}
        weight_grid = None if config.weights.bits is None else Grid(config.weights.bits, True, config.levels)
        for name, linear in lm.linears(config.targets).items():
            weight = linear.weight.detach()
            if weight_grid is not None:
                weight = quantize_weight(weight, weight_grid, config.weights.granularity, config.weights.group_size)
            activation = _activation_quantizer(name, config, calibration, scales.get(name), straight_through)
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
    for key, needed in lm.architecture.smoothing_requires if config.smoothing_alpha is not None else ():
        if getattr(lm.model.config, key) != needed:
            raise ConfigError(
                f"quantizer.smoothing_alpha={config.smoothing_alpha} cannot be used with {lm.label}: its configuration "
                f"has {key}={getattr(lm.model.config, key)}, so its norms do not stand before the linears; use "
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


def _ranges(name: str, calibration: ChannelRanges | None) -> tuple[Tensor, Tensor]:
    if calibration is None or name not in calibration.minimum:
        raise CalibrationError(f"the calibration statistics have no entry for {name}: calibrate this model again")
    return calibration.minimum[name], calibration.maximum[name]


def _smooth(
    lm: LanguageModel, config: QuantizerConfig, calibration: ChannelRanges | None, replacements: Replacements
) -> dict[str, Tensor]:
    """Fold SmoothQuant's scales into norms and linears; the scale of each smoothed linear's input by name."""
    assert config.smoothing_alpha is not None
    scales: dict[str, Tensor] = {}
    for index, block in enumerate(lm.blocks):
        for norm_name, linear_names in lm.architecture.smoothing:
            norm = block.get_submodule(norm_name)
            linears = {}
            for name in linear_names:
                linears[f"{lm.architecture.blocks}.{index}.{name}"] = cast(nn.Linear, block.get_submodule(name))
            low, high = _ranges(next(iter(linears)), calibration)
            weights = [linear.weight.detach() for linear in linears.values()]
            scale = smoothing_scales(torch.maximum(-low, high), weights, config.smoothing_alpha)
            for parameter in ("weight", "bias"):
                old = getattr(norm, parameter, None)
                if old is not None:
                    new = (old.float() / scale.to(old.device)).to(old.dtype)
                    replacements.put(norm, parameter, nn.Parameter(new, requires_grad=False))
            for name, linear in linears.items():
                new = (linear.weight.float() * scale.to(linear.weight.device)).to(linear.weight.dtype)
                replacements.put(linear, "weight", nn.Parameter(new, requires_grad=False))
                scales[name] = scale
    return scales


def _activation_quantizer(
    name: str,
    config: QuantizerConfig,
    calibration: ChannelRanges | None,
    smoothing: Tensor | None,
    straight_through: bool,
) -> ActivationQuantizer | None:
    activations: ActivationConfig = config.activations
    if activations.bits is None:
        return None
    grid = Grid(activations.bits, activations.symmetric, config.levels, config.zero_point)
    if activations.range == "dynamic":
        return ActivationQuantizer(grid, activations.granularity, None, straight_through)
    low, high = _ranges(name, calibration)
    if smoothing is not None:  # dividing by positive constants commutes with taking the extremes of a channel
        low, high = low / smoothing.to(low.device), high / smoothing.to(high.device)
    return ActivationQuantizer(grid, activations.granularity, (low.amin(), high.amax()), straight_through)
