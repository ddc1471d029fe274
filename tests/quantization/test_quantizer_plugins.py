"""What a user's package adds to the quantizer in one file: a range estimator, and a part."""

from __future__ import annotations

import json
from typing import Any

import pytest
from installed_plugins import PLUGINS, ROOT, cushion, installed

NAMES = ("percentile_999", "bias_correction")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The result of every quantizer: with both plugins installed, each by the option that it brings."""
    folder = tmp_path_factory.mktemp("plugins")
    site = installed(folder / "site", *NAMES)
    text = folder / "text.txt"
    text.write_text("\n\n".join(f"Paragraph {n} says {n * n} and {n % 7}." for n in range(400)))
    words = [
        "model=tiny", "data=file", f"data.path={text}", "search=newline", "tracking=none", "eval.controls=false",
        "quantizer.calibration.samples=4", "quantizer.calibration.length=64", "eval.block_length=32", "eval.blocks=4",
        "eval.activation_blocks=2", "quantizer.weights.bits=3", f"paths.output_dir={folder / 'out'}",
    ]  # fmt: skip
    same = "{percentile: 99.9}"
    for choice in (
        ["quantizer=percentile_999,bias_correction,per_tensor_static"],
        ["quantizer.activations.estimator=percentile", f"+quantizer.activations.estimator_options={same}"],
    ):
        sweep = ["-m"] if "," in choice[0] else []
        cushion(site, "cli", "--config-dir", str(PLUGINS / "conf"), *sweep, *words, *choice)
    read = [json.loads(path.read_text()) for path in (folder / "out").rglob("result.json")]
    assert len(read) == 4
    own = {"minmax": "per_tensor_static", "percentile": "percentile"}
    return {
        own[result["config"]["quantizer"]["activations"]["estimator"]]
        if result["config"]["quantizer"]["name"] == "per_tensor_static"
        else result["config"]["quantizer"]["name"]: result
        for result in read
    }


def values(result: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in result["rows"][-1]["values"].items() if "seconds" not in key}


def test_an_estimator_in_one_file_gives_what_the_built_in_one_does(results: dict[str, dict[str, Any]]) -> None:
    assert values(results["percentile_999"]) == values(results["percentile"])
    assert values(results["percentile_999"]) != values(results["per_tensor_static"])
    assert results["percentile_999"]["warnings"] == []


def test_a_part_in_one_file_changes_the_model_and_its_label(results: dict[str, dict[str, Any]]) -> None:
    assert values(results["bias_correction"]) != values(results["per_tensor_static"])
    assert results["bias_correction"]["config"]["quantizer"]["plugins"] == {"bias_correction": {}}


@pytest.mark.parametrize("name", NAMES)
def test_the_page_on_extending_shows_the_very_files(name: str) -> None:
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    assert len((PLUGINS / f"{name}.py").read_text().splitlines()) <= 60
    for path, language in ((PLUGINS / f"{name}.py", "python"), (PLUGINS / "conf/quantizer" / f"{name}.yaml", "yaml")):
        assert f"```{language}\n{path.read_text(encoding='utf-8')}```" in page, path.name
