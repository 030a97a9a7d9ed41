"""The defects of the synthetic parts: eleven kinds in three groups, each a change of a drawn part.

    rgb   stain, discolouration, misprint           only the colour changes
    3d    dent, bump, bend, missing_material        only the height changes; the photograph is that of the good part
    both  crack, hole, contamination, scratch       colour and height change

A kind is drawn with a severity in 0..1 that sets its size and its strength. Every change ends at a definite border
(no infinite tails), and what counts as the defect is where it can be seen: a display colour that moves by more than
`COLOUR_STEP` levels, or a height that moves by more than `HEIGHT_STEP_MM`. Lengths are mm, in the part's frame.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

from ...samples import Array
from .canvas import Canvas, Colour, Rng, Surface, linear, mix, noise, smoothstep
from .categories import CategorySpec

DEFECTS: dict[str, str] = {
    "stain": "rgb",
    "discolouration": "rgb",
    "misprint": "rgb",
    "dent": "3d",
    "bump": "3d",
    "bend": "3d",
    "missing_material": "3d",
    "crack": "both",
    "hole": "both",
    "contamination": "both",
    "scratch": "both",
}
"""Defect kind -> the modalities that show it: ``"rgb"``, ``"3d"`` or ``"both"``."""

COLOUR_STEP = 7.0  # display levels of 255: about three times the camera's noise
HEIGHT_STEP_MM = 0.08  # about one and a half times the noise of a single depth

_CRUMB_MM2 = 0.5  # smaller pieces of a change are no part of the defect


@dataclass(frozen=True, eq=False)
class Job:
    """What a defect is drawn on and with. `fine_mm` is the thinnest line that the camera still resolves."""

    surface: Surface
    canvas: Canvas
    spec: CategorySpec
    rng: Rng
    severity: float
    fine_mm: float

    def between(self, low: float, high: float, spread: float = 0.12) -> float:
        """`low` at severity 0, `high` at 1, geometrically between, times a random factor of about 1 +- `spread`."""
        return low * (high / low) ** self.severity * float(np.exp(self.rng.uniform(-spread, spread)))

    def place(self, margin: float) -> tuple[float, float]:
        """A random point (x, y) of the part at least `margin` mm from its border, or as far as the part allows."""
        depth = cv2.distanceTransform((self.surface.inside > 0.5).astype(np.uint8), cv2.DIST_L2, 5) * self.canvas.cell
        return self.pick(depth >= min(margin, 0.75 * float(depth.max())))

    def place_on_border(self) -> tuple[float, float]:
        """A random point (x, y) of the part's outer border."""
        solid = (self.surface.inside > 0.5).astype(np.uint8)
        _, pieces = cv2.connectedComponents(1 - solid, connectivity=4)
        outside = (pieces == pieces[0, 0]).astype(np.uint8)
        border = (cv2.dilate(outside, np.ones((3, 3), np.uint8)) > 0) & (solid > 0)
        return self.pick(border, tries=1)

    def pick(self, where: Array, tries: int = 300) -> tuple[float, float]:
        """The first of `tries` random points that lies in `where` (N, N), or the point of it nearest to the last.

        The points are drawn in mm, so that the choice does not depend on the fineness of the canvas.
        """
        canvas = self.canvas
        guesses = self.rng.uniform(-0.5, 0.5, (tries, 2)) * canvas.extent
        cells = ((guesses / canvas.extent + 0.5) * canvas.size).astype(np.intp)
        good = np.flatnonzero(where[cells[:, 1], cells[:, 0]])
        if len(good):
            return float(guesses[good[0], 0]), float(guesses[good[0], 1])
        near = np.where(where, np.hypot(canvas.x - guesses[-1, 0], canvas.y - guesses[-1, 1]), np.inf)
        index = int(near.argmin())
        return float(canvas.x.flat[index]), float(canvas.y.flat[index])

    def blob(self, x: float, y: float, radius: float, ragged: float = 0.2) -> Array:
        """(N, N) float32, 1 at (x, y) falling to 0 at an irregular outline of mean radius `radius`, negative beyond."""
        dx, dy = self.canvas.x - np.float32(x), self.canvas.y - np.float32(y)
        angle = np.arctan2(dy, dx)
        outline = np.ones_like(angle)
        for order in range(1, 9):
            size, phase = self.rng.normal(0, 2 * ragged / order**1.5), self.rng.uniform(0, 2 * math.pi)
            outline += np.float32(size) * np.cos(order * angle + np.float32(phase))
        return 1 - np.hypot(dx, dy) / (radius * np.clip(outline, 0.45, 1.7))


def _paint(job: Job, colour: Array | Colour, alpha: Array) -> Surface:
    """The surface under paint: covers print and base alike."""
    surface = job.surface
    ink = None if surface.ink is None else surface.ink * (1 - alpha)
    return surface.with_(base=mix(surface.base, colour, alpha.astype(np.float32)), ink=ink)


def _lift(surface: Surface, change: Array) -> Surface:
    """The surface with its height changed, never below the table and only on the part."""
    on_part = (surface.inside > 0) * change
    return surface.with_(height=np.maximum(surface.height + on_part, 0).astype(np.float32))


def stain(job: Job) -> Surface:
    """Dried liquid: darker, tinted patch with a ragged border and a rim."""
    radius = job.between(4.5, 11)
    blob = job.blob(*job.place(0.6 * radius), radius, 0.22) + 0.12 * noise(job.rng, job.canvas, 3)
    strength = job.between(0.22, 0.7)
    rim = np.exp(-(((blob - 0.14) / 0.09) ** 2))
    alpha = np.clip(strength * (0.75 * smoothstep(blob / 0.22) + 0.45 * rim * (blob > 0)), 0, 0.9)
    tones = (linear(64, 44, 30), linear(38, 36, 34), linear(84, 62, 44), linear(44, 58, 78))
    tone = tones[job.rng.integers(len(tones))]
    if float(np.mean(job.surface.base[job.surface.inside > 0.5])) < 0.1:
        tone = linear(158, 148, 130)  # on a dark part a stain is chalky
    return _paint(job, tone, alpha)


def discolouration(job: Job) -> Surface:
    """Heat tint, mould, scorching, fading: a broad soft patch of the category's wrong colour."""
    radius = job.between(8, 18)
    blob = job.blob(*job.place(0.4 * radius), radius, 0.15) + 0.1 * noise(job.rng, job.canvas, 5)
    grain = np.clip(1 + 0.2 * noise(job.rng, job.canvas, 1.5), 0.4, 1.4)
    return _paint(job, job.spec.discolour, np.clip(job.between(0.32, 0.85) * smoothstep(blob / 0.75) * grain, 0, 0.95))


def misprint(job: Job) -> Surface:
    """The print is smeared, doubled or partly missing."""
    surface = job.surface
    assert surface.ink is not None  # only categories with a print list this kind
    x, y = job.pick(surface.ink > 0.5)
    zone = smoothstep(job.blob(x, y, job.between(5, 13), 0.1) / 0.3)
    way = job.rng.integers(3)
    angle, step = job.rng.uniform(0, 2 * math.pi), job.between(1.0, 2.6) / job.canvas.cell
    if way == 0:  # missing
        wrong = surface.ink * (1 - job.between(0.45, 0.95))
    else:
        count = 1 if way == 1 else 5  # doubled or smeared
        wrong = surface.ink
        for k in range(1, count + 1):
            dx, dy = step * k / count * math.cos(angle), step * k / count * math.sin(angle)
            move = np.array([[1, 0, dx], [0, 1, dy]])
            ghost = cv2.warpAffine(surface.ink.astype(np.float32), move, surface.ink.shape)
            wrong = np.maximum(wrong, ghost * (0.9 if way == 1 else 1 - 0.55 * k / count))
        wrong = wrong * (0.55 + 0.45 * job.severity) + surface.ink * (0.45 - 0.45 * job.severity)
    return surface.with_(ink=surface.ink + zone * (wrong - surface.ink))


def dent(job: Job) -> Surface:
    """A smooth impression."""
    radius = job.between(3.6, 8.5)
    x, y = job.place(0.9 * radius)
    profile = smoothstep(job.blob(x, y, radius, 0.12) * 1.15)
    depth = job.between(0.4, 2.4) * job.spec.relief
    return _lift(job.surface, -np.minimum(depth * profile, 0.75 * job.surface.height))


def bump(job: Job) -> Surface:
    """A smooth swelling under the skin."""
    radius = job.between(3.6, 8)
    profile = smoothstep(job.blob(*job.place(0.9 * radius), radius, 0.12) * 1.15)
    return _lift(job.surface, job.between(0.4, 2.4) * job.spec.relief * profile)


def bend(job: Job) -> Surface:
    """One side of the part is bent up from the table, more towards its end."""
    angle = job.rng.uniform(0, 2 * math.pi)
    along = job.canvas.x * np.float32(math.cos(angle)) + job.canvas.y * np.float32(math.sin(angle))
    solid = job.surface.inside > 0.5
    start, end = np.quantile(along[solid], job.rng.uniform(0.6, 0.78)), float(along[solid].max())
    share = np.clip((along - start) / (end - start), 0, 1.2)
    return _lift(job.surface, job.between(1.5, 5.5) * share**1.6 * (job.surface.height > 0.2))


def missing_material(job: Job) -> Surface:
    """A bite out of the border, part of the way down or down to the table; the colour shows nothing of it."""
    radius = job.between(4, 9)
    x, y = job.place_on_border()
    bite = smoothstep(job.blob(x, y, radius, 0.15) / 0.22 + 0.08 * noise(job.rng, job.canvas, 1.2))
    share = min(job.between(0.45, 1.0), 1.0)
    return _lift(job.surface, -bite * share * job.surface.height)


def _line(job: Job, x: float, y: float, angle: float, length: float, wander: float) -> tuple[Array, Array]:
    """Distance in mm (N, N) to a wandering line and the position 0..1 along it, large where far away."""
    count = max(4, round(length / 3))
    turns = angle + np.cumsum(job.rng.normal(0, wander, count)) - 0.5 * wander
    steps = length / count * np.stack([np.cos(turns), np.sin(turns)], axis=1)
    nodes = np.concatenate([np.zeros((1, 2)), np.cumsum(steps, axis=0)])
    nodes += np.array([x, y]) - nodes.mean(axis=0)
    distance = np.full(job.canvas.x.shape, 99.0, np.float32)
    position = np.zeros_like(distance)
    for k, (start, stop) in enumerate(itertools.pairwise(nodes)):
        middle, span = (start + stop) / 2, stop - start
        window = job.canvas.window(float(middle[0]), float(middle[1]), length / count + 3)
        dx, dy = job.canvas.x[window] - np.float32(start[0]), job.canvas.y[window] - np.float32(start[1])
        t = np.clip((dx * span[0] + dy * span[1]) / (span @ span), 0, 1).astype(np.float32)
        d = np.hypot(dx - t * np.float32(span[0]), dy - t * np.float32(span[1]))
        nearer = d < distance[window]
        position[window] = np.where(nearer, (k + t) / count, position[window])
        distance[window] = np.where(nearer, d, distance[window])
    return distance, position


def crack(job: Job) -> Surface:
    """A wandering dark furrow, widest in the middle, open to the part's border where it reaches it."""
    length = job.between(13, 36)
    x, y = job.place(3)
    distance, position = _line(job, x, y, job.rng.uniform(0, 2 * math.pi), length, 0.45)
    half = max(job.between(0.5, 1.2), 0.8 * job.fine_mm) * (0.45 + 0.55 * np.sin(position * math.pi))
    groove = np.clip(1 - (distance / (1.25 * half)) ** 2, 0, 1)
    dark = 0.25 * job.surface.base  # the colour of its own shadowed walls
    cracked = _paint(job, dark, job.between(0.45, 0.95, 0.05) * smoothstep(1.8 * groove))
    depth = job.between(0.5, 2.2) * job.spec.relief
    return _lift(cracked, -np.minimum(depth * groove, 0.9 * job.surface.height))


def hole(job: Job) -> Surface:
    """A hole that should not be there: through a flat part, blind in a thick one."""
    radius = job.between(2.0, 4.5)
    blob = job.blob(*job.place(1.15 * radius), radius, 0.1)
    wall = smoothstep(blob / 0.25)
    deep = np.minimum(job.surface.height, job.spec.hole_mm)
    pitted = _paint(job, 0.22 * job.surface.base, 0.9 * smoothstep(blob / 0.2))
    if job.spec.hole_mm >= float(job.surface.height.max()):
        pitted = pitted.with_(inside=(job.surface.inside * (1 - wall)).astype(np.float32))
    return _lift(pitted, np.where(job.surface.inside > 0, -wall * deep, 0))


def contamination(job: Job) -> Surface:
    """Something foreign lies on the part: a chip, a crumb or a fibre of another colour."""
    tones = (linear(46, 92, 160), linear(34, 32, 30), linear(196, 196, 200), linear(70, 120, 62), linear(128, 52, 40))
    home = job.surface.base[job.surface.inside > 0.5].mean(axis=0) ** (1 / 2.2)
    strange = [t for t in tones if np.abs(np.asarray(t) ** (1 / 2.2) - home).max() > 0.22]
    tone = (
        np.asarray(strange[job.rng.integers(len(strange))], np.float32)
        * (1 + 0.15 * noise(job.rng, job.canvas, 1.5))[..., None]
    )
    opacity = job.between(0.45, 1.0, 0.05)
    if job.rng.random() < 0.35:  # fibre
        length = job.between(8, 24)
        distance, _ = _line(job, *job.place(3), job.rng.uniform(0, 2 * math.pi), length, 0.6)
        shape = np.clip(1 - (distance / max(job.between(0.55, 0.9), job.fine_mm)) ** 2, 0, 1)
        rise = job.between(0.25, 0.9)
    else:
        radius = job.between(2.0, 4.8)
        shape = np.clip(2.2 * job.blob(*job.place(1.2 * radius), radius, 0.25), 0, 1)
        rise = job.between(0.5, 2.4)
    cover = np.clip(2.5 * shape, 0, 1)
    return _lift(_paint(job, tone, min(opacity, 1.0) * cover), rise * np.sqrt(shape))


def scratch(job: Job) -> Surface:
    """One to three nearly straight furrows with bright bottoms and a thrown-up edge."""
    angle = job.rng.uniform(0, 2 * math.pi)
    x, y = job.place(5)
    deepest = highest = paint = np.zeros_like(job.surface.height)
    for _ in range(int(job.rng.integers(1, 4))):
        away = job.rng.normal(0, 1.8, 2)
        length = job.between(10, 30, 0.3)
        distance, position = _line(job, x + away[0], y + away[1], angle + job.rng.normal(0, 0.08), length, 0.04)
        half = max(job.between(0.3, 0.55), 0.65 * job.fine_mm) * np.clip(4 * np.sin(position * math.pi), 0.3, 1)
        groove = np.clip(1 - (distance / half) ** 2, 0, 1)
        ridge = np.clip(1 - ((distance - 1.4 * half) / (0.5 * half)) ** 2, 0, 1)
        depth = job.between(0.18, 0.6)
        deepest, highest = np.minimum(deepest, -depth * groove), np.maximum(highest, 0.35 * depth * ridge)
        paint = np.maximum(paint, job.between(0.35, 0.9) * smoothstep(1.5 * groove))
    bright = np.clip(1.9 * job.surface.base + 0.05, 0, 0.95)
    return _lift(_paint(job, bright, paint), np.where(deepest < 0, deepest, highest))


MAKERS: dict[str, Callable[[Job], Surface]] = {
    "stain": stain,
    "discolouration": discolouration,
    "misprint": misprint,
    "dent": dent,
    "bump": bump,
    "bend": bend,
    "missing_material": missing_material,
    "crack": crack,
    "hole": hole,
    "contamination": contamination,
    "scratch": scratch,
}


def visible_change(good: Surface, bad: Surface, canvas: Canvas) -> Array:
    """(N, N) bool: where the colour or the height of the part differs by more than the two steps above.

    Gaps of one cell are closed and crumbs of less than half a square millimetre left out, as a person would draw it.
    """
    light = np.float32(0.8)
    before, after = (
        255 * cv2.pow(np.clip(light * s.albedo() * s.inside[..., None], 0, 1), 1 / 2.2) for s in (good, bad)
    )
    colour = np.abs(after - before).max(axis=-1) > COLOUR_STEP
    change = (colour | (np.abs(bad.height - good.height) > HEIGHT_STEP_MM)).astype(np.uint8)
    change = cv2.morphologyEx(change, cv2.MORPH_CLOSE, np.ones((3, 3), np.uint8))
    _, pieces, stats, _ = cv2.connectedComponentsWithStats(change, connectivity=8)
    large = stats[:, cv2.CC_STAT_AREA] * canvas.cell**2 >= _CRUMB_MM2
    large[0] = False  # what did not change
    return large[pieces] & (good.inside > 0.5)
