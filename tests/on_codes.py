"""What holds of every execution on codes: its linears are those of the simulation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from helpers import random_values
from torch import Tensor, nn

from cushion.execution.on_codes import LinearOnCodes
from cushion.models import LanguageModel
from cushion.quantization.fitted import FittedQuantizer
from cushion.quantization.linear import QuantizedLinear

SHAPES = (
    ("per_tensor", False, 1, 16, 8),
    ("per_channel", True, 17, 37, 11),
    ("per_channel", False, 2, 48, 5),
)
"""Granularity of the weight, whether there is a bias, rows, inputs and outputs."""


def assert_near(found: Tensor, wanted: Tensor, what: object) -> None:
    """Equal to 1e-6 of the largest, in one shape and dtype."""
    assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype), what
    assert (found - wanted).abs().max() <= 1e-6 * wanted.abs().max(), what


def assert_what_is_not_finite_stays_so(exact: nn.Module, simulated: nn.Module, inputs: int) -> None:
    for bad in (float("nan"), float("inf")):
        values = random_values(3, inputs)
        values[1, 5] = bad
        assert torch.equal(exact(values).isfinite(), simulated(values).isfinite()), bad


def assert_every_linear_agrees(lm: LanguageModel, text: Tensor, fitted: FittedQuantizer, execution: str) -> None:
    """On the very same input, each linear on codes gives what the simulated one gives."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def noting(name: str) -> Callable[..., None]:
        def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen[name] = inputs[0].clone(), output.clone()

        return note

    with torch.no_grad(), fitted.on(lm, execution=execution):
        placed = {name: module for name, module in lm.model.named_modules() if isinstance(module, LinearOnCodes)}
        assert {module.execution for module in placed.values()} == {execution}
        hooks = [module.register_forward_hook(noting(name)) for name, module in placed.items()]
        lm.body(text)
        for hook in hooks:
            hook.remove()
    assert seen
    assert placed.keys() >= seen.keys()
    with torch.no_grad(), fitted.on(lm):
        for name, (values, output) in seen.items():
            module = lm.model.get_submodule(name)
            assert isinstance(module, QuantizedLinear)
            assert_near(module(values), output, name)
    assert not any(isinstance(module, LinearOnCodes) for module in lm.model.modules())
