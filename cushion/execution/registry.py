"""The executions by name. What one names is imported when it is used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cushion.code import version_at
from cushion.registry import EXECUTIONS, located

if TYPE_CHECKING:
    from cushion.execution.base import Execution

SIMULATED = "simulated"
"""What searches, tunes and judges QFeM's alpha, whatever the rows of a table are computed with."""


def load_execution(name: str) -> Execution:
    """The execution of this name.

    Raises:
        ConfigError: there is none.

    """
    execution: Execution = located(EXECUTIONS[name])()
    return execution


def execution_identity(name: str) -> list[str]:
    """Name, place and code of an execution, for the keys of cached steps."""
    return [name, EXECUTIONS[name], version_at(EXECUTIONS[name])]
