"""Depth as networks see it: one scale for all parts of a category, or CRD's per-image scale, then hole filling.

    u = 0.1 + 0.8 (d - low) / (high - low)   on measured foreground, 0 elsewhere            (1)

CRD takes low and high from each image, so one spike rescales the whole part and the absolute height is lost. A
category's scale is fitted once on good parts and never clips: a bump above all good parts stays visible, as u > 0.9.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import DataError
from ..geometry.filling import fill_nearest, fill_rounds
from ..samples import Array, Sample

if TYPE_CHECKING:
    from .preparation import Preparation

_PIXELS_PER_PART = 8192


@dataclass(frozen=True)
class DepthScale:
    """Eq. 1's range for one category, metres, in the terms of its preparation's `depth` ("z" or "height")."""

    low_m: float
    high_m: float

    def to_dict(self) -> dict[str, float]:
        """Plain values, as JSON keeps them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DepthScale:
        """The inverse of `to_dict`."""
        return cls(low_m=float(values["low_m"]), high_m=float(values["high_m"]))


def fit_depth_scale(
    samples: Iterable[Sample], *, percentiles: tuple[float, float] = (0.5, 99.5), minimum_span_m: float = 0.001
) -> DepthScale:
    """The depth range of prepared good parts: percentiles over the measured foreground of all of them.

    Parts are looked at one by one; of each, at most 8192 evenly spaced pixels are kept, so that memory stays small and
    every part weighs about the same.

    Args:
        samples: Prepared parts; those without a measured foreground pixel are passed over.
        percentiles: Low and high, 0..100.
        minimum_span_m: A narrower range is widened about its middle to this, so that the sensor noise of a flat part
            is not blown up to full scale.

    Raises:
        DataError: a part has no depth, or no part has a measured foreground pixel.
    """
    kept: list[Array] = []
    count = 0
    for sample in samples:
        depth, on = _depth(sample)
        values = depth[on]
        kept.append(values[:: max(1, -(-values.size // _PIXELS_PER_PART))])
        count += 1
    pooled = np.concatenate(kept) if kept else np.empty(0)
    if not pooled.size:
        raise DataError(
            f"no depth scale can be fitted: none of the {count} parts has a measured foreground pixel; "
            f"check the clouds, or prepare with background='keep'"
        )
    low, high = (float(value) for value in np.percentile(pooled.astype(np.float64), percentiles))
    if high - low < minimum_span_m:
        middle = (low + high) / 2
        low, high = middle - minimum_span_m / 2, middle + minimum_span_m / 2
    return DepthScale(low, high)


def standardise_depth(sample: Sample, preparation: Preparation, scale: DepthScale | None) -> Array:
    """The depth image of a prepared part as `preparation.depth_range` and `depth_fill` say, (H, W) float32.

    Raises:
        DataError: the part has no depth, or the category's scale is needed and was not fitted.
    """
    depth, on = _depth(sample)
    if preparation.depth == "relative":  # 0 off the part already, and what was filled early counts as measured
        return depth.astype(np.float32)
    if preparation.depth_range == "category" and scale is None:
        raise DataError(
            f"sample '{sample.id}': the depth of its category has no scale yet: fit one with `fit_depth_scale` on "
            f"good parts, or prepare with depth_range='image' or 'none'"
        )
    if preparation.depth_range == "none":
        image = np.where(on, depth, 0)
    else:
        low, high = (0.0, 0.0)
        if preparation.depth_range == "category" and scale is not None:
            low, high = scale.low_m, scale.high_m
        elif on.any():
            low, high = float(depth[on].min()), float(depth[on].max())
        span = high - low
        scaled = 0.1 + 0.8 * (depth - low) / span if span > 0 else np.full(depth.shape, 0.5)  # Eq. 1
        image = np.where(on, scaled, 0)
    if preparation.depth_fill == "rounds":
        image, _ = fill_rounds(image, on, preparation.depth_fill_rounds)
    elif preparation.depth_fill == "full":
        image = fill_nearest(image, on, where=sample.foreground)
    return image.astype(np.float32)


def _depth(sample: Sample) -> tuple[Array, Array]:
    """Depth (H, W) float64 and where it was measured on the part."""
    if "depth" not in sample.images:
        raise DataError(
            f"sample '{sample.id}' has no depth (it has {', '.join(sample.images) or 'nothing'}): "
            f"supply 'depth' or 'xyz'"
        )
    depth = sample.images["depth"].astype(np.float64)
    on = sample.valid if sample.foreground is None else sample.valid & sample.foreground
    return depth, on
