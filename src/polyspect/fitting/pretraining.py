"""Pre-train a point transformer on clouds without labels (Point-MAE), and write its encoder as a weights file.

Every random choice is drawn from a generator seeded by (seed, step), so a run that was killed and resumed ends in the
same bits. `PAPER` holds the paper's numbers. The defaults differ from it where use differs, and where a short run on a
CPU would not get anywhere: clouds are one side of a thing as a depth camera sees it, with as many points and as large
groups as in use; the loss is measured in units of those groups, and visible groups count too; and the network must tell
the shape of every group's surface, as a histogram of the angles between its normals (`shape_histograms`).
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..backbones.point_mae import Loss, Masking, PointMAE, hide_groups
from ..backbones.point_transformer import SIZES
from ..detectors.contract import seeded
from ..errors import ConfigError, DataError
from ..geometry.fpfh import BINS, estimate_normals, fpfh
from ..geometry.neighbours import group, nearest_neighbours
from ..geometry.sampling import farthest_points
from ..geometry.unit import to_unit_frame
from ..samples import Array
from ..version import __version__
from .engine import derive_seed, pick_accelerator
from .modelfile import FORMAT, write_tensors
from .progress import Progress
from .updates import run_updates

HISTOGRAM = 3 * BINS  # values of a group's descriptor
_LEVEL_CLOUDS = 32  # the first so many clouds say how descriptors are spread
_KEPT_CLOUDS = 1000  # clouds whose descriptors stay in memory, about 0.5 MB each


class CloudSource(Protocol):
    """Clouds to learn from, by number."""

    def __len__(self) -> int: ...

    def cloud(self, index: int) -> Array:
        """Points (N, 3) float32, all of them measured."""
        ...

    def about(self) -> dict[str, Any]:
        """What the clouds are, as plain values: goes into the weights file and tells one source from another."""
        ...


@dataclass(frozen=True, kw_only=True)
class PretrainingConfig:
    """How to pre-train; the ranges are (least, most), drawn anew at every step."""

    size: str = "small"  # of the encoder, see `point_transformer.SIZES`
    steps: int = 800  # updates
    batch_size: int = 8  # clouds (paper 128)
    points: int = 6144  # of a cloud, drawn from those that there are (paper 1024)
    groups: tuple[int, int] = (96, 160)  # (paper 64)
    group_size: tuple[int, int] = (48, 96)  # points of a group (paper 32)
    mask_ratio: float = 0.4  # share of the groups that is hidden (paper 0.6)
    masking: Masking = "random"
    loss: Loss = "l2"
    normalise: bool = True  # measure the loss in units of the visible groups' extent (paper: not)
    visible_weight: float = 1.0  # of the loss of groups that are not hidden (paper 0)
    shape_weight: float = 1.0  # of telling the groups' histograms, Eq. 6 of `PointMAE`; 0: not (paper)
    normal_radius: float = 0.05  # within which normals are estimated for them, in units of the cloud's radius
    shape_radius: float = 0.125  # within which their angles are counted
    branch_scale: float = 0.1  # of positions and of what blocks add to a token, at the start (paper: as drawn, 1)
    decoder_blocks: int = 2  # (paper 4)
    drop_path: float = 0.0  # (paper 0.1)
    lr: float = 1e-3  # at its highest
    lowest_lr: float = 1e-6  # before the warm-up and at the end
    warmup: float = 0.05  # share of the steps over which the rate rises (paper 10 of 300 epochs)
    weight_decay: float = 0.05  # not on one-dimensional tensors
    turn: bool = True  # turn clouds about the camera's axis by any angle (paper: not)
    scale: tuple[float, float] = (1.0, 1.0)  # every axis by a factor of its own (paper 2/3 to 3/2)
    shift: float = 0.0  # every axis by up to this much either way, after the scaling (paper 0.2)
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("groups", "group_size", "scale"):
            value = tuple(getattr(self, name))
            object.__setattr__(self, name, value)
            if len(value) != 2 or not 0 < value[0] <= value[1]:
                raise ConfigError(f"pre-training: `{name}` must be (least, most) above 0, got {value}")
        for name in ("steps", "batch_size", "points"):
            if getattr(self, name) < 1:
                raise ConfigError(f"pre-training: `{name}` must be at least 1, got {getattr(self, name)}")
        if self.groups[0] < 2 or not 0 < int(self.mask_ratio * self.groups[0]) < self.groups[0]:
            raise ConfigError(
                f"pre-training: a `mask_ratio` of {self.mask_ratio} of {self.groups[0]} groups must hide one at least "
                "and show one"
            )
        if self.masking not in ("random", "block") or self.loss not in ("l2", "l1"):
            raise ConfigError(
                f"pre-training: `masking` is random or block and `loss` l2 or l1, got {self.masking}, {self.loss}"
            )
        if not (self.lr > 0 and 0 <= self.lowest_lr <= self.lr and 0 <= self.warmup < 1):
            raise ConfigError(
                f"pre-training: needs lr > 0, lowest_lr in [0, lr] and warmup in [0, 1), got {self.lr}, "
                f"{self.lowest_lr} and {self.warmup}"
            )
        if self.shape_weight < 0 or not (self.normal_radius > 0 and self.shape_radius > 0):
            raise ConfigError(
                "pre-training: `shape_weight` must be 0 or more and both radii above 0, got "
                f"{self.shape_weight}, {self.normal_radius} and {self.shape_radius}"
            )
        if self.points < max(self.groups[1], self.group_size[1]):
            raise ConfigError(
                f"pre-training: {self.points} points are fewer than {self.groups[1]} groups or {self.group_size[1]} "
                "points of a group: raise `points`"
            )


PAPER: dict[str, Any] = {
    "size": "base",
    "batch_size": 128,
    "points": 1024,
    "groups": (64, 64),
    "group_size": (32, 32),
    "mask_ratio": 0.6,
    "normalise": False,
    "visible_weight": 0.0,
    "shape_weight": 0.0,
    "branch_scale": 1.0,
    "decoder_blocks": 4,
    "drop_path": 0.1,
    "turn": False,
    "scale": (2 / 3, 3 / 2),
    "shift": 0.2,
    "warmup": 10 / 300,
}
"""What differs from the defaults in the paper's recipe; it ran 300 epochs."""


@dataclass(frozen=True)
class Pretrained:
    """The outcome of `pretrain`."""

    network: PointMAE
    curve: list[tuple[int, float]]  # (updates so far, mean loss of the last 100)
    seconds: float  # of training in all runs, data included
    updates: int  # made in all
    cooled_from: int | None = None  # update after which the run was brought to an early end


def pretrain(
    source: CloudSource,
    config: PretrainingConfig,
    *,
    device: str = "auto",
    checkpoint: Path | None = None,
    resume: bool = False,
    save_every: float = 120.0,
    stop_after: int | None = None,
    cooldown: int | None = None,
    progress: Progress | None = None,
) -> Pretrained:
    """Train a `PointMAE` on the clouds of `source`.

    Args:
        source: The clouds.
        config: How.
        device: auto, cpu or cuda.
        checkpoint, resume, save_every, stop_after, cooldown, progress: See `updates.run_updates`.

    Raises:
        ConfigError: a setting out of range, or a checkpoint of another run.
        DataError: no clouds, or one with too few points.
    """
    if len(source) == 0:
        raise DataError("there is no cloud to pre-train on")
    accelerator = pick_accelerator(device)
    with seeded(derive_seed(config.seed, 0)):
        network = PointMAE(
            config.size,
            decoder_blocks=config.decoder_blocks,
            points=config.group_size[0],
            drop_path=config.drop_path,
            normalise=config.normalise,
            branch_scale=config.branch_scale,
            targets=HISTOGRAM if config.shape_weight else 0,
        )
    network.to(accelerator).train()
    network.encoder.eval()  # the fast form of the token PointNet, with the same gradients
    optimizer = torch.optim.AdamW(parameter_groups(network, config.weight_decay), lr=config.lr, betas=(0.9, 0.999))
    clouds = _Clouds(source, config)
    outcome = run_updates(
        f"point-mae {config.size}",
        network,
        optimizer,
        config,
        lambda step: _loss(network, clouds, config, step, accelerator),
        identity=_identity(source, config),
        checkpoint=checkpoint,
        resume=resume,
        save_every=save_every,
        stop_after=stop_after,
        cooldown=cooldown,
        progress=progress,
    )
    network.eval()
    return Pretrained(network, *outcome)


def write_encoder(
    path: Path, trained: Pretrained, source: CloudSource, config: PretrainingConfig, *, half: bool = True
) -> None:
    """Write the encoder as safetensors; the header says what it is and how it was made.

    Args:
        path: File to write.
        trained: What `pretrain` returned.
        source, config: What it was called with.
        half: Store fp16 instead of fp32.
    """
    state = trained.network.encoder.state_dict()
    tensors = {name: tensor.half() if half else tensor for name, tensor in state.items()}
    about = {
        "size": config.size,
        "layers": list(SIZES[config.size].layers),
        "frame": "unit",
        "statistics": "cloud",  # those stored in the file are no measurement
        "made": {
            "method": "Point-MAE pre-training",
            "version": __version__,
            "settings": asdict(config),
            "clouds": source.about(),
            "updates": trained.updates,
            "cooled_from": trained.cooled_from,
            "curve": [[step, round(loss, 8)] for step, loss in trained.curve],
        },
    }
    write_tensors(path, tensors, {"format": FORMAT, "point_transformer": about})


def parameter_groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's groups: weight decay on matrices only, not on biases, norms and the mask token."""
    decayed = [p for p in network.parameters() if p.dim() > 1]
    free = [p for p in network.parameters() if p.dim() <= 1]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


def augment(points: Tensor, config: PretrainingConfig, generator: torch.Generator) -> Tensor:
    """One cloud (N, 3) turned, brought to the unit frame, scaled and shifted at random."""
    if config.turn:
        angle = 2 * math.pi * float(torch.rand((), generator=generator, dtype=torch.float64))
        c, s = math.cos(angle), math.sin(angle)
        points = points @ torch.tensor([[c, s, 0], [-s, c, 0], [0, 0, 1]], dtype=points.dtype)
    points = to_unit_frame(points[None])[0]
    low, high = config.scale
    factors = low + (high - low) * torch.rand(3, generator=generator)
    return points * factors + config.shift * (2 * torch.rand(3, generator=generator) - 1)


def shape_histograms(points: Tensor, normal_radius: float, shape_radius: float) -> Tensor:
    """FPFH (N, 33) of a cloud (N, 3) in the unit frame whose camera looks along +z, each of the 3 blocks summing to 1.

    Normals point to the camera, so turning the cloud about its axis changes nothing.
    """
    normals = estimate_normals(points[None], radius=normal_radius)
    normals = torch.where(normals[..., 2:] > 0, -normals, normals)
    return fpfh(points[None], normals, radius=shape_radius)[0] / 200


class _Clouds:
    """The clouds as training sees them, and the descriptors of their points."""

    def __init__(self, source: CloudSource, config: PretrainingConfig) -> None:
        self.source, self.config = source, config
        self._described = lru_cache(maxsize=_KEPT_CLOUDS)(self._describe)
        self._levels: tuple[Tensor, Tensor] | None = None

    def draw(self, index: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """Points (N, 3) in an order drawn at random, at most `points`, and their histograms (N, 33)."""
        if not self.config.shape_weight:
            points = self._cloud(index)
            return points[torch.randperm(len(points), generator=generator)[: self.config.points]], None
        points, histograms = self._described(index)
        order = torch.randperm(len(points), generator=generator)
        return points[order], histograms[order].float()

    def standardise(self, histograms: Tensor) -> Tensor:
        """Descriptors (..., 33) of groups' mean histograms: roots, less their mean, in units of their deviation."""
        if self._levels is None:
            parts = [self._described(index)[1][::16] for index in range(min(_LEVEL_CLOUDS, len(self.source)))]
            std, mean = torch.std_mean(torch.cat(parts).float().sqrt(), 0)
            self._levels = mean, std.clamp(min=0.01)
        mean, std = self._levels
        return (histograms.sqrt() - mean) / std

    def _cloud(self, index: int) -> Tensor:
        c = self.config
        points = torch.from_numpy(self.source.cloud(index))
        if len(points) < max(c.groups[1], c.group_size[1]):
            raise DataError(
                f"cloud {index} has {len(points)} points, fewer than {c.groups[1]} groups or {c.group_size[1]} points "
                "of a group: leave it out or lower `groups` and `group_size`"
            )
        return points

    def _describe(self, index: int) -> tuple[Tensor, Tensor]:
        c = self.config
        points = self._cloud(index)
        generator = torch.Generator().manual_seed(derive_seed(c.seed, 4, index))
        points = points[torch.randperm(len(points), generator=generator)[: c.points]]
        frame = to_unit_frame(points[None])[0]
        return points, shape_histograms(frame, c.normal_radius, c.shape_radius).half()


def draw_batch(
    source: CloudSource | _Clouds, config: PretrainingConfig, step: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Groups (B, G, M, 3) minus their centres, centres (B, G, 3) and descriptors (B, G, 33), if any, of update `step`.

    Raises:
        DataError: a cloud has fewer points than groups or than a group is large (names it).
    """
    clouds = source if isinstance(source, _Clouds) else _Clouds(source, config)
    generator = torch.Generator().manual_seed(derive_seed(config.seed, 1, step))
    G, M = (_between(low, high, generator) for low, high in (config.groups, config.group_size))
    groups, centres, descriptors = [], [], []
    for index in _indices(len(clouds.source), config, step):
        points, histograms = clouds.draw(index, generator)
        points = augment(points, config, generator)[None]
        chosen = points[:, farthest_points(points, G)[0]]  # the first point is drawn: the order is
        rows = nearest_neighbours(chosen, points, M).rows
        groups.append(group(points, chosen, rows))
        centres.append(chosen)
        if histograms is not None:
            descriptors.append(clouds.standardise(histograms[rows].mean(2)))
    return torch.cat(groups), torch.cat(centres), torch.cat(descriptors) if descriptors else None


def _indices(count: int, config: PretrainingConfig, step: int) -> list[int]:
    """The clouds of update `step`: each once per epoch, in an order of the epoch's own."""
    indices: list[int] = []
    place = step * config.batch_size
    while len(indices) < config.batch_size:
        epoch, first = divmod(place + len(indices), count)
        generator = torch.Generator().manual_seed(derive_seed(config.seed, 2, epoch))
        order = torch.randperm(count, generator=generator)
        indices += order[first : first + config.batch_size - len(indices)].tolist()
    return indices


def _between(low: int, high: int, generator: torch.Generator) -> int:
    return int(torch.randint(low, high + 1, (), generator=generator))


def _loss(network: PointMAE, clouds: _Clouds, config: PretrainingConfig, step: int, device: str) -> Tensor:
    groups, centres, descriptors = draw_batch(clouds, config, step)
    generator = torch.Generator().manual_seed(derive_seed(config.seed, 3, step))
    hidden = hide_groups(centres, config.mask_ratio, config.masking, generator)
    groups, centres, hidden = groups.to(device), centres.to(device), hidden.to(device)
    if descriptors is not None:
        descriptors = descriptors.to(device)
    return network.loss(
        groups, centres, hidden, generator, config.loss, config.visible_weight, descriptors, config.shape_weight
    )


def _identity(source: CloudSource, config: PretrainingConfig) -> str:
    text = json.dumps([asdict(config), source.about()], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
