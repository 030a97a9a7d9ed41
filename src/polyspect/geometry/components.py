"""Connected pieces of the foreground, where neighbouring pixels hang together only if their 3D points are close.

Pixels and the links between them are drawn on a lattice of (2H-1, 2W-1) cells (pixel, link, pixel, ...), so that one
2-D labelling respects every cut link exactly: no search for neighbours in space is needed.
"""

from __future__ import annotations

import cv2
import numpy as np

from ..samples import Array, check_shapes
from .filling import fill_nearest


def close_mask(mask: Array, rounds: int) -> Array:
    """Morphological closing of an (H, W) bool mask with a 3x3 square, `rounds` times; the border is no obstacle."""
    if rounds < 1 or not mask.any():
        return mask.copy()
    closed = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_CLOSE, np.ones((3, 3), np.uint8), iterations=rounds)
    return closed.astype(bool)


def label_components(xyz: Array, valid: Array, mask: Array, *, jump_m: float) -> tuple[Array, Array]:
    """Label the 4-connected pieces of `mask`, cut wherever two neighbouring points are `jump_m` or more apart.

    Pixels of the mask without a point (closed holes) take part with the point of the nearest measured pixel.

    Args:
        xyz: (H, W, 3) points, metres.
        valid: (H, W) bool, True where measured.
        mask: (H, W) bool, what is labelled.
        jump_m: Smallest 3D distance between neighbours that separates them.

    Returns:
        Labels (H, W) int32, 0 off the mask and 1..n on it, and the pixel count of each of 0..n.
    """
    check_shapes(xyz=(xyz, "H W 3"), valid=(valid, "H W"), mask=(mask, "H W"))
    points = fill_nearest(xyz, valid, where=mask) if (mask & ~valid).any() else xyz
    H, W = mask.shape
    lattice = np.zeros((2 * H - 1, 2 * W - 1), np.uint8)
    lattice[::2, ::2] = mask
    lattice[::2, 1::2] = mask[:, 1:] & mask[:, :-1] & _near(points[:, 1:], points[:, :-1], jump_m)
    lattice[1::2, ::2] = mask[1:] & mask[:-1] & _near(points[1:], points[:-1], jump_m)
    _, cells = cv2.connectedComponents(lattice, connectivity=4)
    labels = np.ascontiguousarray(cells[::2, ::2])
    return labels, np.bincount(labels.ravel())


def keep_components(
    xyz: Array, valid: Array, mask: Array, *, jump_m: float, keep: int = 0, min_pixels: int = 0
) -> Array:
    """The part of `mask` that belongs to its large pieces.

    Args:
        xyz: (H, W, 3) points, metres.
        valid: (H, W) bool, True where measured.
        mask: (H, W) bool.
        jump_m: See `label_components`.
        keep: How many pieces stay, the largest first; 0 keeps all.
        min_pixels: Pieces with fewer pixels go in any case.
    """
    if not mask.any() or (keep < 1 and min_pixels < 2):
        return mask.copy()
    labels, counts = label_components(xyz, valid, mask, jump_m=jump_m)
    stays = counts >= min_pixels
    stays[0] = False
    if keep > 0:
        order = np.argsort(-counts[1:], kind="stable") + 1
        stays[order[keep:]] = False
    return np.asarray(stays[labels])


def _near(a: Array, b: Array, jump: float) -> Array:
    squared = np.square(a[..., 0] - b[..., 0])
    squared += np.square(a[..., 1] - b[..., 1])
    squared += np.square(a[..., 2] - b[..., 2])
    return squared < jump**2
