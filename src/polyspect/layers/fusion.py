"""Fusion of feature maps of several modalities into one distillation target, without learning.

"Rethinking Reverse Distillation for Multi-Modal Anomaly Detection" (MMRD), for the main modality R and an auxiliary A:

    alpha(X) = sigmoid( (X - mu)^2 / (sigma^2 + 1e-4) )      mu, sigma^2 over the positions of a part and channel   (2)
    F^T = F^R + alpha(F^R + F^A) * F^A                                                                              (3)

The argument of the sigmoid is never negative, so alpha lies in [0.5, 1): it tells positions that stand out. Table 2e
compares Eq. 3 with the other rules of `Rule`. Every rule adds something to F^R, so the target is a sum with one
summand per modality; `fuse` returns the summands, because anomaly maps can be split along them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Rule = Literal["alpha_sum", "alpha_aux", "add", "csa", "ssa", "sem", "rgb_only"]
RULES: tuple[Rule, ...] = ("alpha_sum", "alpha_aux", "add", "csa", "ssa", "sem", "rgb_only")

_EPS = 1e-4  # of Eq. 2


def modulation(x: Tensor) -> Tensor:
    """alpha of Eq. 2 for maps (B, C, h, w): the same shape, in [0.5, 1); 0.5 where a channel is constant."""
    deviation = (x - x.mean((2, 3), keepdim=True)).square()
    return torch.sigmoid(deviation / (deviation.mean((2, 3), keepdim=True) + _EPS))


def fuse(
    main: Tensor, others: Sequence[Tensor], rule: Rule, *, jointly: bool = True, gate: nn.Module | None = None
) -> list[Tensor]:
    """What each modality adds to the target: [F^R, G^A1, G^A2, ...], each (B, C, h, w); the target is their sum.

    Args:
        main: F^R.
        others: F^A of every auxiliary modality; several for "add", "alpha_*" and "rgb_only" only.
        rule: ``alpha_sum`` is Eq. 3, ``alpha_aux`` takes alpha from F^A, ``add`` is alpha = 1, ``csa`` and ``ssa`` are
            attention over channels and positions, ``sem`` gates channels by a trainable `gate`, ``rgb_only`` adds 0.
        jointly: With several auxiliaries, alpha from the sum of all maps; otherwise one alpha for each.
        gate: For ``sem``: from maps (B, C, h, w) to weights (B, C, 1, 1).
    """
    if not others:
        return [main]
    if rule == "rgb_only":
        return [main, *(torch.zeros_like(other) for other in others)]
    if rule == "add":
        return [main, *others]
    if rule in ("alpha_sum", "alpha_aux"):
        start = main if rule == "alpha_sum" else torch.zeros_like(main)
        if jointly:
            alpha = modulation(start + sum(others))  # Eq. 2
            return [main, *(alpha * other for other in others)]  # Eq. 3
        return [main, *(modulation(start + other) * other for other in others)]
    (other,) = others
    if rule == "sem":
        assert gate is not None
        return [main, gate(main + other) * other]
    return [main, _channel_attention(main, other) if rule == "csa" else _position_attention(main, other)]


class SqueezeExcitation(nn.Module):
    """Channel weights (B, C, 1, 1) in 0..1 from the mean of each channel: C -> C / ratio -> C, without biases.

    Hu et al., "Squeeze-and-Excitation Networks", Eqs. 2-3; the narrow layer has at least 4 units.
    """

    def __init__(self, channels: int, ratio: int = 16) -> None:
        super().__init__()
        narrow = max(4, channels // ratio)
        self.down = nn.Linear(channels, narrow, bias=False)
        self.up = nn.Linear(narrow, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Weights (B, C, 1, 1) of maps (B, C, h, w)."""
        return torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3))))))[:, :, None, None]


def _channel_attention(main: Tensor, other: Tensor) -> Tensor:
    """softmax(F^R F^A^T / sqrt(hw)) F^A with C x hw matrices: every channel of R asks those of A."""
    query, key = main.flatten(2), other.flatten(2)  # B C hw
    return F.scaled_dot_product_attention(query, key, key).view_as(main)


def _position_attention(main: Tensor, other: Tensor) -> Tensor:
    """Every position of R asks those of A: softmax(F^R^T F^A / sqrt(C)), hw x hw, never held whole on fast kernels."""
    query, key = main.flatten(2).transpose(1, 2), other.flatten(2).transpose(1, 2)  # B hw C
    return F.scaled_dot_product_attention(query, key, key).transpose(1, 2).reshape(main.shape)
