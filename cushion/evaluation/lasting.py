"""What a task is made of as plain JSON that is the same in every process: its part in the keys of cached steps."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

from cushion.errors import DataError

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def lasting(value: Any, where: str) -> Any:
    """A value as plain JSON, without anything that only this process knows.

    A function stands as its name and source, a `functools.partial` as its function and arguments, an object that says
    where in memory it is as its kind and attributes; what is left stands as text.

    Args:
        value: part of a task's definition, or of its records.
        where: what messages call it.

    Raises:
        DataError: nothing but an address in memory could tell the value from others of its kind.

    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): lasting(inner, f"{where}.{key}") for key, inner in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted((lasting(inner, where) for inner in value), key=repr)
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return [lasting(inner, f"{where}[{index}]") for index, inner in enumerate(value)]
    if isinstance(value, partial):
        return {
            "partial": lasting(value.func, where),
            "args": lasting(value.args, where),
            "keywords": lasting(value.keywords, where),
        }
    if isinstance(value, MethodType):
        return {"method": lasting(value.__func__, where), "of": lasting(value.__self__, where)}
    if isinstance(value, (FunctionType, BuiltinFunctionType, type)):
        return {"name": f"{value.__module__}.{value.__qualname__}", "source": _source(value)}
    text = str(value)
    if not _ADDRESS.search(text) and not _ADDRESS.search(repr(value)):
        return text
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    attributes = getattr(value, "__dict__", None)
    if not attributes:
        raise DataError(
            f"{where} holds a {kind}, which nothing tells from others of its kind, so no cached result could be found "
            "again: leave the task out, or give its definition a value with a text of its own (__str__)"
        )
    return {"kind": kind, "attributes": lasting(attributes, where)}


def _source(thing: Any) -> str | None:
    """The source of a function or class; None where it has none that can be found, as what is built in."""
    try:
        return inspect.getsource(thing)
    except (OSError, TypeError):
        code = getattr(thing, "__code__", None)
        return None if code is None else f"{code.co_code.hex()} {code.co_names} {code.co_varnames}"
