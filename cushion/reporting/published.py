"""Published tables as data, and ours in their layout: published value, ours, difference, and ours to full precision.

`experiments/<name>/published.csv` holds the numbers, `table.yaml` beside it says what they are and which row of which
run is the same thing (docs/reports.md describes the keys). A table is filled from the runs of the experiment of the
same name.

## Published numbers

`experiments/<name>/` of a published table holds `published.csv`, the numbers as printed, and `table.yaml`, which says
what they are. It is filled from the runs whose `experiment` is `<name>`. A new table needs no code.

| key of `table.yaml` | meaning |
|---|---|
| `title`, `source`, `notes` | shown with the table |
| `index` | columns of `published.csv` that say where a line stands |
| `values` | columns that hold numbers, each with what else is known of it, for example `llama3_8b_ppl: {model: llama3_8b, measure: perplexity}`. An empty cell is a number that was not published |
| `measure` | the measure, where `values` does not name it; otherwise the column's name |
| `corpus` | the corpus of a perplexity; where a run measured only another one, that is shown with a note |
| `tasks` | the tasks whose mean the published accuracy is; where ours is the mean of others, a note names both |
| `rows`, `columns` | the layout: which of `index` and of the keys in `values` go down and across |
| `select` | for each value of an index, what it is among runs: `config.<key>: value` (or a list of values), `stage: none | found | tuned`, `quantized: true | false`, and `reconstructed: true` for a method that learns from the outputs of blocks: without it rows are those of the frozen model |
| `setting` | the published configuration, as far as it is stated: by key (`eval.block_length: 2048`) its value, or a list of them. A note of the table names every key in which our runs are not as published, with both values |
| `titles` | how values are written |

Beside each perplexity of ours stands its `ratio` to full precision with the same prefix, beside each mean accuracy
how much it is `less full precision`, with their intervals and verdicts. Papers print no such numbers.

Measures: `perplexity`, `ratio` (to full precision with the same prefix), `accuracy` (mean over tasks, in %),
`largest_activation`, `quantization_error`, `seconds`; `last_block_top1`, `last_block_top10_percent`,
`last_block_median`, and the same of `worst_block_...`, the block whose top-1 is largest without a prefix;
`sinks_in_prefix`; `search_hours`, `tuning_hours`, `total_hours`; `modules_kept`, `largest_ratio`,
`smallest_ratio_kept`. `experiments/models.yaml` gives the titles of models and the labels that runs have for them; a
model that was not published gets a column, or lines, of its own.
"""  # noqa: E501

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from cushion.config import RunConfig, to_dict
from cushion.errors import ArtifactError, did_you_mean
from cushion.flat import flatten
from cushion.reporting.collect import Run
from cushion.reporting.comparisons import judged
from cushion.reporting.grid import NONE, Cell, Table
from cushion.reporting.measures import measures, spread_notes
from cushion.reporting.published_notes import SETTING, check_setting, notes_of
from cushion.reporting.published_ours import Seen, ours
from cushion.reporting.settings import numbered, shared_settings
from cushion.reporting.status import RunState
from cushion.schema import NO_PREFIX, STAGES

PUBLISHED, SPECIFICATION, MODELS = "published.csv", "table.yaml", "models.yaml"
_OPEN = ("config.quantizer.plugins.", "config.quantizer.activations.estimator_options.", "config.data.further.")
"""Groups of the configuration whose keys are a run's own."""
_NEEDED = {"title", "source", "values", "rows", "columns"}
_KEYS = _NEEDED | {"index", "measure", "corpus", "select", SETTING, "tasks", "titles", "notes"}

_SWITCHES = ("quantized", "reconstructed")
"""Of `select`: what a row is or is not."""

Coordinates = dict[str, str]
NOT_RUN = Cell("not run", kind="missing")


@dataclass(frozen=True)
class Entry:
    """A published number and where it stands: its value of each dimension (`model`, `scheme`, `prefix`, ...)."""

    at: Coordinates
    value: float | None


@dataclass(frozen=True)
class PublishedTable:
    """A published table: its numbers, its layout, and how the same thing is found among runs."""

    name: str
    specification: dict[str, Any]
    entries: list[Entry]
    models: dict[str, dict[str, str]]
    """By key of a model: `title`, and `label`, which is what runs call it."""

    def keys(self, dimension: str) -> list[str]:
        """The values of a dimension, in the published order."""
        return list(dict.fromkeys(entry.at[dimension] for entry in self.entries))

    def title(self, dimension: str, key: str) -> str:
        """How a value of a dimension is written."""
        if dimension == "model":
            return self.models.get(key, {}).get("title", key)
        if dimension == "measure" and key in (known := measures()):
            return known[key].title
        return str(self.specification.get("titles", {}).get(key, key))


def published_folder() -> Path:
    """The folder of published numbers: inside the package when installed, beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "experiments"
    return inside if inside.is_dir() else package.parent / "experiments"


def published_names(folder: Path) -> list[str]:
    """The experiments in `folder` that have published numbers, or the half of what describes them."""
    return sorted({path.parent.name for file in (PUBLISHED, SPECIFICATION) for path in folder.glob(f"*/{file}")})


def load_published(folder: Path, name: str) -> PublishedTable:
    """The published table of an experiment.

    Raises:
        ArtifactError: there is none of that name, or its files do not fit each other; it names file and column.

    """
    if name not in published_names(folder):
        known = published_names(folder)
        raise ArtifactError(
            f"there is no {folder / name / PUBLISHED}; published numbers: {', '.join(known)}{did_you_mean(name, known)}"
        )
    for file, other in ((PUBLISHED, SPECIFICATION), (SPECIFICATION, PUBLISHED)):
        if not (folder / name / file).is_file():
            raise ArtifactError(f"{folder / name} has {other} and no {file}: a published table needs both")
    specification, models = _yaml(folder / name / SPECIFICATION), _yaml(folder / MODELS)
    path = folder / name / SPECIFICATION
    absent, unknown = sorted(_NEEDED - set(specification)), sorted(set(specification) - _KEYS)
    if absent or unknown:
        raise ArtifactError(f"{path}: " + "; ".join(
            [f"the key {key!r} is missing" for key in absent]
            + [f"the key {key!r} is unknown{did_you_mean(key, _KEYS)}" for key in unknown]
        ))  # fmt: skip
    table = PublishedTable(name, specification, _entries(folder / name / PUBLISHED, specification), models)
    _check(table, path)
    return table


def _yaml(path: Path) -> dict[str, Any]:
    try:
        record = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OSError, YAMLError, OmegaConfBaseException) as error:
        raise ArtifactError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(record, dict):
        raise ArtifactError(f"{path} is no record of keys and values")
    return {str(key): value for key, value in record.items()}


def _entries(path: Path, specification: dict[str, Any]) -> list[Entry]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            lines = csv.DictReader(file)
            there = list(lines.fieldnames or [])
            records = list(lines)
    except (OSError, csv.Error, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from error
    index: list[str] = specification.get("index", [])
    values: dict[str, Coordinates] = specification["values"]
    for column in (*index, *values):
        if column not in there:
            raise ArtifactError(
                f"{path} has no column {column!r}, which {SPECIFICATION} beside it reads "
                f"(its columns: {', '.join(there) or 'none'}){did_you_mean(column, there)}"
            )
    entries = []
    for number, record in enumerate(records, start=2):
        for column, coordinates in values.items():
            at = {name: str(record[name]) for name in index} | {key: str(value) for key, value in coordinates.items()}
            at.setdefault("measure", str(specification.get("measure", column)))
            entries.append(Entry(at, _number(record[column], f"{path}, line {number}, column {column!r}")))
    return entries


def _number(text: str | None, where: str) -> float | None:
    if text == "":
        return None  # not published
    try:
        return float(text or "nothing")
    except ValueError as error:
        raise ArtifactError(f"{where}: {text!r} is no number") from error


def _check(table: PublishedTable, path: Path) -> None:
    """Everything that the specification names exists."""
    specification = table.specification
    check_setting(specification, path)
    tasks = specification.get("tasks", ["any"])
    if not isinstance(tasks, list) or not tasks or not all(isinstance(task, str) and task for task in tasks):
        raise ArtifactError(f"{path}: tasks={tasks!r} is no list of names of tasks, such as [piqa, hellaswag]")
    dimensions = set(table.entries[0].at) if table.entries else set()
    if "model" not in dimensions:
        raise ArtifactError(
            f"{path}: no value is of a model: name it in a column of {PUBLISHED} (`index: [model, ...]`), or beside "
            "each of `values` (`{model: llama2_7b}`)"
        )
    laid_out = [*specification["rows"], *specification["columns"]]
    for dimension in laid_out:
        if dimension not in dimensions:
            raise ArtifactError(
                f"{path}: there is no dimension {dimension!r} (there are {', '.join(sorted(dimensions))})"
            )
    for measure in table.keys("measure"):
        if measure not in measures():
            raise ArtifactError(f"{path}: there is no measure {measure!r}{did_you_mean(measure, measures())}")
    for model in table.keys("model"):
        if model not in table.models:
            raise ArtifactError(
                f"{path.parent.parent / MODELS} has no model {model!r}, which {path.parent / PUBLISHED} names"
            )
    _check_select(table, path)


def _check_select(table: PublishedTable, path: Path) -> None:
    """It says of every published value what it is among runs, by keys that there are."""
    allowed = ["stage", *_SWITCHES, *flatten(to_dict(RunConfig()), "config")]
    for dimension, selections in table.specification.get("select", {}).items():
        for key in table.keys(dimension):
            if key not in selections:
                raise ArtifactError(f"{path}: select.{dimension} does not say what {key!r} is among runs")
            for name in selections[key]:
                if name not in allowed and not name.startswith(_OPEN):
                    raise ArtifactError(
                        f"{path}: select.{dimension}.{key} has no key {name!r}: stage, quantized, "
                        f"reconstructed, or config. and a key of the configuration{did_you_mean(name, allowed)}"
                    )
            for name in _SWITCHES:
                value = selections[key].get(name, True)
                if not isinstance(value, bool):
                    raise ArtifactError(f"{path}: select.{dimension}.{key}.{name}={value!r}: true or false")
            stage = selections[key].get("stage", NO_PREFIX)
            if stage not in STAGES:
                raise ArtifactError(f"{path}: select.{dimension}.{key}.stage={stage!r}: one of {', '.join(STAGES)}")


def compare(
    table: PublishedTable,
    runs: Sequence[Run],
    missing: Sequence[RunState] = (),
    numbers: Mapping[Path, int] | None = None,
) -> Table:
    """The published table with ours beside it, from the runs of its experiment.

    A model that was published and not run keeps its published numbers alone, behind those that were; a model that was
    run and not published gets numbers of ours alone. Within a model that was run, what has no result is `missing`, what
    has only failed runs is `failed`, and a number of fewer seeds than the model was run with says so.

    Args:
        table: the published table.
        runs: the results of the experiment of the same name, failed ones included.
        missing: the runs of the experiment that a sweep planned and that have no result.
        numbers: the numbers of the runs, where the report is of more than these.

    """
    labels = {model: table.models[model]["label"] for model in table.keys("model")}
    ran = dict.fromkeys(run.model for run in runs)
    others = [label for label in ran if label not in labels.values()]
    labels |= {label: label for label in others}
    published = {_position(entry.at): entry.value for entry in table.entries}
    specification = table.specification
    rows = _combinations(table, specification["rows"], others)
    columns = _combinations(table, specification["columns"], others)
    if "model" in specification["columns"]:
        columns.sort(key=lambda column: labels[column["model"]] not in ran)
    seen = Seen()

    def cells(at: Coordinates) -> list[Cell]:
        there = published.get(_position(at))
        model = at["model"]
        known = model not in others
        plain = _plain(at, there) if known else Cell(NONE)
        if labels[model] not in ran:
            return [plain, Cell(NONE) if "model" in specification["columns"] else NOT_RUN, Cell(NONE), Cell(NONE)]
        if known and _position(at) not in published:
            return [Cell(NONE)] * 4
        of_model = [run for run in runs if run.model == labels[model]]
        seeds = {run.seed for run in of_model} | _planned_seeds(missing, labels[model])
        number, compared = ours(specification, at, of_model, len(seeds), seen)
        return [plain, number, _difference(number, there), compared]

    fixed = _fixed(table)
    grid = _told_apart([[cells(fixed | row | column) for column in columns] for row in rows])
    kept = [_kept([line[number] for line in grid]) for number in range(len(columns))]
    headings = [_headings(seen, [(fixed | row | column)["measure"] for row in rows]) for column in columns]
    head = _head(table, columns, [[of[part] for part in parts] for of, parts in zip(headings, kept, strict=True)])
    body = [
        [*(Cell(table.title(d, row[d])) for d in specification["rows"]),
         *(line[number][part] for number in range(len(columns)) for part in kept[number])]
        for row, line in zip(rows, grid, strict=True)
    ]  # fmt: skip
    body, comparisons = judged(body)
    titles = {labels[model]: table.title("model", model) for model in table.keys("model")}
    notes = [
        *notes_of(specification, titles, runs, seen.corpora, seen.scored),
        *spread_notes(body),
        *seen.notes(),
        *comparisons,
        *shared_settings(runs, numbered(runs) if numbers is None else numbers),
    ]
    return Table(table.name, str(specification["title"]), head, body, len(specification["rows"]), notes)


def _position(at: Coordinates) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(at.items()))


def _fixed(table: PublishedTable) -> Coordinates:
    """The dimensions that the layout leaves out because they have one value, for all entries."""
    laid_out = {*table.specification["rows"], *table.specification["columns"]}
    return {dimension: table.keys(dimension)[0] for dimension in table.entries[0].at if dimension not in laid_out}


def _combinations(table: PublishedTable, dimensions: list[str], others: list[str]) -> list[Coordinates]:
    """The published combinations of some dimensions in their order; each also for unpublished models."""
    found = dict.fromkeys(tuple(entry.at[d] for d in dimensions) for entry in table.entries)
    if "model" in dimensions:
        place = dimensions.index("model")
        for model in others:
            found |= dict.fromkeys((*c[:place], model, *c[place + 1 :]) for c in list(found) if c[place] not in others)
    return [dict(zip(dimensions, combination, strict=True)) for combination in found]


def _plain(at: Coordinates, value: float | None) -> Cell:
    return Cell(NONE) if value is None else Cell(measures()[at["measure"]].format(value), value=value, kind="published")


def _planned_seeds(missing: Sequence[RunState], model: str) -> set[int]:
    """The seeds of the runs of a model that a sweep planned and that are not there."""
    return {state.seed for state in missing if state.model == model and state.seed is not None}


def _told_apart(grid: list[list[list[Cell]]]) -> list[list[list[Cell]]]:
    """In a table with deviations and standard errors, of which no column says what it is, the latter say it."""
    if not any(cell.deviation is not None for line in grid for cells in line for cell in cells):
        return grid
    return [[[_of_one_seed(cell) for cell in cells] for cells in line] for line in grid]


def _of_one_seed(cell: Cell) -> Cell:
    is_it = cell.error is not None and not cell.seeds and not cell.verdict  # a comparison has an interval
    return replace(cell, text=f"{cell.text} (one seed)") if is_it else cell


def _difference(ours: Cell, published: float | None) -> Cell:
    if ours.value is None or published is None:
        return Cell(NONE)
    difference = ours.value - published
    fine = 0.005 <= abs(difference) < 1e5 or difference == 0
    return Cell(f"{difference:+.2f}" if fine else f"{difference:+.2g}", value=difference)


def _kept(cells: list[list[Cell]]) -> list[int]:
    """Which of published, ours, difference and comparison a column shows: those that say something in any line."""
    return [part for part in range(4) if any(cell[part].text != NONE for cell in cells)] or [1]


def _headings(seen: Seen, measured: list[str]) -> list[str]:
    """What the parts of a column of these measures are called."""
    compared = dict.fromkeys(seen.headings[name] for name in measured if name in seen.headings)
    return ["published", "ours", "difference", " or ".join(compared)]


def _head(table: PublishedTable, columns: list[Coordinates], shown: list[list[str]]) -> list[list[Cell]]:
    """The lines of headings; `shown` are those of the parts of each column."""
    specification = table.specification
    labels = len(specification["rows"])
    lines = []
    for dimension in specification["columns"]:
        line = [Cell("") for _ in range(labels)]
        previous = None
        for column, parts in zip(columns, shown, strict=True):
            key = column[dimension]
            if key == previous and dimension == specification["columns"][0]:
                line[-1] = Cell(line[-1].text, line[-1].span + len(parts))
            else:
                line.append(Cell(table.title(dimension, key), len(parts)))
            previous = key
        lines.append(line)
    last = [Cell(str(dimension)) for dimension in specification["rows"]]
    last += [Cell(part) for parts in shown for part in parts]
    return [*lines, last]
