"""What an export target is: a light declaration of what it can express, and of the function that writes its files.

Cushion's own are in `cushion/export/built_in`; a user's package adds its own through the entry points.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cushion.errors import ArtifactError
from cushion.export.finished import FinishedRun
from cushion.registry import PLUGINS, Registry, located


def _accept(_: FinishedRun) -> None:
    """Refuse nothing."""


@dataclass(frozen=True, kw_only=True)
class ExportTarget:
    """The declaration of a target.

    Args:
        name: the value of `--to`.
        title: what it makes, for the help of the command.
        write: `module:attribute` of the function from a `FinishedRun` and an empty folder, which it fills.
        check: raises `ConfigError` where the target cannot express the run, before anything is written.

    """

    name: str
    title: str
    write: str
    check: Callable[[FinishedRun], None] = _accept


EXPORTERS: Registry[ExportTarget] = Registry("--to", "cushion.export.built_in", PLUGINS)
"""Every target by name: Cushion's own, then those of plugins."""


def register(target: ExportTarget) -> ExportTarget:
    """Make a target known under its name.

    Raises:
        ConfigError: there is one of this name.

    """
    return EXPORTERS.register(target.name, target)


def export(run: FinishedRun, name: str, folder: Path) -> list[Path]:
    """Write a run for a target into a folder, which appears whole or not at all; returns the files, ascending.

    Raises:
        ConfigError: no such target, or it cannot express the run.
        ArtifactError: the folder holds something already, or cannot be written.

    """
    target = EXPORTERS[name]
    target.check(run)
    folder = Path(os.path.realpath(folder.expanduser()))
    with ExitStack() as stack:
        with _writing(folder):
            if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
                raise ArtifactError(f"DIR={str(folder)!r} is there already and is not an empty folder: name a new one")
            folder.parent.mkdir(parents=True, exist_ok=True)
            temporary = stack.enter_context(tempfile.TemporaryDirectory(dir=folder.parent, prefix=".export-"))
            under_way = Path(temporary) / folder.name  # a card may name the folder it is in
            under_way.mkdir()
        write: Any = located(target.write)
        write(run, under_way)  # also reads and writes the run's cache: its errors are not of DIR
        with _writing(folder):
            under_way.replace(folder)
    return sorted(path for path in folder.rglob("*") if path.is_file())


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Where an error of the file system is one of DIR."""
    try:
        yield
    except OSError as error:
        raise ArtifactError(
            f"DIR={str(folder)!r} cannot be written ({error}): name a folder that you may write to"
        ) from error
