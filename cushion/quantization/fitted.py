"""A quantizer with all that was measured for it behind one prefix; it goes on a model and comes off without a trace."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cushion.activations import ChannelRanges
from cushion.errors import CalibrationError
from cushion.execution.registry import SIMULATED, load_execution
from cushion.models import LanguageModel
from cushion.quantization.calibration import Calibration
from cushion.quantization.check import acting_parts, check_quantizer
from cushion.quantization.effect import Site, Work
from cushion.quantization.learned import LearnableQuantizer, Learned
from cushion.quantization.linear import ActivationQuantizer, QuantizedLinear
from cushion.quantization.parts.base import Needed
from cushion.quantization.parts.registry import PARTS
from cushion.quantization.quantizer import QuantizerConfig
from cushion.quantization.replacements import Replacements
from cushion.quantization.statistics.gathered import ByLinear

if TYPE_CHECKING:
    from cushion.execution.base import Execution


@dataclass(frozen=True)
class FittedQuantizer:
    """A quantizer and what it needs to be put on a model.

    Args:
        config: the quantizer.
        ranges: ranges of the linears' inputs with the prefix in place, of the rotated model where the quantizer
            rotates; needed for static ranges and smoothing.
        keep: full names of linears whose input stays in full precision; their weights are quantized all the same.
            Needed where `config` uses QFeM, which finds them (`cushion.quantization.qfem`).
        inputs: what else the parts of the quantizer need to know of the linears' inputs, by what was needed
            (`cushion.quantization.input_statistics`).
        learned: ranges and weights that were learned for it, which take the place of estimated ranges and of the
            model's weights.
        fits: what was found block by block, by part and linear, where a part asks for it
            (`cushion.quantization.fitting`).

    """

    config: QuantizerConfig
    ranges: ChannelRanges | None = None
    keep: frozenset[str] | None = None
    inputs: Mapping[Needed, Any] = field(default_factory=dict)
    learned: Learned | None = None
    fits: Mapping[str, dict[str, Tensor]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        config: QuantizerConfig,
        calibration: Calibration | None,
        keep: frozenset[str] | None = None,
        learned: Learned | None = None,
    ) -> FittedQuantizer:
        """A quantizer with what a calibration found, or with nothing."""
        if calibration is None:
            return cls(config, None, keep, learned=learned)
        return cls(config, calibration.ranges, keep, calibration.inputs, learned, calibration.fits)

    @contextmanager
    @torch.no_grad()
    def on(
        self,
        lm: LanguageModel,
        straight_through: bool = False,
        execution: str = SIMULATED,
        learnable: dict[str, LearnableQuantizer] | None = None,
        replacements: Replacements | None = None,
    ) -> Iterator[LanguageModel]:
        """The model under this quantizer; on leaving, every weight and module is the very object it was before.

        Args:
            straight_through: let gradients pass the rounding of activations and inside attention (for tuning).
            execution: how quantized linears are computed, a name of `EXECUTIONS`.
            learnable: filled with the quantizers of the inputs, by linear, whose static ranges then learn; linears that
                read the output of the same norm and have the same range have one in common. None: nothing learns.
            replacements: filled with what stands for the linears; `suspended` gives the full-precision linears back for
                a while, behind rotation and smoothing.

        Raises:
            CalibrationError: something that a part needs was not measured, or lacks a linear, or `keep` or `learned`
                names what is not a linear of the blocks, or does not fit it.
            ConfigError: a target, the group size or the rotation does not fit the model.

        """
        build = load_execution(execution)
        with (
            self.surroundings(lm, straight_through) as work,
            rounded(work, build, learnable=learnable, replacements=replacements),
        ):
            yield lm

    @contextmanager
    @torch.no_grad()
    def surroundings(self, lm: LanguageModel, straight_through: bool = False) -> Iterator[Work]:
        """The model with what keeps its function, rotation and smoothing; nothing is rounded yet.

        Arguments and errors as those of `on`.

        Yields:
            What `rounded` needs to go on.

        """
        assert not any(isinstance(module, QuantizedLinear) for module in lm.blocks.modules()), "already quantized"
        config = self.config
        check_quantizer(lm, config)
        self._check_ranges(lm)
        self._check_keep(lm)
        learned = self.learned or Learned()
        self._check_learned(lm, learned)
        work = Work(lm, config, self.ranges, self.inputs, self.keep, straight_through, learned, fits=self.fits)
        acting = acting_parts(config)
        for effect in acting.values():
            effect.ready(work)
        with ExitStack() as stack:
            for part, effect in acting.items():
                if part.keeps_function:
                    stack.enter_context(effect.around(work))
            yield work

    def _check_ranges(self, lm: LanguageModel) -> None:
        config = self.config
        missing = PARTS["qfem"].off(config).gathered - self.inputs.keys()
        if missing:
            raise CalibrationError(
                f"quantizer={config.name} needs statistics of the linears' inputs ({min(missing).place}), and they "
                "were not given: gather them behind the prefix first (cushion.quantization.input_statistics)"
            )
        for part in config.blockwise:
            if part.name not in self.fits:
                raise CalibrationError(
                    f"quantizer={config.name} has {part.key}, which was not fitted: fit it block by "
                    "block behind the prefix first (cushion.quantization.fitting)"
                )
        turned = rotation_under(lm, config)
        for needed, found in self.inputs.items():
            if isinstance(found, ByLinear) and found.rotation != turned:
                raise CalibrationError(
                    f"the statistics of the linears' inputs ({needed.place}) are those of a model with rotation "
                    f"{found.rotation}, and quantizer={config.name} needs them with {turned}: gather them under this "
                    "quantizer (cushion.quantization.input_statistics.observe_fitted)"
                )
        if not config.needs_calibration:
            return
        if self.ranges is None:
            raise CalibrationError(f"quantizer={config.name} needs calibration statistics, and none were given")
        if self.ranges.rotation != turned:
            raise CalibrationError(
                f"the calibration statistics are those of a model with rotation {self.ranges.rotation}, and "
                f"quantizer={config.name} needs them with {turned}: calibrate inside "
                "cushion.quantization.rotation.rotated"
            )

    def _check_keep(self, lm: LanguageModel) -> None:
        unknown = sorted((self.keep or frozenset()) - lm.linears().keys())
        if unknown:
            raise CalibrationError(
                f"{unknown[0]} is to be kept in full precision, but {lm.label} has no such linear in its decoder "
                "blocks: measure the ratios of this model again"
            )

    def _check_learned(self, lm: LanguageModel, learned: Learned) -> None:
        linears = lm.linears(self.config.targets)
        unknown = sorted(learned.names - linears.keys())
        if unknown:
            raise CalibrationError(
                f"something was learned for {unknown[0]}, which is not a linear that quantizer={self.config.name} "
                f"quantizes in {lm.label}: learn it again with this model and these quantizer.targets"
            )
        if learned.ranges and self.config.activations.range != "static":
            raise CalibrationError(
                f"quantizer={self.config.name} has ranges that were learned, and quantizer.activations.range="
                f"{self.config.activations.range} has no use for them: set it to static"
            )
        if learned.ranges and self.config.activations.by_channel:
            raise CalibrationError(
                f"quantizer={self.config.name} has ranges that were learned, one for each input, and quantizer."
                f"activations.granularity={self.config.activations.granularity} has several: set it to per_tensor"
            )
        for name, weight in learned.weights.items():
            if weight.shape != linears[name].weight.shape:
                shapes = f"{tuple(weight.shape)}, and that of the model {tuple(linears[name].weight.shape)}"
                raise CalibrationError(f"the learned weight of {name} has shape {shapes}: it is of another model")
        for name, divisor in learned.divisors.items():
            if divisor.shape != linears[name].weight.shape[1:]:
                raise CalibrationError(
                    f"the learned divisor of {name} has shape {tuple(divisor.shape)}, and the linear "
                    f"{linears[name].in_features} inputs: it is of another model"
                )


def rotation_under(lm: LanguageModel, config: QuantizerConfig) -> tuple[str, int]:
    """The rotation of the residual stream, and its seed, with a quantizer on the model."""
    return lm.rotation if config.rotation == "none" else (config.rotation, config.rotation_seed)


@contextmanager
@torch.no_grad()
def rounded(
    work: Work,
    build: Execution,
    block: int | None = None,
    learnable: dict[str, LearnableQuantizer] | None = None,
    replacements: Replacements | None = None,
) -> Iterator[dict[str, nn.Module]]:
    """What a quantizer does beyond its surroundings, on the linears of one block, or of all of them.

    Args:
        work: the quantizer, its surroundings on the model.
        build: how quantized linears are computed.
        block: number of the only block whose linears are quantized; None for all blocks.
        learnable, replacements: as for `FittedQuantizer.on`.

    Yields:
        By full name, what stands for each linear.

    """
    own = Replacements() if replacements is None else replacements
    work = replace(work, replacements=own, learns=learnable is not None)
    placed: dict[str, nn.Module] = {}
    acting, siblings = acting_parts(work.config), _siblings(work.lm)
    with ExitStack() as stack:
        for part, effect in acting.items():
            if not part.keeps_function:
                stack.enter_context(effect.around(work))
        stack.callback(work.replacements.undo)
        for site in sites(work, block):
            name, bias = site.name, site.bias
            weight = None if name in work.learned.names else site.weight
            for effect in acting.values():
                effect.at(work, site)
            if site.activation is None and site.weight is weight and site.bias is bias:
                continue
            shared = None if site.activation is None else site.activation.shared_with(siblings.get(name, []))
            if learnable is not None and isinstance(shared, LearnableQuantizer):
                learnable[name] = shared
            parent, _, leaf = name.rpartition(".")
            placed[name] = build.linear(site.weight, site.bias, shared)
            if name in work.input_hooks:
                placed[name].register_forward_pre_hook(work.input_hooks[name], with_kwargs=True)
            if site.divisor is not None:
                placed[name].register_forward_pre_hook(partial(_divided, divisor=site.divisor))
            work.replacements.put(work.lm.model.get_submodule(parent), leaf, placed[name])
        yield placed


def sites(work: Work, block: int | None = None) -> Iterator[Site]:
    """The targeted linears of one block, or of all of them, with their weights: their own, or learned."""
    within = f"{work.lm.architecture.blocks}." + ("" if block is None else f"{block}.")
    linears = work.lm.linears(work.config.targets)
    together = _fused(work.lm, linears, range(len(work.lm.blocks)) if block is None else [block])
    for name, linear in linears.items():
        if name.startswith(within):
            bias, divisor = None if linear.bias is None else linear.bias.detach(), work.learned.divisors.get(name)
            if divisor is not None:
                divisor = divisor.to(linear.weight.device)
            fused = {other: partial(work.weight_of, other, one) for other, one in together.get(name, {}).items()}
            yield Site(name, linear, work.weight_of(name, linear), bias, divisor=divisor, fused=fused)


def _fused(
    lm: LanguageModel, linears: Mapping[str, nn.Linear], blocks: Iterable[int]
) -> dict[str, dict[str, nn.Linear]]:
    """For each of some linears in some blocks, those of them that read the same norm and lie in the same module.

    A linear that reads no norm, as all do in families whose norms stand behind the linears, is not in it.
    """
    found: dict[str, dict[str, nn.Linear]] = {}
    for index in blocks:
        for _, readers in lm.norm_readers(index):
            modules: dict[str, dict[str, nn.Linear]] = {}
            for name in linears.keys() & readers.keys():
                found[name] = modules.setdefault(name.rpartition(".")[0], {})
                found[name][name] = linears[name]
    return found


def _divided(_module: nn.Module, inputs: tuple[Tensor], divisor: Tensor) -> Tensor:
    """What a linear reads where its input is divided: a hook before its forward pass."""
    (values,) = inputs
    return (values / divisor).to(values.dtype)


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
