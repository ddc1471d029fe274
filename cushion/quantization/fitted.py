"""A quantizer with all that was measured for it behind one prefix; it goes on a model and comes off without a trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from cushion.activations import ChannelRanges
from cushion.errors import CalibrationError
from cushion.execution.registry import load_execution
from cushion.models import LanguageModel
from cushion.quantization.attention import quantized_attention
from cushion.quantization.calibration import Calibration
from cushion.quantization.check import check_quantizer
from cushion.quantization.linear import ActivationQuantizer, QuantizedLinear
from cushion.quantization.numerics import Grid, QuantizedWeight, quantize_weight
from cushion.quantization.quantizer import QuantizerConfig
from cushion.quantization.replacements import Replacements
from cushion.quantization.rotation import rotated
from cushion.quantization.smoothing import ranges_of, smooth


@dataclass(frozen=True)
class FittedQuantizer:
    """A quantizer and what it needs to be put on a model.

    Args:
        config: the quantizer.
        ranges: ranges of the linears' inputs with the prefix in place, of the rotated model where the quantizer
            rotates; needed for static ranges and smoothing.
        keep: full names of linears whose input stays in full precision; their weights are quantized all the same.
            Needed where `config` uses QFeM, which finds them (`cushion.quantization.qfem`).

    """

    config: QuantizerConfig
    ranges: ChannelRanges | None = None
    keep: frozenset[str] | None = None

    @classmethod
    def of(
        cls, config: QuantizerConfig, calibration: Calibration | None, keep: frozenset[str] | None = None
    ) -> FittedQuantizer:
        """A quantizer with the ranges of a calibration, or with none."""
        return cls(config, None if calibration is None else calibration.ranges, keep)

    @contextmanager
    @torch.no_grad()
    def on(
        self, lm: LanguageModel, straight_through: bool = False, execution: str = "simulated"
    ) -> Iterator[LanguageModel]:
        """The model under this quantizer; on leaving, every weight and module is the very object it was before.

        Args:
            straight_through: let gradients pass the rounding of activations and inside attention (for tuning).
            execution: how quantized linears are computed, a name of `EXECUTIONS`.

        Raises:
            CalibrationError: `ranges` or `keep` is needed and missing, or `ranges` lacks a linear, or `keep` names
                what is not a linear of the blocks.
            ConfigError: a target, the group size or the rotation does not fit the model.

        """
        assert not any(isinstance(module, QuantizedLinear) for module in lm.blocks.modules()), "already quantized"
        config, build = self.config, load_execution(execution)
        check_quantizer(lm, config)
        self._check_ranges(lm)
        self._check_keep(lm)
        replacements, surroundings = Replacements(), ExitStack()
        try:
            surroundings.enter_context(rotated(lm, config.rotation, config.rotation_seed))
            surroundings.enter_context(quantized_attention(lm, config, straight_through))
            alpha = config.smoothing_alpha
            scales = {} if alpha is None else smooth(lm, alpha, self.ranges, replacements)
            weight_grid = None if config.weights.bits is None else Grid(config.weights.bits, True, config.levels)
            siblings = _siblings(lm)
            for name, linear in lm.linears(config.targets).items():
                plain = linear.weight.detach()
                weight: Tensor | QuantizedWeight = plain
                if weight_grid is not None:
                    weight = quantize_weight(plain, weight_grid, config.weights.granularity, config.weights.group_size)
                activation = self._activation(name, scales.get(name), straight_through, plain.device)
                if activation is not None:
                    activation = activation.shared_with(siblings.get(name, []))
                if weight_grid is None and activation is None:
                    continue
                bias = None if linear.bias is None else linear.bias.detach()
                parent, _, leaf = name.rpartition(".")
                replacements.put(lm.model.get_submodule(parent), leaf, build.linear(weight, bias, activation))
            yield lm
        finally:
            replacements.undo()
            surroundings.close()

    def _activation(
        self, name: str, smoothing: Tensor | None, straight_through: bool, device: torch.device
    ) -> ActivationQuantizer | None:
        """The quantizer of the input of the linear `name`, None where it stays in full precision."""
        config, activations = self.config, self.config.activations
        if activations.bits is None:
            return None
        grid = Grid(activations.bits, activations.symmetric, config.levels, config.zero_point)
        static_range = None
        if activations.range == "static":
            low, high = ranges_of(name, self.ranges, device)
            if smoothing is not None:  # dividing by positive constants commutes with taking the extremes of a channel
                low, high = low / smoothing.to(device), high / smoothing.to(device)
            static_range = low.amin(), high.amax()
        if self.keep is not None and name in self.keep:
            return None
        return ActivationQuantizer(grid, activations.granularity, static_range, straight_through)

    def _check_ranges(self, lm: LanguageModel) -> None:
        config = self.config
        if not config.needs_calibration:
            return
        if self.ranges is None:
            raise CalibrationError(f"quantizer={config.name} needs calibration statistics, and none were given")
        turned = lm.rotation if config.rotation == "none" else (config.rotation, config.rotation_seed)
        if self.ranges.rotation != turned:
            raise CalibrationError(
                f"the calibration statistics are those of a model with rotation {self.ranges.rotation}, and "
                f"quantizer={config.name} needs them with {turned}: calibrate inside "
                "cushion.quantization.rotation.rotated"
            )

    def _check_keep(self, lm: LanguageModel) -> None:
        if self.config.uses_qfem and self.keep is None:
            raise CalibrationError(
                f"quantizer={self.config.name} uses QFeM, and the linears that it keeps in full precision were not "
                "given: measure their ratios behind the prefix first (cushion.quantization.qfem)"
            )
        unknown = sorted((self.keep or frozenset()) - lm.linears().keys())
        if unknown:
            raise CalibrationError(
                f"{unknown[0]} is to be kept in full precision, but {lm.label} has no such linear in its decoder "
                "blocks: measure the ratios of this model again"
            )


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
