"""Seeded campaigns of random cases: what a user's machine or hands may do to Cushion must end well.

    python scripts/fuzz.py damage --cases 600      # one file of a finished run is damaged, and the run repeated
    python scripts/fuzz.py signals --cases 200     # a run is interrupted, terminated or killed, and started again
    python scripts/fuzz.py configs --cases 500     # keys with values that a user may give them, sensible or not

The same seed makes the same cases; `--case` repeats one of them, and `--first 100 --cases 50` does those from 100 to
149. Exit status 0: there were cases, and none ended badly. A campaign is a module beside this one with `DEADLINE`, and
`cases`, which yields one `fuzz_report.Case` after the other.
"""

from __future__ import annotations

import argparse
import importlib
import shutil
import sys
import tempfile
from pathlib import Path

from fuzz_report import Limits, report

CAMPAIGNS = {"damage": "fuzz_damage", "signals": "fuzz_signals", "configs": "fuzz_configs"}
"""The campaigns, and the modules that they are in."""


def main() -> None:
    """Do one campaign, print its table, exit with 1 where a case ended badly."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="campaign", required=True)
    modules = {name: importlib.import_module(module) for name, module in CAMPAIGNS.items()}
    for name, module in modules.items():
        command = commands.add_parser(name, help=(module.__doc__ or "").splitlines()[0])
        command.add_argument("--seed", type=int, default=0, help="of the cases (default: 0)")
        command.add_argument("--cases", type=int, default=100, help="how many, from --first on (default: 100)")
        command.add_argument("--seconds", type=float, default=600.0, help="no case begins after them (default: 600)")
        command.add_argument("--first", type=int, default=0, metavar="NUMBER", help="begin with this one (default: 0)")
        command.add_argument("--case", type=int, metavar="NUMBER", help="do this one alone")
        command.add_argument("--folder", type=Path, help="keep everything there; it must be new (default: a temporary)")
        command.add_argument("--deadline", type=float, default=module.DEADLINE, metavar="SECONDS",
                             help=f"of work or waiting: then a run hangs (default: {module.DEADLINE:g})")  # fmt: skip
    given = parser.parse_args()
    folder: Path = (given.folder or Path(tempfile.mkdtemp(prefix="cushion-fuzz-"))).resolve()
    folder.mkdir(parents=True, exist_ok=given.folder is None)
    limits = Limits(given.seed, given.cases, given.seconds, folder, given.case, given.first)
    is_well = report(modules[given.campaign].cases(limits, given))
    if given.folder is None:
        shutil.rmtree(folder)
    sys.exit(0 if is_well else 1)


if __name__ == "__main__":
    main()
