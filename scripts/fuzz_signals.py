"""Send a signal to a run at a random moment, start it again, and compare what is left with what an unbroken run leaves.

A case ends well where the second start ends with the unbroken run's results, no step that was finished was computed
again, and an interrupted run ended with status 130 and one line.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import time
from collections.abc import Iterator

from fuzz_report import Case, Limits
from fuzz_runs import KINDS, Ended, Runs, contents, finished

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
_INTERRUPTED = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what this campaign alone has."""
    parser.add_argument("--deadline", type=float, default=120.0, metavar="SECONDS",
                        help="a run hangs that takes longer (default: 120)")  # fmt: skip


def cases(limits: Limits, given: argparse.Namespace) -> Iterator[Case]:
    """One broken run after the other."""
    inputs = limits.folder / "inputs"
    inputs.mkdir()
    runs = Runs(inputs, given.deadline)
    sound, seconds = {}, {}
    for kind in KINDS:
        started = time.monotonic()
        ended = runs.run(kind, limits.folder / f"sound-{kind}")
        seconds[kind] = time.monotonic() - started
        if ended.status != 0:
            raise RuntimeError(f"the sound run of {kind} failed:\n{ended.printed}")
        sound[kind] = contents(limits.folder / f"sound-{kind}" / "outputs")
    for index, draw in limits.draws():
        kind, sent = list(KINDS)[index % len(KINDS)], draw.choice(SIGNALS)
        folder, moment = limits.folder / f"case-{index}", draw.uniform(0.0, seconds[kind])
        folder.mkdir()
        process = runs.start(kind, folder)
        time.sleep(moment)
        os.kill(process, sent)
        broken = runs.wait(process, folder)
        before = finished(folder / "outputs")
        again = runs.run(kind, folder)
        name = f"case {index}: {sent.name} after {moment:.2f} s to {kind}"
        twice = [one for one, file in before.items() if finished(folder / "outputs").get(one) != file]
        yield judged(name, sent, broken, again, contents(folder / "outputs") != sound[kind], twice)
        shutil.rmtree(folder)


def judged(name: str, sent: signal.Signals, broken: Ended, again: Ended, is_different: bool, twice: list[str]) -> Case:
    if broken.status is None or again.status is None:
        return Case(name, "hang", True, (broken if broken.status is None else again).printed[-2000:])
    if broken.has_traceback or again.has_traceback:
        return Case(name, "traceback", True, (broken if broken.has_traceback else again).told)
    if again.status != 0:
        return Case(name, "the second start failed", True, again.told)
    if is_different:
        return Case(name, "a silent difference", True)
    if twice:
        return Case(name, "computed twice", True, "\n".join(twice))
    if broken.status == 0:
        return Case(name, "ended before the signal came")
    said = [line for line in broken.told.splitlines() if line.startswith("cushion: ")]
    if sent is signal.SIGINT and (broken.status != _INTERRUPTED or len(said) != 1):
        return Case(name, f"status {broken.status} of an interrupted run", True, broken.told)
    return Case(name, f"{sent.name}: went on")
