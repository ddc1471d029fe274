"""The programs of Cushion as processes that start quickly: forked from one that has imported the libraries already.

That is most of what a start takes. `tests/test_cli.py` and `tests/test_packaging.py` start them as a user does.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tiny_run import processes


class Program:
    """A program at work in a process group of its own; what of `subprocess.Popen` is asked for here.

    The figures of its runs are empty files: drawing them takes as long as all the rest of a small run.

    Args:
        module: the one of Cushion's whose `main` it is.
        words: its arguments.
        folder: where it runs.
        out: the file that its standard output is added to.
        err: likewise its standard error.
        site: where packages are installed besides. Cushion itself is then imported anew, and finds their plugins.

    """

    def __init__(
        self, module: str, words: list[str], folder: Path, out: Path, err: Path, site: Path | None = None
    ) -> None:
        self.args = [module, *words]
        given = (module, words, folder, out, err, site, dict(os.environ))
        self._process = processes().Process(target=_main, args=given)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid
        with contextlib.suppress(ProcessLookupError):  # it is over already
            while os.getpgid(self.pid) != self.pid:  # from here on it can be killed as a group
                self._process.join(0.01)

    @property
    def returncode(self) -> int | None:
        """The exit status, the negative signal of a killed one, None of one at work."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """Likewise."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; a `subprocess.TimeoutExpired` if that does not come in time."""
        self._process.join(timeout)
        if self.returncode is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode


def _main(
    module: str,
    words: list[str],
    folder: Path,
    out: Path,
    err: Path,
    site: Path | None,
    environment: dict[str, str],
) -> None:
    """In a process of its own: be the program."""
    os.setpgid(0, 0)
    gc.freeze()
    os.fsync = lambda _: None  # as in `conftest.no_wait_for_the_disk`
    os.chdir(folder)
    for number, path in ((1, out), (2, err)):
        with path.open("ab") as file:
            os.dup2(file.fileno(), number)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["cushion", *words]
    if site is not None:
        sys.path.insert(0, str(site))
        for name in [name for name in sys.modules if name.partition(".")[0] == "cushion"]:
            del sys.modules[name]
    figures = importlib.import_module("cushion.reporting.figures")

    def touch(result: dict[str, Any], folder: Path) -> None:
        for path in figures.figures_of(result, folder).values():
            path.parent.mkdir(exist_ok=True)
            path.touch()

    figures.draw_figures = touch  # type: ignore[attr-defined]
    importlib.import_module(f"cushion.{module}").main()
