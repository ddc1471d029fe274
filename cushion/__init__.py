"""Cushion: a config-driven experiment framework for activation outliers and prefix methods in quantized LLMs.

What most scripts need is here by name, and imported when it is used: `RunConfig` and `compose` (a configuration, from
Python or from the YAML files), `run` (the work), `load_results` (a data frame of finished runs) and `Prefix`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cushion.composition import compose as compose
    from cushion.config import RunConfig as RunConfig
    from cushion.pipeline import run as run
    from cushion.prefix import Prefix as Prefix
    from cushion.reporting.frame import load_results as load_results

__version__ = "0.1.0"

_PLACES = {
    "Prefix": "cushion.prefix",
    "RunConfig": "cushion.config",
    "compose": "cushion.composition",
    "load_results": "cushion.reporting.frame",
    "run": "cushion.pipeline",
}


def __getattr__(name: str) -> Any:
    """One of the names above; its module is imported now."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PLACES])
