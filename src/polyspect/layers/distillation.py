"""Cosine losses between the feature maps of a student and those of its teacher.

    flat   sum_i mean_b [1 - cos(S_ib, T_ib)], one vector of C*H*W numbers per part and scale
    pixel  sum_i mean_b mean_p [1 - cos(S_ibp, T_ibp)], one vector of C numbers per position

Papers on reverse distillation describe the second and their code trains with the first (Crossmodal Reverse
Distillation, Eq. 1); they differ, since the first lets positions with large features weigh more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

LossKind = Literal["flat", "pixel"]

EPS = 1e-8  # smallest norm that a vector is divided by, as in `torch.nn.functional.cosine_similarity`


def cosine_losses(
    predictions: Mapping[str, Sequence[Tensor]],
    targets: Sequence[Tensor],
    *,
    kind: LossKind = "flat",
    keep: Tensor | None = None,
) -> dict[str, Tensor]:
    """The distance of each prediction to the same targets, summed over scales: one scalar per name.

    Args:
        predictions: Name -> feature maps, each (B, C_i, h_i, w_i), in the order of `targets`.
        targets: The teacher's feature maps; they receive no gradient of their own.
        keep: (B, H, W) bool at pixel resolution. A position counts when any of its pixels is True, and a part when any
            of its positions does. None counts everything.
    """
    losses = {name: targets[0].new_zeros((), dtype=torch.float32) for name in predictions}
    for scale, target in enumerate(targets):
        weight = None if keep is None else kept_cells(keep, target.shape[-2:])
        distance = _Flat(target, weight) if kind == "flat" else _Pixel(target, weight)
        for name, maps in predictions.items():
            losses[name] = losses[name] + distance(maps[scale].float())
    return losses


def kept_cells(keep: Tensor, grid: Sequence[int]) -> Tensor:
    """Reduce a pixel mask (B, H, W) to a feature grid (h, w): True where any pixel of the cell is True."""
    return F.adaptive_max_pool2d(keep.float(), (grid[0], grid[1])) > 0  # B h w


class _Flat:
    """1 - cos over whole feature maps; the norm of the target is computed once for all predictions."""

    def __init__(self, target: Tensor, weight: Tensor | None) -> None:
        self.weight = None if weight is None else weight[:, None].float()  # B 1 h w
        self.target = target.float() if self.weight is None else target.float() * self.weight
        self.scale = _inverse_norm(self.target)
        self.present = None if weight is None else weight.flatten(1).any(1).float()  # B

    def __call__(self, prediction: Tensor) -> Tensor:
        if self.weight is not None:
            prediction = prediction * self.weight
        # sums over dimensions instead of flattening: no copy, whatever the memory format
        dot = (prediction * self.target).sum((1, 2, 3))
        distance = 1 - dot * self.scale * _inverse_norm(prediction)  # B
        if self.present is None:
            return distance.mean()
        return (distance * self.present).sum() / self.present.sum().clamp(min=1)


class _Pixel:
    """1 - cos per position, averaged over the positions that count."""

    def __init__(self, target: Tensor, weight: Tensor | None) -> None:
        self.target = target.float()
        self.weight = weight

    def __call__(self, prediction: Tensor) -> Tensor:
        distance = 1 - F.cosine_similarity(prediction, self.target, dim=1, eps=EPS)  # B h w
        if self.weight is None:
            return distance.mean()
        return (distance * self.weight).sum() / self.weight.sum().clamp(min=1)


def _inverse_norm(x: Tensor) -> Tensor:
    return (x * x).sum((1, 2, 3)).clamp(min=EPS**2).rsqrt()  # B
