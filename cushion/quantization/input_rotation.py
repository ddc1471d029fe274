"""Rotation of the inputs of linears while the model runs: QuaRot's online Hadamard transform.

## R4: inputs rotated while the model runs

Nothing linear stands before the input of the down projection, so it is rotated while the model runs, where
`quantizer.input_rotation` says so (QuaRot, section 4, its online transform): x W^T = (x H)(W H)^T, in float32, with H
of the same construction and seed 0. `all` does that at every linear. It comes after smoothing and before rounding.
Min-max ranges are then minimum and maximum of what the linear reads, since the ranges of single channels do not say
what their mixtures reach.
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
        """The down projections are named by the architecture, and are among the targets."""
        if not rotated_linears(lm, config):
            raise ConfigError(
                f"quantizer.input_rotation={config.input_rotation} finds no linear in {lm.label}: its architecture "
                "names no down projection, or quantizer.targets leaves it out; use quantizer.input_rotation=none or all"
            )

    @contextmanager
    def around(self, work: Work) -> Iterator[None]:
        """Weights multiplied by H, and inputs by a hook before each linear."""
        replacements, handles = Replacements(), []
        rotations: dict[tuple[int, torch.device], tuple[Tensor, Hook]] = {}
        try:
            alone = left_alone(work.config, work.inputs)
            for name, linear in rotated_linears(work.lm, work.config).items():
                if input_site(name) in alone:
                    continue
                weight = linear.weight.detach()
                place = linear.in_features, weight.device
                if place not in rotations:
                    matrix = randomized_hadamard(linear.in_features)
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
    down = {name for names in lm.down_projections().values() for name in names}
    return {name: linear for name, linear in linears.items() if name in down}


def _before(rotation: Rotation) -> Hook:
    """The hook that lets a linear read what the rotation makes of its input."""

    def rotate(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        (values,) = args  # a linear has one input
        return (rotation(values),), kwargs

    return rotate


INPUT_ROTATION = _InputRotation()
