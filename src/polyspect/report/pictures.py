"""Small pictures of parts, all on one fixed colour scale, as data URIs that need no other file.

A map's colours mean the same on every part: the scale of a map (the fused one, and each branch for itself) is set once
per results folder from the good parts (`map_scale`) and never from the part in the picture.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..evaluation.results import BRANCH, PartRow, Results, read_part
from ..samples import MODALITIES, Array

RAMP = ("#fbf6e6", "#fde2a0", "#fdb454", "#f4762f", "#d32f2a", "#96102f", "#5c0a30")
"""From normal to anomalous: pale to dark, each step darker than the last, so it survives greyscale printing."""
SIDE = 192  # longer side of a picture, pixels
_HATCH = ((198, 201, 206), (160, 164, 171))  # unmeasured 3D
_TRUTH, _HALO = (0, 194, 255), (4, 38, 56)  # the outline of a defect and its dark edge
_GEOMETRIC_WORDS = {"3d", "geometry", "geometric", "points", "point", "pointcloud", "cloud", "fpfh", "sdf", "shape"}
_PER_PART = 4096  # pixels of each good part that the scale is estimated from


@dataclass(frozen=True)
class Scale:
    """The fixed colour scale of one map.

    Attributes:
        low: Value of the palest colour and everything below it: the median pixel of the good parts.
        typical: 99.9 % of the good parts' pixels lie below it.
        high: Value of the darkest colour and everything above it.
        from_good: False if no part is known to be good, and all parts stand in for them.
    """

    low: float
    typical: float
    high: float
    from_good: bool = True

    def unit(self, values: Array) -> Array:
        """`values` on the scale, as float32 in 0..1."""
        return np.clip((values.astype(np.float32) - self.low) / (self.high - self.low), 0.0, 1.0)


@dataclass(frozen=True)
class Picture:
    """One cell of a part's row: a picture, or a word that stands where there is none."""

    title: str
    note: str
    uri: str | None = None


def map_scale(normal: Array, peaks: Array, from_good: bool = True) -> Scale:
    """The scale of one map from pixels of the good parts and the highest value of each anomalous part.

    Pale is the median of `normal`; dark is the median of `peaks`, but at least a quarter of the good parts' own spread
    (median to 99.9 %) above that spread, and with no anomalous part twice the spread above the median.
    """
    low, typical = (float(value) for value in np.quantile(normal, [0.5, 0.999]))
    spread = typical - low
    high = float(np.median(peaks)) if peaks.size else low + 2 * spread
    high = max(high, low + 1.25 * spread)
    return Scale(low, typical, high if high > low else low + max(abs(low), 1.0) * 1e-3, from_good)


def map_scales(folder: Path, results: Results, names: Iterable[str]) -> dict[str, Scale]:
    """The scale of each map in `names` (``map``, ``branch.<name>``), from one pass over all parts of the folder."""
    wanted = tuple(names)
    known_good = any(part.label == 0 for part in results.parts)
    normal: dict[str, list[Array]] = {name: [] for name in wanted}
    peaks: dict[str, list[float]] = {name: [] for name in wanted}
    for part in results.parts:
        arrays = read_part(folder, part.index, (*wanted, "foreground"))
        on_part = arrays.get("foreground")
        for name in wanted:
            if name not in arrays:
                continue
            values = arrays[name][on_part] if on_part is not None and on_part.any() else arrays[name].ravel()
            if part.label == 1:
                peaks[name].append(float(values.max()))
            if part.label == 0 or not known_good:
                normal[name].append(values[:: -(-values.size // _PER_PART)].astype(np.float32))
    return {
        name: map_scale(np.concatenate(normal[name]), np.array(peaks[name]), known_good)
        for name in wanted
        if normal[name]
    }


def depth_span(parts: Iterable[Mapping[str, Array]]) -> float:
    """One range of depths for the grey pictures of all parts, metres: nine in ten parts have a smaller one."""
    spans = []
    for arrays in parts:
        values = _measured(arrays)
        if values.size:
            low, high = np.quantile(values, [0.01, 0.99])
            spans.append(float(high - low))
    return max(float(np.quantile(spans, 0.9)), 1e-6) if spans else 0.0


def part_pictures(
    part: PartRow, arrays: Mapping[str, Array], scales: Mapping[str, Scale], span: float, columns: Sequence[str]
) -> list[Picture]:
    """The row of pictures of one part, one for each of `columns`.

    Args:
        scales: From `map_scales`.
        span: From `depth_span`, metres.
        columns: Any of ``rgb``, ``depth``, ``branch.<name>``, ``map`` and ``mask``, in the order wanted.
    """
    size = _thumbnail_size(arrays["map"].shape)
    base = _resize(arrays["rgb"], size) if "rgb" in arrays else np.full((*size, 3), 235, np.uint8)
    made: list[Picture] = []
    for name in columns:
        if name == "mask":
            made.append(_truth_picture(part, arrays, base))
        elif name not in arrays and not (name == "depth" and {"height", "xyz"} & set(arrays)):
            made.append(Picture(_title(name), "not there"))
        elif name == "rgb":
            made.append(Picture("RGB", "", data_uri(base)))
        elif name == "depth":
            title, note = ("Height", "light is high") if "height" in arrays else ("Depth", "light is near")
            made.append(Picture(title, note, data_uri(_depth_picture(arrays, span, size))))
        else:
            heat = scales[name].unit(_resize(arrays[name].astype(np.float32), size))
            score = part.score if name == "map" else part.branch_scores.get(name.removeprefix(BRANCH))
            picture = overlay(base, heat) if name == "map" else colour(heat)
            if is_geometric(name.removeprefix(BRANCH)) and "valid" in arrays:
                picture = _hatched(picture, _resize(arrays["valid"].astype(np.float32), size) < 0.5)
            made.append(Picture(_title(name), "" if score is None else f"score {score:.4g}", data_uri(picture)))
    return made


def columns_of(parts: Iterable[Mapping[str, Array]]) -> list[str]:
    """The columns that any of the parts can fill: views, branches by name, the fused map, the truth."""
    there = {name for arrays in parts for name in arrays}
    there |= {"depth"} if there & {"height", "xyz"} else set()
    branches = sorted(name for name in there if name.startswith(BRANCH))
    return [name for name in ("rgb", "depth", *branches, "map", "mask") if name in there]


def is_geometric(branch: str) -> bool:
    """Whether a branch, by its name, sees only what the 3D sensor measured."""
    words = set(branch.lower().replace("-", "_").replace(".", "_").replace("/", "_").split("_"))
    known = {name for name, modality in MODALITIES.items() if modality.geometric}
    return bool(words & (known | _GEOMETRIC_WORDS)) and "rgb" not in words


def colour(heat: Array) -> Array:
    """Heat (h, w) in 0..1 as uint8 (h, w, 3) colours of the `RAMP`."""
    return _ramp_table()[np.rint(heat * 255).astype(np.intp)]


def overlay(rgb: Array, heat: Array) -> Array:
    """Heat (h, w) in 0..1 over a pale grey version of `rgb` (h, w, 3) uint8; where it is low the part shows through."""
    grey = rgb.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    base = (130 + grey * (125 / 255))[..., None]
    alpha = np.clip(heat / 0.35, 0.0, 1.0)[..., None] * 0.9
    return np.rint(base * (1 - alpha) + colour(heat) * alpha).astype(np.uint8)


def outlined(rgb: Array, mask: Array) -> Array:
    """`rgb` (h, w, 3) with the edge of `mask` (h, w): a bright line inside a dark one, both outside the defect."""
    near = _grown(mask)
    line = _grown(near)
    picture = rgb.copy()
    picture[_grown(line) & ~mask] = _HALO
    picture[line & ~mask] = _TRUTH
    return picture


def data_uri(rgb: Array) -> str:
    """A picture (h, w, 3) uint8 as a JPEG inside a URI; the same bytes for the same pixels."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, format="JPEG", quality=84, subsampling=0, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _title(name: str) -> str:
    return {"rgb": "RGB", "depth": "Depth", "map": "All together", "mask": "Truth"}.get(name, name.removeprefix(BRANCH))


def _truth_picture(part: PartRow, arrays: Mapping[str, Array], base: Array) -> Picture:
    mask = arrays.get("mask")
    if mask is None:
        return Picture("Truth", "not known" if part.label is None else "good part" if part.label == 0 else "not marked")
    if not mask.any():
        return Picture("Truth", "good part" if part.label == 0 else "nothing marked")
    share = _resize(mask.astype(np.float32), base.shape[:2])
    return Picture("Truth", f"{100 * mask.mean():.2g} % of pixels", data_uri(outlined(base, share > 0.25)))


def _depth_picture(arrays: Mapping[str, Array], span: float, size: tuple[int, int]) -> Array:
    depth, valid = _depth(arrays)
    measured = _measured(arrays)
    centre = float(np.median(measured)) if measured.size else 0.0
    weight = _resize(valid.astype(np.float32), size)
    mean = _resize(np.where(valid, depth, 0.0).astype(np.float32), size) / np.maximum(weight, 1e-6)
    light = 235 - 190 * np.clip((mean - centre) / max(span, 1e-9) + 0.5, 0.0, 1.0)
    grey = np.repeat(np.rint(light)[..., None], 3, axis=2).astype(np.uint8)
    return _hatched(grey, weight < 0.5)


def _depth(arrays: Mapping[str, Array]) -> tuple[Array, Array]:
    """Depth in metres and where it was measured, both on one grid; from the points if no depth was stored.

    A height above the support plane counts as negative depth: what is high is near.
    """
    if "height" in arrays:
        height = arrays["height"]
        return -height, arrays.get("valid", np.ones(height.shape, bool)).astype(bool)
    if "depth" in arrays:
        depth = arrays["depth"]
        return depth, arrays.get("valid", np.ones(depth.shape, bool)) & (depth > 0)
    depth = arrays["xyz"][..., 2]
    return depth, depth > 0


def _measured(arrays: Mapping[str, Array]) -> Array:
    """The measured depths on the part (N,), metres; of the whole picture if the part has none."""
    if not {"depth", "height", "xyz"} & set(arrays):
        return np.empty(0, np.float32)
    depth, valid = _depth(arrays)
    on_part = arrays.get("foreground")
    if on_part is not None and on_part.shape == valid.shape and (on_part & valid).any():
        valid = on_part & valid
    return depth[valid]


def _hatched(picture: Array, where: Array) -> Array:
    """`picture` with diagonal grey stripes where the sensor saw nothing."""
    rows, columns = np.indices(where.shape)
    stripe = ((rows + columns) // 3) % 2
    return np.where(where[..., None], np.array(_HATCH, np.uint8)[stripe], picture)


def _grown(mask: Array) -> Array:
    """`mask` and its four neighbours."""
    grown = mask.copy()
    grown[1:] |= mask[:-1]
    grown[:-1] |= mask[1:]
    grown[:, 1:] |= mask[:, :-1]
    grown[:, :-1] |= mask[:, 1:]
    return grown


def _thumbnail_size(size: Sequence[int]) -> tuple[int, int]:
    factor = SIDE / max(size)
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def _resize(array: Array, size: tuple[int, int]) -> Array:
    """uint8 (H, W, 3) or float32 (H, W), averaged down (or stretched) to `size`, in its own type."""
    from PIL import Image

    if array.shape[:2] == size:
        return array
    return np.asarray(Image.fromarray(array).resize((size[1], size[0]), Image.Resampling.BOX))


def _ramp_table() -> Array:
    """The ramp in 256 steps, (256, 3) uint8."""
    stops = np.array([[int(code[i : i + 2], 16) for i in (1, 3, 5)] for code in RAMP], np.float64)
    places = np.linspace(0, 1, len(stops))
    steps = np.linspace(0, 1, 256)
    return np.stack([np.rint(np.interp(steps, places, stops[:, c])) for c in range(3)], axis=1).astype(np.uint8)
