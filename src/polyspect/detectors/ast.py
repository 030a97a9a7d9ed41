"""Asymmetric Student-Teacher (AST): a normalising flow is the teacher, a network of another kind imitates it.

Rudolph, Wehrbein, Rosenhahn, Wandt, "Asymmetric Student-Teacher Networks for Industrial Anomaly Detection" (WACV 2023).
On a grid of cells (h, w):

    x    frozen image features of every picture view, and the depth image folded, 8x8 pixels to 64 channels: (n, h, w)
    e    positional encoding, (32, h, w);   m  the cell's share of the part, 0..1: foreground, dilated by 8x8 pixels
    z_t = T(x, e)   teacher: Real-NVP flow (`layers.flow.Flow`), learns the density of good features
    z_s = S(x, e)   student: residual convolutions, or for comparison a flow like the teacher

    L_T = mean over cells of  m (0.5 |z_t|^2 - log|det dz_t/dx|)                                         (1)
    L_S = mean over cells of  D,   D = m mean_c (z_t - z_s)^2                                            (2)
    A = up8(m D),  score = max A with depth, mean D over cells without                                   (3)

A flow is one-to-one: off the good parts it gives z that a plain network has never seen and cannot guess, where a
student of the teacher's own kind would err alike. The two are trained one after the other on cached features.

Numbers are the released program's, which differs from the paper in the soft mask (paper: 0 or 1), its second
multiplication in A, the student's slope, and the teacher's hidden channels and clamp. `standardise` and `mask_features`
are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..backbones.image import ImageBackbone
from ..backbones.modalities import modality_features, name_stages
from ..errors import DataError
from ..layers.flow import ConvStudent, Flow, imitation_loss, likelihood_loss
from ..layers.maps import MapMoments
from ..samples import Batch, Features, Prediction, is_geometric
from ..weights.official import checkpoint_source, load_checkpoint
from .contract import Detector, Observe, Stage, evaluating, require, require_grid, require_views, seeded
from .recipe import check_recipe, train

FOLD = 8  # pixels of the depth image on each side of a cell
_POSITION = 32  # channels of the positional encoding
_require = partial(require, "AST")


@dataclass(frozen=True, kw_only=True)
class ASTConfig:
    """Settings of `AST`; the defaults are the released program's, but for the backbone, which needs no download."""

    modalities: tuple[str, ...] = ("rgb", "depth")  # depth is folded, any other view goes through the backbone
    # features
    backbone: str = "efficientnet_lite0"  # timm name; the paper: EfficientNet-B5, see preset `paper`
    weights: str = "auto"  # where the backbone's weights come from: see `ImageBackbone`
    reduction: int = 16  # pixels of the prepared part per cell; the paper: 32, of 768
    backbone_blocks: int | None = None  # EfficientNets: end behind this block (from 1); the paper: 6; None: the last
    pad: Literal["same", "static456"] = "same"  # TensorFlow's padding: by the image, or as for 456 pixels (the code)
    depth_scale: float = 100.0  # what prepared depth is multiplied by: metres to centimetres
    standardise: bool = False  # True: channels to mean 0 and deviation 1 over the good parts; not in the paper
    # the mask, from the foreground of the 3D view; none without a geometric modality
    mask: Literal["soft", "hard"] = "soft"  # the cell's share, or 1 for any share (paper, Eq. 5)
    mask_train: bool = True  # in both losses; the paper ablates it
    mask_eval: bool = True  # in map and score
    square_mask: bool = True  # twice in the map, as the code; no effect on a hard mask
    mask_features: bool = False  # True: cells off the part enter the networks as 0; not in the paper
    pos_enc: bool = True  # positional encoding for both networks; the paper ablates it
    # the networks
    teacher_hidden: int = 64  # channels inside the couplings; paper, 2D: 1024
    clamp: float = 1.9  # bound of the logarithm of a coupling's scale; paper, 2D: 3
    student: Literal["cnn", "flow"] = "cnn"  # flow: the symmetric pair that the paper compares with
    student_blocks: int = 4  # residual blocks, or couplings of a flow; the paper tries 1, 2, 4, 8, 12
    student_width: int = 1024  # channels inside the convolutional student
    slope: float = 0.01  # of the student's LeakyReLU below zero; paper 0.2
    checkpoint: tuple[str, ...] | None = None  # files to use as they are: the teacher's, or the teacher's and student's
    # training
    epochs: int = 72  # passes over the training parts, for each network (code: 3 x 24)
    batch_size: int = 8  # parts per step
    learning_rate: float = 2e-4  # of Adam
    betas: tuple[float, float] = (0.9, 0.999)  # of Adam
    lr_decay: float = 1.0  # the learning rate is multiplied by it after each epoch; 1: none
    weight_decay: float = 1e-5  # of Adam, on the gradient
    # score
    score: Literal["student", "likelihood"] = "student"  # likelihood: the teacher alone, as in an ablation
    aggregation: Literal["auto", "max", "mean"] = "auto"  # of the map; auto: max with a geometric view, mean without
    seed: int = 0  # of both networks' first weights

    def __post_init__(self) -> None:
        require_views("AST", self.modalities)
        check_recipe("AST", self)
        choices: dict[str, tuple[str, ...]] = {
            "pad": ("same", "static456"),
            "mask": ("soft", "hard"),
            "student": ("cnn", "flow"),
            "score": ("student", "likelihood"),
            "aggregation": ("auto", "max", "mean"),
        }
        for name, allowed in choices.items():
            _require(getattr(self, name) in allowed, name, f"one of {', '.join(allowed)}", getattr(self, name))
        for name in ("reduction", "teacher_hidden", "student_blocks", "student_width"):
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("clamp", "depth_scale"):
            _require(getattr(self, name) > 0, name, "above 0", getattr(self, name))
        for name in ("slope", "weight_decay"):
            _require(getattr(self, name) >= 0, name, "0 or more", getattr(self, name))
        files = self.checkpoint
        _require(files is None or 1 <= len(files) <= 2, "checkpoint", "one or two files: teacher, student", files)
        own = files is None or len(files) < 2 or self.student == "cnn"
        _require(own, "checkpoint", "the teacher's file alone with student 'flow'", files)

    @property
    def views(self) -> tuple[str, ...]:
        """The modalities in the order of their channels: depth comes last, as in published checkpoints."""
        return tuple(sorted(self.modalities, key=lambda name: name == "depth"))

    @property
    def masked(self) -> bool:
        """Whether there is a view that tells the part from its background."""
        return any(is_geometric(name) for name in self.modalities)


class AST(Detector):
    """Where a convolutional student cannot follow the flow that it learned from, a part is anomalous.

    Features: ``"<view>.1"``, (B, C, h, w) backbone features or (B, 64, h, w) folded depth, and ``valid`` and
    ``foreground``, (B, H, W) bool. Branch maps are the shares of the modalities in the map: a channel of z counts for
    the modality of the one feature that it is a scaled and shifted copy of. They add up to the map; since every channel
    is scaled by what the others show, a defect in one view can also show in the share of another.
    """

    Config = ASTConfig
    PRESETS = {
        "paper": {
            "backbone": "tf_efficientnet_b5.aa_in1k",
            "reduction": 32,
            "backbone_blocks": 6,
            "pad": "static456",
        },
        # fast: narrow networks and short training at a higher rate, a few minutes for 60 parts on a CPU core
        "fast": {
            "standardise": True,
            "mask_features": True,
            "teacher_hidden": 32,
            "student_width": 128,
            "student_blocks": 2,
            "epochs": 40,
            "learning_rate": 1e-3,
            "lr_decay": 0.93,
        },
    }
    PREPARATION = {"": "ast", "paper": "ast_paper", "fast": "ast"}
    frozen = ("backbone",)
    feature_mean: Tensor  # per channel of x, (n,)
    feature_std: Tensor

    def __init__(self, config: ASTConfig, *, pretrained: bool = True) -> None:
        super().__init__(config)
        c = config
        self.pictures = tuple(name for name in c.views if name != "depth")
        self.backbone: nn.Module = nn.Identity()  # where nothing but depth is looked at
        per_view = {"depth": FOLD**2}
        if self.pictures:
            self.backbone = ImageBackbone(
                c.backbone,
                reductions=(c.reduction,),
                weights=c.weights,
                pretrained=pretrained,
                seed=c.seed,
                blocks=c.backbone_blocks,
                padded_for=456 if c.pad == "static456" else None,
            )
            per_view |= dict.fromkeys(self.pictures, self.backbone.channels[0])
        self.channels = tuple(per_view[name] for name in c.views)
        n, position = sum(self.channels), _POSITION if c.pos_enc else 0
        with seeded(c.seed):
            self.teacher = Flow(n, position, c.teacher_hidden, clamp=c.clamp)
            self.student: nn.Module
            if c.student == "cnn":
                self.student = ConvStudent(n, position, c.student_width, c.student_blocks, c.slope)
            else:
                kernels = [3] * (c.student_blocks - 1) + [5]  # the teacher's, for as many blocks
                self.student = Flow(n, position, c.teacher_hidden, kernels, c.clamp)
        if pretrained:
            for name, file in zip(("teacher", "student"), c.checkpoint or ()):
                part = self.get_submodule(name)
                part.load_state_dict(load_checkpoint(file, "ast", part, f"ast-{name}"))
                self.sources[name] = checkpoint_source(file)
        self.register_buffer("feature_mean", torch.zeros(n))
        self.register_buffer("feature_std", torch.ones(n))

    def extract(self, batch: Batch) -> Features:
        """Backbone features of the pictures, and the folded depth.

        Raises:
            ShapeError: height or width is not a multiple of `reduction`, or smaller than two cells.
        """
        require_grid("AST", batch, self.config.reduction)
        features = {"valid": batch.valid, "foreground": batch.foreground}
        if self.pictures:
            features |= name_stages(modality_features(self.backbone, batch, self.pictures))
        if "depth" in self.modalities:
            features["depth.1"] = fold_depth(batch.images["depth"] * self.config.depth_scale, self._grid(features))
        return features

    def stages(self) -> Sequence[Stage]:
        """Measure the channels' levels if they are standardised, then train the teacher, then the student.

        What came from a `checkpoint` is not trained.
        """
        moments, given = MapMoments(), len(self.config.checkpoint or ())
        levels = Observe(
            name="feature_levels",
            update=partial(self._see_features, moments),
            finish=partial(self._set_levels, moments),
        )
        adam = partial(
            torch.optim.Adam,
            lr=self.config.learning_rate,
            betas=self.config.betas,
            weight_decay=self.config.weight_decay,
            fused=True,
        )
        teacher = train("teacher", self.config, self.teacher.parameters, self.teacher_loss, adam)
        student = train("student", self.config, self.student.parameters, self.student_loss, adam)
        needed = [teacher, student][given:] if self.config.score == "student" else [teacher][given:]
        return [levels, *needed] if self.config.standardise else needed

    def teacher_loss(self, features: Features) -> dict[str, Tensor]:
        """Eq. 1: the negative log-likelihood of good features, without its constant."""
        whole = self._weight(features)
        weight = whole if self.config.mask_train else None
        z, log_det = self._told(self._inputs(features, whole))
        return {"likelihood": likelihood_loss(z, log_det, weight).mean()}

    def student_loss(self, features: Features) -> dict[str, Tensor]:
        """Eq. 2: the mean squared difference between the two."""
        whole = self._weight(features)
        weight = whole if self.config.mask_train else None
        x = self._inputs(features, whole)
        with torch.no_grad():
            z, _ = self._told(x)
        return {"imitation": imitation_loss(z, self._imitate(x), weight).mean()}

    def score(self, features: Features) -> Prediction:
        """Eq. 3: the map, brought from cells to pixels, and its largest value or the mean over cells."""
        whole = self._weight(features)
        if whole is not None:  # nothing known of the part is no reason to pass it
            whole = torch.where(whole.flatten(1).any(1)[:, None, None], whole, 1)
        weight = whole if self.config.mask_eval else None
        with evaluating(self.teacher), evaluating(self.student):
            x = self._inputs(features, whole)
            z, log_det = self._told(x)
            shares = self._shares(x, z, log_det)  # B m h w
        cells = torch.cat([shares.sum(1, keepdim=True), shares], dim=1)  # B 1+m h w
        masked = cells if weight is None else torch.where(weight[:, None] > 0, cells, 0) * weight[:, None]  # D
        shown = masked
        if weight is not None and self.config.score == "likelihood":
            shown = _lowest_off_part(cells, weight)
        elif weight is not None and self.config.square_mask:
            shown = masked * weight[:, None]
        fine = F.interpolate(shown, scale_factor=FOLD, mode="bicubic", align_corners=False)  # A, Eq. 3
        by_mean = self.config.aggregation == "mean" or (self.config.aggregation == "auto" and not self.config.masked)
        score = masked[:, 0].mean((1, 2)) if by_mean else fine[:, 0].flatten(1).amax(1)
        size = features["valid"].shape[-2:]
        maps = fine if fine.shape[-2:] == size else F.interpolate(fine, size=size, mode="bilinear", align_corners=False)
        branches = {name: maps[:, index].float() for index, name in enumerate(self.config.views, start=1)}
        return Prediction(score=score.float(), map=maps[:, 0].float(), branch_maps=branches)

    def _shares(self, x: Tensor, z: Tensor, log_det: Tensor) -> Tensor:
        """The share of every view in what a cell scores, (B, m, h, w); the mask is not applied yet."""
        n, owner = z.shape[1], self._owners()
        if self.config.score == "likelihood":  # the determinant has no channels: it is split by their number
            shares = [0.5 * z[:, owner == i].square().sum(1) - log_det * k / n for i, k in enumerate(self.channels)]
        else:
            square = (z - self._imitate(x)).square()
            shares = [square[:, owner == i].sum(1) / n for i in range(len(self.channels))]
        return torch.stack(shares, dim=1)

    def _owners(self) -> Tensor:
        """For every channel of z the index of the view that it comes from, (n,)."""
        views = [torch.full((count,), index) for index, count in enumerate(self.channels)]
        return torch.cat(views).to(self.feature_mean.device)[self.teacher.origins()]

    def _imitate(self, x: Tensor) -> Tensor:
        """z_s (B, n, h, w)."""
        if self.config.student != "flow":
            return self.student(x)
        with torch.autocast(x.device.type, enabled=False):  # as the teacher
            return self.student(x)[0]

    def _told(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the teacher makes of x, in float32 whatever the precision: its couplings multiply up what is rounded."""
        with torch.autocast(x.device.type, enabled=False):
            z, log_det = self.teacher(x)
        return z, log_det

    def _inputs(self, features: Features, weight: Tensor | None) -> Tensor:
        """x (B, n, h, w), in the layout in which convolutions are faster; `weight` is the mask m."""
        x = torch.cat([features[f"{name}.1"] for name in self.config.views], dim=1)
        if self.config.standardise:
            x = (x - self.feature_mean[:, None, None]) / self.feature_std[:, None, None]
        if self.config.mask_features and weight is not None:
            x = torch.where(weight[:, None] > 0, x, 0)
        return x.contiguous(memory_format=torch.channels_last)

    def _weight(self, features: Features) -> Tensor | None:
        """m (B, h, w) in 0..1; None for 1 everywhere, where no view tells the part from its background."""
        if not self.config.masked:
            return None
        share = part_share(features["foreground"], self._grid(features))
        return (share > 0).float() if self.config.mask == "hard" else share

    def _grid(self, features: Features) -> tuple[int, int]:
        height, width = features["valid"].shape[-2:]
        return height // self.config.reduction, width // self.config.reduction

    def _see_features(self, moments: MapMoments, features: Features) -> None:
        x = torch.cat([features[f"{name}.1"] for name in self.config.views], dim=1)
        weight = self._weight(features)
        keep = torch.ones_like(x, dtype=torch.bool)
        moments.add(x, keep if weight is None else keep & (weight[:, None] > 0))

    def _set_levels(self, moments: MapMoments) -> None:
        count, mean, std = moments.take()
        if not bool((count > 0).all()):
            raise DataError(
                "no training part has a foreground, so the levels of its features cannot be measured: check the 3D "
                "views, or prepare with background=keep"
            )
        self.feature_mean.copy_(mean)
        self.feature_std.copy_(torch.where(std > 1e-6, std, 1))  # a constant channel stays what it is


def fold_depth(depth: Tensor, grid: tuple[int, int]) -> Tensor:
    """A depth image (B, 1, H, W) as 8x8 pixels per cell of the grid (h, w), its pixels as channels: (B, 64, h, w).

    Channel ``8 dy + dx`` is pixel (dy, dx) of the cell. Bilinear without antialias where the sizes differ.
    """
    fine = grid[0] * FOLD, grid[1] * FOLD
    if depth.shape[-2:] != fine:
        depth = F.interpolate(depth, size=fine, mode="bilinear", align_corners=False)
    return F.pixel_unshuffle(depth, FOLD)


def part_share(foreground: Tensor, grid: tuple[int, int]) -> Tensor:
    """The share of the part in every cell, (B, h, w) in 0, 0.25, ..., 1.

    At 8x8 pixels per cell the foreground (B, H, W) bool is dilated, every pixel to rows and columns -4 to +3 about it,
    and brought to the grid by the bilinear rule, which looks at the middle 2x2 pixels of a cell.
    """
    fine = grid[0] * FOLD, grid[1] * FOLD
    on = foreground[:, None].float()
    if on.shape[-2:] != fine:
        on = (F.interpolate(on, size=fine, mode="bilinear", align_corners=False) > 0).float()
    dilated = F.max_pool2d(F.pad(on, (3, 4, 3, 4)), FOLD, stride=1)
    return F.interpolate(dilated, size=grid, mode="bilinear", align_corners=False)[:, 0]


def _lowest_off_part(cells: Tensor, weight: Tensor) -> Tensor:
    """Cells (B, K, h, w) whose value off the part is the smallest on it.

    A log-likelihood knows no zero: where most are negative, masked cells at 0 would be the most anomalous ones.
    """
    on = (weight > 0)[:, None]
    lowest = torch.where(on, cells, torch.inf).amin((2, 3), keepdim=True)
    return torch.where(on, cells, lowest)
