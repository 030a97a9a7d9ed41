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
from ..geometry.padding import pack_points
from ..geometry.sampling import farthest_points
from ..samples import Features, check_shapes


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


def patch_centres(xyz: Tensor, part: Tensor, size: int, density: float) -> Tensor:
    """Pixels (B, P) int32 of farthest points, `density` per `size` points of a part, at least 1; -1 where it has fewer.

    P is the number for a part that fills the picture, so that it is the same for all.

    Args:
        xyz: (B, 3, H, W).
        part: (B, H, W) bool.
    """
    H, W = part.shape[-2:]
    most = patch_count(H * W, density, size)
    centres = torch.full((len(part), most), -1, dtype=torch.int32, device=xyz.device)
    for index, own in enumerate(part):
        packed = pack_points(xyz[index : index + 1], own[None])
        N = packed.points.shape[1]
        if N:
            count = patch_count(N, density, size)
            rows = farthest_points(packed.points, count)[0]
            centres[index, :count] = packed.pixels[0, rows].int()
    return centres


def judged_pixels(features: Features) -> Tensor:
    """Pixels (B, H, W) bool to judge: ``part``, or where that is empty all ``valid`` ones.

    A part whose background took all of it, flagged ``all_background``, would else be as good as a part can be.
    """
    part = features["part"]
    return torch.where(part.flatten(1).any(1)[:, None, None], part, features["valid"])


def draw_patches(
    xyz: Tensor, part: Tensor, centres: Tensor, count: int, size: int, generator: torch.Generator
) -> Tensor:
    """Patches (`count`, `size`, 3) around centres drawn at random, from the parts of a batch in turn.

    Args:
        xyz: (B, 3, H, W).
        part: (B, H, W) bool.
        centres: (B, P), as `patch_centres` finds them.
        count: Patches in all.
        size: Points per patch; parts with fewer are left out.
        generator: On the CPU.

    Raises:
        DataError: no part has enough points.
    """
    found = list(zip(xyz, part.flatten(1), centres))
    able = [(points.flatten(1).T, own, rows[rows >= 0].long()) for points, own, rows in found if int(own.sum()) >= size]
    if not able:
        most = max(int(own.sum()) for _, own, _ in found)
        raise DataError(
            f"no part of {len(found)} has the {size} points of a patch, the largest has {most}: check the clouds and "
            f"the removal of their background, or lower `patch`"
        )
    patches = []
    for index, (everywhere, own, rows) in enumerate(able):
        wanted = len(range(index, count, len(able)))
        if not wanted:
            continue
        chosen = torch.randint(len(rows), (wanted,), generator=generator)
        points, queries = everywhere[own], everywhere[rows[chosen.to(rows.device)]]  # N 3, n 3
        apart = torch.cdist(queries, points, compute_mode="donot_use_mm_for_euclid_dist")  # n N
        patches.append(points[apart.topk(size, largest=False, sorted=False).indices])
    return torch.cat(patches)


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
