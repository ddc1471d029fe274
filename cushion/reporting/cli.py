"""The command `cushion-report`: from result.json files to Markdown, LaTeX, CSV and one HTML page."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import cushion
from cushion import system_errors
from cushion.errors import ArtifactError, did_you_mean
from cushion.reporting.collect import Run, collect
from cushion.reporting.frame import frame_of
from cushion.reporting.grid import Table, comma_separated, escape_markdown, folded, latex, markdown
from cushion.reporting.page import html
from cushion.reporting.plots import Drawing, draw_all
from cushion.reporting.published import compare, load_published, published_folder, published_names
from cushion.reporting.runs import experiment_table, provenance_table
from cushion.reporting.settings import numbered
from cushion.reporting.sizes import WIDTHS
from cushion.reporting.status import without_result

WRITTEN = "files.txt"
"""In a report's folder: the files of which the next report there removes those that it does not write again."""
_PER_REPORT = ("figures/*.png", "figures/*.pdf", "published/*.csv", "runs/*.csv", "tables/*.tex")


def write_report(
    folders: Sequence[Path],
    output: Path,
    experiments: Sequence[str] = (),
    title: str = "Cushion",
    width: str | None = None,
) -> list[Path]:
    """Read every result under `folders` and write the report; returns the files written, the page first.

    Args:
        folders: folders of results, searched with all that is inside them.
        output: where the report goes.
        experiments: only these; empty means all.
        title: heading of the report.
        width: of the figures, one of `sizes.WIDTHS`, for a paper; None: as they come.

    Raises:
        ArtifactError: no results, damaged ones, none of an experiment asked for, damaged published numbers, or the
            report cannot be written.

    """
    runs = collect(folders)
    absent = without_result(*folders)
    by_experiment: dict[str, list[Run]] = {}
    for run in runs:
        by_experiment.setdefault(run.experiment, []).append(run)
    for state in absent:
        by_experiment.setdefault(state.experiment, [])
    by_experiment = _chosen(by_experiment, experiments)
    runs = [run for run in runs if run.experiment in by_experiment]
    absent = [state for state in absent if state.experiment in by_experiment]
    source = published_folder()
    known = published_names(source)
    numbers = numbered(runs)
    planned = {name: [state for state in absent if state.experiment == name] for name in by_experiment}
    published = [
        compare(load_published(source, name), found, planned[name], numbers)
        for name, found in by_experiment.items()
        if name in known
    ]
    tables = [
        experiment_table(name, found, list(dict.fromkeys(state.detail for state in planned[name])), numbers)
        for name, found in by_experiment.items()
    ]
    try:
        return _write(output, title, published, tables, runs, len(absent), width)
    except OSError as error:
        raise ArtifactError(
            f"the report cannot be written to {output} ({error}): name a folder that you may write to (-o)"
        ) from error


def _write(output: Path, title: str, published: Sequence[Table], tables: Sequence[Table], runs: Sequence[Run],
           absent: int, width: str | None) -> list[Path]:  # fmt: skip
    """Write the files of a report in place of those of an earlier one; their paths, the page first."""
    provenance = provenance_table(runs, output)
    output.mkdir(parents=True, exist_ok=True)
    _remove_earlier(output)
    drawings = draw_all(runs, output / "figures", width)
    shown = [folded(table) for table in tables]
    contents = {
        "report.html": html(title, published, shown, runs, folded(provenance), drawings, output, absent),
        "report.md": _markdown(title, published, shown, folded(provenance), drawings),
        "report.tex": _latex([*published, *shown]),
        "provenance.csv": comma_separated(provenance),
        "rows.csv": frame_of(runs).to_csv(index=False),
        **{f"tables/{table.place()}.tex": latex(table) for table in [*published, *shown]},
        **{f"published/{table.name}.csv": comma_separated(table) for table in published},
        **{f"runs/{table.name}.csv": comma_separated(table) for table in tables},
    }
    for name, text in contents.items():
        path = output / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    written = [output / name for name in contents]
    written += [file for drawing in drawings for file in (drawing.path, drawing.path.with_suffix(".pdf"))]
    names = sorted(path.relative_to(output).as_posix() for path in written)
    (output / WRITTEN).write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    return written


def _remove_earlier(output: Path) -> None:
    """Remove the figures and tables that an earlier report wrote: this one has others of other names."""
    listed = output / WRITTEN
    owned = set(listed.read_text(encoding="utf-8").splitlines()) if listed.is_file() else set()
    for path in (path for pattern in _PER_REPORT for path in sorted(output.glob(pattern))):
        if path.relative_to(output).as_posix() in owned:
            path.unlink()


def _chosen(by_experiment: dict[str, list[Run]], experiments: Sequence[str]) -> dict[str, list[Run]]:
    for name in experiments:
        if name not in by_experiment:
            raise ArtifactError(
                f"no result belongs to the experiment {name!r}; "
                f"there are: {', '.join(by_experiment)}{did_you_mean(name, by_experiment)}"
            )
    return {name: runs for name, runs in by_experiment.items() if not experiments or name in experiments}


def _markdown(title: str, published: Sequence[Table], tables: Sequence[Table], provenance: Table,
              drawings: Sequence[Drawing]) -> str:  # fmt: skip
    parts = [f"# {escape_markdown(title)}\n"]
    if published:
        parts += ["## Published and ours\n", *map(markdown, published)]
    parts.append("## Runs\n")
    for table in tables:
        parts.append(markdown(table))
        for drawing in (drawing for drawing in drawings if drawing.experiments[0] == table.name):
            title, caption = escape_markdown(drawing.title), escape_markdown(drawing.caption)
            parts.append(f"![{title}](figures/{drawing.path.name})\n\n{caption}\n")
    return "\n".join([*parts, "## Provenance\n", markdown(provenance)])


def _latex(tables: Sequence[Table]) -> str:
    """A document that compiles as it stands, on pages wide enough for wide tables."""
    return "\n".join([_PREAMBLE, *map(latex, tables), r"\end{document}", ""])


_PREAMBLE = r"""% pdflatex report.tex; each table alone, for a paper of your own, is a file of tables/:
% \input{tables/...} with \usepackage{booktabs} and, for wide tables, \usepackage{adjustbox} in the preamble.
\documentclass{article}
\usepackage[a4paper,landscape,margin=15mm]{geometry}
\usepackage[T1]{fontenc}
\usepackage[utf8]{inputenc}
\usepackage{booktabs}
\usepackage{adjustbox}
\begin{document}
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the command `cushion-report`."""
    parser = argparse.ArgumentParser(
        prog="cushion-report", description="Tables and figures from result.json files: HTML, Markdown, LaTeX and CSV."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {cushion.__version__}")
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="folder of results, for example outputs")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("report"), help="where to write (default: %(default)s)"
    )
    parser.add_argument("-e", "--experiment", action="append", default=[], help="only this experiment; can be repeated")
    parser.add_argument("--title", default="Cushion: results", help="heading of the report")
    parser.add_argument(
        "--width",
        choices=WIDTHS,
        help="figures for a paper of two columns: as wide as a column or the page, with text of 8 pt at that size",
    )
    given = parser.parse_args(arguments)
    try:
        written = write_report(given.folders, given.output, given.experiment, given.title, given.width)
    except system_errors.MENDABLE as error:
        system_errors.end("cushion-report", error, "name another DIR")
    print(written[0].resolve())


if __name__ == "__main__":
    main()
