"""Perplexity over that of full precision with the same prefix in the same run, with a paired interval over blocks.

## Ratios, differences and their errors

The **ceiling** of a row is the full-precision row of the same run behind the very same prefix (by the fingerprint of
its keys and values). What a quantizer costs is

    ratio = perplexity of the row / perplexity of its ceiling
    difference = accuracy of the row - accuracy of its ceiling

A row is never divided by a number of another run.

**Ratio.** Row and ceiling are measured on the same blocks, so their losses are paired. With D_b the difference of
their summed losses on block b in nats and n_b its predicted tokens, the log ratio is r = sum D_b / sum n_b. It is the
mean of the B values y_b = r + B (D_b - r n_b) / sum n (the linearization of a ratio estimator: Cochran, *Sampling
Techniques*, 1977, chapter 6). The 95 % interval is the t interval of that mean with B - 1 degrees of freedom,
exponentiated. With `eval.batch_size` above 1, batches take the place of blocks; there is none with a single one.
Blocks of one article are taken as independent, so the interval may be too narrow where articles span many blocks. It
says what other text of the same kind would give, on this model, with this prefix.

**Difference.** Row and ceiling answer the same records. The interval is a percentile bootstrap (Efron and Tibshirani,
*An Introduction to the Bootstrap*, 1993, chapter 13) of the paired differences, 10,000 resamples of the records
within each task, with a fixed seed; groups and the mean are resampled through their tasks. The two-sided p-value is
twice the share of resamples on the rarer side of 0, at least one in 10,000.

Over several seeds: [reports.md](reports.md#over-seeds).

| column | content |
|---|---|
| `ratio/<corpus>` | perplexity over that of the row's ceiling ([method.md](method.md#ratios-differences-and-their-errors)); only in rows that have one |
| `ratio_stderr/<corpus>`, `ratio_low/<corpus>`, `ratio_high/<corpus>` | its standard error and its paired 95 % interval over the blocks; null with fewer than two |
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from cushion.intervals import Interval, linearized, over_blocks
from cushion.metrics.columns import (
    EVERYWHERE,
    Column,
    Losses,
    Measured,
    Metric,
    Place,
    Result,
    Row,
    Values,
    ordinary,
    parts,
    register,
)
from cushion.metrics.perplexity import key_of as perplexity_of
from cushion.schema import measured_with

KEY = "ratio"
TITLE = "ratio to full precision with the same prefix"
_NOTE = (
    "ratio: perplexity over that of full precision with the same prefix, with its 95 % interval over paired blocks of "
    "text; within error: the interval holds 1"
)
_TRACKER = frozenset({Place.TRACKER_TABLE, Place.RUN})


def _written(value: float) -> str:
    return f"{value:.3f}" if value < 100 else ordinary(value)


def _key(what: str, corpus: str) -> str:
    return f"{KEY}{what}/{corpus}"


def _column(corpus: str) -> Column:
    return Column(
        _key("", corpus),
        f"{TITLE}, {corpus}",
        format=_written,
        lower_is_better=True,
        error=_key("_stderr", corpus),
        places=EVERYWHERE | {Place.PUBLISHED},
        titles={
            **dict.fromkeys((Place.COMPARISON, Place.SWEEP, Place.TRACKER_TABLE), f"{KEY} {corpus}"),
            Place.PUBLISHED: KEY,
        },
        compares=perplexity_of(corpus),
        neutral=1.0,
        interval=(_key("_low", corpus), _key("_high", corpus)),
        over_seeds=partial(_over_seeds, corpus),
        note=_NOTE,
    )


def _columns(rows: Sequence[Row]) -> list[Column]:
    corpora = dict.fromkeys(corpus for row in rows for corpus, value in parts(row, KEY).items() if value is not None)
    ends = ("_stderr", "_low", "_high")
    return [
        column
        for corpus in corpora
        for column in (
            _column(corpus),
            *(Column(_key(end, corpus), f"{KEY}{end} {corpus}", format=_written, places=_TRACKER) for end in ends),
        )
    ]


def _values(measured: Measured) -> Values:
    if measured.ceiling is None:
        return {}
    found: Values = {}
    for corpus, value in measured.perplexity.items():
        found[_key("", corpus)] = value / measured.ceiling.perplexity[corpus]
        interval = _interval([(measured.losses[corpus], measured.ceiling.losses[corpus])])
        for end in ("stderr", "low", "high"):
            found[_key(f"_{end}", corpus)] = None if interval is None else getattr(interval, end)
    return found


def _interval(pairs: Sequence[tuple[Losses, Losses]]) -> Interval | None:
    """The ratio over one run, or over several of different seeds, each with the losses of its own full precision.

    None with fewer than two blocks, if it overflows, or where blocks of different runs predict different numbers of
    tokens: they are then not of the same text (as with `eval.prefix_in_block` and prefixes of different lengths).
    """
    if len({tuple(losses.tokens) for pair in pairs for losses in pair}) != 1:
        return None
    found = over_blocks([linearized(mine.nats, ceiling.nats, mine.tokens) for mine, ceiling in pairs])
    return None if found is None else found.exponentiated()


def _over_seeds(corpus: str, rows: Sequence[tuple[Result, Row]]) -> Interval | None:
    """Of rows with their results: the geometric mean of the ratios over the seeds.

    None where they were measured on other texts, or with other weights.
    """
    first, *others = (measured_with(result) for result, _ in rows)
    if any(other != first for other in others):
        return None
    pairs = []
    for result, row in rows:
        evaluation: Mapping[str, Any] = result.get("evaluation") or {}
        losses: Mapping[str, Any] = evaluation.get("losses") or {}
        ceiling = (evaluation.get("ceilings") or {}).get(row["name"])
        if ceiling is None or not all(corpus in losses.get(name, {}) for name in (row["name"], ceiling)):
            return None
        pairs.append((Losses(**losses[row["name"]][corpus]), Losses(**losses[ceiling][corpus])))
    return _interval(pairs)


register(Metric(KEY, _columns, _values, {KEY: Column(KEY, TITLE, format=_written, lower_is_better=True)}, order=15))
