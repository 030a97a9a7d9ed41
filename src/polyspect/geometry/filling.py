"""Filling the holes of depth images: growing 3x3 means (CRD, AST), or the nearest measured pixel for all at once."""

from __future__ import annotations

import cv2
import numpy as np

from ..samples import Array, check_shapes


def fill_rounds(image: Array, known: Array, rounds: int, *, spare_first: bool = False) -> tuple[Array, Array]:
    """Fill unknown pixels from outside in: each becomes the mean of the known pixels of its 3x3 window; repeat.

    The hole filling of CRD (official code), where "known" is "not 0"; it also grows a part by `rounds` pixels into a
    blank background. Known pixels keep their values.

    Args:
        image: (H, W) float.
        known: (H, W) bool.
        rounds: How often, 0 or more.
        spare_first: Never fill the first row and column, as AST's program does not.

    Returns:
        The image, float64, 0 where still unknown, and the mask of what is known now. The inputs are left alone.
    """
    check_shapes(image=(image, "H W"), known=(known, "H W"))
    filled = np.where(known, image, 0).astype(np.float64)
    known = known.copy()
    for _ in range(rounds):
        if known.all() or not known.any():
            break
        total = _sum_3x3(filled)
        count = _sum_3x3(known.astype(np.float64))
        new = ~known & (count > 0.5)
        if spare_first:
            new[0] = new[:, 0] = False
        filled[new] = total[new] / count[new]
        known |= new
    return filled, known


def nearest_known(known: Array) -> Array:
    """Flat index, (H, W) int64, of a nearest known pixel of every pixel; known pixels name themselves.

    Distances are those of OpenCV's 5x5 chamfer, within a few per cent of the Euclidean ones.

    Args:
        known: (H, W) bool, at least one True.
    """
    _, labels = cv2.distanceTransformWithLabels(
        (~known).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_5, labelType=cv2.DIST_LABEL_PIXEL
    )
    flat = np.flatnonzero(known)
    source = np.zeros(int(labels.max()) + 1, dtype=np.int64)
    source[labels.ravel()[flat]] = flat
    return source[labels]


def fill_nearest(image: Array, known: Array, where: Array | None = None) -> Array:
    """A copy of `image` in which unknown pixels take the value of the nearest known one.

    Args:
        image: (H, W) or (H, W, C).
        known: (H, W) bool. If nothing is known the copy is unchanged.
        where: (H, W) bool, the only pixels that may be filled; None fills all.
    """
    holes = ~known if where is None else where & ~known
    filled = image.copy()
    if holes.any() and known.any():
        filled[holes] = image.reshape(-1, *image.shape[2:])[nearest_known(known)[holes]]
    return filled


def _sum_3x3(image: Array) -> Array:
    return cv2.boxFilter(image, cv2.CV_64F, (3, 3), normalize=False, borderType=cv2.BORDER_CONSTANT)
