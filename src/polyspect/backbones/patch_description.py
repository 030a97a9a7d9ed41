"""Patch description network, PDN: features of 33x33 pixels each, by four or six convolutions.

Batzner, Heckler and König, "EfficientAD: Accurate visual anomaly detection at millisecond-level latencies" (WACV 2024).
A frozen PDN that was distilled from an ImageNet network is the teacher of EfficientAD and of MDSS, another one of the
same shape MDSS's student.

Between input and output lie only convolutions, ReLU and two 2x2 means, so that a feature depends on nothing outside
its window. Without padding, feature (i, j) sees rows 4i .. 4i+32 and columns 4j .. 4j+32 and is centred on pixel
(4i+16, 4j+16). With padding the grid grows by four cells at every side: feature (i, j) sees 4i-16 .. 4i+16 and is
centred on pixel (4i, 4j). Where sides are multiples of 4, the padded grid without its outer four cells is the unpadded
one.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError, ShapeError
from ..samples import check_shapes

Size = Literal["small", "medium"]

STRIDE = 4  # pixels per cell
RECEPTIVE_FIELD = 33  # pixels per side
MARGIN = 4  # cells per side that padding adds

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
# (kernel, padding) per convolution; a mean over 2x2 follows each of the first two
_PLANS = {
    "small": ((4, 3), (4, 3), (3, 1), (4, 0)),
    "medium": ((4, 3), (4, 3), (1, 0), (3, 1), (4, 0), (1, 0)),
}


class PatchDescription(nn.Module):
    """PDN; 2,694,144 parameters (small) or 8,026,624 (medium) with 384 outputs.

    Images are normalised inside, by ImageNet's mean and deviation. Zeros of the padding are zeros after that.

    Args:
        size: Four convolutions of 128, 256, 256 channels before the outputs, or six, twice as wide.
        outputs: Channels of the features: 384; 768 for the student of EfficientAD.
        padding: Pad convolutions and means, so that H rows, a multiple of 4, give H / 4 of features; else H / 4 - 8.

    Raises:
        ConfigError: unknown `size`.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, size: Size = "small", outputs: int = 384, *, padding: bool = False) -> None:
        super().__init__()
        if size not in _PLANS:
            raise ConfigError(f"`size` of the patch description network must be 'small' or 'medium', got '{size}'")
        widths = (3, 128, 256, 256, outputs) if size == "small" else (3, 256, 512, 512, 512, outputs, outputs)
        self.size, self.outputs, self.padding = size, outputs, padding
        self.convolutions = nn.ModuleList(
            nn.Conv2d(a, b, kernel, padding=pad if padding else 0)
            for (a, b), (kernel, pad) in zip(pairwise(widths), _PLANS[size], strict=True)
        )
        self.register_buffer("mean", torch.tensor(_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(_STD).view(3, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """Map images (B, 3, H, W) in 0..1 to features (B, outputs, h, w), any sign.

        Raises:
            ShapeError: another shape, or, without padding, fewer than 33 pixels on a side.
        """
        check_shapes(image=(image, "B 3 H W"))
        if not self.padding and min(image.shape[-2:]) < RECEPTIVE_FIELD:
            raise ShapeError(
                f"`image` has {tuple(image.shape[-2:])} pixels; the patch description network without padding needs at "
                f"least {RECEPTIVE_FIELD} on each side"
            )
        x = (image - self.mean) / self.std
        for index, convolution in enumerate(self.convolutions):
            x = convolution(x)
            if index < len(self.convolutions) - 1:
                x = F.relu(x, inplace=True)
            if index < 2:
                x = F.avg_pool2d(x, 2, 2, padding=1 if self.padding else 0)
        return x
