"""Distil a frozen image network into a patch description network (PDN), and write that as a weights file.

Batzner, Heckler and König, "EfficientAD: Accurate visual anomaly detection at millisecond-level latencies" (WACV 2024),
appendix on pretraining. For a picture the frozen network sees an enlarged copy; of each of its levels l

    u_l(p)  the 3x3 cells around p, all channels: 9 C_l numbers (channel first, zeros beyond the border)
    m_l(p)  u_l averaged over windows to 1,024 numbers (PatchCore's adaptive pooling)                       (1)
    t(p)    all m_l, those of coarse levels interpolated to the grid of the PDN, averaged over windows to 384 (2)
    loss    mean over channels, cells and pictures of ((t - mean) / sd - PDN)^2                              (3)

with mean and deviation of each channel over many pictures. Eqs. 1 and 2 are linear, so they are one 3x3 convolution of
fixed weights per level, before the interpolation (`pooling_kernels`).

Every random choice is drawn from a generator seeded by (seed, step), so a run that was killed and resumed ends in the
same bits. `PAPER` holds the paper's numbers. The defaults differ where a short run on a CPU would not get anywhere:
small crops without padding, since most cells of a small padded crop see zeros, and a higher rate that falls.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..backbones.image import DEFAULT_BACKBONE, ImageBackbone
from ..backbones.patch_description import MARGIN, RECEPTIVE_FIELD, STRIDE, PatchDescription, Size
from ..detectors.contract import seeded
from ..errors import ConfigError, DataError
from ..samples import Array
from ..version import __version__
from .engine import derive_seed, pick_accelerator
from .modelfile import FORMAT, write_tensors
from .progress import Progress
from .updates import run_updates

Precision = Literal["32-true", "bf16-mixed"]

_LUMA = (0.299, 0.587, 0.114)  # of red, green and blue (ITU-R BT.601)


class ImageSource(Protocol):
    """Pictures to learn from, by number."""

    def __len__(self) -> int: ...

    def picture(self, index: int) -> Array:
        """RGB (H, W, 3) uint8."""
        ...

    def about(self) -> dict[str, Any]:
        """What the pictures are, as plain values: goes into the weights file and tells one source from another."""
        ...


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """How to distil."""

    size: Size = "small"  # of the PDN
    outputs: int = 384  # channels of the PDN
    backbone: str = DEFAULT_BACKBONE  # the frozen network (paper WideResNet101)
    weights: str = "auto"  # of the frozen network
    reductions: tuple[int, ...] = (8, 16)  # levels of it, in pixels per cell of the enlarged picture
    middle: int = 1024  # numbers to which each level is averaged first, Eq. 1
    enlarge: int = 2  # the frozen network sees pictures of so many times `pixels` (paper 512 to 256)
    pixels: int = 128  # side of the picture that the PDN sees (paper 256)
    padding: bool = False  # of the PDN while it learns; it can be used either way (paper: with)
    steps: int = 4000  # updates (paper 60,000)
    batch_size: int = 4  # pictures (paper 16)
    lr: float = 5e-4  # at its highest (paper 1e-4)
    lowest_lr: float = 1e-5  # before the warm-up and at the end (paper 1e-4: it stays)
    warmup: float = 0.02  # share of the steps over which the rate rises (paper 0)
    weight_decay: float = 1e-5  # added to the gradient, as Adam does
    statistics: int = 512  # pictures for mean and deviation of Eq. 3 (paper 10,000)
    crop: tuple[float, float] = (0.4, 1.0)  # share of the picture's sides that is cut out, least and most (paper 1)
    flip: bool = True  # left to right and top to bottom, each for half of the pictures (paper: not)
    colour: float = 0.3  # brightness, contrast and saturation by a factor of up to 1 plus or minus this (paper 0)
    grey: float = 0.1  # share of the pictures that lose their colours
    precision: Precision = "32-true"  # or bf16-mixed: convolutions in bfloat16, weights in float32
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "reductions", tuple(self.reductions))
        object.__setattr__(self, "crop", tuple(self.crop))
        for name in ("outputs", "middle", "enlarge", "steps", "batch_size", "statistics"):
            if getattr(self, name) < 1:
                raise ConfigError(f"distillation: `{name}` must be at least 1, got {getattr(self, name)}")
        least = STRIDE if self.padding else RECEPTIVE_FIELD + STRIDE - 1
        if self.pixels < least or self.pixels % STRIDE:
            raise ConfigError(
                f"distillation: `pixels` must be a multiple of {STRIDE} and at least {least}, got {self.pixels}"
            )
        if not self.reductions or self.outputs % len(self.reductions):
            raise ConfigError(
                f"distillation: {self.outputs} outputs cannot be shared equally by levels {list(self.reductions)}"
            )
        if len(self.crop) != 2 or not 0 < self.crop[0] <= self.crop[1] <= 1:
            raise ConfigError(f"distillation: `crop` must be (least, most) in (0, 1], got {self.crop}")
        if not (0 <= self.colour < 1 and 0 <= self.grey <= 1):
            raise ConfigError(
                f"distillation: needs colour in [0, 1) and grey in [0, 1], got {self.colour} and {self.grey}"
            )
        if not (self.lr > 0 and 0 <= self.lowest_lr <= self.lr and 0 <= self.warmup < 1 and self.weight_decay >= 0):
            raise ConfigError(
                f"distillation: needs lr > 0, lowest_lr in [0, lr], warmup in [0, 1) and weight_decay >= 0, got "
                f"{self.lr}, {self.lowest_lr}, {self.warmup} and {self.weight_decay}"
            )
        if self.precision not in ("32-true", "bf16-mixed"):
            raise ConfigError(f"distillation: `precision` is 32-true or bf16-mixed, got '{self.precision}'")


PAPER: dict[str, Any] = {
    "backbone": "wide_resnet101_2.tv_in1k",
    "pixels": 256,
    "padding": True,
    "steps": 60_000,
    "batch_size": 16,
    "lr": 1e-4,
    "lowest_lr": 1e-4,
    "warmup": 0.0,
    "statistics": 10_000,
    "crop": (1.0, 1.0),
    "flip": False,
    "colour": 0.0,
}
"""What differs from the defaults in the paper's recipe, for the pictures of ImageNet."""


@dataclass(frozen=True)
class Distilled:
    """The outcome of `distil`."""

    network: PatchDescription
    targets: PatchTargets
    curve: list[tuple[int, float]]  # (updates so far, mean loss of the last 100)
    seconds: float  # of training in all runs, pictures included
    updates: int  # made in all
    cooled_from: int | None = None  # update after which the run was brought to an early end


class PatchTargets(nn.Module):
    """What the PDN learns to answer: Eqs. 1 to 3 of a frozen network.

    Attributes:
        mean: (1, outputs, 1, 1), and
        std: likewise, of each channel; 0 and 1 until `measure_targets`.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: DistillationConfig) -> None:
        super().__init__()
        folds = config.backbone == DEFAULT_BACKBONE  # faster, the same features; not every network can
        self.backbone = ImageBackbone(config.backbone, config.reductions, config.weights, fold_bn=folds)
        each = config.outputs // len(config.reductions)
        self.kernels = nn.ParameterList(
            nn.Parameter(pooling_kernel(channels, config.middle, each), requires_grad=False)
            for channels in self.backbone.channels
        )
        self.margin = 0 if config.padding else MARGIN
        self.register_buffer("mean", torch.zeros(1, config.outputs, 1, 1))
        self.register_buffer("std", torch.ones(1, config.outputs, 1, 1))

    @torch.no_grad()
    def forward(self, enlarged: Tensor, cells: int) -> Tensor:
        """Targets (B, outputs, h, h) of enlarged pictures (B, 3, H, H) in 0..1; the whole grid is `cells` wide.

        Without padding the PDN lacks the outer four cells of that grid, and so does the answer.
        """
        levels = []
        for level, kernel in zip(self.backbone(enlarged), self.kernels, strict=True):
            pooled = F.conv2d(level, kernel, padding=1)  # Eq. 1 and the first half of Eq. 2
            levels.append(F.interpolate(pooled, size=(cells, cells), mode="bilinear", align_corners=False))
        target = (torch.cat(levels, dim=1) - self.mean) / self.std  # B outputs cells cells
        inside = slice(self.margin, cells - self.margin)
        return target[:, :, inside, inside]


def pooling_kernel(channels: int, middle: int, outputs: int) -> Tensor:
    """Weights (outputs, channels, 3, 3) that average 3x3 cells to `middle` numbers and these to `outputs`."""
    units = torch.eye(9 * channels)  # one row per number of a patch; channel first, then row, then column
    pooled = F.adaptive_avg_pool1d(F.adaptive_avg_pool1d(units[None], middle), outputs)[0]
    return pooled.T.reshape(outputs, channels, 3, 3).contiguous()


def distil(
    sources: Sequence[ImageSource],
    config: DistillationConfig,
    *,
    device: str = "auto",
    checkpoint: Path | None = None,
    resume: bool = False,
    save_every: float = 120.0,
    stop_after: int | None = None,
    cooldown: int | None = None,
    progress: Progress | None = None,
) -> Distilled:
    """Train a `PatchDescription` to answer as a frozen network does.

    Args:
        sources: The pictures; each source gives as many as any other.
        config: How.
        device: auto, cpu or cuda.
        checkpoint, resume, save_every, stop_after, cooldown, progress: See `updates.run_updates`.

    Raises:
        ConfigError: a setting out of range, an unknown backbone, or a checkpoint of another run.
        DataError: no picture, or one that cannot be read; or a channel of the frozen network never changes.
        WeightsError: the weights of the backbone cannot be had.
    """
    if not sources or not all(len(source) for source in sources):
        raise DataError("there is no picture to distil with")
    accelerator = pick_accelerator(device)
    targets = PatchTargets(config).to(accelerator)
    run = _Run(config, targets).to(accelerator)
    run.student.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(run.student.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    outcome = run_updates(
        f"pdn {config.size}",
        run,
        optimizer,
        config,
        lambda step: _loss(run, sources, config, step),
        identity=_identity(sources, config, targets),
        begin=lambda shown: measure_targets(targets, sources, config, shown),
        checkpoint=checkpoint,
        resume=resume,
        save_every=save_every,
        stop_after=stop_after,
        cooldown=cooldown,
        progress=progress,
    )
    network = run.student.requires_grad_(False).eval()
    return Distilled(network, targets, *outcome)


def write_network(
    path: Path, distilled: Distilled, sources: Sequence[ImageSource], config: DistillationConfig, *, half: bool = True
) -> None:
    """Write the PDN as safetensors; the header says what it is and how it was made.

    Args:
        path: File to write.
        distilled: What `distil` returned.
        sources, config: What it was called with.
        half: Store fp16 instead of fp32.
    """
    state = distilled.network.state_dict()
    tensors = {name: tensor.half() if half else tensor for name, tensor in state.items()}
    about = {
        "size": config.size,
        "outputs": config.outputs,
        "made": {
            "method": "distillation",
            "version": __version__,
            "settings": asdict(config) | {"weights": distilled.targets.backbone.weights_source["sha256"]},
            "pictures": [source.about() for source in sources],
            "updates": distilled.updates,
            "cooled_from": distilled.cooled_from,
            "curve": [[step, round(loss, 6)] for step, loss in distilled.curve],
        },
    }
    write_tensors(path, tensors, {"format": FORMAT, "patch_description": about})


@torch.no_grad()
def measure_targets(
    targets: PatchTargets, sources: Sequence[ImageSource], config: DistillationConfig, progress: Progress | None = None
) -> None:
    """Set mean and deviation of every channel (Eq. 3) from `config.statistics` pictures.

    Raises:
        DataError: a channel never changes.
    """
    device = targets.mean.device
    targets.mean.zero_()
    targets.std.fill_(1)
    total = squares = torch.zeros((), dtype=torch.float64, device=device)
    count = 0
    with (progress or Progress()).task("statistics", config.statistics) as advance:
        for first in range(0, config.statistics, config.batch_size):
            number = min(config.batch_size, config.statistics - first)
            _, enlarged = draw_batch(sources, config, first, stream=2, number=number)
            target = targets(enlarged.to(device), config.pixels // STRIDE).double()
            count += target.numel() // target.shape[1]
            total = target.sum((0, 2, 3), keepdim=True) + total
            squares = target.square().sum((0, 2, 3), keepdim=True) + squares
            advance(number)
    mean = total / count
    std = (squares / count - mean**2).clamp(min=0).sqrt()
    if bool((std < 1e-6).any()):
        still = int((std < 1e-6).sum())
        raise DataError(
            f"{still} of {config.outputs} channels of '{config.backbone}' have one value all over {config.statistics} "
            "pictures: give more and other pictures"
        )
    targets.mean.copy_(mean)
    targets.std.copy_(std)


@torch.no_grad()
def explained(
    network: nn.Module, targets: PatchTargets, sources: Sequence[ImageSource], config: DistillationConfig, count: int
) -> Tensor:
    """Share of each channel's variance (outputs,) that the PDN explains on `count` further views: 1 is all of it."""
    device = targets.mean.device
    error = total = squares = torch.zeros((), dtype=torch.float64, device=device)
    cells = 0
    for first in range(0, count, config.batch_size):
        number = min(config.batch_size, count - first)
        image, enlarged = draw_batch(sources, config, first, stream=3, number=number)
        target = targets(enlarged.to(device), config.pixels // STRIDE).double()
        error = (target - network(image.to(device))).square().sum((0, 2, 3)) + error
        total, squares = target.sum((0, 2, 3)) + total, target.square().sum((0, 2, 3)) + squares
        cells += target.numel() // target.shape[1]
    return (1 - error / (squares - total**2 / cells)).float()


def draw_batch(
    sources: Sequence[ImageSource], config: DistillationConfig, step: int, stream: int = 1, number: int | None = None
) -> tuple[Tensor, Tensor]:
    """Pictures (B, 3, S, S) and the same enlarged (B, 3, T, T), in 0..1, of update `step`.

    Args:
        sources: Where they are from; each with the same chance.
        config: How they are cut and changed.
        step: Number of the update.
        stream: Another one gives other pictures for the same step.
        number: B; None for `config.batch_size`.
    """
    generator = torch.Generator().manual_seed(derive_seed(config.seed, stream, step))
    small, large = [], []
    for _ in range(config.batch_size if number is None else number):
        source = sources[_below(len(sources), generator)]
        picture = torch.tensor(source.picture(_below(len(source), generator)))  # H W 3
        image = augment(picture.permute(2, 0, 1).float() / 255, config, generator)[None]
        small.append(_resized(image, config.pixels))
        large.append(_resized(image, config.pixels * config.enlarge))
    return torch.cat(small), torch.cat(large)


def augment(image: Tensor, config: DistillationConfig, generator: torch.Generator) -> Tensor:
    """One picture (3, H, W) in 0..1 cut out, flipped and changed in its colours at random."""
    H, W = image.shape[1:]
    low, high = config.crop
    share = low + (high - low) * _chance(generator)
    h, w = max(1, round(share * H)), max(1, round(share * W))
    top, left = _below(H - h + 1, generator), _below(W - w + 1, generator)
    image = image[:, top : top + h, left : left + w]
    for axis in (1, 2):
        if config.flip and _chance(generator) < 0.5:
            image = image.flip(axis)
    luma = torch.tensor(_LUMA).view(3, 1, 1)
    if config.colour:
        brightness, contrast, saturation = (
            1 + config.colour * (2 * _chance(generator) - 1) for _ in ("brightness", "contrast", "saturation")
        )
        image = brightness * image
        middle = (luma * image).sum(0).mean()
        image = middle + contrast * (image - middle)
        grey = (luma * image).sum(0, keepdim=True)
        image = (grey + saturation * (image - grey)).clamp(0, 1)
    if _chance(generator) < config.grey:
        image = (luma * image).sum(0, keepdim=True).expand(3, -1, -1)
    return image


class _Run(nn.Module):
    """What a checkpoint keeps: the PDN and the statistics of its targets."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: DistillationConfig, targets: PatchTargets) -> None:
        super().__init__()
        with seeded(derive_seed(config.seed, 0)):
            self.student = PatchDescription(config.size, config.outputs, padding=config.padding)
            layers = [layer for layer in self.student.modules() if isinstance(layer, nn.Conv2d)]
            for layer in layers:  # He's initial values: torch's own let the signal die away
                nn.init.kaiming_normal_(layer.weight, nonlinearity="linear" if layer is layers[-1] else "relu")
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        self.targets = [targets]  # in a list: no part of the checkpoint but for its statistics,
        self.register_buffer("mean", targets.mean)  # which are the very tensors that `targets` has
        self.register_buffer("std", targets.std)


def _loss(run: _Run, sources: Sequence[ImageSource], config: DistillationConfig, step: int) -> Tensor:
    image, enlarged = (x.to(run.mean.device) for x in draw_batch(sources, config, step))
    target = run.targets[0](enlarged, config.pixels // STRIDE)
    with torch.autocast(image.device.type, torch.bfloat16, enabled=config.precision == "bf16-mixed"):
        answer = run.student(image.contiguous(memory_format=torch.channels_last))
    return F.mse_loss(answer.float(), target)  # Eq. 3


def _resized(image: Tensor, side: int) -> Tensor:
    resized: Tensor = F.interpolate(image, size=(side, side), mode="bilinear", align_corners=False, antialias=True)
    return resized.clamp(0, 1)


def _below(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=generator))


def _chance(generator: torch.Generator) -> float:
    return float(torch.rand((), generator=generator))


def _identity(sources: Sequence[ImageSource], config: DistillationConfig, targets: PatchTargets) -> str:
    about = [asdict(config), [source.about() for source in sources], targets.backbone.weights_source["sha256"]]
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
