"""Which of a step's best candidates is taken, once they were judged on further texts too.

Summed as they are, the text with the largest objectives would decide; over L_q(t_i | p), the one that is least in need
of a prefix, which differs between texts tenfold. A geometric mean has no bound on what one text gains a candidate. One
text can spoil it, as it spoils a static range.

## Verification on further texts

Ours. Of 49,152 candidates some are best on one text alone. So the `search.verify_candidates` best ones on the search
text t_0, the finalists, are judged on further texts t_1 to t_V too, disjoint from all texts of the steps and the same
in every step:

    M_i  = median over finalists c of L_q(t_i | p, c)
    p*   = argmin over finalists c of  mean over i = 0..V of  L_q(t_i | p, c) / M_i
    if  mean over i of L_q(t_i | p, p*) / L_q(t_i | p)  > tau: stop

Over its median every text counts alike, and one text alone gains a candidate at most 1 / (V + 1). With V = 0 this is
Algorithm 1, and so it is for every option but `greedy_pruned`. A step costs V (n + K (n + 1)) token-forwards more:
with V = 4 and K = 12 a quarter of a pruned step.

On the embedded text (seed 0) `|')` has the lowest L_q on the search text, and the blank is sixth. Over all five texts
the blank is best, and its perplexity is 29.85 where that of `|')` is 32.38. Five texts are still a sample: on C4
seeds 0 to 3 find the blank and seed 4 another token, 6 % worse in perplexity (54.77 and 51.72). That token is best over
nine texts of 128 tokens too, and the blank not among the last 20: more texts do not mend it. Longer ones: not tried.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median_low

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


def scores(objectives: Sequence[Sequence[float | None]]) -> list[float | None]:
    """The score of each finalist: the mean over texts of its objective over the median one of the text.

    Args:
        objectives: for each finalist, those of all texts; None where one is not finite.

    Returns:
        None for a finalist without all objectives, which has no part in the medians.

    """
    known = [row for row in objectives if None not in row]
    medians = [median_low(column) for column in zip(*known, strict=True)]
    return [mean_ratio(medians, row) for row in objectives]


def mean_ratio(before: Sequence[float], after: Sequence[float | None]) -> float | None:
    """The mean over texts of objectives over others, those `before`.

    Returns:
        None where an objective is missing, or a ratio is infinite. Zero over zero counts 1.

    """
    ratios = []
    for old, new in zip(before, after, strict=False):
        if new is None or (old == 0 and new > 0):
            return None
        ratios.append(new / old if old > 0 else 1.0)
    return sum(ratios) / len(ratios) if ratios else None
