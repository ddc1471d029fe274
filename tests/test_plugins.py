"""What a user's package adds in one file: it is installed, and stands wherever Cushion's own stands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from installed_plugins import PLUGINS, ROOT, cushion, installed


def test_a_metric_is_one_file_and_stands_in_result_tables_and_report(text_file: Path, tmp_path: Path) -> None:
    site, out = installed(tmp_path / "site", "forward_speed"), tmp_path / "out"
    printed = cushion(
        site, "cli", "model=tiny", "data=file", f"data.path={text_file}", "search=newline", "tracking=none",
        "quantizer.calibration.samples=2", "quantizer.calibration.length=16", "eval.block_length=32", "eval.blocks=2",
        "eval.activation_blocks=2", f"paths.output_dir={out}",
    )  # fmt: skip
    assert "forward pass" in printed.splitlines()[0]
    (path,) = out.rglob("result.json")
    result = json.loads(path.read_text())
    speeds = [row["values"]["tokens_per_second"] for row in result["rows"]]
    assert len(speeds) >= 3
    assert all(0 < speed < 1e9 for speed in speeds)
    assert result["metrics"]["tokens_per_second"] == speeds[-1]
    cushion(site, "reporting.cli", str(out), "-o", str(tmp_path / "report"))
    (table,) = (tmp_path / "report").rglob("runs/*.csv")
    assert "forward pass, tokens/s" in table.read_text().splitlines()[0]


def test_a_family_and_an_export_target_are_one_file_each_and_serve_a_run(text_file: Path, tmp_path: Path) -> None:
    site, out = installed(tmp_path / "site", "phi_family", "token_ids_export"), tmp_path / "out"
    cushion(
        site, "cli", "model=tiny", "model.path=tiny:phi", "data=file", f"data.path={text_file}",
        "search=newline", "quantizer=smoothquant_o3", "tracking=none", "quantizer.calibration.samples=2",
        "quantizer.calibration.length=16", "eval.block_length=32", "eval.blocks=2", "eval.activation_blocks=2",
        f"paths.output_dir={out}",
    )  # fmt: skip
    (path,) = out.rglob("result.json")
    result = json.loads(path.read_text())
    assert (result["model"]["architecture"], result["prefix"]["text"]) == ("phi", "\n")
    made = tmp_path / "tokens"
    printed = cushion(site, "export.cli", str(path.parent), "--to", "token_ids", str(made))
    assert printed.split() == [str(made / "prefix_tokens.json")]
    assert json.loads((made / "prefix_tokens.json").read_text()) == {
        "model": "tiny:phi",
        "token_ids": result["prefix"]["token_ids"],
        "text": "\n",
    }
    adapter = tmp_path / "adapter"
    cushion(site, "export.cli", str(path.parent), "--to", "peft", str(adapter), "--base-model", "owner/base")
    assert json.loads((adapter / "adapter_config.json").read_text())["num_virtual_tokens"] == 1
    last = next(row for row in reversed(result["rows"]) if not row["quantized"])
    card = (adapter / "README.md").read_text()
    assert f"gives the row '{last['label']}'" in card
    assert f"{last['values']['perplexity/text']:.2f}" in card


def test_a_tuned_prefix_is_not_exported_as_its_tokens(tmp_path: Path) -> None:
    tuned = {"status": "completed", "config": {"tuning": {"name": "short"}}, "prefix": {"tuned": True}, "rows": []}
    (tmp_path / "result.json").write_text(json.dumps({**tuned, "schema_version": 2}))
    site = installed(tmp_path / "site", "token_ids_export")
    with pytest.raises(AssertionError, match=r"cushion-export: error: tuning=short changed what .* with --to=peft"):
        cushion(site, "export.cli", str(tmp_path), "--to", "token_ids", str(tmp_path / "made"))


@pytest.mark.parametrize("words", [["model=tiny"], ["--cfg", "job"], ["--help"]], ids=" ".join)
def test_a_broken_plugin_stops_every_command_in_one_line(tmp_path: Path, words: list[str]) -> None:
    site = installed(tmp_path / "site", "forward_speed")
    (site / "forward_speed.py").write_text("import nowhere\n")
    with pytest.raises(AssertionError) as stopped:
        cushion(site, "cli", *words)
    (line,) = str(stopped.value).partition("\nassert ")[0].removeprefix("AssertionError: ").strip().splitlines()
    message = "cushion: error: the plugin forward_speed = forward_speed of forward_speed cannot be loaded (mend or"
    assert line.startswith(message) and "No module named 'nowhere'" in line


@pytest.mark.parametrize("name", ["forward_speed", "phi_family", "token_ids_export"])
def test_the_page_on_extending_shows_the_very_file(name: str) -> None:
    file = (PLUGINS / f"{name}.py").read_text(encoding="utf-8")
    assert len(file.splitlines()) <= 60
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    assert f"```python\n{file}```" in page
