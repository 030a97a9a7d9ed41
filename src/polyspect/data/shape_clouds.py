"""Made-up solids as a depth camera sees them: clouds without end to pre-train point networks on.

One cloud = one visible side of one random thing, as points in no particular unit (about 2 across; x right, y down, z
away from the camera). None of it imitates the categories of `data.synthetic`, which benchmarks are run on.

    solids    one to six convex bodies (ellipsoids, elliptic cylinders, polytopes), joined, some cut away from others
    plateau   an outline whose border rises to a plateau or a dome, with bosses, pockets and holes
    sheet     a thin bent and waved surface with an outline and holes
    tubes     round rods along smooth curves

Then: roughness of one scale, bumps and dents, grooves; a tilt; perspective; the sensor's noise, slanted and single
points missing. Some clouds keep the table that the thing lies on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np

from ..errors import ConfigError
from ..samples import Array

Rng = np.random.Generator

GENERATOR = 1  # raised whenever the same seed would give other clouds
_LEAST = 1500  # points of a cloud; a thing that shows fewer is drawn again


class ShapeClouds:
    """`count` made-up clouds; number `index` depends on the seed and on nothing else.

    Args:
        count: How many, at least 1. Clouds are made when asked for, so a large number costs nothing.
        seed: 0 or larger.
        size: Pixels per side of the depth image, at least 64; a cloud has about half as many points as pixels.
    """

    def __init__(self, count: int, seed: int = 0, size: int = 112) -> None:
        if count < 1 or seed < 0 or size < 64:
            raise ConfigError(
                f"made-up clouds need a count of at least 1, a seed of at least 0 and at least 64 pixels, got {count}, "
                f"{seed} and {size}"
            )
        self.count, self.seed, self.size = count, seed, size

    def __len__(self) -> int:
        return self.count

    def cloud(self, index: int) -> Array:
        """Points (N, 3) float32, 1500 at least, in row order of the depth image."""
        if not 0 <= index < self.count:
            raise ConfigError(f"there is no cloud {index}: clouds are numbered 0 to {self.count - 1}")
        return shape_cloud(self.seed, index, self.size)

    def about(self) -> dict[str, Any]:
        """What the clouds are, for the header of a weights file."""
        return {"source": "shapes", "generator": GENERATOR, "count": self.count, "seed": self.seed, "size": self.size}


def shape_cloud(seed: int, index: int, size: int = 112) -> Array:
    """One cloud of `ShapeClouds`, (N, 3) float32."""
    attempt = 0
    while True:
        rng = np.random.default_rng([GENERATOR, seed, index, attempt])
        points = _draw(rng, size)
        if len(points) >= _LEAST * (size / 112) ** 2:
            return points
        attempt += 1


def _draw(rng: Rng, size: int) -> Array:
    kind = _KINDS[rng.choice(len(_KINDS), p=_SHARES)]
    axis = np.linspace(-1, 1, size)
    u, v = np.meshgrid(axis, axis)  # x right, y down
    height, mask = kind(rng, u, v)
    height = _detail(rng, u, v, height, mask)
    steep = _slope(height, 2 / (size - 1)) > np.tan(np.radians(rng.uniform(68, 82)))
    lowest = height[mask].min() if mask.any() else 0.0
    if rng.random() < 0.12:  # the table shows
        height = np.where(mask, height, lowest - rng.uniform(0, 0.1))
        mask = np.ones_like(mask)
    mask = mask & ~steep & (rng.random(mask.shape) >= rng.uniform(0, 0.05))
    if rng.random() < 0.3:  # blotches where nothing was measured
        mask &= _noise(rng, size, rng.uniform(0.05, 0.15)) < rng.uniform(1.6, 2.5)
    sensor = 10 ** rng.uniform(-3.5, -2.6)
    height = height + sensor * (0.8 * rng.standard_normal(mask.shape) + 0.6 * _noise(rng, size, 0.03))
    distance = rng.uniform(3, 12)
    depth = distance - height
    near = depth / distance  # perspective
    points = np.stack([u * near, v * near, depth], axis=-1)[mask]
    return (points @ _turn(rng, rng.uniform(0, 20)).T).astype(np.float32)


# -- the kinds of things: height towards the camera and where there is something ------------------------------------


def _solids(rng: Rng, u: Array, v: Array) -> tuple[Array, Array]:
    """The first hits of parallel rays with a union of convex bodies, less a few cutters."""
    pieces = rng.integers(1, 7)
    main = rng.uniform(0.5, 0.85)
    first, last = [], []
    for number in range(pieces):
        scale = main if number == 0 else main * rng.uniform(0.15, 0.6)
        place = np.zeros(3) if number == 0 else _direction(rng) * main * rng.uniform(0.3, 0.9)
        enter, leave = _convex(rng, u, v, place, scale)
        first.append(enter)
        last.append(leave)
    enter, leave = np.stack(first), np.stack(last)  # n H W, along +z from the camera
    hit = enter < leave
    for _ in range(rng.integers(0, 4)):  # cut away
        place = _direction(rng) * main * rng.uniform(0.2, 0.9)
        c0, c1 = _convex(rng, u, v, place, main * rng.uniform(0.1, 0.35))
        inside = (c0 < c1) & (c0 <= enter) & (enter < c1)
        enter = np.where(inside, c1, enter)
        hit &= enter < leave
    depth = np.where(hit, enter, np.inf).min(0)
    mask = np.isfinite(depth)
    return np.where(mask, -depth, 0), mask


def _convex(rng: Rng, u: Array, v: Array, place: Array, scale: float) -> tuple[Array, Array]:
    """Where the ray through each pixel enters and leaves a random convex body: enter >= leave where it misses."""
    R = _rotation(rng) if rng.random() < 0.6 else _turn(rng, 0)
    size = scale * rng.uniform(0.35, 1.0, 3)
    origin = np.stack([u - place[0], v - place[1], np.full_like(u, -place[2])], -1) @ R.T / size  # H W 3
    ray = R[:, 2] / size
    kind = rng.integers(3)
    if kind == 0:
        return _roots(float(ray @ ray), origin @ ray, (origin**2).sum(-1) - 1)
    if kind == 1:
        a, b = ray[:2], origin[..., :2]
        enter, leave = _roots(float(a @ a) + 1e-12, b @ a, (b**2).sum(-1) - 1)
        normals = np.array([[0.0, 0, 1], [0, 0, -1]])
    else:
        enter, leave = np.full_like(u, -np.inf), np.full_like(u, np.inf)
        box = np.concatenate([np.eye(3), -np.eye(3)])
        extra = rng.standard_normal((rng.integers(0, 7), 3))
        normals = np.concatenate([box, extra / np.linalg.norm(extra, axis=1, keepdims=True)])
    for normal in normals:
        reach = 1.0 if np.abs(normal).max() == 1 else rng.uniform(0.8, 1.2)
        speed, gap = normal @ ray, reach - origin @ normal
        if abs(speed) < 1e-9:
            leave = np.where(gap < 0, -np.inf, leave)
        elif speed > 0:
            leave = np.minimum(leave, gap / speed)
        else:
            enter = np.maximum(enter, gap / speed)
    return enter, leave


def _roots(a: float, half_b: Array, c: Array) -> tuple[Array, Array]:
    """Roots of a t^2 + 2 half_b t + c, the lower first; (inf, -inf) where there are none."""
    square = half_b**2 - a * c
    root = np.sqrt(np.maximum(square, 0))
    real = square > 0
    return np.where(real, (-half_b - root) / a, np.inf), np.where(real, (-half_b + root) / a, -np.inf)


def _plateau(rng: Rng, u: Array, v: Array) -> tuple[Array, Array]:
    mask = _outline(rng, u, v, rng.uniform(0.6, 0.9))
    rise = rng.uniform(0.1, 0.5)
    height = rise * _edge(rng, mask, rng.uniform(0.05, 0.9))
    for _ in range(rng.integers(0, 6)):  # bosses and pockets
        x, y = rng.uniform(-0.6, 0.6, 2)
        piece = _outline(rng, u - x, v - y, rng.uniform(0.08, 0.35)) & mask
        height = height + rng.choice([-0.6, 1.0]) * rng.uniform(0.03, 0.2) * _edge(rng, piece, rng.uniform(0.03, 0.2))
    for _ in range(rng.integers(0, 4)):
        x, y = rng.uniform(-0.6, 0.6, 2)
        mask &= ~_outline(rng, u - x, v - y, rng.uniform(0.05, 0.25))
    return height, mask


def _sheet(rng: Rng, u: Array, v: Array) -> tuple[Array, Array]:
    mask = _outline(rng, u, v, rng.uniform(0.65, 0.9))
    a, b, c = rng.normal(0, 0.25, 3)
    height = a * u**2 + b * v**2 + c * u * v
    for _ in range(rng.integers(0, 3)):
        angle, wave = rng.uniform(0, np.pi), rng.uniform(0.25, 1.5)
        phase = rng.uniform(0, 2 * np.pi)
        along = u * np.cos(angle) + v * np.sin(angle)
        height = height + wave * rng.uniform(0.01, 0.1) * np.sin(2 * np.pi * along / wave + phase)
    for _ in range(rng.integers(0, 5)):
        x, y = rng.uniform(-0.6, 0.6, 2)
        mask &= ~_outline(rng, u - x, v - y, rng.uniform(0.05, 0.25))
    return height, mask


def _tubes(rng: Rng, u: Array, v: Array) -> tuple[Array, Array]:
    height = np.full_like(u, -np.inf)
    for _ in range(rng.integers(1, 4)):
        t = np.linspace(0, 1, 60)
        knots = np.cumsum(rng.normal(0, 0.6, (4, 2)), 0)
        curve = np.stack([_bernstein(t, i) for i in range(4)], axis=1) @ knots  # 60 2
        curve = (curve - curve.mean(0)) / max(np.abs(curve - curve.mean(0)).max(), 1e-6) * rng.uniform(0.4, 0.8)
        radius = rng.uniform(0.08, 0.22)
        lift = radius + rng.uniform(0, 0.3) * np.sin(np.pi * t * rng.uniform(0, 2))
        distance = np.full_like(u, np.inf)
        level = np.zeros_like(u)
        for (x, y), z in zip(curve, lift):
            d = (u - x) ** 2 + (v - y) ** 2
            level = np.where(d < distance, z, level)
            distance = np.minimum(distance, d)
        inside = distance < radius**2
        height = np.where(inside, np.maximum(height, level + np.sqrt(np.maximum(radius**2 - distance, 0))), height)
    mask = np.isfinite(height)
    return np.where(mask, height, 0), mask


_KINDS: tuple[Callable[[Rng, Array, Array], tuple[Array, Array]], ...] = (_solids, _plateau, _sheet, _tubes)
_SHARES = (0.4, 0.3, 0.15, 0.15)


# -- pieces of them ----------------------------------------------------------------------------------------------------


def _detail(rng: Rng, u: Array, v: Array, height: Array, mask: Array) -> Array:
    """Roughness, bumps and dents, grooves: in the surface, not in the outline."""
    size = len(u)
    change = np.zeros_like(u)
    if rng.random() < 0.6:
        change += 10 ** rng.uniform(-3, -1.6) * _noise(rng, size, 10 ** rng.uniform(-1.4, -0.3))
    for _ in range(rng.integers(0, 8)):
        x, y = rng.uniform(-0.8, 0.8, 2)
        radius = 10 ** rng.uniform(-1.4, -0.5)
        reach = np.exp(-((((u - x) ** 2 + (v - y) ** 2) / radius**2) ** rng.choice([1, 2])))
        change += rng.choice([-1, 1]) * radius * rng.uniform(0.05, 0.5) * reach
    for _ in range(rng.integers(0, 3)):
        angle, offset, width = rng.uniform(0, np.pi), rng.uniform(-0.5, 0.5), rng.uniform(0.02, 0.08)
        across = u * np.cos(angle) + v * np.sin(angle) - offset + rng.uniform(0, 0.2) * (u**2 - v**2)
        change += rng.choice([-1, 1]) * width * rng.uniform(0.3, 1.2) * np.exp(-((across / width) ** 2))
    return np.where(mask, height + change, height)


def _outline(rng: Rng, u: Array, v: Array, radius: float) -> Array:
    """A random filled outline about the middle: superellipse, polygon or wavy disc."""
    turn = rng.uniform(0, 2 * np.pi)
    x, y = u * np.cos(turn) - v * np.sin(turn), u * np.sin(turn) + v * np.cos(turn)
    kind = rng.integers(3)
    if kind == 0:
        p = rng.choice([2.0, 2.5, 4.0, 12.0])
        return np.abs(x / radius) ** p + np.abs(y / (radius * rng.uniform(0.4, 1))) ** p < 1
    phi, r = np.arctan2(y, x), np.hypot(x, y)
    if kind == 1:
        sides = rng.integers(3, 9)
        wedge = np.mod(phi, 2 * np.pi / sides) - np.pi / sides
        return r * np.cos(wedge) < radius * np.cos(np.pi / sides)
    waves = sum(rng.normal(0, 0.12 / k) * np.cos(k * phi + rng.uniform(0, 2 * np.pi)) for k in range(2, 8))
    return r < radius * 0.85 * (1 + waves)


def _edge(rng: Rng, mask: Array, width: float) -> Array:
    """0 at the border of `mask`, rising to 1 over `width`: as a step, a chamfer or a round edge; 0 outside."""
    distance = cv2.distanceTransform(mask.astype(np.uint8), cv2.DIST_L2, 5) * (2 / (len(mask) - 1))
    t = np.clip(distance / width, 0, 1)
    shape = rng.integers(3)
    if shape == 0:
        return mask.astype(np.float64)
    return t if shape == 1 else np.sqrt(np.maximum(1 - (1 - t) ** 2, 0))


def _noise(rng: Rng, size: int, cell: float) -> Array:
    """Smooth noise of about unit deviation with details of `cell`, the image being 2 across."""
    cells = int(np.clip(2 / cell, 2, size))
    coarse = rng.standard_normal((cells + 3, cells + 3)).astype(np.float32)
    return 1.3 * cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC).astype(np.float64)


def _slope(height: Array, pixel: float) -> Array:
    down, right = np.gradient(height, pixel)
    return np.hypot(down, right)


def _bernstein(t: Array, i: int) -> Array:
    return (1, 3, 3, 1)[i] * t**i * (1 - t) ** (3 - i)


def _direction(rng: Rng) -> Array:
    vector = rng.standard_normal(3)
    return vector / np.linalg.norm(vector)


def _rotation(rng: Rng) -> Array:
    """A rotation drawn uniformly, (3, 3)."""
    q, r = np.linalg.qr(rng.standard_normal((3, 3)))
    q = q * np.sign(np.diag(r))
    return q if np.linalg.det(q) > 0 else -q


def _turn(rng: Rng, tilt_deg: float) -> Array:
    """A random turn about the line of sight, then a tilt of `tilt_deg` about a random axis across it."""
    phi, psi, tilt = rng.uniform(0, 2 * np.pi), rng.uniform(0, 2 * np.pi), np.radians(tilt_deg)
    c, s = np.cos(phi), np.sin(phi)
    about_z = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    k = np.array([np.cos(psi), np.sin(psi), 0])
    K = np.array([[0, -k[2], k[1]], [k[2], 0, -k[0]], [-k[1], k[0], 0]])
    return (np.eye(3) + np.sin(tilt) * K + (1 - np.cos(tilt)) * K @ K) @ about_z
