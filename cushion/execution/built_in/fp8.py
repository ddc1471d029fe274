"""Execution on FP8 numbers: declared."""

from __future__ import annotations

from cushion.registry import EXECUTIONS

EXECUTIONS.register("fp8", "cushion.execution.fp8:Fp8")
