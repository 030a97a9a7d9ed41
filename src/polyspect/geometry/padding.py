"""Clouds of different sizes in one batch: points (B, N, 3) and a mask (B, N) that is True on the rows that count.

Rows off the mask are padding: they are never chosen, never anybody's neighbour, and may hold anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import DataError
from ..samples import check_shapes


class PackedPoints(NamedTuple):
    """The measured points of a batch of organised clouds, in row-major pixel order.

    Attributes:
        points: (B, N, 3), N the largest cloud; 0 on padding.
        pixels: (B, N) int64, flat pixel index ``row * W + column``; 0 on padding.
        valid: (B, N) bool, False on padding.
    """

    points: Tensor
    pixels: Tensor
    valid: Tensor


def pack_points(xyz: Tensor, valid: Tensor) -> PackedPoints:
    """Take the valid pixels out of organised clouds.

    Args:
        xyz: (B, 3, H, W) points.
        valid: (B, H, W) bool, True where measured.
    """
    check_shapes(xyz=(xyz, "B 3 H W"), valid=(valid, "B H W"))
    measured = valid.flatten(1)  # B H*W
    counts = measured.sum(1)
    N = int(counts.max()) if len(counts) else 0
    mask = torch.arange(N, device=xyz.device) < counts[:, None]  # B N
    pixels = (~measured).to(torch.uint8).argsort(dim=1, stable=True)[:, :N]  # the measured ones first, in order
    points = xyz.flatten(2).mT.gather(1, pixels[..., None].expand(-1, -1, 3))  # B N 3
    return PackedPoints(torch.where(mask[..., None], points, 0), torch.where(mask, pixels, 0), mask)


def pad_clouds(clouds: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Stack clouds (N_i, 3) into points (B, N, 3), padded with 0, and their mask (B, N)."""
    points = torch.nn.utils.rnn.pad_sequence(list(clouds), batch_first=True)
    counts = torch.tensor([len(cloud) for cloud in clouds], device=points.device)
    return points, torch.arange(points.shape[1], device=points.device) < counts[:, None]


def valid_rows(points: Tensor, valid: Tensor | None, name: str) -> Tensor:
    """The mask (B, N) of points (B, N, 3): `valid`, or all True for None, after a check of the points.

    Raises:
        ShapeError: the mask does not fit the points.
        DataError: the points are neither float32 nor float64, or a valid point is not finite; names cloud and row.
    """
    sizes = check_shapes(**{name: (points, "B N 3")})
    if points.dtype not in (torch.float32, torch.float64):
        raise DataError(f"`{name}` holds {points.dtype}; points are float32 or float64 numbers: convert them first")
    if valid is None:
        valid = torch.ones(sizes["B"], sizes["N"], dtype=torch.bool, device=points.device)
    check_shapes(**{name: (points, "B N 3"), f"the mask of {name}": (valid, "B N")})
    bad = valid & ~points.isfinite().all(-1)
    if bad.any():
        cloud, row = bad.nonzero()[0].tolist()
        raise DataError(
            f"`{name}`: row {row} of cloud {cloud} is {points[cloud, row].tolist()} but the mask calls it valid; "
            "mark unmeasured points as not valid"
        )
    return valid
