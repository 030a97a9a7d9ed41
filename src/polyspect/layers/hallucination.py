"""Hallucination networks: what the missing modality would have given, predicted from the one that is there.

Sui et al., "Incomplete multimodal industrial anomaly detection via cross-modal distillation" (CMDIAD, Information
Fusion 2025), Sec. 3.2. Three routes, each with one network per direction:

    F2F  features -> features    `PatchHallucination` (the paper's), `ConvHallucination`
    F2I  features -> image       `ImageHallucination` (the paper's), `PatchImageHallucination`
    I2F  image    -> features    `FeaturesFromImage`

F2F works patch by patch on (B, P, C); networks that know the grid take and give maps (B, C, h, w). The released program
keeps both directions of F2F in one module; they share nothing, so here each is a network of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError, ShapeError
from ..samples import check_shapes
from .blocks import Bottleneck

OutputActivation = Literal["gelu", "none"]
HallucinationLoss = Literal["l2", "cosine", "smooth_l1"]

_HIDDEN = 2.5  # hidden width of F2F over its input's


# -- features to features ----------------------------------------------------------------------------------------------


class PatchHallucination(nn.Module):
    """F2F as in the paper: LayerNorm and an MLP C - 2.5 C - 2.5 C - C' per patch; 6,641,664 parameters for 768.

    The released program ends in a GELU, which the paper does not mention: no prediction falls below -0.17. It is the
    default because the published figures come from it; ``output_activation="none"`` lets targets be negative.

    Args:
        inputs: Channels of the main modality.
        outputs: Channels of the missing one; None: as many.
        depth: MLPs of three layers, one behind the other; all but the last keep the width.
        output_activation: What the last layer ends in.

    Raises:
        ConfigError: `depth` below 1, or an unknown activation.
    """

    def __init__(
        self,
        inputs: int = 768,
        outputs: int | None = None,
        depth: int = 1,
        output_activation: OutputActivation = "gelu",
    ) -> None:
        super().__init__()
        if depth < 1:
            raise ConfigError(f"`depth` must be at least 1, got {depth}")
        if output_activation not in ("gelu", "none"):
            raise ConfigError(f"`output_activation` must be 'gelu' or 'none', got '{output_activation}'")
        hidden = int(_HIDDEN * inputs)
        self.norm = nn.LayerNorm(inputs)
        widths = [inputs, hidden, hidden] * depth + [inputs if outputs is None else outputs]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.output_activation = output_activation

    def forward(self, patches: Tensor) -> Tensor:
        """Map patches (B, P, inputs) to (B, P, outputs).

        Raises:
            ShapeError: another shape.
        """
        check_shapes(patches=(patches, f"B P {self.norm.normalized_shape[0]}"))
        x = self.norm(patches)
        for layer in self.layers[:-1]:
            x = F.gelu(layer(x))
        x = self.layers[-1](x)
        return F.gelu(x) if self.output_activation == "gelu" else x


class ConvHallucination(nn.Module):
    """F2F of the released code, not in the paper: four 3x3 convolutions that keep the width; 21,238,272 parameters."""

    def __init__(self, channels: int = 768) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        for _ in range(3):
            parts += [_conv3(channels, channels, bias=False), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*parts, _conv3(channels, channels, bias=False))

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, C, h, w) to the same shape.

        Raises:
            ShapeError: another number of channels.
        """
        check_shapes(features=(features, f"B {self.layers[0].in_channels} h w"))
        return self.layers(features)


# -- features to image -------------------------------------------------------------------------------------------------


class ImageHallucination(nn.Module):
    """F2I as in the paper: a convolutional head like a depth head, 768 - 384 - 96 - 32 - 3; 3,015,011 parameters.

    The first convolution works on the feature grid, the others on the image; bicubic enlargement between them, and no
    activation after the first and the last. The published file also holds a LayerNorm that is never used.

    Args:
        inputs: Channels of the features.
        outputs: Channels of the image: normalised RGB, or xyz in metres.
        enlargement: Pixels per feature cell.
    """

    def __init__(self, inputs: int = 768, outputs: int = 3, enlargement: int = 4) -> None:
        super().__init__()
        self.reduce = _conv3(inputs, 384)
        self.refine = nn.Sequential(
            _conv3(384, 96), nn.ReLU(inplace=True), _conv3(96, 32), nn.ReLU(inplace=True), _conv3(32, outputs)
        )
        self.enlargement = enlargement

    def forward(self, features: Tensor) -> Tensor:
        """Map features (B, inputs, h, w) to an image (B, outputs, H, W), both sides `enlargement` times as long.

        Raises:
            ShapeError: another number of channels.
        """
        check_shapes(features=(features, f"B {self.reduce.in_channels} h w"))
        return self.refine(_enlarge(self.reduce(features), self.enlargement))


class PatchImageHallucination(nn.Module):
    """F2I of the released code, not in the paper: an MLP 768 - 1152 - 384 - 96 - 3 per patch, then enlargement.

    1,367,427 parameters; arguments as in `ImageHallucination`.
    """

    def __init__(self, inputs: int = 768, outputs: int = 3, enlargement: int = 4) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(inputs)
        widths = (inputs, inputs * 3 // 2, inputs // 2, inputs // 8)
        parts: list[nn.Module] = []
        for a, b in pairwise(widths):
            parts += [nn.Linear(a, b), nn.GELU()]
        self.mlp = nn.Sequential(*parts, nn.Linear(widths[-1], outputs))
        self.enlargement = enlargement

    def forward(self, features: Tensor) -> Tensor:
        """Map features (B, inputs, h, w) to an image (B, outputs, H, W), bicubic from the grid.

        Raises:
            ShapeError: another number of channels.
        """
        check_shapes(features=(features, f"B {self.norm.normalized_shape[0]} h w"))
        patches = self.mlp(self.norm(features.permute(0, 2, 3, 1)))  # B h w outputs
        return _enlarge(patches.permute(0, 3, 1, 2), self.enlargement)


# -- image to features -------------------------------------------------------------------------------------------------


class FeaturesFromImage(nn.Module):
    """I2F: a residual network at a quarter of the resolution; 3,848,000 parameters by default.

    The paper calls it the high-resolution branch of HRNet and reports 10.2 M parameters; the released code is this
    network, with a fourth stage that is built and never used (1,120,256 more). Width and depth are options because no
    released setting gives the paper's size.

    Args:
        outputs: Channels of the features.
        width: Channels of the stages; bottlenecks have a quarter inside.
        blocks: Bottlenecks of each stage.

    Raises:
        ConfigError: `width` is no multiple of 4, or there is no block.
    """

    def __init__(self, outputs: int = 768, width: int = 512, blocks: Sequence[int] = (4, 4, 4)) -> None:
        super().__init__()
        if width < 4 or width % 4:
            raise ConfigError(f"`width` must be a multiple of 4, got {width}")
        if not blocks or min(blocks) < 1:
            raise ConfigError(f"`blocks` must name at least one bottleneck per stage, got {list(blocks)}")
        self.conv1 = _conv3(3, 64, stride=2, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.conv2 = _conv3(64, 128, stride=2, bias=False)
        self.bn2 = nn.BatchNorm2d(128)
        self.stages = nn.ModuleList(
            nn.Sequential(*(Bottleneck(width if stage or index else 128, width) for index in range(count)))
            for stage, count in enumerate(blocks)
        )
        self.output = nn.Conv2d(width, outputs, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Map an image (B, 3, H, W), normalised RGB or xyz in metres, to (B, outputs, H / 4, W / 4).

        Raises:
            ShapeError: another shape.
        """
        check_shapes(image=(image, "B 3 H W"))
        x = F.relu(self.bn1(self.conv1(image)), inplace=True)
        x = F.relu(self.bn2(self.conv2(x)), inplace=True)
        for stage in self.stages:
            x = stage(x)
        return self.output(x)


# -- losses ------------------------------------------------------------------------------------------------------------


def hallucination_loss(
    predicted: Tensor, target: Tensor, kind: HallucinationLoss = "l2", *, channels: int = -1
) -> Tensor:
    """Distance per position, summed over positions, divided by the number of parts; a scalar.

    ``l2``, CMDIAD's: Euclidean length of the difference, not squared. ``cosine``: 1 - cos. ``smooth_l1``: Huber's with
    threshold 1, summed over channels. Background positions count as all others do.

    Args:
        predicted: Batch first: patches (B, P, C) or, with ``channels=1``, maps and images (B, C, h, w).
        target: The same shape; what the missing modality really gave.
        kind: Distance.
        channels: Dimension of the channels.

    Raises:
        ShapeError: the shapes differ.
        ConfigError: unknown `kind`.
    """
    if predicted.shape != target.shape:
        raise ShapeError(f"`predicted` has shape {tuple(predicted.shape)}, `target` {tuple(target.shape)}")
    if kind == "l2":
        distance = torch.linalg.vector_norm(predicted - target, dim=channels)
    elif kind == "cosine":
        distance = 1 - F.cosine_similarity(predicted, target, dim=channels)
    elif kind == "smooth_l1":
        distance = F.smooth_l1_loss(predicted, target, reduction="none")
    else:
        raise ConfigError(f"`kind` of the hallucination loss must be 'l2', 'cosine' or 'smooth_l1', got '{kind}'")
    return distance.sum() / len(predicted)


def _conv3(inputs: int, outputs: int, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=bias)


def _enlarge(x: Tensor, factor: int) -> Tensor:
    """Bicubic, (B, C, h, w) to (B, C, h * factor, w * factor), as two products: their gradient is the same every time.

    On a GPU that of `interpolate` is summed in no fixed order.
    """
    return _bicubic(x.shape[2], factor, x) @ x @ _bicubic(x.shape[3], factor, x).T


def _bicubic(cells: int, factor: int, like: Tensor) -> Tensor:
    """The matrix (cells * factor, cells) that enlarges one axis."""
    unit = torch.eye(cells, dtype=like.dtype, device=like.device)[None, None]
    return F.interpolate(unit, scale_factor=(float(factor), 1.0), mode="bicubic", align_corners=False)[0, 0]
