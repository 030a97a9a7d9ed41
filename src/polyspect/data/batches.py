"""Prepared parts, stacked into the tensors that detectors read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..errors import DataError
from ..samples import Array, Sample
from .depth_scale import DepthScale, standardise_depth
from .preparation import Preparation

if TYPE_CHECKING:
    from ..samples import Batch


def collate(
    samples: Sequence[Sample],
    preparation: Preparation,
    scale: DepthScale | None = None,
    modalities: Sequence[str] | None = None,
) -> Batch:
    """Stack prepared parts into a `Batch`.

    Args:
        samples: Prepared parts, all with the same modalities and size.
        preparation: The one they were prepared with; its `depth_range` and `depth_fill` are applied here.
        scale: The category's depth scale; may be None unless depth is stacked and ``depth_range="category"``.
        modalities: Those to stack; None for all that the parts have.

    Returns:
        Images float32 (B, C, H, W): ``rgb`` and extra modalities 0..1, ``xyz`` metres, ``depth`` standardised and
        filled, ``normals`` unit vectors, 0 where invalid; ``valid`` and ``foreground`` bool (B, H, W).

    Raises:
        DataError: no parts, one was not prepared or lacks a modality, or sizes differ; names the part.
    """
    import torch

    from ..samples import Batch

    if not samples:
        raise DataError("a batch needs at least one part, got none")
    names = _stacked(samples[0], modalities)
    for sample in samples:
        _check_alike(sample, samples[0], names, _stacked(sample, modalities))
    images = {
        name: torch.from_numpy(np.stack([_planes(sample, name, preparation, scale) for sample in samples]))
        for name in names
    }
    return Batch(
        ids=tuple(sample.id for sample in samples),
        images=images,
        valid=torch.from_numpy(np.stack([sample.valid for sample in samples])),
        foreground=torch.from_numpy(np.stack([np.asarray(sample.foreground) for sample in samples])),
    )


def _planes(sample: Sample, name: str, preparation: Preparation, scale: DepthScale | None) -> Array:
    """One modality of one part as (C, H, W) float32."""
    image = standardise_depth(sample, preparation, scale) if name == "depth" else sample.images[name]
    if image.ndim == 2:
        image = image[..., None]
    return np.ascontiguousarray(image.transpose(2, 0, 1), dtype=np.float32)


def _stacked(sample: Sample, modalities: Sequence[str] | None) -> list[str]:
    return [name for name in sample.images if modalities is None or name in modalities]


def _check_alike(sample: Sample, first: Sample, names: Sequence[str], has: Sequence[str]) -> None:
    if sample.foreground is None:
        raise DataError(f"sample '{sample.id}' was not prepared: call `prepare` before stacking parts into a batch")
    if sample.size != first.size:
        raise DataError(
            f"sample '{sample.id}' is {sample.size[0]}x{sample.size[1]} pixels, but '{first.id}' of the same batch is "
            f"{first.size[0]}x{first.size[1]}: prepare all parts with the same `size`"
        )
    odd = set(names).symmetric_difference(has)
    if odd:
        name = min(odd)
        without, with_ = (sample, first) if name in names else (first, sample)
        raise DataError(
            f"sample '{without.id}' has no '{name}', which '{with_.id}' of the same batch has: supply it, or leave the "
            f"modality out for all parts"
        )
    for name in names:
        if sample.images[name].shape != first.images[name].shape:
            raise DataError(
                f"sample '{sample.id}': '{name}' has shape {sample.images[name].shape}, but "
                f"{first.images[name].shape} in '{first.id}' of the same batch"
            )
