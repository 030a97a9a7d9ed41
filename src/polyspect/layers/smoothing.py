"""Smoothing of anomaly maps as memory-bank methods do it: a Gaussian, or the 8-bit blur of published code."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .maps import gaussian_smooth

Blur = Literal["gaussian", "pil", "none"]


def smooth(maps: Tensor, blur: Blur, sigma: float) -> Tensor:
    """Smooth distance maps (B, H, W), nonnegative, by `blur` of `sigma` pixels; ``"none"`` returns them as they are."""
    if blur == "pil":
        return pil_blur(maps, sigma)
    return gaussian_smooth(maps, sigma) if blur == "gaussian" else maps


def pil_blur(maps: Tensor, radius: float) -> Tensor:
    """The blur of BTF, M3DM and their descendants: in 8 bits, the map's maximum being 255.

    Values are rounded down. Pillow's blur is three box blurs in integers, so the result has at most 256 values and many
    ties; use it to repeat published figures only. A map without a positive value is returned as it is.

    Args:
        maps: (B, H, W), nonnegative.
        radius: In pixels.
    """
    from PIL import Image, ImageFilter

    smoothed = []
    for image in maps.float().cpu():
        top = image.amax()
        if not top > 0:
            smoothed.append(image)
            continue
        levels = Image.fromarray((image / top).mul(255).byte().numpy())
        blurred = np.asarray(levels.filter(ImageFilter.GaussianBlur(radius)), dtype=np.float32)
        smoothed.append(torch.from_numpy(blurred) / 255 * top)
    return torch.stack(smoothed).to(maps)
