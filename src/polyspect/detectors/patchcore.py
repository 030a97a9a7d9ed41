"""PatchCore on any image-like modality, or several: how far is each patch from the patches of good parts?

Roth et al., "Towards Total Recall in Industrial Anomaly Detection" (CVPR 2022), as Horwitz and Hoshen, "Back to the
Feature" (BTF, CVPR-W 2023) run it on modalities other than RGB. For modality m and patch p of the grid h x w:

    f_mp  features of the backbone's stages, averaged over 3 x 3 neighbours and joined      (C,)
    M_m   memory bank: greedy k-centre coreset of all f_mp of the training parts            (K_m, C)

    d_mp = min over k of |f_mp - M_mk|                                                 (1)  BTF Sec. 3, PatchCore Eq. 6
    z_mp = (d_mp - mu_m) / sd_m            mu, sd over the patches of validation parts  (2)
    map  = sum_m blur(up(z_mp))            or the largest instead of the sum            (3)
    s    = mean of the map's largest 1 %, or its max, or w_m d_m of the worst patch, joined as the map is  (4)  Eq. 7

With one bank (one modality, or ``fusion="concat"``: BTF's joined features) map and score keep the unit of d; Eq. 2 then
serves the branch map only. Differs from the sources by Eqs. 2-3, which let modalities of different scale be added, by
leaving unmeasured patches out (`mask_invalid`), and by an exact coreset (the codes use half precision on a GPU).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..backbones.image import ImageBackbone
from ..backbones.modalities import modality_features
from ..errors import DataError
from ..layers.maps import MapMoments, top_mean
from ..layers.memory import MemoryBank, Reweighting
from ..layers.patches import counting_cells, join_stages, match_patches, worst_patch
from ..layers.smoothing import smooth
from ..samples import Batch, Features, Prediction, is_geometric
from .contract import Detector, Observe, Stage, require, require_views

_require = partial(require, "PatchCore")
JOINED = "joined"  # the name of the bank over joined features


@dataclass(frozen=True, kw_only=True)
class PatchCoreConfig:
    """Settings of `PatchCore`; PatchCore's own choices, but for a backbone whose weights need no download."""

    modalities: tuple[str, ...] = ("rgb", "normals")  # any image-like ones; one bank each, or one for all (`fusion`)
    backbone: str = "efficientnet_lite0"  # timm name; PatchCore Sec. 4: WideResNet-50, see preset `paper`
    weights: str = "auto"  # where its weights come from: see `ImageBackbone`
    reductions: tuple[int, ...] = (8, 16)  # pixels per cell of the stages that are joined, PatchCore Sec. 3.1
    grid: int | None = None  # None: grid of the finest stage; a number: pooled to grid x grid cells as BTF does (28)
    coreset_ratio: float = 0.1  # share of the training patches that a bank keeps, above 0, at most 1 (1: all)
    bank_limit: int | None = 4_000  # most patches that a bank keeps; bounds the time per part; None: no limit
    eps: float = 0.9  # distortion of the random projection in which the coreset is chosen, between 0 and 1
    start: int = 0  # training patch that the coreset starts from
    max_gib: float = 4.0  # most memory for collected patches; beyond it a random sample of them, with a warning
    fusion: Literal["normalised_sum", "max", "concat"] = "normalised_sum"  # of modalities: Eq. 3, or BTF's joined bank
    scale_fusion: Literal["none", "std"] = "none"  # concat: features as they are (BTF), or each modality over its std
    image_score: Literal["top_mean", "max_map", "reweighted"] = "top_mean"  # Eq. 4: of the map, or of the worst patch
    top_share: float = 0.01  # top_mean: share of the map's pixels, the largest ones, whose mean is the image score
    reweight: Reweighting = "btf"  # w of the worst patch: without or with its match, or w = 1
    reweight_scaled: bool = True  # divide distances by sqrt(C) in w, as BTF's code; False: as PatchCore Eq. 7
    n_reweight: int = 3  # bank patches around the match that w looks at, the match included
    blur: Literal["gaussian", "pil", "none"] = "gaussian"  # of the maps; pil: the 8-bit blur of BTF's code
    blur_sigma: float = 4.0  # pixels, PatchCore Sec. 3.3
    mask_invalid: bool = True  # patches without any 3D point: out of geometric banks, and scored as average
    foreground_only: bool = False  # likewise patches off the part, for every modality
    seed: int = 0  # of the projection, of the sample if there are too many patches, of random weights

    def __post_init__(self) -> None:
        require_views("PatchCore", self.modalities)
        for field in ("bank_limit", "grid", "n_reweight"):
            value = getattr(self, field)
            _require(value is None or value >= 1, field, "at least 1", value)
        _require(0 < self.coreset_ratio <= 1, "coreset_ratio", "above 0 and at most 1", self.coreset_ratio)
        _require(0 < self.eps < 1, "eps", "between 0 and 1", self.eps)
        _require(self.start >= 0, "start", "0 or more", self.start)
        _require(self.max_gib > 0, "max_gib", "above 0", self.max_gib)
        _require(0 < self.top_share <= 1, "top_share", "above 0 and at most 1", self.top_share)
        _require(self.blur_sigma >= 0, "blur_sigma", "0 or more pixels", self.blur_sigma)


class PatchCore(Detector):
    """Score a patch by its distance to the nearest patch of good parts, per modality.

    Features: ``"<modality>.patches"``, (B, C, h, w), and ``valid`` and ``foreground``, (B, H, W) bool. Branch maps are
    the banks' smoothed maps in standard deviations (Eq. 2): one per modality, or one named ``joined``.
    """

    Config = PatchCoreConfig
    PRESETS = {
        "paper": {
            "modalities": ("rgb",),
            "backbone": "wide_resnet50_2.tv_in1k",
            "grid": 28,
            "bank_limit": None,
            "max_gib": 16.0,
            "image_score": "reweighted",
            "blur": "pil",
        },
        "fast": {"bank_limit": 1_000},
    }
    PREPARATION = {"paper": "btf"}
    frozen = ("backbone",)
    scale: Tensor  # what each modality's features are divided by in a joined bank

    def __init__(self, config: PatchCoreConfig, *, pretrained: bool = True) -> None:
        super().__init__(config)
        self.backbone = ImageBackbone(
            config.backbone,
            reductions=config.reductions,
            weights=config.weights,
            pretrained=pretrained,
            seed=config.seed,
        )
        joined = config.fusion == "concat" and len(config.modalities) > 1
        self.members: Mapping[str, tuple[str, ...]] = (
            {JOINED: config.modalities} if joined else {name: (name,) for name in config.modalities}
        )
        self.banks = nn.ModuleDict({name: self._bank(name) for name in self.members})
        self.register_buffer("scale", torch.ones(len(config.modalities)))

    def extract(self, batch: Batch) -> Features:
        """Patches of every modality, in one pass of the network."""
        features = {"valid": batch.valid, "foreground": batch.foreground}
        for name, maps in modality_features(self.backbone, batch, self.modalities).items():
            features[f"{name}.patches"] = join_stages(maps, self.config.grid).float()
        return features

    def stages(self) -> Sequence[Stage]:
        """Measure the scales for joining if asked to, fill the banks, then measure their level on validation parts."""
        stages: list[Stage] = []
        if JOINED in self.members and self.config.scale_fusion == "std":
            moments = {name: MapMoments() for name in self.modalities}
            see, finish = partial(self._see_scale, moments), partial(self._set_scale, moments)
            stages.append(Observe(name="scales", update=see, finish=finish))
        stages.append(Observe(name="banks", update=self._see_patches, finish=self._build))
        stages.append(Observe(name="levels", update=self._see_distances, finish=self._set_levels, split="validation"))
        return stages

    def named_banks(self) -> list[tuple[str, MemoryBank]]:
        """The banks by name: one per modality, or one named ``joined``."""
        return [(name, cast(MemoryBank, bank)) for name, bank in self.banks.items()]

    def score(self, features: Features) -> Prediction:
        """Map and score of Eqs. 1-4; a patch that was not measured counts as average."""
        size = features["valid"].shape[-2:]
        maps, scores = [], []
        for name, bank in self.named_banks():
            patches, measured = self._patches(features, name)
            distances, matches = match_patches(bank, patches, measured)  # Eq. 1
            large = F.interpolate(distances[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]
            maps.append(smooth(large, self.config.blur, self.config.blur_sigma))
            scores.append(
                worst_patch(
                    bank,
                    patches,
                    distances,
                    matches,
                    measured,
                    form=self.config.reweight,
                    scaled=self.config.reweight_scaled,
                    n=self.config.n_reweight,
                )
            )
        branches = {name: bank.standardise(m) for (name, bank), m in zip(self.named_banks(), maps)}  # Eq. 2
        if len(maps) == 1:
            fused, score = maps[0], scores[0]
        else:
            levelled = [bank.standardise(s) for (_, bank), s in zip(self.named_banks(), scores)]
            fused, score = self._fuse(list(branches.values())), self._fuse(levelled)  # Eq. 3
        if self.config.image_score != "reweighted":
            share = self.config.top_share if self.config.image_score == "top_mean" else 0.0
            score = top_mean(fused, share)  # Eq. 4
        return Prediction(score=score, map=fused, branch_maps=branches)

    def _fuse(self, values: list[Tensor]) -> Tensor:
        stacked = torch.stack(values)
        return stacked.amax(0) if self.config.fusion == "max" else stacked.sum(0)

    # -- patches -----------------------------------------------------------------------------------------------------

    def _patches(self, features: Features, bank: str) -> tuple[Tensor, Tensor]:
        """Patches (B, h, w, C) that a bank looks at and where they count, (B, h, w) bool."""
        names = self.members[bank]
        maps = [features[f"{name}.patches"] for name in names]
        if len(names) > 1:
            maps = [m / self.scale[self.modalities.index(name)] for name, m in zip(names, maps)]
        joined = torch.cat(maps, dim=1).permute(0, 2, 3, 1)  # B h w C
        return joined, self._measured(features, names, joined.shape[1:3])

    def _measured(self, features: Features, names: Sequence[str], grid: Sequence[int]) -> Tensor:
        """Where patches count, (B, h, w): all, or those with a measured pixel, and one on the part."""
        geometric = any(is_geometric(name) for name in names)
        measured = self.config.mask_invalid and geometric
        return counting_cells(features, grid, measured=measured, on_part=self.config.foreground_only)

    # -- fitting -----------------------------------------------------------------------------------------------------

    def _bank(self, name: str) -> MemoryBank:
        c = self.config
        return MemoryBank(
            name,
            ratio=c.coreset_ratio,
            limit=c.bank_limit,
            eps=c.eps,
            start=c.start,
            seed=c.seed,
            max_bytes=int(c.max_gib * 2**30),
        )

    def _see_scale(self, moments: Mapping[str, MapMoments], features: Features) -> None:
        for name, seen in moments.items():
            maps = features[f"{name}.patches"]
            counts = self._measured(features, [name], maps.shape[2:])
            seen.add(maps.flatten(0, 1)[:, None], counts.repeat_interleave(maps.shape[1], 0)[:, None])

    def _set_scale(self, moments: Mapping[str, MapMoments]) -> None:
        for index, (name, seen) in enumerate(moments.items()):
            count, _, std = seen.take()
            if count.sum() == 0 or not float(std[0]) > 0:
                raise DataError(f"the features of '{name}' do not vary over the training parts: it cannot be joined")
            self.scale[index] = std[0]

    def _see_patches(self, features: Features) -> None:
        for name, bank in self.named_banks():
            patches, measured = self._patches(features, name)
            bank.add(patches[measured])

    def _build(self) -> None:
        for _, bank in self.named_banks():
            bank.build()

    def _see_distances(self, features: Features) -> None:
        for name, bank in self.named_banks():
            patches, measured = self._patches(features, name)
            if bool(measured.any()):
                bank.observe(bank.distance(patches[measured])[0])

    def _set_levels(self) -> None:
        for _, bank in self.named_banks():
            bank.set_level()
