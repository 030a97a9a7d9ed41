"""Forward distillation (FD, STFPM): an untrained copy of a frozen network learns to answer as it does on good parts.

Wang et al., "Student-Teacher Feature Pyramid Matching for Anomaly Detection" (BMVC 2021), for any one modality, and the
"FD" rows that "Rethinking Reverse Distillation for Multi-Modal Anomaly Detection" (MMRD, Table 2c) compares with.
Teacher and student see the same image; scales i = 1, 2, 3 are strides 4, 8, 16:

    T_i, S_i         features of teacher (frozen) and student (random at the start), (C_i, h_i, w_i)
    D_i(p) = 1 - cos(S_i(p), T_i(p))                                                                     (1)
    L = sum_i of the mean of Eq. 1 over whole maps, or per position, or twice that                       (2)
    A = gaussian(sum_i Up(D_i)) or prod_i Up(2 D_i),  score = max A                                      (3)

2 D_i is the squared distance of unit vectors, the loss of STFPM. Defaults are MMRD's recipe for reverse distillation,
so that the two differ in the paradigm only (the paper says nothing of its FD row). Preset `stfpm` is the authors' own;
but they keep the epoch with the lowest map on held-out good parts and enlarge maps in two steps, from 64 x 64, without
aligned corners, where this keeps the last epoch and enlarges once, as reverse distillation does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from ..backbones.image import ImageBackbone, trainable_network
from ..backbones.modalities import modality_image, name_stages, stages_of
from ..layers.distillation import LossKind, cosine_losses
from ..layers.maps import cosine_map, fill_unkept, gaussian_smooth
from ..samples import Batch, Features, Prediction, is_geometric
from ..weights.official import checkpoint_source, load_checkpoint
from .contract import Detector, Stage, evaluating, require, require_grid, require_views
from .recipe import check_recipe, train

_require = partial(require, "ForwardDistillation")


@dataclass(frozen=True, kw_only=True)
class ForwardDistillationConfig:
    """Settings of `ForwardDistillation`; MMRD's recipe, but for a backbone whose weights need no download."""

    modalities: tuple[str, ...] = ("rgb",)  # exactly one, any image-like one
    backbone: str = "efficientnet_lite0"  # timm name of teacher and student; MMRD: WideResNet-50; STFPM: ResNet-18
    weights: str = "auto"  # where the teacher's weights come from: see `ImageBackbone`
    checkpoint: str | None = None  # a trained student to use as it is (a published or imported file); trains none
    epochs: int = 400  # passes over the training parts, MMRD Sec. 5; STFPM 100
    batch_size: int = 16  # parts per step, MMRD Sec. 5; STFPM 32
    optimizer: Literal["adam", "sgd"] = "adam"  # MMRD Sec. 5; STFPM Sec. 4: SGD
    learning_rate: float = 1e-3  # MMRD Sec. 5; STFPM 0.4 with SGD
    betas: tuple[float, float] = (0.5, 0.999)  # of Adam
    momentum: float = 0.9  # of SGD, STFPM Sec. 4
    weight_decay: float = 1e-4  # of SGD, STFPM Sec. 4
    lr_decay: float = 1.0  # the learning rate is multiplied by it after each epoch; 1: none
    loss: Literal["flat", "pixel", "squared"] = "flat"  # Eq. 2; STFPM: squared
    map_mode: Literal["add", "multiply"] = "add"  # of the scales, Eq. 3; STFPM: multiply
    smoothing: float = 4.0  # sigma of the Gaussian on the map, input pixels; 0: none (STFPM)
    mask_invalid: bool = False  # True: a geometric view ignores positions without 3D data, in loss and map
    seed: int = 0  # of the student's first weights

    def __post_init__(self) -> None:
        require_views("ForwardDistillation", self.modalities)
        _require(len(self.modalities) == 1, "modalities", "one name", self.modalities)
        check_recipe("ForwardDistillation", self)
        _require(self.optimizer in ("adam", "sgd"), "optimizer", "'adam' or 'sgd'", self.optimizer)
        _require(0 <= self.momentum < 1, "momentum", "in [0, 1)", self.momentum)
        _require(self.weight_decay >= 0, "weight_decay", "0 or more", self.weight_decay)
        _require(self.loss in ("flat", "pixel", "squared"), "loss", "'flat', 'pixel' or 'squared'", self.loss)
        _require(self.map_mode in ("add", "multiply"), "map_mode", "'add' or 'multiply'", self.map_mode)
        _require(self.smoothing >= 0, "smoothing", "0 or more pixels", self.smoothing)


class ForwardDistillation(Detector):
    """Where a student trained on good parts answers unlike its teacher, the part is anomalous.

    Features: ``image``, (B, 3, H, W) as the teacher sees it, ``"<modality>.1"`` to ``"<modality>.3"``,
    (B, C_i, h_i, w_i) at strides 4, 8, 16, and ``valid``, (B, H, W) bool. The only branch map is the map.
    """

    Config = ForwardDistillationConfig
    PRESETS = {
        "paper": {"backbone": "wide_resnet50_2.tv_in1k"},
        "stfpm": {
            "backbone": "resnet18.tv_in1k",
            "epochs": 100,
            "batch_size": 32,
            "optimizer": "sgd",
            "learning_rate": 0.4,
            "loss": "squared",
            "map_mode": "multiply",
            "smoothing": 0.0,
        },
        "fast": {"epochs": 40, "batch_size": 8, "learning_rate": 0.005, "lr_decay": 0.9, "mask_invalid": True},
    }
    PREPARATION = {"paper": "crd_paper", "stfpm": "crd_paper"}
    frozen = ("teacher",)

    def __init__(self, config: ForwardDistillationConfig, *, pretrained: bool = True) -> None:
        super().__init__(config)
        self.teacher = ImageBackbone(
            config.backbone, reductions=(4, 8, 16), weights=config.weights, pretrained=pretrained, seed=config.seed
        )
        # another seed than the teacher's, so that beside a random teacher the student is not its copy
        self.student = trainable_network(config.backbone, reductions=(4, 8, 16), seed=config.seed + 1)
        if config.checkpoint is not None and pretrained:
            self.student.load_state_dict(load_checkpoint(config.checkpoint, "forward_distillation", self.student))
            self.sources["student"] = checkpoint_source(config.checkpoint)

    @property
    def view(self) -> str:
        """The one modality."""
        return self.modalities[0]

    def extract(self, batch: Batch) -> Features:
        """Teacher features and the image that the student will see.

        Raises:
            ShapeError: height or width is not a multiple of 32, or smaller than 64.
        """
        require_grid("forward distillation", batch, 32)
        image = (modality_image(batch, self.view) - self.teacher.mean) / self.teacher.std
        return {"valid": batch.valid, "image": image} | name_stages({self.view: self.teacher.features(image)})

    def stages(self) -> Sequence[Stage]:
        """Train the student; nothing with a `checkpoint`."""
        if self.config.checkpoint is not None:
            return []
        sgd = self._sgd if self.config.optimizer == "sgd" else None
        return [train("student", self.config, self.student.parameters, self.loss, sgd)]

    def loss(self, features: Features) -> dict[str, Tensor]:
        """Eq. 2."""
        kind: LossKind = "flat" if self.config.loss == "flat" else "pixel"
        factor = 2.0 if self.config.loss == "squared" else 1.0
        student, teacher = self._answers(features)
        terms = cosine_losses({"imitated": student}, teacher, kind=kind, keep=self._kept(features))
        return {name: factor * term for name, term in terms.items()}

    def score(self, features: Features) -> Prediction:
        """Map and score of Eq. 3; pixels that do not count get the mean of the part's others."""
        keep = self._kept(features)
        with evaluating(self.student):
            student, teacher = self._answers(features)
        height, width = features["valid"].shape[-2:]
        multiply = self.config.map_mode == "multiply"
        raw = cosine_map(student, teacher, (height, width), keep, multiply=multiply)
        if multiply:
            raw = 2 ** len(teacher) * raw
        if keep is not None:
            raw = fill_unkept(raw, keep)
        smooth = gaussian_smooth(raw, self.config.smoothing).float()  # Eq. 3
        return Prediction(score=smooth.flatten(1).amax(1), map=smooth, branch_maps={self.view: smooth})

    def _answers(self, features: Features) -> tuple[list[Tensor], list[Tensor]]:
        """Features of student and teacher, shallow first."""
        image = features["image"].contiguous(memory_format=torch.channels_last)
        student: list[Tensor] = self.student(image)
        return student, stages_of(features, self.view)

    def _sgd(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        c = self.config
        return torch.optim.SGD(parameters, lr=c.learning_rate, momentum=c.momentum, weight_decay=c.weight_decay)

    def _kept(self, features: Features) -> Tensor | None:
        """The pixels (B, H, W) that count; None for all."""
        return features["valid"] if self.config.mask_invalid and is_geometric(self.view) else None
