"""The plane that a part stands on, found in an organised cloud.

`fit_plane` is RANSAC over a fixed number of seeded hypotheses, all tested at once, then least squares on the inliers:

    gain(n, o) = sum over candidates of max(0, 1 - (d / t)^2) - w #{d < -2 t},   d = n.p + o        (1)

with t the tolerance. The second term knows that a part stands *on* its support: a plane with many points behind it
(the lid of a box, rather than the table under it) loses. `corner_plane` is the three-corner plane of CRD (official
code; the paper says only that the background is removed), kept with its weaknesses for reproductions, and
`corner_surface` the four-corner background of AST.

Frames: camera, x right, y down, z forward; any unit, as long as the tolerance has the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from ..samples import Array, check_shapes

Candidates = Literal["border", "grid"]
_MOST_CANDIDATES = 20_000  # more do not change a least-squares plane, they only cost time
_TESTED = 512  # candidates that vote on the hypotheses


@dataclass(frozen=True)
class Plane:
    """All points p with ``normal.p + offset = 0``.

    Attributes:
        normal: Unit vector towards the side on which the camera is.
        offset: Distance of the camera (the origin) from the plane, in the cloud's unit.
        inlier_share: Share of the candidate points within the tolerance.
        tilt_deg: Angle between `normal` and the optical axis, seen from the scene: (0, 0, -1).
        rms: Root mean square distance of the inliers, in the cloud's unit.
    """

    normal: tuple[float, float, float]
    offset: float
    inlier_share: float
    tilt_deg: float
    rms: float

    def distance(self, xyz: Array) -> Array:
        """Signed distances of points (..., 3), float64; positive on the camera's side."""
        a, b, c = self.normal
        distance = np.multiply(xyz[..., 0], a, dtype=np.float64)
        distance += np.multiply(xyz[..., 1], b, dtype=np.float64)
        distance += np.multiply(xyz[..., 2], c, dtype=np.float64)
        distance += self.offset
        return distance

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON keeps them."""
        return {**asdict(self), "normal": list(self.normal)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Plane:
        """The inverse of `to_dict`."""
        x, y, z = values["normal"]
        return cls(**{**values, "normal": (x, y, z)})


def fit_plane(
    xyz: Array,
    valid: Array,
    candidates: Candidates | Array = "border",
    *,
    tolerance_m: float = 0.005,
    seed: int = 0,
    hypotheses: int = 256,
    min_points: int = 12,
    min_inlier_share: float = 0.25,
    behind_weight: float = 1.0,
) -> Plane | None:
    """The support plane of an organised cloud; the same plane every time for the same input and seed.

    Args:
        xyz: (H, W, 3) points, camera frame, metres.
        valid: (H, W) bool, True where measured.
        candidates: Which points may vote: ``"border"``, the band along the edge of the measured area (5 % of its
            shorter side, for parts in the middle of the picture); ``"grid"``, all points; or an (H, W) bool mask.
        tolerance_m: Distance within which a point counts as lying on the plane.
        seed: Which triples of points become hypotheses.
        hypotheses: How many triples are tried.
        min_points: Fewer candidates than this give None.
        min_inlier_share: A plane that holds a smaller share of the candidates is not believed.
        behind_weight: w of Eq. 1; 0 is plain RANSAC (the largest plane).

    Returns:
        None if there are too few points, they do not span a plane, or too few of them lie on one.
    """
    check_shapes(xyz=(xyz, "H W 3"), valid=(valid, "H W"))
    chosen = np.flatnonzero(_candidate_mask(valid, candidates))
    chosen = chosen[:: max(1, -(-len(chosen) // _MOST_CANDIDATES))]
    if len(chosen) < max(3, min_points):
        return None
    points = xyz.reshape(-1, 3)[chosen].astype(np.float64)  # N 3
    start = _best_hypothesis(points, tolerance_m, seed, hypotheses, behind_weight)
    if start is None:
        return None
    return _refine(points, *start, tolerance_m, min_points, min_inlier_share)


def corner_plane(xyz: Array, *, patch: int = 3) -> Plane | None:
    """CRD's background plane: through the mean points of the top-left, top-right and bottom-left corner patches.

    A corner without any measured point counts as the origin, as in the official code, so that the plane is wrong then
    (use `empty_corners` to know). `inlier_share` and `rms` are those of the measured points of the three patches.

    Args:
        xyz: (H, W, 3) points, exactly 0 where unmeasured.
        patch: Side of a corner patch, pixels.

    Returns:
        None if the three points do not span a plane.
    """
    corners = _corners(xyz.astype(np.float64), patch)
    top_left, top_right, bottom_left = (
        points.sum(axis=(0, 1)) / max(np.count_nonzero(points[..., 2]), 1e-12) for points in corners
    )
    normal = np.cross(bottom_left - top_left, top_right - top_left)
    length = np.linalg.norm(normal)
    if not length > 0:
        return None
    normal /= length
    measured = np.concatenate([points[points[..., 2] != 0] for points in corners])
    return _plane(normal, -float(normal @ bottom_left), measured, tolerance_m=0.005)


def corner_surface(z: Array, known: Array, *, patch: int = 2) -> tuple[Array, int]:
    """AST's background: the depths of the four corners, interpolated bilinearly; no plane if they do not lie in one.

    The depth of a corner is the mean of what is known in its patch x patch pixels. A corner without any (its mean is
    0 / 0 in the official code, and so is all that follows) takes the smallest larger square that has one.

    Args:
        z: (H, W) depth.
        known: (H, W) bool, True where `z` means something; at least one.
        patch: Side of a corner patch, pixels.

    Returns:
        The depth of the background, (H, W) float64, and how many corners had to be widened, 0..4.
    """
    check_shapes(z=(z, "H W"), known=(known, "H W"))
    height, width = z.shape
    depths, widened = np.zeros((2, 2)), 0
    for row, column in np.ndindex(2, 2):
        side, corner = patch, (slice(None), slice(None))
        for side in range(patch, max(height, width) + 1):
            rows = slice(-side, None) if row else slice(side)
            corner = rows, slice(-side, None) if column else slice(side)
            if known[corner].any():
                break
        depths[row, column] = z[corner][known[corner]].mean(dtype=np.float64)
        widened += side > patch
    across, down = np.linspace(0, 1, width), np.linspace(0, 1, height)[:, None]  # 0 and 1 at the corner pixels
    top, bottom = (depths[row, 0] + (depths[row, 1] - depths[row, 0]) * across for row in (0, 1))
    return top + (bottom - top) * down, widened


def empty_corners(valid: Array, *, patch: int = 3) -> int:
    """How many of the three corner patches that `corner_plane` reads hold no measured point, 0..3."""
    return sum(not corner.any() for corner in _corners(valid, patch))


def _corners(image: Array, patch: int) -> tuple[Array, Array, Array]:
    return image[:patch, :patch], image[:patch, -patch:], image[-patch:, :patch]


def _candidate_mask(valid: Array, candidates: Candidates | Array) -> Array:
    if isinstance(candidates, np.ndarray):
        check_shapes(valid=(valid, "H W"), candidates=(candidates, "H W"))
        return candidates & valid
    if candidates == "grid" or not valid.any():
        return valid
    rows, columns = np.flatnonzero(valid.any(axis=1)), np.flatnonzero(valid.any(axis=0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    band = max(2, round(0.05 * min(bottom - top, right - left)))
    border = valid.copy()
    border[top + band : bottom - band, left + band : right - band] = False
    return border


def _best_hypothesis(
    points: Array, tolerance: float, seed: int, hypotheses: int, behind_weight: float
) -> tuple[Array, float] | None:
    """Normal (3,) and offset of the triple of points with the highest gain (Eq. 1), None if no triple spans a plane."""
    generator = np.random.default_rng(seed)
    voters = points[generator.integers(0, len(points), min(_TESTED, 4 * len(points)))]  # M 3
    a, b, c = np.moveaxis(points[generator.integers(0, len(points), (hypotheses, 3))], 1, 0)  # K 3 each
    normals = np.cross(b - a, c - a)
    lengths = np.linalg.norm(normals, axis=1)
    flat = lengths > 1e-3 * np.linalg.norm(b - a, axis=1) * np.linalg.norm(c - a, axis=1)  # sine of the angle at a
    if not flat.any():
        return None
    normals, anchors = normals[flat] / lengths[flat, None], a[flat]
    offsets = -np.einsum("kc,kc->k", normals, anchors)
    away = offsets < 0
    normals[away], offsets[away] = -normals[away], -offsets[away]
    distances = voters @ normals.T + offsets  # M K
    gain = np.maximum(0, 1 - (distances / tolerance) ** 2).sum(axis=0)  # Eq. 1
    gain -= behind_weight * (distances < -2 * tolerance).sum(axis=0)
    best = int(np.argmax(gain))
    return normals[best], float(offsets[best])


def _refine(
    points: Array, normal: Array, offset: float, tolerance: float, min_points: int, min_inlier_share: float
) -> Plane | None:
    """Least squares on the inliers, four times, the threshold tightening from the tolerance to 3 robust deviations."""
    threshold = tolerance
    for _ in range(4):
        distances = np.abs(points @ normal + offset)
        inliers = points[distances <= threshold]
        if len(inliers) < max(3, min_points):
            return None
        mean = inliers.mean(axis=0)
        spread, axes = np.linalg.eigh((inliers - mean).T @ (inliers - mean) / len(inliers))  # ascending variances
        if not np.sqrt(spread[1]) > max(1e-3 * np.sqrt(spread[2]), 0.5 * tolerance):
            return None  # a line or a point: thinner than the tolerance in two directions
        normal = axes[:, 0]
        offset = -float(normal @ mean)
        deviation = 1.4826 * float(np.median(np.abs(inliers @ normal + offset)))
        threshold = float(np.clip(3 * deviation, 0.2 * tolerance, tolerance))
    plane = _plane(normal, offset, points, tolerance)
    return plane if plane.inlier_share >= min_inlier_share else None


def _plane(normal: Array, offset: float, points: Array, tolerance_m: float) -> Plane:
    """The plane turned to the camera, with the statistics of `points` (N, 3)."""
    if offset < 0 or (offset == 0 and normal[2] > 0):
        normal, offset = -normal, -offset
    distances = np.abs(points @ normal + offset)
    inliers = distances[distances <= tolerance_m]
    return Plane(
        normal=(float(normal[0]), float(normal[1]), float(normal[2])),
        offset=float(offset),
        inlier_share=len(inliers) / len(points) if len(points) else 0.0,
        tilt_deg=float(np.degrees(np.arccos(np.clip(-normal[2], -1, 1)))),
        rms=float(np.sqrt(np.mean(inliers**2))) if len(inliers) else 0.0,
    )
