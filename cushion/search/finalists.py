"""Which of a step's best candidates is taken, once they were judged on further texts too.

Of the tokens that are best on one short text some are best there alone. So the best `search.verify_candidates` on the
search text t_0, the finalists, are judged on further texts t_1 to t_V as well, and

    p* = argmin over finalists c of  mean over i = 0..V of  L_q(t_i | p, c) / L_q(t_i | p)

A ratio is not negative, so what a candidate gains on one text alone is at most 1 / (V + 1): no single text can make it
the best, as one could in a sum of objectives (by larger activations) or in a geometric mean (by a ratio near zero). A
single text can spoil it, as one spoils a static range. With V = 0 the mean is the ratio of Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence

TIE = 1e-6
"""Objectives that differ by this share of the smaller one are equal: in float32 the size of a batch moves them by less.
A bound is loosened by twice as much before a candidate is dropped for it."""


def best(scored: list[tuple[int, float]]) -> tuple[int, float] | None:
    """The candidate with the lowest score, the first of those that share it; None of none.

    Args:
        scored: candidates by position, with their objectives or ratios, none below zero.

    """
    if not scored:
        return None
    lowest = min(score for _, score in scored)
    return min((position, score) for position, score in scored if score <= lowest * (1 + TIE))


def finalists(verified: list[tuple[int, float]], count: int) -> list[int]:
    """The `count` candidates with the lowest objectives, by position."""
    ranked = sorted((score, position) for position, score in verified)
    return sorted(position for _, position in ranked[:count])


def mean_ratio(before: Sequence[float], after: Sequence[float | None]) -> float | None:
    """The mean over texts of the objective with a candidate over that without.

    Returns:
        None where an objective with the candidate is missing, or a ratio is infinite. Zero over zero counts 1.

    """
    ratios = []
    for old, new in zip(before, after, strict=True):
        if new is None or (old == 0 and new > 0):
            return None
        ratios.append(new / old if old > 0 else 1.0)
    return sum(ratios) / len(ratios)
