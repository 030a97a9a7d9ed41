"""Heights above a plane, and the plane's own frame, so that maps do not depend on how the camera was tilted."""

from __future__ import annotations

import numpy as np

from ..samples import Array, check_shapes
from .plane import Plane


def height_above(xyz: Array, valid: Array, plane: Plane) -> Array:
    """Signed height of each point above `plane`, (H, W) float32, metres; positive towards the camera, 0 where invalid.

    Args:
        xyz: (H, W, 3) points, camera frame, metres.
        valid: (H, W) bool, True where measured.
        plane: The support.
    """
    check_shapes(xyz=(xyz, "H W 3"), valid=(valid, "H W"))
    return np.where(valid, plane.distance(xyz), 0).astype(np.float32)


def plane_rotation(plane: Plane) -> Array:
    """The smallest rotation (3, 3), float64, that turns the plane's normal to (0, 0, -1).

    With a = normal, b = (0, 0, -1), v = a x b, c = a.b (Rodrigues): R = I + [v] + [v]^2 / (1 + c).
    """
    a = np.asarray(plane.normal, dtype=np.float64)
    b = np.array([0.0, 0.0, -1.0])
    cosine = float(a @ b)
    if cosine < -1 + 1e-12:  # the normal points along +z: half a turn about x
        return np.diag([1.0, -1.0, -1.0])
    x, y, z = np.cross(a, b)
    skew = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + skew + skew @ skew / (1 + cosine)


def to_plane_frame(vectors: Array, plane: Plane) -> Array:
    """Points or normals (..., 3) turned into the plane's frame, float32: R v, with R of `plane_rotation`.

    The camera stays the origin, so the plane becomes z = `plane.offset` and zero vectors (invalid) stay zero.
    """
    return np.asarray(vectors @ plane_rotation(plane).T.astype(vectors.dtype), dtype=np.float32)
