"""How Cushion's commands start and stop, at whatever moment: as other Unix programs do.

An interrupt (SIGINT) ends a command with one line on standard error and exit status 130. A reader of standard output
that has enough, as in `cushion --help | head -1`, ends it without a word, with the status of a program that SIGPIPE
ended. Light to import, since what a command needs takes seconds to be imported and may be interrupted too.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

import cushion

INTERRUPTED, OUTPUT_CLOSED = 128 + signal.SIGINT, 128 + signal.SIGPIPE
"""Exit statuses, as a shell has them of a program that the signal ended."""

_MALLOC_TRIM_THRESHOLD, _MALLOC_MAPPINGS = -1, -4
"""M_TRIM_THRESHOLD and M_MMAP_MAX of glibc's malloc.h."""

_GOES_ON = "; the same command goes on from here"
_said: str | None = None
"""What is said of an interrupt; None where no command of ours was started, as in a user's own program."""


def main() -> None:
    """Entry point of the command `cushion`, and of `python -m cushion`."""
    if "--version" in sys.argv[1:]:
        print(f"cushion {cushion.__version__}")
        return
    _run("cushion", "cushion.rerun" if sys.argv[1:2] == ["rerun"] else "cushion.cli", _GOES_ON)


def export() -> None:
    """Entry point of the command `cushion-export`."""
    _run("cushion-export", "cushion.export.cli")


def generate() -> None:
    """Entry point of the command `cushion-generate`."""
    _run("cushion-generate", "cushion.generate")


def report() -> None:
    """Entry point of the command `cushion-report`."""
    _run("cushion-report", "cushion.reporting.cli")


def status() -> None:
    """Entry point of the command `cushion-status`."""
    _run("cushion-status", "cushion.reporting.status")


def keep_freed_memory() -> None:
    """Have the C library keep what is freed for what is allocated next, logits above all, on a model on the CPU.

    By default every tensor above 32 MB is a mapping of its own, whose pages the system zeroes anew each time. Where the
    C library is not glibc, nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_MALLOC_MAPPINGS, 0)
        mallopt(_MALLOC_TRIM_THRESHOLD, 2**31 - 1)


def _run(name: str, module: str, advice: str = "") -> None:
    """Be the command whose `main` is in a module."""
    global _said
    _said = f"{name}: interrupted{advice}"
    signal.signal(signal.SIGINT, _stop_at_once)
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch: large tensors in huge pages, a tenth off tuning
    try:
        command = importlib.import_module(module).main
        if name == "cushion":  # which says itself from when on there is something to clean up
            command()
        else:
            with interruptible():
                command()
        sys.stdout.flush()
    except KeyboardInterrupt:
        say_interrupted()
        sys.exit(INTERRUPTED)
    except BrokenPipeError as error:
        end_if_output_is_closed(error)
        raise
    except SystemExit:
        with _ending():
            sys.stdout.flush()
        raise


@contextmanager
def _ending() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError as error:
        end_if_output_is_closed(error)
        raise


# ---- interrupts -----------------------------------------------------------------------------------------------------


def say_interrupted() -> None:
    """The one line on standard error."""
    print(_said or f"cushion: interrupted{_GOES_ON}", file=sys.stderr)


@contextmanager
def interruptible() -> Iterator[None]:
    """Within the block an interrupt is a `KeyboardInterrupt`, since there is something to clean up; the next one ends.

    Outside of it an interrupt ends the command at once: raised in the middle of an import, say, it could become
    another error, or be swallowed.
    """
    if _said is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, _stop_with_care)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def interrupt_with_care() -> None:
    """From here on an interrupt is a `KeyboardInterrupt`, also outside of `interruptible`: other processes are up."""
    if _said is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, _stop_with_care)


def _stop_with_care(_number: int, _frame: FrameType | None) -> None:
    signal.signal(signal.SIGINT, _stop_at_once)
    raise KeyboardInterrupt


def _stop_at_once(_number: int, _frame: FrameType | None) -> None:
    with suppress(OSError):  # nobody reads it
        os.write(2, f"{_said}\n".encode())
    os._exit(INTERRUPTED)


# ---- standard output ------------------------------------------------------------------------------------------------


def end_if_output_is_closed(error: BaseException) -> None:
    """End the command without a word if the error is that nobody reads standard output any more.

    Raises:
        SystemExit: it is.

    """
    if isinstance(error, BrokenPipeError) and _is_closed():
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())  # what is still to be written at the end is for nobody
        raise SystemExit(OUTPUT_CLOSED) from None


def _is_closed() -> bool:
    """Whether standard output is a pipe without a reader."""
    try:
        number = sys.stdout.fileno()
    except (OSError, ValueError):  # it is no file: replaced within this process
        return False
    poll = select.poll()
    poll.register(number, select.POLLOUT)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
