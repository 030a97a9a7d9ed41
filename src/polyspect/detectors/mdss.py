"""MDSS: a student-teacher network on RGB and signed distances of the cloud, without any memory bank.

Sun et al., "Memoryless Multimodal Anomaly Detection via Student-Teacher Network and Signed Distance Learning" (PRCV
2024, arXiv 2409.05378). T is a frozen patch description network (PDN), S a student of the same shape, I the image, M
the mask of the part, from its points; f the signed distance that goes with the code z of a patch of 500 points:

    t   = (T(I) - mu_c) / sd_c,   E = (t - S(I))^2 * M                                  per channel and cell (Sec. 3.1)
    L_d = mean of the elements of E greater than their d-quantile                                              (1)
    d_k = 0.99 + 0.009 (1 - cos(pi k / K)) / 2        at step k of K: fewer and fewer elements                 (2)
    A_rgb = up(mean over channels of (t - S(I))^2) * M                                                         (3)
    A_3d  = blur(min over the patches of a point of |f(z, point)|), 0 where there is no point      (Sec. 3.2)  (4)
    w = sd_3d / sd_rgb,   b = mean_3d - w mean_rgb,   over all pixels above 0 of good parts         (Sec. 3.3)  (5)
    map = max(A_3d, w A_rgb + b),   score = max A_rgb * max A_3d                                               (6)

Equation 1 is the paper's; the others are numbered here. The networks of Eq. 4 and their training are those of
Shape-Guided (`layers.signed_distance`), from scratch for every category. There is no public code: what the paper leaves
open is a setting with its reason in `docs/methods/mdss.md`. One branch alone is a method of its own: RGB without a
cloud (then nothing is masked), or the cloud without RGB.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..backbones.patch_description import MARGIN, RECEPTIVE_FIELD, STRIDE, PatchDescription
from ..backbones.pdn_weights import load_patch_description
from ..errors import CalibrationError, DataError
from ..layers.alignment import align, matching_line
from ..layers.cloud_patches import cut_patches, judged_pixels, patch_centres
from ..layers.maps import MapMoments, gaussian_smooth
from ..layers.signed_distance import SignedDistance, normalise_patches, to_pixels
from ..samples import Batch, Features, Prediction
from .contract import Detector, Observe, Optimise, Stage, evaluating, require, require_grid, seeded
from .distance_recipe import check_distance_recipe, distance_loss, train_distance
from .recipe import StepClock

_require = partial(require, "MDSS")
Factor = Literal["up", "down", "cyclic", "fixed"]
Overlap = Literal["min", "mean", "max", "centre"]
Alignment = Literal["mean3std", "minmax", "none"]


@dataclass(frozen=True, kw_only=True)
class MDSSConfig:
    """Settings of `MDSS`; the paper's where it states them, the card's choice where it does not."""

    modalities: tuple[str, ...] = ("rgb", "xyz")  # both, or one: rgb alone has no mask
    branches: Literal["both", "st", "sdl"] = "both"  # Fig. 4; st with both modalities takes its mask from the cloud
    # student and teacher
    teacher: str = "pdn_small"  # frozen network, see `load_patch_description`; the student has its shape
    teacher_weights: str = "auto"  # where its weights come from
    teacher_statistics: Literal["part", "all", "none"] = "part"  # mu_c, sd_c over cells of the part, all cells; 0 and 1
    factor: Factor = "up"  # d: Eq. 2; from the high to the low end; up and down again and again; `fixed_factor`
    factor_range: tuple[float, float] = (0.99, 0.999)  # low and high end of d, Sec. 3.1
    factor_period: int = 1000  # steps from low to high and back, cyclic
    fixed_factor: float = 0.99  # d with factor "fixed"
    quantile_over: Literal["batch", "image"] = "batch"  # Eq. 1 of all parts of a step, or of each and then the mean
    quantile_of: Literal["all", "part"] = "all"  # the elements of Eq. 1: masked zeros too, or those of the part alone
    mask_train: bool = True  # M in E
    mask_score: bool = True  # M in Eq. 3
    dilation: int = 8  # pixels, side of the square that M grows by, Sec. 4.2; 0: none
    map_resize: Literal["pad", "stretch"] = "pad"  # add the four cells that the network's rim lacks, or stretch over it
    border: Literal["zero", "edge"] = "zero"  # what those cells hold: 0, or the nearest cell's value
    crop: int | None = None  # pixels, side of a square around the part that a step looks at; None: whole images
    student_steps: int = 17_500  # updates
    student_batch: int = 4  # parts per step, Tab. 1
    student_rate: float = 1e-3  # of Adam, Tab. 1
    student_weight_decay: float = 1e-5  # of Adam
    student_rate_drop: float = 0.95  # share of the steps after which the rate is a tenth; 1: never
    # signed distances
    patch: int = 500  # points, Tab. 1
    train_density: float = 5.0  # patches per `patch` points, those that are learned from
    score_density: float = 10.0  # and those that score a part; more where a point is in none
    encoder_input: Literal["targets", "patch"] = "targets"  # what z is the code of while training; scoring: the patch
    queries: int | None = None  # noisy points per patch and step; None: one per point
    neighbour: int = 50  # noise is as wide as the distance to this neighbour in the patch, or half of it
    code: int = 128  # numbers of z
    pooled: int = 1024  # channels of the encoder's maximum
    width: int = 512  # of the field's layers
    depth: int = 7  # its weight-normalised layers
    distance_steps: int = 60_000  # updates
    distance_batch: int = 32  # patches per step, Tab. 1
    distance_parts: int = 8  # parts per step that these patches come from
    distance_rate: float = 1e-4  # of Adam, falling to 0 by a cosine over the steps, Tab. 1
    overlap: Overlap = "min"  # of the values of a point in several patches; centre: the patch whose centre is nearest
    metric: bool = False  # True: distances in metres; False: in sides of the patch
    blur_sigma: float = 4.0  # pixels, of the 3D map's Gaussian, Sec. 3.2
    # both
    align: Alignment = "mean3std"  # RGB map to the 3D map's range: Eq. 5, least to least and greatest to greatest, not
    align_over: Literal["positive", "all"] = "positive"  # pixels of validation maps that count
    lift_background: bool = False  # True: b where the RGB map is 0, too
    fuse_map: Literal["max", "sum", "product"] = "max"  # of the aligned maps, Eq. 6
    fuse_score: Literal["product", "max", "sum"] = "product"  # of raw maxima, Eq. 6; of aligned ones: max, sum
    seed: int = 0  # of first weights, noise, drawn patches and crops; of a random teacher

    def __post_init__(self) -> None:
        known = set(self.modalities) <= {"rgb", "xyz"} and len(set(self.modalities)) == len(self.modalities) >= 1
        _require(known, "modalities", "rgb, xyz, or both", self.modalities)
        for field, choices in _CHOICES.items():
            value = getattr(self, field)
            _require(value in choices, field, f"one of {', '.join(choices)}", value)
        there = {"st": "rgb", "sdl": "xyz"}.get(self.branches, self.modalities[0]) in self.modalities
        _require(there, "branches", "what `modalities` allow: st needs rgb, sdl needs xyz", self.branches)
        low, high = self.factor_range
        _require(0 <= low <= high < 1, "factor_range", "two rising numbers in [0, 1)", self.factor_range)
        _require(0 <= self.fixed_factor < 1, "fixed_factor", "in [0, 1)", self.fixed_factor)
        check_distance_recipe("MDSS", self)
        for field in ("factor_period", "student_steps", "student_batch"):
            _require(getattr(self, field) >= 1, field, "at least 1", getattr(self, field))
        for field in ("dilation", "student_weight_decay", "blur_sigma"):
            _require(getattr(self, field) >= 0, field, "0 or more", getattr(self, field))
        _require(self.student_rate > 0, "student_rate", "above 0", self.student_rate)
        _require(0 < self.student_rate_drop <= 1, "student_rate_drop", "above 0, at most 1", self.student_rate_drop)
        seen = self.crop is None or self.crop >= RECEPTIVE_FIELD
        _require(seen, "crop", f"at least {RECEPTIVE_FIELD} pixels, or null", self.crop)
        known = self.quantile_of == "all" or self.mask_train
        _require(known, "quantile_of", "'all' without `mask_train`", self.quantile_of)

    @property
    def sees_rgb(self) -> bool:
        """Whether there is a student."""
        return "rgb" in self.modalities and self.branches != "sdl"

    @property
    def sees_cloud(self) -> bool:
        """Whether there is a distance field."""
        return "xyz" in self.modalities and self.branches != "st"


_CHOICES: dict[str, tuple[str, ...]] = {
    "branches": ("both", "st", "sdl"),
    "teacher_statistics": ("part", "all", "none"),
    "factor": get_args(Factor),
    "quantile_over": ("batch", "image"),
    "quantile_of": ("all", "part"),
    "map_resize": ("pad", "stretch"),
    "border": ("zero", "edge"),
    "encoder_input": ("targets", "patch"),
    "overlap": get_args(Overlap),
    "align": get_args(Alignment),
    "align_over": ("positive", "all"),
    "fuse_map": ("max", "sum", "product"),
    "fuse_score": ("product", "max", "sum"),
}


class MDSS(Detector):
    """What the student cannot imitate and the field does not take for a surface is anomalous.

    Features: ``valid`` and ``part``, (B, H, W) bool; ``rgb.image``, (B, 3, H, W) in 0..1, ``rgb.teacher``,
    (B, C, H/4 - 8, W/4 - 8); ``xyz.points``, (B, 3, H, W) m, ``xyz.centres``, (B, P) int32, the pixels of the patches'
    centres to learn from, -1 beyond the part's. Branch maps: the aligned RGB map and the 3D map.
    """

    Config = MDSSConfig
    PRESETS = {
        "paper": {"teacher": "pdn_small_efficientad"},
        "fast": {
            "border": "edge",
            "crop": 128,
            "student_steps": 600,
            "train_density": 2.0,
            "score_density": 2.0,
            "encoder_input": "patch",
            "queries": 128,
            "pooled": 256,
            "width": 128,
            "depth": 4,
            "distance_steps": 3000,
            "distance_batch": 16,
            "distance_rate": 2e-3,
        },
    }
    PREPARATION = {"": "cloud", "fast": "cloud", "paper": "mdss"}
    frozen = ("teacher",)
    teacher_mean: Tensor  # mu_c, (C,)
    teacher_std: Tensor  # sd_c, (C,)
    line: Tensor  # w and b of Eq. 5, (2,)

    def __init__(self, config: MDSSConfig, *, pretrained: bool = True) -> None:
        super().__init__(config)
        c = config
        self.teacher: nn.Module = nn.Identity()
        self.student: PatchDescription | None = None
        self.distance: SignedDistance | None = None
        channels = 0
        if c.sees_rgb:
            loaded = load_patch_description(c.teacher, weights=c.teacher_weights, pretrained=pretrained, seed=c.seed)
            self.teacher, channels = loaded.network, loaded.network.outputs
            self.sources["teacher"] = loaded.source
            with seeded(c.seed + 1):  # so that beside a random teacher the student is not its copy
                self.student = PatchDescription(loaded.network.size, channels)
        if c.sees_cloud:
            with seeded(c.seed + 2):
                self.distance = SignedDistance(c.code, c.width, c.depth, c.pooled)
        self.register_buffer("teacher_mean", torch.zeros(channels))
        self.register_buffer("teacher_std", torch.ones(channels))
        self.register_buffer("line", torch.tensor([1.0, 0.0]))
        self._clock = StepClock()

    @property
    def required(self) -> tuple[str, ...]:
        """The modalities that the branches look at; the mask of a student comes from the cloud."""
        c = self.config
        if not c.sees_rgb:
            return ("xyz",)
        unmasked = not c.sees_cloud and not c.mask_score
        return ("rgb",) if unmasked else self.modalities

    @property
    def standalone(self) -> bool:
        """Each of two branches judges for itself."""
        return self.config.sees_rgb and self.config.sees_cloud

    def over_part(self, feature: str, x: Tensor) -> Tensor:
        """The teacher's cells end four before the border; the rim repeats them."""
        return F.pad(x, (MARGIN,) * 4, mode="replicate") if feature == "rgb.teacher" else x

    # -- the frozen part ---------------------------------------------------------------------------------------------

    def extract(self, batch: Batch) -> Features:
        """Teacher's features, the image, the points and the centres of the patches to learn from.

        Raises:
            ShapeError: height or width is not a multiple of 4, or smaller than 33.
        """
        require_grid("MDSS", batch, STRIDE)
        c = self.config
        part = batch.valid & batch.foreground if "xyz" in batch.images else torch.ones_like(batch.valid)
        features = {"valid": batch.valid, "part": part}
        if c.sees_rgb:
            features |= {"rgb.image": batch.images["rgb"], "rgb.teacher": self.teacher(batch.images["rgb"])}
        if c.sees_cloud:
            xyz = batch.images["xyz"]
            features |= {"xyz.points": xyz, "xyz.centres": patch_centres(xyz, part, c.patch, c.train_density)}
        return features

    def extraction_settings(self) -> dict[str, Any]:
        """The branches, and how patches to learn from are chosen."""
        c = self.config
        said: dict[str, Any] = {"detector": "MDSS", "rgb": c.sees_rgb, "xyz": c.modalities}
        return said | ({"patch": c.patch, "density": c.train_density} if c.sees_cloud else {})

    # -- fitting -----------------------------------------------------------------------------------------------------

    def stages(self) -> Sequence[Stage]:
        """Measure the teacher, train student and field, align their maps on validation parts."""
        c = self.config
        stages: list[Stage] = []
        if self.student is not None:
            if c.teacher_statistics != "none":
                moments = MapMoments()
                see, finish = partial(self._see_teacher, moments), partial(self._set_teacher, moments)
                stages.append(Observe(name="teacher", update=see, finish=finish))
            stages.append(
                Optimise(
                    name="student",
                    parameters=self.student.parameters,
                    loss=self.student_loss,
                    optimizer=partial(torch.optim.Adam, lr=c.student_rate, weight_decay=c.student_weight_decay),
                    schedule=partial(self._clock.keep, self._student_schedule),
                    schedule_every="step",
                    steps=c.student_steps,
                    batch_size=c.student_batch,
                )
            )
        if self.distance is not None:
            stages.append(train_distance(c, self.distance, self.distance_loss, self._clock, falls=True))
        if c.sees_rgb and c.sees_cloud and c.align != "none":
            maps: list[tuple[Tensor, Tensor]] = []
            see, finish = partial(self._see_maps, maps), partial(self._set_line, maps)
            stages.append(Observe(name="alignment", update=see, finish=finish, split="validation"))
        return stages

    def student_loss(self, features: Features) -> dict[str, Tensor]:
        """Eq. 1 at the d of this step."""
        c = self.config
        image, target, cells = features["rgb.image"], self._target(features), self._cells(features)
        if c.crop is not None:
            image, target, cells = crop_around(image, target, cells, c.crop, self._clock.generator(self.config.seed))
        error = (target - cast(PatchDescription, self.student)(image)).square()  # B C h w
        if c.mask_train:
            error = error * cells[:, None]  # E
        d = learning_factor(c, self.step)
        counts = cells[:, None].expand_as(error) if c.quantile_of == "part" else None
        if c.quantile_over == "batch":
            return {"student": dynamic_loss(error, d, counts)}
        losses = [dynamic_loss(e, d, None if counts is None else counts[index]) for index, e in enumerate(error)]
        return {"student": torch.stack(losses).mean()}

    def distance_loss(self, features: Features) -> dict[str, Tensor]:
        """Mean distance between pulled points and their targets, of patches drawn for this step.

        Raises:
            DataError: no part of the batch has points for a patch.
        """
        net, generator = cast(SignedDistance, self.distance), self._clock.generator(self.config.seed)
        return {"distance": distance_loss(self.config, net, features, generator)}

    @property
    def step(self) -> int:
        """Updates made so far in the stage that runs; the engine restores it when a fit goes on."""
        return self._clock.step

    def _student_schedule(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        drop = int(self.config.student_rate_drop * self.config.student_steps)
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.1 if step >= drop else 1.0)

    def _target(self, features: Features) -> Tensor:
        """t, (B, C, h, w)."""
        mean, std = self.teacher_mean[:, None, None], self.teacher_std[:, None, None]
        return (features["rgb.teacher"] - mean) / std

    def _cells(self, features: Features) -> Tensor:
        """The cells (B, h, w) of the grid whose middle the mask touches."""
        return mask_cells(grow(features["part"], self.config.dilation))

    def _see_teacher(self, moments: MapMoments, features: Features) -> None:
        teacher = features["rgb.teacher"]
        counted = torch.ones_like(teacher, dtype=torch.bool)
        if self.config.teacher_statistics == "part":
            counted = counted & self._cells(features)[:, None]
        moments.add(teacher, counted)

    def _set_teacher(self, moments: MapMoments) -> None:
        count, mean, std = moments.take()
        if not bool((count > 0).all()):
            raise DataError(
                "no training part has a cell of the teacher's grid on it: check the clouds and the removal of their "
                "background, or measure the teacher everywhere with teacher_statistics='all'"
            )
        self.teacher_mean.copy_(mean)
        self.teacher_std.copy_(std.clamp(min=1e-6))

    def _see_maps(self, maps: list[tuple[Tensor, Tensor]], features: Features) -> None:
        maps.append((self.student_map(features), self.distance_map(features)))

    def _set_line(self, maps: list[tuple[Tensor, Tensor]]) -> None:
        rgb, cloud = (torch.cat(list(side)) for side in zip(*maps))
        maps.clear()
        zeros = self.config.align_over == "all"
        matched = matching_line(rgb, cloud, zeros=zeros) if self.config.align == "mean3std" else ends(rgb, cloud, zeros)
        self.line.copy_(matched)

    # -- scoring -----------------------------------------------------------------------------------------------------

    def score(self, features: Features) -> Prediction:
        """Eq. 6, or the map of the one branch and its maximum: the one that there is, or that a view is there for."""
        c = self.config
        if not c.sees_cloud or "xyz.points" not in features:
            rgb = self.student_map(features)
            return Prediction(score=_top(rgb), map=rgb, branch_maps={"rgb": rgb})
        cloud = self.distance_map(features)
        if not c.sees_rgb or "rgb.image" not in features:
            return Prediction(score=_top(cloud), map=cloud, branch_maps={"xyz": cloud})
        rgb = self.student_map(features)
        aligned = align(rgb, self.line, background=c.lift_background)
        if c.fuse_map == "max":
            fused = torch.maximum(aligned, cloud)
        else:
            fused = aligned + cloud if c.fuse_map == "sum" else aligned * cloud
        if c.fuse_score == "product":  # a part without points is judged by RGB
            score = torch.where(_top(cloud) > 0, _top(rgb) * _top(cloud), _top(rgb))
        else:
            tops = _top(aligned), _top(cloud)
            score = torch.maximum(*tops) if c.fuse_score == "max" else tops[0] + tops[1]
        return Prediction(score=score, map=fused, branch_maps={"rgb": aligned, "xyz": cloud})

    def student_map(self, features: Features) -> Tensor:
        """Eq. 3: A_rgb, (B, H, W)."""
        c, student = self.config, cast(PatchDescription, self.student)
        with evaluating(student):
            apart = (self._target(features) - student(features["rgb.image"])).square().mean(1, keepdim=True)  # B 1 h w
        if c.map_resize == "pad":
            rim = (MARGIN,) * 4
            apart = F.pad(apart, rim) if c.border == "zero" else F.pad(apart, rim, mode="replicate")
        size = features["part"].shape[-2:]
        large = F.interpolate(apart, size=size, mode="bilinear", align_corners=False)[:, 0]
        if not c.mask_score:
            return large
        part = judged_pixels(features)
        part = part | ~part.flatten(1).any(1)[:, None, None]  # nothing measured is no reason to pass it
        return large * grow(part, c.dilation)

    def distance_map(self, features: Features) -> Tensor:
        """Eq. 4: A_3d, (B, H, W)."""
        net, parts = cast(SignedDistance, self.distance), judged_pixels(features)
        with evaluating(net):
            maps = [self._distances(net, xyz, part) for xyz, part in zip(features["xyz.points"], parts)]
        return gaussian_smooth(torch.stack(maps), self.config.blur_sigma)

    def _distances(self, net: SignedDistance, xyz: Tensor, part: Tensor) -> Tensor:
        """|f| of the points xyz (3, H, W) on one part (H, W), before the blur; a part smaller than a patch is one."""
        c, size = self.config, (part.shape[-2], part.shape[-1])
        pixels = part.flatten().nonzero()[:, 0]  # N
        if not len(pixels):
            return xyz.new_zeros(size)
        points = xyz.flatten(1).T[pixels]  # N 3
        rows = cut_patches(points, c.score_density, min(c.patch, len(points)), cover=True)  # P n, the centre first
        patches = points[rows]
        normal = normalise_patches(patches)
        values = net(normal.points).abs()  # P n
        if c.metric:
            values = values / normal.scale[:, None]
        if c.overlap == "centre":
            apart = torch.linalg.vector_norm(patches - patches[:, :1], dim=2)
            return of_nearest_centre(values, apart, pixels[rows], size)
        return to_pixels(values, pixels[rows], size, c.overlap)


# -- pieces without state ----------------------------------------------------------------------------------------------


def learning_factor(config: MDSSConfig, step: int) -> float:
    """d at a step, counted from 0 (Eq. 2 and its switches)."""
    low, high = config.factor_range
    if config.factor == "fixed":
        return config.fixed_factor
    if config.factor == "cyclic":
        return low + (high - low) * (1 - math.cos(2 * math.pi * step / config.factor_period)) / 2
    risen = (1 - math.cos(math.pi * step / config.student_steps)) / 2
    return low + (high - low) * risen if config.factor == "up" else high - (high - low) * risen


def dynamic_loss(error: Tensor, d: float, counts: Tensor | None = None) -> Tensor:
    """L_d (Eq. 1): mean of the elements strictly above the d-quantile; 0, with a gradient, if there is none.

    The quantile is `torch.quantile`'s, which takes no more than 2^24 elements and sorts them all; here only the
    greatest are sorted.

    Args:
        error: Not negative, any shape.
        d: In [0, 1).
        counts: Bool, the same shape: other elements are left out; None for all.
    """
    flat = error.flatten() if counts is None else error[counts]
    if not len(flat):
        return error.sum() * 0
    place = d * (len(flat) - 1)
    least = min(int(place), len(flat) - 1)  # rank from below of the element at or under the quantile
    top = flat.topk(len(flat) - least, sorted=True).values  # the greatest first, that element last
    quantile = top[-1]
    if len(top) > 1:
        quantile = torch.lerp(top[-1], top[-2], place - least)
    above = top > quantile.detach()
    return torch.where(above, top, 0).sum() / above.sum().clamp(min=1)


def grow(part: Tensor, side: int) -> Tensor:
    """M: pixels (B, H, W) with a pixel of the part in rows r - (side - 1) // 2 .. r + side // 2, columns alike."""
    if side < 2:
        return part
    before, after = (side - 1) // 2, side // 2
    padded = F.pad(part[:, None].float(), (before, after, before, after))
    return F.max_pool2d(padded, side, stride=1)[:, 0] > 0


def mask_cells(mask: Tensor) -> Tensor:
    """Cells (B, H/4 - 8, W/4 - 8) of an unpadded PDN: those whose middle 4x4 pixels hold one of the mask (B, H, W)."""
    cells = F.max_pool2d(mask[:, None].float(), STRIDE)[:, 0] > 0
    return cells[:, MARGIN:-MARGIN, MARGIN:-MARGIN]


def crop_around(
    image: Tensor, target: Tensor, cells: Tensor, side: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """A square of each image around a cell drawn from its mask, and the cells that a PDN makes of just that square.

    Args:
        image: (B, 3, H, W).
        target: (B, C, h, w), what an unpadded PDN makes of whole images.
        cells: (B, h, w) bool; where none is True all may be drawn.
        side: Of the square, pixels; images that are smaller stay whole.
    """
    h, w = target.shape[-2:]
    n = (side - RECEPTIVE_FIELD) // STRIDE + 1  # cells per side
    high, wide = min(n, h), min(n, w)
    reach = RECEPTIVE_FIELD - STRIDE  # pixels beyond a cell's own four
    crops = []
    for index, own in enumerate(cells):
        inside = (own if bool(own.any()) else torch.ones_like(own)).nonzero()
        row, column = inside[int(torch.randint(len(inside), (), generator=generator))].tolist()
        top, left = min(max(row - high // 2, 0), h - high), min(max(column - wide // 2, 0), w - wide)
        rows, columns = slice(top, top + high), slice(left, left + wide)
        y, x = STRIDE * top, STRIDE * left
        seen = image[index, :, y : y + STRIDE * high + reach, x : x + STRIDE * wide + reach]
        crops.append((seen, target[index, :, rows, columns], own[rows, columns]))
    images, targets, masks = (torch.stack(list(part)) for part in zip(*crops))
    return images, targets, masks


def of_nearest_centre(values: Tensor, apart: Tensor, pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Write values of points (P, N) to their pixels, each from the patch whose centre is nearest; a map (H, W).

    Args:
        apart: (P, N), distances of the points from the centres of their patches; the least value of equals counts.
        pixels: (P, N) int64, flat indices.
    """
    nearest = to_pixels(apart, pixels, size).flatten()[pixels]  # P N
    chosen = apart == nearest
    return to_pixels(values[chosen][None], pixels[chosen][None], size)


def ends(rgb: Tensor, cloud: Tensor, zeros: bool) -> Tensor:
    """``[w, b]`` that takes the least and greatest value of one to those of the other; zeros count only with `zeros`.

    Raises:
        CalibrationError: no value counts, or all of `rgb` are equal.
    """
    sides = [(x.flatten() if zeros else x[x > 0]).double() for x in (rgb, cloud)]
    if not all(len(x) for x in sides) or not bool(sides[0].amax() > sides[0].amin()):
        raise CalibrationError(
            "alignment of maps: the RGB or the 3D map of the validation parts has no two different values above 0; "
            "give good parts on which something was measured"
        )
    (low, high), (least, most) = ((x.amin(), x.amax()) for x in sides)
    weight = (most - least) / (high - low)
    return torch.stack([weight, least - weight * low])


def _top(maps: Tensor) -> Tensor:
    return maps.flatten(1).amax(1)
