"""Cushion: a config-driven experiment framework for activation outliers and prefix methods in quantized LLMs.

What most scripts need is here by name, and imported when it is used: `RunConfig` and `compose` (a configuration, from
Python or from the YAML files), `run` (the work), `load_results` (a data frame of finished runs) and `Prefix`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cushion.registry import imported_when_used

if TYPE_CHECKING:
    from cushion.composition import compose as compose
    from cushion.config import RunConfig as RunConfig
    from cushion.pipeline import run as run
    from cushion.prefix import Prefix as Prefix
    from cushion.reporting.frame import load_results as load_results

__version__ = "0.1.0"

_PLACES = {
    "Prefix": "cushion.prefix:Prefix",
    "RunConfig": "cushion.config:RunConfig",
    "compose": "cushion.composition:compose",
    "load_results": "cushion.reporting.frame:load_results",
    "run": "cushion.pipeline:run",
}


__getattr__ = imported_when_used(__name__, _PLACES)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PLACES])
