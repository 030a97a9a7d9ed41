"""CMDIAD: learn from RGB and points, judge by one of them; a network stands in for the other one's features.

Sui et al., "Incomplete multimodal industrial anomaly detection via cross-modal distillation" (Information Fusion 2025).
With a the main modality, which parts always have, and b the other one, which only training parts need to have:

    R_a    frozen features of a, one vector per patch; I_a its image           (RGB: an image network, points: groups)
    H_b  = C(R_a)        f2f: features from features                                                     Eq. 1
         = F_b(C(R_a))   f2i: the image of b from features of a, then b's frozen extractor               Eq. 2
         = C(I_a)        i2f: features from the image of a                                               Eq. 3
    L    = sum over patches of |H_b - R_b|, or for f2i over pixels of |C(R_a) - I_b|                     Eqs. 4-5
    M_a, M_b   coresets of R_a and of H_b of the training parts, normalised                              Eqs. 6-7
    d_p  = min over m in M of D(p, m);   s_M = w d of the part's worst patch                             Eqs. 10-12
    a_M  = blur(up(d))
    s    = v . (alpha s_Ma, beta s_Mb);   map = u . (alpha a_Ma, beta a_Mb)                              Eqs. 8-9

v and u are linear one-class SVMs, learned from training parts. Once fitted, nothing of b is looked at (`banks` mtfi).
``banks="dual"`` and ``"single"`` are the paper's baselines: both modalities at test time, or the main one alone.

Differs from paper and program: the network learns per category (or comes ready, `checkpoint`); of its two directions
only the one that is needed is built. Eq. 10 has no w, the program has (`reweight`). Patches without a point stay out of
the banks of points, and pixels without one out of the rows of u (`mask_invalid`). No part is random at test time. The
program's other slips are settings, all of them in the preset ``released``; see `docs/methods/cmdiad.md`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ..backbones.point_transformer import Statistics
from ..backbones.point_weights import load_point_transformer
from ..backbones.points import DEFAULT_POINT_BACKBONE, patch_features
from ..layers.decision import DecisionLayer
from ..layers.distances import Metric, MetricBank
from ..layers.hallucination import (
    ConvHallucination,
    FeaturesFromImage,
    HallucinationLoss,
    ImageHallucination,
    OutputActivation,
    PatchHallucination,
    PatchImageHallucination,
    hallucination_loss,
)
from ..layers.joined_banks import PAPER, Banks, Decisions, ImageScore, Patches
from ..layers.maps import MapMoments
from ..layers.memory import Reweighting
from ..layers.rgb_points import PAPER_EXTRACTOR, build_extractor, measured_patches, point_patches, rgb_patches
from ..layers.smoothing import Blur
from ..samples import Batch, Features, Prediction
from ..weights.convert import State
from ..weights.cross_modal import (
    conv_hallucination_state,
    features_from_image_state,
    image_hallucination_state,
    patch_hallucination_state,
    patch_image_hallucination_state,
)
from ..weights.official import checkpoint_source, read_network
from .contract import Detector, Observe, Optimise, Stage, evaluating, require, require_grid, seeded

_require = partial(require, "CMDIAD")
View = Literal["xyz", "rgb"]
Grid = tuple[int, int]
RATES = {"f2f": 5e-4, "f2i": 5e-4, "i2f": 3e-4}  # Sec. 4.1


@dataclass(frozen=True, kw_only=True)
class CMDIADConfig:
    """Settings of `CMDIAD`; the paper's, but for backbones whose weights need no download and bounds on cost."""

    banks: Literal["mtfi", "dual", "single"] = "mtfi"  # main and hallucinated; both modalities, real; main alone
    main: View = "xyz"  # the modality that parts have at test time; of no account with dual banks
    route: Literal["f2f", "f2i", "i2f"] = "f2f"  # Sec. 3.2
    # frozen extractors
    backbone: str = "efficientnet_lite0"  # timm name of the RGB network; the paper's DINO ViT-B/8: see preset `paper`
    weights: str = "auto"  # where its weights come from: see `ImageBackbone`
    reductions: tuple[int, ...] = (8, 16)  # pixels per cell of the stages that are joined; ViT-B/8: 8
    point_backbone: str = DEFAULT_POINT_BACKBONE  # network of the cloud: see `PointBackbone`
    point_weights: str = "auto"  # where its weights come from
    point_layers: tuple[int, ...] | None = None  # blocks that are joined; None: first and last of its three (3, 11)
    groups: int = 1024  # point groups per part
    group_size: int = 128  # points per group
    statistics: Statistics = "cloud"  # of the point network's norms: each cloud's, or the stored ones
    released_sampling: bool = False  # leave points within 3 cm of the origin out of the centres, as the CUDA sampler
    patch: int = 4  # pixels per side of a point patch and of what is hallucinated (at 224: 56x56)
    mask_invalid: bool = True  # patches without a point: out of banks where points are there, and scored as average
    # hallucination
    network: Literal["paper", "mlp", "conv"] = "paper"  # f2f: mlp or conv; f2i: conv or mlp, the paper's is named first
    depth: int = 1  # f2f mlp: MLPs of three layers behind each other; the program's option has 2
    output_activation: OutputActivation = "gelu"  # f2f mlp: what it ends in; the program's gelu cannot go below -0.17
    width: int = 512  # i2f: channels of the stages
    blocks: tuple[int, ...] = (4, 4, 4)  # i2f: bottlenecks of each stage
    trained: bool = True  # False: the network stays as it was drawn, Tab. A.2
    checkpoint: str | None = None  # CMDIAD's trained file of this route, used as it is; trains none
    loss: HallucinationLoss = "l2"  # Eqs. 4-5, App. A.1
    mask_loss: bool = False  # leave places without a point out of the loss; the program counts the background in full
    patches: int | None = 1024  # f2f mlp: patches of each part that a step looks at, drawn anew; None: all
    epochs: int = 100  # passes over the training parts, Sec. 4.1
    batch_size: int = 8  # parts per step; Sec. 4.1: 32, of ten categories at once
    learning_rate: float | None = None  # of Adam; None: 5e-4 for f2f and f2i, 3e-4 for i2f, Sec. 4.1
    warmup_epochs: int = 10  # over which the learning rate rises linearly step by step, then it stays
    select_every: int | None = None  # epochs between looks at the validation loss, the best state wins; None: the last
    mask_predicted: bool = False  # f2i, RGB main: predicted points nearer than half the nearest real one do not count
    # memory banks
    hallucination_bank: Literal["hallucinated", "real"] = "hallucinated"  # what M_b is filled with
    bank_stats: Literal["own", "released", "none"] = "own"  # normalise by: own mean and std; real xyz's mean, rgb's std
    distance: Metric = "l2"  # D of banks, App. A.4
    coreset_distance: Literal["same", "l2"] = "same"  # by which a bank is chosen, Sec. 3.3; l2: as in the program
    coreset_ratio: float = 0.1  # share of its patches that a bank keeps, above 0, at most 1, Tab. 5
    coreset_eps: float = 0.9  # distortion of the random projection in which the coreset is chosen, between 0 and 1
    bank_limit: int | None = 4_000  # most patches that a bank keeps; bounds the time per part; None: no limit
    max_gib: float = 2.0  # most memory for collected patches, per bank, and rows; beyond it a random sample of them
    # scores
    reweight: Reweighting = "btf"  # w of the worst patch: without or with its match, or w = 1 (Eq. 10)
    reweight_k: int = 3  # bank patches around the match that w looks at, the match included
    reweight_distance: Literal["same", "l2"] = "same"  # of w: as `distance`; or always l2 as in the program, a slip
    blur: Blur = "gaussian"  # of the maps; pil: the 8-bit blur of the program
    blur_sigma: float = 4.0  # pixels
    decision: Literal["exact", "sgd"] = "exact"  # solver of the SVMs; sgd: as the program, needs scikit-learn
    nu: float = 0.5  # share of the rows that the SVMs rest on, the lowest ones
    lambda_xyz: float | None = None  # factor before the SVMs, alpha and beta, counts about squared; None: banks alike
    lambda_rgb: float | None = None
    lambda_hallucinated: float | None = None  # of the hallucinated bank, whichever modality it stands for
    image_score: ImageScore = "top_mean"  # Eq. 8, or of the map
    top_share: float = 0.01  # top_mean: share of the map's pixels, the largest ones, whose mean is the image score
    seed: int = 0  # of the network's first weights, projections and samples; of random backbones

    def __post_init__(self) -> None:
        at_least_1 = ("patch", "depth", "patches", "epochs", "batch_size", "select_every", "bank_limit", "reweight_k")
        for field in at_least_1:
            value = getattr(self, field)
            _require(value is None or value >= 1, field, "at least 1", value)
        rate = self.learning_rate
        _require(rate is None or rate > 0, "learning_rate", "above 0, or null", rate)
        _require(self.max_gib > 0, "max_gib", "above 0", self.max_gib)
        for field in ("warmup_epochs", "blur_sigma", "lambda_xyz", "lambda_rgb", "lambda_hallucinated"):
            value = getattr(self, field)
            _require(value is None or value >= 0, field, "0 or more", value)
        for field in ("coreset_ratio", "nu", "top_share"):
            _require(0 < getattr(self, field) <= 1, field, "above 0 and at most 1", getattr(self, field))
        _require(0 < self.coreset_eps < 1, "coreset_eps", "between 0 and 1", self.coreset_eps)
        i2f = self.route == "i2f"
        _require(not i2f or self.network == "paper", "network", "'paper' with route i2f", self.network)
        _require(not i2f or self.patch == 4, "patch", "4 with route i2f, whose network has that stride", self.patch)
        ready = self.checkpoint is None or self.trained
        _require(ready, "trained", "true with a `checkpoint`", self.trained)

    @property
    def modalities(self) -> tuple[str, ...]:
        """What fitting needs: the main modality with a single bank, else both."""
        return (self.main,) if self.banks == "single" else ("rgb", "xyz")

    @property
    def other(self) -> View:
        """The modality that is hallucinated."""
        return "rgb" if self.main == "xyz" else "xyz"

    @property
    def names(self) -> tuple[View, ...]:
        """The banks, by the modality that they hold or stand for."""
        if self.banks == "dual":
            return ("xyz", "rgb")
        return (self.main,) if self.banks == "single" else (self.main, self.other)

    @property
    def learns(self) -> bool:
        """Whether a hallucination network is trained."""
        return self.banks == "mtfi" and self.trained and self.checkpoint is None

    @property
    def shares_statistics(self) -> bool:
        """Whether banks are normalised by common numbers; a single bank has its own in the program, too."""
        return self.bank_stats == "released" and self.banks != "single"

    @property
    def masked(self) -> tuple[View, ...]:
        """The banks whose patches count only where there are points."""
        if not self.mask_invalid or (self.main == "rgb" and self.banks != "dual"):
            return ()
        return ("xyz",) if self.banks == "dual" else self.names

    @property
    def by_patch(self) -> bool:
        """Whether the network maps patch by patch: f2f by an MLP."""
        return self.route == "f2f" and self.network != "conv"

    @property
    def masks_predicted(self) -> bool:
        """Whether predicted points near the origin are left out."""
        return self.mask_predicted and self.banks == "mtfi" and self.route == "f2i" and self.main == "rgb"

    def factor(self, name: str) -> float | None:
        """Factor of bank `name` before the decision layer; None where it is to weigh as much as the others."""
        hallucinated = self.banks == "mtfi" and name == self.other
        factor: float | None = self.lambda_hallucinated if hallucinated else getattr(self, f"lambda_{name}")
        return factor


class CMDIAD(Detector):
    """Score patches of the main modality, and of what the other one is expected to show, by two memory banks.

    Features: those of `RGBPoints`; with f2i ``"<other>.image"``, with i2f ``"<main>.image"``, (B, 3, H, W): RGB in
    0..1, or xyz in metres, 0 off the part. Branch maps: each bank's share in the map, by its modality; they add up.
    """

    Config = CMDIADConfig
    PRESETS = {
        "paper": {
            **PAPER_EXTRACTOR,
            **PAPER,
            "lambda_hallucinated": 1.0,
            "patches": None,
            "batch_size": 32,
        },
        "released": {
            **PAPER_EXTRACTOR,
            **PAPER,
            "lambda_hallucinated": 1.0,
            "released_sampling": True,
            "mask_invalid": False,
            "patches": None,
            "batch_size": 32,
            "bank_stats": "released",
            "coreset_distance": "l2",
            "reweight_distance": "l2",
            "blur": "pil",
            "decision": "sgd",
        },
        "fast": {
            "groups": 512,
            "group_size": 64,
            "patch": 8,
            "patches": 256,
            "epochs": 30,
            "warmup_epochs": 3,
            "bank_limit": 1_000,
        },
    }
    PREPARATION = {"": "cloud", "fast": "cloud", "paper": "btf", "released": "btf"}
    frozen = ("extractor",)
    growing = ("best",)
    best: Tensor  # the network's numbers at the lowest validation loss, while it is trained; empty afterwards
    best_loss: Tensor  # () float64, that loss; infinite without `select_every`
    parts: Tensor  # () int64, training parts, for the schedule
    nearest_point: Tensor  # () m, distance of the nearest training point from the origin, with `mask_predicted`

    def __init__(self, config: CMDIADConfig, *, pretrained: bool = True) -> None:
        super().__init__(config)
        c = config
        layers = outer_layers(c.point_backbone) if c.point_layers is None else c.point_layers
        self.extractor = build_extractor(c, layers, pretrained=pretrained, released_sampling=c.released_sampling)
        self.sources |= self.extractor.sources
        self.network: nn.Module | None = None
        if c.banks == "mtfi":
            with seeded(c.seed):
                self.network = hallucination_network(c, self.extractor.channels)
            if c.checkpoint is not None and pretrained:
                path = Path(c.checkpoint).expanduser()
                content = read_network(path, "cmdiad")
                self.network.load_state_dict(published_state(c, content, self.network, str(path)))
                self.sources["network"] = checkpoint_source(path)
        self.banks = Banks({name: self._bank(name) for name in c.names})
        layer = partial(DecisionLayer, nu=c.nu, solver=c.decision, max_bytes=int(c.max_gib * 2**30))
        factors: dict[str, float | None] = {name: c.factor(name) for name in c.names}
        self.decisions = Decisions(factors, layer if len(c.names) > 1 else None)
        self.register_buffer("best", torch.empty(0))
        self.register_buffer("best_loss", torch.tensor(math.inf, dtype=torch.float64))
        self.register_buffer("parts", torch.zeros((), dtype=torch.int64))
        self.register_buffer("nearest_point", torch.tensor(math.inf))
        self._loss_sum, self._loss_parts = 0.0, 0  # of the pass under way, like the next two
        self._parts_seen, self._nearest_seen = 0, math.inf

    @property
    def required(self) -> tuple[str, ...]:
        """The main modality alone once banks of kind ``mtfi`` are fitted; while they are, both."""
        return (self.config.main,) if self.config.banks == "mtfi" and bool(self.fitted) else self.modalities

    def modality_of(self, feature: str) -> str:
        """As of every detector; the image that i2f reads counts as none, because no stand-in for it can be learned."""
        return "" if self.config.route == "i2f" and feature.endswith(".image") else super().modality_of(feature)

    def forward(self, batch: Batch) -> Prediction:
        """As of every detector; of a modality that is not required nothing is computed."""
        idle = set(self.modalities) - set(self.required)
        return super().forward(replace(batch, images={k: x for k, x in batch.images.items() if k not in idle}))

    def extract(self, batch: Batch) -> Features:
        """Features of the modalities that the batch has; images where the network reads or learns to draw them.

        Raises:
            ShapeError: height or width is no multiple of `patch`.
        """
        c = self.config
        require_grid("CMDIAD", batch, c.patch)
        there = [name for name in self.modalities if name in batch.images]
        features = self.extractor(batch, there)
        drawn = self._drawn
        if drawn in there:
            image = batch.images[drawn]
            features[f"{drawn}.image"] = image if drawn == "rgb" else image * _region(batch)[:, None]
        return features

    @property
    def _drawn(self) -> View | None:
        """The modality whose image the network reads or learns to draw."""
        c = self.config
        if c.banks != "mtfi" or c.route == "f2f":
            return None
        return c.other if c.route == "f2i" else c.main

    def extraction_settings(self) -> dict[str, Any]:
        """Those of the extractor, which other methods share, and whether an image is kept beside."""
        settings = self.extractor.settings(self.modalities)
        return settings if self._drawn is None else settings | {"image": self._drawn}

    def stages(self) -> Sequence[Stage]:
        """Train the network, fill the banks, measure their level on validation parts, learn how to weigh them."""
        c = self.config
        stages: list[Stage] = []
        if c.learns or c.masks_predicted:
            stages.append(Observe(name="parts", update=self._see_batch, finish=self._set_parts, over="batches"))
        if c.learns:
            stages += self._training()
        real = {name: MapMoments() for name in c.names}  # entries of the real features, for released statistics
        stages.append(Observe(name="banks", update=partial(self._see_parts, real), finish=partial(self._build, real)))
        if c.masked:
            see, finish = self._see_levels, partial(self.banks.set_levels, but=set(c.names) - set(c.masked))
            stages.append(Observe(name="levels", update=see, finish=finish, split="validation"))
        if self.decisions:
            stages.append(Observe(name="decision", update=self._see_values, finish=self.decisions.fit))
        return stages

    def score(self, features: Features) -> Prediction:
        """Score and map of Eqs. 8-9; of a single bank its own."""
        return self.decisions.judge(*self.measure(features), self.config.image_score, self.config.top_share)

    # -- hallucination -----------------------------------------------------------------------------------------------

    def real(self, features: Features, name: str, grid: Grid) -> Tensor:
        """Real patches (B, h*w, C) of a modality."""
        return point_patches(features, grid) if name == "xyz" else rgb_patches(features, grid)

    def predict(self, features: Features) -> Tensor:
        """What the network says of the other modality: patches (B, h*w, C), or with f2i its image (B, 3, H, W).

        The image is normalised RGB, or xyz in metres.
        """
        c, network, grid = self.config, cast(nn.Module, self.network), self.grid(features)
        if c.route == "i2f":
            return network(self._image(features, c.main)).flatten(2).mT  # Eq. 3
        own = self.real(features, c.main, grid)
        if c.by_patch:
            return network(own)  # Eq. 1
        drawn = network(own.mT.unflatten(2, grid))
        return drawn if c.route == "f2i" else drawn.flatten(2).mT

    def hallucinate(self, features: Features) -> Tensor:
        """Patches (B, h, w, C) of the other modality, from the main one alone."""
        c, network = self.config, cast(nn.Module, self.network)
        with evaluating(network):
            predicted = self.predict(features)
        if c.route != "f2i":
            return predicted.unflatten(1, self.grid(features))
        if c.other == "rgb":  # Eq. 2
            rgb = self.extractor.rgb
            assert rgb is not None
            return self.extractor.image_grid(predicted * rgb.std + rgb.mean).permute(0, 2, 3, 1)
        points = self.extractor.xyz
        assert points is not None
        length = torch.linalg.vector_norm(predicted, dim=1)
        counted = length >= self.nearest_point / 2 if c.masks_predicted else torch.ones_like(length, dtype=torch.bool)
        size, grid = _size(features), self.grid(features)
        return patch_features(points.of_clouds(predicted, counted), size, grid).unflatten(1, grid)

    def loss(self, features: Features) -> dict[str, Tensor]:
        """Eqs. 4-5 of the direction that is needed."""
        return {f"{self.config.main}_to_{self.config.other}": self._loss(features, self.config.patches)}

    def grid(self, features: Features) -> Grid:
        """Rows and columns of point patches, and of what f2f and i2f hallucinate."""
        height, width = _size(features)
        return height // self.config.patch, width // self.config.patch

    def _loss(self, features: Features, most: int | None) -> Tensor:
        c, grid = self.config, self.grid(features)
        if c.route == "f2i":
            predicted = self.predict(features).flatten(2).mT  # B H*W 3
            target = self._image(features, c.other).flatten(2).mT
            counts = (features["xyz.share"].sum(-1) > 0) if c.mask_loss else None
        else:
            target = self.real(features, c.other, grid)
            counts = measured_patches(features, grid) if c.mask_loss else None
            if c.by_patch and most is not None and most < target.shape[1]:
                chosen = torch.randperm(target.shape[1], device=target.device)[:most]
                own = self.real(features, c.main, grid)[:, chosen]
                predicted, target = cast(nn.Module, self.network)(own), target[:, chosen]
                counts = None if counts is None else counts[:, chosen]
            else:
                predicted = self.predict(features)
        if counts is None:
            return hallucination_loss(predicted, target, c.loss)
        return hallucination_loss(predicted[counts][None], target[counts][None], c.loss) / len(target)

    def _image(self, features: Features, name: str) -> Tensor:
        """The image of a modality as a network reads or draws it: RGB normalised, xyz in metres."""
        image = features[f"{name}.image"]
        rgb = self.extractor.rgb
        return image if name == "xyz" or rgb is None else (image - rgb.mean) / rgb.std

    def _training(self) -> list[Stage]:
        """One stage, or with `select_every` several, each followed by a look at the validation parts."""
        c = self.config
        every = c.select_every or c.epochs
        rate = RATES[c.route] if c.learning_rate is None else c.learning_rate
        stages: list[Stage] = []
        for first in range(0, c.epochs, every):
            end = min(first + every, c.epochs)
            part = "" if c.select_every is None else f" to epoch {end}"
            stages.append(
                Optimise(
                    name=f"hallucination{part}",
                    parameters=cast(nn.Module, self.network).parameters,
                    loss=self.loss,
                    optimizer=partial(torch.optim.Adam, lr=rate),
                    epochs=end - first,
                    batch_size=c.batch_size,
                    schedule=partial(self._schedule, first),
                    schedule_every="step",
                )
            )
            if c.select_every is not None:
                finish = partial(self._select, end == c.epochs)
                stages.append(
                    Observe(name=f"selection{part}", update=self._see_loss, finish=finish, split="validation")
                )
        return stages

    def _schedule(self, first: int, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        """The warm-up, going on from epoch `first`."""
        steps = steps_per_epoch(int(self.parts), self.config.batch_size)
        share = partial(warmup, first=first * steps, length=self.config.warmup_epochs * steps)
        return torch.optim.lr_scheduler.LambdaLR(optimizer, share)

    def _see_batch(self, batch: Batch) -> None:
        self._parts_seen += len(batch)
        if self.config.masks_predicted:
            length = torch.linalg.vector_norm(batch.images["xyz"], dim=1)[_region(batch)]
            self._nearest_seen = min(self._nearest_seen, float(length.amin()) if len(length) else math.inf)

    def _set_parts(self) -> None:
        self.parts.fill_(self._parts_seen)
        self.nearest_point.fill_(self._nearest_seen)
        self._parts_seen, self._nearest_seen = 0, math.inf

    def _see_loss(self, features: Features) -> None:
        with evaluating(cast(nn.Module, self.network)):
            loss = self._loss(features, None)
        count = len(features["valid"])
        self._loss_sum, self._loss_parts = self._loss_sum + float(loss) * count, self._loss_parts + count

    def _select(self, last: bool) -> None:
        """Keep the network if it is the best so far; at the end take the best and forget the copy."""
        network = cast(nn.Module, self.network)
        loss = self._loss_sum / self._loss_parts
        self._loss_sum, self._loss_parts = 0.0, 0
        learned = [x for x in network.state_dict().values() if x.is_floating_point()]
        if loss < float(self.best_loss):
            self.best_loss.fill_(loss)
            self.best = torch.cat([x.flatten() for x in learned])
        if last:
            for x, stored in zip(learned, self.best.split([x.numel() for x in learned])):
                x.copy_(stored.view_as(x))
            self.best = self.best.new_empty(0)

    # -- banks -------------------------------------------------------------------------------------------------------

    def patches(self, features: Features, *, filling: bool = False) -> dict[str, Patches]:
        """The patches that each bank looks at; when `filling`, those that it is made of."""
        c = self.config
        found = {}
        for name in c.names:
            if c.banks != "mtfi" or name == c.main or (filling and c.hallucination_bank == "real"):
                own = self.grid(features) if name == "xyz" else _size_of(features["rgb.grid"])
                values = self.real(features, name, own).unflatten(1, own)
            else:
                values = self.hallucinate(features)
            grid: Grid = (values.shape[1], values.shape[2])
            counts = torch.ones(values.shape[:3], dtype=torch.bool, device=values.device)
            if name in c.masked:
                counts = measured_patches(features, grid).unflatten(1, grid)
            found[name] = Patches(values, counts)
        return found

    def _bank(self, name: str) -> MetricBank:
        c = self.config
        return MetricBank(
            name,
            c.distance,
            c.distance if c.reweight_distance == "same" else "l2",
            c.distance if c.coreset_distance == "same" else "l2",
            ratio=c.coreset_ratio,
            limit=c.bank_limit,
            eps=c.coreset_eps,
            seed=c.seed,
            max_bytes=int(c.max_gib * 2**30),
            normalise=c.bank_stats != "none",
        )

    def _see_parts(self, real: Mapping[str, MapMoments], features: Features) -> None:
        patches = self.patches(features, filling=True)
        for name, bank in self.banks.named():
            bank.add(patches[name].values[patches[name].counts])
        if self.config.shares_statistics:
            for name, moments in real.items():
                own = self.grid(features) if name == "xyz" else _size_of(features["rgb.grid"])
                entries = self.real(features, name, own)[None]
                moments.add(
                    entries.flatten(1)[:, None, None], torch.ones_like(entries.flatten(1)[:, None, None]).bool()
                )

    def _build(self, real: Mapping[str, MapMoments]) -> None:
        shared = None
        if self.config.shares_statistics:
            shared = float(real["xyz"].take()[1][0]), float(real["rgb"].take()[2][0])
        for _, bank in self.banks.named():
            bank.build(statistics=shared)

    def _see_levels(self, features: Features) -> None:
        c = self.config
        self.banks.observe_levels(self.patches(features), but=set(c.names) - set(c.masked))

    # -- scores ------------------------------------------------------------------------------------------------------

    def measure(self, features: Features) -> tuple[Tensor, Tensor]:
        """Eqs. 10-12: scores (B, F) and smoothed maps (B, H, W, F), each bank's in the unit of its own distances."""
        c, patches = self.config, self.patches(features)
        return self.banks.measure(
            patches, _size(features), blur=c.blur, sigma=c.blur_sigma, form=c.reweight, n=c.reweight_k
        )

    def _see_values(self, features: Features) -> None:
        """Rows of the decision layers: of training parts and pixels that have points, where that is asked for."""
        scores, maps = self.measure(features)
        pixels = torch.ones_like(features["valid"])
        if self.config.mask_invalid:
            pixels = (features["xyz.share"].sum(-1) > 0).view_as(pixels)
        parts = pixels.flatten(1).any(1)
        self.decisions.observe(scores[parts], maps[pixels])


def hallucination_network(config: CMDIADConfig, channels: Mapping[str, int]) -> nn.Module:
    """The untrained network of a route, from the main modality's features or image to the other one's.

    Raises:
        ConfigError: convolutions for f2f, whose width stays, between features of different width.
    """
    inputs, outputs = channels[config.main], channels[config.other]
    if config.route == "i2f":
        return FeaturesFromImage(outputs, config.width, config.blocks)
    if config.route == "f2i":
        kind = PatchImageHallucination if config.network == "mlp" else ImageHallucination
        return kind(inputs, 3, config.patch)
    if config.network == "conv":
        same = f"'mlp' where the features differ in width ({config.main} {inputs}, {config.other} {outputs})"
        _require(inputs == outputs, "network", same, config.network)
        return ConvHallucination(inputs)
    return PatchHallucination(inputs, outputs, config.depth, config.output_activation)


def published_state(config: CMDIADConfig, content: object, network: nn.Module, origin: str) -> State:
    """The network's tensors from CMDIAD's file of the same route.

    Raises:
        WeightsError: a tensor does not fit (names it).
    """
    if config.route == "i2f":
        return features_from_image_state(content, network, origin)
    if config.route == "f2i":
        mlp = config.network == "mlp"
        return (patch_image_hallucination_state if mlp else image_hallucination_state)(content, network, origin)
    convert = conv_hallucination_state if config.network == "conv" else patch_hallucination_state
    return convert(content, network, config.main, origin)


def outer_layers(point_backbone: str) -> tuple[int, ...]:
    """First and last of a point network's own layers: (3, 11) for the published one."""
    with torch.device("meta"):
        own = load_point_transformer(point_backbone, pretrained=False).network.layers
    return tuple(dict.fromkeys([own[0], own[-1]]))


def steps_per_epoch(parts: int, batch_size: int) -> int:
    """Updates per pass over the parts: a trailing batch of one joins the one before it."""
    whole, rest = divmod(parts, batch_size)
    joined = rest == 1 and whole > 0 and batch_size > 1
    return max(1, whole + (rest > 0 and not joined))


def warmup(step: int, first: int, length: int) -> float:
    """Share of the learning rate at update `first` + `step`: 0 at the very first, 1 from `length` on."""
    return min(1.0, (first + step) / length) if length else 1.0


def _region(batch: Batch) -> Tensor:
    """The pixels (B, H, W) whose points are used: those of the part, or all measured ones where it is empty."""
    part = batch.valid & batch.foreground
    return torch.where(part.flatten(1).any(1)[:, None, None], part, batch.valid)


def _size(features: Features) -> tuple[int, int]:
    return _size_of(features["valid"])


def _size_of(x: Tensor) -> tuple[int, int]:
    return int(x.shape[-2]), int(x.shape[-1])
