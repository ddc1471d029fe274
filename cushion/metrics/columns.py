"""Columns of the comparison, and the registry of the metrics that declare them.

Tables, reports, CSV files and trackers loop over the columns and name no metric. A row of result.json holds its numbers
in `values`, by the columns' keys.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING, Any

from cushion.intervals import Interval
from cushion.registry import PLUGINS, Registry

if TYPE_CHECKING:  # columns are read without importing torch
    from torch import Tensor

    from cushion.config import EvalConfig
    from cushion.quantization.lazily import QuantizedLazily
    from cushion.step import Context

Row = Mapping[str, Any]
"""A row of result.json, as plain JSON."""

Result = Mapping[str, Any]
"""The content of a result.json, as plain JSON."""

Values = dict[str, float | None]
"""Numbers by the key of their column; None where a number was not measured or is not finite."""


class Place(Enum):
    """Where a column can stand."""

    COMPARISON = auto()
    """The table that a run prints."""
    FURTHER = auto()
    """A further table that a run prints: that of `Column.table`."""
    REPORT = auto()
    """The table of an experiment's runs, in all its formats."""
    TRACKER_TABLE = auto()
    """A tracker's table of the rows."""
    TRACKER_ROW = auto()
    """A tracker's final numbers, of every row, as `<key>/<name of the row>`."""
    RUN = auto()
    """The run's own numbers: those of its last row in `metrics` of result.json, and in a tracker as `<key>`."""

    SWEEP = auto()
    """The table that closes a sweep: of each run its last row."""

    PUBLISHED = auto()
    """A published table, beside our number that the column compares with full precision."""


EVERYWHERE = frozenset(Place) - {Place.FURTHER, Place.PUBLISHED}


def ordinary(value: float) -> str:
    """Two decimals, or three digits where the number is huge."""
    return f"{value:.2f}" if abs(value) < 1e5 else f"{value:.3g}"


@dataclass(frozen=True)
class Column:
    """A number of every row: its key in `values`, and how it is shown.

    `unit` is shown behind the title in reports; a value in `%` is kept as a fraction of one, and shown times 100.
    `error` is the key of its standard error, in the same unit. `titles` and `formats` say where it is called or written
    otherwise than by `title` (for the keys of a tracker: by `key`) and `format`.

    A column that compares a row with its baseline has the value of no difference as `neutral`, the keys of the ends of
    its 95 % interval as `interval`, and in `over_seeds` the same over the rows of results that differ in their seed
    alone (or of one result), in the unit of `values`; None where they do not hold what it takes. `compares` is the key
    of the column that it compares: with the place `PUBLISHED` it stands beside that one in published tables.
    """

    key: str
    title: str
    unit: str = ""
    format: Callable[[float], str] = ordinary
    lower_is_better: bool | None = None
    error: str | None = None
    places: frozenset[Place] = EVERYWHERE
    table: str | None = None
    """The first heading of the further table that it stands in."""
    titles: Mapping[Place, str] = field(default_factory=dict)
    formats: Mapping[Place, Callable[[float], str]] = field(default_factory=dict)
    compares: str | None = None
    neutral: float | None = None
    interval: tuple[str, str] | None = None
    over_seeds: Callable[[Sequence[tuple[Result, Row]]], Interval | None] | None = None
    note: str = ""
    """What a table that is printed says of it below."""

    def named(self, place: Place) -> str:
        """What the column is called in a place."""
        if place in self.titles:
            return self.titles[place]
        if place in (Place.TRACKER_ROW, Place.RUN):
            return self.key
        return f"{self.title}, {self.unit}" if self.unit and place is Place.REPORT else self.title

    def written(self, place: Place) -> Callable[[float], str]:
        """How a shown value is written in a place."""
        return self.formats.get(place, self.format)

    def shown(self, row: Row) -> float | None:
        """The value of a row in the column's unit."""
        return self._in_unit(row["values"].get(self.key))

    def shown_error(self, row: Row) -> float | None:
        """The standard error of a row's value in the column's unit."""
        return None if self.error is None else self._in_unit(row["values"].get(self.error))

    def shown_interval(self, row: Row) -> tuple[float, float] | None:
        """The ends of the interval of a row's value in the column's unit."""
        if self.interval is None:
            return None
        low, high = (self._in_unit(row["values"].get(key)) for key in self.interval)
        return None if low is None or high is None else (low, high)

    def in_unit(self, interval: Interval) -> Interval:
        """An interval of `over_seeds` in the column's unit."""
        scale = 100.0 if self.unit == "%" else 1.0
        value, stderr = scale * interval.value, scale * interval.stderr
        return Interval(value, stderr, scale * interval.low, scale * interval.high, interval.p)

    def _in_unit(self, value: float | None) -> float | None:
        return 100.0 * value if value is not None and self.unit == "%" else value


@dataclass(frozen=True)
class Losses:
    """What a perplexity is the mean of: by batch of blocks, the summed loss in nats, and the tokens predicted."""

    nats: Sequence[float]
    tokens: Sequence[int]


@dataclass(frozen=True)
class Measured:
    """What was found on one row, before it stands in columns.

    `perplexity` by corpus; `tasks` by task the fields of `evaluation.task_scores.TaskScore`; `accuracy` the mean over
    the tasks and its standard error, None without any; `seconds` all that the row cost. `magnitudes` are the fields of
    the row's `MagnitudeCurve`, each by block; `worst_block` is the number of the block whose top-1 is largest without a
    prefix.
    """

    perplexity: Mapping[str, float]
    tasks: Mapping[str, Mapping[str, Any]]
    accuracy: tuple[float, float | None] | None
    largest_activation: float
    quantization_error: float
    seconds: float
    further: Mapping[str, Values] = field(default_factory=dict)
    """By name of the metric, what its own `measure` gave."""
    magnitudes: Mapping[str, Sequence[float]] = field(default_factory=dict)
    worst_block: int = 0
    losses: Mapping[str, Losses] = field(default_factory=dict)
    """By corpus."""
    records: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """By single task, its metric on each record; empty where its score is no mean of these."""
    shares: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """By task or group with a score, what each single task counts for in it; they add up to one."""
    in_mean: Sequence[str] = ()
    """The tasks and groups that `accuracy` is the mean of."""
    attention: Mapping[str, Any] = field(default_factory=dict)
    """The fields of `evaluation.attention.AttentionShares` behind the row's prefix; empty where it was not measured."""
    ceiling: Measured | None = None
    """Full precision with the same prefix, which the row is compared with; None where it is that, or has none."""


@dataclass(frozen=True)
class RowContext:
    """What a metric measures a row with.

    Args:
        cached: with the model; what `cushion.step.compute` needs.
        model: the row's prefix and quantizer; `put_on` puts the latter on the model.
        config: how rows are measured.
        blocks: by corpus, token ids, (blocks, block length), or one more with BOS in front.
        bos: whether the blocks begin with BOS.

    """

    cached: Context
    model: QuantizedLazily
    config: EvalConfig
    blocks: Mapping[str, Tensor]
    bos: bool = False


def _nothing(_: Measured) -> Values:
    return {}


@dataclass(frozen=True)
class Metric:
    """A kind of number: which columns rows have of it, and the values in them.

    `columns` are those of several rows that are shown together; `values` takes them from what was found on a row;
    `measures` are the columns that a published table can name, by the name, where the values of a key with parts (a
    perplexity has corpora) are those below it. A metric that runs the model itself names, as `module:attribute`, what
    does: `measure`, from a `RowContext` to values; its work belongs into a cached step. Metrics stand in ascending
    `order`.
    """

    name: str
    columns: Callable[[Sequence[Row]], list[Column]]
    values: Callable[[Measured], Values] = _nothing
    measures: Mapping[str, Column] = field(default_factory=dict)
    order: int = 50
    measure: str | None = None


METRICS: Registry[Metric] = Registry("metrics", __package__, PLUGINS)
"""Every metric by name: those that this folder's files register, and those of plugins."""


def register(metric: Metric) -> None:
    """Make a metric known under its name.

    Raises:
        ConfigError: there is one of this name.

    """
    METRICS.register(metric.name, metric)


def metrics() -> list[Metric]:
    """Every metric, in order."""
    return sorted((metric for _, metric in METRICS.items()), key=lambda metric: (metric.order, metric.name))


def comparing(row: Row, key: str) -> Column | None:
    """The column that compares what a row has under a key with full precision, for a published table; None without."""
    return next((column for column in columns([row], Place.PUBLISHED) if column.compares == key), None)


def columns(rows: Sequence[Row], place: Place) -> list[Column]:
    """The columns that some rows have in a place, in order."""
    return [column for metric in metrics() for column in metric.columns(rows) if place in column.places]


def row_values(measured: Measured) -> Values:
    """The values of a row, of all metrics, from what was found on it."""
    found: Values = {}
    for metric in metrics():
        found |= metric.values(measured)
        found |= measured.further.get(metric.name, {})
    return found


def parts(row: Row, key: str) -> dict[str, float | None]:
    """The values of a row below a key, by what follows it: `perplexity` has one for each corpus."""
    start = f"{key}/"
    return {name.removeprefix(start): value for name, value in row["values"].items() if name.startswith(start)}
