"""Intervals that hold the truth as often as they say, and closed forms where there are any."""

from statistics import NormalDist

import numpy as np
import pytest

from evals.stats import mean_at_k, min_detectable, paired_difference


def test_mean_is_the_mean_of_problem_means():
    estimate = mean_at_k([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    assert estimate.mean == 0.5 and 0 <= estimate.low < 0.5 < estimate.high <= 1


def test_interval_width_is_the_standard_error_of_problem_means():
    rng = np.random.default_rng(1)
    correct = rng.binomial(1, rng.beta(2, 1, 500)[:, None], (500, 4))
    score = correct.mean(1)
    error = score.std() / 500**0.5
    estimate = mean_at_k(correct, resamples=20_000)
    assert estimate.low == pytest.approx(score.mean() - 1.96 * error, abs=0.003)
    assert estimate.high == pytest.approx(score.mean() + 1.96 * error, abs=0.003)


def test_agrees_with_scipys_bootstrap():
    scipy_stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(2)
    correct = rng.binomial(1, 0.7, (80, 4))
    reference = scipy_stats.bootstrap((correct.mean(1),), np.mean, n_resamples=20_000, method="percentile", rng=3)
    estimate = mean_at_k(correct, resamples=20_000)
    assert estimate.low == pytest.approx(reference.confidence_interval.low, abs=0.004)
    assert estimate.high == pytest.approx(reference.confidence_interval.high, abs=0.004)


@pytest.mark.parametrize("problems", [1, 30, 350])
def test_all_right_or_all_wrong_still_has_an_interval(problems):
    right, wrong = mean_at_k(np.ones((problems, 4))), mean_at_k(np.zeros((problems, 4)))
    assert (right.mean, right.high, wrong.mean, wrong.low) == (1, 1, 0, 0)
    assert right.low == pytest.approx(1 - wrong.high)
    assert right.low**problems == pytest.approx(0.025)  # Clopper-Pearson: at that rate all right has 2.5% chance


def two_level(correct_PK, resamples, rng):
    """What we do not do: draw problems, then samples within each drawn problem (0/1 data: a binomial)."""
    score_P = correct_PK.mean(1)
    drawn_RP = score_P[rng.integers(0, len(score_P), (resamples, len(score_P)))]
    count = correct_PK.shape[1]
    return np.quantile((rng.binomial(count, drawn_RP) / count).mean(1), [0.025, 0.975])


def test_intervals_cover_the_truth_95_times_in_100_and_two_levels_too_often():
    rng = np.random.default_rng(3)
    trials, covered, covered_two = 400, 0, 0
    for trial in range(trials):
        correct = rng.binomial(1, rng.beta(45, 5, 100)[:, None], (100, 4))  # problems of much the same difficulty, 0.9
        estimate = mean_at_k(correct, resamples=400, seed=trial)
        covered += estimate.low <= 0.9 <= estimate.high
        low, high = two_level(correct, 400, rng)
        covered_two += low <= 0.9 <= high
    assert 0.915 <= covered / trials <= 0.975
    assert covered_two / trials > 0.975


def test_paired_intervals_cover_and_find_what_they_say_they_find():
    rng = np.random.default_rng(4)
    truth = float(np.clip(rng.beta(2, 2, 200_000) + 0.08, 0, 1).mean()) - 0.5
    trials, covered, power = 400, 0, 0.0
    detectable = []
    for trial in range(trials):
        ease = rng.beta(2, 2, 150)
        ours = rng.binomial(1, np.clip(ease + 0.08, 0, 1)[:, None], (150, 4))
        theirs = rng.binomial(1, ease[:, None], (150, 4))
        difference = paired_difference(ours, theirs, resamples=400, seed=trial)
        covered += difference.low <= truth <= difference.high
        power += difference.low > 0
        detectable.append(difference.min_detectable)
    assert 0.915 <= covered / trials <= 0.975
    normal = NormalDist()
    error = np.mean(detectable) / (normal.inv_cdf(0.975) + normal.inv_cdf(0.8))
    expected_power = 1 - normal.cdf(1.96 - truth / error)
    assert power / trials == pytest.approx(expected_power, abs=0.05)


def test_pairing_removes_what_both_share():
    rng = np.random.default_rng(5)
    hard = rng.binomial(1, 0.5, 300)[:, None].repeat(4, 1)  # every problem all right or all wrong, the same for both
    other = hard.copy()
    other[:10] = 0
    difference = paired_difference(hard, other)
    alone = mean_at_k(hard)
    assert difference.high - difference.low < 0.4 * (alone.high - alone.low)
    same = paired_difference(hard, hard)
    assert (same.mean, same.low, same.high, same.min_detectable) == (0, 0, 0, 0)


def test_min_detectable_difference_in_closed_form():
    difference = np.array([1.0, -1.0] * 50)
    error = difference.std(ddof=1) / 10
    assert min_detectable(difference) == pytest.approx((1.959964 + 0.841621) * error, rel=1e-5)
    assert min_detectable([0.3]) == 1.0


def test_seeded_and_different_numbers_of_samples_pair():
    rng = np.random.default_rng(6)
    ours, theirs = rng.binomial(1, 0.6, (40, 4)), rng.binomial(1, 0.5, (40, 16))
    assert paired_difference(ours, theirs, seed=1) == paired_difference(ours, theirs, seed=1)
    assert paired_difference(ours, theirs, seed=1) != paired_difference(ours, theirs, seed=2)
    with pytest.raises(ValueError, match="cannot pair 40 problems with 39"):
        paired_difference(ours, theirs[:39])
    with pytest.raises(ValueError, match="at least 1 by 1"):
        mean_at_k(np.zeros((0, 4)))
