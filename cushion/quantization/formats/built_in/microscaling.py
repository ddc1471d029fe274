"""MX: blocks of 32 with a scale that is a power of two."""

from __future__ import annotations

from cushion.quantization.formats.base import Format
from cushion.quantization.formats.registry import register


def _mx(name: str, title: str, grid: str, bits: int, shared_exponent: str) -> None:
    register(
        Format(
            name=name,
            title=title,
            grid=f"cushion.quantization.formats.microscaling:{grid}",
            bits=(bits,),
            symmetric_only=True,
            equal_steps=False,
            reads=("shared_exponent",),
            block=32,
            shared_exponent=shared_exponent,
        )
    )


_mx("mxfp8", "MXFP8 (E4M3)", "Mxfp8", 8, "rceil")
_mx("mxfp6", "MXFP6 (E2M3)", "Mxfp6", 6, "even")
_mx("mxfp4", "MXFP4 (E2M1)", "Mxfp4", 4, "even")
