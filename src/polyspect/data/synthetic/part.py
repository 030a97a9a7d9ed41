"""One synthetic part: draw it, damage it, photograph and measure it.

The random numbers of shape, look, pose, light, camera, sensor and defect come from separate streams of the part's seed
and do not depend on each other. So the same seed with and without a defect differs inside the defect's mask only, and
only in the modalities that show that kind of defect; everything else is equal bit by bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import ConfigError, DataError, nearest_names
from ...samples import Array, Sample
from .canvas import Canvas, Streams, Surface, make_canvas
from .categories import CATEGORIES, CategorySpec
from .defects import DEFECTS, MAKERS, Job, visible_change
from .render import (
    Camera,
    Hits,
    Scene,
    cast,
    expose,
    make_scene,
    measure,
    photograph,
    points,
    sample,
    seen,
    throw_dice,
    unit,
)

GENERATOR = 1  # raised whenever the same seed gives other bytes
MIN_SIZE = 64  # pixels
_OVERSAMPLING = 0.8  # canvas cell over pixel
_NORMAL_NOISE = 0.02  # standard deviation per component
_TRIES = 10  # placements of a defect before giving up
_MIN_PIXELS = 6  # smallest visible defect


@dataclass(frozen=True, eq=False)
class Part:
    """A rendered part, with what no sensor tells.

    Attributes:
        sample: What the sensors deliver, with ground truth.
        part: (H, W) bool, True where the part is seen (of a damaged part: where the whole one would be).
        xyz: (H, W, 3) float32 metres, the true surface: no noise, nothing missing.
        normals: (H, W, 3) float32 its true unit normals.
    """

    sample: Sample
    part: Array
    xyz: Array
    normals: Array


def make_part(
    category: str,
    seed: int,
    defect: str | None = None,
    size: int = 256,
    camera: str = "pinhole",
    severity: float | None = None,
) -> Sample:
    """Render one synthetic part.

    Args:
        category: A name in `CATEGORIES`.
        seed: Decides everything random; 0 or larger.
        defect: A kind that the category can have; None (or ``"good"``) for a good part.
        size: Height and width in pixels, at least 64. The part and its defect are the same at every size.
        camera: ``"pinhole"`` or ``"orthographic"``.
        severity: 0 (barely visible) to 1 (gross); None draws it uniformly. A defect that cannot be seen where it fell
            is drawn again somewhere else and a little worse; `meta` holds the severity used.

    Returns:
        A Sample with ``rgb`` (H, W, 3) uint8, ``xyz`` (H, W, 3) and ``depth`` (H, W) float32 metres, ``normals``
        (H, W, 3) float32, ``valid``, ``mask`` and `meta` of plain values (camera, pose, defect).

    Raises:
        ConfigError: unknown category, defect or camera, or a number out of range.
    """
    return render_part(category, seed, defect, size, camera, severity).sample


def render_part(
    category: str,
    seed: int,
    defect: str | None = None,
    size: int = 256,
    camera: str = "pinhole",
    severity: float | None = None,
) -> Part:
    """As `make_part`, with the true surface beside the sample."""
    defect = None if defect == "good" else defect
    spec = _check(category, seed, defect, size, severity)
    streams = Streams(seed)
    view = Camera(camera, size, spec.field_mm / size)
    canvas = make_canvas(math.ceil(spec.extent_mm / (_OVERSAMPLING * view.pitch_mm)), spec.extent_mm)
    good = spec.build(canvas, streams)
    scene = make_scene(view, spec.turn_deg, spec.table, streams("pose"), streams("light"), streams("table"))
    dice = throw_dice(size, streams("sensor"))
    hits = cast(scene, canvas, good.height)
    levels = photograph(scene, canvas, good, hits)
    distance, valid = measure(scene, canvas, good, hits, dice)
    part = sample(good.inside, canvas, hits.u, hits.v) > 0.5
    true_distance, normals = hits.distance, hits.normals
    mask, described = np.zeros(part.shape, bool), None

    if defect is not None:
        group = DEFECTS[defect]
        bad, change, mask, severity = _damage(good, canvas, spec, streams, defect, severity, scene, hits)
        bad_hits = hits if group == "rgb" else cast(scene, canvas, bad.height)
        if group != "3d":
            levels = np.where(mask[..., None], photograph(scene, canvas, bad, bad_hits), levels)
        if group != "rgb":
            bad_distance, bad_valid = measure(scene, canvas, bad, bad_hits, dice)
            distance, valid = np.where(mask, bad_distance, distance), np.where(mask, bad_valid, valid)
            true_distance = np.where(mask, bad_hits.distance, true_distance)
            normals = np.where(mask[..., None], bad_hits.normals, normals)
        rise = bad.height - good.height
        described = {
            "kind": defect,
            "modality": group,
            "severity": round(severity, 4),
            **_size_of(change, rise, canvas, mask, points(scene, true_distance)),
        }

    rough = unit(normals + np.float32(_NORMAL_NOISE) * dice.normals)
    xyz = points(scene, distance) * valid[..., None]
    images = {
        "rgb": expose(levels, streams("camera")),
        "xyz": xyz,
        "depth": xyz[..., 2].copy(),
        "normals": (rough * valid[..., None]).astype(np.float32),
    }
    meta = {
        "synthetic": True,
        "generator": GENERATOR,
        "category": category,
        "seed": int(seed),
        "size": size,
        "camera": view.describe(),
        "pose": _rounded(scene.description),
        "table_plane": _table_plane(scene),
        "defect": described,
    }
    sample_ = Sample(
        id=f"{category}/{defect or 'good'}/{seed}",
        images=images,
        valid=valid,
        mask=mask,
        label=int(defect is not None),
        defect=defect or "good",
        meta=meta,
    )
    return Part(sample_.check(), part, points(scene, true_distance), normals.astype(np.float32))


def part_seed(seed: int, category: str, split: str, defect: str, index: int) -> int:
    """The seed of one part of a data set: 53 bits (exact in JSON) from its place in it, nothing else."""
    place = [int.from_bytes(name.encode(), "big") for name in (category, split, defect)]
    return int(np.random.SeedSequence([seed, *place, index]).generate_state(1, np.uint64)[0] >> np.uint64(11))


def _check(category: str, seed: int, defect: str | None, size: int, severity: float | None) -> CategorySpec:
    if category not in CATEGORIES:
        raise ConfigError(f"unknown synthetic category '{category}': {nearest_names(category, CATEGORIES)}")
    spec = CATEGORIES[category]
    if defect is not None and defect not in spec.defects:
        raise ConfigError(f"'{category}' has no defect '{defect}': {nearest_names(defect, spec.defects)}")
    if seed < 0:
        raise ConfigError(f"`seed` must be 0 or larger, got {seed}")
    if size < MIN_SIZE:
        raise ConfigError(f"`size` must be at least {MIN_SIZE} pixels, got {size}: smaller parts lose their defects")
    if severity is not None and not 0 <= severity <= 1:
        raise ConfigError(f"`severity` must be between 0 and 1, got {severity}")
    return spec


def _damage(
    good: Surface,
    canvas: Canvas,
    spec: CategorySpec,
    streams: Streams,
    kind: str,
    severity: float | None,
    scene: Scene,
    hits: Hits,
) -> tuple[Surface, Array, Array, float]:
    """The damaged surface, where it changed (N, N), where the camera sees that (H, W), and the severity used."""
    first = float(streams("severity").random()) if severity is None else severity
    fine_mm = canvas.cell / _OVERSAMPLING
    in_view = seen(scene, canvas, good.height)
    part = sample(good.inside, canvas, hits.u, hits.v) > 0.5
    for k in range(_TRIES):
        worse = first + (1 - first) * k / (_TRIES - 1)
        job = Job(good, canvas, spec, streams(f"defect {kind} {k}"), worse, fine_mm)
        bad = MAKERS[kind](job)
        change = visible_change(good, bad, canvas) & in_view
        mask = (sample(change.astype(np.float32), canvas, hits.u, hits.v) > 0.5) & part
        if int(mask.sum()) >= _MIN_PIXELS:
            return bad, change, mask, worse
    raise DataError(
        f"no '{kind}' of at least {_MIN_PIXELS} pixels fits this part (seed {streams.seed}, {part.shape[0]} pixels "
        f"wide): use another seed or a larger `size`"
    )


def _size_of(change: Array, rise: Array, canvas: Canvas, mask: Array, xyz: Array) -> dict[str, Any]:
    """Place and size of a defect: on the drawing in mm, and in the image."""
    rows, columns = np.nonzero(change)
    x, y = canvas.x[0, columns], canvas.y[rows, 0]
    area = len(rows) * canvas.cell**2
    rises = rise[rows, columns]
    at_y, at_x = np.nonzero(mask)
    return _rounded(
        {
            "area_mm2": area,
            "diameter_mm": 2 * math.sqrt(area / math.pi),
            "size_mm": [float(np.ptp(x)) + canvas.cell, float(np.ptp(y)) + canvas.cell],
            "height_mm": float(rises[np.abs(rises).argmax()]),
            "centre_mm": [float(x.mean()), float(y.mean())],
            "centre_px": [float(at_x.mean()), float(at_y.mean())],
            "centre_m": [float(c) for c in xyz[mask].mean(axis=0, dtype=np.float64)],
            "area_px": len(at_x),
        }
    )


def _table_plane(scene: Scene) -> list[float]:
    """a, b, c, d of the table, a x + b y + c z + d = 0 in metres, camera frame, normal towards the camera."""
    n = scene.frame[2]
    return [round(float(value), 9) for value in (*n, -(n @ scene.origin) / 1000)]


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    """Plain values with six decimals: enough for micrometres, and short."""

    def short(value: Any) -> Any:
        if isinstance(value, float):
            return round(value, 6)
        return [short(item) for item in value] if isinstance(value, list) else value

    return {key: short(value) for key, value in values.items()}
