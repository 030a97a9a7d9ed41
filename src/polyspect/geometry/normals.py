"""Surface normals of organised clouds.

`surface_normals` adds up, over a window, the steps between neighbouring pixels along rows and along columns; the sums
are two tangents and their cross product is the normal:

    t_x(p) = sum of P(i, j+1) - P(i, j),   t_y(p) = sum of P(i+1, j) - P(i, j),   n = t_y x t_x / |t_y x t_x|       (1)

over the links inside the window whose two ends are measured and closer than `jump`. On a plane every link lies in the
plane, so n is exact whatever the perspective; a turn of the cloud turns n with it; no link crosses a depth jump.
`sobel_normals` is the image-space recipe of TRD (the successor of CRD by the same authors) for reproductions.
"""

from __future__ import annotations

import cv2
import numpy as np

from ..errors import ConfigError
from ..samples import Array, check_shapes


def surface_normals(xyz: Array, valid: Array, *, window: int = 5, jump_m: float = 0.02) -> Array:
    """Unit normals towards the camera, (H, W, 3) float32; 0 where invalid or where no two links span a surface.

    Args:
        xyz: (H, W, 3) points, camera frame (camera at the origin), metres.
        valid: (H, W) bool, True where measured.
        window: Odd side of the window, pixels, at least 3.
        jump_m: Neighbours this far apart or farther do not belong to one surface.

    Raises:
        ConfigError: `window` is even or below 3.
    """
    check_shapes(xyz=(xyz, "H W 3"), valid=(valid, "H W"))
    if window < 3 or window % 2 == 0:
        raise ConfigError(f"the window of the normals is {window} pixels; it must be an odd number of at least 3")
    points = np.ascontiguousarray(np.moveaxis(xyz, -1, 0), dtype=np.float64)  # 3 H W
    half = window // 2
    steps_x = np.zeros_like(points)  # the link from (i, j) to (i, j+1), stored at (i, j)
    steps_y = np.zeros_like(points)
    steps_x[:, :, :-1] = _links(points[:, :, :-1], points[:, :, 1:], valid[:, :-1] & valid[:, 1:], jump_m)
    steps_y[:, :-1] = _links(points[:, :-1], points[:, 1:], valid[:-1] & valid[1:], jump_m)
    t_x = _box_sum(steps_x, width=2 * half, height=window, anchor=(half, half))  # Eq. 1
    t_y = _box_sum(steps_y, width=window, height=2 * half, anchor=(half, half))
    normal = _cross(t_y, t_x)
    squared = _dot(normal, normal)
    good = valid & (squared > 1e-12 * _dot(t_x, t_x) * _dot(t_y, t_y))  # the squared sine of the tangents' angle
    signed = np.where(_dot(normal, points) > 0, -1.0, 1.0)
    signed /= np.sqrt(squared, out=np.ones_like(squared), where=good)
    normal *= np.where(good, signed, 0)
    return np.ascontiguousarray(np.moveaxis(normal, 0, -1), dtype=np.float32)


def sobel_normals(depth: Array, mask: Array, *, kernel: int = 5) -> Array:
    """Normals of a depth *image* after TRD: n = (-gx, -gy, 1) / (|.| + 1e-8), (H, W, 3) float32, 0 off the mask.

    gx, gy are un-normalised Sobel derivatives, so n depends on the kernel, the pixel pitch and the scale of `depth`
    (TRD: min-max to 0..1, filled; kernel 3 for cookie, 7 for dowel, foam and tire, 5 otherwise). The sign is TRD's:
    z points away from the camera.

    Args:
        depth: (H, W), grows away from the camera.
        mask: (H, W) bool, True on the part.
        kernel: Side of the Sobel kernel: 3, 5 or 7.

    Raises:
        ConfigError: another kernel.
    """
    check_shapes(depth=(depth, "H W"), mask=(mask, "H W"))
    if kernel not in (3, 5, 7):
        raise ConfigError(f"the Sobel kernel of the normals is {kernel} pixels; it must be 3, 5 or 7")
    image = depth.astype(np.float64)
    gx = cv2.Sobel(image, cv2.CV_64F, 1, 0, ksize=kernel)
    gy = cv2.Sobel(image, cv2.CV_64F, 0, 1, ksize=kernel)
    normal = np.stack([-gx, -gy, np.ones_like(gx)], axis=-1)
    normal /= np.sqrt(np.einsum("hwc,hwc->hw", normal, normal))[..., None] + 1e-8
    return np.where(mask[..., None], normal, 0).astype(np.float32)


def _links(start: Array, end: Array, measured: Array, jump: float) -> Array:
    """Steps (3, h, w) between neighbours; 0 where one is unmeasured or they are `jump` or more apart."""
    step = end - start
    step *= measured & (_dot(step, step) < jump**2)
    return step


def _box_sum(planes: Array, *, width: int, height: int, anchor: tuple[int, int]) -> Array:
    """Sums over windows, 0 outside. Not `cv2.boxFilter`: its running sums leave rounding residues where all is 0."""
    kernels = np.ones(width), np.ones(height)
    return np.stack(
        [cv2.sepFilter2D(plane, -1, *kernels, anchor=anchor, borderType=cv2.BORDER_CONSTANT) for plane in planes]
    )


def _dot(a: Array, b: Array) -> Array:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _cross(a: Array, b: Array) -> Array:
    return np.stack([a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]])
