"""Modalities as images for an image backbone, and one backbone pass for all of them.

A backbone trained on photographs takes (B, 3, H, W) in 0..1. RGB is that already; a depth map is copied to three
channels; normals are mapped from -1..1 to 0..1 where they were measured (as in the RGB + normals variants of
crossmodal distillation). All modalities go through the network as one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..errors import ConfigError, DataError, ShapeError
from ..samples import Batch

Stages = list[Tensor]


def modality_image(batch: Batch, name: str) -> Tensor:
    """Modality `name` of a batch as backbone input (B, 3, H, W).

    ``rgb`` as it is; ``depth`` as three copies; ``normals`` as (n + 1) / 2 where valid and 0 elsewhere; any other
    modality as it is with 3 channels, as three copies with 1. Values are in 0..1 if the prepared modality's are.

    Raises:
        ConfigError: ``xyz``, which is no image.
        DataError: the batch has no such modality.
        ShapeError: neither 1 nor 3 channels.
    """
    if name == "xyz":
        raise ConfigError("'xyz' is a point cloud, not an image: give an image backbone 'depth' or 'normals' instead")
    if name not in batch.images:
        raise DataError(f"part '{batch.ids[0]}' has no '{name}'; the batch has {', '.join(batch.images) or 'nothing'}")
    image = batch.images[name]  # B C H W
    if name == "normals":
        return torch.where(batch.valid[:, None], (image + 1) / 2, 0)
    if image.shape[1] == 1:
        return image.expand(-1, 3, -1, -1)
    if image.shape[1] != 3:
        raise ShapeError(
            f"part '{batch.ids[0]}': '{name}' has {image.shape[1]} channels, an image backbone takes 1 or 3; "
            f"split it into modalities of 1 or 3 channels"
        )
    return image


def stack_modalities(batch: Batch, names: Sequence[str]) -> Tensor:
    """All modalities under one another: (len(names) * B, 3, H, W), the whole batch of ``names[0]`` first.

    Raises:
        ConfigError, DataError, ShapeError: as `modality_image`.
    """
    return torch.cat([modality_image(batch, name) for name in names])


def split_modalities(stages: Sequence[Tensor], names: Sequence[str]) -> dict[str, Stages]:
    """Undo `stack_modalities` on features (len(names) * B, C, h, w): modality -> its stages (B, C, h, w)."""
    parts = [stage.chunk(len(names)) for stage in stages]
    return {name: [part[index] for part in parts] for index, name in enumerate(names)}


def modality_features(
    backbone: Callable[[Tensor], Sequence[Tensor]], batch: Batch, names: Sequence[str]
) -> dict[str, Stages]:
    """Features of several modalities from one backbone pass: modality -> stages (B, C_i, h_i, w_i), shallow first.

    Raises:
        ConfigError, DataError, ShapeError: as `modality_image`.
    """
    return split_modalities(backbone(stack_modalities(batch, names)), names)


def name_stages(stages: Mapping[str, Stages]) -> dict[str, Tensor]:
    """Features of several modalities as the flat mapping that detectors return: ``"<modality>.1"``, ``"<modality>.2"``.

    Numbers count from the shallowest stage.
    """
    return {f"{name}.{scale}": x for name, maps in stages.items() for scale, x in enumerate(maps, start=1)}


def stages_of(features: Mapping[str, Tensor], name: str, count: int = 3) -> Stages:
    """The stages of one modality, shallow first, from what `name_stages` made, in channels_last layout.

    (Convolutions train and predict faster on it, on CPUs as on GPUs.)
    """
    return [features[f"{name}.{scale}"].contiguous(memory_format=torch.channels_last) for scale in range(1, count + 1)]
