"""Published tables: the shipped ones are sound, ours stands beside theirs in their layout, gaps show as gaps."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any

import pytest
from records import failed, record, row, write

from cushion.cli import config_folder
from cushion.config import ModelConfig
from cushion.errors import ArtifactError
from cushion.reporting.collect import collect
from cushion.reporting.grid import Table
from cushion.reporting.published import compare, load_published, published_folder, published_names
from cushion.reporting.published_notes import check_setting
from cushion.reporting.status import RunState

FOLDER = published_folder()
LLAMA2 = "meta-llama/Llama-2-7b-hf"


def ours(tmp_path: Path, name: str, *records: dict[str, Any]) -> Table:
    return compare(load_published(FOLDER, name), collect([write(tmp_path, *records)]))


PAPER = {
    "quantizer": "cushioncache_static",
    "quantizer.weights": {"bits": 8, "granularity": "per_group"},
    "quantizer.activations": {"bits": 8, "symmetric": False},
}
"""CushionCache's own quantizer, as a record has it."""


def cell(table: Table, heading: str, *labels: str, group: str = "as published") -> str:
    place, titles = table.headings().index(heading), list(labels)
    if "quantizer" in table.headings():
        titles.insert(0, "none" if labels[0] == "FP16" and "scheme" in table.headings() else group)
    (found,) = [line[place].text for line in table.body if [c.text for c in line[: len(titles)]] == titles]
    return found


@pytest.mark.parametrize("name", published_names(FOLDER))
def test_every_shipped_table_reads_and_shows_every_published_number(name: str, tmp_path: Path) -> None:
    table = load_published(FOLDER, name)
    with (FOLDER / name / "published.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    read = set(table.specification.get("index", [])) | set(table.specification["values"])
    columns = table.specification["values"]
    numbers = sorted(float(line[column]) for line in lines for column in columns if line[column])
    assert sorted(entry.value for entry in table.entries if entry.value is not None) == numbers
    constant = {column for column in lines[0] if len({line[column] for line in lines}) == 1}
    unread = set(lines[0]) - read - constant
    assert unread <= {"scheme", "alpha"}, "columns that only repeat another one, or stand in the notes"
    shown = compare(table, collect([write(tmp_path, record(model="x/other", experiment=name))]))
    assert sorted(c.value for line in shown.body for c in line if c.kind == "published") == numbers
    assert (FOLDER / name / "README.md").is_file()


def test_the_models_labels_are_those_of_the_shipped_options() -> None:
    from omegaconf import OmegaConf

    labels = {label["label"] for label in load_published(FOLDER, "cushioncache_table1").models.values()}
    for option in ("llama2_7b", "llama2_13b", "llama3_8b", "mistral_7b", "opt_6.7b", "bloom_7b1"):
        path = OmegaConf.load(config_folder() / "model" / f"{option}.yaml")["path"]
        assert ModelConfig(path=path).label in labels


def test_ours_stands_beside_the_published_number_with_the_difference(tmp_path: Path) -> None:
    rows = [
        row("full_precision", 5.5),
        row("quantized", 9000.0),
        row("quantized_found", 7.0),
        row("quantized_tuned", 5.9),
    ]
    table = ours(tmp_path, "cushioncache_table1", record(model=LLAMA2, rows=rows, **PAPER))
    assert cell(table, "LLaMA2-7B published", "FP16", "none") == "5.47"
    assert cell(table, "LLaMA2-7B ours", "FP16", "none") == "5.50"
    assert cell(table, "LLaMA2-7B difference", "FP16", "none") == "+0.03"
    assert cell(table, "LLaMA2-7B ours", "Per-tensor static", "CushionCache") == "5.90"
    assert cell(table, "LLaMA2-7B difference", "Per-tensor static", "CushionCache") == "-0.08"
    assert cell(table, "LLaMA2-7B ours", "SmoothQuant-O1", "none") == "missing"
    assert cell(table, "LLaMA3-8B published", "FP16", "none") == "6.13"
    assert "LLaMA3-8B ours" not in table.headings()
    assert any(note.startswith("Not run: LLaMA3-8B, ") for note in table.notes)


@pytest.mark.parametrize("learned", ["reconstructed", "learned_ranges"])
def test_rows_whose_quantizer_learned_are_not_in_a_papers_table(tmp_path: Path, learned: str) -> None:
    rows = [row("quantized", 9.0), row("quantized_tuned", 5.9) | {learned: True}]
    table = ours(tmp_path, "cushioncache_table1", record(model=LLAMA2, rows=rows, **PAPER))
    assert cell(table, "LLaMA2-7B ours", "Per-tensor static", "none") == "9.00"
    assert cell(table, "LLaMA2-7B ours", "Per-tensor static", "CushionCache") == "not measured"


def test_a_method_that_learns_has_its_rows_in_its_own_table(tmp_path: Path) -> None:
    """Of one run: the row of full precision, one that was not reconstructed, and one that was."""
    rows = [row("full_precision", 5.5), row("quantized", 9.0), row("quantized", 6.5) | {"reconstructed": True}]
    table = ours(tmp_path, "omniquant_activations", record(model=LLAMA2, rows=rows, quantizer="omniquant"))
    place = table.headings().index("LLaMA2-7B ours")
    assert {line[0].text: line[place].text for line in table.body} == {
        "FP16": "5.50",
        "W6A6": "missing",
        "W4A4": "6.50",
    }


def test_another_model_gets_a_column_of_its_own(tmp_path: Path) -> None:
    planted = record(model="embedded:smollm2-135m", rows=[row("quantized", 66.1)], **PAPER)
    table = ours(tmp_path, "cushioncache_table1", planted)
    assert cell(table, "smollm2-135m ours", "Per-tensor static", "none") == "66.10"
    assert "smollm2-135m published" not in table.headings()
    assert "Not published, ours alone: smollm2-135m." in table.notes


def test_our_own_quantizer_is_a_group_of_rows_for_which_nothing_is_published(tmp_path: Path) -> None:
    planted = [
        record(model=LLAMA2, rows=[row("quantized", 9.0)]),
        record(model=LLAMA2, rows=[row("quantized", 8.0)], **PAPER),
    ]
    table = ours(tmp_path, "cushioncache_table1", *planted)
    for group, number, published in (("as published", "8.00", "9250.33"), ("per tensor, symmetric", "9.00", "-")):
        assert cell(table, "LLaMA2-7B ours", "Per-tensor static", "none", group=group) == number
        assert cell(table, "LLaMA2-7B published", "Per-tensor static", "none", group=group) == published


def test_failed_is_not_missing(tmp_path: Path) -> None:
    done = record(model=LLAMA2, rows=[row("quantized", 9.0)], **PAPER)
    lost = failed("x", model=LLAMA2, **{**PAPER, "quantizer": "cushioncache_o3"})
    table = ours(tmp_path, "cushioncache_table1", done, lost)
    assert cell(table, "LLaMA2-7B ours", "SmoothQuant-O3", "none") == "failed"
    assert cell(table, "LLaMA2-7B ours", "SmoothQuant-O2", "none") == "missing"
    assert cell(table, "LLaMA2-7B ours", "Per-tensor static", "CushionCache") == "not measured"


def test_seeds_are_averaged_and_configurations_that_disagree_are_not(tmp_path: Path) -> None:
    seeds = [record(model=LLAMA2, seed=seed, rows=[row("quantized", 9.0 + 2 * seed)], **PAPER) for seed in (0, 1)]
    table = ours(tmp_path / "seeds", "cushioncache_table1", *seeds)
    assert cell(table, "LLaMA2-7B ours", "Per-tensor static", "none") == "10.00 ± 1.41"
    clash = [record(model=LLAMA2, rows=[row("quantized", n)], **PAPER, **{"eval.blocks": n}) for n in (9.0, 12.0)]
    table = ours(tmp_path / "clash", "cushioncache_table1", *clash)
    assert cell(table, "LLaMA2-7B ours", "Per-tensor static", "none") == "conflict: 9.00 or 12.00"


def test_seeds_of_several_configurations_are_not_averaged(tmp_path: Path) -> None:
    def seeds(folder: str, **rates: float) -> str:
        runs = [
            record(model=LLAMA2, seed=int(name[1]), rows=[row("quantized", 9.0 + 2 * int(name[1]))], **PAPER,
                   **{"tuning.learning_rate": rate})
            for name, rate in rates.items()
        ]  # fmt: skip
        table = ours(tmp_path / folder, "cushioncache_table1", *runs)
        return cell(table, "LLaMA2-7B ours", "Per-tensor static", "none")

    assert seeds("apart", s0a=0.01, s1a=0.1) == "conflict: 9.00 or 11.00, seeds of several configurations"
    assert seeds("one has all", s0a=0.01, s1a=0.01, s0b=0.1) == "10.00 ± 1.41"


def test_lost_seeds_show_in_the_cell(tmp_path: Path) -> None:
    done = [record(model=LLAMA2, seed=seed, rows=[row("quantized", 9.0 + 2 * seed)], **PAPER) for seed in (0, 1)]
    table = ours(tmp_path / "failed", "cushioncache_table1", *done, failed("x", model=LLAMA2, seed=2, **PAPER))
    assert cell(table, "LLaMA2-7B ours", "Per-tensor static", "none") == "10.00 ± 1.41 (2 of 3 seeds)"
    assert cell(table, "LLaMA2-7B difference", "Per-tensor static", "none") == "-9240.33"
    label = ModelConfig(path=LLAMA2).label
    planned = [RunState("missing", ".", "cushioncache_table1", seed=5, model=label)]
    planned.append(RunState("missing", ".", "cushioncache_table1", "seed=6", seed=6, model="other"))
    planned.append(RunState("missing", ".", "cushioncache_table1", "seed=7", model=label))
    runs = collect([write(tmp_path / "missing", *done)])
    table = compare(load_published(FOLDER, "cushioncache_table1"), runs, planned)
    assert cell(table, "LLaMA2-7B ours", "Per-tensor static", "none") == "10.00 ± 1.41 (2 of 3 seeds)"
    lone = collect([write(tmp_path / "lone", record(model=LLAMA2, rows=[row("quantized", 9.0)], **PAPER))])
    assert cell(compare(load_published(FOLDER, "cushioncache_table1"), lone, planned[1:]),
                "LLaMA2-7B ours", "Per-tensor static", "none") == "9.00"  # fmt: skip


def test_a_standard_error_is_told_from_a_deviation(tmp_path: Path) -> None:
    def scored(seed: int, accuracy: float, **others: Any) -> dict[str, Any]:
        rows = [row("quantized", 9.0, accuracy=accuracy, accuracy_stderr=0.02)]
        return record(model=LLAMA2, seed=seed, rows=rows, **PAPER, **others)

    one = ours(tmp_path / "one", "cushioncache_table2", scored(0, 0.5))
    assert cell(one, "LLaMA2-7B ours", "Per-tensor static", "none") == "50.00 ± 2.00"
    assert cell(one, "LLaMA2-7B difference", "Per-tensor static", "none") == "+13.63"
    assert any("standard error" in note for note in one.notes)
    assert not any("deviation" in note for note in one.notes)
    other_model = record(model="x/other", rows=[row("quantized", 9.0, accuracy=0.4, accuracy_stderr=0.03)], **PAPER)
    both = ours(tmp_path / "both", "cushioncache_table2", scored(0, 0.5), scored(1, 0.52), other_model)
    assert cell(both, "LLaMA2-7B ours", "Per-tensor static", "none") == "51.00 ± 1.41"
    assert cell(both, "other ours", "Per-tensor static", "none") == "40.00 ± 3.00 (one seed)"
    assert any("standard error" in note and "deviation" in note for note in both.notes)


def test_models_that_were_not_run_stand_last_and_the_note_names_the_runs(tmp_path: Path) -> None:
    runs = collect([write(tmp_path, record(model="x/other"), record(model="mistralai/Mistral-7B-v0.1"))])
    table = compare(
        load_published(FOLDER, "cushioncache_table1"), runs, numbers={run.path: 7 + n for n, run in enumerate(runs)}
    )
    models = list(dict.fromkeys(heading.rpartition(" ")[0] for heading in table.headings()[3:]))
    assert models == ["Mistral-7B-v0.1", "other", "LLaMA2-7B", "LLaMA3-8B", "OPT-6.7B", "BLOOM-7B"]
    assert table.notes[-1].startswith("Runs 7, 8: ")


def test_the_parts_of_table_3_are_told_apart_by_the_loss(tmp_path: Path) -> None:
    def at(accuracy: float, name: str) -> dict[str, Any]:
        return row(name, 7.0, accuracy=accuracy)

    model = "meta-llama/Meta-Llama-3-8B"
    shared = [at(0.68, "full_precision"), at(0.58, "quantized"), at(0.66, "quantized_found")]
    rows = {"plain": [*shared, at(0.67, "quantized_tuned")], "aware": [*shared, at(0.675, "quantized_tuned")]}
    plain = record(model=model, rows=rows["plain"], **PAPER, **{"tuning.lambda_q": 0.0})
    table = ours(tmp_path, "cushioncache_table3", plain, record(model=model, rows=rows["aware"], **PAPER))
    published = [line for line in table.body if line[0].text == "as published"]
    assert [line[3].text for line in published] == ["68.00", "58.00", "66.00", "67.00", "67.50"]
    assert [line[2].text for line in published] == ["68.83", "58.94", "67.78", "68.13", "68.66"]


def test_table_4_reads_bits_and_two_measures(tmp_path: Path) -> None:
    bits = {"quantizer.weights": {"bits": 6}, "quantizer.activations": {"bits": 6}}
    rows = [row("quantized", 7.0, accuracy=0.6672), row("quantized_tuned", 6.8, accuracy=0.68)]
    table = ours(tmp_path, "cushioncache_table4", record(model="meta-llama/Meta-Llama-3-8B", rows=rows, **bits))
    assert cell(table, "LLaMA3-8B perplexity ours", "W6A6", "none") == "7.00"
    assert cell(table, "LLaMA3-8B accuracy, % difference", "W6A6", "none") == "+0.00"
    assert cell(table, "LLaMA3-8B perplexity ours", "W4A4", "CushionCache") == "missing"


def test_table_5_has_the_last_block_as_published_and_the_worst_beside_it(tmp_path: Path) -> None:
    def at(last: float, worst: float) -> dict[str, float]:
        statistics = ("top1", "top10_percent", "median")
        return {f"last_block_{s}": last / 10**n for n, s in enumerate(statistics)} | {
            f"worst_block_{s}": worst / 10**n for n, s in enumerate(statistics)
        }

    rows = [row("full_precision", 5.0, **at(2000.0, 3000.0)), row("full_precision_tuned", 5.0, **at(20.0, 90.0))]
    table = ours(tmp_path, "cushioncache_table5", record(model=LLAMA2, rows=rows))
    for title, values in (
        ("top-1, last block", ("2000.00", "20.00")), ("top 10 %, last block", ("200.00", "2.00")),
        ("median, last block", ("20.00", "0.20")), ("top-1, worst block", ("3000.00", "90.00")),
        ("top 10 %, worst block", ("300.00", "9.00")), ("median, worst block", ("30.00", "0.90")),
    ):  # fmt: skip
        found = [cell(table, f"{title} ours", "LLaMA2-7B", prefix) for prefix in ("none", "CushionCache")]
        assert found == list(values), title
    assert cell(table, "top-1, last block published", "LLaMA2-7B", "none") == "2461.40"
    assert cell(table, "median, last block ours", "LLaMA3-8B", "none") == "not run"


def test_table_6_reads_hours(tmp_path: Path) -> None:
    table = ours(tmp_path, "cushioncache_table6",
                 record(model=LLAMA2, search={"seconds": 3600.0}, tuning={"seconds": 1800.0}))  # fmt: skip
    assert [cell(table, f"{part}, hours ours", "LLaMA2-7B") for part in ("search", "tuning", "total")] == [
        "1",
        "0.5",
        "1.5",
    ]


def test_qfems_modules_are_those_behind_no_prefix(tmp_path: Path) -> None:
    qfem = {
        "none": {"kept": ["a", "b"], "ratios": {"a": 50.0, "b": 7.0, "c": 2.0}},
        "found": {"kept": [], "ratios": {"a": 3.0}},
    }
    rows = [row("full_precision", 5.0), row("quantized", 5.0), row("quantized_found", 5.0)]
    table = ours(tmp_path, "qfem_modules", record(model=LLAMA2, rows=rows, qfem=qfem))
    titles = ("modules kept", "largest ratio", "smallest ratio kept")
    assert [cell(table, f"{title} ours", "LLaMA2-7B") for title in titles] == ["2", "50", "7"]


def test_another_corpus_is_said(tmp_path: Path) -> None:
    other = row("quantized", 20.0, corpus="embedded")
    table = ours(tmp_path, "cushioncache_table1", record(model=LLAMA2, rows=[other]))
    assert "Ours is measured on embedded, not on wikitext2." in table.notes


def test_an_accuracy_over_other_tasks_is_said(tmp_path: Path) -> None:
    def scored(name: str, *tasks: str) -> Table:
        scores = {task: {"metric": "acc", "value": 0.5, "stderr": 0.01} for task in tasks}
        rows = [row("quantized", 7.0, accuracy=0.5, tasks={**scores, "wikitext": {"metric": None}})]
        made = record(model="x/other", quantizer="qfep", rows=rows)
        return ours(tmp_path / str(len(tasks)), name, made)

    published = ("piqa", "lambada_openai", "hellaswag", "winogrande")
    assert load_published(FOLDER, "qfep_qfem").specification["tasks"] == list(published)
    fewer = scored("qfep_qfem", "piqa", "copa")
    assert cell(fewer, "accuracy, % ours", "other", "per-tensor dynamic") == "50.00"
    assert f"The published accuracy is the mean of {', '.join(published)}; ours of piqa, copa." in fewer.notes
    same = scored("qfep_qfem", *reversed(published))
    assert cell(same, "accuracy, % ours", "other", "per-tensor dynamic") == "50.00"
    assert not any("the mean of" in note for note in same.notes)


def test_every_key_in_which_runs_differ_from_the_published_setting_is_said(tmp_path: Path) -> None:
    def noted(*records: dict[str, Any]) -> list[str]:
        table = ours(tmp_path / str(len(list(tmp_path.iterdir()))), "cushioncache_table1", *records)
        return [note for note in table.notes if note.startswith("Ours differs in: ")]

    as_published = {"eval.blocks": None, "eval.block_length": 2048, "quantizer.smoothing_alpha": 0.8}
    other = {**as_published, "search.scoring": "pruned", "eval.block_length": 512, "quantizer.smoothing_alpha": 0.5}
    (tmp_path / "0").mkdir()
    assert noted(record(model=LLAMA2, **as_published)) == []
    one = {**other, "eval.blocks": 16}
    assert noted(record(model=LLAMA2, **other), record(model=LLAMA2, seed=1, **one)) == [
        "Ours differs in: search.scoring pruned (published full or exact); eval.block_length 512 (published 2048); "
        "eval.blocks 16 (published null); quantizer.smoothing_alpha 0.5 (published null or 0.8)."
    ]
    with pytest.raises(ArtifactError, match=r"table\.yaml: setting=\[1\] is not a record of keys"):
        check_setting({"setting": [1]}, "table.yaml")


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    folder = tmp_path / "published"
    shutil.copytree(FOLDER, folder)
    return folder


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


MISTAKES = {
    "missing column": ("published.csv", "mistral_7b", "mistral", r"published\.csv has no column 'mistral_7b'"),
    "no number": ("published.csv", "5.47,", "n/a,", r"published\.csv, line 2, column 'llama2_7b': 'n/a' is no number"),
    "missing key": ("table.yaml", "columns: [model]", "", r"table\.yaml: the key 'columns' is missing"),
    "unknown key": ("table.yaml", "corpus:", "korpus:", r"the key 'korpus' is unknown; did you mean 'corpus'"),
    "unknown measure": ("table.yaml", "measure: perplexity", "measure: perplexitty", r"no measure 'perplexitty'"),
    "unknown dimension": ("table.yaml", "columns: [model]", "columns: [modell]", r"no dimension 'modell'"),
    "tasks that are no list": ("table.yaml", "corpus:", "tasks: piqa\ncorpus:", r"tasks='piqa' is no list of names"),
    "tasks without names": ("table.yaml", "corpus:", "tasks: [piqa, 3]\ncorpus:", r"tasks=\['piqa', 3\] is no list of"),
    "no tasks": ("table.yaml", "corpus:", "tasks: []\ncorpus:", r"table\.yaml: tasks=\[\] is no list of names"),
    "unselected scheme": ("table.yaml", "    fp16: {quantized: false}\n", "", r"does not say what 'fp16' is"),
    "unknown model": ("../models.yaml", "llama2_7b:", "llama:", r"models\.yaml has no model 'llama2_7b'"),
    "unknown setting": ("table.yaml", "  search.tau:", "  search.tua:", r"names 'search\.tua', which no .* 'sea"),
    "unknown key of a row": ("table.yaml", "fp16: {quantized:", "fp16: {quantised:", r"fp16 has no key 'quantised'"),
    "neither true nor false": ("table.yaml", "{quantized: false}", "{quantized: 3}", r"none\.quantized=3: true or"),
    "no model": ("table.yaml", "model: ", "modell: ", r"table\.yaml: no value is of a model: name it in a column of"),
    "no YAML": ("table.yaml", "rows: [", "rows: [[", r"table\.yaml cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_damaged_table_is_named_with_file_and_column(damaged: Path, mistake: str) -> None:
    file, old, new, message = MISTAKES[mistake]
    edit(damaged / "cushioncache_table1" / file, old, new)
    with pytest.raises(ArtifactError, match=message):
        load_published(damaged, "cushioncache_table1")


def test_rows_may_be_selected_by_keys_that_only_some_runs_have(damaged: Path) -> None:
    key = "config.quantizer.activations.estimator_options.percentile: 99.9"
    edit(damaged / "cushioncache_table1" / "table.yaml", "fp16: {quantized:", f"fp16: {{{key}, quantized:")
    assert load_published(damaged, "cushioncache_table1")


def test_an_unknown_table_is_named_with_those_there_are() -> None:
    with pytest.raises(ArtifactError, match="did you mean 'cushioncache_table1'"):
        load_published(FOLDER, "cushioncache_tabel1")
