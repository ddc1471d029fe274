"""The shipped sweeps: every value of each is valid, every published table has one, and its runs fill the table."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from cushion.cli import config_folder, register_schema, to_run_config
from cushion.config import RunConfig, to_dict
from cushion.reporting.published import PublishedTable, load_published, published_folder, published_names
from cushion.reporting.runs import flatten

FILES = sorted((config_folder() / "experiment").glob("*.yaml"))
SWEEPS = [path for path in FILES if OmegaConf.select(OmegaConf.load(path), "hydra.sweeper.params")]


@pytest.fixture(autouse=True)
def hydra() -> Iterator[None]:
    GlobalHydra.instance().clear()
    register_schema()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        yield


def composed(*overrides: str) -> RunConfig:
    return to_run_config(compose("config", list(overrides)))


def swept(path: Path) -> dict[str, list[str]]:
    params = OmegaConf.load(path).hydra.sweeper.params
    overrides = OverridesParser.create().parse_overrides([f"{key}={values}" for key, values in params.items()])
    return {str(one.key_or_group): list(one.sweep_string_iterator()) for one in overrides}


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_value_of_a_sweep_is_valid_and_makes_another_run(path: Path) -> None:
    assert OmegaConf.load(path).hydra.mode == "MULTIRUN"
    for key, values in swept(path).items():
        configs = [repr(composed(f"experiment={path.stem}", f"{key}={value}")) for value in values]
        assert len(set(configs)) == len(values) > 1, key


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_command_for_the_embedded_model_works(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    for command in (line.removeprefix("#   cushion ") for line in lines if line.startswith("#   cushion ")):
        assert composed(*command.split()).model.path == "embedded:smollm2-135m"


def reachable(table: PublishedTable, path: Path) -> set[str]:
    """The published rows that some run of the sweep is the same thing as."""
    params = {key: values for key, values in swept(path).items() if key != "model"} if path in SWEEPS else {}
    found = set()
    for values in itertools.product(*params.values()):
        overrides = [f"{key}={value}" for key, value in zip(params, values, strict=True)]
        config = flatten(to_dict(composed(f"experiment={path.stem}", *overrides)), "config")
        for entry in table.entries:
            wanted = {}
            for dimension, selections in table.specification.get("select", {}).items():
                wanted |= selections[entry.at[dimension]]
            if all(config[key] == value for key, value in wanted.items() if key.startswith("config.")):
                found.add(row_of(entry.at))
    return found


def row_of(at: dict[str, str]) -> str:
    return str({key: value for key, value in at.items() if key not in ("model", "measure")})


UNREACHABLE = {"spinquant", "smoothquant_qfem"}
"""Methods of published tables that no run of the experiment is, as the table's notes say."""

EXPERIMENTS = config_folder() / "experiment"
NAMED = published_names(published_folder())
WITH_EXPERIMENT = [name for name in NAMED if (EXPERIMENTS / f"{name}.yaml").is_file()]


@pytest.mark.parametrize("name", WITH_EXPERIMENT)
def test_the_runs_of_an_experiment_fill_its_published_table(name: str) -> None:
    table = load_published(published_folder(), name)
    rows = {row_of(entry.at) for entry in table.entries if not UNREACHABLE & set(entry.at.values())}
    assert reachable(table, EXPERIMENTS / f"{name}.yaml") >= rows


@pytest.mark.parametrize("name", WITH_EXPERIMENT)
def test_the_models_of_an_experiment_are_published(name: str) -> None:
    table = load_published(published_folder(), name)
    labels = {table.models[model]["label"] for model in table.keys("model")}
    path = EXPERIMENTS / f"{name}.yaml"
    for model in swept(path).get("model", []) if path in SWEEPS else []:
        assert composed(f"experiment={name}", f"model={model}").model.label in labels
