"""Back to the Feature (BTF): PatchCore on hand-made 3D features, alone or joined with those of an image network.

Horwitz and Hoshen, "Back to the Feature: Classical 3D Features are (Almost) All You Need for 3D Anomaly Detection"
(CVPR-W 2023). Every feature of the paper's table is brought to one grid of cells, f_v for feature v and cell p:

    f_p  = [f_vp / s_v for all v]                 one vector per cell; s_v = 1, or its spread on good parts        (1)
    M    memory bank: greedy k-centre coreset of all f_p of the training parts, (K, C)

    d_p  = |f_p - M_k|, k the nearest row                                                                          (2)
    map  = blur(up(d_p))                                                                                           (3)
    s    = mean of the map's largest 1 %, or its max, or w d of the worst cell                                     (4)
    d_mp = sum over the features v of modality m of |(f_p - M_k)_v|^2 / d_p,  so that  sum_m d_mp = d_p            (5)

s_v is the root mean squared distance of a training cell's f_v to their mean, so that with it every feature has the same
say, however many numbers it has. Eqs. 1-4 with s_v = 1 are the paper's and its code's; Eq. 5, which tells the
modalities' shares in the map, is ours. Differs from the code by what the preset ``paper`` switches back: cells without
a measured pixel are left out, FPFH takes every second row and column of points, maps are not cut to 8 bits, the score
looks at more than one cell; and by an exact coreset. The normals' signs, on which FPFH depends, are those of the code's
solver (`estimate_normals`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..backbones.image import ImageBackbone
from ..backbones.modalities import modality_image
from ..errors import DataError
from ..geometry.descriptors import CELL, dense_sift, hog, raw_blocks, raw_rows
from ..geometry.fpfh import estimate_normals, fpfh
from ..geometry.interpolation import points_to_patches
from ..geometry.padding import pack_points
from ..layers.maps import MapMoments, top_mean
from ..layers.memory import MemoryBank, Reweighting
from ..layers.patches import counting_cells, join_stages, match_patches, pool_to_grid, worst_patch
from ..layers.smoothing import Blur, smooth
from ..samples import Batch, Features, Prediction, is_geometric
from .contract import Detector, Observe, Stage, require

_require = partial(require, "BTF")
Feature = Literal["raw", "raw_blocks", "hog", "sift", "fpfh", "depth_inet", "rgb_inet"]
NETWORK: tuple[Feature, ...] = ("rgb_inet", "depth_inet")  # features of the image network


@dataclass(frozen=True, kw_only=True)
class BTFConfig:
    """Settings of `BTF`; the paper's choices, but for a backbone whose weights need no download, and Eqs. 3-4."""

    features: tuple[Feature, ...] = ("rgb_inet", "fpfh")  # joined in this order; the paper's BTF is these two
    depth_from: Literal["xyz", "depth"] = (
        "xyz"  # image of raw, hog, sift, depth_inet: z of the cloud, or prepared depth
    )
    grid: int = 28  # cells per side; 28 for the paper's 224 pixels
    backbone: str = "efficientnet_lite0"  # timm name; the paper's WideResNet-50: see preset `paper`
    weights: str = "auto"  # where its weights come from: see `ImageBackbone`
    reductions: tuple[int, ...] = (8, 16)  # pixels per feature cell of the stages that are joined
    k_normal: int = 30  # nearest points that a normal is fitted to, the point included
    k_fpfh: int = 100  # nearest points that a histogram counts, the point included
    radius_normal: float = 0.10  # m, neighbours lie within; as the code has it, wider than most parts: `k_normal` binds
    radius_fpfh: float = 0.25  # m, likewise
    points: Literal["valid", "foreground"] = "valid"  # FPFH of all measured points, or of those on the part
    point_step: int = (
        2  # pixels between the rows and columns whose points are taken; the paper's 1: four times the time
    )
    coreset_ratio: float = 0.1  # share of the training cells that the bank keeps, above 0, at most 1 (1: all)
    bank_limit: int | None = 4_000  # most cells that the bank keeps; bounds the time per part; None: no limit
    eps: float = 0.9  # distortion of the random projection in which the coreset is chosen, between 0 and 1
    start: int = 0  # training cell that the coreset starts from
    max_gib: float = 4.0  # most memory for collected cells; beyond it a random sample of them, with a warning
    scale_fusion: Literal["none", "std"] = "none"  # Eq. 1: features as they are (paper), or each over its spread
    image_score: Literal["top_mean", "max_map", "reweighted"] = "top_mean"  # Eq. 4: of the map, or of the worst cell
    top_share: float = 0.01  # top_mean: share of the map's pixels, the largest ones, whose mean is the image score
    reweight: Reweighting = "btf"  # w of the worst cell: without or with its match, or w = 1
    n_reweight: int = 3  # rows of the bank around the match that w looks at, the match included
    blur: Blur = "gaussian"  # of the maps; pil: the 8-bit blur of the code
    blur_sigma: float = 4.0  # pixels
    mask_invalid: bool = True  # cells without any 3D point: out of the bank, and scored as average
    foreground_only: bool = False  # likewise cells off the part
    seed: int = 0  # of the projection, of the sample if there are too many cells, of random weights

    def __post_init__(self) -> None:
        known = get_args(Feature)
        _require(len(self.features) >= 1, "features", "one or more names", self.features)
        _require(set(self.features) <= set(known), "features", f"names out of {', '.join(known)}", self.features)
        _require(len(set(self.features)) == len(self.features), "features", "different names", self.features)
        choices: dict[str, tuple[str, ...]] = {
            "depth_from": ("xyz", "depth"),
            "points": ("valid", "foreground"),
            "scale_fusion": ("none", "std"),
            "image_score": ("top_mean", "max_map", "reweighted"),
            "reweight": get_args(Reweighting),
            "blur": get_args(Blur),
        }
        for field, allowed in choices.items():
            _require(getattr(self, field) in allowed, field, f"one of {', '.join(allowed)}", getattr(self, field))
        for field in ("grid", "bank_limit", "point_step", "n_reweight"):
            value = getattr(self, field)
            _require(value is None or value >= 1, field, "at least 1", value)
        _require(self.k_normal >= 3, "k_normal", "at least 3", self.k_normal)
        _require(self.k_fpfh >= 2, "k_fpfh", "at least 2", self.k_fpfh)
        for field in ("radius_normal", "radius_fpfh", "max_gib"):
            _require(getattr(self, field) > 0, field, "above 0", getattr(self, field))
        _require(0 < self.coreset_ratio <= 1, "coreset_ratio", "above 0 and at most 1", self.coreset_ratio)
        _require(0 < self.eps < 1, "eps", "between 0 and 1", self.eps)
        _require(self.start >= 0, "start", "0 or more", self.start)
        _require(0 < self.top_share <= 1, "top_share", "above 0 and at most 1", self.top_share)
        _require(self.blur_sigma >= 0, "blur_sigma", "0 or more pixels", self.blur_sigma)

    @property
    def modalities(self) -> tuple[str, ...]:
        """The views that `features` are made of."""
        return tuple(dict.fromkeys(self.modality_of(name) for name in self.features))

    def modality_of(self, feature: Feature) -> str:
        """The view that a feature is made of."""
        if feature == "rgb_inet":
            return "rgb"
        return "xyz" if feature == "fpfh" else self.depth_from


class BTF(Detector):
    """Score a cell by its distance to the nearest cell of good parts, in joined image and point features.

    Features: ``"<feature>.cells"``, (B, C, grid, grid), and ``valid`` and ``foreground``, (B, H, W) bool. Branch maps
    are the shares of the modalities in the map (Eq. 5), in its unit; blurred in 8 bits they add up to it but roughly.
    """

    Config = BTFConfig
    PRESETS = {
        "paper": {
            "backbone": "wide_resnet50_2.racm_in1k",
            "point_step": 1,
            "bank_limit": None,
            "max_gib": 16.0,
            "image_score": "reweighted",
            "blur": "pil",
            "mask_invalid": False,
        },
        "fast": {"bank_limit": 1_000},
    }
    PREPARATION = {"": "cloud", "fast": "cloud", "paper": "btf"}
    frozen = ("backbone",)
    scale: Tensor  # s_v of Eq. 1, (features,)
    level: Tensor  # mean share of each modality in the distances of held-out cells, (modalities,) float64

    def __init__(self, config: BTFConfig, *, pretrained: bool = True) -> None:
        super().__init__(config)
        self.backbone: nn.Module = nn.Identity()  # where no feature needs a network
        if any(name in NETWORK for name in config.features):
            self.backbone = ImageBackbone(
                config.backbone,
                reductions=config.reductions,
                weights=config.weights,
                pretrained=pretrained,
                seed=config.seed,
            )
        self.bank = MemoryBank(
            " + ".join(config.features),
            ratio=config.coreset_ratio,
            limit=config.bank_limit,
            eps=config.eps,
            start=config.start,
            seed=config.seed,
            max_bytes=int(config.max_gib * 2**30),
        )
        self.register_buffer("scale", torch.ones(len(config.features)))
        self.register_buffer("level", torch.zeros(len(config.modalities), dtype=torch.float64))
        self._spreads = [MapMoments() for _ in config.features]
        self._shares = MapMoments()

    def modality_of(self, feature: str) -> str:
        """The modality that a feature is made from: ``"fpfh.cells"`` is made from ``"xyz"``."""
        name = feature.partition(".")[0]
        return self.config.modality_of(name) if name in self.config.features else ""

    def extract(self, batch: Batch) -> Features:
        """Cells of every feature."""
        cells = self._network_cells(batch)
        for name in self.config.features:
            if name == "fpfh":
                cells[name] = self._fpfh_cells(batch)
            elif name not in NETWORK:
                cells[name] = self._image_cells(name, self._depth_image(batch))
        features = {f"{name}.cells": cells[name].float() for name in self.config.features}
        return {**features, "valid": batch.valid, "foreground": batch.foreground}

    def extraction_settings(self) -> dict[str, Any]:
        """How cells are made; banks and scores of other settings share them."""
        c = self.config
        said = ("depth_from", "grid", "reductions", "k_normal", "k_fpfh", "radius_normal", "radius_fpfh", "points")
        made = {field: getattr(c, field) for field in (*said, "point_step", "backbone")}
        return {"detector": "BTF", "features": sorted(c.features), **made}

    def stages(self) -> Sequence[Stage]:
        """Measure the features' spread if asked to, fill the bank, then measure its level on validation parts."""
        stages: list[Stage] = []
        if self.config.scale_fusion == "std":
            stages.append(Observe(name="scales", update=self._see_spread, finish=self._set_scale))
        stages.append(Observe(name="bank", update=self._see_cells, finish=self.bank.build))
        stages.append(Observe(name="levels", update=self._see_distances, finish=self._set_levels, split="validation"))
        return stages

    def score(self, features: Features) -> Prediction:
        """Map and score of Eqs. 2-4; a cell that does not count is average."""
        c = self.config
        cells, counts = self._cells(features), self._counts(features)
        distances, matches = match_patches(self.bank, cells, counts)  # Eq. 2
        shares = self._modality_shares(features, cells, distances, matches)  # B m h w
        shares = torch.where(counts[:, None], shares, self.level.to(shares)[:, None, None])
        size = features["valid"].shape[-2:]
        fused = smooth(_enlarge(distances[:, None], size)[:, 0], c.blur, c.blur_sigma)  # Eq. 3
        branches = {
            name: smooth(share, c.blur, c.blur_sigma)
            for name, share in zip(self.modalities, _enlarge(shares, size).unbind(1))
        }
        if c.image_score == "reweighted":  # Eq. 4
            score = worst_patch(
                self.bank, cells, distances, matches, counts, form=c.reweight, scaled=True, n=c.n_reweight
            )
        else:
            score = top_mean(fused, c.top_share if c.image_score == "top_mean" else 0.0)
        return Prediction(score=score, map=fused, branch_maps=branches)

    # -- features ----------------------------------------------------------------------------------------------------

    def _network_cells(self, batch: Batch) -> dict[str, Tensor]:
        """Cells of RGB and depth from one pass of the network."""
        names = [name for name in self.config.features if name in NETWORK]
        if not names:
            return {}
        assert isinstance(self.backbone, ImageBackbone)
        images = []
        for name in names:
            if self.config.modality_of(name) == "xyz":  # metres, as they are: the code does not normalise them
                images.append(self._depth_image(batch).expand(-1, 3, -1, -1))
            else:
                image = modality_image(batch, self.config.modality_of(name))
                images.append((image - self.backbone.mean) / self.backbone.std)
        stages = [stage.chunk(len(names)) for stage in self.backbone.features(torch.cat(images))]
        return {name: join_stages([stage[i] for stage in stages], self.config.grid) for i, name in enumerate(names)}

    def _depth_image(self, batch: Batch) -> Tensor:
        """(B, 1, H, W): z in metres, 0 where not measured, or the prepared depth."""
        image = batch.images[self.config.depth_from]
        return torch.where(batch.valid[:, None], image[:, 2:], 0) if self.config.depth_from == "xyz" else image

    def _image_cells(self, name: Feature, image: Tensor) -> Tensor:
        """Cells (B, C, grid, grid) of a descriptor of the depth image (B, 1, H, W)."""
        grid = self.config.grid
        if name == "sift":
            return pool_to_grid(dense_sift(image), grid)
        side = grid * CELL  # the pixels of 8 x 8 cells; 224 for the code's grid of 28
        sized = image if image.shape[-2:] == (side, side) else F.interpolate(image, size=(side, side), mode="nearest")
        return {"raw": raw_rows, "raw_blocks": raw_blocks, "hog": hog}[name](sized)

    def _fpfh_cells(self, batch: Batch) -> Tensor:
        """(B, 33, grid, grid): histograms of the points, 0 elsewhere, averaged in 3 x 3 windows and over cells."""
        c, step = self.config, self.config.point_step
        wanted = batch.valid if c.points == "valid" else batch.valid & batch.foreground
        xyz, wanted = batch.images["xyz"][..., ::step, ::step], wanted[:, ::step, ::step]
        size = (xyz.shape[2], xyz.shape[3])
        cells = xyz.new_zeros(len(xyz), 33, c.grid, c.grid)
        for b in torch.nonzero(wanted.flatten(1).any(1))[:, 0].tolist():  # one by one: clouds differ in size
            cloud = pack_points(xyz[b : b + 1], wanted[b : b + 1])
            normals = estimate_normals(cloud.points, radius=c.radius_normal, max_neighbours=c.k_normal, sign="solver")
            histograms = fpfh(cloud.points, normals, radius=c.radius_fpfh, max_neighbours=c.k_fpfh)  # 1 N 33
            pooling = points_to_patches(cloud.pixels, size, (c.grid, c.grid))
            cells[b] = pooling.apply(histograms)[0].T.view(33, c.grid, c.grid)
        return cells

    # -- cells -------------------------------------------------------------------------------------------------------

    def _cells(self, features: Features) -> Tensor:
        """Joined cells (B, h, w, C), Eq. 1."""
        parts = [features[f"{name}.cells"] / s for name, s in zip(self.config.features, self.scale)]
        return torch.cat(parts, dim=1).permute(0, 2, 3, 1)

    def _counts(self, features: Features) -> Tensor:
        """Where cells count, (B, h, w) bool."""
        measured = self.config.mask_invalid and any(is_geometric(name) for name in self.modalities)
        grid = (self.config.grid, self.config.grid)
        return counting_cells(features, grid, measured=measured, on_part=self.config.foreground_only)

    def _modality_shares(self, features: Features, cells: Tensor, distances: Tensor, matches: Tensor) -> Tensor:
        """Eq. 5, (B, modalities, h, w); 0 where the distance is."""
        squared = (cells - self.bank.vectors[matches]).square()  # B h w C
        parts = squared.split([features[f"{name}.cells"].shape[1] for name in self.config.features], dim=-1)
        total = cells.new_zeros(len(self.modalities), *distances.shape)
        for name, part in zip(self.config.features, parts):
            total[self.modalities.index(self.config.modality_of(name))] += part.sum(-1)
        return torch.where(distances > 0, total / distances, 0).transpose(0, 1)

    # -- fitting -----------------------------------------------------------------------------------------------------

    def _see_spread(self, features: Features) -> None:
        counts = self._counts(features)[:, None]
        for name, moments in zip(self.config.features, self._spreads):
            maps = features[f"{name}.cells"]
            moments.add(maps, counts.expand_as(maps))

    def _set_scale(self) -> None:
        for index, (name, moments) in enumerate(zip(self.config.features, self._spreads)):
            _, _, std = moments.take()  # per channel
            spread = float(std.square().sum().sqrt())
            if not spread > 0:
                raise DataError(f"the feature '{name}' does not vary over the training parts: it cannot be scaled")
            self.scale[index] = spread

    def _see_cells(self, features: Features) -> None:
        self.bank.add(self._cells(features)[self._counts(features)])

    def _see_distances(self, features: Features) -> None:
        cells, counts = self._cells(features), self._counts(features)
        if bool(counts.any()):
            distances, matches = match_patches(self.bank, cells, counts)
            self.bank.observe(distances[counts])
            shares = self._modality_shares(features, cells, distances, matches)
            self._shares.add(shares, counts[:, None].expand_as(shares))

    def _set_levels(self) -> None:
        self.bank.set_level()
        self.level.copy_(self._shares.take()[1])


def _enlarge(maps: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)
