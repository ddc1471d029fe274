"""Names of metrics, their columns and the fields of a quantizer stand where they are declared, and nowhere else."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cushion.metrics.columns import metrics
from cushion.quantization.parts.registry import SHARED, parts

ROOT = Path(__file__).parent.parent

ROW = {
    "values": {"perplexity/corpus": 1.0},
    "tasks": {"a": {"metric": "m", "metrics": {}}, "b": {"metric": None, "metrics": {"m": {"value": 1.0}}}},
}
COLUMNS = {column.key for metric in metrics() for column in metric.columns([ROW])}
METRICS = {metric.name for metric in metrics()} | {name for metric in metrics() for name in metric.measures} | COLUMNS
STEMS = {key.partition("/")[0] + "/" for key in COLUMNS if "/" in key}
"""What the keys of columns with parts begin with."""
FIELDS = {*SHARED, *(name for part in parts() for name in part.fields)}

METRIC_ROOMS = (
    "cushion/metrics/",
    "cushion/results_v1.py",  # reads the fixed fields of results of version 1
)
FIELD_ROOMS = ("cushion/quantization/",)
"""The configuration, its parts, and what computes them."""

RECORDS = {
    ("cushion/evaluation/perplexity_step.py", "perplexity, seconds"): "what the cached step writes",
    ("cushion/pipeline.py", "accuracy, tasks"): "configured values, as `evaluation` of a result has them",
    ("cushion/reporting/settings.py", "perplexity, tasks"): "titles of settings in a report",
    ("scripts/bench_search.py", "perplexity, quantization_error, seconds"): "a table of its own, of searches",
    ("cushion/search/greedy.py", "ratio, seconds"): "the ratio of L_q that a step of the search reached",
}
"""Collections that hold names of metrics for another reason."""
OTHERS = {
    (
        "cushion/config_warnings.py",
        "levels, shared_exponent, targets, zero_point",
    ): "the texts of warnings: all of `SHARED`, see below",
    ("cushion/reporting/plots.py", "activations, attention"): "kinds of figures",
    ("cushion/reporting/plots.py", "activations, attention, qfem"): "kinds of figures",
    ("scripts/reference_runs.py", "qfem, rotation"): "options of the group `quantizer`",
}
"""Collections that hold fields of a quantizer for another reason."""

Finder = Callable[[ast.AST], Iterator[str]]


def collections(tree: ast.AST, names: set[str]) -> Iterator[str]:
    """Which names stand together in a collection, as texts or as attributes, or as the arguments of a call."""
    for node in ast.walk(tree):
        items: list[ast.expr | None] = []
        if isinstance(node, ast.Dict):
            items = list(node.keys)
        elif isinstance(node, (ast.Tuple, ast.List, ast.Set)):
            items = list(node.elts)
        found = {item.value for item in items if isinstance(item, ast.Constant)} & names
        found |= {item.attr for item in items if isinstance(item, ast.Attribute)} & names
        if isinstance(node, ast.Call):
            found |= {str(keyword.arg) for keyword in node.keywords} & names
        if len(found) > 1:
            yield ", ".join(sorted(found))


def is_file(text: str) -> bool:
    """Whether a text is the name of a file, `tasks/records.jsonl`."""
    return bool(Path(text).suffix)


def of_metrics(tree: ast.AST) -> Iterator[str]:
    """Collections of names of metrics, and where a key of a row's values, or a measure, is told from others by name."""
    yield from collections(tree, METRICS)
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            words = [ast.unparse(side) for side in sides if not isinstance(side, ast.Constant)]
            is_about = any(word in text for text in words for word in ("key", "column", "measure", "metric"))
            if is_about and any(isinstance(side, ast.Constant) and side.value in METRICS for side in sides):
                yield ast.unparse(node)
        elif isinstance(node, ast.MatchValue) and ast.literal_eval(node.value) in METRICS:
            yield ast.unparse(node)
        elif isinstance(node, ast.Subscript) and "values" in ast.unparse(node.value):
            if isinstance(node.slice, ast.Constant) and node.slice.value in METRICS:
                yield ast.unparse(node)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("values.get", "['values'].get")):
            if any(isinstance(argument, ast.Constant) and argument.value in METRICS for argument in node.args):
                yield ast.unparse(node)
        elif isinstance(node, ast.Constant) and str(node.value).startswith(tuple(STEMS)) and not is_file(node.value):
            yield node.value


def of_fields(tree: ast.AST) -> Iterator[str]:
    """Collections of fields of a quantizer, and attributes that are looked up by their names."""
    yield from collections(tree, FIELDS)
    for node in ast.walk(tree):
        is_lookup = isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "hasattr")
        if is_lookup and any(isinstance(part, ast.Constant) and part.value in FIELDS for part in ast.walk(node)):
            yield ast.unparse(node)


def outside(rooms: tuple[str, ...], finder: Finder) -> set[tuple[str, str]]:
    """What is found in the package and in the scripts, by file."""
    files = {
        path.relative_to(ROOT).as_posix(): path for top in ("cushion", "scripts") for path in (ROOT / top).rglob("*.py")
    }
    return {
        (name, text)
        for name, path in files.items()
        if not name.startswith(rooms)
        for text in finder(ast.parse(path.read_text(encoding="utf-8")))
    }


def test_no_other_module_lists_the_metrics() -> None:
    assert outside(METRIC_ROOMS, of_metrics) == set(RECORDS)


def test_no_other_module_lists_the_fields_of_a_quantizer() -> None:
    assert outside(FIELD_ROOMS, of_fields) == set(OTHERS)


def test_every_shared_field_has_its_warning() -> None:
    from cushion.config_warnings import _WITHOUT_A_READER

    assert tuple(_WITHOUT_A_READER) == SHARED


def test_names_are_those_of_the_registries() -> None:
    assert {"perplexity", "accuracy", "accuracy/mean", "seconds", "largest_activation"} <= METRICS
    assert {"perplexity/", "accuracy/", "accuracy_stderr/", "tasks/"} == STEMS
    assert {"weights", "qfem", "smoothing_alpha", "levels"} <= FIELDS
    assert "name" not in FIELDS


@pytest.mark.parametrize(
    ("finder", "line"),
    [
        (of_metrics, "x = ('perplexity', 'seconds')"),
        (of_metrics, "x = {'largest_activation': 1, 'accuracy': 2}"),
        (of_metrics, "x = column.key == 'seconds'"),
        (of_metrics, "x = 'accuracy' != at['measure']"),
        (of_metrics, "match name:\n    case 'perplexity': pass"),
        (of_metrics, "x = row['values']['seconds']"),
        (of_metrics, "x = row.values.get('quantization_error')"),
        (of_metrics, "x = f'perplexity/{corpus}'"),
        (of_fields, "x = ['weights', 'activations']"),
        (of_fields, "x = (quantizer.weights, quantizer.kv_cache)"),
        (of_fields, "x = replace(quantizer, rotation='none', qfem=None)"),
        (of_fields, "x = getattr(quantizer, 'smoothing_alpha')"),
    ],
)
def test_what_would_be_a_second_room_is_seen(finder: Finder, line: str) -> None:
    assert len(list(finder(ast.parse(line)))) == 1


@pytest.mark.parametrize(
    "line",
    ["x = timings['seconds']", "x = ('perplexity', 'loss')", "open('tasks/a.jsonl')", "x = quantizer.weights.bits"],
)
def test_a_name_alone_is_none(line: str) -> None:
    tree = ast.parse(line)
    assert [*of_metrics(tree), *of_fields(tree)] == []
