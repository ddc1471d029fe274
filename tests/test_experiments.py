"""The shipped sweeps: every value of each is valid, every published table has one, and its runs fill the table."""

from __future__ import annotations

import itertools
import re
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
from composing import composed, with_values
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from cushion.cli import config_folder
from cushion.config import RunConfig, to_dict
from cushion.flat import flatten
from cushion.reporting.published import PublishedTable, load_published, published_folder, published_names
from cushion.reporting.published_notes import differences

EXPERIMENTS = config_folder() / "experiment"
FILES = sorted(EXPERIMENTS.glob("*.yaml"))
CUT = sorted((EXPERIMENTS / "smollm2").glob("*.yaml"))
SWEEPS = [path for path in FILES if OmegaConf.select(OmegaConf.load(path), "hydra.sweeper.params")]


def swept(path: Path) -> dict[str, list[str]]:
    params = OmegaConf.load(path).hydra.sweeper.params
    overrides = OverridesParser.create().parse_overrides([f"{key}={values}" for key, values in params.items()])
    return {str(one.key_or_group): list(one.sweep_string_iterator()) for one in overrides}


GROUPS = {path.relative_to(config_folder()).as_posix() for path in config_folder().rglob("*") if path.is_dir()}


def sweeping(path: Path) -> list[RunConfig]:
    """Runs of a sweep, as few as bring every value of every key: the n-th has the n-th value of each."""
    params = swept(path)
    runs = []
    for n in range(max(map(len, params.values()))):
        words = {key: f"{key}={values[n % len(values)]}" for key, values in params.items()}
        groups = [word for key, word in words.items() if key.replace(".", "/") in GROUPS]
        runs.append(with_values((f"experiment={path.stem}", *groups), *(w for w in words.values() if w not in groups)))
    return runs


def test_setting_a_value_is_composing_with_it() -> None:
    for value in ("search.tau=0.25", "tuning.lambda_q=0", "seed=4", "quantizer.targets=[q_proj,k_proj]"):
        assert (
            with_values(("experiment=main",), value)
            == composed("experiment=main", value)
            != composed("experiment=main")
        )


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_value_of_a_sweep_is_valid_and_makes_another_run(path: Path) -> None:
    assert OmegaConf.load(path).hydra.mode == "MULTIRUN"
    configs = sweeping(path)
    assert all(config.eval.controls for config in configs), "its rows have ceilings, and so ratios"
    for key, values in swept(path).items():
        parts = [attrgetter(key)(config) for config in configs]
        assert len({repr(getattr(part, "name", part)) for part in parts}) == len(values) > 1, key


def commands_in(path: Path) -> list[str]:
    """The commands in the head of an experiment, by their overrides."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line.removeprefix("#   cushion ") for line in lines if line.startswith("#   cushion ")]


def without_a_network(path: Path, tasks: list[str], perplexity: bool = True) -> str:
    """The command of an experiment on the embedded model that takes nothing from the hub.

    What its files set of single corpora stands beside `data=embedded`, and tasks are left out.
    """
    files = [path.parent.parent / path.name, path] if path in CUT else [path]
    alone = [purpose for file in files for purpose in OmegaConf.load(file).get("data", {})]
    words = [f"experiment={path.relative_to(EXPERIMENTS).with_suffix('')}", "data=embedded"]
    words += [f"data.{purpose}.source=embedded" for purpose in alone]
    words += [] if perplexity else ["eval.perplexity=true"]
    return " ".join([*words, *(["eval.tasks=[]"] if tasks else [])])


def test_the_command_for_the_embedded_model_works() -> None:
    commands = [command for path in FILES for command in commands_in(path)]
    plain = {without_a_network(path, []) for path in FILES}
    assert commands
    own = EXPERIMENTS / "smollm2"
    commands += [*commands_in(own / "quarot_w4a4kv4.yaml"), *commands_in(own / "cushioncache_table2.yaml")]
    for command in commands:
        if command in plain:  # it only names another group
            continue
        config = composed(*command.split())
        assert config.model.path == "embedded:smollm2-135m", command
        if "data=" in command:
            assert {corpus.source for corpus in config.data.purposes().values()} == {"embedded"}, command
            assert config.eval.perplexity and not config.eval.tasks, command
            asked = config.quantizer.calibration
            assert asked.samples * asked.length <= 50_000, f"{command}: a tenth of the text is for calibration"
        else:
            assert "model=" not in command, "on the embedded model without its text"


def test_a_grid_on_the_embedded_model_says_how_it_needs_no_network() -> None:
    grids = [path for path in FILES if path.stem.endswith("_grid") or path.stem == "formats"]
    assert len(grids) == 5
    for path in grids:
        config = composed(*commands_in(path)[-1].split())
        assert {corpus.source for corpus in config.data.purposes().values()} == {"embedded"}, path.stem
        assert commands_in(path)[-1] == without_a_network(path, config.eval.tasks), path.stem


@pytest.mark.parametrize("path", CUT, ids=lambda path: path.stem)
def test_the_cut_of_an_experiment_differs_from_it_in_model_search_tuning_and_evaluation_alone(path: Path) -> None:
    cut, whole = composed(f"experiment=smollm2/{path.stem}"), composed(f"experiment={path.stem}")
    assert (cut.model.path, cut.experiment) == ("embedded:smollm2-135m", path.stem)
    assert (cut.data, cut.quantizer) == (whole.data, whole.quantizer)
    assert cut.eval.perplexity == whole.eval.perplexity
    assert cut.eval.tasks in ([], whole.eval.tasks)
    assert cut.eval.perplexity or cut.eval.tasks
    assert (cut.search.method, cut.tuning.method) == (whole.search.method, whole.tuning.method)
    assert cut.eval.block_length == 512
    assert commands_in(path) == [without_a_network(path, cut.eval.tasks, cut.eval.perplexity)]


def test_the_cut_of_an_experiment_sweeps_over_the_same_with_one_model() -> None:
    for path in CUT:
        whole = path.parent.parent / path.name
        params = dict(swept(whole)) if whole in SWEEPS else {}
        own = OmegaConf.select(OmegaConf.load(path), "hydra.sweeper.params")
        assert (dict(own) if own else {}) == ({"model": "smollm2_135m"} if "model" in params else {}), path.stem


def test_every_table_and_figure_of_cushioncache_has_a_cut_and_its_file_names_it() -> None:
    of_the_paper = {path.stem for path in FILES if path.stem.startswith("cushioncache_")}
    assert of_the_paper <= {path.stem for path in CUT}
    for path in CUT:
        whole = (path.parent.parent / path.name).read_text(encoding="utf-8")
        assert f"cushion experiment=smollm2/{path.stem}\n" in whole


def reachable(table: PublishedTable, name: str) -> set[str]:
    """The published rows that some run of the sweep is the same thing as."""
    found = set()
    for run in runs_of(name):
        config = flatten(to_dict(run), "config")
        for entry in table.entries:
            wanted = {}
            for dimension, selections in table.specification.get("select", {}).items():
                wanted |= selections[entry.at[dimension]]
            if all(config[key] in listed(value) for key, value in wanted.items() if key.startswith("config.")):
                found.add(row_of(entry.at))
    return found


def listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def row_of(at: dict[str, str]) -> str:
    return str({key: value for key, value in at.items() if key not in ("model", "measure")})


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_experiment_is_listed_with_its_command_and_its_text(path: Path) -> None:
    folder = published_folder()
    lines = (folder / "README.md").read_text(encoding="utf-8").splitlines()
    (line,) = [line for line in lines if f"`cushion experiment={path.stem}`" in line]
    cell = line.split("|")[1].strip()
    if not cell.startswith("["):
        assert (cell, (folder / path.stem).exists()) == (path.stem, False)
        return
    title, file, anchor = re.fullmatch(r"\[(\w+)\]\(([^#)]+)#?(\w*)\)", cell).groups()  # type: ignore[union-attr]
    text = (folder / file).read_text(encoding="utf-8")
    assert title == path.stem
    assert f"`cushion experiment={path.stem}`" in text
    assert not anchor or f"\n## {anchor}\n" in text


@pytest.mark.parametrize("path", [path for path in FILES if path.stem.startswith("ablation_")], ids=lambda p: p.stem)
def test_what_an_ablation_varies_stands_in_its_text(path: Path) -> None:
    text = (published_folder() / "ablations" / "README.md").read_text(encoding="utf-8")
    section = text.partition(f"\n## {path.stem.removeprefix('ablation_')}\n")[2].partition("\n## ")[0]
    ((key, values),) = swept(path).items()
    assert f"`{key}`" in section
    if key != "seed":
        assert all(re.search(rf"(?<![\w.]){re.escape(value)}(?![\w.]*\w)", section) for value in values)


def test_the_accuracy_of_qfem_is_the_mean_over_the_published_tasks() -> None:
    tasks = ["piqa", "lambada_openai", "hellaswag", "winogrande"]
    for name in ("qfep_qfem", "smollm2/qfep_qfem"):
        assert composed(f"experiment={name}").eval.tasks == tasks


UNREACHABLE = {"spinquant", "smoothquant_qfem"}
"""Methods of published tables that no run of the experiment is, as the table's notes say."""

NAMED = published_names(published_folder())
WITH_EXPERIMENT = [name for name in NAMED if (EXPERIMENTS / f"{name}.yaml").is_file()]


@pytest.mark.parametrize("name", WITH_EXPERIMENT)
def test_the_runs_of_an_experiment_fill_its_published_table(name: str) -> None:
    table = load_published(published_folder(), name)
    rows = {row_of(entry.at) for entry in table.entries if not UNREACHABLE & set(entry.at.values())}
    assert reachable(table, name) >= rows


NOT_AS_PUBLISHED = {
    "cushioncache_table5": {"eval.block_length"},  # of 4096, a prefix takes some in LLaMA2
    "smoothquant": {"quantizer.calibration.samples"},
    "quarot_w4a4kv4": {"quantizer.calibration.samples", "quantizer.calibration.length"},
    "rptq": {"quantizer.calibration.samples", "quantizer.calibration.length"},
    "rptq_zero_shot": {"quantizer.calibration.samples", "quantizer.calibration.length"},
    "qfem_modules": {"quantizer.calibration.samples", "quantizer.calibration.length"},
    "qfep_qfem": {"quantizer.calibration.samples", "quantizer.calibration.length"},
}
"""The keys in which an experiment on the paper's models is not the published setting; its README says so."""
SETTINGS = {name: load_published(published_folder(), name).specification.get("setting") for name in WITH_EXPERIMENT}
WITH_SETTING = [name for name, setting in SETTINGS.items() if setting]


def differing(name: str, *runs: RunConfig) -> set[str]:
    """The keys in which a run of some configuration is not as published."""
    return set(differences(SETTINGS[name], [to_dict(config) for config in runs]))


def runs_of(name: str) -> list[RunConfig]:
    """The configurations of all runs of an experiment, of its first model."""
    path = EXPERIMENTS / f"{name}.yaml"
    params = {key: values for key, values in swept(path).items() if key != "model"} if path in SWEEPS else {}
    return [
        composed(f"experiment={name}", *(f"{key}={value}" for key, value in zip(params, values, strict=True)))
        for values in itertools.product(*params.values())
    ]


@pytest.mark.parametrize("name", WITH_SETTING)
def test_an_experiment_is_the_published_setting_and_its_cut_names_what_is_not(name: str) -> None:
    assert differing(name, *runs_of(name)) == NOT_AS_PUBLISHED.get(name, set())
    if EXPERIMENTS / "smollm2" / f"{name}.yaml" not in CUT:
        return
    lines = (EXPERIMENTS / "smollm2" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    named = " ".join(line for line in lines if line.startswith("# ") and not line.startswith("#   cushion "))
    assert set(re.findall(r"(\w+(?:\.\w+)+)=", named)) == differing(name, composed(f"experiment=smollm2/{name}"))


def test_an_experiment_whose_notes_say_no_bos_has_none() -> None:
    """So its table says where a run has one, and a model whose tokenizer adds BOS gets none."""
    said = [
        name for name in NAMED if "no BOS" in str(load_published(published_folder(), name).specification.get("notes"))
    ]
    assert {f"cushioncache_table{number}" for number in range(1, 7)} <= set(said)
    for name in said:
        assert (SETTINGS[name] or {}).get("bos") == "never", name
    without = [path.stem for path in FILES if path.stem.startswith(("cushioncache_", "ablation_"))]
    for name in (*said, *without, "methods_grid", "ranges_grid", "formats", "rotation_grid"):
        assert OmegaConf.load(EXPERIMENTS / f"{name}.yaml").bos == "never", name


def test_every_table_of_cushioncache_has_a_setting() -> None:
    assert {f"cushioncache_table{number}" for number in range(1, 7)} <= set(WITH_SETTING)


@pytest.mark.parametrize("name", WITH_EXPERIMENT)
def test_the_models_of_an_experiment_are_published(name: str) -> None:
    table = load_published(published_folder(), name)
    labels = {table.models[model]["label"] for model in table.keys("model")}
    path = EXPERIMENTS / f"{name}.yaml"
    for model in swept(path).get("model", []) if path in SWEEPS else []:
        assert composed(f"experiment={name}", f"model={model}").model.label in labels
