"""From a part's organised cloud to point features and back to its pixels: the point extractor of M3DM, CMDIAD and CFM.

    points ──farthest points──▶ G centres ──nearest M──▶ groups ──point transformer──▶ h (G, C)
    pixels ──three nearest centres──▶ near (H*W, 3) and share (H*W, 3), the weights of inverse-distance interpolation

What is returned is that: the groups' features, and for every pixel which groups it listens to and how much. Features
per pixel, sum_i share_i h_near_i, up to 1152 x H x W numbers, are never built: interpolation and pooling are one sparse
product (`patch_features`), so a part takes 5 MB instead of 230.

"Multimodal Industrial Anomaly Detection via Hybrid Fusion" (M3DM), Sec. 3.2, point feature alignment; three centres and
squared distances as its released program has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import ConfigError, DataError
from ..geometry.interpolation import LinearMap, interpolation_weights, pool_pixels
from ..geometry.neighbours import group, nearest_neighbours
from ..geometry.sampling import RELEASED_SKIP, farthest_points
from ..geometry.unit import to_unit_frame
from ..samples import Batch, Features, check_shapes
from .point_transformer import PointTransformer, Statistics
from .point_weights import DEFAULT_POINT_BACKBONE, load_point_transformer

__all__ = ["DEFAULT_POINT_BACKBONE", "PointBackbone", "patch_features", "patch_map"]

Frame = Literal["camera", "unit"]
Region = Literal["foreground", "valid"]
_MOST_GROUPS = 32_767  # their numbers are kept as int16


class PointBackbone(nn.Module):
    """Frozen point features of the parts of a batch.

    Attributes:
        name: As given.
        channels: C of the features.
        weights_source: Name, source and sha256 of the weights.
    """

    in_unit_frame: Tensor  # () bool

    def __init__(
        self,
        name: str = DEFAULT_POINT_BACKBONE,
        *,
        layers: Sequence[int] | None = None,
        groups: int = 1024,
        group_size: int = 128,
        weights: str = "auto",
        pretrained: bool = True,
        seed: int = 0,
        statistics: Statistics = "cloud",
        frame: Frame | None = None,
        region: Region = "foreground",
        neighbours: int = 3,
        released_sampling: bool = False,
    ) -> None:
        """Build the network and load its weights.

        Args:
            name: ``point_mae_small`` or ``point_mae`` (the published network).
            layers: Blocks whose outputs are joined, from 0; None: the network's own three.
            groups: G, centres per cloud.
            group_size: M, points per group.
            weights: ``"auto"``, a file or folder, or ``"random"``: untrained.
            pretrained: False builds only, because all tensors are about to be loaded from a model file.
            seed: Seeds the random initialisation, inside a fork of torch's RNG.
            statistics: Of the group encoder's norms, see `PointTransformer`.
            frame: None: the frame that the weights were trained for.
            region: Points of the part only, or all measured ones. A part whose foreground is empty uses all.
            neighbours: Centres that a pixel listens to.
            released_sampling: Leave points within 3 cm of the origin out of the centres, as the CUDA sampler does.

        Raises:
            ConfigError: a setting out of range, or an unknown name.
            WeightsError: the weights cannot be had, or do not fit.
        """
        super().__init__()
        if not 1 <= groups <= _MOST_GROUPS:
            raise ConfigError(f"`groups` of the point backbone must be in 1..{_MOST_GROUPS}, got {groups}")
        if group_size < 1 or neighbours < 1:
            raise ConfigError(
                f"`group_size` and `neighbours` of the point backbone must be at least 1, got {group_size} and "
                f"{neighbours}"
            )
        loaded = load_point_transformer(
            name, layers=layers, weights=weights, pretrained=pretrained, seed=seed, statistics=statistics
        )
        self.name, self.groups, self.group_size, self.neighbours = name, groups, group_size, neighbours
        self.network: PointTransformer = loaded.network
        self.weights_source = loaded.source
        # a buffer, so that a model file knows the frame of the weights that it holds
        self.register_buffer("in_unit_frame", torch.tensor((frame or loaded.frame) == "unit"))
        self.region = region
        if released_sampling and self.frame == "unit":
            raise ConfigError(
                f"`released_sampling` counts distances from the camera, but the weights of '{name}' "
                f"({loaded.source['source']}) see clouds moved to their centroid: set it to false, or take weights of "
                f"frame 'camera'"
            )
        self.skip = RELEASED_SKIP if released_sampling else None
        self.channels = self.network.channels
        self.requires_grad_(False)
        self.eval()

    @property
    def frame(self) -> Frame:
        """Where the network sees a cloud.

        ``"camera"``, metres as measured, as in the published programs; ``"unit"``, moved to its centroid and divided by
        its largest radius, in which `point_mae_small` was trained.
        """
        return "unit" if bool(self.in_unit_frame) else "camera"

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Features of the parts of a batch, each on its own.

        Returns:
            ``groups`` (B, G, C) float32; ``near`` (B, H*W, k) int16, groups that a pixel listens to, nearest first;
            ``share`` (B, H*W, k) float32, how much: sums to 1 on points, 0 elsewhere. All zeros for a part without a
            point. A cloud of fewer than G points repeats centres, one of fewer than M points repeats neighbours.

        Raises:
            DataError: the batch has no ``xyz``.
        """
        if "xyz" not in batch.images:
            raise DataError(f"part '{batch.ids[0]}' has no 'xyz'; the batch has {', '.join(batch.images) or 'nothing'}")
        return self.of_clouds(batch.images["xyz"], batch.valid, batch.foreground)

    def of_clouds(self, xyz: Tensor, valid: Tensor, foreground: Tensor | None = None) -> dict[str, Tensor]:
        """As `forward`, of clouds (B, 3, H, W) that need not come from a sensor; masks (B, H, W) bool."""
        check_shapes(xyz=(xyz, "B 3 H W"), valid=(valid, "B H W"))
        k, frame = self.neighbours, self.frame
        B, pixels = len(xyz), valid[0].numel()
        near = torch.zeros(B, pixels, k, dtype=torch.int16, device=xyz.device)
        share = torch.zeros(B, pixels, k, device=xyz.device)
        counted = self._region(valid, foreground).flatten(1)  # B H*W
        groups, centres, used = [], [], []
        for b in range(B):
            points = xyz[b].flatten(1).T[counted[b]].contiguous()  # N 3
            if len(points) == 0:
                continue
            points = to_unit_frame(points[None])[0] if frame == "unit" else points
            own_groups, own_centres = self._group(points)
            index, weight = interpolation_weights(points[None], own_centres[None], neighbours=k)
            found = index.shape[-1]  # fewer than k where G < k
            near[b, counted[b], :found] = index[0].to(torch.int16)
            share[b, counted[b], :found] = weight[0].float()
            groups.append(own_groups)
            centres.append(own_centres)
            used.append(b)
        features = xyz.new_zeros(B, self.groups, self.channels)
        if used:
            with torch.autocast(xyz.device.type, enabled=False):  # halves would round metres to the size of a group
                features[used] = self.network(torch.stack(groups), torch.stack(centres)).to(features.dtype)
        return {"groups": features, "near": near, "share": share}

    def settings(self) -> dict[str, Any]:
        """All that decides what `forward` returns, beside the network's tensors."""
        return {
            "name": self.name,
            "layers": self.network.layers,
            "statistics": self.network.encoder.statistics,
            "groups": self.groups,
            "group_size": self.group_size,
            "neighbours": self.neighbours,
            "frame": self.frame,
            "region": self.region,
            "skip": self.skip,
        }

    def train(self, mode: bool = True) -> PointBackbone:
        """Stay in eval mode whatever `mode` says."""
        super().train(False)
        return self

    def extra_repr(self) -> str:
        """Name, grouping and origin of the weights, for printing."""
        return (
            f"'{self.name}', groups={self.groups}, group_size={self.group_size}, frame='{self.frame}', "
            f"weights={self.weights_source['source']}"
        )

    def _region(self, valid: Tensor, foreground: Tensor | None) -> Tensor:
        """The pixels (B, H, W) whose points are used."""
        if self.region == "valid" or foreground is None:
            return valid
        part = valid & foreground
        return torch.where(part.flatten(1).any(1)[:, None, None], part, valid)

    def _group(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Groups (G, M, 3) minus their centres, and centres (G, 3), of one cloud (N, 3)."""
        chosen = farthest_points(points[None], self.groups, skip_squared_norm=self.skip, allow_repeats=True)
        centres = points[chosen[0]]  # G 3
        found = nearest_neighbours(centres[None], points[None], min(self.group_size, len(points)))
        rows = found.rows  # 1 G k
        if rows.shape[-1] < self.group_size:  # a small cloud: its points go round again
            rows = rows[..., torch.arange(self.group_size, device=rows.device) % rows.shape[-1]]
        return group(points[None], centres[None], rows)[0], centres


def patch_map(features: Features, size: tuple[int, int], grid: tuple[int, int], *, window: int = 3) -> LinearMap:
    """From the groups of `PointBackbone` to patches: interpolate to the pixels, average, pool; one sparse matrix.

    Args:
        features: `near` and `share` of `PointBackbone.forward`.
        size: H, W of the image.
        grid: h, w of the patches; coarser or finer than the image.
        window: Side of the windows that are averaged before pooling, 1 for none (M3DM 3).

    Returns:
        The map from (B, G, C) to (B, h*w, C), row-major. A patch's weights add up to the share of its window that holds
        points: 1 inside the part, 0 in the background.
    """
    near, share = features["near"], features["share"]
    return pool_pixels(near.long(), share, features["groups"].shape[1], size, grid, window=window)


def patch_features(features: Features, size: tuple[int, int], grid: tuple[int, int], *, window: int = 3) -> Tensor:
    """Patch features (B, h*w, C) of `PointBackbone.forward`'s result; see `patch_map`."""
    return patch_map(features, size, grid, window=window).apply(features["groups"])
