"""Which figures would look the same."""

from __future__ import annotations

from typing import Any

import pytest

from cushion.reporting.alike import alike


def curves(change: float = 1.0, **others: Any) -> dict[str, Any]:
    return {"stages": {"none": [0.01, 1.0, 1000.0 * change], "found": [0.01, 0.0, 2.0]}, "block": 3, **others}


@pytest.mark.parametrize(
    ("other", "logarithmic", "expected"),
    [
        (curves(), True, True),
        (curves(1.1), True, True),  # 10 % of a scale over five decades
        (curves(1.1), False, False),
        (curves(1.3), True, False),
        (curves(block=4), True, False),
        ({**curves(), "stages": {"none": [0.01, 1.0, 1000.0], "tuned": [0.01, 0.0, 2.0]}}, True, False),
    ],
)
def test_alike_is_what_differs_by_less_than_a_hundredth_of_the_scale(
    other: dict[str, Any], logarithmic: bool, expected: bool
) -> None:
    assert alike(curves(), other, logarithmic) == expected
    assert alike(other, curves(), logarithmic) == expected


def test_what_has_no_span_is_alike_only_if_equal() -> None:
    assert alike([1.0, 1.0], [1.0, 1.0], logarithmic=True)
    assert not alike([1.0, 1.0], [1.001, 1.001], logarithmic=False)
    assert alike([0.0], [0.0], logarithmic=True)
