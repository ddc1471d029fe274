"""The command `cushion-export`: a finished run's findings as files that other software loads."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import cushion
from cushion import system_errors
from cushion.export.finished import FinishedRun
from cushion.export.targets import EXPORTERS, export


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the command `cushion-export`."""
    try:
        targets = "; ".join(f"{name}: {target.title}" for name, target in EXPORTERS.items())
        parser = argparse.ArgumentParser(
            prog="cushion-export", description="Write what a finished run found as files that other software loads."
        )
        parser.add_argument("--version", action="version", version=f"%(prog)s {cushion.__version__}")
        parser.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run, the one of result.json")
        parser.add_argument("folder", type=Path, metavar="DIR", help="where to write: a new or an empty folder")
        parser.add_argument("--to", required=True, metavar="NAME", help=targets.replace("%", "%%"))
        parser.add_argument(
            "--base-model",
            metavar="ID",
            help="what others load the run's model by, where model.path is not an id of the hub",
        )
        parser.add_argument(
            "--push",
            metavar="REPO",
            help="upload the folder to this repository of the hub, owner/name, too; a new one is private",
        )
        given = parser.parse_args(arguments)
        for path in export(FinishedRun.read(given.run, given.base_model, given.push), given.to, given.folder):
            print(path)
        if given.push is not None:
            from cushion.export.hub import push  # only where it is asked for

            print(push(given.folder.expanduser().resolve(), given.push))
    except system_errors.MENDABLE as error:
        system_errors.end("cushion-export", error, "name another RUN or DIR")


if __name__ == "__main__":
    main()
