"""Simulated execution: declared."""

from __future__ import annotations

from cushion.registry import EXECUTIONS

EXECUTIONS.register("simulated", "cushion.execution.simulated:Simulated")
