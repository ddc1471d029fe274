"""Figures from result.json, fit for a paper: a PNG file, and the same as PDF beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy
from filelock import FileLock

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from cushion.integrity import FIGURES_FOLDER
from cushion.reporting.sizes import every_so_many, legend_columns, panels, set_label, set_text, title, whole_numbers
from cushion.schema import NO_PREFIX

_LINES = (
    ("top1", "top-1", "#b2182b", "-"),
    ("top2", "top-2", "#ef8a62", "--"),
    ("top3", "top-3", "#fdae61", "-."),
    ("top10_percent", "top 10 %", "#4393c3", "-"),
    ("median", "median", "#2166ac", ":"),
)


def figures_of(result: dict[str, Any], folder: Path) -> dict[str, Path]:
    """The figures of the run in `folder`, by name: where they are or will be.

    The map is drawn where the result has one (older ones do not), attention, activation ratios and spike tokens where
    they were measured, QFeM's trade-off where its alpha was searched.
    """
    names = ["activation_curves"]
    names += ["activation_map"] if result["activations"].get("map") else []
    names += ["attention_maps"] if result.get("attention") else []
    names += ["activation_ratios"] if result["activations"].get("sparsity") else []
    names += ["spike_cosines"] if result["activations"].get("spikes") else []
    names += ["qfem_tradeoff"] if alpha_searches(result) else []
    return {name: folder / FIGURES_FOLDER / f"{name}.png" for name in names}


def draw_figures(result: dict[str, Any], folder: Path) -> None:
    """Draw every figure of a run that is not there yet; two processes that ask at once draw it once."""
    figures = figures_of(result, folder)
    if all(path.is_file() for path in figures.values()):
        return
    with FileLock(folder / ".figures.lock"):
        for name, path in figures.items():
            if not path.is_file():
                FIGURES[name](result, path)


def activation_curves(result: dict[str, Any], path: Path, dpi: int = 200, width: str | None = None) -> Path:
    """Magnitude at each block's input over the layers, one panel per prefix (CushionCache, Figure 2).

    Args:
        result: the content of result.json.
        path: the file to write; the name's ending says how: `.png` (with a `.pdf` beside it), `.pdf`, `.svg`.
        dpi: dots per inch.
        width: one of `sizes.WIDTHS`, for a paper; None: as it comes. So in every figure.

    Returns:
        `path`.

    """
    curves: dict[str, dict[str, list[float]]] = result["activations"]["curves"]
    titles = result["activations"]["titles"]
    figure, axes = panels(len(curves), (3.6 * len(curves), 3.3), width, least=1.6)
    for axis, (stage, curve) in zip(axes, curves.items(), strict=True):
        _panel(axis, curve, titles[stage])
        whole_numbers(axis.xaxis, width)
    set_label(figure, axes, "magnitude at block input (log)", width)
    _describe(figure, axes, f"Activation magnitudes, {result['model']['label']}", width)
    return save(figure, path, dpi, width)


def activation_map(result: dict[str, Any], path: Path, dpi: int = 200, width: str | None = None) -> Path:
    """Magnitudes over token positions and channels at one block's input, one panel per prefix (Figure 1).

    All panels share one logarithmic colour scale, which starts at half the median of what is drawn: the few smaller
    magnitudes have its lowest colour, and zero is blank. Each panel names its largest magnitude, with position and
    channel.

    Args:
        result: the content of result.json, of a run that has a map.
        path: the file to write; the name's ending says how: `.png` (with a `.pdf` beside it), `.pdf`, `.svg`.

    Returns:
        `path`.

    """
    drawn, titles = result["activations"]["map"], result["activations"]["titles"]
    stages: dict[str, list[list[float]]] = drawn["values"]
    there = [value for rows in stages.values() for row in rows for value in row if value > 0]
    least, most = (float(numpy.median(there)) / 2, max(there)) if there else (0.1, 1.0)
    scale = LogNorm(least, most)
    figure, axes = panels(len(stages), (3.0 * len(stages) + 0.8, 3.5), width, least=1.6)
    for axis, (stage, rows) in zip(axes, stages.items(), strict=True):
        by_channel = numpy.ma.masked_less_equal(numpy.asarray(rows).T, 0)
        image = axis.imshow(by_channel, norm=scale, cmap="viridis", aspect="auto", interpolation="nearest")
        position, channel = numpy.unravel_index(int(numpy.argmax(rows)), (len(rows), len(drawn["channels"])))
        largest = f"largest {rows[position][channel]:.4g}"
        where = f"at position {position}, channel {drawn['channels'][channel]}"
        lines = (f"{largest} {where}",) if width is None else (largest, where.replace(", ", ",\n"))
        axis.set_title("\n".join((titles[stage], *lines)), fontsize=8)
        axis.set_xlabel("token position")
        whole_numbers(axis.xaxis, width)
    step = every_so_many(len(drawn["channels"]), width)
    channels = [str(channel) for channel in drawn["channels"][::step]]
    axes[0].set_yticks(range(0, len(drawn["channels"]), step), channels, fontsize=7)
    set_label(figure, axes, "channel", width)
    beyond = "min" if there and min(there) < least else "neither"
    figure.colorbar(image, ax=axes, label="|X| (log)", extend=beyond)
    tokens = "first token" if drawn["positions"] == 1 else f"first {drawn['positions']} tokens"
    where = f"Activations at the input of block {drawn['block']}, {result['model']['label']}"
    title(figure, f"{where}\none text, {tokens}", width)
    return save(figure, path, dpi, width)


def qfem_tradeoff(result: dict[str, Any], path: Path, dpi: int = 200, width: str | None = None) -> Path:
    """QFeM's trade-off: linears in full precision against perplexity on calibration text, one panel per prefix.

    Args:
        result: the content of result.json, of a run that searched alpha.
        path: the file to write; the name's ending says how: `.png` (with a `.pdf` beside it), `.pdf`, `.svg`.

    Returns:
        `path`.

    """
    searches, titles = alpha_searches(result), result["activations"]["titles"]
    figure, axes = panels(len(searches), (3.6 * len(searches), 3.3), width, least=1.6)
    for axis, (stage, search) in zip(axes, searches.items(), strict=True):
        points = [point for point in search["points"] if point["perplexity"] is not None]
        kept, values = [point["kept_modules"] for point in points], [point["perplexity"] for point in points]
        axis.plot(kept, values, "o-", color="#2166ac", label="evaluated", linewidth=1.4, markersize=3.5)
        found = search["points"][search["found"]]
        if found["perplexity"] is not None:
            chosen = {"color": "#b2182b", "label": "chosen", "markersize": 11, "clip_on": False, "zorder": 3}
            axis.plot([found["kept_modules"]], [found["perplexity"]], "*", **chosen)
        reference = search["reference_perplexity"]
        axis.axhline(reference, color="0.4", linestyle=":", linewidth=1.2, label="per-token scales")
        axis.axhline(search["target"] * reference, color="0.4", linestyle="--", linewidth=1.2, label="target")
        axis.set_xscale("symlog", linthresh=1)
        axis.set_xlim(-0.15, 1.3 * max(kept, default=1))
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.set_yscale("log")
        axis.set_xlabel("linears kept (log)" if width else "linears in full precision (log)")
        axis.set_title(titles[stage], fontsize=9)
        tidy(axis)
    set_label(figure, axes, "perplexity (log)" if width else "perplexity, calibration text (log)", width)
    _describe(figure, axes, f"QFeM, {result['model']['label']}", width)
    return save(figure, path, dpi, width)


def alpha_searches(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """QFeM's searches for alpha in a result, by stage."""
    kept = result.get("qfem") or {}
    return {stage: record["alpha_search"] for stage, record in kept.items() if record["alpha_search"]}


def _panel(axis: Axes, curve: dict[str, list[float]], title: str) -> None:
    layers = range(len(curve["top1"]))
    for key, label, colour, style in _LINES:
        axis.plot(layers, curve[key], style, color=colour, label=label, linewidth=1.4)
    axis.set_yscale("log")
    axis.set_xlabel("block")
    axis.set_title(title, fontsize=9)
    tidy(axis)


def _describe(figure: Figure, axes: Sequence[Axes], text: str, width: str | None) -> None:
    """A title above the panels, and below them one legend of what is in any of them: of one panel in two lines."""
    parts = [axis.get_legend_handles_labels() for axis in axes]
    labels = {label: handle for handles, names in parts for handle, label in zip(handles, names, strict=True)}
    lines = 2 if len(axes) == 1 else 1
    columns = legend_columns(-(-len(labels) // lines), width)
    figure.legend(
        list(labels.values()), list(labels), loc="outside lower center", ncols=columns, frameon=False, fontsize=8
    )
    title(figure, text, width)


def tidy(axis: Axes) -> None:
    """Thin grid lines, and no frame above and to the right."""
    axis.grid(True, which="major", linewidth=0.4, alpha=0.5)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def attention_maps(result: dict[str, Any], path: Path, dpi: int = 200, width: str | None = None) -> Path:
    """Share of attention per layer and head on the first tokens and on the prefix, before and after (Figure 3).

    Args:
        result: the content of result.json, of a run that measured attention.
        path: the file to write; the name's ending says how: `.png` (with a `.pdf` beside it), `.pdf`, `.svg`.

    Returns:
        `path`.

    """
    attention = result["attention"]
    titles = result["activations"]["titles"]
    maps = [(f"{titles[stage]}:\nfirst {attention['first']} tokens", shares["first"])
              for stage, shares in attention["stages"].items()]  # fmt: skip
    maps += [(f"{titles[stage]}:\nthe prefix", shares["prefix"])
               for stage, shares in attention["stages"].items() if stage != NO_PREFIX]  # fmt: skip
    figure, axes = panels(len(maps), (2.4 * len(maps) + 0.6, 3.4), width, least=1.3)
    for axis, (name, shares) in zip(axes, maps, strict=True):
        image = axis.imshow(shares, vmin=0, vmax=1, cmap="viridis", aspect="auto", origin="lower")
        axis.set_title(name, fontsize=8)
        axis.set_xlabel("head")
        whole_numbers(axis.yaxis, width)
        whole_numbers(axis.xaxis, width)
    set_label(figure, axes, "block", width)
    title(figure, f"Share of attention, {result['model']['label']}", width)
    figure.colorbar(image, ax=axes, label="share")
    return save(figure, path, dpi, width)


def activation_ratios(result: dict[str, Any], path: Path, dpi: int = 200, width: str | None = None) -> Path:
    """Share of active neurons over the layers, one line for each CETT, and for CETT-PPL-p%; one panel per prefix.

    Args:
        result: the content of result.json, of a run that measured activation sparsity.
        path: the file to write; the name's ending says how: `.png` (with a `.pdf` beside it), `.pdf`, `.svg`.

    Returns:
        `path`.

    """
    sparsity = result["activations"]["sparsity"]
    lines = {}
    for stage, found in sparsity["stages"].items():
        lines[stage] = {f"CETT {level['cett']:g}": level["ratios"] for level in found["levels"]}
        if found["within_perplexity"] is not None:
            lines[stage][f"PPL-{sparsity['ppl']:g}%"] = found["within_perplexity"]["ratios"]
    return _by_block(result, lines, ("Share of active neurons", "activation ratio"), path, dpi, width)


def spike_cosines(result: dict[str, Any], path: Path, dpi: int = 200, width: str | None = None) -> Path:
    """Mean cosine between normalised spike tokens over the layers, and between all others, one panel per prefix.

    Blocks with fewer than two spike tokens have no point.

    Args:
        result: the content of result.json, of a run that compared spike tokens.
        path: the file to write; the name's ending says how: `.png` (with a `.pdf` beside it), `.pdf`, `.svg`.

    Returns:
        `path`.

    """
    stages = result["activations"]["spikes"]["stages"]
    lines = {
        stage: {"spike tokens": found["cosines"], "other tokens": found["others"]} for stage, found in stages.items()
    }
    return _by_block(result, lines, ("Tokens behind the norm", "mean cosine"), path, dpi, width)


def _by_block(
    result: dict[str, Any],
    lines: dict[str, dict[str, list[float | None]]],
    words: tuple[str, str],
    path: Path,
    dpi: int,
    width: str | None,
) -> Path:
    """Curves over the layers on one linear axis up to 1, a panel for each stage; `words`: title and axis."""
    figure, axes = panels(len(lines), (3.6 * len(lines), 3.3), width, least=1.6)
    for axis, (stage, curves) in zip(axes, lines.items(), strict=True):
        for label, values in curves.items():
            heights = numpy.array(values, dtype=float)  # None becomes no number, which leaves a gap
            axis.plot(range(len(heights)), heights, "o-", label=label, linewidth=1.4, markersize=2.5)
        axis.set_ylim(top=1.05)
        axis.set_xlabel("block")
        axis.set_title(result["activations"]["titles"][stage], fontsize=9)
        tidy(axis)
        whole_numbers(axis.xaxis, width)
    set_label(figure, axes, words[1], width)
    _describe(figure, axes, f"{words[0]}, {result['model']['label']}", width)
    return save(figure, path, dpi, width)


FIGURES = {
    "activation_curves": activation_curves,
    "activation_map": activation_map,
    "attention_maps": attention_maps,
    "activation_ratios": activation_ratios,
    "spike_cosines": spike_cosines,
    "qfem_tradeoff": qfem_tradeoff,
}
"""Every figure of a run by name, and what draws it."""


def save(figure: Figure, path: Path, dpi: int, width: str | None = None) -> Path:
    """Write a figure in the format that the name ends with, and beside a PNG also a PDF; returns `path`.

    In one for a paper, of a `width`, all text is of one size.

    A file appears whole, so that a reader never finds half of one; the PDF comes first, so that none is missing beside
    a PNG.
    """
    set_text(figure, width)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = [path.with_suffix(".pdf")] if path.suffix == ".png" else []
    for target in (*beside, path):
        temporary = target.with_name(f".{target.name}")
        with pyplot.rc_context({"pdf.fonttype": TRUETYPE}):
            figure.savefig(
                temporary, dpi=dpi, format=target.suffix.removeprefix("."), metadata=_UNDATED.get(target.suffix)
            )
        temporary.replace(target)
    pyplot.close(figure)
    return path


TRUETYPE = 42
"""The letters of a PDF: Type 3 fonts, matplotlib's own choice, are refused by many publishers."""

_UNDATED = {".pdf": {"CreationDate": None}}
"""The same figure is the same file."""
