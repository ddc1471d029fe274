"""Rotation of the inputs of linears while the model runs: QuaRot's online Hadamard transform.

After QuaRot (arXiv 2404.00456, section 4, stage 1b): `x W^T = (x H) (W H)^T` with an orthogonal H. Behind the gate of
a feed-forward part nothing linear stands before the down projection into which H could be folded, so its input is
multiplied while the model runs. A channel that is large is spread over all of them, which a scale per tensor needs.
In real kernels this is a fast Hadamard transform of `n log n` additions; here it is a product in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cushion.errors import ConfigError
from cushion.models import LanguageModel
from cushion.quantization.effect import Effect, Work
from cushion.quantization.hadamard import randomized_hadamard
from cushion.quantization.quantizer import QuantizerConfig
from cushion.quantization.replacements import Replacements


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
        matrices: dict[tuple[int, torch.device], Tensor] = {}
        try:
            for linear in rotated_linears(work.lm, work.config).values():
                size, weight = (linear.in_features, linear.weight.device), linear.weight.detach()
                if size not in matrices:
                    matrices[size] = randomized_hadamard(linear.in_features).to(linear.weight.device)
                turned = (weight.double() @ matrices[size]).to(weight.dtype)
                replacements.put(linear, "weight", nn.Parameter(turned, requires_grad=False))
            hooks = {size: _hook(matrix.float()) for size, matrix in matrices.items()}
            for name, linear in rotated_linears(work.lm, work.config).items():
                work.input_hooks[name] = hooks[linear.in_features, linear.weight.device]
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


def _hook(matrix: Tensor) -> Any:
    def rotate(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        (values,) = args  # a linear has one input
        return ((values.float() @ matrix).to(values.dtype),), kwargs

    return rotate


INPUT_ROTATION = _InputRotation()
