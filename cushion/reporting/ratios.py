"""The figure that compares methods: each configuration's ratio to full precision with the same prefix, by prefix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib import pyplot

from cushion.metrics.columns import Column, Place, columns
from cushion.reporting.comparisons import measured
from cushion.reporting.figures import save, tidy
from cushion.reporting.lines import grouped, place
from cushion.reporting.measures import measure_of
from cushion.reporting.runs import varying
from cushion.reporting.sizes import WIDTHS, broken, legend_columns
from cushion.reporting.tradeoffs import STAGE_TITLES, NumberedRun, described, is_wide
from cushion.schema import FOUND, NO_PREFIX, STAGES, TUNED, is_frozen

_MARKS = {NO_PREFIX: ("o", "#b2182b"), FOUND: ("s", "#4393c3"), TUNED: ("D", "#2166ac")}
_LOGARITHMIC_FROM = 3.0


@dataclass(frozen=True)
class Ratio:
    """A configuration with the prefix of a stage: its ratio, and the ends of the 95 % interval where it has one."""

    label: str
    stage: str
    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Comparison:
    """The ratios of one experiment on one model, in ascending order of what their runs differ in."""

    title: str
    ratios: tuple[Ratio, ...]
    runs: tuple[int, ...]

    @property
    def scale(self) -> str:
        """What a caption says of the axis; nothing where it is linear."""
        return "logarithmic axis" if self.is_wide else ""

    @property
    def is_wide(self) -> bool:
        """Whether the axis is logarithmic."""
        return is_wide([ratio.value for ratio in self.ratios], _LOGARITHMIC_FROM)


def compared(runs: Sequence[NumberedRun]) -> Comparison | None:
    """The ratios of the runs of one experiment on one model over the first corpus that has any.

    None where fewer than two configurations have one: a comparison needs two.
    """
    done = [(number, run) for number, run in runs if run.completed]
    column = _ratio([row for _, run in done for row in run.record["rows"]])
    if column is None:
        return None
    there = [(number, run) for number, run in done if any(column.shown(row) is not None for row in run.record["rows"])]
    keys = [key for key in varying(run for _, run in there) if not key.endswith("seed")]
    found, numbers = [], set()
    groups = grouped(done, lambda numbered: numbered[1].identity("seed"))
    for seeds in sorted(groups, key=lambda group: place(group[0][1], keys)):
        label = described(seeds[0][1], keys) or seeds[0][1].model
        for stage in STAGES:
            same = [
                (run, row)
                for _, run in seeds
                for row in run.record["rows"]
                if row["stage"] == stage and row["quantized"] and is_frozen(row) and column.shown(row) is not None
            ]
            if same:
                cell = measured(measure_of(column), same, len(seeds))
                assert cell.value is not None
                found.append(Ratio(label, stage, cell.value, cell.low, cell.high))
                numbers |= {number for number, _ in seeds}
    if len({ratio.label for ratio in found}) < 2:
        return None
    return Comparison(column.title, tuple(found), tuple(sorted(numbers)))


def _ratio(rows: Sequence[dict[str, object]]) -> Column | None:
    """The first column that compares with full precision as a ratio."""
    ratios = (column for column in columns(rows, Place.REPORT) if column.neutral == 1.0)
    return next(ratios, None)


def draw_comparison(comparison: Comparison, path: Path, dpi: int, width: str | None = None) -> Path:
    """Draw a line for each configuration and a mark for each prefix, with its interval; the dotted line is no loss.

    `width` is one of `sizes.WIDTHS`, for a paper.
    """
    labels = list(dict.fromkeys(ratio.label for ratio in comparison.ratios))
    written = [broken(label, width).replace("$", r"\$") for label in labels]
    lines = max(text.count("\n") for text in written) + 1
    size = (6.4 if width is None else WIDTHS[width], 1.3 + (0.17 + 0.15 * lines) * len(labels))
    figure, axis = pyplot.subplots(figsize=size, layout="constrained")
    for step, stage in enumerate(STAGES):
        ratios = [ratio for ratio in comparison.ratios if ratio.stage == stage]
        if not ratios:
            continue
        mark, colour = _MARKS[stage]
        bars = [
            [ratio.value - (ratio.value if ratio.low is None else ratio.low) for ratio in ratios],
            [(ratio.value if ratio.high is None else ratio.high) - ratio.value for ratio in ratios],
        ]
        axis.errorbar(
            [ratio.value for ratio in ratios],
            [labels.index(ratio.label) + 0.18 * (step - 1) for ratio in ratios],
            xerr=bars,
            fmt=mark,
            color=colour,
            markersize=4.5,
            capsize=2.0,
            linewidth=1.2,
            label=STAGE_TITLES[stage],
        )
    wide = comparison.is_wide
    if wide:
        axis.set_xscale("log")
    axis.axvline(1.0, color="0.4", linestyle=":", linewidth=1.2)
    axis.set_yticks(range(len(labels)), written, fontsize=8)
    axis.set_ylim(len(labels) - 0.5, -0.5)
    axis.set_xlabel(broken(f"{comparison.title}{' (log)' if wide else ''}", width, column=28, page=60), fontsize=8)
    tidy(axis)
    figure.legend(loc="outside lower center", ncols=legend_columns(len(STAGES), width), frameon=False, fontsize=8)
    return save(figure, path, dpi, width)
