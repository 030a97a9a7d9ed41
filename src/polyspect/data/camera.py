"""Cameras: from a depth map to an organised cloud.

    depth [m] = raw * scale + offset                                                                        (1)
    pinhole        x = (u - cx) z / fx      y = (v - cy) z / fy      z = depth                              (2)
    orthographic   x = (u - cx) / fx        y = (v - cy) / fy        z = depth                              (3)

``u`` counts columns and ``v`` rows; the centre of the top left pixel is (0, 0). The depth is z, along the optical axis,
not the length of the ray. The result is in the camera's frame: x right, y down, z forward.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..errors import DataError, nearest_names
from ..samples import Array
from .opening import read_mapping


@dataclass(frozen=True)
class Intrinsics:
    """One camera and the meaning of its depth values.

    Attributes:
        fx: Focal length in pixels (pinhole), or pixels per metre = 1 / pixel pitch (orthographic).
        fy: The same along the rows.
        cx: Principal point, column, in pixels.
        cy: Principal point, row, in pixels.
        scale: Metres per unit of the depth file (0.001 for millimetres); None: the data set's unit, and then an integer
            depth file is an error.
        offset: Metres added after scaling.
        invalid: Raw values that mean "not measured", before scale and offset. NaN and infinities always do.
        model: ``"pinhole"`` or ``"orthographic"`` (line profile sensors, telecentric lenses).
    """

    fx: float
    fy: float
    cx: float
    cy: float
    scale: float | None = None
    offset: float = 0.0
    invalid: tuple[float, ...] = (0.0,)
    model: Literal["pinhole", "orthographic"] = "pinhole"

    def __post_init__(self) -> None:
        values = [self.fx, self.fy, self.cx, self.cy, self.offset, 1.0 if self.scale is None else self.scale]
        if not all(math.isfinite(v) for v in values) or self.fx <= 0 or self.fy <= 0 or self.scale == 0:
            raise DataError(f"intrinsics need finite numbers, fx and fy above 0 and a scale other than 0; got {self}")
        if self.model not in ("pinhole", "orthographic"):
            raise DataError(f"unknown camera model '{self.model}': {nearest_names(self.model, _MODELS)}")

    @classmethod
    def load(cls, path: str | Path) -> Intrinsics:
        """Read a JSON or YAML file with the attributes above as keys (see `from_mapping`).

        Raises:
            DataError: names the file and the key.
        """
        return cls.from_mapping(read_mapping(path, "camera intrinsics"), where=str(path))

    @classmethod
    def from_mapping(cls, content: Mapping[str, Any], where: str = "intrinsics") -> Intrinsics:
        """Build from a mapping; ``K`` (3 x 3, or 9 numbers row by row) may stand for fx, fy, cx, cy.

        For an orthographic camera ``pixel_pitch`` (metres per pixel, one number or [x, y]) may stand for fx and fy, and
        cx and cy default to 0.

        Raises:
            DataError: an unknown or missing key, or a value that is not a number.
        """
        known = [f.name for f in fields(cls)] + ["K", "pixel_pitch"]
        for key in content:
            if key not in known:
                raise DataError(f"{where}: unknown key '{key}': {nearest_names(key, known)}")
        values = dict(content)
        try:
            values |= _focal_lengths(values.pop("K", None), values.pop("pixel_pitch", None))
            if values.get("model") == "orthographic":
                values = {"cx": 0.0, "cy": 0.0} | values
            invalid = values.pop("invalid", (0.0,))
            numbers = {k: float(v) for k, v in values.items() if k != "model" and v is not None}
            sentinels = tuple(float(v) for v in (invalid if isinstance(invalid, list | tuple) else [invalid]))
        except (TypeError, ValueError) as error:
            raise DataError(f"{where}: camera intrinsics must be numbers: {error}") from error
        missing = [key for key in ("fx", "fy", "cx", "cy") if key not in numbers]
        if missing:
            raise DataError(
                f"{where}: camera intrinsics lack {', '.join(missing)}; expected fx, fy, cx, cy in pixels (or K), or "
                "model: orthographic with pixel_pitch in metres"
            )
        try:
            return cls(**numbers, invalid=sentinels, model=values.get("model", "pinhole"))
        except DataError as error:
            raise DataError(f"{where}: {error}") from error


_MODELS = ("pinhole", "orthographic")


def _focal_lengths(matrix: Any, pitch: Any) -> dict[str, float]:
    """fx, fy, cx, cy out of a camera matrix, or fx, fy out of a pixel pitch in metres."""
    if matrix is not None:
        k = np.asarray(matrix, dtype=np.float64)
        if k.size != 9:
            raise ValueError(f"K has {k.size} numbers, expected 9")
        k = k.reshape(3, 3)
        return {"fx": k[0, 0], "fy": k[1, 1], "cx": k[0, 2], "cy": k[1, 2]}
    if pitch is not None:
        x, y = pitch if isinstance(pitch, list | tuple) else (pitch, pitch)
        if not (float(x) > 0 and float(y) > 0):
            raise ValueError(f"pixel_pitch must be above 0 metres, got {pitch}")
        return {"fx": 1 / float(x), "fy": 1 / float(y)}
    return {}


def depth_to_xyz(depth: Array, intrinsics: Intrinsics) -> Array:
    """Organised cloud of a depth map, Eq. 2 or 3.

    Args:
        depth: (H, W) metres; NaN where not measured (gives NaN in all three coordinates).
        intrinsics: The camera; its scale, offset and sentinels have already been applied to `depth`.

    Returns:
        (H, W, 3) float32 metres. A pinhole pixel with depth 0 gives (0, 0, 0).
    """
    H, W = depth.shape
    x = ((np.arange(W) - intrinsics.cx) / intrinsics.fx).astype(np.float32)  # W
    y = ((np.arange(H) - intrinsics.cy) / intrinsics.fy).astype(np.float32)  # H
    xyz = np.empty((H, W, 3), dtype=np.float32)
    z = xyz[..., 2]
    z[...] = depth
    if intrinsics.model == "pinhole":
        with np.errstate(invalid="ignore"):  # 0 * inf
            np.multiply(x[None, :], z, out=xyz[..., 0])
            np.multiply(y[:, None], z, out=xyz[..., 1])
    else:
        measured = np.isfinite(z)
        xyz[..., 0] = np.where(measured, x[None, :], np.nan)
        xyz[..., 1] = np.where(measured, y[:, None], np.nan)
    return xyz
