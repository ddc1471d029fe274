"""That a model is bit for bit, and object for object, what it was before something was put on it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cushion.models import LanguageModel


def snapshot(lm: LanguageModel) -> tuple[list[tuple[str, int]], list[tuple[str, int]], list[Tensor]]:
    """The identity of every module and parameter, shared ones under each name, and a copy of every parameter's bits."""
    modules = [(name, id(module)) for name, module in lm.model.named_modules(remove_duplicate=False)]
    parameters = [(name, id(parameter)) for name, parameter in lm.model.named_parameters(remove_duplicate=False)]
    return modules, parameters, [parameter.detach().clone() for parameter in lm.model.parameters()]


def assert_untouched(lm: LanguageModel, before: tuple[Any, ...]) -> None:
    after = snapshot(lm)
    assert after[:2] == before[:2]
    assert all(torch.equal(new, old) for new, old in zip(after[2], before[2], strict=True))
