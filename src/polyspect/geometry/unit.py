"""The unit frame: a cloud about its centroid, as large as the unit sphere. Point-MAE is pre-trained in it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..samples import check_shapes
from .padding import valid_rows


def to_unit_frame(points: Tensor, valid: Tensor | None = None) -> Tensor:
    """Subtract each cloud's centroid and divide by its largest radius: (B, N, 3), without a unit.

    Args:
        points: (B, N, 3).
        valid: (B, N) bool; other points count for nothing and come out as 0. None for all.

    Returns:
        As `points`; a cloud whose points coincide comes out as 0.

    Raises:
        DataError: a valid point is not finite.
    """
    check_shapes(points=(points, "B N 3"))
    counts = valid_rows(points, valid, "points")[..., None]  # B N 1
    points = torch.where(counts, points, 0)
    centred = torch.where(counts, points - points.sum(1, keepdim=True) / counts.sum(1, keepdim=True).clamp(min=1), 0)
    radius = centred.norm(dim=2).amax(1)[:, None, None] if points.shape[1] else points.new_ones(len(points), 1, 1)
    return centred / torch.where(radius > 0, radius, 1)
