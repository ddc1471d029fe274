"""Number formats: what is refused, and that codes are the nearest of those that a format has."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from installed_plugins import PLUGINS

from cushion.config import ActivationConfig, QuantizerConfig, WeightConfig
from cushion.errors import ConfigError
from cushion.quantization.formats.registry import FORMATS
from cushion.quantization.identity import quantizer_identity
from cushion.quantization.numerics import Grid, fake_quantize
from cushion.quantization.parts.registry import PARTS


@pytest.fixture
def powers_of_two(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Grid]]:
    assert "int" in FORMATS
    monkeypatch.setattr(FORMATS, "_items", dict(FORMATS.items()))
    monkeypatch.syspath_prepend(str(PLUGINS))
    yield runpy.run_path(str(PLUGINS / "powers_of_two.py"), run_name="powers_of_two")["PowersOfTwo"]


def test_the_integer_format_is_the_grid() -> None:
    assert FORMATS["int"].make(4, False, "paper", "integer") == Grid(4, False, "paper", "integer")


def test_values_become_the_nearest_codes_of_a_format(powers_of_two: type[Grid]) -> None:
    grid = powers_of_two(4, True)
    assert grid != Grid(4, True)
    values = torch.randn(4000, generator=torch.Generator().manual_seed(0)) ** 3
    scale, offset = grid.parameters(values.min(), values.max())
    codes = torch.tensor([0.0, *(sign * 2.0**power for power in range(7) for sign in (1, -1))])
    distances = (values[:, None] / scale - codes).abs().amin(1)
    found = fake_quantize(values, scale, offset, grid)
    assert torch.allclose((found - values).abs() / scale, distances, atol=1e-4)


@pytest.mark.usefixtures("powers_of_two")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: WeightConfig(format="integer"),
            r"quantizer.weights.format='integer' is not allowed: choose",
        ),
        (lambda: WeightConfig(9), r"quantizer.weights.bits=9 is not allowed: 2 to 8, or null"),
        (lambda: WeightConfig(8, format="powers_of_two"), r"weights.bits=8 is not allowed: 3, 4, or null"),
        (
            lambda: ActivationConfig(4, symmetric=False, format="powers_of_two"),
            r"activations.symmetric=false is not allowed: quantizer.activations.format=powers_of_two has no offset",
        ),
    ],
)
def test_what_a_format_does_not_have_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_the_format_is_in_the_identity_and_its_absence_of_effect_is_told(powers_of_two: type[Grid]) -> None:
    del powers_of_two
    plain = WeightConfig(4)
    assert quantizer_identity(QuantizerConfig(weights=plain))["weights"]["format"][0] == "int"
    off = QuantizerConfig(activations=ActivationConfig(None, format="powers_of_two"))

    assert any(
        "activations.format='powers_of_two' has no effect" in text for text in PARTS["activations"].warnings(off)
    )
