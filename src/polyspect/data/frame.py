"""How the prepared square grid lies on a part's own pixel grid, there and back.

The input (height x width) is placed on a square canvas (zero-padded, centre-cropped or stretched), and the canvas is
sampled at size x size:

    nearest, "centre":  source = floor((k + 1/2) * canvas / size)      unbiased, agrees with the filtered RGB       (1)
    nearest, "corner":  source = floor(k * canvas / size)              cv2 / torch `nearest`, the papers' rule       (2)

Eq. 2 shifts 3D against RGB by up to half a prepared pixel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import cv2
import numpy as np
from PIL import Image

from ..errors import ShapeError
from ..samples import Array

Aspect = Literal["pad", "squash", "crop"]
Nearest = Literal["centre", "corner"]
Filter = Literal["bilinear", "bicubic"]

_PIL_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@dataclass(frozen=True, kw_only=True)
class Frame:
    """Where the prepared grid came from; all in input pixels but `size`.

    Attributes:
        height, width: The part's own grid.
        top, left: Where its first row and column lie on the canvas; negative if they were cropped away.
        canvas_height, canvas_width: The canvas that is sampled; equal unless the part was squashed.
        size: Side of the prepared grid, prepared pixels.
        nearest: Which pixel nearest sampling takes, Eq. 1 or 2.
    """

    height: int
    width: int
    top: int
    left: int
    canvas_height: int
    canvas_width: int
    size: int
    nearest: Nearest = "centre"

    @classmethod
    def fit(
        cls, height: int, width: int, size: int, *, aspect: Aspect, pad_multiple: int = 0, nearest: Nearest = "centre"
    ) -> Frame:
        """The frame of a height x width part.

        Args:
            height, width: The part's own grid.
            size: Side of the prepared grid.
            aspect: ``"pad"`` to a square, ``"squash"`` both sides alike, or ``"crop"`` the middle square.
            pad_multiple: With ``"pad"``, the side of the square is a multiple of this (BTF: 100); 0 for none.
            nearest: See the module.
        """
        canvas_height, canvas_width = height, width
        if aspect == "pad":
            side = max(height, width)
            side = -(-side // pad_multiple) * pad_multiple if pad_multiple > 0 else side
            canvas_height = canvas_width = side
        elif aspect == "crop":
            canvas_height = canvas_width = min(height, width)
        return cls(
            height=height,
            width=width,
            top=(canvas_height - height) // 2,  # the odd pixel goes to the bottom and right, as in BTF
            left=(canvas_width - width) // 2,
            canvas_height=canvas_height,
            canvas_width=canvas_width,
            size=size,
            nearest=nearest,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON keeps them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Frame:
        """The inverse of `to_dict`."""
        return cls(**values)

    # -- to the prepared grid ----------------------------------------------------------------------------------------

    def inside(self) -> Array:
        """(size, size) bool, True where the prepared pixel shows the part's own grid, False in the padding."""
        rows, columns = self._sources()
        return ((rows >= 0) & (rows < self.height))[:, None] & ((columns >= 0) & (columns < self.width))[None]

    def take_nearest(self, image: Array) -> Array:
        """An (H, W) or (H, W, C) image sampled at the nearest pixels, never mixed; 0 (or False) in the padding."""
        rows, columns = self._sources()
        grid = np.ix_(np.clip(rows, 0, self.height - 1), np.clip(columns, 0, self.width - 1))
        taken = np.ascontiguousarray(image[grid])
        if self.top > 0 or self.left > 0 or self.canvas_height > self.height or self.canvas_width > self.width:
            taken[~self.inside()] = 0
        return taken

    def take_filtered(self, image: Array, method: Filter = "bilinear", edge: bool = False) -> Array:
        """An (H, W) or (H, W, C) image resized with Pillow's antialiased filter.

        Args:
            image: uint8, or float32 of any range.
            method: Filter kernel.
            edge: Pad by repeating the edge pixels (CFM) instead of zeros (BTF, M3DM).
        """
        canvas = self._canvas(image, edge)
        if canvas.shape[:2] == (self.size, self.size):
            return canvas.copy()
        return _pil_resize(canvas, self.size, _PIL_FILTERS[method])

    def take_bilinear(self, image: Array, size: int) -> Array:
        """An (H, W) float image at size x size between its nearest four pixels, without antialias, as AST resizes."""
        return cv2.resize(self._canvas(image, edge=False), (size, size), interpolation=cv2.INTER_LINEAR)

    def _sources(self) -> tuple[Array, Array]:
        """Input row of each prepared row and input column of each prepared column; outside the input if padded."""
        k = np.arange(self.size)
        if self.nearest == "centre":
            rows, columns = (((2 * k + 1) * n) // (2 * self.size) for n in (self.canvas_height, self.canvas_width))
        else:
            rows, columns = (k * n // self.size for n in (self.canvas_height, self.canvas_width))
        return rows - self.top, columns - self.left

    def _canvas(self, image: Array, edge: bool) -> Array:
        top, left = max(self.top, 0), max(self.left, 0)
        cut = image[max(-self.top, 0) :, max(-self.left, 0) :][: self.canvas_height, : self.canvas_width]
        bottom, right = self.canvas_height - top - cut.shape[0], self.canvas_width - left - cut.shape[1]
        if not (top or left or bottom or right):
            return cut
        around = [(top, bottom), (left, right)] + [(0, 0)] * (image.ndim - 2)
        return np.pad(cut, around, mode="edge" if edge else "constant")

    # -- and back ----------------------------------------------------------------------------------------------------

    def restore(self, image: Array, *, outside: float = 0.0) -> Array:
        """A map of the prepared grid on the part's own grid, (height, width), bilinear, same dtype.

        Args:
            image: (size, size) float.
            outside: Value of input pixels that were cropped away and so never seen.

        Raises:
            ShapeError: `image` is not of the prepared size.
        """
        return self._uncrop(self._resize_back(image, cv2.INTER_LINEAR), outside)

    def restore_mask(self, mask: Array) -> Array:
        """A bool mask (size, size) on the part's own grid, nearest; False where cropped away.

        Raises:
            ShapeError: `mask` is not of the prepared size.
        """
        self._check(mask)
        rows, columns = (
            ((2 * np.arange(n) + 1) * self.size) // (2 * n) for n in (self.canvas_height, self.canvas_width)
        )
        return self._uncrop(mask[np.ix_(rows, columns)], False)

    def restore_points(self, points: Array) -> Array:
        """Prepared (row, column) positions (N, 2) as positions on the part's own grid; pixel centres are whole."""
        scale = np.array([self.canvas_height, self.canvas_width]) / self.size
        return (np.asarray(points, dtype=np.float64) + 0.5) * scale - 0.5 - np.array([self.top, self.left])

    def place_points(self, points: Array) -> Array:
        """The inverse of `restore_points`: positions on the part's own grid, (N, 2), as prepared positions."""
        scale = self.size / np.array([self.canvas_height, self.canvas_width])
        return (np.asarray(points, dtype=np.float64) + np.array([self.top, self.left]) + 0.5) * scale - 0.5

    def _resize_back(self, image: Array, interpolation: int) -> Array:
        self._check(image)
        return cv2.resize(image, (self.canvas_width, self.canvas_height), interpolation=interpolation)

    def _uncrop(self, canvas: Array, outside: float | bool) -> Array:
        restored = np.full((self.height, self.width), outside, dtype=canvas.dtype)
        own = canvas[max(self.top, 0) :, max(self.left, 0) :][: self.height, : self.width]
        rows, columns = max(-self.top, 0), max(-self.left, 0)
        restored[rows : rows + own.shape[0], columns : columns + own.shape[1]] = own
        return restored

    def _check(self, image: Array) -> None:
        if image.shape != (self.size, self.size):
            raise ShapeError(
                f"the map has shape {image.shape}, but this part was prepared at {self.size}x{self.size} pixels: "
                f"restore each map of a batch with its own part's frame, before any other resizing"
            )


def restore(image: Array, frame: Frame) -> Array:
    """A map (size, size) of the prepared grid on the part's own grid (H, W): `Frame.restore` with 0 where unseen."""
    return frame.restore(image)


def _pil_resize(image: Array, size: int, method: Image.Resampling) -> Array:
    """Pillow's antialiased resize of (H, W) or (H, W, C); uint8 of 1, 3 or 4 channels at once, all else per channel."""
    if image.dtype == np.uint8 and (image.ndim == 2 or image.shape[2] in (3, 4)):
        return np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize((size, size), method))
    if image.dtype != np.uint8:
        image = image.astype(np.float32)
    if image.ndim == 2:
        return np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize((size, size), method))
    return np.stack([_pil_resize(image[..., c], size, method) for c in range(image.shape[2])], axis=-1)
