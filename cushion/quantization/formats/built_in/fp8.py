"""FP8 with scales that are free: per tensor, channel, group or token."""

from __future__ import annotations

from cushion.quantization.formats.base import Format
from cushion.quantization.formats.registry import register

_FLOATS = "cushion.quantization.formats.floats"

register(
    Format(
        name="fp8_e4m3",
        title="FP8 E4M3",
        grid=f"{_FLOATS}:Fp8E4M3",
        bits=(8,),
        symmetric_only=True,
        equal_steps=False,
        reads=(),
    )
)
register(
    Format(
        name="fp8_e5m2",
        title="FP8 E5M2",
        grid=f"{_FLOATS}:Fp8E5M2",
        bits=(8,),
        symmetric_only=True,
        equal_steps=False,
        reads=(),
    )
)
