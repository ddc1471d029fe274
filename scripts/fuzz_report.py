"""What the campaigns of scripts/fuzz.py share: cases with their verdicts, the limits of a campaign, and its table."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Case:
    """One case that was tried: what was done, how it ended, and what was seen where it ended badly."""

    name: str
    verdict: str
    is_bad: bool = False
    seen: str = ""


@dataclass(frozen=True)
class Limits:
    """How much a campaign may do, where it works, and what its cases are drawn from.

    `cases` is how many, from that of the number `first` on, so that several processes share a campaign. `index` is the
    number of one case to do alone, as the report of a bad one names it, or None for all.
    """

    seed: int
    cases: int
    seconds: float
    folder: Path
    index: int | None = None
    first: int = 0

    def draws(self) -> Iterator[tuple[int, random.Random]]:
        """The cases' numbers while there is time, each with its own source of random numbers."""
        until = time.monotonic() + self.seconds
        for index in range(self.first, self.first + self.cases) if self.index is None else [self.index]:
            if time.monotonic() > until:
                return
            yield index, random.Random(f"{self.seed}/{index}")


def report(cases: Iterable[Case]) -> bool:
    """Print every bad case as it comes, then how many of each verdict; whether there were cases, and none was bad."""
    counts: Counter[tuple[bool, str]] = Counter()
    for case in cases:
        counts[case.is_bad, case.verdict] += 1
        if case.is_bad:
            print(f"{case.verdict}: {case.name}", flush=True)
            for line in case.seen.splitlines():
                print(f"    {line}", flush=True)
    print(f"{'verdict':<44} {'cases':>6}")
    for (is_bad, verdict), count in sorted(counts.items()):
        print(f"{verdict + (' (bad)' if is_bad else ''):<44} {count:>6}")
    print(f"{'all':<44} {sum(counts.values()):>6}")
    return bool(counts) and not any(is_bad for is_bad, _ in counts)
