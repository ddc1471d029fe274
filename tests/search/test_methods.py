"""Search methods are declared once: nothing else lists them, and one file adds another."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from installed_plugins import PLUGINS as PLUGINS_FOLDER
from installed_plugins import ROOT, cushion, installed
from tiny_run import small_config

from cushion import pipeline
from cushion.config import SearchConfig
from cushion.config_warnings import options_without_effect
from cushion.errors import ConfigError
from cushion.registry import PLUGINS, located
from cushion.search.methods import METHODS, SearchMethod, register

PLUGIN = PLUGINS_FOLDER / "eos_search.py"
NAMES = set(METHODS) - {"none"}


# ---- one room -------------------------------------------------------------------------------------------------------

ROOMS = ("search/built_in",)
"""Where methods are named."""
STARTS = ("config/search.py", "('empty', 'bos', 'newline')")
"""Values of `search.start`, which says what the greedy search begins with."""


def lists_of_names(tree: ast.AST) -> Iterator[str]:
    """Collections that hold two names of methods or more, and comparisons of a method with a name."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Tuple, ast.List, ast.Set, ast.Dict)):
            items = node.keys if isinstance(node, ast.Dict) else node.elts
            if len({item.value for item in items if isinstance(item, ast.Constant)} & NAMES) > 1:
                yield ast.unparse(node)
        elif isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            named = any(isinstance(side, ast.Constant) and side.value in NAMES for side in sides)
            if named and any("method" in ast.unparse(side) for side in sides):
                yield ast.unparse(node)
        elif isinstance(node, ast.MatchValue) and ast.literal_eval(node.value) in NAMES:
            yield ast.unparse(node)


def test_no_other_module_lists_the_methods() -> None:
    package = ROOT / "cushion"
    found = [
        (str(path.relative_to(package)), text)
        for path in sorted(package.rglob("*.py"))
        if not str(path.relative_to(package)).startswith(ROOMS)
        for text in lists_of_names(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert found == [STARTS]


@pytest.mark.parametrize(
    "line",
    [
        "x = ('greedy', 'qfep')",
        "x = {'bos': 1, 'random': 2}",
        "x = search.method == 'greedy'",
        "x = search.get('method') != 'tokens'",
        "match method:\n    case 'greedy': pass",
    ],
)
def test_a_list_of_methods_is_seen(line: str) -> None:
    assert len(list(lists_of_names(ast.parse(line)))) == 1
    assert list(lists_of_names(ast.parse("x = ('greedy', 'none'), start == 'bos', {'tokens': 1}"))) == []


def test_a_declaration_imports_no_torch() -> None:
    code = "import sys; from cushion.search.methods import METHODS; print(*METHODS); assert 'torch' not in sys.modules"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stderr == ""
    assert done.stdout.split() == list(METHODS)


def test_what_a_declaration_names_is_there() -> None:
    for name, method in METHODS.items():
        assert method.name == name
        for place in (method.find, method.start):
            assert place is None or callable(located(place))


def test_every_method_has_an_option() -> None:
    options = [yaml.safe_load(path.read_text()) for path in (ROOT / "conf" / "search").glob("*.yaml")]
    assert {option["method"] for option in options} == set(METHODS)


def test_a_key_that_there_is_not_cannot_be_read() -> None:
    with pytest.raises(ConfigError, match=r"search.method=mine is declared to read search.lenght, which there is not"):
        SearchMethod(name="mine", title="my prefix", find=None, reads=("lenght", "seed"))


# ---- a method of a user's -------------------------------------------------------------------------------------------


@pytest.fixture
def own_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(METHODS, "_items", {name: METHODS[name] for name in METHODS})


@pytest.mark.usefixtures("own_methods")
def test_a_method_that_is_registered_is_checked_warned_of_and_run(text_file: Path, tmp_path: Path) -> None:
    def check(search: SearchConfig) -> None:
        if search.length == 3:
            raise ConfigError("search.length=3 is unlucky")

    places = {"find": "cushion.search.given:find", "start": "cushion.search.given:newline_tokens"}
    register(SearchMethod(name="mine", title="my prefix", reads=("length",), check=check, **places))
    with pytest.raises(ConfigError, match="unlucky"):
        SearchConfig(method="mine", length=3)
    config = small_config(text_file, tmp_path)
    config.search = SearchConfig(name="mine", method="mine", length=2, tau=0.25)
    assert options_without_effect(config) == ["search.tau=0.25 has no effect with search.method=mine"]
    result = pipeline.run(config)
    assert result.search is not None and result.prefix is not None
    assert (result.search["method"], result.prefix["text"]) == ("mine", "\n")
    assert result.rows[-1].label.endswith(" + my prefix")
    with pytest.raises(ConfigError, match=r"search.method=mine is registered twice"):
        register(METHODS["mine"])


def test_one_file_and_one_option_add_a_method(text_file: Path, tmp_path: Path) -> None:
    assert len(PLUGIN.read_text().splitlines()) <= 60
    site = installed(tmp_path / "site", "eos_search")
    config = small_config(text_file, tmp_path / "given")
    words = [
        "model=tiny", "data=file", f"data.path={text_file}", "search=eos", "tracking=none",
        "quantizer.calibration.samples=2", "quantizer.calibration.length=16", "eval.block_length=32", "eval.blocks=4",
        "eval.activation_blocks=2", f"paths.output_dir={tmp_path / 'out'}",
    ]  # fmt: skip
    assert "EOS prefix" in cushion(site, "cli", "--config-dir", str(PLUGINS_FOLDER / "conf"), *words)
    (path,) = (tmp_path / "out").rglob("result.json")
    result = json.loads(path.read_text())
    assert result["search"] == {"method": "eos", "token_ids": [257]}
    assert result["warnings"] == []
    config.search = SearchConfig(name="tokens", method="tokens", token_ids=[257])
    given = pipeline.run(config)
    for row, other in zip(result["rows"], given.rows, strict=True):
        assert {**row["values"], "seconds": 0} == {**other.values, "seconds": 0}


def test_a_plugin_that_is_changed_makes_another_run(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(text_file, tmp_path)
    folders = []
    for version in ("", "1", "2"):
        monkeypatch.setattr(PLUGINS, "versions", lambda version=version: {"mine": version} if version else {})
        folders.append(pipeline.run_folder(replace(config)))
    assert len(set(folders)) == 3


def test_the_page_on_extending_shows_the_very_file() -> None:
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    option = PLUGINS_FOLDER / "conf" / "search" / "eos.yaml"
    for path, language in ((PLUGIN, "python"), (option, "yaml")):
        assert f"```{language}\n{path.read_text()}```" in page, path.name
