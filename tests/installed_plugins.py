"""Plugins as a user's packages install them, and commands that run where they are installed."""

from __future__ import annotations

from pathlib import Path

from programs import Program

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
    out, err = (site.parent / f"{site.name}-{name}.txt" for name in ("out", "err"))
    out.unlink(missing_ok=True)
    status = Program(module, list(words), folder=site, out=out, err=err, site=site).wait(300)
    assert status == 0, err.read_text(encoding="utf-8")
    return out.read_text(encoding="utf-8")
