"""RGB and point features of registered parts: the two frozen extractors that M3DM, CMDIAD and CFM share.

An image backbone sees RGB, a point transformer sees the cloud. What they return is stored small: the image's own
feature grid, and the features of point groups with the weights that lead from them to pixels. Patches on any grid are
made from that when they are needed, by one sparse product (points) and one resize (RGB).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..backbones.image import ImageBackbone
from ..backbones.point_transformer import Statistics
from ..backbones.points import PointBackbone, patch_features
from ..errors import ConfigError
from ..geometry.interpolation import LinearMap, enlarge_at, pool_pixels_at
from ..samples import Batch, Features
from .patches import join_stages

Grid = tuple[int, int]
Resize = Literal["pool", "bilinear"]

PAPER_EXTRACTOR: dict[str, Any] = {
    "backbone": "vit_base_patch8_224.dino",
    "reductions": (8,),
    "point_backbone": "point_mae",
}
"""The extractors of the papers of M3DM, CMDIAD and CFM, as their settings name them."""


class RGBPoints(nn.Module):
    """The frozen extractors of RGB (``rgb``) and points (``xyz``), or one of them.

    Attributes:
        channels: Modality -> channels of its patches.
    """

    def __init__(self, rgb: ImageBackbone | None, xyz: PointBackbone | None) -> None:
        super().__init__()
        self.rgb = rgb
        self.xyz = xyz
        self.channels: dict[str, int] = {}
        if rgb is not None:
            self.channels["rgb"] = sum(rgb.channels)
        if xyz is not None:
            self.channels["xyz"] = xyz.channels

    @property
    def sources(self) -> dict[str, dict[str, str]]:
        """Modality -> name, source and sha256 of the weights."""
        both = {"rgb": self.rgb, "xyz": self.xyz}
        return {name: dict(extractor.weights_source) for name, extractor in both.items() if extractor is not None}

    def settings(self, names: Sequence[str]) -> dict[str, Any]:
        """All that decides what `forward` returns for the modalities in `names`, beside the networks' tensors."""
        rgb, xyz = self.rgb if "rgb" in names else None, self.xyz if "xyz" in names else None
        said: dict[str, Any] = {"extractor": "RGBPoints"}
        if rgb is not None:
            said["rgb"] = {"name": rgb.name, "reductions": rgb.reductions, "channels": rgb.channels}
        if xyz is not None:
            said["xyz"] = xyz.settings()
        return said

    def forward(self, batch: Batch, names: Sequence[str] = ("rgb", "xyz")) -> dict[str, Tensor]:
        """Features of the modalities in `names`, flat, batch first.

        ``rgb.grid`` (B, C, h, w), the joined stages of the image backbone; ``xyz.groups``, ``xyz.near`` and
        ``xyz.share`` as `PointBackbone`; ``valid`` and ``foreground`` (B, H, W) bool.
        """
        features = {"valid": batch.valid, "foreground": batch.foreground}
        if "rgb" in names and self.rgb is not None:
            features["rgb.grid"] = self.image_grid(batch.images["rgb"])
        if "xyz" in names and self.xyz is not None:
            features |= {f"xyz.{name}": x for name, x in self.xyz(batch).items()}
        return features

    def image_grid(self, rgb: Tensor) -> Tensor:
        """Features (B, C, h, w) of images (B, 3, H, W) in 0..1: a transformer's tokens, or joined stages of a CNN."""
        assert self.rgb is not None
        stages = self.rgb(rgb)
        return (stages[0] if len(stages) == 1 else join_stages(stages, None)).float()


def image_backbone(
    name: str, reductions: Sequence[int], weights: str, pretrained: bool, seed: int, blocks: int | None = None
) -> ImageBackbone:
    """The image backbone of these methods; of a plain vision transformer the normed tokens, as they use DINO.

    `blocks`: how many of its first blocks are kept, see `ImageBackbone`.

    Raises:
        ConfigError: `blocks` of another network, whose blocks these methods do not count.
    """
    if blocks is not None and not is_plain_vit(name):
        raise ConfigError(f"`blocks` is for transformers on one grid (vit_...), '{name}' is none: leave it None")
    return ImageBackbone(
        name,
        reductions=reductions,
        weights=weights,
        pretrained=pretrained,
        seed=seed,
        final_norm=is_plain_vit(name),
        blocks=blocks,
    )


class ExtractorConfig(Protocol):
    """The settings of `build_extractor`, as the configs of these methods name them."""

    @property
    def backbone(self) -> str: ...
    @property
    def reductions(self) -> tuple[int, ...]: ...
    @property
    def weights(self) -> str: ...
    @property
    def point_backbone(self) -> str: ...
    @property
    def point_weights(self) -> str: ...
    @property
    def groups(self) -> int: ...
    @property
    def group_size(self) -> int: ...
    @property
    def statistics(self) -> Statistics: ...
    @property
    def modalities(self) -> tuple[str, ...]: ...
    @property
    def seed(self) -> int: ...


def build_extractor(
    config: ExtractorConfig,
    layers: Sequence[int] | None,
    *,
    pretrained: bool,
    blocks: int | None = None,
    released_sampling: bool = False,
) -> RGBPoints:
    """The extractors that a method's settings ask for, those of its `modalities` only.

    Args:
        config: Of the method.
        layers: Blocks of the point network whose outputs are joined; None: the network's own.
        pretrained: False builds only, because all tensors are about to be loaded from a model file.
        blocks: Blocks of the image network that are kept, see `ImageBackbone`.
        released_sampling: See `PointBackbone`.
    """
    c, rgb, xyz = config, None, None
    if "rgb" in c.modalities:
        rgb = image_backbone(c.backbone, c.reductions, c.weights, pretrained, c.seed, blocks)
    if "xyz" in c.modalities:
        xyz = PointBackbone(
            c.point_backbone,
            layers=layers,
            groups=c.groups,
            group_size=c.group_size,
            weights=c.point_weights,
            pretrained=pretrained,
            seed=c.seed,
            statistics=c.statistics,
            released_sampling=released_sampling,
        )
    return RGBPoints(rgb, xyz)


def is_plain_vit(name: str) -> bool:
    """Whether this is one of timm's plain vision transformers (``vit_...``), whose final norm these methods keep."""
    return name.partition(".")[0].startswith("vit_")


def rgb_patches(features: Features, grid: Grid, how: Resize = "pool") -> Tensor:
    """RGB patches (B, h*w, C), row-major, from the image's own grid.

    Args:
        features: With ``rgb.grid``.
        grid: h, w.
        how: ``"pool"``: adaptive mean, which repeats cells when the grid grows by a whole factor (M3DM, CMDIAD);
            ``"bilinear"`` (CFM).
    """
    x = features["rgb.grid"]
    if x.shape[-2:] != torch.Size(grid):
        if how == "pool" and not (grid[0] % x.shape[2] or grid[1] % x.shape[3]):
            rows, columns = (
                torch.arange(g, device=x.device) // (g // n) for g, n in zip(grid, x.shape[-2:], strict=True)
            )
            return x.permute(0, 2, 3, 1)[:, rows[:, None], columns].flatten(1, 2)  # the adaptive mean, copied by rows
        if how == "pool":
            x = F.adaptive_avg_pool2d(x, grid)
        else:
            x = F.interpolate(x, size=grid, mode="bilinear", align_corners=False)
    return x.flatten(2).mT


def point_patches(features: Features, grid: Grid, window: int = 3, name: str = "xyz") -> Tensor:
    """Point patches (B, h*w, C), row-major; exactly zero where a patch's window holds no point."""
    size = (int(features["valid"].shape[-2]), int(features["valid"].shape[-1]))
    own = {key: features[f"{name}.{key}"] for key in ("groups", "near", "share")}
    return patch_features(own, size, grid, window=window)


def point_grid(features: Features, grid: Grid, name: str = "xyz") -> Tensor:
    """`point_patches` as a map (B, C, h, w)."""
    return point_patches(features, grid, name=name).mT.unflatten(2, grid)


def groups_on_grid(grid: Tensor, counted: Tensor, neighbours: int = 3) -> dict[str, Tensor]:
    """A map (B, C, h, w) in the form of `PointBackbone`'s features: one group per cell, near the pixels in it.

    Args:
        grid: Features, for instance hallucinated ones.
        counted: (B, H, W) bool, pixels that listen to their cell; the others have share 0.
        neighbours: Slots per pixel; only the first is used.
    """
    (h, w), (B, H, W) = grid.shape[-2:], counted.shape
    row = torch.arange(H, device=grid.device) * h // H
    column = torch.arange(W, device=grid.device) * w // W
    cell = (row[:, None] * w + column).flatten()  # H*W
    near = torch.zeros(B, H * W, neighbours, dtype=torch.int32, device=grid.device)  # 16 bits end at 181 x 181 cells
    share = torch.zeros(B, H * W, neighbours, device=grid.device)
    near[..., 0] = cell.to(torch.int32)
    share[..., 0] = counted.flatten(1).float()
    return {"groups": grid.flatten(2).mT.contiguous(), "near": near, "share": share}


def rgb_pixels(features: Features, pixels: Tensor) -> LinearMap:
    """The map from a part's own grid cells (1, h*w, D) to some pixels (1, P, D), bilinear, as `rgb_patches`.

    Args:
        features: With ``rgb.grid`` and ``valid``.
        pixels: (P,) int64, ``row * W + column``.
    """
    (h, w), (H, W) = features["rgb.grid"].shape[-2:], features["valid"].shape[-2:]
    return enlarge_at((h, w), (H, W), pixels)


def point_pixels(features: Features, part: int, pixels: Tensor, window: int = 3) -> LinearMap:
    """The map from one part's groups (1, G, D) to some pixels (1, P, D), as `point_patches` on the grid of pixels."""
    size = (int(features["valid"].shape[-2]), int(features["valid"].shape[-1]))
    near, share, columns = features["xyz.near"][part], features["xyz.share"][part], features["xyz.groups"].shape[1]
    return pool_pixels_at(near, share, columns, size, size, pixels, window=window)


def measured_patches(features: Features, grid: Grid, window: int = 3) -> Tensor:
    """Where a patch's window holds a point, (B, h*w) bool; the patches whose point features are not zero."""
    pixels = (features["xyz.share"].sum(-1) > 0).float()  # B H*W
    image = pixels.view(len(pixels), 1, *features["valid"].shape[-2:])
    means = F.avg_pool2d(image, window, stride=1)
    return F.adaptive_avg_pool2d(means, grid).flatten(1) > 0
