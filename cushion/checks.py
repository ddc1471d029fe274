"""What checks of a configuration are made of, and the warning about an option without effect."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cushion.errors import ConfigError, did_you_mean


def require(condition: bool, key: str, value: object, allowed: str) -> None:
    """Raise `ConfigError` naming key, value and what is allowed unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{key}={value!r} is not allowed: {allowed}")


def one_of(key: str, value: str, options: tuple[str, ...]) -> None:
    """Raise `ConfigError` unless `value` is one of `options`, with the nearest option as a hint."""
    require(value in options, key, value, f"choose one of {', '.join(options)}{did_you_mean(value, options)}")


def at_least(key: str, value: float | None, lowest: float) -> None:
    """Raise `ConfigError` unless `value` is None or at least `lowest`."""
    require(value is None or value >= lowest, key, value, f"it must be at least {lowest}")


def without_effect(section: str, config: Any, keys: Sequence[str], why: str) -> list[str]:
    """A warning for each of `keys` that is set away from its default in `config`, all of which have no effect."""
    defaults = type(config)()
    changed = [key for key in keys if getattr(config, key) != getattr(defaults, key)]
    return [f"{section}.{key}={getattr(config, key)!r} has no effect {why}" for key in changed]


def structured(cls: type[Any], values: Any, key: str) -> Any:
    """The dataclass `cls` with these values, whose names and types are checked.

    Raises:
        ConfigError: one of them does not belong, or has another type; the message names `key` and all that there are.

    """
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), values))
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        allowed = ", ".join(field.name for field in fields(cls)) or "nothing"
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{key}={values!r} is not allowed: {reason}; its keys are: {allowed}") from error
