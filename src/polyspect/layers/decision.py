"""Decision layer: a linear one-class SVM that joins the anomaly values of several memory banks into one.

    x       one value per bank, (F,): image scores, or the map values of a pixel; n rows of good parts
    w, rho  minimise  nu/2 |w|^2 - nu rho + mean over rows of max(0, rho - w.x)   (1)
    w*    = argmin { |v| : v in C },  C = means of x over any nu-fraction of the rows   (2)  the dual of Eq. 1
    s(x)  = w.x                                                     (3)  larger is more anomalous; rho is left out

Wang et al., "Multimodal Industrial Anomaly Detection via Hybrid Fusion" (CVPR 2023), Sec. 3.4 and its released code;
Schölkopf et al., "Estimating the support of a high-dimensional distribution" (2001), for Eq. 1. The released program
minimises Eq. 1 by stochastic gradient descent (``solver="sgd"``), which stops early. Eq. 2 is its minimiser, found by
Wolfe, "Finding the nearest point in a polytope" (1976): as in Frank and Wolfe's method each step adds the point of C
that lies farthest against w (a k-th value selection), but it goes to the best mixture of all points it holds, and ends.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ConfigError, DataError, MissingExtraError, NotFittedError
from ..samples import check_shapes
from .reservoir import Reservoir

log = logging.getLogger("polyspect")

ROWS = 1 << 18  # rows handled at a time in float64
PASSES = 1000  # far more than were ever needed; tens are usual
GAP = 1e-12  # of |w|^2, at which w is taken for the minimiser: |w - w*| is then below 1.5e-6 |w|


class DecisionLayer(nn.Module):
    """Learns how much each bank's value counts, from good parts only.

    Use: `observe` per batch of rows, `fit`; then `score`. A bank whose values are multiplied by lambda gets a weight
    lambda times as large too, so that it counts about lambda^2 times as much. A `balanced` one is divided by the mean
    of its values before Eq. 1, so that its unit does not matter; `weight` is for the values as they come.

    Args:
        features: F, values per row.
        nu: Share of the rows, in (0, 1], that may lie beyond the plane: w is made of the lowest nu-fraction.
        solver: ``"exact"``: Eq. 2, the same whatever the order of the rows. ``"sgd"``: scikit-learn's
            `SGDOneClassSVM` with at most 1,000 epochs and its other defaults, as the released program calls it.
        seed: Of the shuffling of ``"sgd"``, and of the sample drawn when there are too many rows.
        max_bytes: Most bytes of collected rows, kept as float32. Beyond it they are a uniform random sample (reservoir
            sampling), and `fit` logs a warning. ``"exact"`` takes 8 more bytes per row while it fits, ``"sgd"`` 8 per
            value and about 24 per row: 18 million rows of three are 207 MiB, and 155 or 850 MiB more.
        balanced: Which values are divided by their mean over the rows, F of them; none where it is 0. None: no value.

    Raises:
        ConfigError: a setting is out of range.
    """

    weight: Tensor  # w, (F,) float64; zeros until fitted
    offset: Tensor  # rho, () float64
    counts: Tensor  # rows seen and rows that were fitted to, (2,) int64

    def __init__(
        self,
        features: int,
        *,
        nu: float = 0.5,
        solver: Literal["exact", "sgd"] = "exact",
        seed: int = 42,
        max_bytes: int = 2 * 2**30,
        balanced: Sequence[bool] | None = None,
    ) -> None:
        super().__init__()
        if features < 1:
            raise ConfigError(f"a decision layer needs at least 1 value per row, got {features}")
        if not 0 < nu <= 1:
            raise ConfigError(f"`nu` of a decision layer must be above 0 and at most 1, got {nu}")
        if solver not in ("exact", "sgd"):
            raise ConfigError(f"`solver` of a decision layer must be 'exact' or 'sgd', got '{solver}'")
        self.balanced = (False,) * features if balanced is None else tuple(balanced)
        if len(self.balanced) != features:
            raise ConfigError(f"`balanced` of a decision layer must have {features} entries, got {len(self.balanced)}")
        self.features, self.nu, self.solver, self.seed, self.max_bytes = features, nu, solver, seed, max_bytes
        self.register_buffer("weight", torch.zeros(features, dtype=torch.float64))
        self.register_buffer("offset", torch.zeros((), dtype=torch.float64))
        self.register_buffer("counts", torch.zeros(2, dtype=torch.int64))
        self._rows = Reservoir(max_bytes, seed)

    def observe(self, rows: Tensor) -> None:
        """Take in rows (n, F) of good parts; they are copied to host memory."""
        check_shapes(rows=(rows, f"n {self.features}"))
        self._rows.add(rows.detach().float().cpu())

    def fit(self) -> None:
        """Learn the weights from what was observed, and forget it.

        Raises:
            DataError: nothing was observed, or something that is not a finite number, or the weights are zero: the
                lowest nu-fraction of the rows is all zeros, or values of both signs cancel.
            MissingExtraError: ``solver="sgd"`` without scikit-learn.
        """
        seen, rows = self._rows.seen, self._rows.take().numpy()
        self._rows = Reservoir(self.max_bytes, self.seed)
        if len(rows) == 0:
            raise DataError("the decision layer observed no row: there is no training part to learn the fusion from")
        if not all(np.isfinite(rows[at : at + ROWS]).all() for at in range(0, len(rows), ROWS)):
            raise DataError(
                "the decision layer observed values that are not finite; check the scores of training parts"
            )
        if seen > len(rows):
            log.warning(
                "decision layer: %d rows exceed the limit of %.1f GiB; it is fitted to a random sample of %d of them",
                seen, self.max_bytes / 2**30, len(rows)
            )  # fmt: skip
        unit = _means(rows, self.balanced)
        if unit is not None:
            rows /= unit.astype(np.float32)
        weight, offset = minimum_norm(rows, self.nu) if self.solver == "exact" else _descend(rows, self.nu, self.seed)
        if not weight.any():
            raise DataError(
                f"the decision layer's weights are all zero: among {len(rows)} rows of training parts the lowest "
                f"{self.nu:g} are zeros or cancel; leave unmeasured places out of the rows, or raise `nu`"
            )
        self.weight.copy_(torch.from_numpy(weight if unit is None else weight / unit))
        self.offset.fill_(offset)
        self.counts.copy_(torch.tensor([seen, len(rows)]))

    def score(self, x: Tensor) -> Tensor:
        """Eq. 3 for values (..., F): (...), in the unit of the values squared.

        Raises:
            NotFittedError: `fit` was not called.
        """
        self._check_fitted()
        return x @ self.weight.to(x)

    def shares(self, x: Tensor) -> Tensor:
        """The summands w_j x_j of Eq. 3, one per value: (..., F).

        Raises:
            NotFittedError: `fit` was not called.
        """
        self._check_fitted()
        return x * self.weight.to(x)

    def _check_fitted(self) -> None:
        if int(self.counts[1]) == 0:
            raise NotFittedError("the decision layer has no weights: fit the detector before scoring")


def _means(rows: np.ndarray, which: Sequence[bool]) -> np.ndarray | None:
    """What the columns of `rows` (n, F) are divided by, (F,) float64: their mean where wanted and not 0, else 1."""
    if not any(which):
        return None
    blocks = range(0, len(rows), ROWS)
    mean: np.ndarray = sum(rows[at : at + ROWS].sum(0, dtype=np.float64) for at in blocks) / len(rows)
    return np.where(np.asarray(which) & (mean != 0), np.abs(mean), 1.0)


def minimum_norm(rows: np.ndarray, nu: float) -> tuple[np.ndarray, float]:
    """Eq. 2 by Wolfe's algorithm: w (F,) and rho, both float64, of `rows` (n, F).

    Zeros where 0 is in C to within rounding.
    """
    points = _lowest_mean(rows, np.zeros(rows.shape[1]), nu)[0][None]  # m F, points of C; w is a mixture of them
    scale = max(float(np.abs(rows[at : at + ROWS]).max()) for at in range(0, len(rows), ROWS)) ** 2
    share = np.ones(1)
    for _ in range(PASSES):
        w = share @ points
        if w @ w <= 1e-24 * scale:
            return np.zeros_like(w), 0.0
        lowest, rho = _lowest_mean(rows, w, nu)
        if w @ (w - lowest) <= GAP * (w @ w):
            return w, rho
        points, share = _mix(np.vstack([points, lowest]), np.append(share, 0.0))
    raise DataError(f"the decision layer did not settle in {PASSES} passes over {len(rows)} rows; try `solver='sgd'`")


def _lowest_mean(rows: np.ndarray, w: np.ndarray, nu: float) -> tuple[np.ndarray, float]:
    """Mean of the nu-fraction of `rows` with the smallest w.x, and the largest w.x in it.

    The row at the edge counts in part; rows that tie there share what is left for them, so that order does not matter.
    """
    n, wanted = len(rows), nu * len(rows)
    values = np.empty(n)
    for at in range(0, n, ROWS):
        values[at : at + ROWS] = rows[at : at + ROWS].astype(np.float64) @ w
    edge = min(max(math.ceil(wanted) - 1, 0), n - 1)
    values.partition(edge)
    rho = float(values[edge])
    below, tied = np.zeros(len(w)), np.zeros(len(w))
    n_below = n_tied = 0
    for at in range(0, n, ROWS):
        block = rows[at : at + ROWS].astype(np.float64)
        value = block @ w  # the same block as above, so the same bits
        less, equal = value < rho, value == rho
        below += less @ block
        tied += equal @ block
        n_below, n_tied = n_below + int(less.sum()), n_tied + int(equal.sum())
    return (below + (wanted - n_below) / n_tied * tied) / wanted, rho


def _mix(points: np.ndarray, share: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The points (m, F) and shares (m,) whose mixture is the shortest in their hull; points without a share go."""
    while True:
        spread = points[1:] - points[0]
        rest = np.linalg.lstsq(spread.T, -points[0], rcond=None)[0]
        best = np.concatenate([[1 - rest.sum()], rest])  # of the shortest vector in their affine hull
        if best.min() > 0:
            return points, best
        falling = best <= 0
        drop = share - best
        ratio = np.where(falling & (drop > 0), share / np.where(drop > 0, drop, 1), np.inf)
        share = share + min(float(ratio.min()), 1.0) * (best - share)
        share[ratio.argmin()] = 0.0
        points, share = points[share > 0], share[share > 0]
        share /= share.sum()


def _descend(rows: np.ndarray, nu: float, seed: int) -> tuple[np.ndarray, float]:
    """Eq. 1 as the released program minimises it: scikit-learn's descent in float64; w (F,) and rho."""
    try:
        from sklearn.linear_model import SGDOneClassSVM
    except ImportError as error:
        raise MissingExtraError(
            "`solver='sgd'` of a decision layer needs scikit-learn: pip install 'polyspect[sklearn]'"
        ) from error
    machine = SGDOneClassSVM(nu=nu, max_iter=1000, random_state=seed).fit(rows.astype(np.float64))
    return machine.coef_.astype(np.float64), float(machine.offset_[0])
