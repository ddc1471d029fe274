"""The number formats by name."""

from __future__ import annotations

from cushion.checks import one_of, require
from cushion.quantization.formats.base import Format
from cushion.registry import PLUGINS, Registry

FORMATS: Registry[Format] = Registry("format", "cushion.quantization.formats.built_in", PLUGINS)


def register(form: Format) -> Format:
    """Make a format known under its name.

    Raises:
        ConfigError: there is one of this name.

    """
    return FORMATS.register(form.name, form)


def check_format(
    section: str, name: str, bits: int | None, symmetric: bool = True, granularity: str | None = None
) -> None:
    """Raise `ConfigError` unless there is such a format, and it has these bits, this symmetry and this granularity."""
    one_of(f"{section}.format", name, tuple(FORMATS))
    form = FORMATS[name]
    if bits is None:
        return
    widths = ", ".join(map(str, form.bits)) if list(form.bits) != list(range(2, 9)) else "2 to 8"
    of_format = "" if name == "int" else f" ({section}.format={name})"
    require(bits in form.bits, f"{section}.bits", bits, f"{widths}, or null for full precision{of_format}")
    reason = f"{section}.format={name} has no offset: set {section}.symmetric=true"
    require(symmetric or not form.symmetric_only, f"{section}.symmetric", symmetric, reason)
    if granularity is None:
        return
    if form.block is not None:
        reason = f"{section}.format={name} has a scale for every {form.block} values: set it to per_block"
        require(granularity == "per_block", f"{section}.granularity", granularity, reason)
    else:
        blocks = ", ".join(other for other, its in FORMATS.items() if its.block is not None)
        reason = f"{section}.format={name} fixes no blocks; formats that do are {blocks}"
        require(granularity != "per_block", f"{section}.granularity", granularity, reason)
