"""Bring one map's values to the range of another's, so that the greater of the two means something.

Shape-Guided (ICML 2023) and MDSS (PRCV 2024): the RGB map's mean and three standard deviations to either side go to
those of the 3D map, w = sd_3d / sd_rgb, b = mean_3d - w mean_rgb, statistics over values that are not zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import CalibrationError


def matching_line(source: Tensor, target: Tensor, *, zeros: bool = False) -> Tensor:
    """``[w, b]`` with which ``w * source + b`` has mean and population deviation of `target`.

    Args:
        source: Values of any shape, of normal parts.
        target: The same, any other shape.
        zeros: Whether zeros, where there is no part, count. They would make the statistics measure its size.

    Returns:
        (2,) float64.

    Raises:
        CalibrationError: fewer than two values that count, or all of `source` equal.
    """
    moments = []
    for name, values in (("source", source), ("target", target)):
        values = (values.flatten() if zeros else values[values != 0]).double()
        if values.numel() < 2:
            raise CalibrationError(
                f"alignment of maps: `{name}` has {values.numel()} values that count, at least 2 are needed; give "
                f"maps of normal parts on which something was measured"
            )
        moments.append((values.mean(), values.std(correction=0)))
    (mean, std), (wanted, spread) = moments
    if not std > 0:
        raise CalibrationError("alignment of maps: all values of `source` are equal, so no line brings them to a range")
    weight = spread / std
    return torch.stack([weight, wanted - weight * mean])


def align(maps: Tensor, line: Tensor, *, background: bool = False) -> Tensor:
    """Maps of any shape on the other scale: ``w * maps + b``, not below 0.

    Args:
        background: Lift zeros, where there is no part, to b as the program of Shape-Guided does; else they stay 0.
    """
    weight, offset = line.to(maps)
    aligned = (weight * maps + offset).clamp(min=0)
    return aligned if background else torch.where(maps != 0, aligned, 0)
