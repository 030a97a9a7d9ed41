"""Farthest point sampling: points that cover a cloud evenly, by greedy choice.

    r_i = min over chosen c of |p_i - c|^2       (1)       the next choice is the point with the largest r_i

Gonzalez, "Clustering to minimize the maximum intercluster distance" (1985); for point networks Qi et al., "PointNet++"
(NeurIPS 2017), Sec. 3.2. Equal r_i: the lowest row wins. (The CUDA sampler that M3DM and CMDIAD call settles exact ties
in the order of its threads instead; it makes no difference to measured clouds.)

`layers.coreset.greedy_coreset` solves the same problem for many dimensions, choosing every row once; here there are
three, so plain passes over x, y and z are as fast as memory allows.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, DataError
from ..samples import Array
from .padding import valid_rows

RELEASED_SKIP = 1e-3
"""`skip_squared_norm` of the sampler that M3DM, CMDIAD and CFM call, in the square of the cloud's unit."""


def farthest_points(
    points: Tensor,
    count: int,
    *,
    valid: Tensor | None = None,
    start: int = 0,
    skip_squared_norm: float | None = None,
    allow_repeats: bool = False,
) -> Tensor:
    """Choose `count` rows of every cloud, each the one farthest from those before it (Eq. 1).

    Distances are direct differences in the dtype of `points`, (dx^2 + dy^2) + dz^2 without fused operations, so that
    every device chooses the same rows.

    Args:
        points: (B, N, 3), any unit.
        count: How many to choose, at least 1. The rows for a smaller count are the first of those for a larger one.
        valid: (B, N) bool, the rows that may be chosen; None for all.
        start: The first choice, counted among the valid rows of each cloud.
        skip_squared_norm: Points whose squared distance from the origin is this or less are never chosen, unless as
            the start. None, the definition, skips nothing; `RELEASED_SKIP` is what the released code does.
        allow_repeats: Let a cloud with fewer points than `count` repeat rows, as the definition does once every
            distance is 0: the lowest row that may be chosen, or the start if there is none.

    Returns:
        int64 (B, count), rows of `points` in the order of choice.

    Raises:
        ConfigError: `count` or `start` is out of range.
        DataError: a cloud has fewer rows to choose from than `count`, and `allow_repeats` is off; a valid point is not
            finite.
    """
    valid = valid_rows(points, valid, "points")
    if count < 1:
        raise ConfigError(f"at least 1 farthest point must be asked for, got {count}")
    open_rows = valid  # those that may be chosen
    if skip_squared_norm is not None:
        open_rows = valid & (_squared_norm(points) > skip_squared_norm)
    first = _start_rows(valid, start)  # B
    if not allow_repeats:
        to_choose_from = open_rows.scatter(1, first[:, None], True).sum(1)
        _check_counts(to_choose_from, count)
    if _on_cpu(points):
        rows = [_choose_numpy(*cloud, count) for cloud in zip(points.numpy(force=True), open_rows.numpy(), first)]
        return torch.from_numpy(np.stack(rows)) if rows else torch.empty(0, count, dtype=torch.int64)
    return _choose(points, open_rows, first, count)


def _on_cpu(points: Tensor) -> bool:
    return points.device.type == "cpu"


def _squared_norm(points: Tensor) -> Tensor:
    x, y, z = points.unbind(-1)
    return x * x + y * y + z * z


def _start_rows(valid: Tensor, start: int) -> Tensor:
    """The row (B,) of the valid row number `start` of each cloud."""
    counts = valid.sum(1)
    short = (counts <= start).nonzero()
    if start < 0 or len(short):
        where = f"cloud {int(short[0])} has {int(counts[short[0]])} valid points" if len(short) else "it counts from 0"
        raise ConfigError(f"farthest points cannot start at valid point {start}: {where}; leave empty clouds out")
    return ((valid.cumsum(1) == start + 1) & valid).to(torch.uint8).argmax(1)


def _check_counts(to_choose_from: Tensor, count: int) -> None:
    short = (to_choose_from < count).nonzero()
    if len(short):
        raise DataError(
            f"{count} farthest points were asked for, but cloud {int(short[0])} has only "
            f"{int(to_choose_from[short[0]])} points to choose from; "
            "ask for fewer, leave the cloud out, or allow repeats"
        )


def _choose_numpy(points: Array, open_rows: Array, first: Tensor, count: int) -> Array:
    """One cloud on the CPU: the open rows alone, as three contiguous arrays, updated in place."""
    rows = np.flatnonzero(open_rows)
    chosen = np.full(count, int(first), dtype=np.int64)
    if not len(rows):
        return chosen
    x, y, z = np.ascontiguousarray(points[rows].T)
    nearest = np.full(len(rows), np.inf, dtype=points.dtype)
    distance, step = np.empty_like(nearest), np.empty_like(nearest)
    for made in range(1, count):
        cx, cy, cz = points[chosen[made - 1]]
        np.square(np.subtract(x, cx, out=distance), out=distance)
        distance += np.square(np.subtract(y, cy, out=step), out=step)
        distance += np.square(np.subtract(z, cz, out=step), out=step)
        np.minimum(nearest, distance, out=nearest)  # Eq. 1
        chosen[made] = rows[nearest.argmax()]  # the first of equals
    return chosen


def _choose(points: Tensor, open_rows: Tensor, first: Tensor, count: int) -> Tensor:
    """All clouds at once, on any device; nothing waits for the device inside the loop."""
    B = len(points)
    axes = torch.where(open_rows.scatter(1, first[:, None], True)[..., None], points, 0)  # padding may hold NaN
    axes = axes.permute(2, 0, 1).contiguous()  # 3 B N
    nearest = torch.where(open_rows, torch.inf, -1.0).to(points.dtype)  # B N; -1 stays the minimum: never chosen
    none_open = ~open_rows.any(1, keepdim=True)  # B 1
    start = first[:, None]
    pick, chosen = start, [start]
    for _ in range(1, count):
        step = axes - axes.gather(2, pick.expand(3, B, 1))
        step *= step
        distance = step[0] + step[1]
        distance += step[2]
        torch.minimum(nearest, distance, out=nearest)  # Eq. 1
        pick = torch.where(none_open, start, nearest.argmax(1, keepdim=True))  # the first of equals
        chosen.append(pick)
    return torch.cat(chosen, dim=1)
