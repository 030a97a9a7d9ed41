"""Tiny parts that never touch a disk: a textured bump on a plane, with and without a defect, in every modality."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from polyspect.samples import Batch, is_geometric

SIZE = 64


def tiny_part(seed: int, *, defect: bool = False, size: int = SIZE) -> dict[str, np.ndarray]:
    """rgb, xyz, depth (scaled 0..1), normals, valid, foreground and mask of one part; the defect shows in all views."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:size, 0:size] / size - 0.5
    inside = x**2 + y**2 < 0.36**2
    height = np.where(inside, 0.02 * np.sqrt(np.clip(0.4**2 - x**2 - y**2, 0, None)) / 0.4, 0)
    stripes = 0.5 + 0.2 * np.sin(40 * x + rng.uniform(-0.3, 0.3)) * np.cos(25 * y)
    rgb = np.stack([stripes, 0.6 * stripes + 0.2, np.full_like(stripes, 0.35)], -1)
    mask = np.zeros((size, size), bool)
    if defect:
        cy, cx = rng.uniform(-0.15, 0.15, 2)
        mask = (x - cx) ** 2 + (y - cy) ** 2 < 0.08**2
        height = height + np.where(mask, 0.012, 0)
        rgb[mask] = (0.9, 0.1, 0.1)
    height = height + rng.normal(0, 1e-4, height.shape)
    rgb = np.clip(rgb + rng.normal(0, 0.01, rgb.shape), 0, 1)
    valid = rng.random((size, size)) > 0.02
    z = 0.5 - height
    xyz = np.stack([x * 0.2, y * 0.2, z], -1) * valid[..., None]
    gy, gx = np.gradient(z, 0.2 / size)
    normals = np.stack([gx, gy, -np.ones_like(gx)], -1)
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    return {
        "rgb": rgb,
        "xyz": xyz,
        "depth": (0.1 + 0.8 * (0.5 - z + 0.002) / 0.04)[..., None] * (inside & valid)[..., None],
        "normals": normals * valid[..., None],
        "valid": valid,
        "foreground": inside & valid,
        "mask": mask,
    }


def tiny_batch(seeds: Sequence[int], *, defect: bool = False, size: int = SIZE) -> Batch:
    """A batch of tiny parts."""
    parts = [tiny_part(seed, defect=defect, size=size) for seed in seeds]

    def stack(name: str) -> torch.Tensor:
        return torch.from_numpy(np.stack([part[name] for part in parts])).movedim(-1, 1).float().contiguous()

    return Batch(
        ids=[f"tiny/{'bad' if defect else 'good'}/{seed}" for seed in seeds],
        images={name: stack(name) for name in ("rgb", "xyz", "depth", "normals")},
        valid=torch.from_numpy(np.stack([part["valid"] for part in parts])),
        foreground=torch.from_numpy(np.stack([part["foreground"] for part in parts])),
    )


def take(batch: Batch, indices: Sequence[int]) -> Batch:
    """Some parts of a batch, in the order given."""
    index = list(indices)
    images = {name: image[index] for name, image in batch.images.items()}
    return Batch([batch.ids[i] for i in index], images, batch.valid[index], batch.foreground[index])


def only(batch: Batch, names: Sequence[str]) -> Batch:
    """The parts with these views alone; without a geometric one all pixels count, as a reader of photos says."""
    images = {name: image for name, image in batch.images.items() if name in names}
    if any(map(is_geometric, images)):
        return replace(batch, images=images)
    everywhere = torch.ones_like(batch.valid)
    return replace(batch, images=images, valid=everywhere, foreground=everywhere)


def blinded(batch: Batch) -> Batch:
    """The batch as a sensor that measured nothing would give it: geometric views zero, nothing valid."""
    images = {name: image if name == "rgb" else torch.zeros_like(image) for name, image in batch.images.items()}
    nothing = torch.zeros_like(batch.valid)
    return replace(batch, images=images, valid=nothing, foreground=nothing)


@dataclass
class TinyParts:
    """What the engine needs of a split, made of tiny parts."""

    seeds: Sequence[int]

    def __len__(self) -> int:
        return len(self.seeds)

    def keys(self) -> list[str]:
        """One key per part."""
        return [hashlib.sha256(f"tiny {seed}".encode()).hexdigest() for seed in self.seeds]

    def batch(self, indices: Sequence[int]) -> Batch:
        """The parts at `indices`."""
        return tiny_batch([self.seeds[index] for index in indices])
