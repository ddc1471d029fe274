"""A configuration from the shipped YAML files, without the command line: for scripts and notebooks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra import compose as compose_node
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, open_dict
from omegaconf.errors import OmegaConfBaseException

from cushion.cli import config_folder, one_line, register_schema, to_run_config
from cushion.config import RunConfig
from cushion.errors import ConfigError


def compose(*overrides: str) -> RunConfig:
    """The configuration that the command `cushion` has with these arguments.

    Args:
        overrides: as on the command line, for example `"model=smollm2_135m"`, `"search.tau=0.3"`.

    Raises:
        ConfigError: an override is refused, or they describe a sweep: one configuration is one run. The message names
            the keys that an experiment sweeps.

    """
    try:
        given = OverridesParser.create().parse_overrides(list(overrides))
        swept = [one.key_or_group for one in given if one.is_sweep_override()]
        if not swept:
            node, params = compose_raw(overrides)
            named = {one.key_or_group for one in given}
            swept = [key for key in params if key not in named]
        if swept:
            raise ConfigError(
                f"these overrides are a sweep over {', '.join(swept)}: give each one value, or use the command line"
            )
        return to_run_config(node)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(one_line(error)) from error


def compose_raw(overrides: Sequence[str]) -> tuple[DictConfig, dict[str, Any]]:
    """What Hydra composes of overrides, with its interpolations, and what an experiment among them sweeps.

    Raises:
        HydraException: or an error of OmegaConf: an override is refused.

    """
    register_schema()
    outer = GlobalHydra.instance().hydra  # a script that Hydra started has one already
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_folder()), version_base="1.3"):
            node = compose_node("config", list(overrides), return_hydra_config=True)
        params = dict(node.hydra.sweeper.params or {})
        with open_dict(node):
            del node["hydra"]
        return node, params
    finally:
        GlobalHydra.instance().clear()
        GlobalHydra.instance().hydra = outer
