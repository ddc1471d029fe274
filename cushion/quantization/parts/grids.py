"""What the parts that round have in common: bits, and the keys of a grid."""

from __future__ import annotations

from cushion.checks import require


def check_bits(key: str, bits: int | None) -> None:
    """Raise `ConfigError` unless `bits` is None or 2 to 8."""
    require(bits is None or 2 <= bits <= 8, key, bits, "2 to 8, or null for full precision")


def grid_keys(symmetric: bool) -> frozenset[str]:
    """The common keys that a grid is made of; a symmetric one has no zero point."""
    return frozenset({"levels"} if symmetric else {"levels", "zero_point"})
