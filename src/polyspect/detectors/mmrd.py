"""Multi-Modal Reverse Distillation (MMRD): one student restores the fused features of all modalities.

"Rethinking Reverse Distillation for Multi-Modal Anomaly Detection" (AAAI 2024). R is the main modality (RGB), A an
auxiliary one (depth, normals); stages i = 1, 2, 3 are strides 4, 8, 16:

    F^R_i, F^A_i     features of one frozen network with batch-norm statistics of its own per modality
    alpha(X) = sigmoid((X - mu)^2 / (sigma^2 + 1e-4))        per part and channel, over positions          (2)
    F^T_i = F^R_i + alpha(F^R_i + F^A_i) * F^A_i             the target                                    (3)
    Fhat^M_i         F^M_i written with N_i learnt prototypes (`layers.prototypes`), loss L^M_i            (4)-(6)
    Fbar_i = SA(Fhat^A_i) * (CA(Fhat^R_i) Fhat^R_i + Fhat^R_i) + Fhat^R_i      the prior                   (7)
    F^S_3 = D_3(OCBE(F^T)),  F^S_{i-1} = D_{i-1}([F^S_i ; Fbar_i])             the student                 (8)
    L = sum_i KD(F^S_i, F^T_i) + lambda sum_{i,M} L^M_i      KD the cosine loss of Eq. 1 with F^T as target (9)
    A = gaussian(sum_i Up(1 - cos(F^S_i, F^T_i))),  score = max A                                          (10)

There is no public code. What the paper leaves open is a setting with a reasoned default: how the statistics are
re-estimated (a pass of its own before training, so that targets are constant and can be cached), where prototypes start
(at features of training parts), what enters the embedding (F^T), and that Fbar_1 is not used by Eq. 8 as printed. The
paper calls alpha a number in [0, 1]; by Eq. 2 it lies in [0.5, 1). More than two modalities follow its "All" row, whose
details are in a supplement we do not have: alpha from the sum of all maps, SA averaged over the auxiliaries. A single
modality keeps its own statistics, prototypes and the bracket of Eq. 7.

F^T is a sum with one summand per modality, so Eq. 10's distance splits exactly along it (`layers.maps.cosine_shares`):
these shares are the branch maps, and they add up to the map.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..backbones.image import ImageBackbone
from ..backbones.modalities import modality_features, modality_image, name_stages, stages_of
from ..backbones.siamese import SiameseBackbone
from ..errors import DataError
from ..layers.blocks import BlockPlan, ForwardTrunk, Priors, ReverseDecoder, init_convolutions, plan_blocks
from ..layers.bottleneck import OneClassEmbedding
from ..layers.distillation import LossKind, cosine_losses, kept_cells
from ..layers.fusion import RULES, Rule, SqueezeExcitation, fuse
from ..layers.maps import cosine_map, cosine_shares, enlarge, fill_unkept, gaussian_smooth
from ..layers.prototypes import Prototypes, RandomRows, prototype_loss
from ..samples import Batch, Features, Prediction, is_geometric
from .contract import Detector, Observe, Stage, evaluating, require, require_grid, require_views, seeded
from .recipe import check_recipe, train

_require = partial(require, "MMRD")
STAGES = (0, 1, 2)  # strides 4, 8, 16


@dataclass(frozen=True, kw_only=True)
class MMRDConfig:
    """Settings of `MMRD`; the defaults are the paper's, but for the backbone, whose weights need no download."""

    modalities: tuple[str, ...] = ("rgb", "depth")  # the main one first; any image-like ones, one or more, Tab. 2d
    backbone: str = "efficientnet_lite0"  # timm name of the teacher; Sec. 5: WideResNet-50, see preset `paper`
    weights: str = "auto"  # where the teacher's weights come from: see `ImageBackbone`
    paradigm: Literal["reverse", "forward"] = "reverse"  # forward: the MMFD row of Tab. 2c
    # teacher
    bn_adapt: Literal["none", "aux", "main", "all"] = "all"  # whose statistics are re-estimated, Tab. 2b
    bn_passes: int = 5  # over the training parts, for that; the paper: "several epochs"
    bn_momentum: float | None = None  # None: cumulative average; a number: moving average from ImageNet's statistics
    fusion: Rule = "alpha_sum"  # Eq. 3, Tab. 2e: csa, ssa, add (alpha = 1), alpha_aux, alpha_sum, sem; or rgb_only
    fusion_jointly: bool = True  # with several auxiliaries, one alpha from all of them; False: one for each
    # priors
    prototypes: tuple[int, int, int] = (50, 50, 50)  # N_1, N_2, N_3, Tab. 2f; (0, 0, 0): no priors at all
    tau: float = 1.0  # temperature of Eq. 4, which has none
    prototype_init: Literal["features", "normal"] = "features"  # of training parts, or N(0, 1)
    interaction: Literal["full", "none"] = "full"  # none: Eq. 7 without its first term, Tab. 2a "MMT+PG"
    attention_pool: Literal["channel", "spatial"] = "channel"  # the maximum in SA: over channels, or 3x3 positions
    prior_at: Literal["input", "output"] = "input"  # Eq. 8: of the next decoder stage; output: behind every stage
    prior_detach: bool = False  # True: prototypes learn from Eq. 6 alone
    # student
    embed: Literal["fused", "main"] = "fused"  # what enters the embedding: F^T or F^R
    forward_input: Literal["main", "all"] = "main"  # what a forward student sees
    # training
    epochs: int = 400  # passes over the training parts, Sec. 5
    batch_size: int = 16  # parts per step, Sec. 5
    learning_rate: float = 1e-3  # of Adam, Sec. 5
    betas: tuple[float, float] = (0.5, 0.999)  # of Adam; not in the paper, as reverse distillation
    lr_decay: float = 1.0  # the learning rate is multiplied by it after each epoch; 1: none
    prototype_weight: float = 0.1  # lambda of Eq. 9
    loss: LossKind = "flat"  # cosine over whole maps, as reverse distillation's code, or per position
    # score
    smoothing: float = 4.0  # sigma of the Gaussian on the map, input pixels; 0: none
    mask_invalid: bool = False  # True: a geometric modality adds nothing where it was not measured
    seed: int = 0  # of the student's first weights and of the prototypes

    def __post_init__(self) -> None:
        require_views("MMRD", self.modalities)
        check_recipe("MMRD", self)
        choices: Mapping[str, Sequence[str]] = {
            "paradigm": ("reverse", "forward"),
            "bn_adapt": ("none", "aux", "main", "all"),
            "fusion": RULES,
            "prototype_init": ("features", "normal"),
            "interaction": ("full", "none"),
            "attention_pool": ("channel", "spatial"),
            "prior_at": ("input", "output"),
            "embed": ("fused", "main"),
            "forward_input": ("main", "all"),
            "loss": ("flat", "pixel"),
        }
        for name, allowed in choices.items():
            _require(getattr(self, name) in allowed, name, f"one of {', '.join(allowed)}", getattr(self, name))
        _require(self.bn_passes >= 1, "bn_passes", "at least 1", self.bn_passes)
        momentum = self.bn_momentum
        _require(momentum is None or 0 < momentum <= 1, "bn_momentum", "above 0 and at most 1, or null", momentum)
        counts = self.prototypes
        _require(len(counts) == 3, "prototypes", "three numbers", counts)
        _require(min(counts) >= 1 or set(counts) == {0}, "prototypes", "each at least 1, or all 0", counts)
        _require(self.tau > 0, "tau", "above 0", self.tau)
        _require(self.prototype_weight >= 0, "prototype_weight", "0 or more", self.prototype_weight)
        _require(self.smoothing >= 0, "smoothing", "0 or more pixels", self.smoothing)
        pair = self.fusion not in ("csa", "ssa", "sem") or len(self.modalities) <= 2
        _require(pair, "fusion", "add, alpha_aux, alpha_sum or rgb_only for more than two modalities", self.fusion)

    @property
    def adapted(self) -> tuple[str, ...]:
        """The modalities whose batch-norm statistics are re-estimated."""
        main, *others = self.modalities
        return {"none": (), "aux": tuple(others), "main": (main,), "all": self.modalities}[self.bn_adapt]


class StagePrior(nn.Module):
    """The prior of one stage from the features of all modalities: prototypes (Eqs. 4-5) and their interaction (Eq. 7).

    Args:
        channels: C of the stage.
        count: N prototypes per modality.
        config: Names of the modalities and the switches.
    """

    def __init__(self, channels: int, count: int, config: MMRDConfig) -> None:
        super().__init__()
        self.main, *self.others = config.modalities
        self.detach, self.full = config.prior_detach, config.interaction == "full"
        self.spatial = config.attention_pool == "spatial"
        self.prototypes = nn.ModuleDict({name: Prototypes(count, channels, config.tau) for name in config.modalities})
        self.channel = SqueezeExcitation(channels) if self.full else None  # CA
        inputs = channels if self.spatial else 1
        self.position = nn.Conv2d(inputs, 1, 3, padding=1) if self.full and self.others else None  # SA

    def forward(self, features: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Fbar, (B, C, h, w), and Fhat of every modality, from the stage's features (B, C, h, w)."""
        written = {name: bank(features[name]) for name, bank in self.prototypes.items()}  # Eq. 5
        priors = {name: prior.detach() for name, prior in written.items()} if self.detach else written
        own = priors[self.main]
        if self.channel is None:
            return own, written
        lifted = self.channel(own) * own + own  # the bracket of Eq. 7
        if self.position is None:
            return lifted, written
        attention = [torch.sigmoid(self.position(self._pool(priors[name]))) for name in self.others]
        return sum(attention) / len(attention) * lifted + own, written  # Eq. 7

    def _pool(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, 3, stride=1, padding=1) if self.spatial else x.amax(1, keepdim=True)


class Student(nn.Module):
    """All that learns: priors, and an embedding with a decoder, or a forward trunk.

    Args:
        channels: C_1, C_2, C_3 of the teacher.
        plan: The kind and number of residual blocks.
        nonneg: Whether the teacher's features are never negative.
    """

    def __init__(self, channels: Sequence[int], plan: BlockPlan, config: MMRDConfig, *, nonneg: bool) -> None:
        super().__init__()
        helped = config.prototypes[0] > 0
        self.priors = nn.ModuleList(
            StagePrior(width, count, config) for width, count in zip(channels, config.prototypes) if helped
        )
        self.gates = nn.ModuleList(SqueezeExcitation(width) for width in channels if config.fusion == "sem")
        where: Priors = config.prior_at if helped else "none"
        self.embedding: OneClassEmbedding | None = None
        if config.paradigm == "reverse":
            self.embedding = OneClassEmbedding(channels, plan)
            self.decoder: nn.Module = ReverseDecoder(channels, plan, nonneg=nonneg, priors=where)
        else:
            inputs = 3 * len(config.modalities) if config.forward_input == "all" else 3
            self.decoder = ForwardTrunk(channels, plan, inputs=inputs, priors=helped, nonneg=nonneg)
        init_convolutions(self)

    def forward(self, seen: Sequence[Tensor] | Tensor, priors: Sequence[Tensor]) -> list[Tensor]:
        """F^S_1, F^S_2, F^S_3, each (B, C_i, h_i, w_i), from what the student sees: feature maps, or an image."""
        if self.embedding is None:
            restored: list[Tensor] = self.decoder(seen, priors)
            return restored
        _, mixed = self.decoder(self.embedding(seen), priors=priors)  # Eq. 8
        return mixed


@dataclass(frozen=True, eq=False)
class Restored:
    """What one pass of MMRD over features gives; lists are shallow first."""

    features: list[dict[str, Tensor]]  # F^M_i
    parts: list[list[Tensor]]  # the summands of F^T_i, one per modality
    target: list[Tensor]  # F^T_i
    student: list[Tensor]  # F^S_i
    written: list[dict[str, Tensor]]  # Fhat^M_i; empty dicts without prototypes


class MMRD(Detector):
    """Fuse the modalities' features, restore them from what normal parts look like; what cannot be is anomalous.

    Features: ``"<modality>.1"`` to ``"<modality>.3"``, (B, C_i, h_i, w_i) at strides 4, 8, 16, and ``valid``,
    (B, H, W) bool; with ``paradigm="forward"`` also ``image``, (B, 3 or 3 m, H, W). Branch maps are the modalities'
    shares of the map and add up to it.
    """

    Config = MMRDConfig
    PRESETS = {
        "paper": {"backbone": "wide_resnet50_2.tv_in1k"},
        # with the table in the picture, statistics of one category amplify its noise: docs/methods/mmrd.md
        "fast": {
            "epochs": 40,
            "batch_size": 8,
            "learning_rate": 0.005,
            "lr_decay": 0.9,
            "bn_adapt": "none",
            "mask_invalid": True,
        },
    }
    PREPARATION = {"paper": "crd_paper"}
    frozen = ("teacher",)

    def __init__(self, config: MMRDConfig, *, pretrained: bool = True) -> None:
        super().__init__(config)
        network = ImageBackbone(
            config.backbone, reductions=(4, 8, 16), weights=config.weights, pretrained=pretrained, seed=config.seed
        )
        plan = plan_blocks(config.backbone, network.channels)
        self.teacher = SiameseBackbone(network, config.modalities)
        with seeded(config.seed):
            self.student = Student(network.channels, plan, config, nonneg=network.nonneg)

    # -- the frozen part ---------------------------------------------------------------------------------------------

    def extract(self, batch: Batch) -> Features:
        """Features of every modality, in one pass of the network.

        Raises:
            ShapeError: height or width is not a multiple of 32, or smaller than 64.
        """
        require_grid("MMRD", batch, 32)
        features = {"valid": batch.valid} | name_stages(modality_features(self.teacher, batch, self.modalities))
        if self.config.paradigm == "forward":
            names = self.modalities if self.config.forward_input == "all" else self.modalities[:1]
            mean, std = self.teacher.backbone.mean, self.teacher.backbone.std
            features["image"] = torch.cat([(modality_image(batch, name) - mean) / std for name in names], dim=1)
        return features

    # -- fitting -----------------------------------------------------------------------------------------------------

    def stages(self) -> Sequence[Stage]:
        """Re-estimate the teacher's statistics, draw prototypes, train the student."""
        config = self.config
        stages: list[Stage] = []
        if config.adapted and self.teacher.norms:
            seen = _Count()
            stages.append(
                Observe(
                    name="statistics",
                    update=partial(self._see_images, seen),
                    finish=seen.reset,
                    over="batches",
                    passes=config.bn_passes,
                    batch_size=config.batch_size,
                )
            )
        if self.student.priors and config.prototype_init == "features":
            rows = {
                (stage, name): RandomRows(count, config.seed + 3 * index + stage)
                for stage, count in enumerate(config.prototypes)
                for index, name in enumerate(config.modalities)
            }
            see, draw = partial(self._see_features, rows), partial(self._set_prototypes, rows)
            stages.append(Observe(name="prototypes", update=see, finish=draw))
        stages.append(train("student", config, self.student.parameters, self.loss))
        return stages

    def loss(self, features: Features) -> dict[str, Tensor]:
        """The terms of Eq. 9: ``restored``, and ``prototypes_<modality>`` with lambda multiplied in."""
        restored = self.restore(features)
        terms = cosine_losses(
            {"restored": restored.student}, restored.target, kind=self.config.loss, keep=self._kept(features)
        )
        for name in self.modalities if self.student.priors else ():
            losses = []
            for stage in STAGES:
                own = restored.features[stage][name]
                losses.append(prototype_loss(own, restored.written[stage][name], self._cells(features, name, own)))
            terms[f"prototypes_{name}"] = self.config.prototype_weight * sum(losses)
        return terms

    def _see_images(self, seen: _Count, batch: Batch) -> None:
        """Take one batch into the statistics; a short last batch, whose numbers are noisier, is left out."""
        if seen.batches and len(batch) < self.config.batch_size:
            return
        seen.batches += 1
        momentum = self.config.bn_momentum
        for name in self.config.adapted:
            if momentum is None and seen.batches == 1:
                self.teacher.forget(name)
            self.teacher.adapt(name, modality_image(batch, name), momentum or 1 / seen.batches)

    def _see_features(self, rows: Mapping[tuple[int, str], RandomRows], features: Features) -> None:
        for name in self.modalities:
            for stage, x in enumerate(stages_of(features, name)):
                cells = self._cells(features, name, x)
                vectors = x.permute(0, 2, 3, 1)  # B h w C
                rows[stage, name].add(vectors.flatten(0, 2) if cells is None else vectors[cells])

    def _set_prototypes(self, rows: Mapping[tuple[int, str], RandomRows]) -> None:
        for (stage, name), sample in rows.items():
            prior = cast(StagePrior, self.student.priors[stage])
            bank, drawn = cast(Prototypes, prior.prototypes[name]), sample.take()
            if len(drawn) < len(bank.vectors):
                raise DataError(
                    f"'{name}' has {len(drawn)} measured positions at stride {4 * 2**stage} over all training parts, "
                    f"fewer than its {len(bank.vectors)} prototypes: check that '{name}' holds data, or lower "
                    f"`prototypes`"
                )
            with torch.no_grad():
                bank.vectors.copy_(drawn)

    # -- scoring -----------------------------------------------------------------------------------------------------

    def score(self, features: Features) -> Prediction:
        """Map and score of Eq. 10, and the modalities' shares of the map."""
        with evaluating(self.student):
            restored = self.restore(features)
        height, width = features["valid"].shape[-2:]
        keep = self._kept(features)
        raw = cosine_map(restored.student, restored.target, (height, width), keep)
        if keep is not None:
            raw = fill_unkept(raw, keep)
        smooth = gaussian_smooth(raw, self.config.smoothing).float()
        branches = {self.modalities[0]: smooth}
        if len(self.modalities) > 1:
            shares = self._shares(restored, (height, width))
            branches = {name: shares[:, index] for index, name in enumerate(self.modalities)}
        return Prediction(score=smooth.flatten(1).amax(1), map=smooth, branch_maps=branches)

    def restore(self, features: Features) -> Restored:
        """Targets, priors and what the student makes of them."""
        by_name = {name: stages_of(features, name) for name in self.modalities}
        by_stage = [{name: maps[stage] for name, maps in by_name.items()} for stage in STAGES]
        parts = [self._summands(features, own, stage) for stage, own in enumerate(by_stage)]
        target = [reduce(torch.add, part) for part in parts]  # keeps the memory layout
        priors, written = [], []
        for helper, own in zip(self.student.priors, by_stage):
            prior, each = helper(own)
            priors.append(prior)
            written.append(each)
        seen: Sequence[Tensor] | Tensor = target
        if self.config.paradigm == "forward":
            seen = features["image"].contiguous(memory_format=torch.channels_last)
        elif self.config.embed == "main":
            seen = by_name[self.modalities[0]]
        return Restored(by_stage, parts, target, self.student(seen, priors), written or [{}, {}, {}])

    def _summands(self, features: Features, own: Mapping[str, Tensor], stage: int) -> list[Tensor]:
        """What each modality adds to F^T at one stage (Eqs. 2-3)."""
        main, *others = self.modalities
        added = []
        for name in others:
            cells = self._cells(features, name, own[name])
            added.append(own[name] if cells is None else own[name] * cells[:, None])
        gate = self.student.gates[stage] if self.student.gates else None
        return fuse(own[main], added, self.config.fusion, jointly=self.config.fusion_jointly, gate=gate)

    def _shares(self, restored: Restored, size: tuple[int, int]) -> Tensor:
        """The smoothed share of each modality in the map, (B, m, H, W)."""
        large = []
        for student, parts in zip(restored.student, restored.parts):
            shares = cosine_shares(student, parts)  # B m h w
            large.append(enlarge(shares.flatten(0, 1), size).unflatten(0, shares.shape[:2]))
        return gaussian_smooth(reduce(torch.add, large), self.config.smoothing)

    def _cells(self, features: Features, name: str, x: Tensor) -> Tensor | None:
        """The cells (B, h, w) of maps `x` at which a modality was measured; None for all."""
        if not (self.config.mask_invalid and is_geometric(name)):
            return None
        return kept_cells(features["valid"], x.shape[-2:])

    def _kept(self, features: Features) -> Tensor | None:
        """The pixels (B, H, W) at which the map counts: all, unless every modality is geometric."""
        geometric = all(is_geometric(name) for name in self.modalities)
        return features["valid"] if self.config.mask_invalid and geometric else None


class _Count:
    """How many batches went into the statistics."""

    def __init__(self) -> None:
        self.batches = 0

    def reset(self) -> None:
        self.batches = 0
