"""Bootstrap intervals of metrics, and paired differences of two detectors on the same parts.

A test set is drawn anew from its own parts, good and anomalous ones apart so that their numbers stay (a stratified
percentile bootstrap; Efron and Tibshirani 1993, ch. 13). A part comes with all its pixels or not at all, since the
pixels of one part are not independent. A draw is a row k of multiplicities, and every metric is a function of it: with
the counts b_pi, c_pi of the ok pixels of part p above, and at or above, defect pixel i of part q(i),

    b_i(k) = sum_p k_p b_pi     c_i(k) = sum_p k_p c_pi     w_i(k) = k_q(i) w_i / sum_p k_p components_p

go into Eq. 4 of `ranking`. So each replicate of AUPRO is exact too: no grid of thresholds. The counts are taken once, a
block of defect pixels at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import ConfigError, DataError, nearest_names
from ..samples import Array
from .evaluate import IMAGE_METRICS
from .parts import PartPixels, ScoredParts
from .pro import check_limits
from .ranking import ramp_area

DEFAULT_METRICS = ("i_auroc", "i_ap", "p_auroc", "aupro@0.3")
BLOCK = 2**19  # numbers in the largest array of a block: 4 MB, whatever the number of parts and resamples

Interval = tuple[float, float]


@dataclass(frozen=True)
class PairedDifference:
    """How much detector `a` exceeds detector `b` in one metric on the same parts.

    Attributes:
        a: The metric of the first detector.
        b: The metric of the second.
        difference: a - b.
        low: Lower end of the interval of the difference.
        high: Upper end.
    """

    a: float
    b: float
    difference: float
    low: float
    high: float

    @property
    def clear(self) -> bool:
        """True if the interval excludes zero."""
        return self.low > 0 or self.high < 0


def bootstrap(
    parts: ScoredParts,
    metrics: Sequence[str] = DEFAULT_METRICS,
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Interval | None]:
    """Percentile interval of each metric; None where fewer than two good or two anomalous parts define it.

    Args:
        parts: Results of a detector, from `ScoredParts.collect` or `StreamingMetrics.parts`.
        metrics: Any of ``i_auroc, i_ap, f1_max, p_auroc, aupro@LIMIT``.
        resamples: Number of drawn test sets.
        confidence: Coverage of the interval, in (0, 1).
        seed: Of the draws.

    Raises:
        ConfigError: unknown metric, or a number out of range.
    """
    limits = _check(metrics, resamples, confidence)
    if not _enough(parts):
        return dict.fromkeys(metrics)
    drawn = _metrics(parts, _draws(parts.labels, resamples, seed), metrics, limits)
    return {name: None if values is None else _ends(values, confidence) for name, values in drawn.items()}


def paired_difference(
    a: ScoredParts,
    b: ScoredParts,
    metrics: Sequence[str] = DEFAULT_METRICS,
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, PairedDifference | None]:
    """Difference of each metric, detector `a` minus `b`, both evaluated on the same drawn parts.

    Pairing removes the luck of which parts were tested, so the interval is narrower than two separate ones suggest.
    Arguments as in `bootstrap`.

    Raises:
        DataError: the two do not hold the same parts in the same order.
        ConfigError: unknown metric, or a number out of range.
    """
    limits = _check(metrics, resamples, confidence)
    _check_same_parts(a, b)
    if not _enough(a):
        return dict.fromkeys(metrics)
    once = np.ones((1, len(a)))
    draws = np.concatenate([once, _draws(a.labels, resamples, seed)])  # row 0 is the test set itself
    first, second = (_metrics(parts, draws, metrics, limits) for parts in (a, b))
    results: dict[str, PairedDifference | None] = {}
    for name in metrics:
        x, y = first[name], second[name]
        if x is None or y is None:
            results[name] = None
            continue
        low, high = _ends((x - y)[1:], confidence)
        results[name] = PairedDifference(float(x[0]), float(y[0]), float(x[0] - y[0]), low, high)
    return results


def _metrics(
    parts: ScoredParts, draws: Array, metrics: Sequence[str], limits: Mapping[str, float]
) -> dict[str, Array | None]:
    """Each metric for each row of multiplicities (R, N)."""
    wanted = {"p_auroc": 1.0, **limits}
    found: dict[str, Array | None] = dict.fromkeys(metrics)
    if any(name in IMAGE_METRICS for name in metrics):
        found.update({k: v for k, v in _image_metrics(parts, draws).items() if k in found})
    reach = {name: limit for name, limit in wanted.items() if name in found}
    if reach and parts.pixels is not None:
        found.update(_pixel_metrics(parts.pixels, draws, reach))
    return found


def _image_metrics(parts: ScoredParts, draws: Array) -> dict[str, Array]:
    """Eqs. 1 to 3 of `ranking` with multiplicities, (R,) each."""
    bad, good = parts.scores[parts.labels], parts.scores[~parts.labels]
    k_bad, k_good = draws[:, parts.labels], draws[:, ~parts.labels]
    above, at_least = k_good @ (good[:, None] > bad), k_good @ (good[:, None] >= bad)  # (R, m)
    found = k_bad @ (bad[:, None] >= bad)
    m, n = k_bad.sum(axis=1), k_good.sum(axis=1)
    precision = found / np.maximum(found + at_least, 1)  # 0 / 0 only where nothing was drawn; its weight is 0
    return {
        "i_auroc": 1.0 - (k_bad * (above + at_least)).sum(axis=1) / (2.0 * m * n),
        "i_ap": (k_bad * precision).sum(axis=1) / m,
        "f1_max": (2.0 * found / (found + at_least + m[:, None])).max(axis=1),
    }


def _pixel_metrics(pixels: Sequence[PartPixels], draws: Array, limits: Mapping[str, float]) -> dict[str, Array | None]:
    """P-AUROC (every defect pixel weighs the same) and AUPRO at limits, (R,) each; None if some draw lacks pixels."""
    ok = [np.sort(part.ok) for part in pixels]
    sizes = np.array([[part.ok.size, part.defect.size, part.components] for part in pixels], dtype=float)
    n, m, components = (draws @ sizes).T  # (R,) each
    if min(n.min(), m.min(), components.min()) == 0:
        return dict.fromkeys(limits)
    scores = np.concatenate([part.defect for part in pixels])
    weights = np.concatenate([part.weight for part in pixels])
    owner = np.repeat(np.arange(len(pixels)), [part.defect.size for part in pixels])
    order = np.argsort(scores)  # neighbours in score are searched together
    area = {name: np.zeros(len(draws)) for name in limits}
    step = max(1, BLOCK // max(draws.shape))
    for start in range(0, order.size, step):
        block = order[start : start + step]
        above, at_least = _counts(ok, scores[block])
        above, at_least = draws @ above, draws @ at_least  # (R, block)
        k = draws[:, owner[block]]  # (R, block)
        for name, limit in limits.items():
            share = k if name == "p_auroc" else k * weights[block]
            area[name] += (share * ramp_area(above, at_least, limit * n[:, None])).sum(axis=1)
    return {name: area[name] / (limit * n * (m if name == "p_auroc" else components)) for name, limit in limits.items()}


def _counts(ok: Sequence[Array], scores: Array) -> tuple[Array, Array]:
    """Ok pixels of each part above, and at or above, each score: (N, block) float64, exact integers."""
    above, at_least = np.empty((2, len(ok), scores.size))
    for row, values in enumerate(ok):
        needles = scores.astype(np.result_type(scores, values), copy=False)
        above[row] = values.size - np.searchsorted(values, needles, "right")
        at_least[row] = values.size - np.searchsorted(values, needles, "left")
    return above, at_least


def _draws(labels: Array, resamples: int, seed: int) -> Array:
    """Multiplicities (R, N) of parts in stratified draws with replacement."""
    generator = np.random.default_rng(seed)
    draws = np.empty((resamples, labels.size))
    for stratum in (~labels, labels):
        size = int(stratum.sum())
        draws[:, stratum] = generator.multinomial(size, np.full(size, 1.0 / size), size=resamples)
    return draws


def _ends(values: Array, confidence: float) -> Interval:
    low, high = np.quantile(values, [(1.0 - confidence) / 2, (1.0 + confidence) / 2])
    return float(low), float(high)


def _enough(parts: ScoredParts) -> bool:
    return min(int(parts.labels.sum()), int((~parts.labels).sum())) >= 2


def _check(metrics: Sequence[str], resamples: int, confidence: float) -> dict[str, float]:
    """AUPRO metric name -> its limit."""
    if resamples < 1 or not 0.0 < confidence < 1.0:
        raise ConfigError(f"need resamples >= 1 and 0 < confidence < 1, got {resamples} and {confidence:g}")
    limits: dict[str, float] = {}
    for name in metrics:
        evaluator, _, limit = name.partition("@")
        if evaluator == "aupro" and limit:
            try:
                limits[name] = check_limits([float(limit)])[0]
            except ValueError:
                raise ConfigError(f"bad limit in '{name}': write e.g. 'aupro@0.3', above 0 and at most 1") from None
        elif name not in (*IMAGE_METRICS, "p_auroc"):
            known = (*IMAGE_METRICS, "p_auroc", "aupro@LIMIT")
            raise ConfigError(f"no interval is computed for '{name}': {nearest_names(name, known)}")
    return limits


def _check_same_parts(a: ScoredParts, b: ScoredParts) -> None:
    same = len(a) == len(b) and a.ids == b.ids and bool(np.array_equal(a.labels, b.labels))
    if same and a.pixels is not None and b.pixels is not None:
        same = all(
            x.ok.size == y.ok.size and np.array_equal(x.weight, y.weight)
            for x, y in zip(a.pixels, b.pixels, strict=True)
        )
    if not same:
        raise DataError(
            f"a paired comparison needs the same parts with the same truth in the same order; got {len(a)} and "
            f"{len(b)} parts that differ in id, label, map size or mask"
        )
