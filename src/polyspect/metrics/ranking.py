"""How positives rank among negatives, and every metric that follows from it.

With m positives of score s_i and n negatives, three counts per positive hold all that ranking metrics need:

    b_i = #{negatives > s_i}     c_i = #{negatives >= s_i}     d_i = #{positives >= s_i}

    AUROC = mean_i (1 - (b_i + c_i) / 2n)                      (1)  a tie counts one half
    AP    = mean_i d_i / (d_i + c_i)                           (2)  step-wise sum over distinct thresholds
    F1_i  = 2 d_i / (d_i + c_i + m)                            (3)  rejecting everything that scores >= s_i
    A(L)  = sum_i w_i (L n - t_i + (t_i - u_i)^2 / 2(c_i - b_i)) / n   (4)  t_i = min(c_i, L n), u_i = min(b_i, L n)

Eq. 4 is the area below false-positive rate L of the curve that gains w_i at positive i. Between two distinct thresholds
the trapezoid rule draws a straight line, so a positive that is tied with c_i - b_i negatives rises linearly from
FPR b_i / n to c_i / n (at once if there is no tie); each ramp is cut at L, which is the interpolated last point.
No curve is built: one value sort of the negatives and a binary search of the few positives give all of it exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import DataError, ShapeError
from ..samples import Array


@dataclass(frozen=True, eq=False)
class Ranks:
    """Positives (m,) in ascending order and where each stands among the negatives.

    Attributes:
        positives: Scores (m,), ascending.
        weights: What each adds to the curve (m,), float64, sums to 1.
        above: Negatives strictly above each positive (m,), int64: b_i.
        at_least: Negatives at or above each positive (m,), int64: c_i.
        negatives: Scores of the negatives (n,), ascending.
    """

    positives: Array
    weights: Array
    above: Array
    at_least: Array
    negatives: Array

    def auroc(self) -> float:
        """Eq. 1."""
        pairs = 2.0 * self.negatives.size * self.positives.size
        return 1.0 - float(self.above.sum() + self.at_least.sum()) / pairs

    def average_precision(self) -> float:
        """Eq. 2."""
        found = self._found()
        return float(np.mean(found / (found + self.at_least)))

    def f1_max(self) -> tuple[float, float]:
        """The largest value of Eq. 3 and its threshold, the highest one if several are equally good.

        Only scores of positives can be best: moving a threshold up to the next positive loses false positives alone.
        """
        found = self._found()
        f1 = 2.0 * found / (found + self.at_least + self.positives.size)
        best = f1.size - 1 - int(np.argmax(f1[::-1]))
        return float(f1[best]), float(self.positives[best])

    def area(self, limit: float) -> float:
        """Eq. 4: the area below the weighted curve from FPR 0 to `limit`, between 0 and `limit`."""
        n = self.negatives.size
        return float(self.weights @ ramp_area(self.above, self.at_least, limit * n)) / n

    def share_above(self, thresholds: Array) -> Array:
        """Weight of the positives strictly above each threshold (T,)."""
        tail = np.concatenate([np.cumsum(self.weights[::-1])[::-1], [0.0]])
        return tail[np.searchsorted(self.positives, thresholds, "right")]

    def _found(self) -> Array:
        return self.positives.size - np.searchsorted(self.positives, self.positives, "left")


def ramp_area(above: Array, at_least: Array, reach: Any) -> Array:
    """Integral from 0 to `reach` of a step that rises linearly from 0 at `above` to 1 at `at_least` (Eq. 4, times n).

    All arguments count negatives and broadcast together.
    """
    top, bottom = np.minimum(at_least, reach), np.minimum(above, reach)
    return reach - top + (top - bottom) ** 2 / (2.0 * np.maximum(at_least - above, 1))


def rank(positives: Array, negatives: Array, weights: Array | None = None) -> Ranks:
    """Rank `positives` (m,) among `negatives` (n,). `negatives` is sorted in place, so pass a buffer of your own.

    Without `weights` every positive weighs 1 / m. Both must be free of NaN and not empty.
    """
    dtype = np.result_type(positives, negatives)  # a search between two types would copy the large one
    positives, negatives = positives.astype(dtype, copy=False), negatives.astype(dtype, copy=False)
    if weights is None:
        positives, weights = np.sort(positives), np.full(positives.size, 1.0 / positives.size)
    else:
        order = np.argsort(positives)
        positives, weights = positives[order], weights[order]
    negatives.sort()
    above = negatives.size - np.searchsorted(negatives, positives, "right")
    at_least = negatives.size - np.searchsorted(negatives, positives, "left")
    return Ranks(positives, weights, above, at_least, negatives)


def auroc(scores: Any, labels: Any) -> float:
    """Area under the ROC curve; a tie between a positive and a negative counts one half.

    Args:
        scores: Any shape; larger is more anomalous.
        labels: The same shape; 1 or True where anomalous, else 0.

    Raises:
        ShapeError: the shapes differ.
        DataError: a score is NaN, a label is neither 0 nor 1, or one of the two kinds is missing.
    """
    return _rank_labelled(scores, labels, "AUROC").auroc()


def average_precision(scores: Any, labels: Any) -> float:
    """Average precision: the step-wise sum of precision times gained recall over all distinct thresholds.

    Arguments and exceptions as in `auroc`; negatives may be missing (the value is then 1).
    """
    return _rank_labelled(scores, labels, "average precision", needs_negatives=False).average_precision()


def f1_max(scores: Any, labels: Any) -> tuple[float, float]:
    """The best F1 over all thresholds and the highest threshold that reaches it, where ``score >= threshold`` rejects.

    The threshold is chosen on the very labels it is measured on: a figure of merit, not a setting for a line.
    Arguments and exceptions as in `average_precision`.
    """
    return _rank_labelled(scores, labels, "F1", needs_negatives=False).f1_max()


def roc_curve(scores: Any, labels: Any) -> tuple[Array, Array, Array]:
    """ROC curve over all distinct scores, highest threshold first.

    Returns:
        False-positive rate, true-positive rate and threshold, each (T + 1,); the first point is (0, 0) at infinity.

    Raises:
        ShapeError, DataError: as in `auroc`.
    """
    thresholds, true, false, m, n = _counts(scores, labels, "a ROC curve", needs_negatives=True)
    rates = [np.concatenate([[0.0], count / size]) for count, size in ((false, n), (true, m))]
    return rates[0], rates[1], np.concatenate([[np.inf], thresholds])


def precision_recall_curve(scores: Any, labels: Any) -> tuple[Array, Array, Array]:
    """Precision and recall over all distinct scores, lowest threshold first.

    Returns:
        Precision (T + 1,) and recall (T + 1,), which end in the point (1, 0) without threshold; thresholds (T,).

    Raises:
        ShapeError, DataError: as in `average_precision`.
    """
    thresholds, true, false, m, _ = _counts(scores, labels, "a precision-recall curve", needs_negatives=False)
    precision = np.concatenate([(true / (true + false))[::-1], [1.0]])
    return precision, np.concatenate([(true / m)[::-1], [0.0]]), thresholds[::-1]


def as_floats(values: Any) -> Array:
    """`values` as float32 where that holds them exactly, else float64."""
    array = np.asarray(values)
    return array.astype(np.result_type(array.dtype, np.float32), copy=False)


def as_labels(labels: Any) -> Array:
    """`labels` as bool.

    Raises:
        DataError: names a value that is neither 0 nor 1.
    """
    array = np.asarray(labels)
    if array.dtype == bool:
        return array
    wrong = (array != 0) & (array != 1)
    if wrong.any():
        raise DataError(f"labels must be 0 (good) or 1 (anomalous), got {array[wrong].flat[0]!r}")
    return array == 1


def _split(scores: Any, labels: Any, what: str, needs_negatives: bool) -> tuple[Array, Array]:
    """Scores of the positives and of the negatives, as fresh 1-D arrays."""
    scores, labels = as_floats(scores), as_labels(labels)
    if scores.shape != labels.shape:
        raise ShapeError(f"`scores` has shape {scores.shape} and `labels` {labels.shape}; they must be the same")
    positives, negatives = scores[labels], scores[~labels]
    for name, values, needed in (("anomalous", positives, True), ("good", negatives, needs_negatives)):
        if values.size == 0 and needed:
            raise DataError(f"{what} is undefined: none of the {scores.size} labels is {name}")
        if values.size and np.isnan(values.min()):
            raise DataError(f"{what}: {int(np.isnan(values).sum())} of {values.size} {name} scores are NaN")
    return positives, negatives


def _rank_labelled(scores: Any, labels: Any, what: str, needs_negatives: bool = True) -> Ranks:
    return rank(*_split(scores, labels, what, needs_negatives))


def _counts(scores: Any, labels: Any, what: str, needs_negatives: bool) -> tuple[Array, Array, Array, int, int]:
    """All distinct thresholds, highest first; true and false positives at each; numbers of positives and negatives."""
    positives, negatives = _split(scores, labels, what, needs_negatives)
    positives.sort()
    negatives.sort()
    thresholds = np.unique(np.concatenate([positives, negatives]))[::-1]
    true = positives.size - np.searchsorted(positives, thresholds, "left")
    false = negatives.size - np.searchsorted(negatives, thresholds, "left")
    return thresholds, true, false, positives.size, negatives.size
