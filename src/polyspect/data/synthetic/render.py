"""Camera, light and 3D sensor of the synthetic parts.

A part is a height field h(u, v) over a tilted table. With the part's frame (e_u, e_v in the table, n towards the
camera), origin O on the table and a viewing ray o + t d, the point of the ray at height h over the table is

    t = t0 + t1 h,  u = u0 + u1 h,  v = v0 + v1 h         (1)   t0 = n.(O - o) / n.d,  t1 = 1 / n.d

so the first hit is found by stepping h down from the top of the part until h <= h(u, v), in steps that move the ray by
at most one canvas cell, and one secant step in the bracket. The same walk towards the lamp and the projector gives
cast shadows and the points that a structured-light sensor cannot see.

Colour: Lambert + Blinn highlight + ambient light dimmed in hollows, linear until the display gamma of 2.2.
Canvas lengths are mm; the points that come out are metres in the camera frame (x right, y down, z forward).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import cv2
import numpy as np

from ...errors import ConfigError, nearest_names
from ...samples import Array
from .canvas import Canvas, Colour, Rng, Surface, smoothstep

DISTANCE_MM = 400.0  # camera to table
BASELINE_MM = 130.0  # projector beside the camera, on its left
DEPTH_NOISE_MM = 0.05  # standard deviation of one depth at `DISTANCE_MM`, seen head-on
PIXEL_NOISE = (0.9, 2.2)  # standard deviation of the read noise and, at full light, of the shot noise; 8-bit levels
CAMERAS = ("pinhole", "orthographic")


@dataclass(frozen=True)
class Camera:
    """Looks down at the table from `DISTANCE_MM`; the image is square, `pitch_mm` the width of a pixel on the table."""

    model: str
    size: int
    pitch_mm: float

    def __post_init__(self) -> None:
        if self.model not in CAMERAS:
            raise ConfigError(f"unknown `camera` '{self.model}': {nearest_names(self.model, CAMERAS)}")

    def describe(self) -> dict[str, Any]:
        """Intrinsics as plain values: pixels for fx, fy, cx, cy; metres for the pitch of an orthographic camera."""
        centre = (self.size - 1) / 2
        known: dict[str, Any] = {"model": self.model, "width": self.size, "height": self.size}
        known.update(cx=centre, cy=centre)
        if self.model == "pinhole":
            focal = DISTANCE_MM / self.pitch_mm
            return {**known, "fx": focal, "fy": focal}
        return {**known, "pitch_m": self.pitch_mm / 1000}

    @lru_cache(maxsize=16)  # noqa: B019 - a frozen value of three fields, not a growing object
    def rays(self) -> tuple[Array, Array, Array]:
        """Origins, directions (every z is 1) and unit directions (H, W, 3) of the viewing rays, mm; read-only."""
        axis = ((np.arange(self.size) - (self.size - 1) / 2) * self.pitch_mm).astype(np.float32)
        x, y = np.meshgrid(axis, axis)
        none, far = np.zeros_like(x), np.float32(DISTANCE_MM)
        if self.model == "pinhole":
            source, direction = np.stack([none, none, none], axis=-1), np.stack([x / far, y / far, none + 1], axis=-1)
        else:
            source, direction = np.stack([x, y, none], axis=-1), np.stack([none, none, none + 1], axis=-1)
        arrays = (source, direction, unit(direction))
        for array in arrays:
            array.setflags(write=False)
        return arrays


@dataclass(frozen=True, eq=False)
class Scene:
    """Where the part lies and where the light comes from: everything but the part. Vectors in the camera frame, mm."""

    camera: Camera
    origin: Array  # (3,) O, the part's origin on the table
    frame: Array  # (3, 3) rows e_u, e_v, n
    lamp: Array  # (3,) unit vector towards the lamp
    brightness: Array  # (3,) exposure and white balance
    ambient: float
    highlight: float
    table: Array  # (H, W, 3) linear albedo of the table
    description: dict[str, Any]


def make_scene(camera: Camera, turn_deg: float, table: Colour, pose: Rng, light: Rng, look: Rng) -> Scene:
    """Draw pose, light and table of one capture."""
    turn = math.radians(pose.uniform(-turn_deg, turn_deg))
    tilt_x, tilt_y = np.radians(pose.normal(0, 1.3, 2).clip(-3, 3))
    n = np.array([tilt_x, tilt_y, -1.0])
    n /= np.linalg.norm(n)
    right = np.array([math.cos(turn), math.sin(turn), 0.0])
    e_u = right - n * (n @ right)
    e_u /= np.linalg.norm(e_u)
    e_v = np.cross(e_u, n)  # so that, seen by the camera, v is a right angle clockwise of u
    shift = pose.uniform(-0.025, 0.025, 2) * camera.size * camera.pitch_mm
    depth = DISTANCE_MM + pose.normal(0, 1.0)
    origin = np.array([*shift, depth - (n[0] * shift[0] + n[1] * shift[1]) / n[2]])
    azimuth, height = math.radians(light.normal(-125, 22)), math.radians(light.uniform(48, 68))
    lamp = np.array([math.cos(height) * math.cos(azimuth), math.cos(height) * math.sin(azimuth), -math.sin(height)])
    brightness = np.exp(0.06 * light.standard_normal() + 0.018 * light.standard_normal(3))
    description = {
        "turn_deg": math.degrees(turn),
        "tilt_deg": [math.degrees(tilt_x), math.degrees(tilt_y)],
        "shift_mm": shift.tolist(),
        "lamp_azimuth_deg": math.degrees(azimuth),
        "lamp_height_deg": math.degrees(height),
    }
    return Scene(
        camera,
        origin,
        np.stack([e_u, e_v, n]),
        lamp,
        brightness.astype(np.float32),
        light.uniform(0.32, 0.48),
        light.uniform(0.7, 1.3),
        _table(camera, table, look),
        description,
    )


def _table(camera: Camera, colour: Colour, rng: Rng) -> Array:
    """Albedo of the bare table: cloudy and speckled."""
    size = camera.size
    clouds = cv2.resize(rng.standard_normal((9, 9), dtype=np.float32), (size, size), interpolation=cv2.INTER_CUBIC)
    grain = cv2.resize(rng.standard_normal((160, 160), dtype=np.float32), (size, size), interpolation=cv2.INTER_LINEAR)
    tone = (np.asarray(colour) * math.exp(0.05 * rng.standard_normal())).astype(np.float32)
    return tone * (1 + 0.04 * clouds + 0.05 * grain)[..., None]


@dataclass(frozen=True, eq=False)
class Hits:
    """What the viewing rays meet: (H, W) arrays; (u, v) and `height` in the part's frame, mm."""

    u: Array
    v: Array
    height: Array
    distance: Array  # t of Eq. 1
    normals: Array  # (H, W, 3) unit vectors towards the camera, camera frame
    facing: Array  # cosine between normal and viewing ray


def sample(field: Array, canvas: Canvas, u: Array, v: Array) -> Array:
    """`field` (N, N) or (N, N, C) at the points (u, v) mm of the canvas, linearly; 0 beyond its border."""
    scale, half = np.float32(1 / canvas.cell), np.float32(canvas.size / 2 - 0.5)
    return cv2.remap(
        field, u * scale + half, v * scale + half, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT, borderValue=0
    )


def cast(scene: Scene, canvas: Canvas, height: Array) -> Hits:
    """Meet the viewing rays with the height field (N, N) mm."""
    source, direction, looking = scene.camera.rays()
    e_u, e_v, n = scene.frame.astype(np.float32)
    to_part = (scene.origin - source).astype(np.float32)
    t1 = 1 / (direction @ n)
    t0 = (to_part @ n) * t1
    along_u, along_v = direction @ e_u, direction @ e_v
    u0, v0 = t0 * along_u - to_part @ e_u, t0 * along_v - to_part @ e_v
    u1, v1 = t1 * along_u, t1 * along_v

    top = float(height.max())
    steps = math.ceil(top * max(float(np.abs(u1).max()), float(np.abs(v1).max())) / canvas.cell) + 1
    hit, open_ = np.zeros_like(u0), np.ones(u0.shape, bool)
    above = gap = sample(height, canvas, u0 + u1 * top, v0 + v1 * top) - top  # <= 0: the ray is over the surface
    for k in range(1, steps + 1):
        level = top * (1 - k / steps)
        gap = sample(height, canvas, u0 + u1 * level, v0 + v1 * level) - level
        here = open_ & (gap >= 0)
        share = above / np.minimum(above - gap, -1e-6)
        hit = np.where(here, level + (1 - share) * (top / steps), hit)
        open_ &= ~here
        above = gap
    u, v, distance = u0 + u1 * hit, v0 + v1 * hit, t0 + t1 * hit
    slope = sample(_slopes(height, canvas), canvas, u, v)
    normals = unit(n - slope[..., :1] * e_u - slope[..., 1:] * e_v)
    facing = -_dot(normals, looking)
    return Hits(u, v, hit, distance, normals, np.clip(facing, 0, 1))


def _dot(a: Array, b: Array) -> Array:
    return np.einsum("...c,...c->...", a, b)


def unit(vectors: Array) -> Array:
    """Vectors (..., 3) scaled to length 1."""
    return vectors / np.sqrt(_dot(vectors, vectors))[..., None]


def _slopes(height: Array, canvas: Canvas) -> Array:
    """(N, N, 2) dh/du and dh/dv, by central differences."""
    padded = np.pad(height, 1, mode="edge")
    scale = np.float32(0.5 / canvas.cell)
    return np.stack(
        [(padded[1:-1, 2:] - padded[1:-1, :-2]) * scale, (padded[2:, 1:-1] - padded[:-2, 1:-1]) * scale], axis=-1
    )


def points(scene: Scene, distance: Array) -> Array:
    """(H, W, 3) float32 metres, camera frame: where the viewing rays are at `distance` (t of Eq. 1, mm)."""
    source, direction, _ = scene.camera.rays()
    return ((source + distance[..., None] * direction) / 1000).astype(np.float32)


def _blocked(canvas: Canvas, height: Array, foot: tuple[Array, Array, Array], du: Array, dv: Array) -> Array:
    """Millimetres by which the part rises over the straight line from a point to a source.

    Args:
        canvas, height: The height field, mm.
        foot: u, v and height of the points.
        du, dv: How far the line moves aside per mm that it rises.
    """
    u, v, start = foot
    top = float(height.max())
    reach = max(float(np.abs(du).max()), float(np.abs(dv).max()))
    steps = min(math.ceil(top * reach / canvas.cell) + 1, 14)
    excess = np.full(u.shape, -99.0, np.float32)
    for k in range(1, steps + 1):
        rise = top * (k - 0.5) / steps
        np.maximum(excess, sample(height, canvas, u + du * rise, v + dv * rise) - start - rise, out=excess)
    return excess


def seen(scene: Scene, canvas: Canvas, height: Array) -> Array:
    """(N, N) bool, True at the cells of the canvas that the part does not hide from the camera."""
    e_u, e_v, n = scene.frame
    if scene.camera.model == "pinhole":
        u, v, up = (np.float32(-scene.origin @ axis) for axis in (e_u, e_v, n))
        climb = up - height
        du, dv = (u - canvas.x) / climb, (v - canvas.y) / climb
    else:
        du, dv = (np.full_like(height, axis[2] / n[2]) for axis in (e_u, e_v))
    return _blocked(canvas, height, (canvas.x, canvas.y, height), du, dv) < 0.15


def photograph(scene: Scene, canvas: Canvas, surface: Surface, hits: Hits) -> Array:
    """(H, W, 3) float32 display levels 0..255 of the part on its table, before camera noise."""
    looking = scene.camera.rays()[2]
    layers = sample(surface.albedo().astype(np.float32), canvas, hits.u, hits.v)
    hollow = np.maximum(cv2.GaussianBlur(surface.height, (0, 0), 3.2 / canvas.cell) - surface.height, 0)
    rest = np.stack([surface.gloss, surface.inside, hollow], axis=-1).astype(np.float32)
    gloss, inside, hollow = np.moveaxis(sample(rest, canvas, hits.u, hits.v), -1, 0)
    albedo = scene.table + inside[..., None] * (layers - scene.table)
    gloss = inside * gloss + (1 - inside) * 0.05

    lu, lv, ln = scene.frame @ scene.lamp
    aslant = [np.full((1, 1), along / ln, np.float32) for along in (lu, lv)]
    shadow = _blocked(canvas, surface.height, (hits.u, hits.v, hits.height), aslant[0], aslant[1])
    lit = 1 - cv2.GaussianBlur(smoothstep(shadow / 1.2), (0, 0), 0.006 * scene.camera.size)
    lamp = scene.lamp.astype(np.float32)
    lambert = np.maximum(hits.normals @ lamp, 0) * lit
    cosine = np.maximum(_dot(hits.normals, unit(lamp - looking)), 0)
    highlight = cv2.pow(cosine, surface.shine) * (0.9 * lit + 0.1)
    highlight = highlight + 0.35 * cv2.pow(cosine, surface.shine / 6) * (0.6 * lit + 0.4)
    ambient = np.float32(scene.ambient) * (0.62 - 0.38 * hits.normals[..., 2]) / (1 + 0.30 * hollow)
    light = (0.78 * lambert + ambient)[..., None] * scene.brightness
    image = albedo * light + (np.float32(0.42 * scene.highlight) * gloss * highlight)[..., None] * scene.brightness
    image = cv2.GaussianBlur(image.astype(np.float32), (0, 0), 0.55)
    return _display(image)


def _display(image: Array) -> Array:
    """Linear light to display levels 0..255, with a soft shoulder above 0.8."""
    image = np.where(image > 0.8, 1 - 0.2 * np.exp((0.8 - image) / 0.2), image)
    return 255 * cv2.pow(np.clip(image, 0, 1), 1 / 2.2)


def expose(levels: Array, rng: Rng) -> Array:
    """uint8 image: `levels` (H, W, 3) with read and shot noise; a level's noise depends on nothing but its pixel."""
    read, shot = PIXEL_NOISE
    sigma = np.sqrt(read**2 + shot**2 * levels / 255)
    noisy = levels + sigma * rng.standard_normal(levels.shape, dtype=np.float32)
    return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)


@dataclass(frozen=True, eq=False)
class Dice:
    """The random numbers of one 3D exposure, drawn before anything is known of the part. All (H, W)."""

    depth: Array  # standard normal, partly shared between neighbours as a window-matching sensor's is
    normals: Array  # (H, W, 3) standard normal
    keep: Array  # uniform in 0..1
    blotch: Array  # smooth, standard normal


def throw_dice(size: int, rng: Rng) -> Dice:
    """Draw the sensor's random numbers for an image of `size` pixels."""
    white = rng.standard_normal((2, size, size), dtype=np.float32)
    shared = cv2.GaussianBlur(white[1], (0, 0), 1.2) * np.float32(2 * math.sqrt(math.pi) * 1.2)
    lattice = rng.standard_normal((size // 4 + 2, size // 4 + 2), dtype=np.float32)
    blotch = cv2.resize(lattice, (size, size), interpolation=cv2.INTER_CUBIC)
    normals = rng.standard_normal((size, size, 3), dtype=np.float32)
    return Dice(0.8 * white[0] + 0.6 * shared, normals, rng.random((size, size), dtype=np.float32), blotch)


def measure(scene: Scene, canvas: Canvas, surface: Surface, hits: Hits, dice: Dice) -> tuple[Array, Array]:
    """What the structured-light sensor reports: t of Eq. 1 with noise (H, W) mm, and where it saw a point (H, W) bool.

    The noise grows with the square of the distance and with the slant; lost are points that the projector does not
    reach, slanted surfaces, mirror-like highlights towards the projector, small blotches and single pixels.
    """
    slant = 1 / np.maximum(hits.facing, 0.2) - 1
    sigma = DEPTH_NOISE_MM * (hits.distance / DISTANCE_MM) ** 2 * (1 + 1.2 * slant)
    e_u, e_v, n = scene.frame
    projector = np.array([-BASELINE_MM, 0.0, 0.0]) - scene.origin
    pu, pv, pn = (np.float32(projector @ axis) for axis in (e_u, e_v, n))
    climb = pn - hits.height
    foot = (hits.u, hits.v, hits.height)
    excess = _blocked(canvas, surface.height, foot, (pu - hits.u) / climb, (pv - hits.v) / climb)
    to_light = np.stack([pu - hits.u, pv - hits.v, climb], axis=-1) @ scene.frame.astype(np.float32)
    mirror = _dot(hits.normals, unit(unit(to_light) - scene.camera.rays()[2]))
    gloss = sample((surface.gloss * surface.inside).astype(np.float32), canvas, hits.u, hits.v)
    lost = 0.004 + np.clip((0.34 - hits.facing) / 0.3, 0, 1)
    lost = np.maximum(lost, 0.7 * smoothstep(gloss * cv2.pow(np.maximum(mirror, 0), 300) * 2.2 - 0.4))
    valid = (excess < 0.12) & (dice.keep > lost) & (dice.blotch < 2.35 - 0.8 * (1 - hits.facing))
    return hits.distance + sigma * dice.depth, valid
