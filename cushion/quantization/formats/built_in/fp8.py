"""FP8 with scales that are free: per tensor, channel, group or token."""

from __future__ import annotations

from cushion.quantization.formats.base import Format
from cushion.quantization.formats.registry import register

for name, title, grid in (("fp8_e4m3", "FP8 E4M3", "Fp8E4M3"), ("fp8_e5m2", "FP8 E5M2", "Fp8E5M2")):
    register(
        Format(
            name=name,
            title=title,
            grid=f"cushion.quantization.formats.floats:{grid}",
            bits=(8,),
            symmetric_only=True,
            equal_steps=False,
            reads=(),
        )
    )
