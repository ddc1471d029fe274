"""The estimator whose search is the part `block_output`: a range that it starts from, and how much text it reads."""

from __future__ import annotations

from typing import Any

from cushion.quantization.estimators.base import Estimator, Option
from cushion.quantization.estimators.registry import register


def _allows(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


register(
    Estimator(
        name="block_output",
        title="block output",
        options={"texts": Option(8, _allows, "a whole number, 1 and more")},
        rounds=True,
    )
)
