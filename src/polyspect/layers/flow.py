"""Asymmetric student and teacher: a normalising flow, and a convolutional network that imitates it.

Rudolph et al., "Asymmetric Student-Teacher Networks for Industrial Anomaly Detection" (AST, WACV 2023), with numbers of
the released program where the paper differs (hidden channels, clamp, slope). Features x (B, n, h, w), per cell a
condition e (C', h, w) from its position:

    x <- x[permutation]; halves x1, x2                                            per block `Coupling`
    y1 = x1 exp(c(s2)) + t2,    (s2, t2) = r2(x2, e)
    y2 = x2 exp(c(s1)) + t1,    (s1, t1) = r1(y1, e),    c(s) = 0.636 a atan(s / a)
    log|det dz/dx| per cell: sum over channels and blocks of c(s1) and c(s2)

    teacher loss   0.5 sum_c m z^2 - m log|det|     per cell, m the cell's share of the part    `likelihood_loss`
    student loss   m mean_c (z_teacher - z_student)^2                                           `imitation_loss`

A fresh flow permutes channels and does nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError
from ..samples import check_shapes

_ATAN = 0.636  # 2 / pi, as released: brings atan to -1 .. 1
_LIMIT = 1e6  # of what a coupling gives, against overflow


# -- where and in which order ------------------------------------------------------------------------------------------


def positional_encoding(channels: int, height: int, width: int) -> Tensor:
    """Sines and cosines of a cell's position, (channels, height, width).

    The first half of the channels tells the column, the second the row; pairs sin, cos of ``pos * 10000^(-2i/half)``.

    Raises:
        ConfigError: `channels` is no multiple of 4.
    """
    if channels < 4 or channels % 4:
        raise ConfigError(f"the channels of a positional encoding must be a multiple of 4, got {channels}")
    half = channels // 2
    rate = 10000.0 ** (-torch.arange(0, half, 2, dtype=torch.float64) / half)
    encodings = []
    for length in (width, height):
        angle = rate[:, None] * torch.arange(length, dtype=torch.float64)  # half/2 length
        encodings.append(torch.stack([angle.sin(), angle.cos()], dim=1).flatten(0, 1))
    column, row = encodings
    both = [column[:, None].expand(half, height, width), row[:, :, None].expand(half, height, width)]
    return torch.cat(both).float()


def channel_permutation(seed: int, channels: int) -> Tensor:
    """The order in which the released program shuffles channels, (channels,) int64: numpy's legacy generator.

    Checkpoints do not hold it, so that it must be the same for ever; that of ``RandomState`` is frozen.
    """
    return torch.from_numpy(np.random.RandomState(seed).permutation(channels).astype(np.int64))


# -- the flow ----------------------------------------------------------------------------------------------------------


class CouplingNet(nn.Module):
    """Convolution, ReLU, convolution, times a factor that starts at 0; borders are repeated."""

    def __init__(self, inputs: int, outputs: int, hidden: int, kernel: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, hidden, kernel, padding=kernel // 2, padding_mode="replicate")
        self.conv2 = nn.Conv2d(hidden, outputs, kernel, padding=kernel // 2, padding_mode="replicate")
        self.gain = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inputs, h, w) to (B, outputs, h, w)."""
        return self.conv2(F.relu(self.conv1(x))) * self.gain


class Coupling(nn.Module):
    """Affine coupling of two halves of the channels, each scaled and shifted by a function of the other.

    Args:
        channels: Of x; the first ``channels // 2`` are half 1.
        condition: Channels that both nets see beside their half.
        hidden: Channels inside the nets: 64 as released, 1024 in the paper's 2D runs.
        kernel: Side of the convolutions, odd.
        clamp: Bound a of the logarithm of a scale, reached within a thousandth: 1.9 as released, 3 in the paper's
            2D runs.
    """

    def __init__(self, channels: int, condition: int, hidden: int, kernel: int, clamp: float) -> None:
        super().__init__()
        self.halves = channels // 2, channels - channels // 2
        one, two = self.halves
        self.of_first = CouplingNet(one + condition, 2 * two, hidden, kernel)
        self.of_second = CouplingNet(two + condition, 2 * one, hidden, kernel)
        self.clamp = clamp

    def forward(self, x: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Map x (B, channels, h, w), with a condition (B, c, h, w), to y of its shape and log|det dy/dx| (B, h, w)."""
        x1, x2 = x.split(self.halves, dim=1)
        scale2, shift2 = self._affine(self.of_second, x2, condition)
        y1 = (x1 * scale2.exp() + shift2).clamp(-_LIMIT, _LIMIT)
        scale1, shift1 = self._affine(self.of_first, y1, condition)
        y2 = (x2 * scale1.exp() + shift1).clamp(-_LIMIT, _LIMIT)
        return torch.cat([y1, y2], dim=1), scale1.sum(1) + scale2.sum(1)

    def inverse(self, y: Tensor, condition: Tensor) -> Tensor:
        """The x that `forward` maps to y, unless that went beyond 1e6."""
        y1, y2 = y.split(self.halves, dim=1)
        scale1, shift1 = self._affine(self.of_first, y1, condition)
        x2 = (y2 - shift1) * (-scale1).exp()
        scale2, shift2 = self._affine(self.of_second, x2, condition)
        x1 = (y1 - shift2) * (-scale2).exp()
        return torch.cat([x1, x2], dim=1)

    def _affine(self, net: nn.Module, half: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Logarithm of the scale, and shift, of the other half."""
        scale, shift = net(torch.cat([half, condition], dim=1)).chunk(2, dim=1)
        return self.clamp * _ATAN * torch.atan(scale / self.clamp), shift


class Flow(nn.Module):
    """Real-NVP flow over the channels of every cell, the teacher of AST.

    3,890,568 parameters with 368 channels (RGB and depth), 3,251,080 with 304 (RGB), 853,000 with 64 (depth).
    The permutations are part of the network, not of its state dict.

    Args:
        channels: n, at least 2.
        position: Channels of the positional encoding that the nets see; 0 for none.
        hidden: Channels inside the nets.
        kernels: Side of the convolutions, odd, per block.
        clamp: See `Coupling`.

    Raises:
        ConfigError: `channels` below 2, no block, or an even kernel.
    """

    def __init__(
        self,
        channels: int,
        position: int = 32,
        hidden: int = 64,
        kernels: Sequence[int] = (3, 3, 3, 5),
        clamp: float = 1.9,
    ) -> None:
        super().__init__()
        if channels < 2:
            raise ConfigError(f"a flow needs at least 2 channels to couple, got {channels}")
        if not kernels or any(kernel < 1 or kernel % 2 == 0 for kernel in kernels):
            raise ConfigError(f"`kernels` must name an odd kernel per block, at least one, got {list(kernels)}")
        self.channels, self.position = channels, position
        self.blocks = nn.ModuleList(Coupling(channels, position, hidden, kernel, clamp) for kernel in kernels)
        for index in range(len(kernels)):
            self.register_buffer(f"order{index}", channel_permutation(index, channels), persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map features (B, channels, h, w) to z of the same shape and log|det dz/dx| per cell (B, h, w).

        Raises:
            ShapeError: another number of channels.
        """
        check_shapes(x=(x, f"B {self.channels} h w"))
        condition = _positions(x, self.position)
        total = x.new_zeros(len(x), *x.shape[-2:])
        for index, block in enumerate(self.blocks):
            x, log_det = block(x.index_select(1, self.get_buffer(f"order{index}")), condition)
            total = total + log_det
        return x, total

    def origins(self) -> Tensor:
        """The input channel that each channel of z is a scaled and shifted copy of, (channels,) int64."""
        origins = torch.arange(self.channels, device=self.get_buffer("order0").device)
        for index in range(len(self.blocks)):
            origins = origins[self.get_buffer(f"order{index}")]
        return origins

    def inverse(self, z: Tensor) -> Tensor:
        """The features that `forward` maps to z (B, channels, h, w).

        Raises:
            ShapeError: another number of channels.
        """
        check_shapes(z=(z, f"B {self.channels} h w"))
        condition = _positions(z, self.position)
        for index, block in reversed(list(enumerate(self.blocks))):
            z = cast(Coupling, block).inverse(z, condition)
            z = z.index_select(1, self.get_buffer(f"order{index}").argsort())
        return z


# -- the student -------------------------------------------------------------------------------------------------------


class ConvStudent(nn.Module):
    """Residual convolutions that learn what the flow gives on normal parts, the student of AST.

    82,601,328 parameters with 368 channels, 81,421,616 with 304, 76,997,696 with 64. (The published files hold one
    number more, which is never used.)

    Args:
        channels: n, of input and output.
        position: Channels of the positional encoding beside the input; 0 for none.
        hidden: Channels inside.
        blocks: Residual blocks of two convolutions; the input is added behind the second activation.
        slope: Of LeakyReLU below zero: 0.01 as released, 0.2 in the paper.

    Raises:
        ConfigError: `blocks` below 0.
    """

    def __init__(
        self, channels: int, position: int = 32, hidden: int = 1024, blocks: int = 4, slope: float = 0.01
    ) -> None:
        super().__init__()
        if blocks < 0:
            raise ConfigError(f"`blocks` must be at least 0, got {blocks}")
        self.channels, self.position, self.slope = channels, position, slope
        self.input = nn.Conv2d(position + channels, hidden, 3, padding=1)
        self.blocks = nn.ModuleList(_StudentBlock(hidden, slope) for _ in range(blocks))
        self.output = nn.Conv2d(hidden, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map features (B, channels, h, w) to an imitation of the flow's z, the same shape.

        Raises:
            ShapeError: another number of channels.
        """
        check_shapes(x=(x, f"B {self.channels} h w"))
        x = F.leaky_relu(self.input(torch.cat([_positions(x, self.position), x], dim=1)), self.slope)
        for block in self.blocks:
            x = block(x)
        return self.output(x)


class _StudentBlock(nn.Module):
    def __init__(self, channels: int, slope: float) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.slope = slope

    def forward(self, x: Tensor) -> Tensor:
        y = F.leaky_relu(self.norm1(self.conv1(x)), self.slope)
        return x + F.leaky_relu(self.norm2(self.conv2(y)), self.slope)


# -- losses ------------------------------------------------------------------------------------------------------------


def likelihood_loss(z: Tensor, log_det: Tensor, weight: Tensor | None = None) -> Tensor:
    """Negative log-likelihood of features under the flow, without its constant, per cell: (B, h, w).

    The released program trains on the mean over all cells, those of weight 0 included.

    Args:
        z: (B, n, h, w).
        log_det: (B, h, w).
        weight: (B, h, w) in 0..1, the cell's share of the part; None: 1.

    Raises:
        ShapeError: the shapes do not fit.
    """
    check_shapes(z=(z, "B n h w"), log_det=(log_det, "B h w"))
    return _weighted(0.5 * z.square().sum(1) - log_det, weight)


def imitation_loss(teacher: Tensor, student: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean squared difference over the channels, per cell: (B, h, w); loss of the student, and the anomaly map.

    Args:
        teacher: (B, n, h, w).
        student: The same shape.
        weight: As in `likelihood_loss`.

    Raises:
        ShapeError: the shapes do not fit.
    """
    check_shapes(teacher=(teacher, "B n h w"), student=(student, "B n h w"))
    return _weighted((teacher - student).square().mean(1), weight)


def _weighted(cells: Tensor, weight: Tensor | None) -> Tensor:
    """Cells (B, h, w) times their weight; where that is 0, 0 whatever the cell holds."""
    if weight is None:
        return cells
    check_shapes(cells=(cells, "B h w"), weight=(weight, "B h w"))
    return torch.where(weight > 0, cells, 0) * weight


def _positions(x: Tensor, channels: int) -> Tensor:
    """The positional encoding for every part of x (B, C, h, w): (B, channels, h, w)."""
    B, _, h, w = x.shape
    if not channels:
        return x.new_zeros(B, 0, h, w)
    return positional_encoding(channels, h, w).to(x).expand(B, -1, -1, -1)
