"""What the processor is called, where the system tells: Linux does, in a file."""

from __future__ import annotations

import platform
import re
from pathlib import Path

_TOLD = Path("/proc/cpuinfo")


def processor_name() -> str:
    """Maker and model, such as `AuthenticAMD AMD EPYC 9R14`; what Python knows where there is no such file."""
    if not _TOLD.is_file():
        return platform.processor()
    told = dict(re.findall(r"^([^\t\n:]+)\t*: *(.*)$", _TOLD.read_text(encoding="utf-8"), re.MULTILINE))
    return " ".join(told[key] for key in ("vendor_id", "model name") if key in told) or platform.processor()
