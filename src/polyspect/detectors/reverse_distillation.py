"""Reverse Distillation (RD): a student restores a frozen network's features from a narrow embedding of normal parts.

Deng and Li, "Anomaly Detection via Reverse Distillation from One-Class Embedding" (CVPR 2022), for any one modality.
Scales i = 1, 2, 3 are strides 4, 8, 16:

    T_i              teacher features, (C_i, h_i, w_i), frozen
    E = OCBE(T)      multi-scale fusion and one residual stage: (2 C_3, H/32, W/32)
    S_3 = D_3(E), S_2 = D_2(S_3), S_1 = D_1(S_2)            the student runs from deep to shallow
    D_i(p) = 1 - cos(S_i(p), T_i(p))                                                                     (1)
    L = sum_i mean over parts of [1 - cos of the two whole maps]      or of the mean of Eq. 1            (2)
    A = gaussian(sum_i Up(D_i)),  score = max A                       or the product over scales         (3)

The paper describes Eq. 2 per position and its code trains with whole maps; the code's is the default, as it made the
published figures. Published recipes for this method differ; they are presets: `paper` is the authors', `mmrd` and
`crd` are those of the two papers that compare with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor, nn

from ..backbones.image import ImageBackbone
from ..backbones.modalities import modality_features, name_stages, stages_of
from ..layers.blocks import BlockPlan, ReverseDecoder, init_convolutions, plan_blocks
from ..layers.bottleneck import OneClassEmbedding
from ..layers.distillation import LossKind, cosine_losses
from ..layers.maps import cosine_map, fill_unkept, gaussian_smooth
from ..samples import Batch, Features, Prediction, is_geometric
from ..weights.official import checkpoint_source, load_checkpoint
from .contract import Detector, Stage, evaluating, require, require_grid, require_views, seeded
from .recipe import check_recipe, train

_require = partial(require, "ReverseDistillation")


@dataclass(frozen=True, kw_only=True)
class ReverseDistillationConfig:
    """Settings of `ReverseDistillation`; the authors' code, but for a backbone whose weights need no download."""

    modalities: tuple[str, ...] = ("rgb",)  # exactly one, any image-like one
    backbone: str = "efficientnet_lite0"  # timm name of the teacher; Sec. 4: WideResNet-50, see preset `paper`
    weights: str = "auto"  # where the teacher's weights come from: see `ImageBackbone`
    checkpoint: str | None = None  # a trained student to use as it is (a published or imported file); trains none
    epochs: int = 200  # passes over the training parts, Sec. 4
    batch_size: int = 16  # parts per step, Sec. 4
    learning_rate: float = 0.005  # of Adam, Sec. 4
    betas: tuple[float, float] = (0.5, 0.999)  # of Adam, Sec. 4
    lr_decay: float = 1.0  # the learning rate is multiplied by it after each epoch; 1: none (CRD's rows: 0.95)
    loss: LossKind = "flat"  # cosine over whole maps (the code) or per position (the paper), Eq. 2
    map_mode: Literal["add", "multiply"] = "add"  # of the scales, Eq. 3
    image_score: Literal["max", "sum"] = "max"  # of the map; the code's one-class novelty runs sum it
    fuse_scales: bool = True  # multi-scale fusion: off embeds the features at stride 16 only
    compress: bool = True  # residual stage of the embedding; off: 2x2 mean and 1x1 convolution
    smoothing: float = 4.0  # sigma of the Gaussian on the map, input pixels; 0: none
    mask_invalid: bool = False  # True: a geometric view ignores positions without 3D data, in loss and map
    seed: int = 111  # of the student's first weights, the code's

    def __post_init__(self) -> None:
        require_views("ReverseDistillation", self.modalities)
        _require(len(self.modalities) == 1, "modalities", "one name (several: 'mmrd' or 'crd')", self.modalities)
        check_recipe("ReverseDistillation", self)
        _require(self.loss in ("flat", "pixel"), "loss", "'flat' or 'pixel'", self.loss)
        _require(self.map_mode in ("add", "multiply"), "map_mode", "'add' or 'multiply'", self.map_mode)
        _require(self.image_score in ("max", "sum"), "image_score", "'max' or 'sum'", self.image_score)
        _require(self.smoothing >= 0, "smoothing", "0 or more pixels", self.smoothing)


class Student(nn.Module):
    """Embedding and decoder, for teacher features of `channels` at strides 4, 8, 16."""

    def __init__(self, channels: Sequence[int], plan: BlockPlan, config: ReverseDistillationConfig, nonneg: bool):
        super().__init__()
        self.embedding = OneClassEmbedding(channels, plan, fuse=config.fuse_scales, compress=config.compress)
        self.decoder = ReverseDecoder(channels, plan, nonneg=nonneg)
        init_convolutions(self)

    def forward(self, teacher: Sequence[Tensor]) -> list[Tensor]:
        """S_1, S_2, S_3, each shaped as the teacher's (B, C_i, h_i, w_i)."""
        restored, _ = self.decoder(self.embedding(teacher))
        return restored


class ReverseDistillation(Detector):
    """What a student that has seen good parts only cannot restore is anomalous.

    Features: ``"<modality>.1"`` to ``"<modality>.3"``, (B, C_i, h_i, w_i) at strides 4, 8, 16, and ``valid``,
    (B, H, W) bool. The only branch map is the map.
    """

    Config = ReverseDistillationConfig
    PRESETS = {
        "paper": {"backbone": "wide_resnet50_2.tv_in1k"},
        "mmrd": {"backbone": "wide_resnet50_2.tv_in1k", "epochs": 400, "learning_rate": 1e-3},
        "crd": {"backbone": "wide_resnet50_2.tv_in1k", "lr_decay": 0.95},
        "fast": {"epochs": 40, "batch_size": 8, "lr_decay": 0.9, "mask_invalid": True},
    }
    PREPARATION = {"paper": "crd_paper", "mmrd": "crd_paper", "crd": "crd_paper"}
    frozen = ("teacher",)

    def __init__(self, config: ReverseDistillationConfig, *, pretrained: bool = True) -> None:
        super().__init__(config)
        self.teacher = ImageBackbone(
            config.backbone, reductions=(4, 8, 16), weights=config.weights, pretrained=pretrained, seed=config.seed
        )
        plan = plan_blocks(config.backbone, self.teacher.channels)
        with seeded(config.seed):
            self.student = Student(self.teacher.channels, plan, config, self.teacher.nonneg)
        if config.checkpoint is not None and pretrained:
            self.student.load_state_dict(load_checkpoint(config.checkpoint, "reverse_distillation", self.student))
            self.sources["student"] = checkpoint_source(config.checkpoint)

    @property
    def view(self) -> str:
        """The one modality."""
        return self.modalities[0]

    def extract(self, batch: Batch) -> Features:
        """Teacher features.

        Raises:
            ShapeError: height or width is not a multiple of 32, or smaller than 64.
        """
        require_grid("reverse distillation", batch, 32)
        return {"valid": batch.valid} | name_stages(modality_features(self.teacher, batch, self.modalities))

    def stages(self) -> Sequence[Stage]:
        """Train the student; nothing with a `checkpoint`."""
        if self.config.checkpoint is not None:
            return []
        return [train("student", self.config, self.student.parameters, self.loss)]

    def loss(self, features: Features) -> dict[str, Tensor]:
        """Eq. 2."""
        teacher = stages_of(features, self.view)
        student = {"restored": self.student(teacher)}
        return cosine_losses(student, teacher, kind=self.config.loss, keep=self._kept(features))

    def score(self, features: Features) -> Prediction:
        """Map and score of Eq. 3; pixels that do not count get the mean of the part's others."""
        teacher, keep = stages_of(features, self.view), self._kept(features)
        with evaluating(self.student):
            student = self.student(teacher)
        height, width = features["valid"].shape[-2:]
        raw = cosine_map(student, teacher, (height, width), keep, multiply=self.config.map_mode == "multiply")
        if keep is not None:
            raw = fill_unkept(raw, keep)
        smooth = gaussian_smooth(raw, self.config.smoothing).float()  # Eq. 3
        flat = smooth.flatten(1)
        score = flat.amax(1) if self.config.image_score == "max" else flat.sum(1)
        return Prediction(score=score, map=smooth, branch_maps={self.view: smooth})

    def _kept(self, features: Features) -> Tensor | None:
        """The pixels (B, H, W) that count; None for all."""
        return features["valid"] if self.config.mask_invalid and is_geometric(self.view) else None
