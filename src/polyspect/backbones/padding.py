"""TensorFlow's "same" padding, fixed for one size of the image.

A convolution of stride s that gives ceil(n / s) cells pads ``(ceil(n / s) - 1) s + k - n`` pixels in all, the odd one
at the bottom and right. So its padding depends on n: at stride 2 a kernel of 3 pads (0, 1) if n is even and (1, 1) if
odd. timm works it out for each image. The package behind AST's features fixes it when the network is built, for the
size that the network was trained at, so that an image of another size gets other features.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError

Pair = tuple[int, int]


class FixedPadding(nn.Conv2d):
    """A convolution that takes over another's tensors, with zeros around its input: left, right, top, bottom."""

    def __init__(self, conv: nn.Conv2d, around: tuple[int, int, int, int]) -> None:
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            cast(Pair, conv.kernel_size),
            cast(Pair, conv.stride),
            dilation=cast(Pair, conv.dilation),
            groups=conv.groups,
            bias=conv.bias is not None,
            device="meta",
        )
        self.weight, self.bias, self.around = conv.weight, conv.bias, around

    def forward(self, input: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H', W')."""
        return super().forward(F.pad(input, self.around))


def fix_same_padding(network: nn.Module, size: int) -> None:
    """Replace every convolution with "same" padding by one that pads as for images of `size` x `size` pixels.

    Raises:
        ConfigError: `size` is below 1, or the network has no such convolution.
    """
    if size < 1:
        raise ConfigError(f"the side of the image that a padding is fixed for must be at least 1 pixel, got {size}")
    convs: dict[str, Any] = {name: m for name, m in network.named_modules() if type(m).__name__ == "Conv2dSame"}
    if not convs:
        raise ConfigError(
            'this backbone has no convolution with TensorFlow\'s "same" padding that could be fixed: choose one of '
            "timm's networks that do (tf_efficientnet_...), or leave the padding as it is"
        )
    sides: dict[str, tuple[int, ...]] = {}
    hooks = [
        conv.register_forward_pre_hook(lambda _, x, name=name: sides.update({name: tuple(x[0].shape[-2:])}))
        for name, conv in convs.items()
    ]
    with torch.no_grad():
        network.eval()(torch.zeros(1, 3, size, size, device=next(network.parameters()).device))
    for hook in hooks:
        hook.remove()
    for name, conv in convs.items():
        height, width = (
            max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
            for n, s, k, d in zip(sides[name], conv.stride, conv.kernel_size, conv.dilation)
        )
        around = (width // 2, width - width // 2, height // 2, height - height // 2)
        owner, _, leaf = name.rpartition(".")
        setattr(network.get_submodule(owner), leaf, FixedPadding(conv, around))
