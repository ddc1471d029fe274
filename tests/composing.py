"""What the tests of the configuration files share: Hydra's composition as the command does it, made once for all."""

from __future__ import annotations

from functools import cache

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from cushion.cli import config_folder, register_schema, to_run_config
from cushion.config import RunConfig


@cache
def composed(*overrides: str) -> RunConfig:
    """The configuration of a command with these overrides. The same object for all who ask: it must not be changed."""
    GlobalHydra.instance().clear()
    register_schema()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        return to_run_config(compose("config", list(overrides)))
