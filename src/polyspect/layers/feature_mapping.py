"""Crossmodal feature mapping: small MLPs that predict one modality's features from the other's, pixel by pixel.

Costanzino et al., "Multimodal Industrial Anomaly Detection by Crossmodal Feature Mapping" (CFM, CVPR 2024). With f the
observed and g the mapped feature of a pixel p, and V the pixels with a point:

    g = W3 gelu(W2 gelu(W1 f + b1) + b2) + b3                   hidden width (C_in + C_out) / 2
    loss = 1 - mean over p in V of cos(g(p), target(p))         all pixels of the batch alike
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError, DataError, ShapeError

_EPS = 1e-6  # smallest norm in the loss's cosine


class FeatureMapping(nn.Module):
    """Map features of one modality to those of the other.

    The released weights: 768 -> 1152 (2,767,872 parameters) and 1152 -> 768 (2,767,488); with five hidden layers, the
    "big" variant that the authors used for Eyecandies, 6,458,112 and 6,457,728. Backbones cut to 8 or 4 blocks keep
    these widths; with any other number of blocks the points have 384 channels.

    Args:
        inputs: Channels of the observed modality.
        outputs: Channels of the predicted modality.
        hidden_layers: Layers from hidden to hidden width: 1, or 5 in the big variant.

    Raises:
        ConfigError: `hidden_layers` is negative.
    """

    def __init__(self, inputs: int, outputs: int, hidden_layers: int = 1) -> None:
        super().__init__()
        if hidden_layers < 0:
            raise ConfigError(f"`hidden_layers` must be 0 or more, got {hidden_layers}")
        width = (inputs + outputs) // 2
        self.input = nn.Linear(inputs, width)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(hidden_layers))
        self.output = nn.Linear(width, outputs)

    def forward(self, features: Tensor) -> Tensor:
        """Map (..., inputs) to (..., outputs).

        Raises:
            ShapeError: another number of channels.
        """
        return self.finish(self.lift(features))

    def lift(self, features: Tensor) -> Tensor:
        """W1 f: (..., inputs) to (..., hidden width).

        Linear, so it commutes with interpolation: lift the few tokens or groups, interpolate to pixels, then `finish`.

        Raises:
            ShapeError: another number of channels.
        """
        if features.shape[-1] != self.input.in_features:
            raise ShapeError(
                f"`features` has shape {tuple(features.shape)}, expected {self.input.in_features} channels in the end"
            )
        return F.linear(features, self.input.weight)

    def finish(self, lifted: Tensor) -> Tensor:
        """All that follows W1: (..., hidden width) to (..., outputs)."""
        x = F.gelu(lifted + self.input.bias)
        for layer in self.hidden:
            x = F.gelu(layer(x))
        return self.output(x)


def mapping_loss(mapped: Tensor, target: Tensor, valid: Tensor | None = None) -> Tensor:
    """1 - mean cosine over the valid pixels of the batch: 0 where all directions agree, 2 where all are opposite.

    Args:
        mapped: (..., C) predictions.
        target: (..., C) observed features.
        valid: (...) bool, pixels that count; None counts all. What the others hold does not matter, NaN included.

    Raises:
        ShapeError: the shapes do not fit each other.
        DataError: no pixel counts.
    """
    if mapped.shape != target.shape or (valid is not None and valid.shape != mapped.shape[:-1]):
        mask = "" if valid is None else f" and `valid` {tuple(valid.shape)}"
        raise ShapeError(f"`mapped` {tuple(mapped.shape)}, `target` {tuple(target.shape)}{mask} do not fit each other")
    if valid is not None:
        mapped, target = mapped[valid], target[valid]
    if mapped.numel() == 0:
        raise DataError("no pixel of this batch is valid: crossmodal mapping has nothing to learn from")
    return 1 - torch.cosine_similarity(mapped.float(), target.float(), dim=-1, eps=_EPS).mean()
