"""The full-precision rows of a run, by their prefix: what each of its other rows is compared with."""

from __future__ import annotations

from dataclasses import dataclass

from cushion.metrics.columns import Measured
from cushion.prefix import Prefix


@dataclass(frozen=True)
class Ceiling:
    """A full-precision row: its name, and what was found on it."""

    name: str
    measured: Measured


class Ceilings:
    """The full-precision rows that a run has measured so far."""

    def __init__(self) -> None:
        self._by_prefix: dict[str, dict[str, Ceiling]] = {}

    def add(self, stage: str, prefix: Prefix, ceiling: Ceiling) -> None:
        """Remember a row in full precision."""
        self._by_prefix.setdefault(prefix.fingerprint, {})[stage] = ceiling

    def of(self, stage: str, prefix: Prefix) -> Ceiling | None:
        """Full precision with the very same prefix, of the same stage where there are several; None without any.

        Two stages have the same prefix where tuning kept what was found, or a row changes the model alone.
        """
        same = self._by_prefix.get(prefix.fingerprint, {})
        return same.get(stage) or next(iter(same.values()), None)
