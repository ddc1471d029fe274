"""The report as one HTML page that needs nothing else: styles, script and images are inside."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from cushion.reporting.collect import Run
from cushion.reporting.grid import Table
from cushion.reporting.plots import Drawing


def html(title: str, published: Sequence[Table], tables: Sequence[Table], runs: Sequence[Run], provenance: Table,
         drawings: Sequence[Drawing], folder: Path, missing: int = 0) -> str:  # fmt: skip
    """The whole page, for `folder`, with `missing` as the number of planned runs without a result.

    Everything that comes from a result is escaped; no data goes into the script.
    """
    environment = Environment(
        loader=PackageLoader("cushion.reporting"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["breakable"] = _breakable
    return environment.get_template("report.html").render(
        title=title,
        published=published,
        tables=tables,
        provenance=provenance,
        completed=sum(run.completed for run in runs),
        failed=[run for run in runs if not run.completed],
        missing=missing,
        drawings={
            table.name: [_inside(one) for one in drawings if one.experiments[0] == table.name] for table in tables
        },
        details=[(number, run, run.link(folder), _details(run)) for number, run in enumerate(runs, start=1)],
    )


def _breakable(text: str) -> Markup:
    """A text whose line may end behind an underscore of a name, and ends behind an interval that has a verdict."""
    whole = re.sub(r"(?<=\d\],) (?=within error)", "<br>", str(escape(text)))
    return Markup(re.sub(r"(?<=[a-z]{3}_)(?=[a-z])", "<wbr>", whole))


def _inside(drawing: Drawing) -> tuple[Drawing, str]:
    """A figure with the content of its file in base64."""
    return drawing, base64.b64encode(drawing.path.read_bytes()).decode("ascii")


def _details(run: Run) -> str:
    """Configuration, versions, data and cost of a run as indented JSON."""
    keys = ("config", "environment", "model", "data", "evaluation", "timings", "warnings", "error")
    return json.dumps({key: run.record.get(key) for key in keys}, indent=1, ensure_ascii=False)
