"""Intervals against values that are known otherwise."""

import numpy as np
import pytest

from benchmarks.quality.statistics import paired_bootstrap, wilson


@pytest.mark.parametrize(
    ("successes", "trials", "level", "low", "high"),
    [
        # Newcombe, Statistics in Medicine 17 (1998), 857-872, table I.
        (81, 263, 0.95, 0.2553, 0.3662),
        (15, 148, 0.95, 0.0624, 0.1605),
        (0, 20, 0.95, 0.0, 0.1611),
        (1, 29, 0.95, 0.0061, 0.1718),
        # z^2 = 2.7055: z^2 / (n + z^2) where no trial fails.
        (10, 10, 0.9, 0.7871, 1.0),
    ],
)
def test_wilson(successes, trials, level, low, high):
    interval = wilson(successes, trials, level=level)
    assert interval == pytest.approx((successes / trials, low, high), abs=6e-5)


def test_bootstrap_of_two_tasks_is_known_exactly():
    """Means of two draws from 0 and 1: 0, 1/2, 1 with odds 1, 2, 1."""
    ours, theirs = [3.0, 6.0], [3.0, 5.0]
    wide = paired_bootstrap(ours, theirs, seed=0)
    assert wide == (0.5, 0.0, 1.0)
    narrow = paired_bootstrap(ours, theirs, seed=0, level=0.4)
    assert narrow == (0.5, 0.5, 0.5)


def test_bootstrap_keeps_pairs_and_meets_the_normal_interval():
    """Tasks of very different difficulty, differences of standard deviation 0.1."""
    rng = np.random.default_rng(1)
    theirs = rng.normal(0, 100, 400)
    differences = rng.normal(0.05, 0.1, 400)
    found = paired_bootstrap(theirs + differences, theirs, seed=3)
    reach = 1.959964 * differences.std() / 20
    assert found.estimate == pytest.approx(differences.mean())
    assert found.low == pytest.approx(found.estimate - reach, abs=reach / 20)
    assert found.high == pytest.approx(found.estimate + reach, abs=reach / 20)
    assert found == paired_bootstrap(theirs + differences, theirs, seed=3)
    assert found != paired_bootstrap(theirs + differences, theirs, seed=4)


def test_bootstrap_draws_as_many_as_asked_for_in_parts(monkeypatch):
    """Parts of a few rows give the same interval as all rows at once."""
    ours, theirs = np.arange(30.0), np.zeros(30)
    whole = paired_bootstrap(ours, theirs, seed=0, resamples=1001)
    monkeypatch.setattr("benchmarks.quality.statistics._DRAWS_AT_ONCE", 90)
    assert paired_bootstrap(ours, theirs, seed=0, resamples=1001) == whole


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: wilson(1, 0), "1 of 0"),
        (lambda: wilson(3, 2), "3 of 2"),
        (lambda: wilson(1, 2, level=1.0), "level=1.0"),
        (lambda: paired_bootstrap([], [], seed=0), "0 and 0"),
        (lambda: paired_bootstrap([1], [1, 2], seed=0), "1 and 2"),
        (lambda: paired_bootstrap([1], [1], seed=0, level=0), "level=0"),
        (lambda: paired_bootstrap([1], [1], seed=0, resamples=0), "resamples=0"),
    ],
)
def test_wrong_arguments(call, words):
    with pytest.raises(ValueError, match=words):
        call()
