"""What tests in many places need: random texts and values, drawn from a seed, and the ranges of a calibration."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from cushion.activations import ChannelRanges
from cushion.models import LanguageModel
from cushion.prefix import Prefix
from cushion.quantization.calibration import calibrate
from cushion.registry import Registry

SCRIPTS = Path(__file__).parent.parent / "scripts"


def load_script(name: str) -> ModuleType:
    """A script of `scripts/` as a module, imported anew, under its own name in `sys.modules`."""
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def random_texts(rows: int, length: int, seed: int = 0, below: int = 256) -> Tensor:
    """Token ids, (rows, length). Below 256 they are the bytes of a tiny model: no special token is among them."""
    return torch.randint(0, below, (rows, length), generator=torch.Generator().manual_seed(seed))


def random_values(*shape: int, seed: int = 0) -> Tensor:
    """Normally distributed values of a shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def calibrated(lm: LanguageModel, texts: Tensor, prefix: Prefix | None = None) -> ChannelRanges:
    """The ranges of every linear's input over all of `texts`, each behind `prefix`."""
    ranges = ChannelRanges()
    assert list(calibrate(lm, prefix or Prefix.empty(), texts, ranges)) == list(range(1, len(texts) + 1))
    return ranges


@contextmanager
def registered(registry: Registry[Any], name: str, item: Any) -> Iterator[Any]:
    """The item in a registry for the length of a `with` block."""
    registry.register(name, item)
    try:
        yield item
    finally:
        del registry._items[name]
