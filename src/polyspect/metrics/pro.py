"""AUPRO, the area under the per-region overlap curve, by two evaluators that are never mixed.

    PRO(t) = mean over ground-truth components k of |{p in k: s_p >= t}| / |k|
    FPR(t) = |{p ok: s_p >= t}| / |{p ok}|
    AUPRO(L) = 1/L * integral of PRO over FPR from 0 to L

Components are 8-connected and counted over the whole test set; ok pixels are all pixels off the mask, on good and on
anomalous parts alike.

* `aupro`, exact: trapezoids between all distinct thresholds, the last point interpolated at L (the definition of
  MVTec AD, Bergmann et al., IJCV 2021). Computed in closed form, see `ranking`, Eq. 4.
* `aupro_sampled`: the same curve known only at `thresholds` equidistant ranks of the sorted ok scores, with ``>`` in
  place of ``>=``, joined by straight lines and closed with the point (1, 1). BTF, M3DM, CMDIAD and Shape-guided print
  this with 100 thresholds, CFM with 99.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ..errors import ConfigError, DataError
from ..samples import Array
from .parts import PartPixels, collect_pixels
from .ranking import Ranks, rank

LIMITS = (0.3, 0.1, 0.05, 0.01)
SAMPLED_THRESHOLDS = 100


def aupro(maps: Any, masks: Any, limits: Iterable[float] = LIMITS, *, ignore: Any = None) -> dict[float, float]:
    """Exact AUPRO at each false-positive-rate limit; 1 is perfect.

    Args:
        maps: Anomaly maps (N, H, W), or N arrays (H, W) of any sizes; larger is more anomalous.
        masks: Ground truth like `maps`, bool or integer, non-zero on a defect.
        limits: Upper limits of the false-positive rate, in (0, 1].
        ignore: Pixels to leave out, like `masks`; single entries may be None.

    Raises:
        ConfigError: a limit is not in (0, 1].
        ShapeError: numbers or sizes do not fit each other.
        DataError: NaN in a counted pixel, or no component or no ok pixel is left.
    """
    limits = check_limits(limits)
    ranks = pool_or_raise(collect_pixels(maps, masks, ignore))
    return {limit: ranks.area(limit) / limit for limit in limits}


def aupro_sampled(
    maps: Any,
    masks: Any,
    limits: Iterable[float] = LIMITS,
    thresholds: int = SAMPLED_THRESHOLDS,
    *,
    ignore: Any = None,
) -> dict[float, float]:
    """AUPRO as the research scripts sample it; compare with their published numbers only.

    Arguments and exceptions as in `aupro`; `thresholds` is at least 2.
    """
    limits = check_limits(limits)
    fpr, pro = sampled_curve(pool_or_raise(collect_pixels(maps, masks, ignore)), thresholds)
    return {limit: area_below(fpr, pro, limit) / limit for limit in limits}


def pro_curve(
    maps: Any, masks: Any, points: int = 1001, limit: float = 1.0, *, ignore: Any = None
) -> tuple[Array, Array]:
    """The exact PRO curve read at `points` equidistant false-positive rates, for plotting.

    Returns:
        False-positive rates from 0 to `limit` and PRO, both (points,). Where PRO jumps, the upper value is given.

    Raises:
        ConfigError, ShapeError, DataError: as in `aupro`.
    """
    (limit,) = check_limits([limit])
    if points < 2:
        raise ConfigError(f"`points` must be at least 2, got {points}")
    return exact_curve(pool_or_raise(collect_pixels(maps, masks, ignore)), points, limit)


def exact_curve(ranks: Ranks, points: int = 1001, limit: float = 1.0) -> tuple[Array, Array]:
    """`pro_curve` of defect pixels that were ranked before; arguments and result as there."""
    n, end = ranks.negatives.size, np.cumsum(ranks.weights[::-1])
    # corners in order of falling score: each positive rises from (above, start) to (at_least, end), once per tie
    _, last = np.unique(-ranks.positives[::-1], return_index=True)
    last = np.append(last[1:], end.size) - 1  # the last of each group of equal scores
    end = end[last]
    above, at_least = ranks.above[::-1][last], ranks.at_least[::-1][last]
    x = np.stack([above, at_least], axis=1).ravel() / n
    y = np.stack([np.append(0.0, end[:-1]), end], axis=1).ravel()
    fpr = np.linspace(0.0, limit, points)
    return fpr, np.interp(fpr, np.append(x, 1.0), np.append(y, 1.0), left=0.0)


def pool(parts: Iterable[PartPixels]) -> Ranks | None:
    """All defect pixels ranked among all ok pixels; None if there is no component or no ok pixel.

    The weights add up to 1, so that they sum to PRO. Extra memory: one copy of the ok scores.
    """
    parts = list(parts)
    components = sum(part.components for part in parts)
    if components == 0 or not any(part.ok.size for part in parts):
        return None
    defect = np.concatenate([part.defect for part in parts])
    weight = np.concatenate([part.weight for part in parts]) / components
    return rank(defect, np.concatenate([part.ok for part in parts]), weight)


def pool_or_raise(parts: Iterable[PartPixels]) -> Ranks:
    """`pool`, for callers that need an answer.

    Raises:
        DataError: there is no component or no ok pixel.
    """
    ranks = pool(parts)
    if ranks is None:
        raise DataError(
            "AUPRO is undefined: it needs at least one ground-truth component and one ok pixel; check that the test "
            "split has anomalous parts, that their masks were read, and that `ignore` does not cover everything"
        )
    return ranks


def sampled_curve(ranks: Ranks, thresholds: int = SAMPLED_THRESHOLDS) -> tuple[Array, Array]:
    """False-positive rate and PRO (thresholds + 1,), ascending, at equidistant ranks of the sorted ok scores.

    Raises:
        ConfigError: fewer than two thresholds.
    """
    if thresholds < 2:
        raise ConfigError(f"`thresholds` must be at least 2, got {thresholds}")
    n = ranks.negatives.size
    position = np.linspace(0, n - 1, thresholds, dtype=int)[::-1]
    fpr, pro = 1.0 - (position + 1) / n, ranks.share_above(ranks.negatives[position])
    return np.append(fpr, 1.0), np.append(pro, 1.0)


def area_below(x: Array, y: Array, limit: float) -> float:
    """Trapezoid area from 0 to `limit` of the line through ascending points that start at x = 0, cut at `limit`."""
    inside = x < limit
    x, y = np.append(x[inside], limit), np.append(y[inside], np.interp(limit, x, y))
    return float(np.sum(np.diff(x) * (y[1:] + y[:-1])) / 2)


def check_limits(limits: Iterable[float]) -> Sequence[float]:
    """The limits as a tuple of floats.

    Raises:
        ConfigError: there is none, or one is not in (0, 1].
    """
    checked = tuple(float(limit) for limit in limits)
    for limit in checked:
        if not 0.0 < limit <= 1.0:
            raise ConfigError(f"a false-positive-rate limit must be above 0 and at most 1, got {limit:g}")
    if not checked:
        raise ConfigError("`limits` is empty: give at least one false-positive-rate limit, e.g. 0.3")
    return checked
