"""Crossmodal Reverse Distillation (CRD): one student per modality, helped by the others, taught by one frozen network.

"Multimodal Industrial Anomaly Detection by Crossmodal Reverse Distillation". For modality a, assisted by every other
modality b, and scales i = 1, 2, 3 (strides 4, 8, 16):

    T^a_i           teacher features, (C_i, h_i, w_i), frozen
    P^ab = BP(T^b)  bottleneck projection: predicts T^a, defects of b squeezed out      (crossmodal filter, Sec. 4.2)
    Q^ab = IBP(T^b) inverted bottleneck projection: predicts T^a, defects of b kept     (crossmodal amplifier, Sec. 4.2)
    E = OCBE(T^a, P^ab);   R^a_i = D_i(G^a_{i+1}), G^a_4 = E
    G^a_i = u_0 R^a_i + sum_b u_b Q^ab_i,   u = softmax(theta_i)                                              (3)
    L_a = KD(R^a, T^a) + sum_b [KD(P^ab, T^a) + KD(Q^ab, T^a)] + KD(G^a, T^a),  KD the cosine loss         (4)-(9)
    A^a = sum_i Up(1 - cos(G^a_i, T^a_i))                                                                    (10)
    A = gaussian(sum_a (A^a - mu_a) / sigma_a),  score = max A,  mu and sigma over validation pixels         (11)

With one modality this is plain Reverse Distillation. More than two follow the paper's "extends similarly": one
projection pair per other modality, all of them mixed and summed as above.

Where paper and published code differ the code's value is the default, as it made the published figures: mixing inside
the decoder instead of after it, softmax over the mixing weights, gradients between all parts of a student
(`detach_assistants`), learning-rate decay 0.95. The code's two optimisers act on disjoint parameters; one Adam over
all students takes the same steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from ..backbones.image import ImageBackbone
from ..backbones.modalities import modality_features, name_stages, stages_of
from ..errors import DataError
from ..layers.blocks import BlockPlan, ReverseDecoder, init_convolutions, plan_blocks
from ..layers.bottleneck import OneClassEmbedding
from ..layers.distillation import cosine_losses
from ..layers.maps import MapMoments, cosine_map, gaussian_smooth
from ..layers.projection import AmplifierProjection, FilterProjection
from ..samples import Batch, Features, Prediction, is_geometric
from ..weights.official import checkpoint_source, load_checkpoint
from .contract import Detector, Observe, Stage, evaluating, require, require_grid, require_views, seeded
from .recipe import check_recipe, train

_require = partial(require, "CRD")


@dataclass(frozen=True, kw_only=True)
class CRDConfig:
    """Settings of `CRD`; the defaults are the paper's, but for the backbone, whose weights need no download."""

    modalities: tuple[str, ...] = ("rgb", "depth")  # one branch each; any image-like ones; one alone is plain RD
    backbone: str = "efficientnet_lite0"  # timm name of the teacher; Sec. 5.1: WideResNet-50, see preset `paper`
    weights: str = "auto"  # where the teacher's weights come from: see `ImageBackbone`
    checkpoint: str | None = None  # trained students to use as they are (a published or imported file); trains none
    epochs: int = 200  # passes over the training parts, Sec. 5.1
    batch_size: int = 16  # parts per step, Sec. 5.1
    learning_rate: float = 0.005  # of Adam, Sec. 5.1
    betas: tuple[float, float] = (0.5, 0.999)  # of Adam; not in the paper
    lr_decay: float = 0.95  # the learning rate is multiplied by it after each epoch, 0..1; not in the paper; 1 is none
    crossmodal_filter: bool = True  # P into the embedding, Sec. 4.2, Tab. 4; no effect with one modality
    crossmodal_amplifier: bool = True  # Q mixed into the decoder, Sec. 4.2, Tab. 4; no effect with one modality
    filter_stride: Literal[16, 32, 64] | None = 32  # pixels per cell of BP's bottleneck, Tab. 5; None: no squeezing
    amplifier_expansion: int | None = 2  # IBP's inner width over its outer, Tab. 6; None: no widening
    detach_assistants: bool = False  # True: P and Q learn from their own losses only, as Sec. 4.3 suggests
    loss: Literal["flat", "pixel"] = "flat"  # cosine over whole maps (the code) or per position (Eq. 1)
    aggregation: Literal["normalised_sum", "sum", "product"] = "normalised_sum"  # of the branch maps, Eq. 11, Tab. 7
    report: str = "fused"  # whose map and score are the answer: all branches', or one modality's, Tab. 3
    smoothing: float = 4.0  # sigma of the Gaussian on the maps, input pixels, Sec. 5.1; 0: none
    mask_invalid: bool = False  # True: geometric branches ignore positions without 3D data, in loss and map
    seed: int = 42  # of the students' first weights

    def __post_init__(self) -> None:
        require_views("CRD", self.modalities)
        check_recipe("CRD", self)
        _require(self.filter_stride in (16, 32, 64, None), "filter_stride", "16, 32, 64 or null", self.filter_stride)
        expansion = self.amplifier_expansion
        _require(expansion is None or expansion >= 1, "amplifier_expansion", "at least 1, or null", expansion)
        _require(self.loss in ("flat", "pixel"), "loss", "'flat' or 'pixel'", self.loss)
        rules = ("normalised_sum", "sum", "product")
        _require(self.aggregation in rules, "aggregation", f"one of {', '.join(rules)}", self.aggregation)
        branches = ("fused", *self.modalities)
        _require(self.report in branches, "report", f"one of {', '.join(branches)}", self.report)
        _require(self.smoothing >= 0, "smoothing", "0 or more pixels", self.smoothing)


@dataclass(frozen=True, eq=False)
class Restored:
    """What a student returns: feature lists shallow first, each map shaped as the teacher's."""

    raw: list[Tensor]  # R
    mixed: list[Tensor]  # G; the same list as `raw` without assistants
    filtered: dict[str, list[Tensor]]  # other modality -> P
    amplified: dict[str, list[Tensor]]  # other modality -> Q
    embedding: Tensor  # E, (B, 2 C_3, H/32, W/32)


class Student(nn.Module):
    """The trainable branch of one modality: filter, embedding, amplifier and decoder.

    Args:
        channels: C_1, C_2, C_3 of the teacher.
        others: The assisting modalities; none for plain Reverse Distillation.
        plan: The kind and number of residual blocks.
        nonneg: Whether the teacher's features are never negative.
    """

    def __init__(
        self, channels: Sequence[int], others: Sequence[str], config: CRDConfig, plan: BlockPlan, *, nonneg: bool = True
    ) -> None:
        super().__init__()
        helped_in = others if config.crossmodal_filter else ()
        helped_out = others if config.crossmodal_amplifier else ()
        stride, expansion = config.filter_stride, config.amplifier_expansion
        self.filters = nn.ModuleDict({b: FilterProjection(channels, stride, nonneg=nonneg) for b in helped_in})
        self.amplifiers = nn.ModuleDict(
            {b: AmplifierProjection(channels, expansion, nonneg=nonneg) for b in helped_out}
        )
        self.embedding = OneClassEmbedding(channels, plan, sources=1 + len(helped_in))
        self.decoder = ReverseDecoder(channels, plan, nonneg=nonneg, assistants=len(helped_out))
        self.detach = config.detach_assistants
        init_convolutions(self)

    def forward(self, own: Sequence[Tensor], others: Mapping[str, Sequence[Tensor]]) -> Restored:
        """Restore `own` features, each (B, C_i, h_i, w_i), with the help of the other modalities'."""
        filtered = {b: projection(others[b]) for b, projection in self.filters.items()}  # P
        amplified = {b: projection(others[b]) for b, projection in self.amplifiers.items()}  # Q
        beside, mixed_in = [self._cut(maps) for maps in filtered.values()], [self._cut(m) for m in amplified.values()]
        joined = [torch.cat(maps, dim=1) for maps in zip(own, *beside, strict=True)] if beside else own
        embedding = self.embedding(joined)
        raw, mixed = self.decoder(embedding, mixed_in)  # Eq. 3
        return Restored(raw, mixed, filtered, amplified, embedding)

    def _cut(self, maps: list[Tensor]) -> list[Tensor]:
        return [x.detach() for x in maps] if self.detach else maps


class CRD(Detector):
    """Restore each modality's features from what normal parts look like; what cannot be restored is anomalous.

    Features: ``"<modality>.1"`` to ``"<modality>.3"``, (B, C_i, h_i, w_i) at strides 4, 8, 16, and ``valid`` and
    ``foreground``, (B, H, W) bool. Branch maps are the smoothed standardised maps of the modalities.
    """

    Config = CRDConfig
    # fast: 40 epochs of small steps that end at a learning rate of 7e-5, a few minutes for 140 parts on two CPU cores
    PRESETS = {
        "paper": {"backbone": "wide_resnet50_2.tv_in1k"},
        "fast": {
            "backbone": "efficientnet_lite0",
            "epochs": 40,
            "batch_size": 8,
            "lr_decay": 0.9,
            "mask_invalid": True,
        },
    }
    PREPARATION = {"paper": "crd_paper"}
    frozen = ("teacher",)
    map_mean: Tensor  # mu, one per modality
    map_std: Tensor  # sigma

    def __init__(self, config: CRDConfig, *, pretrained: bool = True) -> None:
        super().__init__(config)
        self.teacher = ImageBackbone(
            config.backbone, reductions=(4, 8, 16), weights=config.weights, pretrained=pretrained, seed=config.seed
        )
        channels, names = self.teacher.channels, config.modalities
        plan = plan_blocks(config.backbone, channels)
        with seeded(config.seed):
            self.students = nn.ModuleDict(
                {
                    a: Student(channels, [b for b in names if b != a], config, plan, nonneg=self.teacher.nonneg)
                    for a in names
                }
            )
        if config.checkpoint is not None and pretrained:
            self.students.load_state_dict(load_checkpoint(config.checkpoint, "crd", self.students))
            self.sources["students"] = checkpoint_source(config.checkpoint)
        self.register_buffer("map_mean", torch.zeros(len(names)))
        self.register_buffer("map_std", torch.ones(len(names)))

    def extract(self, batch: Batch) -> Features:
        """Teacher features of every modality, in one pass of the network.

        Raises:
            ShapeError: height or width is not a multiple of the coarsest grid cell, or smaller than two of them.
        """
        cell = max(32, (self.config.filter_stride or 32) if self.config.crossmodal_filter else 32)
        require_grid("CRD", batch, cell)
        known = {"valid": batch.valid, "foreground": batch.foreground}
        return known | name_stages(modality_features(self.teacher, batch, self.modalities))

    def stages(self) -> Sequence[Stage]:
        """Train all students together, then measure the level of each branch's map on good validation parts.

        With a `checkpoint` nothing is trained.
        """
        moments = MapMoments()
        training = train("students", self.config, self.students.parameters, self.loss)
        levels = Observe(
            name="map_levels",
            update=partial(self._see_maps, moments),
            finish=partial(self._set_levels, moments),
            split="validation",
        )
        return [training, levels] if self.config.checkpoint is None else [levels]

    def loss(self, features: Features) -> dict[str, Tensor]:
        """The terms of Eqs. 4-9, one scalar each, named ``<modality>.<part>``."""
        terms: dict[str, Tensor] = {}
        for name, (target, restored) in self.restore(features).items():
            predictions = {"restored": restored.raw}
            predictions |= {f"filter_{other}": maps for other, maps in restored.filtered.items()}
            predictions |= {f"amplifier_{other}": maps for other, maps in restored.amplified.items()}
            if restored.amplified:
                predictions["mixed"] = restored.mixed
            losses = cosine_losses(predictions, target, kind=self.config.loss, keep=self._kept(features, name))
            terms |= {f"{name}.{part}": value for part, value in losses.items()}
        return terms

    def score(self, features: Features) -> Prediction:
        """Standardise, combine and smooth the branch maps (Eq. 11); the score is the largest value of the map.

        With `report` naming a modality its branch map is the map.
        """
        with evaluating(self.students):
            raw = self._raw_maps(features)  # B m H W
        mean, std = self.map_mean[:, None, None].to(raw), self.map_std[:, None, None].to(raw)
        for index, name in enumerate(self.modalities):
            keep = self._kept(features, name)
            if keep is not None:  # what was not measured is neither good nor bad
                raw[:, index] = torch.where(keep, raw[:, index], mean[index])
        branches = gaussian_smooth((raw - mean) / std, self.config.smoothing)
        if self.config.report != "fused":
            fused = branches[:, self.modalities.index(self.config.report)]
        elif self.config.aggregation == "normalised_sum":
            fused = branches.sum(1)  # smoothing is linear: the sum of smoothed maps is the smoothed sum
        else:
            combined = raw.sum(1) if self.config.aggregation == "sum" else raw.prod(1)
            fused = gaussian_smooth(combined, self.config.smoothing)
        maps = {name: branches[:, index].float() for index, name in enumerate(self.modalities)}
        return Prediction(score=fused.flatten(1).amax(1).float(), map=fused.float(), branch_maps=maps)

    def restore(self, features: Features) -> dict[str, tuple[list[Tensor], Restored]]:
        """For each modality the teacher's feature maps and what its student makes of them."""
        teacher = {name: stages_of(features, name) for name in self.modalities}
        return {name: (teacher[name], student(teacher[name], teacher)) for name, student in self.students.items()}

    def _raw_maps(self, features: Features) -> Tensor:
        """A^a of every branch (Eq. 10): (B, m, H, W), float64 where the device has it."""
        height, width = features["valid"].shape[-2:]
        return torch.stack(
            [
                cosine_map(restored.mixed, target, (height, width), self._kept(features, name))
                for name, (target, restored) in self.restore(features).items()
            ],
            dim=1,
        )

    def _kept(self, features: Features, name: str) -> Tensor | None:
        """The pixels (B, H, W) at which a branch counts; None for all."""
        return features["valid"] if self.config.mask_invalid and is_geometric(name) else None

    def _see_maps(self, moments: MapMoments, features: Features) -> None:
        with evaluating(self.students):
            raw = self._raw_maps(features)
        everywhere = torch.ones_like(features["valid"])
        kept = [self._kept(features, name) for name in self.modalities]
        moments.add(raw, torch.stack([everywhere if keep is None else keep for keep in kept], dim=1))

    def _set_levels(self, moments: MapMoments) -> None:
        count, mean, std = moments.take()
        for name, pixels, spread in zip(self.modalities, count.tolist(), std.tolist()):
            if not (pixels > 0 and 0 < spread < float("inf")):
                raise DataError(
                    f"branch '{name}': its maps on the validation parts have standard deviation {spread:g} over "
                    f"{pixels:.0f} pixels, so they cannot be standardised; check that '{name}' holds data there"
                )
        self.map_mean.copy_(mean)
        self.map_std.copy_(std)
