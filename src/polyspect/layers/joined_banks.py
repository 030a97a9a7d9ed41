"""Memory banks that look at the same parts, and the decision layer that weighs what they say (M3DM, CMDIAD).

For patch p of a part, bank b of F, and lambda_b a factor of the bank, or 1 / mean of its values over training parts:

    d_bp = distance of the patch to the nearest row of b                                                    (1)
    s_b  = w_b d_b of the part's worst patch,   a_b = blur(up(d_b))                                         (2)
    s    = w . (lambda_b s_b),   w a linear one-class SVM on the rows (lambda_b s_b) of training parts      (3)
    map  = v . (lambda_b a_b),   v another one on the rows (lambda_b a_b) of their pixels                   (4)

Patches that do not count (`Patches.counts`) are average: they have the bank's mean distance of held-out patches.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..samples import Prediction
from .decision import DecisionLayer
from .maps import top_mean
from .memory import MemoryBank, Reweighting
from .patches import match_patches, worst_patch
from .smoothing import Blur, smooth

ImageScore = Literal["reweighted", "top_mean", "max_map"]  # Eq. 3, or of the map

PAPER: dict[str, Any] = {
    "bank_limit": None,
    "image_score": "reweighted",
    "max_gib": 16.0,
    "lambda_xyz": 1.0,
    "lambda_rgb": 0.1,
}
"""What the preset ``paper`` of M3DM and CMDIAD says of the banks."""


@dataclass(frozen=True, eq=False)
class Patches:
    """The patches of a batch that one bank looks at."""

    values: Tensor  # (B, h, w, C); of whole groups (B, 1, G, C)
    counts: Tensor  # (B, h, w) bool; other patches are average
    alike: Tensor | None = None  # (B, h, w) int64; patches of one number have the same values. None: not known
    near: Tensor | None = None  # whole groups: (B, H*W, k), which a pixel listens to
    share: Tensor | None = None  # and how much: (B, H*W, k)


class Banks(nn.ModuleDict):
    """Memory banks by name, in a fixed order."""

    def __init__(self, banks: Mapping[str, MemoryBank]) -> None:
        super().__init__(banks)

    def named(self) -> list[tuple[str, MemoryBank]]:
        """Name and bank, in order."""
        return [(name, cast(MemoryBank, bank)) for name, bank in self.items()]

    def observe_levels(self, patches: Mapping[str, Patches], but: Collection[str] = ()) -> None:
        """Give the banks the distances of held-out patches; those in `but` get none."""
        for name, bank in self.named():
            rows = patches[name].values[patches[name].counts]
            if name not in but and len(rows):
                bank.observe(bank.distance(rows)[0])

    def set_levels(self, but: Collection[str] = ()) -> None:
        """Set the level of every bank from what it observed.

        Raises:
            DataError: a bank observed nothing.
        """
        for name, bank in self.named():
            if name not in but:
                bank.set_level()

    def measure(
        self,
        patches: Mapping[str, Patches],
        size: tuple[int, int],
        *,
        blur: Blur,
        sigma: float,
        form: Reweighting,
        n: int,
        guard: float = 0.0,
        divisor: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Eqs. 1-2: scores (B, F) and maps (B, H, W, F), each bank's in the unit of its own distances.

        Args:
            patches: By bank.
            size: H, W.
            blur, sigma: See `polyspect.layers.smoothing.smooth`.
            form, n, guard, divisor: See `polyspect.layers.patches.worst_patch`.
        """
        scores, maps = [], []
        for name, bank in self.named():
            own = patches[name]
            distances, matches = _match(bank, own)  # Eq. 1
            maps.append(smooth(_enlarge(own, distances, size, bank.mean), blur, sigma))  # Eq. 2
            weighted = worst_patch(
                bank,
                own.values,
                distances,
                matches,
                own.counts,
                form=form,
                scaled=True,
                n=n,
                guard=guard,
                divisor=divisor,
            )
            scores.append(weighted)
        return torch.stack(scores, dim=-1), torch.stack(maps, dim=-1)


class Decisions(nn.ModuleDict):
    """One decision layer for the image score, ``score``, and one for the map, ``map``.

    Args:
        factors: lambda by bank, in the banks' order; None: the bank is balanced, see `DecisionLayer`.
        layer: Makes a layer for as many values as there are banks, given which of them are ``balanced``; None: the
            banks' values are added as they are.
    """

    def __init__(self, factors: Mapping[str, float | None], layer: Callable[..., DecisionLayer] | None) -> None:
        balanced = [factor is None for factor in factors.values()]
        made = {} if layer is None else {kind: layer(len(factors), balanced=balanced) for kind in ("score", "map")}
        super().__init__(made)
        self.factors = {name: 1.0 if factor is None else factor for name, factor in factors.items()}

    def observe(self, scores: Tensor, pixels: Tensor) -> None:
        """Take in scores (n, F) of training parts and map values (m, F) of their pixels."""
        for kind, rows in (("score", scores), ("map", pixels)):
            cast(DecisionLayer, self[kind]).observe(self.weighted(rows))

    def fit(self) -> None:
        """Learn both from what was observed.

        Raises:
            DataError: see `DecisionLayer.fit`.
        """
        for layer in self.values():
            cast(DecisionLayer, layer).fit()

    def weighted(self, values: Tensor) -> Tensor:
        """lambda_b times the values (..., F); those of balanced banks as they are."""
        return values.new_tensor(list(self.factors.values())) * values

    def shares(self, kind: Literal["score", "map"], values: Tensor) -> Tensor:
        """The summands (..., F) of Eq. 3 or 4."""
        return cast(DecisionLayer, self[kind]).shares(self.weighted(values)) if len(self) else values

    def judge(self, scores: Tensor, maps: Tensor, image_score: ImageScore, top_share: float) -> Prediction:
        """Score and map from those of the banks, (B, F) and (B, H, W, F); branch maps are the banks' summands."""
        shares = self.shares("map", maps)  # B H W F
        fused = shares.sum(-1)  # Eq. 4
        branches = {name: share.contiguous() for name, share in zip(self.factors, shares.unbind(-1))}
        if image_score == "reweighted":
            score = self.shares("score", scores).sum(-1)  # Eq. 3
        else:
            score = top_mean(fused, top_share if image_score == "top_mean" else 0.0)
        return Prediction(score=score, map=fused, branch_maps=branches)


def _match(bank: MemoryBank, patches: Patches) -> tuple[Tensor, Tensor]:
    """`match_patches`, of patches that are alike only once."""
    if patches.alike is None:
        return match_patches(bank, patches.values, patches.counts)
    distinct, number = patches.alike.flatten().unique(return_inverse=True)
    place = torch.arange(len(number), device=number.device)
    first = torch.full_like(distinct, len(number)).scatter_reduce(0, number, place, "amin")
    distances, matches = bank.distance(patches.values.flatten(0, 2).index_select(0, first))
    return distances[number].view_as(patches.alike), matches[number].view_as(patches.alike)


def _enlarge(patches: Patches, distances: Tensor, size: tuple[int, int], level: Tensor) -> Tensor:
    """Distances (B, h, w) at the pixels, (B, H, W); those of whole groups are interpolated as features are.

    Pixels that listen to no group are average: they have the bank's `level`, which is 0 where it has none.
    """
    if patches.near is None or patches.share is None:
        return F.interpolate(distances[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]
    B, pixels, k = patches.near.shape
    heard = distances.flatten(1).gather(1, patches.near.flatten(1)).view(B, pixels, k)
    heard = (heard * patches.share).sum(-1) + (1 - patches.share.sum(-1)) * level.to(heard)
    return heard.unflatten(1, size)
