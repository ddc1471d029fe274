"""The whole report: from real runs and from planted ones to files; pages that nothing in a result can break."""

from __future__ import annotations

import base64
import csv
import re
import shlex
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from records import failed, record, row, write
from tiny_run import tuning_config

from cushion import pipeline
from cushion.reporting.cli import main, write_report
from cushion.reporting.collect import collect
from cushion.reporting.figures import FIGURES
from cushion.reporting.plots import PAPER, draw_all
from cushion.reporting.published import published_folder

EVIL = "</script><script>alert('x')</script><s> & $x_1$ | \\"


class Page(HTMLParser):
    """What a browser would see: elements, the texts of cells, and addresses that would be fetched."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.fetched: list[str] = []
        self.ids: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value or "" for key, value in attributes if key == "id"]
        self.fetched += [value or "" for key, value in attributes if key in ("src", "href", "srcset", "action")]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def everything(seed: int = 0, **others: Any) -> dict[str, Any]:
    """A result with something for every figure, an evil token in every place that shows one."""
    curve = {key: [1.0, 10.0] for key in ("top1", "top2", "top3", "top10_percent", "median", "maximum")}
    step = {"objective_before": 9.0, "token_id": 1, "token": EVIL, "candidates": 3, "seconds": 1.0}
    made = record(
        seed=seed, rows=[row("full_precision", 9.0, EVIL), row("quantized_tuned", 10.0 + seed, EVIL)],
        experiment="cushioncache_table1",
        activations={"curves": {"none": curve, "tuned": curve}, "titles": {"none": "no prefix", "tuned": "tuned"},
            "map": {"block": 1, "channels": [0, 3], "positions": 1,
                    "values": {"none": [[1.0, 10.0]], "tuned": [[1.0, 2.0]]}}},
        attention={"first": 4, "stages": {"none": {"prefix": [], "first": [[0.5, 0.6], [0.1, 0.2]]},
                              "tuned": {"prefix": [[0.5, 0.6], [0.1, 0.2]], "first": [[0.0, 0.1], [0.1, 0.2]]}}},
        search={"objective": "quantization_error", "seconds": 1.0, "steps": [
            {**step, "step": 0, "objective_after": 3.0, "accepted": True},
            {**step, "step": 1, "objective_after": 2.9, "accepted": False}]},
        tuning={"seconds": 2.0, "best_step": 1, "initial_loss": 3.0,
                "steps": [{"step": 0, "loss": 3.0, "held_out_loss": None},
                          {"step": 1, "loss": 2.5, "held_out_loss": 2.4}]},
        qfem={"none": {"kept": [], "ratios": {}, "alpha_search": {"found": 1, "target": 1.05,
            "reference_perplexity": 11.0, "points": [
            {"kept_modules": 0, "perplexity": 30.0}, {"kept_modules": 2, "perplexity": 12.0},
            {"kept_modules": 3, "perplexity": None}]}}, "tuned": {"kept": [], "ratios": {}, "alpha_search": None}},
        **others,
    )  # fmt: skip
    return {**made, "model": {"label": "model"}}


def test_the_page_holds_every_result_and_fetches_nothing(tmp_path: Path) -> None:
    write(tmp_path / "results", everything(), everything(1), failed(EVIL, seed=2, experiment="cushioncache_table1"))
    (page_path, *others) = write_report([tmp_path / "results"], tmp_path / "report", title=EVIL)
    text = page_path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.tags.count("script") == 1, "no token of a prefix becomes a script"
    assert page.tags.count("s") == 0
    links = [place for place in page.fetched if not place.startswith(("data:image/png;base64,", "#"))]
    runs = collect([tmp_path / "results"])
    assert [(tmp_path / "report" / unquote(link)).resolve() for link in links] == [run.path.parent for run in runs] * 2
    commands = [piece for piece in page.texts if piece.startswith("cushion rerun ")]
    assert [Path(shlex.split(command)[2]) for command in commands] == [run.path.parent for run in runs]
    assert page.tags.count("img") == 6
    for place in (place for place in page.fetched if place.startswith("data:")):
        assert base64.b64decode(place.partition(",")[2]).startswith(b"\x89PNG")
    assert repr(EVIL) in page.texts
    assert any(piece.startswith("failed: DataError: ") for piece in page.texts)
    assert "http://" not in text and "https://" not in text
    assert "@media print" in text and 'name="viewport"' in text
    assert {path.suffix for path in others} == {".md", ".tex", ".csv", ".png", ".pdf"}
    assert all(path.stat().st_size > 0 for path in others)
    source = (tmp_path / "report" / "report.tex").read_text(encoding="utf-8")
    for kind in ("begin", "end"):
        assert len(re.findall(rf"\\{kind}{{table\*?}}", source)) == source.count(r"\bottomrule") == 2
    for table in sorted((tmp_path / "report" / "tables").iterdir()):
        assert table.read_text(encoding="utf-8") in source, "a table alone is the same table"
    _compile(tmp_path / "report" / "report.tex")
    assert 'loading="lazy"' not in text, "an image that was not scrolled to must be there in print"
    pictures = re.findall(r"\]\((figures/[^)]+)\)", (tmp_path / "report" / "report.md").read_text(encoding="utf-8"))
    assert len(pictures) == 6
    assert all((tmp_path / "report" / picture).is_file() for picture in pictures)


def _compile(document: Path) -> None:
    """Where LaTeX is installed: the document compiles as it stands, and nothing is wider than the page by a letter."""
    if shutil.which("pdflatex") is None:
        return
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", document.name]
    done = subprocess.run(command, cwd=document.parent, capture_output=True, encoding="latin-1", check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    assert document.with_suffix(".pdf").read_bytes().startswith(b"%PDF")
    overfull = [float(width) for width in re.findall(r"Overfull \\hbox \((.*?)pt", done.stdout)]
    assert not [width for width in overfull if width > 10]


@pytest.mark.usefixtures("blank_figures")
def test_a_published_table_and_its_runs_have_labels_and_ids_of_their_own_and_figures_beside_them(
    tmp_path: Path,
) -> None:
    rows = [row("quantized", 20.0), row("quantized_tuned", 10.0)]
    other = record(experiment="provenance", rows=rows, tuning={"steps": [{"step": 0, "loss": 7.0}]})
    write(tmp_path / "results", everything(), other)
    written = write_report([tmp_path / "results"], tmp_path / "report")
    labels = re.findall(r"\\label\{(.*?)\}", (tmp_path / "report" / "report.tex").read_text(encoding="utf-8"))
    assert labels == ["tab:cushioncache-table1", "tab:runs-cushioncache-table1", "tab:runs-provenance"]
    text = written[0].read_text(encoding="utf-8")
    ids = Page(text).ids
    assert len(ids) == len(set(ids))
    page = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    for whole, second in ((text, 'id="table-runs-provenance"'), (page, "\n### Runs of provenance")):
        beside = [re.findall(r"Tuning loss, model; (\w+)", part)[0] for part in whole.split(second)]
        assert [name.removesuffix("_table1") for name in beside] == ["cushioncache", "provenance"]
        assert "Tuning loss, model; provenance" not in whole.partition(second)[0]
    assert re.findall(r'<td class="[^"]*\bbest\b[^"]*"[^>]*>([\d.]+)', text) == ["10.00"]
    assert {"table-cushioncache_table1", "table-runs-cushioncache_table1", "table-provenance"} <= set(ids)
    names = {path.relative_to(tmp_path / "report").as_posix() for path in written}
    assert {"published/cushioncache_table1.csv", "runs/cushioncache_table1.csv", "runs/provenance.csv"} <= names


def test_columns_stay_in_view_and_numbers_with_an_error_sort_as_numbers(tmp_path: Path) -> None:
    rows = [row("quantized", 9.0, accuracy=0.446, accuracy_stderr=0.023)]
    write(tmp_path / "results", record(rows=rows))
    (path, *_) = write_report([tmp_path / "results"], tmp_path / "report")
    text = path.read_text(encoding="utf-8")
    (line,) = re.findall(r"<tr>(.*W8A8.*)</tr>", text)
    pinned = re.findall(r'<td class="[^"]*pinned" style="left: var\(--left(\d), 0\)">([^<]*)<', line)
    assert pinned == [("0", "1"), ("1", "W8A8")], "the run and the row"
    assert "In every line: model model, prefix -, seeds 1." in text
    assert "status completed, cushion 0.1, torch 2" in text, "what all runs share stands in a note"
    assert re.search(r'data-value="44\.6[^"]*">44\.60 ± 2\.30<', line)
    notes = re.findall(r'<p class="note">([^<]*)</p>', text)
    assert any(note.startswith("Run 1: search greedy_sampled; tuning short") for note in notes)
    assert any(
        note.startswith("Run 1: ") for note in (tmp_path / "report" / "report.md").read_text("utf-8").splitlines()
    )


@pytest.mark.usefixtures("blank_figures")
def test_what_runs_share_is_drawn_once_and_named_with_its_runs(tmp_path: Path) -> None:
    other, kept = everything(1), everything(2)
    kept["tuning"]["best_step"] = None
    other["tuning"]["steps"][0]["loss"] = 7.0
    of_map = other["activations"]["map"]["values"]
    of_map["none"] = [[1.001 * value for value in line] for line in of_map["none"]]
    drawings = draw_all(collect([write(tmp_path / "results", everything(), other, kept)]), tmp_path / "figures")
    by_kind, captions = {}, {}
    for drawing in drawings:
        kind = drawing.path.name.partition("-")[0]
        by_kind.setdefault(kind, []).append(drawing.runs)
        captions[kind] = drawing.caption
    assert by_kind == {
        "map": [(1, 2, 3)],
        "activations": [(1, 2, 3)],
        "attention": [(1, 2, 3)],
        "search": [(1, 2, 3)],
        "tuning": [(1,), (2,), (3,)],
        "qfem": [(1, 2, 3)],
    }
    nearly = "drawn for run 1, from which the others differ by less than 1 % of the scale"
    assert [kind for kind, caption in captions.items() if nearly in caption] == ["map"]
    scales = {kind: re.findall(r" \((logarithmic [^)]*)\), model", caption) for kind, caption in captions.items()}
    assert scales == {
        "map": ["logarithmic colours"],
        "activations": ["logarithmic axis"],
        "attention": [],
        "search": ["logarithmic axis"],
        "tuning": [],
        "qfem": ["logarithmic axes"],
    }


@pytest.mark.usefixtures("blank_figures")
def test_captions_name_what_tells_the_runs_apart(tmp_path: Path) -> None:
    def made(number: int, **others: Any) -> dict[str, Any]:
        return record(tuning={"steps": [{"step": 0, "loss": float(number)}]}, **others)

    records = [
        made(0, experiment="e", **{"search.tau": 0.5}),
        made(1, experiment="e", **{"search.tau": 0.6}),
        made(2, experiment="e", **{"search.tau": 0.6}, seed=1),
        made(2, experiment="e", **{"search.tau": 0.6}, seed=1, quantizer="fine"),
        made(3, experiment="alone"),
        made(4, experiment="one"),
        made(4, experiment="two"),
        *(made(5, experiment="many", quantizer=name) for name in "abcd"),
    ]
    drawings = draw_all(collect([write(tmp_path / "results", *records)]), tmp_path / "figures")
    assert {drawing.runs: drawing.title.removeprefix("Tuning loss, model; ") for drawing in drawings} == {
        (1,): "e: per_tensor_static, search.tau=0.5, seed=0",
        (2,): "e: per_tensor_static, search.tau=0.6, seed=0",
        (3, 4): "e: per_tensor_static or fine, search.tau=0.6, seed=1",
        (5,): "alone: per_tensor_static",
        (6, 7): "one, two: per_tensor_static",
        (8, 9, 10, 11): "many: 4 quantizers",
    }


@pytest.mark.usefixtures("blank_figures")
def test_drawings_of_the_papers_figures_are_titled_as_such(tmp_path: Path) -> None:
    def titles(*experiments: str) -> dict[str, str]:
        name = "-".join(experiments)
        records = [everything() for _ in experiments]
        for made, experiment in zip(records, experiments, strict=True):
            made["config"]["experiment"] = experiment
        drawings = draw_all(collect([write(tmp_path / name, *records)]), tmp_path / "figures")
        return {drawing.path.name.partition("-")[0]: drawing.title for drawing in drawings}

    for number, kind in enumerate(("map", "activations", "attention"), start=1):
        found = titles("cushioncache_table1", f"cushioncache_figure{number}")
        papers = [kind for kind, title in found.items() if title.startswith("CushionCache, Figure ")]
        assert papers == [kind]
        assert found[kind].startswith(f"CushionCache, Figure {number}: ")
        assert found[kind].endswith(f", model; cushioncache_table1, cushioncache_figure{number}: per_tensor_static")
    assert "share of attention by block and head" in titles("cushioncache_figure3")["attention"]


def test_the_readme_of_a_papers_figure_names_its_file_and_its_caption() -> None:
    files = {"map": "activation_map", "activations": "activation_curves", "attention": "attention_maps"}
    assert set(files) == set(PAPER) and set(files.values()) <= set(FIGURES)
    for kind, (experiment, caption) in PAPER.items():
        words = " ".join((published_folder() / experiment / "README.md").read_text(encoding="utf-8").split())
        assert f'"{caption}"' in words
        assert re.findall(r"`figures/(\w+)\.png`", words) == [files[kind]]


def test_a_result_without_any_of_it_has_no_figures(tmp_path: Path) -> None:
    bare = record(attention=None, qfem=None, search=None, tuning=None, activations={})
    assert draw_all(collect([write(tmp_path / "results", bare)]), tmp_path / "figures") == []
    write_report([tmp_path / "results"], tmp_path / "report")


@pytest.mark.usefixtures("blank_figures")
def test_real_runs_of_two_seeds_make_a_report(tmp_path: Path, text_file: Path) -> None:
    expected = []
    for seed in (0, 1):
        config = tuning_config(text_file, tmp_path / "outputs")
        config.seed, config.experiment = seed, "mine"
        expected.append(pipeline.run(config).rows[-1].under("perplexity")["text"])
    write_report([tmp_path / "outputs"], tmp_path / "report")
    titles, *lines = csv.reader((tmp_path / "report" / "runs" / "mine.csv").read_text(encoding="utf-8").splitlines())
    assert len(lines) == 6
    cells = dict(zip(titles, lines[-1], strict=True))
    assert float(cells["perplexity text"]) == pytest.approx(sum(expected) / 2, rel=1e-12)
    assert len(list((tmp_path / "report" / "figures").glob("tuning-*.png"))) == 2


def outcome(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    try:
        main(arguments)
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command_prints_the_path_of_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "results", record())
    code, out, err = outcome(capsys, str(tmp_path / "results"), "-o", str(tmp_path / "report"))
    assert (code, err) == (0, "")
    assert Path(out.strip()) == tmp_path / "report" / "report.html"


def test_mistakes_end_with_one_line_and_status_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = ["-o", str(tmp_path / "report")]

    def line(*arguments: str) -> str:
        code, out, err = outcome(capsys, *arguments, *target)
        assert (code, out) == (1, "")
        (only,) = err.splitlines()
        assert only.startswith("cushion-report: error: ")
        return only

    (tmp_path / "empty").mkdir()
    assert "holds no result.json" in line(str(tmp_path / "empty"))
    results = write(tmp_path / "results", record(experiment="cushioncache_table1"))
    assert "did you mean 'cushioncache_table1'" in line(str(results), "-e", "cushioncache_tabel1")
    published = tmp_path / "published" / "cushioncache_table1"
    published.mkdir(parents=True)
    (published / "published.csv").write_text("scheme,prefix\nfp16,none\n")
    (published / "table.yaml").write_text(
        "{title: t, source: s, values: {llama2_7b: {}}, rows: [scheme], columns: [scheme]}"
    )
    (tmp_path / "published" / "models.yaml").write_text("{}\n")
    monkeypatch.setattr("cushion.reporting.cli.published_folder", lambda: tmp_path / "published")
    assert "cushioncache_table1/published.csv has no column 'llama2_7b'" in line(str(results))
    (published / "published.csv").rename(published / "kept")
    assert "cushioncache_table1 has table.yaml and no published.csv: a published table needs both" in line(str(results))
    (published / "kept").rename(published / "published.csv")
    (published / "table.yaml").unlink()
    assert "cushioncache_table1 has published.csv and no table.yaml" in line(str(results))
    (results / "run00" / "result.json").write_text("{")
    assert "run00/result.json is damaged" in line(str(results))
    assert not (tmp_path / "report").exists(), "nothing is written where something is wrong"


def test_a_report_that_cannot_be_written_ends_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = write(tmp_path / "results", record())
    target = tmp_path / "file"
    target.write_text("mine")
    for output in (target, target / "below"):
        code, out, err = outcome(capsys, str(results), "-o", str(output))
        assert (code, out, len(err.splitlines())) == (1, "", 1)
        assert err.startswith(f"cushion-report: error: the report cannot be written to {output} (")
        assert "(-o)" in err
    assert target.read_text() == "mine"


@pytest.mark.usefixtures("blank_figures")
def test_a_report_removes_what_an_earlier_one_wrote_and_nothing_else(tmp_path: Path) -> None:
    results, output = tmp_path / "results", tmp_path / "report"
    first = {path.relative_to(output) for path in write_report([write(results, everything())], output)}
    own = [Path("figures/mine.png"), Path("runs/mine.csv"), Path("published/mine.csv"), Path("mine.png")]
    for name in own:
        (output / name).write_text("mine")
    (tmp_path / "beside.csv").write_text("mine")
    with (output / "files.txt").open("a", encoding="utf-8") as listed:
        listed.write("../beside.csv\nmine.png\n")  # what a report never writes is not removed, whatever the list says
    other = everything()
    other["config"]["experiment"] = "other"
    other["tuning"]["steps"][0]["loss"] = 7.0
    second = {path.relative_to(output) for path in write_report([write(results, other)], output)}
    assert {"tuning", "cushioncache_table1"} <= {path.stem.partition("-")[0] for path in first - second}
    there = {path.relative_to(output) for path in output.rglob("*") if path.is_file()}
    assert there == second | set(own) | {Path("files.txt")}
    assert (tmp_path / "beside.csv").is_file()
