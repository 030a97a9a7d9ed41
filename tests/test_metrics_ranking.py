"""AUROC, AP, F1 and curves against scikit-learn and hand-worked values."""

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from sklearn import metrics as reference

from polyspect.errors import DataError, ShapeError
from polyspect.metrics import auroc, average_precision, f1_max, precision_recall_curve, roc_curve

QUICK = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def scored(draw, levels=6):
    """Quantised scores, so that ties within and between the kinds are common, with both kinds present."""
    size = draw(st.integers(2, 30))
    scores = np.array(draw(st.lists(st.integers(0, levels), min_size=size, max_size=size)), dtype=np.float32) / 4
    labels = np.array([0, 1, *draw(st.lists(st.integers(0, 1), min_size=size - 2, max_size=size - 2))])
    return scores, labels


def test_hand_worked_values():
    # one tie across the kinds: pairs (3>2, 3>1, 2=2, 2>1) -> 3.5 of 4
    scores, labels = [3.0, 2.0, 2.0, 1.0], [1, 1, 0, 0]
    assert auroc(scores, labels) == 3.5 / 4
    assert average_precision(scores, labels) == pytest.approx((1 + 2 / 3) / 2)  # at 3: 1/1, at 2: 2/3
    assert f1_max(scores, labels) == (pytest.approx(2 * 2 / (2 + 1 + 2)), 2.0)  # at 3: 2/3, at 2: 4/5


@QUICK
@given(scored())
def test_equal_scikit_learn_with_ties(data):
    scores, labels = data
    assert_allclose(auroc(scores, labels), reference.roc_auc_score(labels, scores), rtol=0, atol=1e-12)
    assert_allclose(average_precision(scores, labels), reference.average_precision_score(labels, scores), atol=1e-12)
    for ours, theirs in zip(roc_curve(scores, labels), reference.roc_curve(labels, scores, drop_intermediate=False)):
        assert_allclose(ours, theirs, rtol=0, atol=1e-12)
    for ours, theirs in zip(precision_recall_curve(scores, labels), reference.precision_recall_curve(labels, scores)):
        assert_allclose(ours, theirs, rtol=0, atol=1e-12)


@QUICK
@given(scored())
def test_f1_max_is_the_best_over_all_thresholds(data):
    scores, labels = data
    best = {float(t): reference.f1_score(labels, scores >= t) for t in np.unique(scores)}
    value, threshold = f1_max(scores, labels)
    assert_allclose(value, max(best.values()), rtol=0, atol=1e-12)
    assert threshold == max(t for t, f1 in best.items() if f1 > max(best.values()) - 1e-12)


def test_only_the_order_of_scores_matters():
    generator = np.random.default_rng(0)
    scores, labels = generator.integers(-20, 20, 300).astype(np.float64), generator.integers(0, 2, 300)
    for metric in (auroc, average_precision):
        assert metric(np.exp(scores / 7), labels) == metric(scores, labels)
        shuffled = generator.permutation(300)
        assert_allclose(metric(scores[shuffled], labels[shuffled]), metric(scores, labels), rtol=1e-14)
    assert_allclose(auroc(-scores, labels), 1 - auroc(scores, labels), rtol=1e-14)


def test_takes_maps_as_they_are_and_leaves_them_alone():
    generator = np.random.default_rng(1)
    maps, masks = generator.random((3, 8, 9), dtype=np.float32), generator.random((3, 8, 9)) > 0.8
    before = maps.copy()
    assert_allclose(auroc(maps, masks), reference.roc_auc_score(masks.ravel(), maps.ravel()), atol=1e-12)
    assert_array_equal(maps, before)


def test_float64_scores_are_not_rounded_to_float32():
    assert auroc([1.0, 1.0 + 1e-12], [0, 1]) == 1.0


def test_bad_input_is_named():
    with pytest.raises(DataError, match="none of the 3 labels is anomalous"):
        auroc([1, 2, 3], [0, 0, 0])
    with pytest.raises(DataError, match="none of the 2 labels is good"):
        auroc([1, 2], [1, 1])
    with pytest.raises(DataError, match=r"1 of 2 good scores are NaN"):
        auroc([1.0, np.nan, 2.0], [0, 0, 1])
    with pytest.raises(DataError, match=r"labels must be 0 \(good\) or 1 \(anomalous\), got .*2"):
        auroc([1.0, 2.0], [0, 2])
    with pytest.raises(ShapeError, match=r"\(2,\) and `labels` \(3,\)"):
        auroc([1.0, 2.0], [0, 1, 1])
    assert average_precision([1, 2], [1, 1]) == 1.0


def test_metrics_need_no_torch():
    import subprocess

    code = "import sys, polyspect.metrics, polyspect.calibration; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
