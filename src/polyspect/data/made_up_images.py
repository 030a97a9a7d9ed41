"""Made-up pictures: textures, things and light without end, to distil image networks on where there are no photographs.

One picture = a textured ground; things on it, each with a texture, an edge that catches the light and a shadow; lines;
then light, blur, noise and the marks of compression. None of it imitates the categories of `data.synthetic`, which
benchmarks are run on.

    textures   clouds of every roughness, brushed, striped, woven or dotted, cells, grain, rings, spots, plain
    things     superellipses, polygons, stars and wavy discs; flat, bevelled or domed; one to a few dozen
    colours    a palette of two to four per texture, some pictures in one hue or grey
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np

from ..errors import ConfigError
from ..samples import Array

Rng = np.random.Generator

GENERATOR = 1  # raised whenever the same seed would give other pictures


class MadeUpImages:
    """`count` made-up pictures; number `index` depends on the seed and on nothing else.

    Args:
        count: How many, at least 1. Pictures are made when asked for, so a large number costs nothing.
        seed: 0 or larger.
        size: Pixels per side, at least 32.
    """

    def __init__(self, count: int, seed: int = 0, size: int = 192) -> None:
        if count < 1 or seed < 0 or size < 32:
            raise ConfigError(
                f"made-up pictures need a count of at least 1, a seed of at least 0 and at least 32 pixels, got "
                f"{count}, {seed} and {size}"
            )
        self.count, self.seed, self.size = count, seed, size

    def __len__(self) -> int:
        return self.count

    def picture(self, index: int) -> Array:
        """RGB (size, size, 3) uint8."""
        if not 0 <= index < self.count:
            raise ConfigError(f"there is no picture {index}: pictures are numbered 0 to {self.count - 1}")
        return made_up_image(self.seed, index, self.size)

    def about(self) -> dict[str, Any]:
        """What the pictures are, for the header of a weights file."""
        return {"source": "made up", "generator": GENERATOR, "count": self.count, "seed": self.seed, "size": self.size}


def made_up_image(seed: int, index: int, size: int = 192) -> Array:
    """One picture of `MadeUpImages`, (size, size, 3) uint8."""
    rng = np.random.default_rng([GENERATOR, seed, index])
    picture = _textured(rng, size)
    kind = rng.random()
    if kind < 0.8:  # a few things, or many alike
        many = rng.random() < 0.3
        number = int(rng.integers(6, 36)) if many else int(rng.integers(1, 7))
        radius = size * (rng.uniform(0.03, 0.12) if many else rng.uniform(0.12, 0.5))
        textures = [_textured(rng, size) for _ in range(int(rng.integers(1, 3)) if many else min(number, 3))]
        for _ in range(number):
            _put(rng, picture, textures[rng.integers(len(textures))], radius * rng.uniform(0.5, 1.2))
    if rng.random() < 0.5:
        _lines(rng, picture)
    return _photographed(rng, picture)


# -- textures: a field of about 0..1 per pixel, then colours ---------------------------------------------------------


def _textured(rng: Rng, size: int) -> Array:
    """A texture over the whole picture, (size, size, 3) float32 in about 0..1."""
    field = _TEXTURES[rng.choice(len(_TEXTURES), p=_SHARES)](rng, size)
    if rng.random() < 0.5:  # two textures in one
        other = _TEXTURES[rng.choice(len(_TEXTURES), p=_SHARES)](rng, size)
        field = field + rng.uniform(0.05, 0.6) * (other - 0.5)
    colours = _palette(rng, int(rng.integers(2, 5)))
    contrast = rng.uniform(0.05, 1.0) ** 1.5
    places = np.linspace(0, 1, len(colours))
    levels = np.linspace(0, 1, 256)
    ramp = np.stack([np.interp(levels, places, colours[:, c]) for c in range(3)], axis=1)  # 256 3
    ramp = colours[0] + contrast * (ramp - colours[0])
    steps = (np.clip(field, 0, 1) * 255).astype(np.uint8)
    return ramp.astype(np.float32)[steps]


def _palette(rng: Rng, number: int) -> Array:
    """Colours (number, 3) in 0..1, around one hue or free of each other."""
    hue, spread = rng.uniform(0, 1), rng.choice([0.02, 0.1, 0.5])
    saturation = rng.choice([0.0, 0.15, 0.4, 0.8], p=[0.2, 0.3, 0.3, 0.2])
    hsv = np.empty((1, number, 3), np.float32)
    hsv[..., 0] = 360 * np.mod(hue + spread * rng.uniform(-1, 1, number), 1)
    hsv[..., 1] = np.clip(saturation * rng.uniform(0.4, 1.3, number), 0, 1)
    hsv[..., 2] = rng.uniform(0.05, 1.0, number)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0]


def _clouds(rng: Rng, size: int) -> Array:
    """Noise of several scales; the roughness is drawn."""
    decay, total = rng.uniform(0.35, 0.95), np.zeros((size, size), np.float32)
    cells, weight = rng.uniform(2, 8), 1.0
    while cells < size:
        total += weight * _noise(rng, size, cells, cells)
        weight *= decay
        cells *= 2
    return _unit(total)


def _brushed(rng: Rng, size: int) -> Array:
    """Noise that is much longer than wide, in any direction."""
    across, along = rng.uniform(0.1, 0.6) * size, rng.uniform(1, 8)
    return _unit(_turned(rng, _noise(rng, 2 * size, 2 * across, 2 * along), size))


def _striped(rng: Rng, size: int) -> Array:
    """Waves in one or two directions, with sharp or soft flanks, bent a little: stripes, grids, weaves, dots."""
    u, v = _grid(rng, size)
    period = 2 * np.pi / (size * 10 ** rng.uniform(-1.6, -0.5))
    bend = rng.uniform(0, 0.6) * _noise(rng, size, 3, 3) if rng.random() < 0.5 else 0.0
    wave = np.sin(u * period + rng.uniform(0, 6) + bend)
    kind = rng.integers(4)
    if kind > 0:
        other = np.sin(v * period * rng.choice([1.0, rng.uniform(0.3, 1.5)]) + rng.uniform(0, 6) + bend)
        wave = (wave * other, np.maximum(wave, other), wave + other)[kind - 1]
    return 0.5 + 0.5 * np.tanh(10 ** rng.uniform(-0.3, 1) * (wave - rng.uniform(-0.4, 0.4)))


def _cells(rng: Rng, size: int) -> Array:
    """Cells around random points: a value each, or the distance to the point, or the walls between."""
    points = np.full((size, size), 255, np.uint8)
    number = int(10 ** rng.uniform(1, 3))
    points[rng.integers(0, size, number), rng.integers(0, size, number)] = 0
    distance, labels = cv2.distanceTransformWithLabels(points, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_CCOMP)
    kind = rng.integers(3)
    if kind == 0:
        return rng.random(labels.max() + 1).astype(np.float32)[labels]
    if kind == 1:
        return _unit(distance)
    walls = cv2.morphologyEx(labels.astype(np.float32), cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) > 0
    return cv2.GaussianBlur(1 - walls.astype(np.float32), (0, 0), rng.uniform(0.4, 1.5))


def _grain(rng: Rng, size: int) -> Array:
    """Grains of one size, dense."""
    cells = size / rng.uniform(1, 6)
    return _unit(np.abs(_noise(rng, size, cells, cells)) ** rng.uniform(0.5, 1.5))


def _rings(rng: Rng, size: int) -> Array:
    """Rings around a far or near middle, warped: wood, turned faces."""
    u, v = _grid(rng, size)
    x, y = rng.uniform(-1.5, 1.5, 2) * size
    radius = np.hypot(u - x, (v - y) * rng.uniform(0.1, 1))
    radius = radius + rng.uniform(0, 0.1) * size * _noise(rng, size, 4, 4)
    return 0.5 + 0.5 * np.sin(radius * 2 * np.pi / (size * 10 ** rng.uniform(-1.6, -0.6)))


def _spots(rng: Rng, size: int) -> Array:
    """Discs of drawn sizes on a level ground."""
    field = np.full((size, size), 0.3, np.float32)
    largest = size * 10 ** rng.uniform(-1.9, -0.9)
    for _ in range(int(rng.integers(10, 120))):
        x, y = rng.integers(0, size * 8, 2)
        cv2.circle(field, (int(x), int(y)), int(8 * largest * rng.uniform(0.3, 1)), rng.uniform(0, 1), -1, _AA, 3)
    return cv2.GaussianBlur(field, (0, 0), rng.uniform(0.3, 2.5))


def _plain(rng: Rng, size: int) -> Array:
    """A slope, nearly even."""
    u, v = _grid(rng, size)
    return _unit(u + 0.3 * v * v / size)


_TEXTURES: tuple[Callable[[Rng, int], Array], ...]
_TEXTURES = (_clouds, _brushed, _striped, _cells, _grain, _rings, _spots, _plain)
_SHARES = (0.26, 0.12, 0.14, 0.12, 0.08, 0.08, 0.08, 0.12)
_AA = cv2.LINE_AA


# -- things and lines -------------------------------------------------------------------------------------------------


def _put(rng: Rng, picture: Array, texture: Array, radius: float) -> None:
    """Lay one thing of about `radius` pixels on the picture, in place."""
    size = len(picture)
    outline = _outline(rng) * radius + rng.uniform(0, size, 2)
    mask = np.zeros((size, size), np.uint8)
    cv2.fillPoly(mask, [np.round(outline * 16).astype(np.int32)], 255, _AA, 4)
    left, top, width, height = cv2.boundingRect(mask)
    if not width or not height:
        return
    reach = int(rng.uniform(0, 0.3) * radius) + 4  # of the shadow, and of what the edge needs around it
    y0, y1 = max(0, top - reach), min(size, top + height + reach)
    x0, x1 = max(0, left - reach), min(size, left + width + reach)
    cut = mask[y0:y1, x0:x1]
    ground = picture[y0:y1, x0:x1]
    alpha = cut.astype(np.float32)[..., None] / 255
    if rng.random() < 0.6:  # a shadow
        dx, dy = rng.uniform(-0.7, 0.7, 2) * reach
        moved = cv2.warpAffine(cut, np.array([[1, 0, dx], [0, 1, dy]]), cut.shape[::-1]).astype(np.float32)
        ground *= 1 - rng.uniform(0.1, 0.7) / 255 * cv2.GaussianBlur(moved, (0, 0), reach / 4)[..., None]
    face = texture[y0:y1, x0:x1] * rng.uniform(0.6, 1.3)
    if rng.random() < 0.7:  # an edge that catches the light
        inside = cv2.distanceTransform((cut > 127).astype(np.uint8), cv2.DIST_L2, 3)
        round_off = max(1.5, rng.uniform(0.05, 1.0) ** 2 * radius)
        rise = np.sqrt(np.maximum(0, 1 - (1 - np.minimum(inside / round_off, 1)) ** 2)) * round_off
        rise = cv2.GaussianBlur(rise, (0, 0), 1.0)
        angle = rng.uniform(0, 2 * np.pi)
        slope = cv2.Sobel(rise, -1, 1, 0) * np.cos(angle) + cv2.Sobel(rise, -1, 0, 1) * np.sin(angle)
        light = np.tanh(slope / 6)
        face = face * (1 + rng.uniform(0.2, 0.9) * light[..., None])
        if rng.random() < 0.3:  # it shines
            face = face + rng.uniform(0.2, 1.0) * np.clip(light, 0, 1)[..., None] ** 4
    ground += alpha * (face - ground)


def _outline(rng: Rng) -> Array:
    """A random closed outline about the middle, radius about 1, as points (n, 2)."""
    phi = np.linspace(0, 2 * np.pi, 72, endpoint=False)
    kind = rng.integers(4)
    if kind == 0:
        power = 2 / rng.choice([2.0, 2.0, 4.0, 12.0])
        c, s = np.cos(phi), np.sin(phi)
        x, y = np.sign(c) * np.abs(c) ** power, np.sign(s) * np.abs(s) ** power
    elif kind == 1:
        corners = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 8)))
        x, y = np.cos(corners), np.sin(corners)
    elif kind == 2:
        ends = 2 * int(rng.integers(3, 7))
        corners = np.arange(ends) * 2 * np.pi / ends
        radius = np.where(np.arange(ends) % 2, rng.uniform(0.4, 0.95), 1)
        x, y = radius * np.cos(corners), radius * np.sin(corners)
    else:
        waves = [rng.normal(0, 0.15 / k) * np.cos(k * phi + rng.uniform(0, 6)) for k in range(1, 7)]
        radius = 0.85 + np.sum(waves, axis=0)
        x, y = radius * np.cos(phi), radius * np.sin(phi)
    turn, narrow = rng.uniform(0, 2 * np.pi), rng.uniform(0.25, 1) if rng.random() < 0.6 else 1.0
    c, s = np.cos(turn), np.sin(turn)
    return np.stack([c * x - s * narrow * y, s * x + c * narrow * y], axis=1)


def _lines(rng: Rng, picture: Array) -> None:
    """Straight, broken and curved lines: scratches, wires, seams, fibres; in place."""
    size = len(picture)
    colour = tuple(float(c) for c in _palette(rng, 1)[0])
    wobble = rng.choice([0.0, 0.05, 0.3])
    for _ in range(int(10 ** rng.uniform(0, 1.4))):
        number = int(rng.integers(2, 12))
        start, way = rng.uniform(0, size, 2), rng.normal(0, 0.4 * size, 2)
        points = start + np.linspace(0, 1, number)[:, None] * way + rng.normal(0, wobble * size / 4, (number, 2))
        cv2.polylines(picture, [np.round(points * 16).astype(np.int32)], False, colour, int(rng.integers(1, 4)), _AA, 4)


# -- the camera ------------------------------------------------------------------------------------------------------


def _photographed(rng: Rng, picture: Array) -> Array:
    """Light, blur, noise and compression: (size, size, 3) uint8."""
    size = len(picture)
    if rng.random() < 0.6:
        light = 1 + rng.uniform(0.05, 0.35) * np.clip(_noise(rng, size, 1.5, 1.5), -2, 2)
        picture = picture * light[..., None]
    if rng.random() < 0.5:
        picture = cv2.GaussianBlur(picture, (0, 0), 10 ** rng.uniform(-0.5, 0.3))
    picture = np.clip(picture, 0, 1) ** 10 ** rng.uniform(-0.2, 0.2)
    if rng.random() < 0.7:
        noise = rng.standard_normal((size, size, 1 if rng.random() < 0.5 else 3), dtype=np.float32)
        picture = picture + 10 ** rng.uniform(-2.7, -1.2) * noise
    pixels = (np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8)
    if rng.random() < 0.3:
        quality = [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(40, 95))]
        pixels = np.asarray(cv2.imdecode(cv2.imencode(".jpg", pixels, quality)[1], cv2.IMREAD_COLOR))
    return np.ascontiguousarray(pixels)


# -- fields ----------------------------------------------------------------------------------------------------------


def _grid(rng: Rng, size: int) -> tuple[Array, Array]:
    """Pixel coordinates about the middle, turned by a random angle."""
    axis = np.arange(size, dtype=np.float32) - size / 2
    x, y = axis[None, :], axis[:, None]
    angle = rng.uniform(0, 2 * np.pi)
    c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return c * x - s * y, s * x + c * y


def _noise(rng: Rng, size: int, rows: float, columns: float) -> Array:
    """Smooth noise (size, size) of about unit deviation, with `rows` by `columns` details."""
    shape = tuple(int(np.clip(cells, 1, size)) + 3 for cells in (rows, columns))
    coarse = rng.standard_normal(shape, dtype=np.float32)
    return 1.3 * cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)


def _turned(rng: Rng, field: Array, size: int) -> Array:
    """The middle (size, size) of a field of twice that, turned by a random angle."""
    turn = cv2.getRotationMatrix2D((len(field) / 2, len(field) / 2), rng.uniform(0, 360), 1)
    turn[:, 2] -= (len(field) - size) / 2
    return cv2.warpAffine(field, turn, (size, size), borderMode=cv2.BORDER_REFLECT)


def _unit(field: Array) -> Array:
    """The field moved to 0..1."""
    low, high = float(field.min()), float(field.max())
    return (field - np.float32(low)) / np.float32(max(high - low, 1e-6))
