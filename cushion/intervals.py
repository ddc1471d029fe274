"""95 % intervals of paired comparisons: over blocks of text, over records of tasks, and over seeds.

Everything is on the scale on which differences add up: log perplexities in nats per token, accuracies as fractions.

## Over seeds

Runs that differ only in their seed differ in the texts that calibrate, search and tune, and share the text that is
measured. A ratio is averaged as a logarithm, so that of several seeds is their geometric mean.

- **Ratios, three seeds or more.** Seeds and blocks of text are crossed random effects: the log ratio of seed s on
  block b is y_sb = mean + seed_s + block_b + rest_sb. With the mean squares of the two-way analysis of variance, the
  variance of the mean over S seeds and B blocks is (MS_seeds + MS_blocks - MS_rest) / (S B): the estimated components
  var(seed) / S + var(block) / B + var(rest) / (S B) (Brennan, *Generalizability Theory*, 2001, the p x i design). A
  mean square below MS_rest counts as MS_rest. The interval is the t interval with Satterthwaite's degrees of freedom.
  With three seeds that differ it is wide (about two degrees of freedom, 4.3 standard errors). It is about other seeds
  and other blocks. On simulated data with three seeds it holds the truth in 92 to 95 % (`tests/test_intervals.py`):
  least often where seeds add about ten times as much to the variance as blocks do, since the degrees of freedom are
  estimated too.
- **Accuracy differences, three seeds or more.** The variance of the mean is s^2 / S, of the S differences, plus the
  mean of the squared bootstrap errors, with Satterthwaite's degrees of freedom.
- **One or two seeds.** The interval is over the blocks (or records) alone, and says nothing of other seeds.
- Where seeds were not measured on the same blocks, or their blocks predict other numbers of tokens
  (`eval.prefix_in_block=true` with prefixes of different lengths), there is no interval, and the cell holds mean ±
  standard deviation.

A number is a headline only with three seeds or more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # imported where it is used: columns are read without it
    import numpy

    Array = numpy.ndarray[Any, numpy.dtype[numpy.float64]]

LEVEL = 0.95
"""How much of their sampling distribution intervals cover."""
SEEDS_NEEDED = 3
"""From how many seeds on an interval holds the variance between seeds."""
RESAMPLES = 10_000
"""Resamples of a bootstrap."""


@dataclass(frozen=True)
class Interval:
    """An estimate, its standard error, its 95 % interval, and the two-sided p-value of the estimate being zero."""

    value: float
    stderr: float
    low: float
    high: float
    p: float

    def exponentiated(self) -> Interval | None:
        """The same of `exp` of the value, a ratio, whose standard error is by the delta method; None if it overflows.

        The p-value is then that of the ratio being one.
        """
        try:
            ratio = math.exp(self.value)
            return Interval(ratio, ratio * self.stderr, math.exp(self.low), math.exp(self.high), self.p)
        except OverflowError:
            return None


def student(value: float, stderr: float, freedom: float) -> Interval:
    """The t interval of an estimate with a standard error of so many degrees of freedom, which may be infinite."""
    from scipy.special import ndtr, ndtri, stdtr, stdtrit

    if stderr == 0.0:
        return Interval(value, 0.0, value, value, 1.0 if value == 0.0 else 0.0)
    tail, size = (1 + LEVEL) / 2, -abs(value) / stderr
    reach = float(ndtri(tail) if math.isinf(freedom) else stdtrit(freedom, tail)) * stderr
    p = 2 * float(ndtr(size) if math.isinf(freedom) else stdtr(freedom, size))
    return Interval(value, stderr, value - reach, value + reach, p)


def linearized(nats: Sequence[float], other: Sequence[float], tokens: Sequence[int]) -> list[float]:
    """One value per block whose plain mean is the log ratio of two perplexities over the same blocks.

    With D the difference of the summed losses of a block, n its tokens, and sums over the B blocks, the log ratio is
    r = sum D / sum n, and the value of a block is r + B (D - r n) / sum n: the linearization of a ratio estimator
    (Cochran, Sampling Techniques, chapter 6). Where all blocks have as many tokens it is D / n.

    Args:
        nats: summed losses of a row, one per block.
        other: those of its baseline.
        tokens: how many were predicted.

    """
    differences = [mine - theirs for mine, theirs in zip(nats, other, strict=True)]
    total, count = sum(tokens), len(differences)
    ratio = sum(differences) / total
    return [ratio + count * (d - ratio * n) / total for d, n in zip(differences, tokens, strict=True)]


def over_blocks(values: Sequence[Sequence[float]]) -> Interval | None:
    """The mean over seeds and blocks of `values`, one sequence of blocks per seed; None with fewer than two blocks.

    With three seeds or more, seeds and blocks are crossed random effects of one value per pair: the variance of the
    mean is (MS_seeds + MS_blocks - MS_rest) / (S B), of the mean squares of the two-way analysis of variance, with
    degrees of freedom by Satterthwaite (the model and its source: docs/reports.md). A mean square below MS_rest counts
    as MS_rest (its component of variance is zero), so the variance is never below that of the blocks' means alone. With
    fewer seeds it is that one: the t interval over the blocks, each averaged over the seeds.
    """
    import numpy

    table = numpy.asarray(values, dtype=numpy.float64)
    seeds, blocks = table.shape
    if blocks < 2:
        return None
    mean, by_block = float(table.mean()), table.mean(axis=0)
    if seeds < SEEDS_NEEDED:
        return student(mean, float(by_block.std(ddof=1)) / math.sqrt(blocks), blocks - 1)
    by_seed = table.mean(axis=1)
    rest = ((table - by_seed[:, None] - by_block + mean) ** 2).sum() / ((seeds - 1) * (blocks - 1))
    of_seeds = max(blocks * by_seed.var(ddof=1), rest)
    of_blocks = max(seeds * by_block.var(ddof=1), rest)
    square = of_seeds + of_blocks - rest
    if square == 0.0:
        return student(mean, 0.0, math.inf)
    spread = of_seeds**2 / (seeds - 1) + of_blocks**2 / (blocks - 1) + rest**2 / ((seeds - 1) * (blocks - 1))
    return student(mean, math.sqrt(square / (seeds * blocks)), float(square**2 / spread))


def over_runs(values: Sequence[float], errors: Sequence[float]) -> Interval:
    """The mean of values of several seeds that were each measured on the same records with a standard error.

    With three seeds or more its variance is taken as s^2 / S + mean(error^2): the first holds the seeds, the second
    the records. What is of a seed and of a record at once is in both, so the variance is rather too large than too
    small. With fewer seeds it is mean(error^2) alone, as if all seeds erred on the same records.
    """
    import numpy

    mean, of_records = float(numpy.mean(values)), float(numpy.mean(numpy.square(errors)))
    if len(values) < SEEDS_NEEDED:
        return student(mean, math.sqrt(of_records), math.inf)
    of_seeds = float(numpy.var(values, ddof=1)) / len(values)
    freedom = math.inf if of_seeds == 0.0 else (len(values) - 1) * ((of_seeds + of_records) / of_seeds) ** 2
    return student(mean, math.sqrt(of_seeds + of_records), freedom)


def resampled_means(differences: Sequence[float], name: str, seed: int = 0) -> Array:
    """Means of `RESAMPLES` bootstrap resamples of the differences of paired records, (RESAMPLES,).

    How often a resample has each of the distinct differences (three, for accuracies) is multinomial, so the resamples
    are drawn as these counts; their distribution is that of drawing record by record.

    Args:
        differences: one per record.
        name: of the task: each has draws of its own.
        seed: of the draws.

    """
    import numpy

    generator = numpy.random.default_rng([seed, int.from_bytes(sha256(name.encode()).digest()[:8], "big")])
    distinct, counts = numpy.unique(numpy.asarray(differences, dtype=numpy.float64), return_counts=True)
    records, found = len(differences), []
    step = max(1, 10_000_000 // len(distinct))
    for done in range(0, RESAMPLES, step):
        drawn = generator.multinomial(records, counts / records, size=min(step, RESAMPLES - done))
        found.append(drawn @ distinct / records)
    return numpy.concatenate(found)


def percentiles(value: float, means: Sequence[tuple[float, Array]]) -> Interval:
    """The percentile bootstrap interval of a weighted sum of means, with the p-value of the same resamples.

    The p-value is twice the share of the resamples on the rarer side of zero, those at zero counted on both, and at
    least one of the resamples (Efron and Tibshirani, section 15.4: the level at which the interval just reaches zero).
    It is at most 5 % where the interval does not hold zero, and at least 5 % where it does.

    Args:
        value: the sum itself.
        means: weight and resampled means of each task.

    """
    import numpy

    resampled = numpy.sum([weight * of for weight, of in means], axis=0)
    low, high = numpy.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    tail = min(int((resampled <= 0.0).sum()), int((resampled >= 0.0).sum()))
    p = min(max(2 * tail, 1) / len(resampled), 1.0)
    return Interval(value, float(resampled.std(ddof=1)), float(low), float(high), p)


def holm(p_values: Sequence[float]) -> list[bool]:
    """Which of several comparisons are significant together at 5 %, by Holm's step-down procedure (1979)."""
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    found = [False] * len(p_values)
    for rank, place in enumerate(order):
        if p_values[place] > (1 - LEVEL) / (len(order) - rank):
            break
        found[place] = True
    return found
