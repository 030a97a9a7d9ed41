"""Projections that predict one modality's features from another's (Crossmodal Reverse Distillation, Sec. 4.2).

* `FilterProjection` squeezes each map spatially and restores it, so that defects of the source modality are lost.
* `AmplifierProjection` widens the channels and narrows them again, so that defects of the source come through.

Both learn the mapping on normal parts only and keep the shape of every map. With ``nonneg=False`` they end without
ReLU, for backbones whose features can be negative.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from .bottleneck import conv_unit

STRIDES = (4, 8, 16)


class FilterProjection(nn.Module):
    """Bottleneck projection: down to `stride` by 2x2 convolutions that double the channels, and back.

    Channels stop doubling at stride 32. A map that is already at `stride`, or every map with ``stride=None``, passes a
    3x3 and a 1x1 convolution of its own width instead.
    """

    def __init__(self, channels: Sequence[int], stride: int | None = 32, *, nonneg: bool = True) -> None:
        super().__init__()
        self.scales = nn.ModuleList(
            _hourglass(width, own, stride, nonneg) if stride is not None and stride > own else _plain(width, nonneg)
            for width, own in zip(channels, STRIDES, strict=True)
        )

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Map three features, shallow first, each (B, C_i, h_i, w_i), to predictions of the same shapes."""
        return [scale(x) for scale, x in zip(self.scales, features, strict=True)]


class AmplifierProjection(nn.Module):
    """Inverted bottleneck projection: 3x3 C -> C, 1x1 C -> expansion C, 1x1 back to C.

    ``expansion=None`` leaves the widening out: a 3x3 and a 1x1 convolution of the map's own width.
    """

    def __init__(self, channels: Sequence[int], expansion: int | None = 2, *, nonneg: bool = True) -> None:
        super().__init__()
        self.scales = nn.ModuleList(
            _plain(width, nonneg) if expansion is None else _inverted(width, expansion, nonneg) for width in channels
        )

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Map three features, shallow first, each (B, C_i, h_i, w_i), to predictions of the same shapes."""
        return [scale(x) for scale, x in zip(self.scales, features, strict=True)]


def _hourglass(width: int, own_stride: int, stride: int, nonneg: bool) -> nn.Sequential:
    widths = [width]
    while own_stride < stride:
        own_stride *= 2
        widths.append(widths[-1] * 2 if own_stride <= 32 else widths[-1])
    parts: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        parts += [nn.Conv2d(inputs, outputs, 2, stride=2, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
    for inputs, outputs in pairwise(widths[::-1]):
        deconvolution = nn.ConvTranspose2d(inputs, outputs, 2, stride=2, bias=False)
        parts += [deconvolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*(parts if nonneg else parts[:-1]))


def _inverted(width: int, expansion: int, nonneg: bool) -> nn.Sequential:
    wide = expansion * width
    return nn.Sequential(
        *conv_unit(width, width, 3), *conv_unit(width, wide, 1), *conv_unit(wide, width, 1, relu=nonneg)
    )


def _plain(width: int, nonneg: bool) -> nn.Sequential:
    return nn.Sequential(*conv_unit(width, width, 3), *conv_unit(width, width, 1, relu=nonneg))
