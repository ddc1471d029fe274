"""Execution on 8-bit codes: declared."""

from __future__ import annotations

from cushion.registry import EXECUTIONS

EXECUTIONS.register("int8", "cushion.execution.int8:Int8")
