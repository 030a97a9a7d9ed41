"""Distances between patches and the rows of a memory bank by other metrics than the Euclidean one.

    l2    |q - m|        l1    sum_c |q_c - m_c|        cos    1 - q.m / (|q| |m|)

CMDIAD (Information Fusion 2025), Appendix A.4, compares the three; Sec. 3.3 asks that a coreset be chosen by the metric
that is used afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import ConfigError, NotFittedError
from ..samples import check_shapes
from .coreset import l1_coreset
from .memory import MemoryBank, nearest

Metric = Literal["l2", "l1", "cos"]


def nearest_rows(
    queries: Tensor, rows: Tensor, k: int = 1, metric: Metric = "l2", *, block: int = 1 << 22
) -> tuple[Tensor, Tensor]:
    """The `k` of `rows` (K, D) nearest to each of `queries` (Q, D) by `metric`, nearest first.

    A vector of zeros has no direction; its ``cos`` distance to any other is 1/2, to another such vector 0.

    Args:
        block: Most entries of the distance matrix held at a time with ``l1``.

    Returns:
        Distances (Q, k) and row indices int64 (Q, k).

    Raises:
        ConfigError: `k` is not in 1..K.
    """
    check_shapes(queries=(queries, "Q D"), rows=(rows, "K D"))
    if metric == "l2":
        return nearest(queries, rows, k)
    if metric == "cos":  # |u - v|^2 = 2 (1 - u.v) for unit vectors
        distances, indices = nearest(F.normalize(queries, dim=1), F.normalize(rows, dim=1), k)
        return distances.square() / 2, indices
    if not 1 <= k <= len(rows):
        raise ConfigError(f"{k} nearest neighbours were asked for, but the bank has {len(rows)} vectors")
    found = [
        torch.cdist(part, rows, p=1.0).topk(k, dim=1, largest=False)
        for part in queries.split(max(1, block // len(rows)))
    ]
    return torch.cat([part.values for part in found]), torch.cat([part.indices for part in found])


def distances_to(queries: Tensor, rows: Tensor, metric: Metric = "l2") -> Tensor:
    """Distances (B, n) of `queries` (B, D) to rows of their own, (B, n, D), by `metric`."""
    check_shapes(queries=(queries, "B D"), rows=(rows, "B n D"))
    if metric == "cos":
        return (F.normalize(rows, dim=2) - F.normalize(queries, dim=1)[:, None]).square().sum(2) / 2
    return torch.linalg.vector_norm(rows - queries[:, None], ord=1 if metric == "l1" else 2, dim=2)


class MetricBank(MemoryBank):
    """A memory bank that measures by `metric`.

    Args:
        name: As of `MemoryBank`, like `settings`.
        metric: Of `distance`.
        around: Metric of `around`.
        coreset: Metric of the selection. ``cos`` selects among unit vectors; ``l1``, which random projections do not
            keep, among the patches as they are: slower by far.
    """

    def __init__(self, name: str, metric: Metric, around: Metric, coreset: Metric, **settings: Any) -> None:
        super().__init__(name, **settings)
        self.metric, self.metric_around, self.metric_coreset = metric, around, coreset

    def _select(self, pool: Tensor, size: int, progress: Callable[[int, int], None] | None) -> Tensor:
        if self.metric_coreset == "l1":
            x = pool.to(self.vectors.device)
            return l1_coreset(x, size, min(self.start, len(pool) - 1), progress=progress)
        return super()._select(F.normalize(pool, dim=1) if self.metric_coreset == "cos" else pool, size, progress)

    def distance(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """As of every bank, by `metric`.

        Raises:
            NotFittedError: the bank was not built.
        """
        if self.metric == "l2":
            return super().distance(patches)
        if len(self.vectors) == 0:
            raise NotFittedError(f"memory bank '{self.name}' is empty: fit the detector before scoring")
        distances, indices = nearest_rows(self._normalised(patches), self.vectors, 1, self.metric)
        return distances[:, 0], indices[:, 0]

    def around(self, patches: Tensor, match: Tensor, n: int) -> Tensor:
        """As of every bank, by the metric for it."""
        if self.metric_around == "l2":
            return super().around(patches, match, n)
        count = min(n, len(self.vectors))
        beside = nearest_rows(self.vectors[match], self.vectors, count, self.metric_around)[1]  # B n
        return distances_to(self._normalised(patches), self.vectors[beside], self.metric_around)
