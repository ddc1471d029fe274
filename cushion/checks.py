"""What checks of a configuration are made of, and the warning about an option without effect."""

from __future__ import annotations

import math
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cushion.errors import ConfigError, did_you_mean

T = TypeVar("T")

LARGEST = 2**31 - 1
"""The largest number that any key but a seed may have, up or down."""
LARGEST_SEED = 2**32 - 1
"""The largest seed: what is made of one for every step and block still has 64 bits."""
NAME_BYTES = 63
"""The longest `name`, in UTF-8: the names of four groups, joined with hyphens, are the name of one folder."""
EXPERIMENT_BYTES = 128
"""The longest `experiment`: a folder, and a group of runs in trackers."""
LARGEST_RATE = 1000.0
"""The largest learning rate: keys and values have the size of activations, and half precision ends at 65504."""
_PART_BYTES, _PATH_BYTES = 255, 4095  # what file systems take as the name of a file, and as a path
_SHOWN = 80


def require(condition: bool, key: str, value: object, allowed: str) -> None:
    """Raise `ConfigError` naming key, value and what is allowed unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{key}={written(value)} is not allowed: {allowed}")


def written(value: object) -> str:
    """A value as YAML and the command line write it, cut where it is long."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int) and abs(value) > 10**_SHOWN:
        return f"<a number of {int(math.log10(abs(value))) + 1} digits>"
    if isinstance(value, list):
        text = f"[{', '.join(map(written, value[:_SHOWN]))}]"
    elif isinstance(value, dict):
        text = "{" + ", ".join(f"{name}: {written(item)}" for name, item in value.items()) + "}"
    else:
        text = ascii(value) if isinstance(value, str) and not _is_text(value) else repr(value)
    return text if len(text) <= 3 * _SHOWN else f"{text[:_SHOWN]}... ({len(text)} characters)"


def one_of(key: str, value: str, options: tuple[str, ...]) -> None:
    """Raise `ConfigError` unless `value` is one of `options`, with the nearest option as a hint."""
    if value not in options:  # only then is the nearest looked for, which takes as long as all other checks together
        require(False, key, value, f"choose one of {', '.join(options)}{did_you_mean(value, options)}")


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


def from_plain(cls: type[T], values: Mapping[str, Any]) -> T:
    """The dataclass `cls`, and those in it, with plain values, as JSON holds them; what is not given has its default.

    Raises:
        ConfigError: a key does not belong, or a value is not allowed; the message names the key.

    """
    try:
        made = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), dict(values)))
    except OmegaConfBaseException as error:
        parent: Any = error.parent_node
        known = [str(key) for key in parent] if OmegaConf.is_dict(parent) else []
        hint = did_you_mean(str(error.key), known) if error.key not in known else ""
        raise ConfigError(f"{error.full_key or error.key}: {str(error).splitlines()[0]}{hint}") from error
    assert isinstance(made, cls)
    return made


def check_values(section: str, config: Any) -> None:
    """Refuse what no key of its type may be, in a group of the configuration and all below it.

    Whole numbers are at most `LARGEST`, seeds from 0 to `LARGEST_SEED`; other numbers are finite; text is Unicode;
    names (`name`) and paths (`path`, `*_path`, `*_dir`, `*_file`) can be names of files. Lists hold what the
    schema says.

    Args:
        section: the key of the group; empty for the whole configuration.
        config: a dataclass of the configuration.

    Raises:
        ConfigError: a value cannot be; the message names its key and what is allowed.

    """
    kind: Any = type(config)
    for name, hint in _typed_fields(kind):
        value = getattr(config, name)
        if value is None or isinstance(value, bool):
            continue
        for place, item in _leaves(f"{section}.{name}" if section else name, value, hint):
            _check_value(place, name, item)


@cache
def _typed_fields(cls: Any) -> tuple[tuple[str, Any], ...]:
    hints = get_type_hints(cls)
    return tuple((field.name, hints[field.name]) for field in fields(cls))


def _leaves(key: str, value: Any, hint: Any) -> Iterator[tuple[str, Any]]:
    """The numbers and texts in a value, with their keys; those of other dataclasses are checked as such."""
    if is_dataclass(value):
        check_values(key, value)
    elif isinstance(value, dict):
        for name, item in value.items():
            _check_value(key, "", name)
            yield from _leaves(f"{key}.{name}", item, Any)
    elif isinstance(value, list):
        (kind,) = get_args(_alternative(hint, list)) or (Any,)
        allowed = _plain(kind)
        for item in value:
            if allowed and (not isinstance(item, allowed) or (isinstance(item, bool) and bool not in allowed)):
                raise ConfigError(f"{key}={written(value)} is not allowed: {written(item)} is not a {_called(allowed)}")
            yield from _leaves(key, item, kind)
    else:
        yield key, value


def _alternative(hint: Any, kind: type) -> Any:
    """That of the types of a union which is a `kind`, such as `list[int]` in `list[int] | None`."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return next((option for option in options if get_origin(option) is kind), None)


def _plain(kind: Any) -> tuple[type, ...]:
    """The classes of the items of a list, where they are texts or numbers."""
    options = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    return options if all(option in (str, int, float, bool) for option in options) else ()


def _called(kinds: tuple[type, ...]) -> str:
    words = {str: "text", int: "whole number", float: "number", bool: "truth value"}
    return " or ".join(words[kind] for kind in kinds)


def _check_value(key: str, name: str, value: object) -> None:
    if isinstance(value, int) and not isinstance(value, bool):
        if name == "seed" or name.endswith("_seed"):
            require(0 <= value <= LARGEST_SEED, key, value, f"it must be at least 0 and at most {LARGEST_SEED}")
        else:
            require(abs(value) <= LARGEST, key, value, f"it must be at most {LARGEST}")
    elif isinstance(value, float):
        require(math.isfinite(value), key, value, "it must be finite")
    elif isinstance(value, str):
        require(_is_text(value), key, value, "it holds half of a surrogate pair, which is not text: write it as UTF-8")
        if name == "name":
            check_name(key, value)
        elif name == "path" or name.endswith(("_path", "_dir", "_file")):
            check_path(key, value)


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_rate(key: str, rate: float) -> None:
    """Raise `ConfigError` unless `rate` is a learning rate: Adam's first step moves every entry by so much."""
    reason = f"it must be positive, and at most {LARGEST_RATE:g}: the first step moves every entry by so much"
    require(0 < rate <= LARGEST_RATE, key, rate, reason)


def check_name(key: str, value: str, longest: int = NAME_BYTES) -> None:
    """Raise `ConfigError` unless `value` can be part of the name of a folder, of at most `longest` bytes of UTF-8."""
    size, safe = len(value.encode()), value.isprintable() and not set(value) & set("/\\")
    require(bool(value.strip(".")) and safe, key, value, "it names a folder: no '/', '\\' or line break, and not empty")
    require(size <= longest, key, value, f"it names a folder and has {size} bytes: at most {longest}")


def check_path(key: str, value: str) -> None:
    """Raise `ConfigError` where no file system could have a file of this name."""
    require("\0" not in value, key, value, "no path has a character of code 0")
    parts = [len(part.encode()) for part in value.split("/")]
    longest, whole = max(parts), sum(parts) + len(parts)
    require(longest <= _PART_BYTES, key, value, f"a name in it has {longest} bytes: file systems take {_PART_BYTES}")
    require(whole <= _PATH_BYTES, key, value, f"it has {whole} bytes: file systems take {_PATH_BYTES}")
    try:
        Path(value).expanduser()
    except RuntimeError:
        user = value.split("/")[0]
        require(False, key, value, f"there is no home folder {user}: write the path without '~', or '~/' for your own")
