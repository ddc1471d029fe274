"""A configuration from the shipped YAML files, without the command line: for scripts and notebooks."""

from __future__ import annotations

from hydra import compose as compose_node
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import open_dict
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
    register_schema()
    outer = GlobalHydra.instance().hydra  # a script that Hydra started has one already
    GlobalHydra.instance().clear()
    try:
        given = OverridesParser.create().parse_overrides(list(overrides))
        swept = [one.key_or_group for one in given if one.is_sweep_override()]
        if not swept:
            with initialize_config_dir(str(config_folder()), version_base="1.3"):
                node = compose_node("config", list(overrides), return_hydra_config=True)
            named = {one.key_or_group for one in given}
            swept = [key for key in node.hydra.sweeper.params or {} if key not in named]
        if swept:
            raise ConfigError(
                f"these overrides are a sweep over {', '.join(swept)}: give each one value, or use the command line"
            )
        with open_dict(node):
            del node["hydra"]
        return to_run_config(node)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(one_line(error)) from error
    finally:
        GlobalHydra.instance().clear()
        GlobalHydra.instance().hydra = outer
