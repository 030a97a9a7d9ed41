"""Any fitted detector, made to serve parts that lack a modality: what is missing is hallucinated from what is there.

After Sui et al., "Incomplete multimodal industrial anomaly detection via cross-modal distillation" (CMDIAD, Information
Fusion 2025), Sec. 3.2 (F2F), which does it for two memory banks. Here the detector is whatever was fitted before: it
stays as it is, and for every ordered pair of its modalities a -> b, b one that its answer rests on, and every feature
map R of b one network learns

    H_p = MLP(LN(x_p)),   x: all feature maps of a, joined on the grid of R                              (1)
    L   = sum over pairs and maps of  mean_p |H_p - R_p| / mean_p |R_p|                                  (2)  l2

from good parts that have everything. (CMDIAD sums over positions; the mean, relative to the size of R, lets maps of any
scale learn at one rate.) A part that lacks b gets the mean of H over the modalities it has, and is then scored as
usual. Features of point groups have no grid of their own; they are hallucinated as one group per cell of a grid.

A part without any 3D view has no measured pixels to tell: it counts as valid everywhere, as its reader says.

A detector that keeps raw points and pixels (`Detector.standalone`) judges by the views that are there. What RGB lacks
then is the place of the part, which the cloud tells; H learns its logit from the feature maps of RGB, on cells of
`cell` pixels of which a share R is on the part (binary cross-entropy instead of Eq. 2). The part is where H is above 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations, permutations
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError, NotFittedError
from ..layers.hallucination import OutputActivation, PatchHallucination
from ..layers.rgb_points import groups_on_grid, point_grid
from ..samples import MODALITIES, Batch, Features, Prediction, is_geometric
from .contract import Detector, Optimise, Stage, evaluating, require, seeded

_require = partial(require, "completion")
_PROBES = (128, 256)  # pixels, sides of the empty parts that show the features' names, channels and grids
_FREE = ("valid", "foreground")  # features that belong to no modality
_PART = "part"  # of detectors that stand alone: where the part is


@dataclass(frozen=True, kw_only=True)
class CompletionConfig:
    """Settings of `Completion`; CMDIAD's for F2F where it has them."""

    epochs: int = 50  # passes over the good parts; CMDIAD 100 over all categories at once, 65 or 50 of them used
    batch_size: int = 8  # parts per step
    learning_rate: float = 5e-4  # of Adam, CMDIAD Sec. 4.2
    warmup_epochs: int = 5  # over which the learning rate rises linearly, then it stays; CMDIAD 10 of 100
    output_activation: OutputActivation = "none"  # CMDIAD's program: gelu, which cannot reach negative features
    patches: int | None = 512  # positions of each map that a step looks at, drawn anew; None: all
    cell: int = 8  # pixels per cell of the grid on which features of point groups are hallucinated
    seed: int = 0  # of the networks' first weights

    def __post_init__(self) -> None:
        for field in ("epochs", "batch_size", "cell"):
            _require(getattr(self, field) >= 1, field, "at least 1", getattr(self, field))
        _require(self.learning_rate > 0, "learning_rate", "above 0", self.learning_rate)
        _require(self.warmup_epochs >= 0, "warmup_epochs", "0 or more", self.warmup_epochs)
        _require(self.patches is None or self.patches >= 1, "patches", "at least 1, or null", self.patches)
        activations = ("gelu", "none")
        _require(self.output_activation in activations, "output_activation", "gelu or none", self.output_activation)


class Completion(Detector):
    """A fitted detector that takes parts with any of its modalities, at least one.

    Features are the inner detector's; those of a missing modality are absent, and `score` fills them in.

    Attributes:
        inner: The fitted detector, which is never changed.
    """

    Config = CompletionConfig
    PRESETS = {"paper": {}, "fast": {"epochs": 20, "warmup_epochs": 2}}
    frozen = ("inner",)

    def __init__(self, inner: Detector, config: CompletionConfig | None = None) -> None:
        """Build the networks around `inner`.

        Raises:
            ConfigError: `inner` has one modality only, or features that belong to none of them.
        """
        super().__init__(config or CompletionConfig())
        if len(inner.modalities) < 2:
            raise ConfigError(
                f"{type(inner).__name__} on {', '.join(inner.modalities)} has no second modality to do without"
            )
        self.inner = inner
        names = inner.modalities
        pairs = [(a, b) for a, b in permutations(names, 2) if b in inner.required]
        if inner.standalone:
            pairs = [(name, _PART) for name in names if not is_geometric(name)]
        self._shapes = self._probe([*names, _PART] if inner.standalone else names)
        with seeded(self.config.seed):
            self.networks = nn.ModuleDict(
                {
                    f"{a}_to_{b}": nn.ModuleList(
                        PatchHallucination(
                            sum(shape.channels for shape in self._shapes[a].values()),
                            target.channels,
                            output_activation=self.config.output_activation,
                        )
                        for target in self._shapes[b].values()
                    )
                    for a, b in pairs
                }
            )

    @property
    def modalities(self) -> tuple[str, ...]:
        """The inner detector's: what fitting needs, and a part may have."""
        return self.inner.modalities

    @property
    def choices(self) -> list[tuple[str, ...]]:
        """Every set of the modalities but the empty one: all of them first, then fewer."""
        names = self.inner.modalities
        return [chosen for count in range(len(names), 0, -1) for chosen in combinations(names, count)]

    def extract(self, batch: Batch) -> Features:
        """The inner detector's features of the modalities that are there."""
        missing = [name for name in self.inner.modalities if name not in batch.images]
        if not missing:
            return self.inner.extract(batch)
        features = self.inner.extract(_with_blanks(batch, missing))
        kept = {key: x for key, x in features.items() if self.inner.modality_of(key) not in missing}
        return {**kept, "valid": batch.valid, "foreground": batch.foreground}

    def extractor_key(self) -> str:
        """The inner detector's: complete parts have the same features."""
        return self.inner.extractor_key()

    def stages(self) -> Sequence[Stage]:
        """Train all networks together."""
        c = self.config
        warm = max(c.warmup_epochs, 1)
        return [
            Optimise(
                name="hallucination",
                parameters=self.networks.parameters,
                loss=self.loss,
                optimizer=partial(torch.optim.Adam, lr=c.learning_rate),
                epochs=c.epochs,
                batch_size=c.batch_size,
                schedule=lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda e: min(1.0, (e + 1) / warm)),
            )
        ]

    def loss(self, features: Features) -> dict[str, Tensor]:
        """Eq. 2, one scalar per ordered pair of modalities, or of a modality and the place of the part."""
        grids = {name: self._grids(features, name) for name in self._shapes}
        terms = {}
        for pair, networks in self.networks.items():
            a, _, b = pair.partition("_to_")
            total: Tensor = features["valid"].new_zeros((), dtype=torch.float32)
            for network, target in zip(cast(nn.ModuleList, networks), grids[b].values(), strict=True):
                x, r = _patches(_joined(grids[a], target)), _patches(target)  # B P C
                if self.config.patches is not None and self.config.patches < x.shape[1]:
                    index = torch.randperm(x.shape[1], device=x.device)[: self.config.patches]
                    x, r = x[:, index], r[:, index]
                if b == _PART:
                    total = total + F.binary_cross_entropy_with_logits(network(x), r)
                    continue
                size = r.norm(dim=-1).mean().clamp(min=1e-12)
                total = total + (network(x) - r).norm(dim=-1).mean() / size
            terms[pair] = total
        return terms

    def score(self, features: Features) -> Prediction:
        """The inner detector's answer, its missing features filled in (Eq. 1).

        Raises:
            NotFittedError: something is missing and the networks were not trained.
        """
        with evaluating(self.networks):
            return self.inner.score(self.complete(features))

    def complete(self, features: Features) -> Features:
        """`features` with those of the missing modalities, or where the part is, hallucinated."""
        there = {self.inner.modality_of(key) for key in features}
        missing = [name for name in self.inner.required if name not in there]
        if not missing:
            return features
        if not bool(self.fitted):
            raise NotFittedError("nothing was learned yet that could stand in for a missing modality")
        grids = {name: self._grids(features, name) for name in self.inner.modalities if name in there}
        if self.inner.standalone:
            return features if any(map(is_geometric, grids)) else {**features, _PART: self._place(features, grids)}
        filled = dict(features)
        for b in missing:
            filled |= self._hallucinated(features, grids, b)
        return filled

    def _place(self, features: Features, grids: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
        """Where the part is, (B, H, W) bool, as the views that are there have it."""
        H, W = features["valid"].shape[-2:]
        logit = self._predicted(grids, _PART, 0, self._shapes[_PART][_PART], (H, W))
        return F.interpolate(logit, size=(H, W), mode="bilinear", align_corners=False)[:, 0] > 0

    def _hallucinated(self, features: Features, grids: Mapping[str, Mapping[str, Tensor]], b: str) -> dict[str, Tensor]:
        """The features of modality `b`."""
        H, W = features["valid"].shape[-2:]
        made: dict[str, Tensor] = {}
        for index, (key, shape) in enumerate(self._shapes[b].items()):
            grid = self._predicted(grids, b, index, shape, (H, W))
            if key == f"{b}.groups":
                counted = features["valid"] & features["foreground"]
                made |= {f"{b}.{name}": x for name, x in groups_on_grid(grid, counted).items()}
            else:
                made[key] = grid
        return made

    def _predicted(
        self, grids: Mapping[str, Mapping[str, Tensor]], b: str, index: int, shape: _Shape, size: tuple[int, int]
    ) -> Tensor:
        """Map `index` of `b`, (B, C, h, w) for parts of `size`: the mean over the modalities that are there."""
        h, w = shape.grid(*size)
        votes = []
        for a, own in grids.items():
            like = next(iter(own.values())).new_zeros(1, shape.channels, h, w)
            network = cast(nn.ModuleList, self.networks[f"{a}_to_{b}"])[index]
            votes.append(network(_patches(_joined(own, like))))  # B P C
        return torch.stack(votes).mean(0).mT.unflatten(2, (h, w))

    # -- features as grids ---------------------------------------------------------------------------------------------

    def _grids(self, features: Features, name: str) -> dict[str, Tensor]:
        """The feature maps (B, C, h, w) of modality `name` by key; features of point groups on a grid of cells.

        Of a detector that stands alone also the place of the part, as its share of the cells, and no features but maps.
        """
        own = {key: x for key, x in features.items() if self.inner.modality_of(key) == name}
        H, W = features["valid"].shape[-2:]
        grid = (-(-H // self.config.cell), -(-W // self.config.cell))
        if name == _PART:
            return {_PART: F.adaptive_avg_pool2d(features[_PART][:, None].float(), grid)}
        if f"{name}.near" in own:
            return {f"{name}.groups": point_grid(features, grid, name).float()}
        maps = {key: x.float() for key, x in own.items() if not self.inner.standalone or x.ndim == 4}
        return {key: self.inner.over_part(key, x) for key, x in maps.items()}

    def _probe(self, names: Sequence[str]) -> dict[str, dict[str, _Shape]]:
        """Modality -> name -> shape of its feature maps, from empty parts of two sizes.

        Raises:
            ConfigError: a feature belongs to no modality, or is no map.
        """
        shapes: dict[str, dict[str, _Shape]] = {}
        small, large = (self._of_nothing(size, names) for size in _PROBES)
        for name in names:
            if not small[name] or any(grid.ndim != 4 for grid in small[name].values()):
                raise ConfigError(f"the features of '{name}' in {type(self.inner).__name__} are no maps (B, C, h, w)")
            shapes[name] = {
                key: _Shape(grid.shape[1], grid.shape[-1], grid.shape[-1] == large[name][key].shape[-1])
                for key, grid in small[name].items()
            }
        return shapes

    def _of_nothing(self, size: int, names: Sequence[str]) -> dict[str, dict[str, Tensor]]:
        """The feature maps of an empty part."""
        nothing = torch.zeros(1, size, size, dtype=torch.bool, device=self.inner.fitted.device)
        blank = _with_blanks(Batch(("probe",), {}, nothing, nothing), self.inner.modalities)
        with evaluating(self.inner), torch.no_grad():
            features = self.inner.extract(blank)
        for key in features:
            free = key in _FREE or (self.inner.standalone and key == _PART)
            if not free and self.inner.modality_of(key) not in self.inner.modalities:
                raise ConfigError(
                    f"{type(self.inner).__name__} joins its modalities before it keeps their features ('{key}'): a "
                    f"missing one cannot be filled in"
                )
        return {name: self._grids(features, name) for name in names}


@dataclass(frozen=True)
class _Shape:
    """Shape of a feature map: `cells` along a side of a part of 128 pixels, or of any part if `fixed`."""

    channels: int
    cells: int
    fixed: bool

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the map of a part."""
        if self.fixed:
            return self.cells, self.cells
        reduction = max(1, round(_PROBES[0] / self.cells))
        return -(-height // reduction), -(-width // reduction)


def _with_blanks(batch: Batch, missing: Sequence[str]) -> Batch:
    """The batch with zero images for what is missing; where no geometric view is left, nothing is valid."""
    B, H, W = batch.valid.shape
    blanks = {
        name: torch.zeros(B, MODALITIES[name].channels if name in MODALITIES else 3, H, W, device=batch.valid.device)
        for name in missing
    }
    if any(is_geometric(name) for name in batch.images):
        return replace(batch, images={**batch.images, **blanks})
    nothing = torch.zeros_like(batch.valid)
    return replace(batch, images={**batch.images, **blanks}, valid=nothing)


def _joined(grids: Mapping[str, Tensor], like: Tensor) -> Tensor:
    """All maps of a modality on the grid of `like`, joined: (B, sum of C_i, h, w)."""
    size = like.shape[-2:]
    return torch.cat([_resized(x, (size[0], size[1])) for x in grids.values()], dim=1)


def _resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    if x.shape[-2:] == torch.Size(size):
        return x
    if x.shape[-2] >= size[0] and x.shape[-1] >= size[1]:
        return F.adaptive_avg_pool2d(x, size)
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def _patches(grid: Tensor) -> Tensor:
    """(B, C, h, w) as (B, h*w, C)."""
    return grid.flatten(2).mT
