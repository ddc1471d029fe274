"""The wheel: it carries every configuration file, no tests, and its command finds them from any folder."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, built without a network and without touching the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    build = "import sys; from hatchling.build import build_wheel; build_wheel(sys.argv[1])"
    command = [sys.executable, "-c", build, str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.mark.parametrize(
    ("folder", "known"), [("conf", "config.yaml"), ("experiments", "cushioncache_table1/published.csv")]
)
def test_the_wheel_carries_configuration_and_published_numbers_as_they_are(
    wheel: Path, folder: str, known: str
) -> None:
    with zipfile.ZipFile(wheel) as archive:
        carried = {name: archive.read(name) for name in archive.namelist() if name.startswith(f"cushion/{folder}/")}
    files = [path for path in (ROOT / folder).rglob("*") if path.is_file()]
    assert carried == {
        f"cushion/{folder}/{path.relative_to(ROOT / folder).as_posix()}": path.read_bytes() for path in files
    }
    assert f"cushion/{folder}/{known}" in carried


def test_the_wheel_carries_the_package_and_its_licence_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "cushion").rglob("*.py")}
    assert modules <= names
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"cushion", "cushion_quant"}
    assert not [name for name in names if "test" in name]
    data = ("cushion/conf/", "cushion/experiments/")
    inside = {name for name in names if name.startswith("cushion/") and not name.startswith(data)}
    templates = {path.relative_to(ROOT).as_posix() for path in (ROOT / "cushion/reporting/templates").iterdir()}
    assert inside == modules | templates
    assert [name for name in names if name.endswith("/licenses/LICENSE")]
    assert [name for name in names if name.endswith("/entry_points.txt")]


def test_nobody_is_told_to_install_the_other_project_that_is_called_cushion_on_pypi(wheel: Path) -> None:
    name = re.compile(r"pip install[^\n]*[ '\"]cushion(?![\w-])")
    assert name.search("pip install -U 'cushion[dev]'") and name.search("pip install cushion")
    assert not name.search("pip install cushion-quant")
    with zipfile.ZipFile(wheel) as archive:
        told = [file for file in archive.namelist() if name.search(archive.read(file).decode("utf-8", "ignore"))]
    pages = [
        *ROOT.glob("*.*"),
        ROOT / "Makefile",
        *(ROOT / "docs").rglob("*.md"),
        ROOT / "docs/tutorial.ipynb",
        *(ROOT / "scripts").iterdir(),
    ]
    assert told + [path for path in pages if path.is_file() and name.search(path.read_text(encoding="utf-8"))] == []
    assert wheel.name.startswith("cushion_quant-")


def in_unpacked(unpacked: Path, folder: Path, code: str, *arguments: str) -> str:
    """Standard output of a program that sees the unpacked wheel, in a folder that has nothing to do with it."""
    environment = {**os.environ, "PYTHONPATH": str(unpacked)}
    command = [sys.executable, "-P", "-c", code, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_command_of_the_wheel_uses_the_configuration_inside_it(unpacked: Path, tmp_path: Path) -> None:
    code = "from cushion import cli; print(cli.__file__); print(cli.config_folder())"
    module, configuration = in_unpacked(unpacked, tmp_path, code).splitlines()
    assert Path(module) == unpacked / "cushion" / "cli.py"
    assert Path(configuration) == unpacked / "cushion" / "conf"

    chosen = unpacked / "cushion" / "conf" / "eval" / "short.yaml"
    chosen.write_text(chosen.read_text().replace("block_length: 512", "block_length: 37"))
    start = "from cushion.cli import main; main()"
    composed = in_unpacked(unpacked, tmp_path, start, "--cfg", "job", "model=tiny", "quantizer=smoothquant_o1")
    assert "block_length: 37" in composed  # only the copy inside the wheel says so
    assert "path: tiny:llama" in composed
    assert "name: smoothquant_o1" in composed
    assert not (tmp_path / "outputs").exists()


def test_the_report_of_the_wheel_uses_the_published_numbers_inside_it(unpacked: Path, tmp_path: Path) -> None:
    chosen = unpacked / "cushion" / "experiments" / "cushioncache_table6" / "published.csv"
    chosen.write_text(chosen.read_text().replace("2.68", "77.25"))
    config = {"experiment": "cushioncache_table6", "model": {"path": "meta-llama/Llama-2-7b-hf"},
              "quantizer": {"name": "none"}, "search": {"name": "none"}, "tuning": {"name": "none"}}  # fmt: skip
    result = {
        "schema_version": 1,
        "status": "completed",
        "config": config,
        "environment": {},
        "rows": [],
        "timings": {},
    }
    (tmp_path / "result.json").write_text(json.dumps(result))
    in_unpacked(unpacked, tmp_path, "from cushion.reporting.cli import main; main()", ".")
    assert "77.25" in (tmp_path / "report" / "report.html").read_text()
