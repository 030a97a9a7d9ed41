"""The drawing board of the synthetic parts: a grid in millimetres, seeded streams, noise fields, outlines, digits.

A part is drawn in its own frame (x right, y down, origin at its centre) on a square grid finer than the camera's
pixels. All lengths here are millimetres, so the same seed gives the same part at every image size.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, replace
from functools import lru_cache

import cv2
import numpy as np

from ...samples import Array

Rng = np.random.Generator
Colour = tuple[float, float, float]


class Streams:
    """Independent random streams of one part, by name: drawing more from one never shifts another."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(self, name: str) -> Rng:
        """A fresh generator at the start of the stream `name`."""
        return np.random.default_rng(np.random.SeedSequence([self.seed, zlib.crc32(name.encode())]))


@dataclass(frozen=True, eq=False)
class Canvas:
    """A square grid of N x N cells over `extent` mm, centred on the part; the arrays are read-only.

    Attributes:
        size: N, cells per side.
        extent: Side length, mm.
        x, y: (N, N) cell centres, mm.
        r, phi: (N, N) the same in polar coordinates, mm and radians.
    """

    size: int
    extent: float
    x: Array
    y: Array
    r: Array
    phi: Array

    @property
    def cell(self) -> float:
        """Side of a grid cell, mm."""
        return self.extent / self.size

    def window(self, x: float, y: float, radius: float) -> tuple[slice, slice]:
        """Rows and columns of the square of half-width `radius` mm around a point, cut to the canvas."""
        column, row = ((value + self.extent / 2) / self.cell for value in (x, y))
        reach = radius / self.cell + 1
        return tuple(  # type: ignore[return-value]
            slice(max(0, math.floor(at - reach)), min(self.size, math.ceil(at + reach))) for at in (row, column)
        )


@lru_cache(maxsize=32)
def make_canvas(size: int, extent: float) -> Canvas:
    """The canvas of `size` x `size` cells over `extent` mm; kept, since every part of a category uses the same."""
    axis = ((np.arange(size) + 0.5) / size - 0.5).astype(np.float32) * np.float32(extent)
    x, y = np.meshgrid(axis, axis)
    arrays = (x, y, np.hypot(x, y), np.arctan2(y, x))
    for array in arrays:
        array.setflags(write=False)
    return Canvas(size, extent, *arrays)


@dataclass(frozen=True, eq=False)
class Surface:
    """A part as drawn: shape and appearance on the canvas.

    Attributes:
        height: (N, N) float32 mm above the table, 0 beside the part.
        base: (N, N, 3) float32 linear albedo below any print.
        gloss: (N, N) float32 strength of the highlight.
        inside: (N, N) float32 share of the cell that the part covers, 0..1.
        shine: Exponent of the highlight; larger is sharper.
        ink: (N, N) float32 coverage of the print 0..1, or None where nothing is printed.
        ink_colour: Linear albedo of the print.
    """

    height: Array
    base: Array
    gloss: Array
    inside: Array
    shine: float
    ink: Array | None = None
    ink_colour: Colour = (0.02, 0.02, 0.02)

    def albedo(self) -> Array:
        """(N, N, 3) linear albedo with the print on it."""
        if self.ink is None:
            return self.base
        return mix(self.base, self.ink_colour, self.ink)

    def with_(self, **changes: object) -> Surface:
        """A copy with some layers replaced."""
        return replace(self, **changes)  # type: ignore[arg-type]


@lru_cache(maxsize=256)
def _interpolation(size: int, extent: float, cell_mm: float) -> Array:
    """(size, n) float32 weights that interpolate n lattice values `cell_mm` apart at the cells of a canvas axis.

    Cubic convolution (Keys 1981, a = -1/2) over four neighbours; each row has unit norm, so that white noise of unit
    variance keeps its variance everywhere.
    """
    at = (np.arange(size) + 0.5) / size * extent / cell_mm + 1
    first = np.floor(at).astype(np.intp)
    t = (at - first)[:, None]
    near, far = np.abs(t - [0, 1]), np.abs(t - [-1, 2])
    inner = 1.5 * near**3 - 2.5 * near**2 + 1
    outer = -0.5 * far**3 + 2.5 * far**2 - 4 * far + 2
    weights = np.zeros((size, int(first[-1]) + 3))
    rows = np.arange(size)
    for k, column in enumerate((outer[:, 0], inner[:, 0], inner[:, 1], outer[:, 1])):
        weights[rows, first - 1 + k] = column
    weights = (weights / np.linalg.norm(weights, axis=1, keepdims=True)).astype(np.float32)
    weights.setflags(write=False)
    return weights


def noise(rng: Rng, canvas: Canvas, cell_mm: float, stretch: tuple[float, float] = (1.0, 1.0)) -> Array:
    """Smooth noise (N, N) float32, mean 0 and standard deviation 1, varying over `cell_mm` x `stretch`.

    A white lattice, interpolated: the lattice is in millimetres, so the field does not depend on N.
    """
    along_x, along_y = (_interpolation(canvas.size, canvas.extent, cell_mm * s) for s in stretch)
    lattice = rng.standard_normal((along_y.shape[1], along_x.shape[1]), dtype=np.float32)
    return along_y @ lattice @ along_x.T


def fractal(rng: Rng, canvas: Canvas, cell_mm: float, octaves: int = 3, gain: float = 0.55) -> Array:
    """Sum of `octaves` noises, each of half the cell and `gain` times the amplitude of the one before; std about 1."""
    total = noise(rng, canvas, cell_mm)
    for k in range(1, octaves):
        total = total + np.float32(gain**k) * noise(rng, canvas, cell_mm / 2**k)
    return total / np.float32(math.sqrt(sum(gain ** (2 * k) for k in range(octaves))))


def smoothstep(t: Array) -> Array:
    """0 below 0, 1 above 1, 3 t^2 - 2 t^3 between."""
    t = np.clip(t, 0, 1)
    return t * t * (3 - 2 * t)


def rounded_box(x: Array, y: Array, half_x: float, half_y: float, radius: float) -> Array:
    """Signed distance in mm to a rectangle with rounded corners; negative inside."""
    dx, dy = np.abs(x) - (half_x - radius), np.abs(y) - (half_y - radius)
    return np.hypot(np.maximum(dx, 0), np.maximum(dy, 0)) + np.minimum(np.maximum(dx, dy), 0) - radius


def round_edge(distance: Array, width: float) -> Array:
    """0 outside (`distance` >= 0), rising like a quarter wave to 1 at `width` mm inside."""
    return np.sin(np.clip(distance / -width, 0, 1) * np.float32(math.pi / 2))


def coverage(distance: Array, canvas: Canvas) -> Array:
    """Share 0..1 of each cell inside an outline given by its signed distance in mm."""
    return np.clip(0.5 - distance / np.float32(canvas.cell), 0, 1)


def wavy_outline(rng: Rng, phi: Array, orders: range, amplitude: float) -> Array:
    """1 + a random Fourier series in the angle, its terms falling as 1 / order; for irregular outlines."""
    total = np.ones_like(phi)
    for order in orders:
        size, phase = amplitude * rng.standard_normal() / order, rng.uniform(0, 2 * math.pi)
        total += np.float32(size) * np.cos(order * phi + np.float32(phase))
    return total


@dataclass(frozen=True, eq=False)
class Scatter:
    """Small things strewn over the canvas, at most one per square of a jittered lattice.

    Attributes:
        along, across: (N, N) mm from the nearest thing's centre, in its own randomly turned frame.
        value: (N, N) its random number, uniform in 0..1; 2 where the square is empty.
    """

    along: Array
    across: Array
    value: Array

    def spots(self, radius_mm: float, aspect: float = 1.0, spread: float = 0.4) -> Array:
        """(N, N) smooth spots 0..1, of radius `radius_mm` times 1 +- `spread`, drawn out by `aspect`."""
        size = radius_mm * (1 + spread * (2 * self.value - 1))
        q = 1 - np.hypot(self.along / aspect, self.across) / size
        return np.where(self.value <= 1, smoothstep(1.6 * q), 0).astype(np.float32)


def scatter(rng: Rng, canvas: Canvas, square_mm: float, share: float, jitter: float = 0.5) -> Scatter:
    """Strew things on a lattice of `square_mm`; a `share` 0..1 of the squares holds one, `jitter` of a square off."""
    n = math.ceil(canvas.extent / square_mm) + 1
    offset = rng.uniform(-jitter / 2, jitter / 2, (2, n, n)).astype(np.float32)
    turn = rng.uniform(0, math.pi, (n, n)).astype(np.float32)
    value = np.where(rng.random((n, n)) < share, rng.random((n, n)), 2).astype(np.float32)
    i = ((canvas.y + canvas.extent / 2) / square_mm).astype(np.intp)
    j = ((canvas.x + canvas.extent / 2) / square_mm).astype(np.intp)
    flat = i * n + j
    dx = canvas.x + canvas.extent / 2 - (j + 0.5 + offset[0].ravel()[flat]).astype(np.float32) * square_mm
    dy = canvas.y + canvas.extent / 2 - (i + 0.5 + offset[1].ravel()[flat]).astype(np.float32) * square_mm
    c, s = np.cos(turn).ravel()[flat], np.sin(turn).ravel()[flat]
    return Scatter(c * dx + s * dy, c * dy - s * dx, value.ravel()[flat])


def linear(red: int, green: int, blue: int) -> Colour:
    """Linear albedo of an 8-bit display colour (gamma 2.2)."""
    return tuple((value / 255) ** 2.2 for value in (red, green, blue))


def vary(rng: Rng, colour: Colour, value: float = 0.08, tint: float = 0.03) -> Array:
    """(3,) float32: `colour` of another piece of the same stuff; its brightness and tint vary by `value` and `tint`."""
    change = np.exp(value * rng.standard_normal() + tint * rng.standard_normal(3))
    return (np.asarray(colour) * change).astype(np.float32)


def mix(under: Array, over: Array | Colour, alpha: Array) -> Array:
    """Blend colours (N, N, 3): `over` where `alpha` (N, N) is 1."""
    return under + alpha[..., None] * (np.asarray(over, np.float32) - under)


_DIGITS = ("755557", "262227", "717447", "717117", "455711", "747117", "747557", "711122", "757557", "757117")


def digits(canvas: Canvas, text: str, x: float, y: float, width: float) -> Array:
    """(N, N) ink coverage of dot-matrix digits, `width` mm wide, centred on (x, y) mm; a blank stands for a space."""
    rows = np.zeros((8, 4 * len(text) + 1), np.float32)
    for k, sign in enumerate(text):
        if sign != " ":
            bits = [[int(row) >> b & 1 for b in (2, 1, 0)] for row in _DIGITS[int(sign)]]
            rows[1:7, 4 * k + 1 : 4 * k + 4] = bits
    dot = width / rows.shape[1]  # mm
    column = (canvas.x[0] - x) / dot + rows.shape[1] / 2 - 0.5
    row = (canvas.y[:, 0] - y) / dot + rows.shape[0] / 2 - 0.5
    maps = np.meshgrid(column.astype(np.float32), row.astype(np.float32))
    soft = cv2.remap(rows, maps[0], maps[1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT, borderValue=0)
    return smoothstep((soft - 0.3) / 0.4)
