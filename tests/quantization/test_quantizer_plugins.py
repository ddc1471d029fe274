"""What a user's package adds to the quantizer in one file: a range estimator, and a part."""

from __future__ import annotations

import json
import runpy
from typing import Any

import pytest
import torch
from installed_plugins import PLUGINS, ROOT, cushion, installed

from cushion.quantization.estimators.registry import ESTIMATORS
from cushion.quantization.numerics import Grid
from cushion.quantization.statistics.histogram import Histogram

NAMES = ("percentile_999", "bias_correction", "powers_of_two", "optq")


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
    names = ",".join([*NAMES, "per_tensor_static"])
    cushion(site, "cli", "--config-dir", str(PLUGINS / "conf"), "-m", *words, f"quantizer={names}")
    read = [json.loads(path.read_text()) for path in (folder / "out").rglob("result.json")]
    assert len(read) == 5
    return {result["config"]["quantizer"]["name"]: result for result in read}


def values(result: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in result["rows"][-1]["values"].items() if "seconds" not in key}


def test_an_estimator_in_one_file_is_chosen_by_its_option(results: dict[str, dict[str, Any]]) -> None:
    assert values(results["percentile_999"]) != values(results["per_tensor_static"])
    assert results["percentile_999"]["warnings"] == []


def test_its_range_is_that_of_the_built_in_percentile(monkeypatch: pytest.MonkeyPatch) -> None:
    built_in = ESTIMATORS["percentile"]
    monkeypatch.setattr(ESTIMATORS, "_items", dict(ESTIMATORS.items()))
    own = runpy.run_path(str(PLUGINS / "percentile_999.py"), run_name="percentile_999_here")["range_of"]
    observed = Histogram()
    observed.update(torch.randn(64, 100, generator=torch.Generator().manual_seed(0)) ** 3)
    low, high = built_in.range_of(observed, Grid(8, True), {"percentile": 99.9})
    assert own(observed, None, {}) == (pytest.approx(float(low)), pytest.approx(float(high)))


def test_a_part_in_one_file_changes_the_model_and_its_label(results: dict[str, dict[str, Any]]) -> None:
    assert values(results["bias_correction"]) != values(results["per_tensor_static"])
    assert results["bias_correction"]["config"]["quantizer"]["plugins"] == {"bias_correction": {}}


def test_a_part_that_is_fitted_block_by_block_is_one_file(results: dict[str, dict[str, Any]]) -> None:
    assert values(results["optq"]) != values(results["per_tensor_static"])
    assert results["optq"]["rows"][-1]["label"].startswith("optq W3")


def test_a_number_format_in_one_file_rounds_the_weights_and_stands_in_the_label(
    results: dict[str, dict[str, Any]],
) -> None:
    assert results["powers_of_two"]["rows"][-1]["label"].startswith("powers_of_two W3(powers_of_two)A8")
    assert values(results["powers_of_two"]) != values(results["per_tensor_static"])


@pytest.mark.parametrize("name", NAMES)
def test_the_page_on_extending_shows_the_very_files(name: str) -> None:
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    assert len((PLUGINS / f"{name}.py").read_text().splitlines()) <= 60
    for path, language in ((PLUGINS / f"{name}.py", "python"), (PLUGINS / "conf/quantizer" / f"{name}.yaml", "yaml")):
        assert f"```{language}\n{path.read_text(encoding='utf-8')}```" in page, path.name
