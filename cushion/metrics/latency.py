"""Latency: seconds to the first token and for each further one, throughput and memory, beside full precision.

| column | content |
|---|---|
| `time_to_first_token/<size>`, `time_per_output_token/<size>` | milliseconds, medians over the rounds, with `eval.latency`; a size is `<batch>x<prompt length>` ([execution.md](execution.md#latency)) |
| `..._spread/<size>`, `..._full_precision/<size>`, `..._ratio/<size>` | of each of the two: the distance of its quartiles; the median of full precision without a prefix in the same rounds (with smoothing or a rotation, before them); the median over the rounds of their ratio |
| `prefill_throughput/<size>`, `decode_throughput/<size>` | tokens per second, of prompts and of what follows |
| `peak_memory/<size>` | MiB on the GPUs, weights included, at the worst moment; null on a CPU, where torch does not count |
| `weight_memory`, `weight_memory_full_precision` | MiB of all weights of the row's model, and of the full-precision one |
"""  # noqa: E501

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace

from cushion.metrics.columns import Column, Metric, Place, Row, Values, parts, register

_MILLISECONDS, _MEBIBYTE = 1e3, 2.0**20
_PLACES = frozenset({Place.FURTHER, Place.REPORT, Place.TRACKER_TABLE, Place.TRACKER_ROW, Place.RUN})
_BESIDE = _PLACES - {Place.FURTHER}

_FIRST, _FOLLOWING = "time_to_first_token", "time_per_output_token"
_TIMES = {_FIRST: "first token", _FOLLOWING: "further token"}


def _times(key: str, title: str) -> list[Column]:
    return [
        Column(key, f"{title}, ms", lower_is_better=True, places=_PLACES),
        Column(f"{key}_spread", f"{title}, spread, ms", lower_is_better=True, places=_PLACES),
        Column(f"{key}_full_precision", f"{title}, full precision, ms", places=_PLACES),
        Column(f"{key}_ratio", f"{title}, ratio", lower_is_better=True, places=_PLACES),
    ]


def _whole(value: float) -> str:
    return f"{value:.0f}"


_COLUMNS = [
    *(column for key, title in _TIMES.items() for column in _times(key, title)),
    Column("prefill_throughput", "prefill, tokens/s", format=_whole, lower_is_better=False, places=_PLACES),
    Column("decode_throughput", "decode, tokens/s", format=_whole, lower_is_better=False, places=_PLACES),
    Column("peak_memory", "peak memory, MiB", format=_whole, lower_is_better=True, places=_PLACES),
]
"""Of every pair of batch size and prompt length; in `values` it stands behind the key: `/1x512`."""
_WEIGHTS = [
    Column("weight_memory", "weights, MiB", format=_whole, lower_is_better=True, places=_PLACES),
    Column("weight_memory_full_precision", "weights, full precision, MiB", format=_whole, places=_BESIDE),
]


def size_name(batch: int, length: int) -> str:
    """What stands behind a column's key: `1x512`."""
    return f"{batch}x{length}"


def latency_values(
    batch: int, length: int, own: Sequence[tuple[float, float]], full: Sequence[tuple[float, float]], peak: int | None
) -> Values:
    """The values of one batch size and prompt length.

    Args:
        own: of every round seconds to the first token, and for each further one.
        full: the same of the full-precision model without a prefix, in the same rounds.
        peak: bytes at the worst moment, None where it is not known.

    """
    size, found = size_name(batch, length), Values()
    for index, key in enumerate(_TIMES):
        times, others = [one[index] for one in own], [one[index] for one in full]
        low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
        found[f"{key}/{size}"] = middle * _MILLISECONDS
        found[f"{key}_spread/{size}"] = (high - low) * _MILLISECONDS
        found[f"{key}_full_precision/{size}"] = statistics.median(others) * _MILLISECONDS
        ratios = [time / other for time, other in zip(times, others, strict=True)]
        found[f"{key}_ratio/{size}"] = statistics.median(ratios)
    first, following = (statistics.median(one[index] for one in own) for index in range(2))
    found[f"prefill_throughput/{size}"] = batch * length / first
    found[f"decode_throughput/{size}"] = batch / following
    found[f"peak_memory/{size}"] = None if peak is None else peak / _MEBIBYTE
    return found


def memory_values(own: int, full: int) -> Values:
    """Bytes of the weights of a row's model, and of the full-precision one."""
    return {key.key: value / _MEBIBYTE for key, value in zip(_WEIGHTS, (own, full), strict=True)}


def _columns(rows: Sequence[Row]) -> list[Column]:
    sizes = list(dict.fromkeys(size for row in rows for size in parts(row, _FIRST)))
    if not sizes:
        return []
    found = []
    for size in sizes:
        batch, _, length = size.partition("x")
        heading = f"latency, batch {batch}, prompt {length}"
        for column in _COLUMNS:
            key = f"{column.key}/{size}"
            if any(row["values"].get(key) is not None for row in rows):
                titles = dict.fromkeys((Place.REPORT, Place.TRACKER_TABLE), f"{column.title}, {size}")
                found.append(replace(column, key=key, table=heading, titles=titles))
    return [*found, *(replace(column, table="weights") for column in _WEIGHTS)]


register(Metric("latency", _columns, order=70, measure="cushion.evaluation.latency_step:measure"))
