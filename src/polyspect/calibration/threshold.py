"""A decision threshold with a promise about the false-reject rate, from the scores of good parts alone.

Sort the n scores of good calibration parts, s_(1) <= ... <= s_(n), and reject a part that scores above s_(k). If new
good parts come from the same process in no particular order (exchangeable), then for the true false-reject rate Q

    E[Q] <= (n + 1 - k) / (n + 1)                                        (1)  split conformal prediction
    Q ~ Beta(n + 1 - k, k), or stochastically smaller if scores are tied (2)  law of order statistics

Eq. 1 holds on average over calibration sets and gives k = ceil((n + 1)(1 - alpha)) for a wished rate alpha (Vovk,
Gammerman and Shafer 2005; Papadopoulos et al. 2002). Eq. 2 bounds the line at hand: with confidence c, Q lies below the
c-quantile of that beta law. This is the Clopper-Pearson upper bound for n - k rejects among n parts, though no part was
counted after the threshold was set. Its best case k = n gives Q <= 1 - (1 - c)^(1/n), so alpha needs
n >= ln(1 - c) / ln(1 - alpha) parts; Eq. 1 needs n >= 1 / alpha - 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, get_args

import numpy as np

from ..errors import CalibrationError, DataError
from ..samples import Array

Guarantee = Literal["average", "confidence"]


@dataclass(frozen=True)
class Calibration:
    """A threshold, the good parts it rests on, and what it promises. Built by `calibrate`.

    Attributes:
        scores: Scores of the good parts, ascending; the reference of `p_values`.
        false_reject: The wished false-reject rate.
        confidence: Of `upper_bound`.
        guarantee: Which of the two promises was asked to hold at `false_reject`.
        source: Where the good parts come from, e.g. ``"validation"``.
        rank: The threshold is this order statistic of `scores`, counted from 1: k.
        threshold: A part is rejected when its score is above this.
        expected_rate: Bound of the false-reject rate on average over calibration sets (Eq. 1).
        upper_bound: Bound of the false-reject rate of this threshold, with `confidence` (Eq. 2).
        supported: True if this many parts can carry the wish; else the threshold is the highest score.
        parts_needed: Good parts that the wish needs; None if it is supported.
        statement: All of this in one plain sentence.
    """

    scores: tuple[float, ...]
    false_reject: float
    confidence: float
    guarantee: Guarantee
    source: str
    rank: int
    threshold: float
    expected_rate: float
    upper_bound: float
    supported: bool
    parts_needed: int | None
    statement: str

    @property
    def n(self) -> int:
        """Number of good calibration parts."""
        return len(self.scores)

    def decide(self, scores: Any) -> Array:
        """True where a part is rejected: its score is above the threshold. Shape as `scores`.

        Raises:
            DataError: a score is NaN, which no comparison would reject.
        """
        return _scores_to_judge(scores) > self.threshold

    def p_values(self, scores: Any) -> Array:
        """Conformal p-value of "this part is good": (1 + #{good >= score}) / (n + 1). Shape as `scores`.

        For a good part it is at most p with probability at most p. It cannot fall below 1 / (n + 1).

        Raises:
            DataError: a score is NaN.
        """
        scores = _scores_to_judge(scores)
        return (1 + self.n - np.searchsorted(np.array(self.scores), scores, "left")) / (self.n + 1)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        return {**vars(self), "scores": list(self.scores)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Calibration:
        """The calibration that `to_dict` wrote, worked out anew from its scores and compared.

        Raises:
            CalibrationError: a field is missing, or the stored threshold is not the one that the scores give.
        """
        given = ("scores", "false_reject", "confidence", "guarantee", "source")
        missing = [name for name in (*given, "threshold") if name not in values]
        if missing:
            raise CalibrationError(f"the stored calibration has no '{missing[0]}': calibrate the model again")
        made = calibrate(**{name: values[name] for name in given})
        if made.threshold != values["threshold"]:
            raise CalibrationError(
                f"the stored calibration is damaged: its threshold is {values['threshold']!r} but its {made.n} scores "
                f"give {made.threshold!r}; calibrate the model again"
            )
        return made


def calibrate(
    scores: Any,
    false_reject: float = 0.05,
    confidence: float = 0.95,
    *,
    guarantee: Guarantee = "average",
    source: str = "validation",
) -> Calibration:
    """Set the lowest threshold that keeps the wished false-reject rate, or say how many good parts that would need.

    Args:
        scores: Scores (n,) of good parts that the detector was not fitted on.
        false_reject: Wished share of good parts that are rejected, in (0, 1).
        confidence: Of the upper bound, in (0, 1).
        guarantee: ``"average"`` keeps the wish on average over calibration sets (Eq. 1); ``"confidence"`` keeps it for
            this very threshold with `confidence` (Eq. 2), which needs more parts or a higher threshold.
        source: Name of the split that the parts come from; kept in the record.

    Raises:
        CalibrationError: no scores, not one-dimensional, NaN or infinite, or a rate outside (0, 1).
    """
    _check_rates(false_reject=false_reject, confidence=confidence)
    if guarantee not in get_args(Guarantee):
        raise CalibrationError(f"unknown guarantee '{guarantee}': choose 'average' or 'confidence'")
    ordered = _good_scores(scores, source)
    n = ordered.size
    if guarantee == "average":
        wished, needed = n + 1 - math.floor((n + 1) * _exact(false_reject)), parts_for_average(false_reject)
    else:
        bounds = false_reject_bound(n, np.arange(1, n + 1), confidence)  # falls with the rank
        wished = 1 + int(np.count_nonzero(bounds > false_reject))
        needed = parts_for_confidence(false_reject, confidence)
    rank = min(wished, n)
    values: dict[str, Any] = {
        "false_reject": float(false_reject),
        "confidence": float(confidence),
        "guarantee": guarantee,
        "source": source,
        "rank": rank,
        "threshold": float(ordered[rank - 1]),
        "expected_rate": (n + 1 - rank) / (n + 1),
        "upper_bound": float(false_reject_bound(n, rank, confidence)),
        "supported": wished <= n,
        "parts_needed": None if wished <= n else needed,
    }
    return Calibration(scores=tuple(ordered.tolist()), **values, statement=_statement(n, values))


def false_reject_bound(n: int, rank: Any, confidence: float) -> Any:
    """Upper confidence bound of the false-reject rate above the `rank`-th of `n` good scores (Eq. 2)."""
    from scipy.special import betaincinv

    return betaincinv(n + 1 - rank, rank, confidence)


def parts_for_average(false_reject: float) -> int:
    """Good parts needed to keep `false_reject` on average: the least n with 1 / (n + 1) <= false_reject."""
    _check_rates(false_reject=false_reject)
    return math.ceil(1 / _exact(false_reject)) - 1


def parts_for_confidence(false_reject: float, confidence: float = 0.95) -> int:
    """Good parts needed to keep `false_reject` with `confidence`: the least n with (1 - rate)^n <= 1 - confidence."""
    _check_rates(false_reject=false_reject, confidence=confidence)
    return math.ceil(math.log1p(-confidence) / math.log1p(-false_reject) * (1 - 1e-12))


def _statement(n: int, values: Mapping[str, Any]) -> str:
    wish, confidence, rank = values["false_reject"], values["confidence"], values["rank"]
    sure, needed = f"{100 * confidence:g} % confidence", parts_for_confidence(wish, confidence)
    sentence = (
        f"{n} good part{'s' if n > 1 else ''} ({values['source']}); threshold = {_ordinal(rank)} of {n} scores; "
        f"expected false-reject rate at most {_percent(values['expected_rate'])}; "
        f"with {sure} below {_percent(values['upper_bound'])}"
    )
    if not values["supported"]:
        average = "" if values["guarantee"] == "confidence" else f"{parts_for_average(wish)} on average and "
        return f"{sentence}; {100 * wish:g} % cannot be promised from so few: it needs {average}{needed} with {sure}"
    if values["upper_bound"] <= wish:
        return f"{sentence}, as wished ({100 * wish:g} %)"
    if n < needed:
        return f"{sentence}; for {100 * wish:g} % with {sure} you need {needed} good parts"
    return f"{sentence}; for {100 * wish:g} % with {sure} ask for the guarantee 'confidence'"


def _percent(rate: float) -> str:
    """A rate in percent, rounded up: a bound must not be understated."""
    digits = 1 if rate >= 0.01 else 2
    return f"{math.ceil(100 * rate * 10**digits - 1e-9) / 10**digits:g} %"


def _ordinal(number: int) -> str:
    if number % 100 in (11, 12, 13):
        return f"{number}th"
    return f"{number}{({1: 'st', 2: 'nd', 3: 'rd'}).get(number % 10, 'th')}"


def _exact(rate: float) -> Fraction:
    """The decimal that was written: 0.07 is 7/100, so that (n + 1) alpha is whole where it should be."""
    return Fraction(repr(float(rate)))


def _check_rates(**rates: float) -> None:
    for name, rate in rates.items():
        if not 0.0 < rate < 1.0:
            raise CalibrationError(f"`{name}` must be between 0 and 1 (both excluded), got {rate!r}; 5 % is 0.05")


def _good_scores(scores: Any, source: str) -> Array:
    array = np.sort(np.asarray(scores, dtype=np.float64), axis=None)
    if np.ndim(scores) != 1 or array.size == 0:
        raise CalibrationError(
            f"calibration needs the scores of at least one good part from '{source}', got an array of shape "
            f"{np.shape(scores)}; check that this split holds good parts"
        )
    wrong = int(np.count_nonzero(~np.isfinite(array)))
    if wrong:
        raise CalibrationError(
            f"{wrong} of {array.size} scores of good parts from '{source}' are NaN or infinite: find those parts and "
            f"repair or exclude them; a threshold cannot rest on them"
        )
    return array


def _scores_to_judge(scores: Any) -> Array:
    array = np.asarray(scores, dtype=np.float64)
    if np.isnan(array).any():
        raise DataError(f"{int(np.isnan(array).sum())} of {array.size} scores are NaN: such a part cannot be judged")
    return array
