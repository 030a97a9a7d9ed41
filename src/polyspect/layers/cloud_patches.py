"""Cut a cloud into overlapping patches of equally many points: farthest points, and the nearest points of each.

    c_1 .. c_P     farthest points of the cloud, P = round(density N / size)                              (1)
    patch i        the `size` points nearest to c_i, itself included                                      (2)

Shape-Guided (ICML 2023) and MDSS (PRCV 2024), for learning (density 5) and for scoring (density 10). Equations 1 and 2
alone leave points out: in what is between the patches where points are dense. MDSS says that each point belongs to at
least one patch; so, with `cover`, the point farthest from all centres of those left out becomes a centre, until there
is none.

Nothing changes if a cloud is moved or scaled.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ConfigError, DataError
from ..geometry.neighbours import search_cloud
from ..geometry.sampling import farthest_points
from ..samples import check_shapes


def patch_count(points: int, density: float, size: int) -> int:
    """P of Eq. 1, at least 1 and at most one per point."""
    return min(points, max(1, round(density * points / size)))


def cut_patches(points: Tensor, density: float, size: int = 500, *, cover: bool = False, start: int = 0) -> Tensor:
    """Rows (P, size) int64 of a cloud (N, 3), one patch each, from its centre outwards; centres in order of choice.

    Args:
        points: In any unit.
        density: Patches per `size` points: how many each point is in, on average.
        size: Points per patch.
        cover: Add patches until every point is in one.
        start: Row of the first centre.

    Raises:
        ConfigError: `density` is not above 0, `size` below 1, or `start` is no row.
        DataError: fewer points than `size`, or a point that is not finite.
        ShapeError: another shape.
    """
    N = check_shapes(points=(points, "N 3"))["N"]
    if not density > 0 or size < 1:
        raise ConfigError(f"patches need a `density` above 0 and a `size` of at least 1, got {density} and {size}")
    if size > N:
        raise DataError(
            f"a patch takes {size} points and the cloud has {N}: check the part and the removal of its background, or "
            f"make patches smaller"
        )
    centres = farthest_points(points[None], patch_count(N, density, size), start=start)[0]  # P, Eq. 1
    rows = search_cloud(points[centres], points, size)[0]  # P size, Eq. 2
    return torch.cat([rows, *_cover(points, centres, rows)]) if cover else rows


def _cover(points: Tensor, centres: Tensor, rows: Tensor) -> list[Tensor]:
    """The patches (1, size) that are missing where `rows` (P, size) leave points out."""
    left = torch.ones(len(points), dtype=torch.bool, device=points.device)
    left[rows.flatten()] = False
    open_rows = left.nonzero()[:, 0]
    if not len(open_rows):
        return []
    nearest = torch.full_like(points[:, 0], -1.0)  # squared distance of those left out from the nearest centre
    nearest[open_rows] = search_cloud(points[open_rows], points[centres], 1)[1][:, 0].to(points)
    added = []
    while bool(left.any()):
        centre = nearest.argmax()
        apart = (points - points[centre]).square().sum(1)  # N
        apart[centre] = -1.0  # before points at the same place, or these could be chosen for ever
        among = (apart <= apart.kthvalue(rows.shape[1]).values).nonzero()[:, 0]
        patch = among[apart[among].argsort(stable=True)[: rows.shape[1]]]
        added.append(patch[None])
        left[patch] = False
        nearest = torch.where(left, torch.minimum(nearest, apart), -1.0)
    return added
