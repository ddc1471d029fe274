"""The name of the processor, as Linux tells it."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from cushion import processor

TOLD = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 25
model name\t: AMD EPYC 9R14
flags\t\t: fpu vme

processor\t: 1
vendor_id\t: AuthenticAMD
model name\t: AMD EPYC 9R14
"""


def test_maker_and_model_are_read_where_they_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "processor", lambda: "what Python knows")
    for content, wanted in {
        TOLD: "AuthenticAMD AMD EPYC 9R14",
        "processor\t: 0\nBogoMIPS\t: 2100.00\n": "what Python knows",  # as on ARM
        None: "what Python knows",
    }.items():
        monkeypatch.setattr(processor, "_TOLD", tmp_path / f"{wanted}-{content is None}")
        if content is not None:
            processor._TOLD.write_text(content)
        assert processor.processor_name() == wanted
