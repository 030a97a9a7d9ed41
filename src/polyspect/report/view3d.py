"""The data behind the turning 3D view: each part's points on their grid, small enough to travel inside a page.

The page's script joins neighbouring points of the grid to triangles and paints them by colour or by anomaly. Per point
it gets 10 bytes: three 16-bit coordinates, three bytes of colour, one byte of anomaly on the fixed scale.

Frame of the view, millimetres: z points from the part to the camera's side, along the mean surface normal; x follows
the picture's rows to the right and y goes up the picture.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..evaluation.results import PartRow
from ..samples import Array
from .pictures import Scale

POINT_BUDGET = 160_000  # points of all parts together: 10 bytes each, a third more as text
NO_POINT = 65535
_JUMP = 6.0  # a triangle's edge may be this many times the median distance of neighbours
_FEWEST = 16  # a surface of fewer points is not worth a view


def view_data(parts: Sequence[tuple[PartRow, Mapping[str, Array]]], scale: Scale) -> list[dict[str, Any]]:
    """One entry per part that has points, in the order given; empty if none has.

    Each entry: ``index``, ``id``, ``outcome``, ``score``, ``rows``, ``columns``, ``size_mm`` (extent along x, y, z),
    ``camera`` (unit vector towards the camera), ``up`` (up the camera's picture), ``step_mm`` (one unit of the
    coordinates), ``edge_mm`` (longest edge of a triangle), and base64 text of ``points`` (uint16 little endian, rows x
    columns x 3, 65535 where there is none), ``colours`` (uint8 x 3) and ``anomaly`` (uint8).
    """
    with_points = [(part, arrays) for part, arrays in parts if "xyz" in arrays]
    most = POINT_BUDGET // max(len(with_points), 1)
    entries = (_entry(part, arrays, scale, most) for part, arrays in with_points)
    return [entry for entry in entries if entry is not None]


def _entry(part: PartRow, arrays: Mapping[str, Array], scale: Scale, most: int) -> dict[str, Any] | None:
    xyz, there, picks = _thinned(arrays, most)
    if there.sum() < _FEWEST:
        return None
    axes = view_axes(xyz, there)
    points = (xyz.astype(np.float64) @ axes) * 1000.0
    camera = -xyz[there].astype(np.float64).mean(0) @ axes  # the camera is the origin of its frame
    edge = _JUMP * _spacing(points, there)
    low, high = points[there].min(0), points[there].max(0)
    step = max(float((high - low).max()) / (NO_POINT - 1), 1e-9)
    whole = np.where(there[..., None], np.rint((points - low) / step), NO_POINT).astype("<u2")
    heat = np.rint(scale.unit(arrays["map"][picks]) * 255).astype(np.uint8)
    colours = arrays["rgb"][picks] if "rgb" in arrays else np.full((*heat.shape, 3), 190, np.uint8)
    return {
        "index": part.index,
        "id": part.id,
        "outcome": part.outcome,
        "score": part.score,
        "rows": int(there.shape[0]),
        "columns": int(there.shape[1]),
        "size_mm": [round(float(extent), 1) for extent in high - low],
        "camera": [round(float(share), 6) for share in camera / np.linalg.norm(camera)],
        "up": [round(float(share), 6) for share in -axes[1]],  # the camera's y points down the picture
        "step_mm": step,
        "edge_mm": edge,
        "points": _text(whole),
        "colours": _text(colours),
        "anomaly": _text(heat),
    }


def _thinned(arrays: Mapping[str, Array], most: int) -> tuple[Array, Array, tuple[Array, Array]]:
    """The part's points (h, w, 3) in metres, at most `most`, where they are there (h, w), and their map pixels."""
    H, W = arrays["map"].shape
    rows, columns = np.arange(arrays["xyz"].shape[0]), np.arange(arrays["xyz"].shape[1])
    stored = -(-H // rows.size), -(-W // columns.size)  # every how many pixels a point was stored
    there = _there(arrays, np.ix_(np.minimum(rows * stored[0], H - 1), np.minimum(columns * stored[1], W - 1)))
    if there.any():  # the box around the part
        inside = np.argwhere(there)
        (top, left), (bottom, right) = inside.min(0), inside.max(0)
        rows, columns = rows[top : bottom + 1], columns[left : right + 1]
    step = max(1, int(np.ceil(np.sqrt(rows.size * columns.size / most))))
    rows, columns = rows[::step], columns[::step]
    grid = np.ix_(rows, columns)
    picks = np.ix_(np.minimum(rows * stored[0], H - 1), np.minimum(columns * stored[1], W - 1))
    return arrays["xyz"][grid], there[grid], picks


def _there(arrays: Mapping[str, Array], picks: tuple[Array, Array]) -> Array:
    """Which stored points are measured, on the part, and no single flying ones, which would shrink it to a dot."""
    depth = arrays["xyz"][..., 2]
    there = depth > 0
    if "valid" in arrays:
        there &= arrays["valid"][picks]
    on_part = arrays["foreground"][picks] if "foreground" in arrays else np.ones_like(there)
    if (on_part & there).sum() >= _FEWEST:
        there &= on_part
    if there.any():
        low, high = np.quantile(depth[there], [0.005, 0.995])
        there &= np.abs(depth - (low + high) / 2) <= (high - low) + 1e-6
    return there


def view_axes(xyz: Array, there: Array) -> Array:
    """The axes of the view as columns (3, 3), in the camera frame, from points (h, w, 3) that are there (h, w).

    The mean normal is the sum of the grid cells' vector areas, which depends on the outline of the surface alone, so a
    dent or a hole does not tilt the view.
    """
    across = there[:, 1:] & there[:, :-1]
    right = (xyz[:, 1:] - xyz[:, :-1])[across].astype(np.float64).mean(0) if across.any() else np.array([1.0, 0, 0])
    z = _vector_area(xyz, there)
    z = np.array([0.0, 0.0, -1.0]) if np.linalg.norm(z) < 1e-12 else z / np.linalg.norm(z)
    z = -z if z[2] > 0 else z  # towards the camera, which looks along +z
    x = right - z * (right @ z)
    if np.linalg.norm(x) < 1e-12:
        x = np.array([1.0, 0.0, 0.0]) - z * z[0]
    x = x / np.linalg.norm(x)
    axes: Array = np.stack([x, np.cross(z, x), z], axis=1)
    return axes


def _vector_area(xyz: Array, there: Array) -> Array:
    """The summed vector area (3,) of all grid cells with four points; square metres times two."""
    corners = xyz.astype(np.float64)
    whole = there[:-1, :-1] & there[1:, :-1] & there[:-1, 1:] & there[1:, 1:]
    one = (corners[1:, 1:] - corners[:-1, :-1])[whole]
    other = (corners[1:, :-1] - corners[:-1, 1:])[whole]
    return np.cross(one, other).sum(0)


def _spacing(points: Array, there: Array) -> float:
    """Median distance of neighbouring points along rows and columns, in the points' unit."""
    across = np.linalg.norm(points[:, 1:] - points[:, :-1], axis=2)[there[:, 1:] & there[:, :-1]]
    along = np.linalg.norm(points[1:] - points[:-1], axis=2)[there[1:] & there[:-1]]
    both = np.concatenate([across, along])
    return float(np.median(both)) if both.size else 1.0


def _text(array: Array) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii")
