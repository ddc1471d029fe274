"""All runs of an experiment as one table: a line for each row of each configuration, averaged over its seeds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cushion.flat import flatten
from cushion.metrics.columns import Place, columns
from cushion.reporting.collect import Run
from cushion.reporting.comparisons import judged, mark_best, measured
from cushion.reporting.grid import NONE, Cell, Table
from cushion.reporting.lines import Line, in_order, lines_of, shared_first, value_of
from cushion.reporting.measures import FAILED, MISSING, measure_of, spread_notes
from cushion.reporting.settings import in_spans, numbered, shared_settings
from cushion.schema import is_frozen

ALL = "all"

_GROUPS = ("data", "quantizer", "search", "tuning", "reconstruction", "eval")
_EVERY_SETTING = ("model", *_GROUPS, "device", "execution", "bos")


def experiment_table(
    experiment: str, runs: Sequence[Run], missing: Sequence[str] = (), numbers: Mapping[Path, int] | None = None
) -> Table:
    """The rows of an experiment's runs, with what varies between them in front.

    Configurations stand in ascending order of what varies, numbers before words. In front of those of a model stand the
    rows that several of them share, once.

    Args:
        experiment: name of the experiment.
        runs: its results, failed ones included.
        missing: descriptions of runs that a sweep asked for and that have no result.
        numbers: the numbers of the runs, where the report is of more than these.

    """
    numbers = numbered(runs) if numbers is None else numbers
    settings = varying(runs)
    rows = [row for run in runs for row in run.record["rows"]]
    measures = [measure_of(column) for column in columns(rows, Place.REPORT)]
    titles = ["run", "model", *settings, "row", "prefix", "seeds"]
    head = [[Cell(title) for title in (*titles, *(measure.title for measure in measures))]]
    groups = in_order(runs, settings)
    lines = shared_first([line for group in groups for line in lines_of(group)])
    body = []
    for line in lines:
        beside = [group[0] for group in groups if group[0].model == line.model]
        words = [Cell(in_spans(sorted(numbers[run.path] for run in line.runs))), Cell(line.model)]
        swept = [_settings(line.configurations, beside, key) for key in settings]
        words += swept
        below = ", ".join(cell.text if key.endswith(".name") else f"{key.rpartition('.')[2]}={cell.text}"
                          for key, cell in zip(settings, swept, strict=True))  # fmt: skip
        if line.row is None:
            run = line.runs[0]
            words += [Cell(f"failed: {run.error}", kind="failed", below=below), Cell(NONE), Cell(f"seed {run.seed}")]
            body.append([*words, *(FAILED for _ in measures)])
        else:
            of = [measured(measure, line.same, len(line.same)) for measure in measures]
            body.append([*words, *_words(line.row, line.same, line.asked, below), *of])
    for description in missing:
        blanks = [Cell(NONE) for _ in range(len(settings) + 2)]
        words = [Cell(f"missing: {description}", kind="missing"), Cell(NONE), Cell(NONE)]
        body.append([*blanks, *words, *(MISSING for _ in measures)])
    body, comparisons = judged(body)
    racing = [n for n, line in enumerate(lines) if line.row and line.row["quantized"] and is_frozen(line.row)]
    for model in dict.fromkeys(line.model for line in lines):
        mark_best(body, [number for number in racing if lines[number].model == model], measures, len(titles))
    notes = [*_notes(lines, body), *spread_notes(body), *comparisons, *shared_settings(runs, numbers)]
    places = {title: number for number, title in enumerate(titles)}
    return Table(
        experiment,
        f"Runs of {experiment}",
        head,
        body,
        len(titles),
        notes,
        (places["run"], places["row"]),
        key=f"runs-{experiment}",
        foldable=(places["model"], places["prefix"], places["seeds"]),
        aside=tuple(number for title, number in places.items() if title != "row"),
    )


def _notes(lines: Sequence[Line], body: Sequence[Sequence[Cell]]) -> list[str]:
    notes = []
    if any(len(line.configurations) > 1 for line in lines):
        notes.append(f"A row that is the same in several configurations stands once; {ALL}: whatever the value.")
    if any(cell.best for line in body for cell in line):
        notes.append("Bold: the best quantized value of a model in its column, whether or not others are within error.")
    return notes


def _words(row: dict[str, Any], same: Sequence[tuple[Run, dict[str, Any]]], asked: int, below: str) -> list[Cell]:
    prefixes = list(dict.fromkeys(repr(other["prefix"]) if other["prefix"] else NONE for _, other in same))
    seeds = len({run.seed for run, _ in same})
    count = Cell(str(seeds), value=float(seeds)) if seeds == asked else Cell(f"{seeds} of {asked}")
    return [Cell(row["label"], below=below), Cell(", ".join(prefixes)), count]


def varying(runs: Iterable[Run]) -> list[str]:
    """The keys of the configuration that tell an experiment's runs apart, seed and model aside.

    A group's keys that follow from which of its options was chosen are not named beside the option; the path of a
    model only where several end in the same word.
    """
    runs = list(runs)
    found: list[str] = []
    for group in _EVERY_SETTING:
        flats = [flatten(run.config.get(group), group) for run in runs]
        options = [
            run.model if group == "model" else flat.get(f"{group}.name") for run, flat in zip(runs, flats, strict=True)
        ]
        if group != "model" and len(set(options)) > 1:
            found.append(f"{group}.name")
        for key in dict.fromkeys(key for flat in flats for key in flat if key != f"{group}.name"):
            by_option: dict[Any, set[str]] = {}
            for option, flat in zip(options, flats, strict=True):
                by_option.setdefault(option, set()).add(repr(flat.get(key)))
            if any(len(values) > 1 for values in by_option.values()):
                found.append(key)
    return [*found, "paths.data_dir"] if len({value_of(run, "paths.data_dir") for run in runs}) > 1 else found


def _settings(configurations: Sequence[Run], of_model: Sequence[Run], key: str) -> Cell:
    """What a line's configurations have for a key: one value, `ALL` that the model's runs have, or some of them."""
    values = list(dict.fromkeys(_written(value_of(run, key)) for run in configurations))
    if len(values) > 1:
        others = {_written(value_of(run, key)) for run in of_model}
        return Cell(ALL if set(values) == others else ", ".join(values) if len(values) < 4 else f"{len(values)} values")
    value = value_of(configurations[0], key)
    number = float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
    return Cell(values[0], value=number)


def _written(value: Any) -> str:
    return NONE if value is None else str(value)


def provenance_table(runs: Sequence[Run], folder: Path) -> Table:
    """What each run was: status, versions, git state, device, cost, and where it is, seen from the report's folder."""
    titles = ["run", "status", "cushion", "torch", "transformers", "git", "device", "seed", "seconds",
              "search seconds", "search token-forwards", "tuning seconds", "folder"]  # fmt: skip
    body = []
    numbers = numbered(runs)
    for run in runs:
        environment = run.record["environment"]
        packages, git = environment.get("packages", {}), environment.get("git")
        total = run.record["timings"].get("total")
        search, tuning = run.record.get("search") or {}, run.record.get("tuning") or {}
        commit = "installed package" if not git else git["commit"][:10] + (", changed" if git["dirty"] else "")
        status = "completed" if run.completed else f"failed: {run.error}"
        if run.superseded:
            status += f" ({run.superseded} other of this configuration left out)"
        versions = [
            str(environment.get("cushion", "?")),
            *(str(packages.get(p) or "?") for p in ("torch", "transformers")),
        ]
        body.append([
            Cell(str(numbers[run.path])),
            Cell(status, kind="" if run.completed else "failed"),
            *(Cell(text) for text in (*versions, commit, str(environment.get("device", "?")), str(run.seed))),
            *map(_whole, (total, search.get("seconds"), search.get("token_forwards"), tuning.get("seconds"))),
            Cell("/".join(run.path.parts[-5:-1]), link=run.link(folder)),
        ])  # fmt: skip
    head = [[Cell(title) for title in titles]]
    note = "Seconds of a run are its wall time, those of search and tuning as first computed."
    same = tuple(
        titles.index(title) for title in ("status", "cushion", "torch", "transformers", "git", "device", "seed")
    )
    return Table(
        "provenance", "Runs, versions and cost", head, body, len(titles), [note], (0,), foldable=same, aside=same[1:]
    )


def _whole(value: float | None) -> Cell:
    return Cell(NONE) if value is None else Cell(f"{value:.0f}", value=value)
