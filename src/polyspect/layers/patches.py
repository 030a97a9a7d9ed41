"""Patches of a feature grid: made from backbone stages, matched with a memory bank, and an image's worst one.

What detectors with a memory of patches share: PatchCore (Roth et al., CVPR 2022) and BTF ("Back to the Feature",
Horwitz and Hoshen, CVPR-W 2023).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..samples import Features
from .distillation import kept_cells
from .memory import MemoryBank, Reweighting, reweight


def join_stages(maps: Sequence[Tensor], grid: int | None) -> Tensor:
    """Backbone stages as one grid of patches, each averaged over its 3 x 3 neighbours first (PatchCore Eqs. 1-3).

    Args:
        maps: (B, C_i, h_i, w_i), the finest first.
        grid: None: every stage goes to the finest stage's grid, bilinearly, and border cells average the neighbours
            they have. A number: border cells are dropped and the rest is pooled to grid x grid, as BTF's code does.

    Returns:
        (B, sum of C_i, h, w).
    """
    if grid is not None:
        return torch.cat([pool_to_grid(m, grid) for m in maps], dim=1)
    size = maps[0].shape[-2:]
    averaged = [F.avg_pool2d(m, 3, stride=1, padding=1, count_include_pad=False) for m in maps]
    return torch.cat(
        [
            m if m.shape[-2:] == size else F.interpolate(m, size=size, mode="bilinear", align_corners=False)
            for m in averaged
        ],
        dim=1,
    )


def pool_to_grid(maps: Tensor, grid: int | tuple[int, int]) -> Tensor:
    """Means over 3 x 3 windows, borders dropped, pooled adaptively: (B, C, H, W) -> (B, C, h, w) for a `grid` (h, w).

    Maps of fewer than 3 rows or columns are not averaged first.
    """
    averaged = F.avg_pool2d(maps, 3, stride=1) if min(maps.shape[-2:]) >= 3 else maps
    return F.adaptive_avg_pool2d(averaged, grid)


def counting_cells(features: Features, grid: Sequence[int], *, measured: bool, on_part: bool) -> Tensor:
    """Which cells of an h x w grid count, (B, h, w) bool: all, or those that hold a pixel of the masks asked for.

    Args:
        features: With ``valid`` and ``foreground``, (B, H, W) bool.
        grid: h, w.
        measured: Only cells with a valid pixel.
        on_part: Only cells with a foreground pixel.
    """
    valid, foreground = features["valid"], features["foreground"]
    counts = torch.ones(len(valid), *grid, dtype=torch.bool, device=valid.device)
    if measured:
        counts = counts & kept_cells(valid, grid)
    if on_part:
        counts = counts & kept_cells(foreground, grid)
    return counts


def match_patches(bank: MemoryBank, patches: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Distance of patches (B, h, w, C) to their match in the bank, and its row: both (B, h, w).

    Where `counts` (B, h, w) is False they are the bank's mean distance of held-out patches and row 0.
    """
    distances = bank.mean.to(patches).expand(counts.shape).clone()
    matches = torch.zeros(counts.shape, dtype=torch.int64, device=patches.device)
    distances[counts], matches[counts] = bank.distance(patches[counts])
    return distances, matches


def worst_patch(
    bank: MemoryBank,
    patches: Tensor,
    distances: Tensor,
    matches: Tensor,
    counts: Tensor,
    *,
    form: Reweighting,
    scaled: bool,
    n: int,
    guard: float = 0.0,
    divisor: float = 1.0,
) -> Tensor:
    """w d of each part's worst patch, (B,) (PatchCore Eq. 7).

    Parts in which no patch counts get the bank's mean distance of held-out patches.

    Args:
        bank: The patches' bank.
        patches: (B, h, w, C).
        distances, matches: Of `match_patches`.
        counts: (B, h, w) bool.
        form, scaled, guard: See `polyspect.layers.memory.reweight`; form ``"none"`` is w = 1.
        n: Rows of the bank around the match that w looks at, the match included.
        divisor: What distances are divided by, in w and in d.
    """
    B, C = len(patches), patches.shape[-1]
    flat = torch.where(counts, distances, -1.0).flatten(1)
    place = flat.argmax(1)  # B
    row = torch.arange(B, device=place.device)
    worst = distances.flatten(1)[row, place] / divisor
    if form == "none":
        return worst
    match = matches.flatten(1)[row, place]
    around = bank.around(patches.flatten(1, 2)[row, place], match, n) / divisor
    weight = reweight(worst, around, C, form, scaled=scaled, guard=guard)
    return torch.where(counts.flatten(1).any(1), weight * worst, worst)
