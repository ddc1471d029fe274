"""The executions by name. Nothing is imported before it is used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cushion.registry import located

if TYPE_CHECKING:
    from cushion.execution.base import Execution

EXECUTIONS: dict[str, str] = {"simulated": "cushion.execution.simulated:Simulated"}
"""`module:class` of an `Execution` that is made without arguments."""


def load_execution(name: str) -> Execution:
    """The execution of this name."""
    execution: Execution = located(EXECUTIONS[name])()
    return execution
