"""What a range estimator is: a light declaration, named by `quantizer.activations.estimator`, without torch.

What it needs of the calibration is a `Statistic`, by linear; the range is a function of this, the grid and its options.
Cushion's own are in `cushion/quantization/estimators/built_in`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from cushion.checks import require
from cushion.errors import did_you_mean
from cushion.quantization.parts.base import RANGES, Needed
from cushion.registry import located

if TYPE_CHECKING:
    from torch import Tensor

    from cushion.quantization.numerics import Grid
    from cushion.quantization.statistics.base import Statistic


@dataclass(frozen=True)
class Option:
    """What an estimator reads.

    Args:
        default: its value where none is given.
        allows: whether a value can work.
        allowed: the same in words, for the error.

    """

    default: Any
    allows: Callable[[Any], bool]
    allowed: str


def number(default: float, above: float, at_most: float) -> Option:
    """An option that is a number of an interval, open below."""

    def allows(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and above < value <= at_most

    return Option(default, allows, f"a number above {above:g}, at most {at_most:g}")


@dataclass(frozen=True, kw_only=True)
class Estimator:
    """The declaration of an estimator. What it names as `module:attribute` is imported when it is used.

    Args:
        name: the value of `quantizer.activations.estimator`.
        title: how it is called in tables.
        statistic: `module:Class` of the `Statistic` of a linear's input that it needs; None for the ranges of channels,
            which are always there, and of which minimum and maximum are the range.
        range: `module:function` from the statistic, the grid and the options to the range, minimum and maximum as
            float32 scalars on the CPU; None without a statistic.
        options: what it reads, by name.
        gathers: those of its options that the statistic is made with, by their names; the others have no effect on the
            calibration.
        rounds: whether it rounds single values on the grid, which blocks with scales of their own do not have.
        equal_steps: whether it holds only for codes that are equally far apart.

    """

    name: str
    title: str
    statistic: str | None = None
    range: str | None = None
    options: Mapping[str, Option] = field(default_factory=dict)
    gathers: tuple[str, ...] = ()
    rounds: bool = False
    equal_steps: bool = False

    def __post_init__(self) -> None:
        assert (self.statistic is None) == (self.range is None), "a range follows from a statistic"
        assert set(self.gathers) <= set(self.options), "the statistic is made with options of the estimator"

    def values(self, given: Mapping[str, Any], key: str) -> dict[str, Any]:
        """All of its options, with the defaults of those that are not `given`.

        Args:
            given: by name.
            key: of the configuration, under which they stand.

        Raises:
            ConfigError: an option that it does not read, or a value that cannot work.

        """
        for name, value in given.items():
            known = ", ".join(self.options) or "none"
            reads = f"estimator={self.name} reads {known}{did_you_mean(name, self.options)}"
            require(name in self.options, f"{key}.{name}", value, reads)
            require(self.options[name].allows(value), f"{key}.{name}", value, self.options[name].allowed)
        return {name: given.get(name, option.default) for name, option in self.options.items()}

    def new_statistic(self, options: Mapping[str, Any]) -> Statistic:
        """An empty statistic for one linear; of all `options`, as `values` gives them."""
        assert self.statistic is not None, f"{self.name} needs the ranges of channels alone"
        return cast("Statistic", located(self.statistic)(**{name: options[name] for name in self.gathers}))

    def load_statistic(self, tensors: dict[str, Tensor]) -> Statistic:
        """The statistic that was saved."""
        assert self.statistic is not None, f"{self.name} needs the ranges of channels alone"
        return cast("Statistic", located(self.statistic).of(tensors))

    def range_of(self, observed: Statistic, grid: Grid, options: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """The range of a linear's input, minimum and maximum; of all `options`."""
        assert self.range is not None, f"{self.name} needs the ranges of channels alone"
        return cast("tuple[Tensor, Tensor]", located(self.range)(observed, grid, options))

    def needed(self, options: Mapping[str, Any]) -> Needed:
        """What must be gathered for it, with all `options`: two estimators may share it."""
        if self.statistic is None:
            return RANGES
        return Needed(self.statistic, tuple((name, options[name]) for name in self.gathers))

    def identity(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """What decides the range, for the keys of steps that use it.

        The code is named here because a step finds it through the registry, and imports nothing of it.
        """
        return {"name": self.name, "options": dict(options), "code": [_version(self.statistic), _version(self.range)]}


def _version(place: str | None) -> list[str] | None:
    """A place, and the version of its code."""
    from cushion.code import version_at  # reads the whole package: not needed for --help or a refused configuration

    return None if place is None else [place, version_at(place)]
