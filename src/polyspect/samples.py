"""The four nouns of polyspect: Sample, Batch, Features, Prediction.

    files -> Sample -> prepared Sample -> Batch -> Features -> Prediction

A Sample holds numpy arrays (it comes from files and may never meet a network); everything from Batch on holds torch
tensors. Torch is imported only by those who use those classes, so that reading and checking data starts at once.

Letters in shapes, everywhere in the project: ``B`` batch, ``C`` channels, ``H W`` pixels, ``h w`` feature grid,
``N`` points, ``K`` bank size. Height comes before width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import DataError, ShapeError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Array = np.ndarray[Any, np.dtype[Any]]
Features = Mapping[str, "Tensor"]
"""What the frozen part of a detector computes from a Batch: name -> tensor, every tensor with the batch first."""


@dataclass(frozen=True)
class Modality:
    """What a modality's name promises about its array (H, W) or (H, W, channels)."""

    channels: int
    unit: str
    geometric: bool  # True: measured by the 3D sensor, so only meaningful where `Sample.valid`


MODALITIES: dict[str, Modality] = {
    "rgb": Modality(3, "uint8 0..255 as read, float32 0..1 once prepared", geometric=False),
    "xyz": Modality(3, "metres, camera frame: x right, y down, z forward", geometric=True),
    "depth": Modality(1, "metres", geometric=True),
    "normals": Modality(3, "unit vectors, camera frame", geometric=True),
}
"""The modalities whose meaning is fixed by their name. Any other name is an extra image-like view, read as RGB is."""


def is_geometric(name: str) -> bool:
    """Whether modality `name` comes from the 3D sensor, so that it means something only where a part is valid."""
    return name in MODALITIES and MODALITIES[name].geometric


@dataclass(frozen=True, eq=False)
class Sample:
    """One part, one capture: registered views on one pixel grid.

    Attributes:
        id: Unique within a data set, e.g. ``"bagel/test/hole/003"``.
        images: Modality name -> array: ``rgb`` (H, W, 3) uint8 or, prepared, float32 in 0..1; ``xyz`` (H, W, 3)
            float32 metres; ``depth`` (H, W) float32 metres; ``normals`` (H, W, 3) float32 unit vectors.
            Geometric modalities are exactly 0 where ``valid`` is False.
        valid: (H, W) bool, True where the 3D sensor measured; all True if no geometric modality was read.
        foreground: (H, W) bool, True on the part; None until prepared.
        mask: (H, W) bool ground truth, True on a defect; None when unknown.
        label: 0 good, 1 anomalous, None unknown.
        defect: Defect type in the data set's own spelling (``"good"`` for good parts), None unknown.
        meta: Anything that travels along (intrinsics, plane report, flags, the geometry of the resize).
    """

    id: str
    images: Mapping[str, Array]
    valid: Array
    foreground: Array | None = None
    mask: Array | None = None
    label: int | None = None
    defect: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the common pixel grid."""
        return int(self.valid.shape[0]), int(self.valid.shape[1])

    def with_(self, **changes: Any) -> Sample:
        """A copy with some attributes replaced."""
        return replace(self, **changes)

    def check(self) -> Sample:
        """Return self after checking that every array fits the common grid.

        Raises:
            DataError: names the sample, the modality and both shapes.
        """
        for name, image in self.images.items():
            spec = MODALITIES.get(name)
            if image.shape[:2] != self.size:
                raise DataError(
                    f"sample '{self.id}': '{name}' is {image.shape[1]}x{image.shape[0]} pixels but the part's grid is "
                    f"{self.size[1]}x{self.size[0]}; all views of a part must be registered on one grid"
                )
            channels = 1 if image.ndim == 2 else image.shape[2]
            if spec is not None and channels != spec.channels:
                raise DataError(f"sample '{self.id}': '{name}' has {channels} channels, expected {spec.channels}")
        for name in ("foreground", "mask"):
            other = getattr(self, name)
            if other is not None and other.shape != self.size:
                raise DataError(f"sample '{self.id}': '{name}' has shape {other.shape}, expected {self.size}")
        return self


@dataclass(frozen=True, eq=False)
class Batch:
    """Prepared parts, stacked. Carries no label and no ground truth: a detector cannot peek.

    Attributes:
        ids: One sample id per part.
        images: Modality -> float32 (B, C, H, W). ``rgb`` in 0..1; ``xyz`` metres; ``depth`` (C = 1) standardised as the
            preparation says, 0 off the part; ``normals`` unit vectors, 0 where invalid.
        valid: (B, H, W) bool.
        foreground: (B, H, W) bool.
    """

    ids: Sequence[str]
    images: Mapping[str, Tensor]
    valid: Tensor
    foreground: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        images = {name: image.to(device) for name, image in self.images.items()}
        return Batch(self.ids, images, self.valid.to(device), self.foreground.to(device))


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a detector says of a batch. Raw and uncalibrated; larger is more anomalous.

    Attributes:
        score: (B,) image scores.
        map: (B, H, W) anomaly maps at the resolution of the prepared input.
        branch_maps: Name of a modality or memory bank -> (B, H, W), so that a person can see which view saw the defect.
    """

    score: Tensor
    map: Tensor
    branch_maps: Mapping[str, Tensor] = field(default_factory=dict)

    def cpu(self) -> Prediction:
        """The same prediction in host memory."""
        return Prediction(self.score.cpu(), self.map.cpu(), {k: v.cpu() for k, v in self.branch_maps.items()})


def check_shapes(**arguments: tuple[Any, str]) -> dict[str, int]:
    """Check tensor shapes against patterns in which a letter means one size across all arguments.

    ``check_shapes(rgb=(rgb, "B 3 H W"), valid=(valid, "B H W"))`` returns ``{"B": ..., "H": ..., "W": ...}``.

    Raises:
        ShapeError: names the argument, its shape, the pattern and the sizes bound so far.
    """
    sizes: dict[str, int] = {}
    for name, (array, pattern) in arguments.items():
        letters, shape = pattern.split(), tuple(array.shape)
        fits = len(letters) == len(shape)
        if fits:
            for letter, size in zip(letters, shape):
                fits &= size == (int(letter) if letter.isdigit() else sizes.setdefault(letter, size))
        if not fits:
            raise ShapeError(f"`{name}` has shape {shape}, expected ({pattern}) with {sizes or 'nothing bound yet'}")
    return sizes
