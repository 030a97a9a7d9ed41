"""Shape-Guided: codes of small surfaces in one memory, the RGB cells that lie on them in another.

Chu, Liu, Hsieh, Chen and Liu, "Shape-Guided Dual-Memory Learning for 3D Anomaly Detection" (ICML 2023), as its program
does it. A cloud is cut into overlapping patches of 500 points; E is the encoder and f the signed distance of
`layers.signed_distance`; S_k(x; M) is what sparse coding makes of x from 3 of the k rows of M nearest to it:

    M_3d   codes z_p = E(patch p) of all patches of good parts
    M_rgb  image features r_c of all cells c that these patches touch; each patch knows its cells
    z'_p = S_10(z_p; M_3d)            what a normal surface like this one would be                             (1)
    A_3d = min over the patches of a point of |f(z'_p, point)|;   s_3d = max over p of |z_p - z'_p|            (2)
    r'_c = S_5(r_c; M)   for the cells that the part's patches touch; M are the rows of M_rgb that belong
                         to the patches found for Eq. 1, of all patches of the part: "guided"                  (3)
    A_rgb = up(|r_c - r'_c|);   s_rgb = max over c of |r_c - r'_c|                                             (4)
    map = blur(max(A_3d, w A_rgb + b)),   score = s_3d s_rgb                                                   (5)

w and b bring the RGB maps of good parts to mean and deviation of their 3D maps (`layers.alignment`). The equations are
numbered here. In the paper one network for signed distances, trained on all categories, serves all; here it is trained
on the parts of the fit, unless `distance_checkpoint` gives one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..backbones.image import ImageBackbone
from ..errors import DataError
from ..layers.alignment import align, matching_line
from ..layers.cloud_patches import cut_patches, judged_pixels, patch_centres
from ..layers.patches import pool_to_grid
from ..layers.signed_distance import SignedDistance, normalise_patches, to_pixels
from ..layers.smoothing import Blur, smooth
from ..layers.sparse_coding import Rebuilt, rebuild
from ..samples import Batch, Features, Prediction
from ..weights.official import checkpoint_source, read_network
from ..weights.patch_networks import signed_distance_state
from .contract import Detector, Observe, Stage, evaluating, require, require_grid, seeded
from .distance_recipe import check_distance_recipe, distance_loss, train_distance
from .recipe import StepClock

_require = partial(require, "Shape-Guided")
CELL = 8  # pixels per side of an RGB cell
ATOMS = 3  # rows that sparse coding uses


@dataclass(frozen=True, kw_only=True)
class ShapeGuidedConfig:
    """Settings of `ShapeGuided`; the program's, but for networks whose weights need no download."""

    modalities: tuple[str, ...] = ("rgb", "xyz")  # both, or one; rgb alone is not guided
    experts: Literal["both", "sdf", "rgb"] = "both"  # what is scored; rgb with both modalities is guided by the cloud
    # RGB
    backbone: str = "efficientnet_lite0"  # timm name; the paper's: see preset `paper`
    weights: str = "auto"  # where its weights come from: see `ImageBackbone`
    reductions: tuple[int, ...] = (4, 8)  # pixels per cell of the stages that are joined
    # signed distances
    distance_checkpoint: str | None = None  # ckpt_*.pth of the program, or an imported one; trains none
    patch: int = 500  # points
    train_density: float = 5.0  # patches per `patch` points, those that are learned from
    score_density: float = 10.0  # and those of memory and scores
    cover: bool = False  # True: more patches where a point is in none
    encoder_input: Literal["targets", "patch"] = "targets"  # what E sees while training; in use, the patch
    queries: int | None = None  # noisy points per patch and step; None: one per point
    neighbour: int = 50  # noise is as wide as the distance to this neighbour in the patch, or half of it
    code: int = 128  # numbers of z
    pooled: int = 1024  # channels of the encoder's maximum
    width: int = 512  # of the field's layers
    depth: int = 7  # its weight-normalised layers
    distance_steps: int = 75_000  # updates; 601 epochs of 20 parts with 200 patches each
    distance_batch: int = 32  # patches per step
    distance_parts: int = 8  # parts per step that these patches come from
    distance_rate: float = 1e-4  # of Adam
    distance_decay: Literal["none", "cosine"] = "none"  # of the rate, to 0 over the steps
    # memories
    reconstruction: Literal["sparse", "nearest"] = "sparse"  # S_k, or the nearest row itself
    k_sdf: int = 10  # rows that Eq. 1 may use, at least 3; with nearest, those that may guide
    k_rgb: int = 5  # and Eq. 3
    guided: bool = True  # False: all rows of the RGB memory are candidates
    cells: Literal["released", "dilated", "touched"] = "released"  # of a patch: shifted; grown by a square; as touched
    cell_shift: int = 2  # cells, of released and dilated
    # maps
    align_split: Literal["train", "validation"] = "validation"  # parts that w and b are from; train: as the program
    align_parts: int = 25  # the first so many of them
    lift_background: bool = False  # True: the RGB map is b where it was 0, as in the program
    blur: Blur = "gaussian"  # of the maps; pil: the 8-bit blur of the program
    blur_sigma: float = 4.0  # pixels
    seed: int = 0  # of first weights, noise and drawn patches; of a random backbone

    def __post_init__(self) -> None:
        known = set(self.modalities) <= {"rgb", "xyz"} and len(set(self.modalities)) == len(self.modalities) >= 1
        _require(known, "modalities", "rgb, xyz, or both", self.modalities)
        choices: dict[str, tuple[str, ...]] = {
            "experts": ("both", "sdf", "rgb"),
            "encoder_input": ("targets", "patch"),
            "distance_decay": ("none", "cosine"),
            "reconstruction": ("sparse", "nearest"),
            "cells": ("released", "dilated", "touched"),
            "align_split": ("train", "validation"),
            "blur": get_args(Blur),
        }
        for field, allowed in choices.items():
            _require(getattr(self, field) in allowed, field, f"one of {', '.join(allowed)}", getattr(self, field))
        needed = {"sdf": {"xyz"}, "rgb": {"rgb"}, "both": set(self.modalities)}[self.experts]
        fits = needed <= set(self.modalities)
        _require(fits, "experts", "what `modalities` allow: sdf needs xyz, rgb needs rgb", self.experts)
        check_distance_recipe("Shape-Guided", self)
        _require(self.align_parts >= 1, "align_parts", "at least 1", self.align_parts)
        for field in ("blur_sigma", "cell_shift"):
            _require(getattr(self, field) >= 0, field, "0 or more", getattr(self, field))
        for field in ("k_sdf", "k_rgb"):
            least = ATOMS if self.reconstruction == "sparse" else 1
            _require(getattr(self, field) >= least, field, f"at least {least}", getattr(self, field))
        reductions = self.reductions
        _require(len(reductions) >= 1, "reductions", "one or more numbers of pixels", reductions)

    @property
    def sees_rgb(self) -> bool:
        """Whether there is a memory of RGB cells."""
        return "rgb" in self.modalities and self.experts != "sdf"

    @property
    def sees_cloud(self) -> bool:
        """Whether there is a memory of codes: to score by, or only to guide."""
        return "xyz" in self.modalities and (self.experts != "rgb" or self.guided)

    @property
    def joins(self) -> bool:
        """Whether both experts' maps are joined."""
        return self.sees_rgb and self.sees_cloud and self.experts == "both"


class Cloud(NamedTuple):
    """The patches of one part."""

    points: Tensor  # (P, n, 3) in their own frames
    pixels: Tensor  # (P, n) int64, the pixels that these are from
    codes: Tensor  # (P, code)
    cells: Tensor  # (P, h*w) bool, the RGB cells of each


class ShapeGuided(Detector):
    """What cannot be made of the shapes, and the colours on such shapes, of good parts is anomalous.

    Features: ``valid`` and ``part``, (B, H, W) bool; ``rgb.cells``, (B, C, H/8, W/8); ``xyz.points``, (B, 3, H, W) m,
    ``xyz.centres``, (B, P) int32, the pixels of the patches' centres to learn from, -1 beyond the part's. Branch maps:
    the aligned RGB map and the 3D map.
    """

    Config = ShapeGuidedConfig
    PRESETS = {
        "paper": {
            "backbone": "wide_resnet50_2.racm_in1k",
            "align_split": "train",
            "lift_background": True,
            "blur": "pil",
        },
        "fast": {
            "train_density": 2.0,
            "score_density": 2.0,
            "cover": True,
            "encoder_input": "patch",
            "queries": 128,
            "pooled": 256,
            "width": 128,
            "depth": 4,
            "distance_steps": 3000,
            "distance_batch": 16,
            "distance_rate": 2e-3,
            "distance_decay": "cosine",
            "cells": "dilated",
            "cell_shift": 1,
        },
    }
    PREPARATION = {"": "cloud", "fast": "cloud", "paper": "btf"}
    frozen = ("backbone",)
    growing: ClassVar[tuple[str, ...]] = ("codes", "colours", "owned", "owned_from")
    codes: Tensor  # M_3d, (K, code)
    colours: Tensor  # M_rgb, (R, C)
    owned: Tensor  # rows of `colours` that patches have, one patch after the other, int32
    owned_from: Tensor  # where those of patch k start, (K + 1,) int64
    line: Tensor  # w and b of Eq. 5, (2,)

    def __init__(self, config: ShapeGuidedConfig, *, pretrained: bool = True) -> None:
        super().__init__(config)
        c = config
        self.backbone: nn.Module = nn.Identity()
        self.distance: SignedDistance | None = None
        if c.sees_rgb:
            self.backbone = ImageBackbone(
                c.backbone, reductions=c.reductions, weights=c.weights, pretrained=pretrained, seed=c.seed
            )
            self.sources["backbone"] = self.backbone.weights_source
        if c.sees_cloud:
            with seeded(c.seed):
                self.distance = SignedDistance(c.code, c.width, c.depth, c.pooled)
            if c.distance_checkpoint is not None and pretrained:
                path = Path(c.distance_checkpoint).expanduser()
                content = read_network(path, "shape_guided")
                self.distance.load_state_dict(signed_distance_state(content, self.distance, str(path)))
                self.sources["distance"] = checkpoint_source(path)
        self.register_buffer("codes", torch.empty(0, 0))
        self.register_buffer("colours", torch.empty(0, 0))
        self.register_buffer("owned", torch.empty(0, dtype=torch.int32))
        self.register_buffer("owned_from", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("line", torch.tensor([1.0, 0.0]))
        self._clock = StepClock()
        self._codes: list[Tensor] = []  # of the parts seen so far, while the memories are filled
        self._colours: list[Tensor] = []
        self._owned: list[Tensor] = []
        self._counts: list[Tensor] = []

    @property
    def required(self) -> tuple[str, ...]:
        """The modalities that the experts look at."""
        c = self.config
        return tuple(name for name in c.modalities if (c.sees_rgb if name == "rgb" else c.sees_cloud))

    @property
    def standalone(self) -> bool:
        """Each of two experts judges for itself, the one of RGB unguided then."""
        return self.config.joins

    # -- the frozen part ---------------------------------------------------------------------------------------------

    def extract(self, batch: Batch) -> Features:
        """Features of the RGB cells, the points, and the centres of the patches to learn from.

        Raises:
            ShapeError: height or width is not a multiple of 8 or of a reduction, or smaller than two cells.
        """
        c = self.config
        require_grid("Shape-Guided", batch, max(CELL, *c.reductions) if c.sees_rgb else CELL)
        part = batch.valid & batch.foreground if c.sees_cloud else torch.ones_like(batch.valid)
        features = {"valid": batch.valid, "part": part}
        height, width = part.shape[-2:]
        if c.sees_rgb:
            stages = self.backbone(batch.images["rgb"])
            grid = height // CELL, width // CELL
            features["rgb.cells"] = torch.cat([pool_to_grid(stage, grid) for stage in stages], dim=1)
        if c.sees_cloud:
            xyz = batch.images["xyz"]
            features |= {"xyz.points": xyz, "xyz.centres": patch_centres(xyz, part, c.patch, c.train_density)}
        return features

    def extraction_settings(self) -> dict[str, Any]:
        """The experts, how RGB cells are made, and how patches to learn from are chosen."""
        c = self.config
        said: dict[str, Any] = {"detector": "ShapeGuided", "modalities": self.required}
        if c.sees_rgb:
            said |= {"backbone": c.backbone, "reductions": c.reductions}
        return said | ({"patch": c.patch, "density": c.train_density} if c.sees_cloud else {})

    # -- fitting -----------------------------------------------------------------------------------------------------

    def stages(self) -> Sequence[Stage]:
        """Train the signed distance unless it is given, fill the memories, align the maps."""
        c = self.config
        stages: list[Stage] = []
        if self.distance is not None and c.distance_checkpoint is None:
            falls = c.distance_decay == "cosine"
            stages.append(train_distance(c, self.distance, self.distance_loss, self._clock, falls=falls))
        stages.append(Observe(name="memories", update=self._see_parts, finish=self.build_memories))
        if c.joins:
            maps: list[tuple[Tensor, Tensor]] = []
            see, finish = partial(self._see_maps, maps), partial(self._set_line, maps)
            stages.append(Observe(name="alignment", update=see, finish=finish, split=c.align_split))
        return stages

    def distance_loss(self, features: Features) -> dict[str, Tensor]:
        """Mean distance between pulled points and their targets, of patches drawn for this step.

        Raises:
            DataError: no part of the batch has points for a patch.
        """
        net, generator = cast(SignedDistance, self.distance), self._clock.generator(self.config.seed)
        return {"distance": distance_loss(self.config, net, features, generator)}

    def _see_parts(self, features: Features) -> None:
        for index in range(len(features["part"])):
            cloud = self.cloud(features, index) if self.config.sees_cloud else None
            if cloud is not None:
                self._codes.append(cloud.codes.cpu())
            if not self.config.sees_rgb:
                continue
            values = features["rgb.cells"][index].flatten(1).T.cpu()  # h*w C
            if not self.config.sees_cloud:
                self._colours.append(values)
            elif cloud is not None:  # a part without points has no patches, so that its cells could not be found
                cells = cloud.cells.cpu()
                kept = cells.any(0)
                start = sum(map(len, self._colours))
                self._owned.append(start + cells[:, kept].nonzero()[:, 1].int())
                self._counts.append(cells.sum(1))
                self._colours.append(values[kept])

    def build_memories(self) -> None:
        """Make the memories from the parts that were seen.

        Raises:
            DataError: no part has a point, or there are fewer rows than sparse coding may use.
        """
        c, device = self.config, self.line.device
        for name, rows, least, wanted in (
            ("codes", self._codes, c.k_sdf, c.sees_cloud),
            ("colours", self._colours, c.k_rgb, c.sees_rgb),
        ):
            count = sum(map(len, rows))
            needed = least + (c.align_split == "train")
            if wanted and count < needed:
                raise DataError(
                    f"the memory of {name} has {count} rows, and {needed} are needed: check the clouds and the removal "
                    f"of their background, or give more good parts"
                )
            if wanted:
                setattr(self, name, torch.cat(rows).float().to(device))
        if self._owned:
            self.owned = torch.cat(self._owned).to(device)
            counts = torch.cat(self._counts)
            self.owned_from = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(device)
        for seen in (self._codes, self._colours, self._owned, self._counts):
            seen.clear()

    def _see_maps(self, maps: list[tuple[Tensor, Tensor]], features: Features) -> None:
        c = self.config
        skip = int(c.align_split == "train")  # a part finds itself in the memory
        for index in range(len(features["part"])):
            if len(maps) == c.align_parts:
                return
            _, rgb, _, cloud = self.judge(features, index, skip)
            rgb, cloud = (smooth(m[None], c.blur, c.blur_sigma) for m in (rgb, cloud))
            maps.append((rgb.cpu(), cloud.cpu()))

    def _set_line(self, maps: list[tuple[Tensor, Tensor]]) -> None:
        rgb, cloud = (torch.cat(list(side)) for side in zip(*maps))
        maps.clear()
        self.line.copy_(matching_line(rgb, cloud))

    # -- scoring -----------------------------------------------------------------------------------------------------

    def score(self, features: Features) -> Prediction:
        """Eq. 5, or map and score of the one expert: the one that there is, or that a view is there for."""
        c, features = self.config, {**features, "part": judged_pixels(features)}
        judged = [self.judge(features, index) for index in range(len(features["part"]))]
        s_rgb, rgb, s_3d, cloud = (torch.stack(list(side)) for side in zip(*judged))
        sees_rgb, sees_cloud = _seen(c, features)
        if not (c.joins and sees_rgb and sees_cloud):
            score, maps = (s_rgb, rgb) if c.experts == "rgb" or not sees_cloud else (s_3d, cloud)
            name = "rgb" if maps is rgb else "xyz"
            maps = smooth(maps, c.blur, c.blur_sigma)
            return Prediction(score=score, map=maps, branch_maps={name: maps})
        aligned = align(rgb, self.line, background=c.lift_background)
        branches = {"rgb": aligned, "xyz": cloud}
        smoothed = {name: smooth(maps, c.blur, c.blur_sigma) for name, maps in branches.items()}
        fused = smooth(torch.maximum(aligned, cloud), c.blur, c.blur_sigma)
        seen = features["part"].flatten(1).any(1)
        score = torch.where(seen, s_3d * s_rgb, s_rgb)  # a part without points is judged by RGB
        return Prediction(score=score, map=fused, branch_maps=smoothed)

    def judge(self, features: Features, index: int, skip: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """s_rgb (), A_rgb (H, W), s_3d (), A_3d (H, W) of one part, not smoothed; zeros for an expert not there.

        Args:
            skip: Nearest rows of the memories that do not count: 1 for training parts.
        """
        c, part = self.config, features["part"][index]
        zero, nothing = features["part"].new_zeros((), dtype=torch.float32), torch.zeros_like(part, dtype=torch.float32)
        s_rgb, rgb, s_3d, cloud_map = zero, nothing, zero, nothing
        sees_rgb, sees_cloud = _seen(c, features)
        cloud = self.cloud(features, index) if sees_cloud else None
        found: Rebuilt | None = None
        if cloud is not None:
            found = self._rebuild(cloud.codes, self.codes, c.k_sdf, skip)  # Eq. 1
            if c.experts != "rgb":
                s_3d, cloud_map = found.distance.amax(), self._distances(found.vectors, cloud, part)
        if sees_rgb:
            s_rgb, rgb = self._colour_residuals(features["rgb.cells"][index], cloud, found, skip, part)
        return s_rgb, rgb, s_3d, cloud_map

    def cloud(self, features: Features, index: int) -> Cloud | None:
        """The patches of part `index` and their codes; those of a small part are all of it; None: no point."""
        c, net, part = self.config, cast(SignedDistance, self.distance), features["part"][index]
        pixels = part.flatten().nonzero()[:, 0]  # N
        if not len(pixels):
            return None
        points = features["xyz.points"][index].flatten(1).T[pixels]  # N 3
        rows = cut_patches(points, c.score_density, min(c.patch, len(points)), cover=c.cover)  # P n
        normal = normalise_patches(points[rows]).points
        with torch.no_grad(), evaluating(net):
            codes = net.encoder(normal)
        grid = part.shape[0] // CELL, part.shape[1] // CELL
        return Cloud(normal, pixels[rows], codes, self._cells_of(pixels[rows], part.shape[1], grid))

    def _cells_of(self, pixels: Tensor, width: int, grid: tuple[int, int]) -> Tensor:
        """The cells (P, h*w) bool of patches whose points lie at `pixels` (P, n)."""
        c = self.config
        cells = pixels // width // CELL * grid[1] + pixels % width // CELL
        if c.cells == "released":
            cells = shifted_cells(cells, c.cell_shift, grid)
        touched = torch.zeros(len(pixels), grid[0] * grid[1], dtype=torch.bool, device=pixels.device)
        touched.scatter_(1, cells, True)
        if c.cells != "dilated" or c.cell_shift == 0:
            return touched
        side = 2 * c.cell_shift + 1
        grown = F.max_pool2d(touched.view(-1, 1, *grid).float(), side, stride=1, padding=c.cell_shift)
        return grown.flatten(1) > 0

    def _distances(self, codes: Tensor, cloud: Cloud, part: Tensor) -> Tensor:
        """A_3d of Eq. 2, (H, W)."""
        net = cast(SignedDistance, self.distance)
        with torch.no_grad(), evaluating(net):
            values = net.field(codes, cloud.points).abs()  # P n
        return to_pixels(values, cloud.pixels, (part.shape[0], part.shape[1]))

    def _colour_residuals(
        self, cells: Tensor, cloud: Cloud | None, found: Rebuilt | None, skip: int, part: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Eqs. 3 and 4 of one part: s_rgb () and A_rgb (H, W), from `cells` (C, h, w)."""
        c, grid = self.config, cells.shape[-2:]
        values = cells.flatten(1).T  # h*w C
        bank = self.colours
        if cloud is None:
            asked = F.max_pool2d(part[None].float(), CELL).flatten() > 0
            asked = asked | ~asked.any()  # nothing tells where the part is
        else:
            asked = cloud.cells.any(0)
        if c.guided and found is not None:
            bank = bank[self.candidates(found.rows)]
        residual = values.new_zeros(len(values))
        if len(bank) <= skip:  # no cell belongs to such shapes: all may be used
            bank = self.colours
        residual[asked] = self._rebuild(values[asked], bank, c.k_rgb, skip).distance
        size = (part.shape[0], part.shape[1])
        maps = F.interpolate(residual.view(1, 1, *grid), size=size, mode="bilinear", align_corners=False)[0, 0]
        return residual.amax(), maps

    def candidates(self, patches: Tensor) -> Tensor:
        """Rows of the RGB memory, (R,) bool, that belong to the patches of any of the rows `patches` of the other."""
        wanted = torch.zeros(len(self.codes), dtype=torch.bool, device=self.codes.device)
        wanted[patches.flatten()] = True
        of_patch = wanted.repeat_interleave(self.owned_from.diff())  # as long as `owned`
        chosen = torch.zeros(len(self.colours), dtype=torch.bool, device=self.codes.device)
        chosen[self.owned[of_patch].long()] = True
        return chosen

    def _rebuild(self, queries: Tensor, bank: Tensor, k: int, skip: int) -> Rebuilt:
        """S_k, from as many rows as there are; more than `skip`."""
        count = min(k, len(bank) - skip)
        found = rebuild(queries, bank, count, min(ATOMS, count), skip=skip)
        if self.config.reconstruction == "sparse":
            return found
        vectors = bank[found.rows[:, 0]]
        return Rebuilt(vectors, torch.linalg.vector_norm(queries - vectors, dim=1), found.rows)


def _seen(c: ShapeGuidedConfig, features: Features) -> tuple[bool, bool]:
    """Whether there is something to judge by for the RGB expert, and for the other."""
    return c.sees_rgb and "rgb.cells" in features, c.sees_cloud and "xyz.points" in features


def shifted_cells(cells: Tensor, shift: int, grid: tuple[int, int]) -> Tensor:
    """The program's cells of patches, (P, 4 n) int64, from those that its points touch, (P, n), as flat indices.

    Each goes `shift` cells right, left, down and up, and is not kept itself; flat indices run on into the next row.
    What is before the first cell becomes the patch's last such cell; what is then behind the last cell, its first.
    """
    h, w = grid
    moved = torch.cat([cells + shift, cells - shift, cells + shift * w, cells - shift * w], dim=1)
    moved = torch.where(moved < 0, moved.amax(1, keepdim=True), moved)
    return torch.where(moved > h * w - 1, moved.amin(1, keepdim=True), moved).clamp(max=h * w - 1)
