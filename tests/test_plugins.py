"""What a user's package adds in one file: it is installed, and stands wherever Cushion's own stands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PLUGINS = ROOT / "tests" / "plugins"


def installed(site: Path, *names: str) -> Path:
    """A folder in which plugins are installed, with the entry points that their packages would declare."""
    for name in names:
        info = site / f"{name}-1.0.dist-info"
        info.mkdir(parents=True)
        (site / f"{name}.py").write_text((PLUGINS / f"{name}.py").read_text())
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[cushion.plugins]\n{name} = {name}\n")
    return site


def cushion(site: Path, module: str, *words: str) -> str:
    """What a command prints where the plugins of `site` are installed."""
    command = [sys.executable, "-c", f"from cushion.{module} import main; main()", *words]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{site}"}
    done = subprocess.run(command, cwd=site, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


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


@pytest.mark.parametrize("name", ["forward_speed", "eos_search"])
def test_the_page_on_extending_shows_the_very_file(name: str) -> None:
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    assert f"```python\n{(PLUGINS / f'{name}.py').read_text(encoding='utf-8')}```" in page
