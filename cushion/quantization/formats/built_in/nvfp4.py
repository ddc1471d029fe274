"""NVFP4: blocks of 16 with FP8 scales, and a scale for the tensor."""

from __future__ import annotations

from cushion.quantization.formats.base import Format
from cushion.quantization.formats.registry import register

register(
    Format(
        name="nvfp4",
        title="NVFP4",
        grid="cushion.quantization.formats.nvfp4:Nvfp4",
        bits=(4,),
        symmetric_only=True,
        equal_steps=False,
        reads=(),
        block=16,
        tensor_scale=True,
    )
)
