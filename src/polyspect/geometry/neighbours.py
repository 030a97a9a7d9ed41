"""Exact nearest neighbours and balls in 3-D clouds, and the groups of points around centres.

The order of neighbours is that of (|q - p|^2, row): squared distances are direct differences in float64,
(dx^2 + dy^2) + dz^2, and equal ones are settled by the lower row of the cloud. On the CPU a k-d tree (scipy) proposes
and the definition disposes: candidates are measured and sorted anew, and where the last of them may be tied with points
that the tree left out, it is asked for more. Other devices compare every query with every point, in blocks. Both give
the same rows.

The expanded form |q|^2 + |p|^2 - 2 q.p that published code uses is off by up to 1e-7 m^2 half a metre from the camera,
where neighbours are 2e-6 m^2 apart; it is not used here.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor

from ..errors import ConfigError, DataError
from ..samples import Array, check_shapes
from .padding import valid_rows

_PAIRS = 2**24  # distances held at a time by the blocked search
_MARGIN = 1 + 1e-12  # squared distances closer than this may be confused by the tree's rounding


class Neighbours(NamedTuple):
    """Who is near whom.

    Attributes:
        rows: (B, Q, k) int64, rows of the cloud, by (distance, row); never a padded row.
        squared_distance: (B, Q, k) in the dtype of the points, the square of their unit.
        found: (B, Q, k) bool; False where a ball holds fewer than k points, and for queries that are padding.
    """

    rows: Tensor
    squared_distance: Tensor
    found: Tensor


def nearest_neighbours(
    queries: Tensor,
    points: Tensor,
    k: int,
    *,
    valid: Tensor | None = None,
    queries_valid: Tensor | None = None,
) -> Neighbours:
    """The `k` nearest points of every query, by (distance, row); a query that is a point finds itself first.

    Args:
        queries: (B, Q, 3).
        points: (B, N, 3), the same unit.
        k: How many, at least 1.
        valid: (B, N) bool, the points that may be found; None for all.
        queries_valid: (B, Q) bool; other queries get the first valid point and ``found`` False.

    Raises:
        ConfigError: `k` is below 1.
        DataError: a cloud with queries has fewer than `k` valid points; a valid point is not finite.
    """
    return _neighbours(queries, points, k, None, valid, queries_valid)


def ball_neighbours(
    queries: Tensor,
    points: Tensor,
    radius: float,
    k: int,
    *,
    valid: Tensor | None = None,
    queries_valid: Tensor | None = None,
) -> Neighbours:
    """The nearest points strictly within `radius` of every query, `k` at most, by (distance, row).

    Slots that are left over repeat the first neighbour, as PointNet++ (Sec. 3.2) fills its balls, with ``found`` False.
    A query with nothing in its ball holds its nearest point there, however far, and no slot is found. (PointNet++'s own
    search keeps the first `k` points of the ball by row, so that it depends on the order of the cloud; this one keeps
    the nearest, like Open3D's hybrid search.)

    Args:
        queries: (B, Q, 3).
        points: (B, N, 3), the same unit.
        radius: In the same unit, above 0.
        k: Slots per query, at least 1.
        valid: (B, N) bool, the points that may be found; None for all.
        queries_valid: (B, Q) bool; other queries get the first valid point and ``found`` False.

    Raises:
        ConfigError: `k` is below 1 or `radius` not above 0.
        DataError: a cloud with queries has no valid point; a valid point is not finite.
    """
    if not radius > 0:
        raise ConfigError(f"the radius of a neighbourhood must be above 0, got {radius}")
    return _neighbours(queries, points, k, radius, valid, queries_valid)


def group(points: Tensor, centres: Tensor, index: Tensor) -> Tensor:
    """Neighbourhoods minus their centres, (B, G, S, 3).

    Args:
        points: (B, N, 3).
        centres: (B, G, 3).
        index: (B, G, S) int64, rows of `points`.
    """
    check_shapes(points=(points, "B N 3"), centres=(centres, "B G 3"), index=(index, "B G S"))
    return gather_rows(points, index) - centres[:, :, None]


def gather_rows(values: Tensor, index: Tensor) -> Tensor:
    """The rows (B, N, C) of each cloud that `index` (B, ...) names: (B, ..., C)."""
    flat = index.flatten(1)[..., None].expand(-1, -1, values.shape[-1])
    return values.gather(1, flat).view(*index.shape, values.shape[-1])


def search_cloud(queries: Tensor, points: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` nearest rows of one cloud (N, 3), by (distance, row), for queries (Q, 3).

    Returns:
        Rows (Q, k) int64 and squared distances (Q, k) float64. `k` may not exceed N; nothing is checked.
    """
    if points.device.type == "cpu":
        near, distance = _search_tree(queries.double().numpy(force=True), points.double().numpy(force=True), k)
        return torch.from_numpy(near), torch.from_numpy(distance)
    return _search_blocks(queries.double(), points.double(), k)


def _neighbours(
    queries: Tensor,
    points: Tensor,
    k: int,
    radius: float | None,
    valid: Tensor | None,
    queries_valid: Tensor | None,
) -> Neighbours:
    check_shapes(queries=(queries, "B Q 3"), points=(points, "B N 3"))
    valid, queries_valid = valid_rows(points, valid, "points"), valid_rows(queries, queries_valid, "queries")
    if k < 1:
        raise ConfigError(f"at least 1 neighbour must be asked for, got {k}")
    clouds = [_one_cloud(b, queries[b], points[b], k, radius, valid[b], queries_valid[b]) for b in range(len(points))]
    if not clouds:
        shape = (0, queries.shape[1], k)
        index = torch.zeros(shape, dtype=torch.int64, device=points.device)
        return Neighbours(index, points.new_zeros(shape), torch.zeros_like(index, dtype=torch.bool))
    index, squared, found = (torch.stack(part) for part in zip(*clouds))
    return Neighbours(index, squared, found)


def _one_cloud(
    number: int, queries: Tensor, points: Tensor, k: int, radius: float | None, valid: Tensor, asked: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`Neighbours` of cloud `number`, without the batch dimension."""
    rows, ask = valid.nonzero()[:, 0], asked.nonzero()[:, 0]
    needed = k if radius is None else 1
    if len(ask) and len(rows) < needed:
        raise DataError(
            f"{needed} neighbours were asked for, but cloud {number} has only {len(rows)} valid points; "
            "ask for fewer or leave the cloud out"
        )
    index = (rows[0] if len(rows) else valid.new_zeros((), dtype=torch.int64)).repeat(len(queries), k)
    squared = points.new_full((len(queries), k), torch.inf)
    found = torch.zeros_like(index, dtype=torch.bool)
    if len(ask):
        near, distance = search_cloud(queries[ask], points[rows], min(k, len(rows)))
        inside = torch.ones_like(near, dtype=torch.bool) if radius is None else distance < radius**2
        missing = k - near.shape[1]  # slots that the cloud cannot fill
        near, distance = (torch.cat([part, part[:, :1].expand(-1, missing)], 1) for part in (near, distance))
        inside = torch.cat([inside, inside.new_zeros(len(ask), missing)], 1)
        index[ask] = rows[torch.where(inside, near, near[:, :1])]
        squared[ask] = torch.where(inside, distance, distance[:, :1]).to(points.dtype)
        found[ask] = inside
    return index, squared, found


def _search_tree(queries: Array, points: Array, k: int) -> tuple[Array, Array]:
    """`search_cloud` in numpy, float64."""
    tree = cKDTree(points)
    axes = np.ascontiguousarray(points.T)
    index = np.empty((len(queries), k), dtype=np.int64)
    squared = np.empty((len(queries), k))
    todo, want = np.arange(len(queries)), min(k + 1, len(points))
    while len(todo):
        open_rows = []
        for rows in np.array_split(todo, -(-len(todo) * want // _PAIRS)):
            _, near = tree.query(queries[rows], k=want, workers=torch.get_num_threads())
            near = near.reshape(len(rows), want)
            distance = _squared_distance(queries[rows], axes, near)
            _settle_order(near, distance)
            index[rows], squared[rows] = near[:, :k], distance[:, :k]
            # a point that the tree left out may be tied with the k-th
            open_rows.append(rows[distance[:, -1] <= _MARGIN * distance[:, k - 1]])
        if want == len(points):
            break
        todo, want = np.concatenate(open_rows), min(k + 8 * (want - k), len(points))
    return index, squared


def _squared_distance(queries: Array, axes: Array, near: Array) -> Array:
    """|q - p|^2 (Q, k) for the rows `near` of the cloud, whose coordinates are `axes` (3, N)."""
    total = np.zeros(near.shape)
    for axis, coordinate in zip(axes, queries.T):
        step = axis[near]
        step -= coordinate[:, None]
        step *= step
        total += step
    return total


def _settle_order(near: Array, distance: Array) -> None:
    """Sort rows that are not in the order of (distance, row), in place."""
    later, sooner = distance[:, 1:], distance[:, :-1]
    wrong = (later < sooner) | ((later == sooner) & (near[:, 1:] < near[:, :-1]))
    rows = np.flatnonzero(wrong.any(axis=1))
    if len(rows):
        order = np.lexsort((near[rows], distance[rows]), axis=1)
        near[rows] = np.take_along_axis(near[rows], order, axis=1)
        distance[rows] = np.take_along_axis(distance[rows], order, axis=1)


def _search_blocks(queries: Tensor, points: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`search_cloud` by brute force in torch, float64, on any device."""
    found = [_search_block(block, points, k) for block in queries.split(max(1, _PAIRS // len(points)))]
    return torch.cat([index for index, _ in found]), torch.cat([squared for _, squared in found])


def _search_block(queries: Tensor, points: Tensor, k: int) -> tuple[Tensor, Tensor]:
    step = queries[:, :1] - points[:, 0]  # Q N
    distance = step.mul_(step)
    for axis in (1, 2):
        step = queries[:, axis, None] - points[:, axis]
        distance += step.mul_(step)
    squared, index = distance.topk(k, largest=False)
    order = index.argsort(1)
    squared, index = squared.gather(1, order), index.gather(1, order)
    order = squared.argsort(dim=1, stable=True)
    squared, index = squared.gather(1, order), index.gather(1, order)
    tied = ((distance <= squared[:, -1:]).sum(1) > k).nonzero()[:, 0]  # `topk` chose among equals as it pleased
    if len(tied):
        squared[tied], index[tied] = (part[:, :k] for part in distance[tied].sort(dim=1, stable=True))
    return index, squared
