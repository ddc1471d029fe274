"""What a user's package adds in one file: it is installed, and stands wherever Cushion's own stands."""

from __future__ import annotations

import json
from pathlib import Path

from installed_plugins import PLUGINS, ROOT, cushion, installed


def test_a_metric_is_one_file_and_stands_in_result_tables_and_report(text_file: Path, tmp_path: Path) -> None:
    assert len((PLUGINS / "forward_speed.py").read_text().splitlines()) <= 60
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


def test_the_page_on_extending_shows_the_very_file() -> None:
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    assert f"```python\n{(PLUGINS / 'forward_speed.py').read_text(encoding='utf-8')}```" in page
