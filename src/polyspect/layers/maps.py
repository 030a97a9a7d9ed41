"""Anomaly maps from feature differences: cosine distance, smoothing, and the statistics that make maps comparable."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor
from torch.nn import functional as F

from .distillation import EPS, kept_cells


def cosine_map(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    size: tuple[int, int],
    keep: Tensor | None = None,
    *,
    multiply: bool = False,
) -> Tensor:
    """Sum (or product) over scales of 1 - cos per position, each brought to `size` (bilinear, corners aligned).

    Reverse Distillation, Sec. 3.3; Crossmodal Reverse Distillation, Eq. 10.

    Args:
        students: Feature maps (B, C_i, h_i, w_i).
        teachers: The same shapes.
        size: Height and width of the map.
        keep: (B, H, W) bool; positions without a True pixel are left out of the interpolation. What comes out at a
            pixel that is itself False is meaningless.

    Returns:
        (B, H, W) float64, from 0 to 2 per scale (to 1 where features cannot be negative), no unit.
    """
    total: Tensor | None = None
    for student, teacher in zip(students, teachers, strict=True):
        distance = 1 - F.cosine_similarity(student.float(), teacher.float(), dim=1, eps=EPS)  # B h w
        large = enlarge(distance, size, keep).double()
        total = large if total is None else total * large if multiply else total + large
    assert total is not None
    return total


def cosine_shares(student: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """Split 1 - cos(S, T) along the summands of T: (B, m, h, w), whose sum over m is the distance.

    With unit vectors s and t of S and T = sum_m T_m, 1 - cos(S, T) = t . (t - s) = sum_m T_m . (t - s) / |T|. A share
    can be negative where its summand speaks against the others. Where T is 0 all shares are 0.

    Args:
        student: S, (B, C, h, w).
        parts: T_m, each (B, C, h, w).
    """
    target = reduce(torch.add, parts)
    norm = torch.linalg.vector_norm(target, dim=1, keepdim=True).clamp(min=EPS)
    away = target / norm - F.normalize(student, dim=1, eps=EPS)
    return torch.stack([(part * away).sum(1) for part in parts], dim=1) / norm


def enlarge(maps: Tensor, size: tuple[int, int], keep: Tensor | None = None) -> Tensor:
    """Bring maps (B, h, w) to `size`: bilinear, corners aligned; `keep` as in `cosine_map`."""
    if keep is None:
        return _enlarge(maps, size)
    cells = kept_cells(keep, maps.shape[-2:]).float()
    share = _enlarge(cells, size)
    return torch.where(share > 0, _enlarge(maps * cells, size) / share, 0)


def fill_unkept(maps: Tensor, keep: Tensor) -> Tensor:
    """Give pixels of maps (B, H, W) where `keep` is False the mean of the part's kept ones; 0 where nothing is kept."""
    weight = keep.to(maps.dtype)
    mean = (maps * weight).sum((1, 2)) / weight.sum((1, 2)).clamp(min=1)
    return torch.where(keep, maps, mean[:, None, None])


def gaussian_smooth(maps: Tensor, sigma: float, truncate: float = 4.0) -> Tensor:
    """Smooth (..., H, W) with a Gaussian of `sigma` pixels; beyond the border the map is mirrored, edge included.

    Equals ``scipy.ndimage.gaussian_filter`` with its defaults. Written as two banded matrices, which is exact for maps
    smaller than the kernel too and keeps the dtype of `maps`; ``sigma=0`` returns `maps`.
    """
    if sigma == 0:
        return maps
    rows, columns = (_smoothing_matrix(n, sigma, truncate).to(maps.dtype).to(maps.device) for n in maps.shape[-2:])
    return rows @ maps @ columns.T


def top_mean(maps: Tensor, share: float) -> Tensor:
    """Mean of the largest `share` of the values of each map (B, H, W), at least one: (B,).

    Between the maximum (one noisy pixel decides) and the mean (a small defect drowns).
    """
    flat = maps.flatten(1)
    return flat.topk(max(1, int(share * flat.shape[1])), dim=1).values.mean(1)


class MapMoments:
    """Mean and population standard deviation, per branch, of maps that come batch by batch.

    Batches are merged by the pairwise update of Chan, Golub and LeVeque in float64, so nothing is lost when the
    mean is large against the spread.
    """

    def __init__(self) -> None:
        self._state: tuple[Tensor, Tensor, Tensor] | None = None  # count, mean, sum of squared deviations: each (K,)

    def add(self, maps: Tensor, keep: Tensor) -> None:
        """Take in maps (B, K, H, W) where `keep` (B, K, H, W) is True."""
        maps, over = maps.double(), (0, 2, 3)
        count = keep.sum(over).to(maps.dtype)
        mean = torch.where(keep, maps, 0).sum(over) / count.clamp(min=1)
        square = torch.where(keep, (maps - mean[:, None, None]) ** 2, 0).sum(over)
        if self._state is not None:
            count0, mean0, square0 = self._state
            both, step = (count0 + count).clamp(min=1), mean - mean0
            mean, square = mean0 + step * (count / both), square0 + square + step**2 * (count0 * count / both)
            count = count0 + count
        self._state = count, mean, square

    def take(self) -> tuple[Tensor, Tensor, Tensor]:
        """What `read` says; starts afresh."""
        moments = self.read()
        self._state = None
        return moments

    def read(self) -> tuple[Tensor, Tensor, Tensor]:
        """Counts, means and standard deviations, each (K,), 0 where nothing was kept."""
        if self._state is None:
            return (torch.zeros(0, dtype=torch.float64),) * 3
        count, mean, square = self._state
        return count, mean, (square / count.clamp(min=1)).sqrt()


def _enlarge(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(maps[:, None], size=size, mode="bilinear", align_corners=True)[:, 0]


def _smoothing_matrix(n: int, sigma: float, truncate: float) -> Tensor:
    """(n, n) float64: row i holds the weights of the pixels that make up smoothed pixel i."""
    radius = int(truncate * sigma + 0.5)
    offsets = torch.arange(-radius, radius + 1)
    weights = torch.exp(-0.5 * (offsets.double() / sigma) ** 2)
    weights /= weights.sum()
    source = (torch.arange(n)[:, None] + offsets) % (2 * n)  # (n, taps), on the mirrored line of period 2n
    source = torch.where(source < n, source, 2 * n - 1 - source)
    return torch.zeros(n, n, dtype=torch.float64).scatter_add_(1, source, weights.expand(n, -1))
