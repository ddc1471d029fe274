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

from cushion.start import INTERRUPTED

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
DEADLINE = 120.0
"""Seconds of the processor, or of waiting, after which a run is said to hang, if nothing else is asked for."""


def cases(limits: Limits, given: argparse.Namespace) -> Iterator[Case]:
    """One broken run after the other."""
    runs = Runs(limits.folder / "inputs", given.deadline)
    sound = {kind: runs.sound(kind, limits.folder / f"sound-{kind}") for kind in KINDS}
    for index, draw in limits.draws():
        kind, sent = list(KINDS)[index % len(KINDS)], draw.choice(SIGNALS)
        folder, moment = limits.folder / f"case-{index}", draw.uniform(0.0, sound[kind].seconds)
        folder.mkdir()
        process = runs.start(kind, folder)
        time.sleep(moment)
        os.kill(process, sent)
        broken = runs.wait(process, folder)
        before = finished(folder / "outputs")
        again = runs.run(kind, folder)
        name = f"case {index}: {sent.name} after {moment:.2f} s to {kind}"
        now = finished(folder / "outputs")
        twice = [one for one, file in before.items() if now.get(one) != file]
        yield judged(name, sent, broken, again, contents(folder / "outputs") != sound[kind].contents, twice)
        shutil.rmtree(folder)


def judged(name: str, sent: signal.Signals, broken: Ended, again: Ended, is_different: bool, twice: list[str]) -> Case:
    """How a case ended."""
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
    if sent is signal.SIGINT and (broken.status != INTERRUPTED or len(said) != 1):
        return Case(name, f"status {broken.status} of an interrupted run", True, broken.told)
    return Case(name, f"{sent.name}: went on")
