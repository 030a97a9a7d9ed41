"""Prototypes of normal features: what a feature looks like when only normal patterns may be used to write it.

"Rethinking Reverse Distillation for Multi-Modal Anomaly Detection" (MMRD), per stage and modality:

    W_j(p) = softmax_j( cos(F(p), P_j) / tau )                                                             (4)
    Fhat(p) = sum_j W_j(p) P_j                                                                             (5)
    L = mean over parts, channels and positions of (F - Fhat)^2                                            (6)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPS = 1e-8  # smallest norm that a vector is divided by; an all-zero feature gets equal weights


class Prototypes(nn.Module):
    """N learnable vectors of C numbers that features are re-expressed by.

    Attributes:
        vectors: (N, C), drawn from N(0, 1) until set.
    """

    def __init__(self, count: int, channels: int, tau: float = 1.0) -> None:
        super().__init__()
        self.vectors = nn.Parameter(torch.randn(count, channels))
        self.tau = tau

    def weights(self, features: Tensor) -> Tensor:
        """W of Eq. 4 for features (B, C, h, w): (B, h, w, N), summing to 1 over the prototypes."""
        x = features.float().permute(0, 2, 3, 1)  # B h w C, contiguous for channels_last maps
        with torch.autocast(x.device.type, enabled=False):  # norms of long vectors overflow half precision
            inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=EPS).reciprocal()
            cosine = (x @ F.normalize(self.vectors, dim=1, eps=EPS).T) * inverse
            return (cosine / self.tau).softmax(-1)

    def forward(self, features: Tensor) -> Tensor:
        """Fhat of Eq. 5 for features (B, C, h, w): the same shape, in channels_last layout."""
        with torch.autocast(features.device.type, enabled=False):
            return (self.weights(features) @ self.vectors).permute(0, 3, 1, 2)


def prototype_loss(features: Tensor, prior: Tensor, cells: Tensor | None = None) -> Tensor:
    """Eq. 6 for features and priors (B, C, h, w); over the cells (B, h, w) bool that are True, if given."""
    square = (features - prior).square()
    if cells is None:
        return square.mean()
    weight = cells[:, None].to(square)
    return (square * weight).sum() / (weight.sum() * square.shape[1]).clamp(min=1)


class RandomRows:
    """A uniform sample, without replacement, of rows that come batch by batch, in bounded memory.

    Every row draws a random key and the `count` largest keys stay.
    """

    def __init__(self, count: int, seed: int) -> None:
        self.count = count
        self._generator = torch.Generator().manual_seed(seed)
        self._keys, self._rows = torch.empty(0), torch.empty(0, 0)

    def add(self, rows: Tensor) -> None:
        """Take in rows (n, C)."""
        keys = torch.rand(len(rows), generator=self._generator)
        best = keys.topk(min(self.count, len(keys))).indices
        keys, rows = keys[best], rows[best.to(rows.device)]
        if len(self._keys):
            keys, rows = torch.cat([self._keys, keys]), torch.cat([self._rows, rows])
            best = keys.topk(min(self.count, len(keys))).indices
            keys, rows = keys[best], rows[best.to(rows.device)]
        self._keys, self._rows = keys, rows

    def take(self) -> Tensor:
        """The sample, (at most count, C); starts afresh but for the generator."""
        rows, self._keys, self._rows = self._rows, torch.empty(0), torch.empty(0, 0)
        return rows
