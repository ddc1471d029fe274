"""Commands as other Unix programs: interrupted at any moment, their output read in part, asked for their version."""

from __future__ import annotations

import importlib
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import cushion
from cushion import start

ROOT = Path(cushion.__file__).resolve().parent.parent

MOMENTS = {
    "while it is imported": "ready()\ndef main(): pass",
    "before it begins": "def main(): ready()",
    "with something to clean up": """
from cushion import start
def main():
    with start.interruptible():
        try:
            ready()
        finally:
            print("cleaned up")
""",
    "while it cleans up": """
import os, signal
from cushion import start
def main():
    with start.interruptible():
        try:
            os.kill(os.getpid(), signal.SIGINT)
        finally:
            ready()
""",
    "when it is done": "import atexit\ndef main(): atexit.register(ready)",
}
"""A command that is interrupted where it says that it is ready."""

READY = """
import pathlib, time
def ready():
    pathlib.Path("ready").touch()
    time.sleep(60)
"""

Started = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Started]:
    """`started(content)`: the command that is the module of this content, as a process."""
    processes: list[subprocess.Popen[str]] = []

    def begin(content: str) -> subprocess.Popen[str]:
        (tmp_path / "command.py").write_text(content)
        path = os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")])
        words = [sys.executable, "-c", "from cushion import start; start._run('cushion', 'command', '; go on')"]
        process = subprocess.Popen(
            words, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        processes.append(process)
        return process

    yield begin
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("moment", MOMENTS)
def test_an_interrupt_at_any_moment_is_one_line_and_status_130(started: Started, tmp_path: Path, moment: str) -> None:
    process = started(READY + MOMENTS[moment])
    until = time.monotonic() + 60
    while not (tmp_path / "ready").exists():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "cushion: interrupted; go on\n")
    assert out == ("cleaned up\n" if moment == "with something to clean up" else "")


@pytest.mark.parametrize("lines", [1, 100_000])
def test_output_that_nobody_reads_ends_a_command_without_a_word(started: Started, lines: int) -> None:
    process = started(f"def main(): print('line\\n' * {lines})")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.wait(timeout=60) == start.OUTPUT_CLOSED == 141
    assert process.stderr.read() == ""


def test_a_broken_pipe_that_is_not_standard_output_is_an_error_as_any_other(started: Started) -> None:
    process = started("def main(): raise BrokenPipeError(32, 'of a socket')")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.startswith("Traceback") and "of a socket" in err


def test_a_users_program_keeps_its_own_way_of_being_interrupted() -> None:
    before = signal.getsignal(signal.SIGINT)
    with start.interruptible():
        assert signal.getsignal(signal.SIGINT) is before


VERSIONS = {
    "cushion": "cushion.start",
    "cushion-export": "cushion.export.cli",
    "cushion-report": "cushion.reporting.cli",
    "cushion-status": "cushion.reporting.status",
}


@pytest.mark.parametrize("command", VERSIONS)
def test_every_command_says_its_version(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [command, "--version"])
    try:
        importlib.import_module(VERSIONS[command]).main()
    except SystemExit as end:
        assert not end.code
    assert capsys.readouterr().out == f"{command} {cushion.__version__}\n"


@pytest.mark.parametrize(
    ("words", "module"),
    [(["rerun", "result.json"], "cushion.rerun"), (["seed=1", "rerun"], "cushion.cli"), ([], "cushion.cli")],
)
def test_rerun_is_a_command_of_its_own_in_the_first_place(
    monkeypatch: pytest.MonkeyPatch, words: list[str], module: str
) -> None:
    started: list[str] = []
    monkeypatch.setattr(sys, "argv", ["cushion", *words])
    monkeypatch.setattr(start, "_run", lambda name, module, _: started.extend((name, module)))
    start.main()
    assert started == ["cushion", module]


def test_the_package_is_a_command_too_and_its_help_says_what_it_is(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "cushion", "--help"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    first, *_ = done.stdout.splitlines()
    assert first.startswith("cushion: experiments on activation outliers")
    examples = [line for line in done.stdout.splitlines() if line.startswith("  cushion ")]
    assert len(examples) == 3
    assert "search: bos, greedy_exact" in done.stdout
    assert not list(tmp_path.iterdir()), "help makes no folder"


KEPT = """
import resource, sys
from cushion import start
if sys.argv[1] == "kept":
    start.keep_freed_memory()
def new_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(2**24)
    bytearray(2**26)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
new_pages()
print(new_pages())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_memory_that_is_freed_is_kept_for_what_comes_next() -> None:
    pages = {
        way: int(subprocess.run([sys.executable, "-c", KEPT, way], check=True, capture_output=True, text=True).stdout)
        for way in ("kept", "as it is")
    }
    assert pages["kept"] < pages["as it is"] / 4
