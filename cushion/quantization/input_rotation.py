"""Rotation of the inputs of linears while the model runs: QuaRot's online Hadamard transform.

## R4: inputs rotated while the model runs

Nothing linear stands before the input of the down projection, so it is rotated while the model runs, where
`quantizer.input_rotation` says so (QuaRot, section 4, its online transform): x W^T = (x H)(W H)^T, in float32, with H
of the same construction and seed 0. `all` does that at every linear. It comes after smoothing and before rounding.
Min-max ranges are then minimum and maximum of what the linear reads, since the ranges of single channels do not say
what their mixtures reach.

In real kernels this is a fast Hadamard transform of `n log n` additions; here it is a product in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cushion.errors import ConfigError
from cushion.models import LanguageModel
from cushion.quantization.effect import Effect, Work
from cushion.quantization.hadamard import randomized_hadamard
from cushion.quantization.parts.rotation_sites import input_site, left_alone
from cushion.quantization.quantizer import QuantizerConfig
from cushion.quantization.replacements import Replacements
from cushion.quantization.rotation import Rotation, times

Hook = Callable[..., Any]


class _InputRotation(Effect):
    def check(self, lm: LanguageModel, config: QuantizerConfig) -> None:
        """The linears that it names are named by the architecture, and are among the targets."""
        if config.input_rotation == "down_and_heads" and not output_projections(lm):
            raise ConfigError(
                f"quantizer.input_rotation=down_and_heads cannot be used with {lm.label}: the architecture "
                f"{lm.architecture.model_type!r} does not name where its values are read; use "
                "quantizer.input_rotation=down"
            )
        if not rotated_linears(lm, config):
            raise ConfigError(
                f"quantizer.input_rotation={config.input_rotation} finds no linear in {lm.label}: its architecture "
                "names no down projection, or quantizer.targets leaves it out; use quantizer.input_rotation=none or all"
            )

    @contextmanager
    def around(self, work: Work) -> Iterator[None]:
        """Weights multiplied by H, and inputs by a hook before each linear."""
        replacements, handles = Replacements(), []
        rotations: dict[tuple[int, int, torch.device], tuple[Tensor, Hook]] = {}
        try:
            alone = left_alone(work.config, work.inputs)
            for name, linear in rotated_linears(work.lm, work.config).items():
                if input_site(name) in alone:
                    continue
                weight = linear.weight.detach()
                size = head_size(work.lm, work.config, name)
                place = linear.in_features, size, weight.device
                if place not in rotations:
                    matrix = rotation_of(linear.in_features, size)
                    rotations[place] = matrix, _before(Rotation(matrix, weight.device))
                matrix, work.input_hooks[name] = rotations[place]
                turned = nn.Parameter(times(weight, matrix).to(weight.dtype), requires_grad=False)
                replacements.put(linear, "weight", turned)
                handles.append(linear.register_forward_pre_hook(work.input_hooks[name], with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()
            replacements.undo()


def rotated_linears(lm: LanguageModel, config: QuantizerConfig) -> dict[str, nn.Linear]:
    """The targeted linears whose inputs are rotated, by full name."""
    linears = lm.linears(config.targets)
    if config.input_rotation == "all":
        return linears
    named = {name for names in lm.down_projections().values() for name in names}
    if config.input_rotation == "down_and_heads":
        named |= output_projections(lm)
    return {name: linear for name, linear in linears.items() if name in named}


def output_projections(lm: LanguageModel) -> set[str]:
    """The full names of the linears that read what attention makes of the values; none where they are not named."""
    values = lm.architecture.values
    blocks = range(len(lm.blocks)) if values is not None else ()
    return {f"{lm.architecture.blocks}.{index}.{values.reader}" for index in blocks if values is not None}


def head_size(lm: LanguageModel, config: QuantizerConfig, name: str) -> int:
    """The size of the heads that are mixed at the input of a linear, 1 where single channels are."""
    if config.input_rotation != "down_and_heads" or name not in output_projections(lm):
        return 1
    _, _, size = lm.architecture.cache_shape(lm.model.config.get_text_config())
    return size


def rotation_of(inputs: int, size: int) -> Tensor:
    """`H x I`, (inputs, inputs), float64: H of the order of inputs / size, I of that of `size`."""
    return torch.kron(randomized_hadamard(inputs // size), torch.eye(size, dtype=torch.float64))


def _before(rotation: Rotation) -> Hook:
    """The hook that lets a linear read what the rotation makes of its input."""

    def rotate(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        (values,) = args  # a linear has one input
        return (rotation(values),), kwargs

    return rotate


INPUT_ROTATION = _InputRotation()
