"""Integers of 2 to 8 bits."""

from __future__ import annotations

from cushion.quantization.formats.base import Format
from cushion.quantization.formats.registry import register

register(Format(name="int", title="integer", grid="cushion.quantization.numerics:Grid", bits=tuple(range(2, 9))))
