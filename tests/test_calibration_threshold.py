"""What a threshold promises: closed forms, simulated coverage, records and messages."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from scipy import stats

from polyspect.calibration import (
    Calibration,
    calibrate,
    false_reject_bound,
    parts_for_average,
    parts_for_confidence,
)
from polyspect.errors import CalibrationError, DataError

QUICK = settings(max_examples=80, deadline=None, derandomize=True)


def test_the_worked_example_of_25_parts():
    calibration = calibrate(np.arange(25.0), false_reject=0.1)
    assert (calibration.n, calibration.rank, calibration.threshold) == (25, 24, 23.0)
    assert calibration.expected_rate == pytest.approx(2 / 26)
    assert calibration.upper_bound == pytest.approx(stats.beta.ppf(0.95, 2, 24))
    assert calibration.supported
    assert calibration.parts_needed is None
    assert calibration.statement == (
        "25 good parts (validation); threshold = 24th of 25 scores; expected false-reject rate at most 7.7 %; "
        "with 95 % confidence below 17.7 %; for 10 % with 95 % confidence you need 29 good parts"
    )


def test_too_few_parts_give_the_highest_score_and_say_how_many_are_needed():
    calibration = calibrate([3.0, 1.0, 2.0], false_reject=0.01)
    assert calibration.threshold == 3.0
    assert not calibration.supported
    assert calibration.parts_needed == 99
    assert calibration.statement.endswith(
        "1 % cannot be promised from so few: it needs 99 on average and 299 with 95 % confidence"
    )
    confident = calibrate(np.arange(298.0), 0.01, guarantee="confidence")
    assert (confident.supported, confident.parts_needed, confident.rank) == (False, 299, 298)
    assert confident.statement.endswith("it needs 299 with 95 % confidence")
    enough = calibrate(np.arange(299.0), 0.01, guarantee="confidence")
    assert (enough.supported, enough.parts_needed, enough.rank) == (True, None, 299)
    assert enough.statement.endswith("below 1 %, as wished (1 %)")


@pytest.mark.parametrize(
    ("rate", "average", "confident"), [(0.01, 99, 299), (0.02, 49, 149), (0.05, 19, 59), (0.1, 9, 29), (0.5, 1, 5)]
)
def test_parts_needed_are_the_known_figures_and_the_least_ones(rate, average, confident):
    assert parts_for_average(rate) == average
    assert parts_for_confidence(rate) == confident
    assert calibrate(np.arange(average), rate).supported
    assert average == 1 or not calibrate(np.arange(average - 1.0), rate).supported
    assert calibrate(np.arange(confident), rate, guarantee="confidence").supported
    assert not calibrate(np.arange(confident - 1.0), rate, guarantee="confidence").supported


def test_parts_needed_where_the_quotient_is_whole():
    assert parts_for_confidence(0.5, 0.875) == 3  # (1 - 0.5)^3 = 1 - 0.875
    assert parts_for_average(0.07) == 14  # 1 / 0.07 = 14.3


@QUICK
@given(st.integers(1, 400), st.sampled_from([0.01, 0.03, 0.05, 0.07, 0.1, 0.29, 0.57, 0.9]))
def test_rank_is_the_least_that_keeps_the_wish(n, rate):
    average, sure = (calibrate(np.arange(float(n)), rate, guarantee=g) for g in ("average", "confidence"))
    percent = round(100 * rate)
    fits = [k for k in range(1, n + 1) if 100 * (n + 1 - k) <= percent * (n + 1)]  # whole numbers: no rounding
    assert average.rank == (fits[0] if fits else n)
    assert average.supported == bool(fits)
    fits = [k for k in range(1, n + 1) if stats.binom.cdf(n - k, n, rate) <= 1 - 0.95 + 1e-12]
    assert sure.rank == (fits[0] if fits else n)
    assert sure.supported == bool(fits)
    assert sure.rank >= average.rank or rate > 0.5


def test_bound_is_clopper_pearson_for_the_parts_above_the_threshold():
    for n, k in ((25, 24), (25, 25), (100, 96), (7, 3)):
        exact = stats.binomtest(n - k, n).proportion_ci(confidence_level=0.9, method="exact").high  # two-sided 90 %
        assert false_reject_bound(n, k, 0.95) == pytest.approx(exact, rel=1e-9)
    assert false_reject_bound(40, 40, 0.95) == pytest.approx(1 - 0.05 ** (1 / 40))


@pytest.mark.parametrize(("guarantee", "n", "rate"), [("average", 25, 0.1), ("confidence", 60, 0.1)])
@pytest.mark.parametrize("levels", [None, 20])
def test_simulated_lines_keep_both_promises(guarantee, n, rate, levels):
    """Uniform scores, so the true false-reject rate of a threshold is known; rounded to 20 levels they are tied."""
    generator, rates = np.random.default_rng(11), []
    for _ in range(4000):
        scores = generator.random(n)
        if levels:
            scores = np.floor(scores * levels) / levels
        calibration = calibrate(scores, rate, guarantee=guarantee)
        rates.append(max(0.0, 1 - calibration.threshold - (1 / levels if levels else 0)))
    rates = np.array(rates)
    # four standard errors of a mean and of a share over 4000 lines
    assert rates.mean() <= calibration.expected_rate + 4 * rates.std() / math.sqrt(4000)
    covered = np.mean(rates <= calibration.upper_bound)
    assert covered >= 0.95 - 4 * math.sqrt(0.95 * 0.05 / 4000)
    if levels is None:  # without ties both are exact, so they must not be far below either
        assert rates.mean() >= calibration.expected_rate - 4 * rates.std() / math.sqrt(4000)
        assert covered <= 0.95 + 4 * math.sqrt(0.95 * 0.05 / 4000)
    if guarantee == "confidence":
        assert np.mean(rates <= rate) >= 0.95 - 4 * math.sqrt(0.95 * 0.05 / 4000)
    else:
        assert rates.mean() <= rate


def test_p_values_by_hand_and_their_agreement_with_the_decision():
    calibration = calibrate([1.0, 2.0, 2.0, 4.0], false_reject=0.4)
    assert calibration.p_values([0.0, 1.0, 2.0, 3.0, 4.0, 5.0]).tolist() == [1.0, 1.0, 0.8, 0.4, 0.4, 0.2]
    assert calibration.threshold == 2.0  # rank ceil(5 * 0.6) = 3
    assert calibration.decide([[2.0, 2.0001], [9.0, -1.0]]).tolist() == [[False, True], [True, False]]
    scores = np.random.default_rng(0).integers(0, 12, 500) / 2
    for rate in (0.2, 0.4, 0.6):
        chosen = calibrate([1.0, 2.0, 2.0, 4.0], rate)
        assert_array_equal(chosen.decide(scores), chosen.p_values(scores) <= chosen.expected_rate + 1e-12)


def test_p_values_of_good_parts_are_valid():
    generator = np.random.default_rng(5)
    p = np.concatenate([calibrate(generator.random(19)).p_values(generator.random(1)) for _ in range(4000)])
    for level in (0.05, 0.1, 0.25, 0.5):  # exact for continuous scores at multiples of 1 / 20; four standard errors
        assert np.mean(p <= level + 1e-12) == pytest.approx(level, abs=4 * math.sqrt(level * (1 - level) / 4000))


def test_round_trip_through_json():
    scores = np.random.default_rng(2).random(30).astype(np.float32)
    calibration = calibrate(scores, 0.1, 0.9, guarantee="confidence", source="held-out train")
    stored = json.loads(json.dumps(calibration.to_dict(), allow_nan=False))
    assert Calibration.from_dict(stored) == calibration
    assert_array_equal(calibration.decide(scores), Calibration.from_dict(stored).decide(scores))
    with pytest.raises(CalibrationError, match=r"damaged: its threshold is 5\.0"):
        Calibration.from_dict({**stored, "threshold": 5.0})
    del stored["guarantee"]
    with pytest.raises(CalibrationError, match="no 'guarantee'"):
        Calibration.from_dict(stored)


def test_bad_input_is_named():
    with pytest.raises(CalibrationError, match="at least one good part from 'validation'"):
        calibrate([])
    with pytest.raises(CalibrationError, match=r"shape \(2, 2\)"):
        calibrate(np.zeros((2, 2)))
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(CalibrationError, match="1 of 3 scores of good parts from 'line 4' are NaN or infinite"):
            calibrate([1.0, bad, 2.0], source="line 4")
    for rate in (0.0, 1.0, -0.1, 5, float("nan")):
        with pytest.raises(CalibrationError, match="`false_reject` must be between 0 and 1"):
            calibrate([1.0], false_reject=rate)
        with pytest.raises(CalibrationError, match="`confidence` must be between 0 and 1"):
            calibrate([1.0], confidence=rate)
    with pytest.raises(CalibrationError, match="unknown guarantee 'sure'"):
        calibrate([1.0], guarantee="sure")
    for judge in (calibrate([1.0]).decide, calibrate([1.0]).p_values):
        with pytest.raises(DataError, match="1 of 2 scores are NaN"):
            judge([0.0, np.nan])


def test_statement_never_understates_a_rate():
    for n in range(1, 60):
        calibration = calibrate(np.arange(float(n)), 0.2)
        words = calibration.statement.split("at most ")[1]
        assert float(words.split(" %")[0]) >= 100 * calibration.expected_rate - 1e-6
        assert float(words.split("below ")[1].split(" %")[0]) >= 100 * calibration.upper_bound - 1e-6
    for n, word in ((11, "11th"), (12, "12th"), (21, "21st"), (22, "22nd"), (23, "23rd"), (111, "111th")):
        assert f"threshold = {word} of {n}" in calibrate(np.arange(float(n)), 0.001).statement
