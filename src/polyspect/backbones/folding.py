"""Fold batch norm into the convolution before it: the same function with fewer passes over memory.

With frozen statistics, norm(conv(x)) = g (w * x + b - m) / s + c with s = sqrt(v + eps) is one convolution of weights
w g / s and bias (b - m) g / s + c. After folding the statistics are gone, so they cannot be adapted any more.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import ConfigError

_TOLERANCE = 1e-4  # greatest difference allowed, relative to the greatest feature of the stage


def fold_batch_norm(network: nn.Module, probe: Tensor) -> int:
    """Fold every batch norm that follows a convolution, in place; returns how many were folded.

    A norm follows a convolution when it is registered right behind it in the same module. Whether the network's
    function is indeed unchanged is checked by running it on `probe` before and after.

    Args:
        network: Feature network in eval mode that returns a list of tensors.
        probe: Images (B, 3, H, W) to compare on.

    Raises:
        ConfigError: no norm could be folded, or the features changed by more than 1e-4 of their greatest value.
    """
    with torch.inference_mode():
        before = network(probe)
    pairs = [pair for module in network.modules() for pair in _pairs(module)]
    for parent, name, convolution, norm in pairs:
        _fold(convolution, norm)
        rest = [part for part in (getattr(norm, "drop", None), getattr(norm, "act", None)) if part is not None]
        setattr(parent, name, nn.Sequential(*rest) if rest else nn.Identity())
    with torch.inference_mode():
        change = _change(before, network(probe))
    if not pairs or not change <= _TOLERANCE:
        raise ConfigError(
            f"fold_bn: {len(pairs)} batch norms of {type(network).__name__} were folded and the features changed by "
            f"{change:.1e} of their greatest value (allowed {_TOLERANCE:.0e}); use this backbone without fold_bn"
        )
    return len(pairs)


def _pairs(module: nn.Module) -> list[tuple[nn.Module, str, nn.Conv2d, _BatchNorm]]:
    """Neighbours (convolution, norm) among the direct children of a module."""
    children = list(module.named_children())
    return [
        (module, name, convolution, norm)
        for (_, convolution), (name, norm) in pairwise(children)
        if isinstance(convolution, nn.Conv2d)
        and isinstance(norm, _BatchNorm)
        and convolution.out_channels == norm.num_features
    ]


@torch.no_grad()
def _fold(convolution: nn.Conv2d, norm: _BatchNorm) -> None:
    if norm.running_mean is None or norm.running_var is None:
        raise ConfigError("fold_bn: a batch norm without running statistics cannot be folded")
    scale = torch.rsqrt(norm.running_var + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight
    bias = torch.zeros_like(norm.running_mean) if convolution.bias is None else convolution.bias
    shift = (bias - norm.running_mean) * scale
    if norm.bias is not None:
        shift = shift + norm.bias
    convolution.weight = nn.Parameter(convolution.weight * scale.view(-1, 1, 1, 1), requires_grad=False)
    convolution.bias = nn.Parameter(shift, requires_grad=False)


def _change(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Greatest difference relative to the greatest value, over all stages."""
    return max(float((b - a).abs().max() / b.abs().max().clamp(min=1e-12)) for b, a in zip(before, after))
