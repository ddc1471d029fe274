"""What tells the runs of a sweep apart, by their overrides. Light to import: reports ask it without Hydra."""

from __future__ import annotations

from collections.abc import Sequence


def key_of(override: str) -> str:
    """The key that an override sets: `search.tau` of `search.tau=0.5`."""
    return override.partition("=")[0]


def swept_keys(jobs: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """The keys of the overrides that not all runs share, in their order.

    Args:
        jobs: by run its overrides.

    """
    shared = _shared(jobs)
    return tuple(dict.fromkeys(key_of(override) for job in jobs for override in job if override not in shared))


def own_overrides(jobs: Sequence[Sequence[str]]) -> list[list[str]]:
    """By run those of its overrides that not all runs share; all of them where it shares every one."""
    shared = _shared(jobs)
    return [[override for override in job if override not in shared] or list(job) for job in jobs]


def _shared(jobs: Sequence[Sequence[str]]) -> set[str]:
    return set.intersection(*map(set, jobs)) if jobs else set()
