"""Trade-off curves of an experiment: perplexity against the number it sweeps, and against the cost of its searches."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import pyplot

from cushion.metrics.perplexity import corpora, key_of
from cushion.reporting.collect import Run
from cushion.reporting.figures import save, tidy
from cushion.reporting.lines import grouped
from cushion.reporting.lines import value_of as setting
from cushion.reporting.runs import varying
from cushion.reporting.sizes import broken, inches
from cushion.schema import FOUND, NO_PREFIX, STAGES, TUNED, is_frozen

NumberedRun = tuple[int, Run]
"""A run, and its number (from 1) in the table of runs."""

STAGE_TITLES = {NO_PREFIX: "no prefix", FOUND: "found prefix", TUNED: "tuned prefix"}
_LINES = {NO_PREFIX: ":", FOUND: "--", TUNED: "-"}
_LOGARITHMIC_FROM = 30.0
_COLOURS = pyplot.get_cmap("tab10").colors  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Point:
    """One configuration: means over its seeds, and standard deviations (n - 1), which a single seed does not have."""

    x: float
    perplexity: float
    x_deviation: float | None
    deviation: float | None
    label: str
    seeds: str = ""
    """`2 of 3`, where fewer seeds have the point than the configuration was run with, failed ones included."""


@dataclass(frozen=True)
class Tradeoff:
    """The points by stage and by what else tells the runs apart, ascending in x."""

    kind: str
    """`tradeoff` or `cost`."""
    axis: str
    corpus: str
    series: dict[tuple[str, str], list[Point]]
    runs: tuple[int, ...]

    @property
    def is_wide(self) -> tuple[bool, bool]:
        """Whether the axes are logarithmic: across and up."""
        every = [point for points in self.series.values() for point in points]
        across, up = [point.x for point in every], [point.perplexity for point in every]
        return is_wide(across, _LOGARITHMIC_FROM), is_wide(up, _LOGARITHMIC_FROM)

    @property
    def scale(self) -> str:
        """What a caption says of the axes; nothing where both are linear."""
        names = [name for name, wide in zip((self.axis, "perplexity"), self.is_wide, strict=True) if wide]
        return f"logarithmic in {' and '.join(names)}" if names else ""


def tradeoffs(runs: Sequence[NumberedRun]) -> Iterator[Tradeoff]:
    """The trade-offs in the runs of one experiment on one model, over the first corpus of their perplexities.

    Against a key of the configuration where it is the only one that has numbers, three or more of them; against the
    tokens that a search ran through the model where the runs differ in their search.
    """
    done = [(number, run) for number, run in runs if run.completed]
    measured = corpora([row for _, run in done for row in run.record["rows"]])
    if not measured:
        return
    corpus = measured[0]
    there = [run for _, run in done if any(key_of(corpus) in row["values"] for row in run.record["rows"])]
    keys = [key for key in varying(there) if not key.endswith("seed")]
    swept = [key for key in keys if _is_swept([setting(run, key) for run in there])]
    if len(swept) == 1:
        others = [key for key in keys if key not in swept]
        yield from _tradeoff("tradeoff", swept[0], corpus, runs, lambda run: setting(run, swept[0]), others, swept)
    of_search = [key for key in keys if key.startswith("search.")]
    if of_search:
        others = [key for key in keys if key not in of_search]
        yield from _tradeoff("cost", "token-forwards of the search", corpus, runs, _token_forwards, others, of_search)


def _is_swept(values: Sequence[Any]) -> bool:
    numbers = [value for value in values if isinstance(value, (int, float)) and not isinstance(value, bool)]
    return len(numbers) == len(values) and len(set(numbers)) >= 3


def _token_forwards(run: Run) -> float | None:
    return (run.record.get("search") or {}).get("token_forwards")


def _tradeoff(
    kind: str,
    axis: str,
    corpus: str,
    runs: Sequence[NumberedRun],
    x_of: Callable[[Run], float | None],
    apart: Sequence[str],
    labels: Sequence[str],
) -> Iterator[Tradeoff]:
    """One trade-off, or none where its points have fewer than two different x, or no run has a prefix.

    Of failed runs only the seeds count.
    """
    series: dict[tuple[str, str], list[Point]] = {}
    drawn: set[int] = set()
    for seeds in grouped(runs, lambda numbered: numbered[1].identity("seed")):
        for stage in STAGES if kind == "tradeoff" else (FOUND, TUNED):
            measured = [
                (number, float(x), perplexity)
                for number, run in seeds
                if run.completed
                and (x := x_of(run)) is not None
                and (perplexity := _perplexity(run, stage, corpus)) is not None
            ]
            if not measured:
                continue
            numbers, xs, perplexities = zip(*measured, strict=True)
            first = seeds[0][1]
            lost = f"{len(measured)} of {len(seeds)}" if len(measured) < len(seeds) else ""
            point = Point(*_mean(xs, perplexities), described(first, labels), lost)
            series.setdefault((stage, described(first, apart)), []).append(point)
            drawn |= set(numbers)
    for points in series.values():
        points.sort(key=lambda point: point.x)
    with_prefix = any(stage != NO_PREFIX for stage, _ in series)
    if with_prefix and len({point.x for points in series.values() for point in points}) > 1:
        in_order = sorted(series.items(), key=lambda item: (STAGES.index(item[0][0]), item[0][1]))
        yield Tradeoff(kind, axis, corpus, dict(in_order), tuple(sorted(drawn)))


def _mean(xs: Sequence[float], perplexities: Sequence[float]) -> tuple[float, float, float | None, float | None]:
    several = len(xs) > 1
    return (
        statistics.fmean(xs),
        statistics.fmean(perplexities),
        statistics.stdev(xs) if several else None,
        statistics.stdev(perplexities) if several else None,
    )


def _perplexity(run: Run, stage: str, corpus: str) -> float | None:
    """Of the row with this stage's prefix: the quantized one, unless the run quantizes nothing.

    A search that found nothing ended without a prefix, so that row counts as what it found.
    """
    rows = [row for row in run.record["rows"] if is_frozen(row)]
    quantized = any(row["quantized"] for row in rows)
    if stage == FOUND and _found_nothing(run):
        stage = NO_PREFIX
    key = key_of(corpus)
    values = [row["values"].get(key) for row in rows if (row["stage"], row["quantized"]) == (stage, quantized)]
    return values[0] if values else None


def _found_nothing(run: Run) -> bool:
    searched = setting(run, "search.method") or setting(run, "search.name") or "none"
    return searched != "none" and all(row["stage"] == NO_PREFIX for row in run.record["rows"])


def described(run: Run, keys: Sequence[str]) -> str:
    """The values that a run has for some keys of its configuration; an option by its name alone."""
    parts = [(key, setting(run, key)) for key in keys]
    return ", ".join(str(value) if key.endswith(".name") else f"{key}={value}" for key, value in parts)


def draw_tradeoff(tradeoff: Tradeoff, path: Path, dpi: int, width: str | None = None) -> Path:
    """Draw the points with bars of their deviations; logarithmic over wide spans.

    No prefix is dotted, found dashed, and tuned solid; a point of fewer seeds than were run says of how many.
    `width` is one of `sizes.WIDTHS`, for a paper.
    """
    figure, axis = pyplot.subplots(figsize=inches(width, (5.4, 3.4)), layout="constrained")
    settings = list(dict.fromkeys(apart for _, apart in tradeoff.series))
    for (stage, apart), points in tradeoff.series.items():
        line = _LINES[stage] if tradeoff.kind == "tradeoff" else ""
        axis.errorbar(
            [point.x for point in points],
            [point.perplexity for point in points],
            xerr=_bars([point.x_deviation for point in points]),
            yerr=_bars([point.deviation for point in points]),
            fmt=f"o{line}",
            color=_COLOURS[settings.index(apart) % len(_COLOURS)],
            markerfacecolor=None if stage == TUNED else "white",
            markersize=4.5,
            linewidth=1.4,
            capsize=2.5,
            label=broken(", ".join(filter(None, (STAGE_TITLES[stage], apart))), width, column=45).replace("$", r"\$"),
        )
        for point in points:
            words = [point.label] if tradeoff.kind == "cost" else []
            if text := ", ".join(filter(None, (*words, point.seeds))).replace("$", r"\$"):
                at = (point.x, point.perplexity)
                axis.annotate(text, at, textcoords="offset points", xytext=(4, 4), fontsize=6)
    wide_x, wide_y = tradeoff.is_wide
    if wide_x:
        axis.set_xscale("log")
    if wide_y:
        axis.set_yscale("log")
    axis.set_xlabel(f"{tradeoff.axis} (log)" if wide_x else tradeoff.axis)
    axis.set_ylabel(f"perplexity {tradeoff.corpus}{' (log)' if wide_y else ''}".replace("$", r"\$"))
    tidy(axis)
    figure.legend(loc="outside lower center", frameon=False, fontsize=7, ncols=1 if width == "column" else 2)
    return save(figure, path, dpi, width)


def _bars(deviations: Sequence[float | None]) -> list[float] | None:
    return [deviation or 0.0 for deviation in deviations] if any(deviations) else None


def is_wide(values: Sequence[float], factor: float) -> bool:
    """Whether positive values span more than a factor: they are drawn on a logarithmic axis."""
    return min(values) > 0 and max(values) / min(values) > factor
