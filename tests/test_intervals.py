"""Intervals: against other ways of computing the same, and how often they hold the truth on simulated data."""

from __future__ import annotations

import math

import numpy
import pytest
from scipy import stats

from cushion.intervals import (
    Interval,
    holm,
    linearized,
    over_blocks,
    over_runs,
    percentiles,
    resampled_means,
    student,
)


@pytest.fixture
def generator() -> numpy.random.Generator:
    return numpy.random.default_rng(5)


def ends(found: Interval | None) -> tuple[float, float]:
    assert found is not None
    return found.low, found.high


def test_one_seed_is_the_t_interval_of_the_paired_differences(generator: numpy.random.Generator) -> None:
    mine, other = generator.normal(1500, 90, 16), generator.normal(1400, 90, 16)
    tokens = [511] * 16
    found = over_blocks([linearized(list(mine), list(other), tokens)])
    assert found is not None
    paired = stats.ttest_rel(mine / 511, other / 511)
    assert ends(found) == pytest.approx(tuple(paired.confidence_interval()))
    assert found.p == pytest.approx(paired.pvalue)
    assert found.value == pytest.approx((mine.sum() - other.sum()) / (16 * 511))


def test_blocks_of_different_lengths_count_by_their_tokens(generator: numpy.random.Generator) -> None:
    """The mean is the log ratio of the perplexities, and the error that of leaving out one block after another."""
    tokens = generator.integers(100, 500, 200)
    other = tokens * generator.normal(3.0, 0.3, 200)
    mine = other + tokens * generator.normal(0.1, 0.05, 200)
    found = over_blocks([linearized(list(mine), list(other), [int(n) for n in tokens])])
    assert found is not None
    assert found.value == pytest.approx((mine.sum() - other.sum()) / tokens.sum(), rel=1e-12)
    left_out = [(mine - other)[kept].sum() / tokens[kept].sum() for kept in ~numpy.eye(200, dtype=bool)]
    jackknife = math.sqrt(199 / 200 * ((numpy.array(left_out) - numpy.mean(left_out)) ** 2).sum())
    assert found.stderr == pytest.approx(jackknife, rel=0.01)


def test_seeds_and_blocks_together_are_the_analysis_of_variance(generator: numpy.random.Generator) -> None:
    """The components of variance of seeds, blocks and rest, each estimated by itself and then put together."""
    seeds, blocks = generator.normal(0, 0.05, (4, 1)), generator.normal(0, 0.1, (1, 12))
    values = 0.2 + seeds + blocks + generator.normal(0, 0.03, (4, 12))
    found = over_blocks(values.tolist())
    assert found is not None
    leftover = values - values.mean(1, keepdims=True) - values.mean(0, keepdims=True) + values.mean()
    of_rest = (leftover**2).sum() / (3 * 11)
    of_seed, of_block = values.mean(1).var(ddof=1) - of_rest / 12, values.mean(0).var(ddof=1) - of_rest / 4
    assert of_seed > 0 and of_block > 0
    assert found.stderr**2 == pytest.approx(of_seed / 4 + of_block / 12 + of_rest / 48)
    assert found.value == pytest.approx(values.mean())


def test_two_seeds_have_the_interval_over_blocks_of_their_mean(generator: numpy.random.Generator) -> None:
    values = generator.normal(0.1, 0.05, (2, 9))
    found = over_blocks(values.tolist())
    assert found is not None
    assert ends(found) == pytest.approx(tuple(stats.ttest_1samp(values.mean(0), 0).confidence_interval()))
    assert over_blocks([[0.1]]) is None, "one block says nothing of blocks"


TRIALS = 1000
SPREADS = {
    "both": (0.05, 0.1, 0.02), "blocks": (0.0, 0.1, 0.02), "seeds": (0.1, 0.02, 0.02), "rest": (0.0, 0.0, 0.1),
    "seeds ten times": (0.1, 0.075, 0.0),
}  # fmt: skip


@pytest.mark.parametrize("what", SPREADS)
def test_intervals_hold_the_truth_as_often_as_they_say(what: str) -> None:
    """Three seeds and 16 blocks; where seeds add about ten times what blocks add, they are a little too narrow."""
    draw = numpy.random.default_rng(1).normal
    of_seeds, of_blocks, rest = SPREADS[what]
    held, blocks_alone = 0, 0
    for _ in range(TRIALS):
        values = 0.3 + draw(0, of_seeds, (3, 1)) + draw(0, of_blocks, (1, 16)) + draw(0, rest, (3, 16))
        low, high = ends(over_blocks(values.tolist()))
        held += low <= 0.3 <= high
        low, high = ends(over_blocks([values.mean(0).tolist()]))
        blocks_alone += low <= 0.3 <= high
    assert held / TRIALS > (0.91 if what == "seeds ten times" else 0.92)
    assert what != "seeds" or blocks_alone / TRIALS < 0.5, "without their variance most would miss it"


def test_the_bootstrap_of_counts_is_that_of_records(generator: numpy.random.Generator) -> None:
    differences = generator.choice([-1.0, 0.0, 1.0], 300, p=[0.2, 0.75, 0.05])
    found = percentiles(float(differences.mean()), [(1.0, resampled_means(differences.tolist(), "task"))])
    other = stats.bootstrap((differences,), numpy.mean, method="percentile", n_resamples=10_000, rng=generator)
    assert ends(found) == pytest.approx(tuple(other.confidence_interval), abs=0.004)
    assert found.stderr == pytest.approx(other.standard_error, rel=0.03)
    assert (resampled_means([1.0, 0.0], "task") == resampled_means([1.0, 0.0], "task")).all(), "seeded"
    assert (resampled_means([1.0, 0.0], "task") != resampled_means([1.0, 0.0], "other")).any()


def test_the_p_value_of_a_bootstrap_agrees_with_its_interval(generator: numpy.random.Generator) -> None:
    """Also on skewed differences near the 5 % level, where a normal error says otherwise."""
    verdicts, contradicted = set(), 0
    for losses in range(1, 16):
        differences = [-1.0] * losses + [1.0] * 3 + [0.0] * 100
        found = percentiles(float(numpy.mean(differences)), [(1.0, resampled_means(differences, "task"))])
        holds = found.low <= 0 <= found.high
        assert found.p >= 0.05 if holds else found.p <= 0.05
        assert holm([found.p]) == [not holds]
        verdicts.add(holds)
        contradicted += holds is not (student(found.value, found.stderr, math.inf).p > 0.05)
    assert verdicts == {True, False} and contradicted
    weights = numpy.array([0.25, 0.75])
    means = [generator.normal(0.02, 0.01, 10_000) for _ in weights]
    both = percentiles(0.02, list(zip(weights, means, strict=True)))
    assert both.p == 2 * min((weights @ means <= 0).mean(), (weights @ means >= 0).mean())
    for plain, p in (([0.0, 0.0], 1.0), ([1.0, 1.0], 1e-4)):
        assert percentiles(plain[0], [(1.0, resampled_means(plain, "task"))]).p == p


def test_means_of_two_tasks_err_independently(generator: numpy.random.Generator) -> None:
    tasks = {name: generator.choice([-1.0, 0.0, 1.0], 200).tolist() for name in ("one", "two")}
    weighted = [(0.5, resampled_means(differences, name)) for name, differences in tasks.items()]
    errors = [numpy.std(differences) / math.sqrt(200) for differences in tasks.values()]
    assert percentiles(0.0, weighted).stderr == pytest.approx(math.hypot(*errors) / 2, rel=0.03)


def test_over_seeds_a_difference_has_the_error_of_seeds_and_of_records() -> None:
    found = over_runs([0.10, 0.12, 0.17], [0.02, 0.02, 0.03])
    seeds, records = float(numpy.var([0.10, 0.12, 0.17], ddof=1)) / 3, (0.0004 + 0.0004 + 0.0009) / 3
    assert found.stderr == pytest.approx(math.sqrt(seeds + records))
    assert found.high - found.value > 1.96 * found.stderr
    assert over_runs([0.1, 0.2], [0.02, 0.02]).stderr == pytest.approx(0.02), "two seeds say little of seeds"


def test_nothing_between_two_rows_is_no_difference() -> None:
    assert ends(student(0.0, 0.0, 5)) == (0.0, 0.0)
    assert (student(0.0, 0.0, 5).p, student(0.1, 0.0, 5).p) == (1.0, 0.0)
    found = over_blocks([[0.0] * 4] * 3)
    assert found is not None and found.p == 1.0 and found.exponentiated() is not None


def test_a_ratio_that_overflows_has_no_interval() -> None:
    assert student(700.0, 100.0, 3).exponentiated() is None


def test_holms_correction() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == [True, False, False, True], "the example of Holm's procedure"
    assert holm([0.04]) == [True] and holm([]) == []
    assert holm([0.03, 0.03]) == [False, False]
