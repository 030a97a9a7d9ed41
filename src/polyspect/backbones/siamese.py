"""One frozen network for several modalities, with batch-norm statistics of its own for each.

"Rethinking Reverse Distillation for Multi-Modal Anomaly Detection" (MMRD), "Cross-Statistics Siamese Teacher": the
convolutions and the affine parameters of batch norm are shared and stay as trained; running means and variances are
re-estimated per modality on normal parts, because a depth map is no photograph. All modalities still go through the
network as one batch: each norm treats every modality's share of it by that modality's numbers,

    y = s_m x + t_m,    s_m = gamma / sqrt(var_m + eps),    t_m = beta - mean_m s_m.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from .image import ImageBackbone

log = logging.getLogger("polyspect")


class SiameseBackbone(nn.Module):
    """An `ImageBackbone` whose batch norms keep statistics per modality.

    Attributes:
        names: The modalities, in the order in which `forward` takes them.
        backbone: The network; its norms are `SplitNorm`.
    """

    def __init__(self, backbone: ImageBackbone, names: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(names)
        self.backbone = backbone
        self.channels, self.nonneg = backbone.channels, backbone.nonneg
        self.norms = _split_norms(backbone.network, len(self.names))

    def forward(self, images: Tensor) -> list[Tensor]:
        """Features of images (m*B, 3, H, W) in 0..1, all of the first modality first: as `ImageBackbone.forward`."""
        maps: list[Tensor] = self.backbone(images)
        return maps

    def forget(self, name: str) -> None:
        """Set a modality's statistics to mean 0 and variance 1, as the starting point of a cumulative average."""
        row = self.names.index(name)
        for norm in self.norms:
            norm.running_mean[row].zero_()
            norm.running_var[row].fill_(1)

    def adapt(self, name: str, images: Tensor, share: float) -> None:
        """Move a modality's statistics towards those of a batch of its images, (B, 3, H, W) in 0..1.

        Each layer sees what the layers before it make of the batch with the batch's own statistics, as in training.

        Args:
            share: Of the batch in the new statistics: 1/n in the n-th batch is the cumulative average over all.
        """
        row = self.names.index(name)
        for norm in self.norms:
            norm.adapting = (row, share)
        try:
            with torch.no_grad():
                self.backbone(images)
        finally:
            for norm in self.norms:
                norm.adapting = None

    def train(self, mode: bool = True) -> SiameseBackbone:
        """Stay in eval mode, as frozen networks do."""
        super().train(False)
        return self


class SplitNorm(nn.Module):
    """Frozen batch norm with one row of statistics per modality, and whatever activation the replaced norm carried."""

    running_mean: Tensor  # (m, C)
    running_var: Tensor  # (m, C)
    weight: Tensor
    bias: Tensor

    def __init__(self, norm: _BatchNorm, count: int) -> None:
        super().__init__()
        mean, var = norm.running_mean, norm.running_var
        assert mean is not None
        assert var is not None
        self.register_buffer("weight", torch.ones_like(mean) if norm.weight is None else norm.weight.detach().clone())
        self.register_buffer("bias", torch.zeros_like(mean) if norm.bias is None else norm.bias.detach().clone())
        self.register_buffer("running_mean", mean.repeat(count, 1))
        self.register_buffer("running_var", var.repeat(count, 1))
        self.eps = norm.eps
        self.after = nn.Sequential(*(part for name in ("drop", "act") if (part := getattr(norm, name, None))))
        self.adapting: tuple[int, float] | None = None  # row and share of the statistics being moved

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (m*B, C, h, w), modality by modality; while adapting, one modality's batch by its own numbers."""
        if self.adapting is not None:
            row, share = self.adapting
            mean, var = self.running_mean[row], self.running_var[row]
            y = F.batch_norm(x, mean, var, self.weight, self.bias, training=True, momentum=share, eps=self.eps)
            return self.after(y)
        scale = self.weight * torch.rsqrt(self.running_var + self.eps)  # m C
        shift = self.bias - self.running_mean * scale
        each = len(x) // len(scale)
        scale, shift = (part.repeat_interleave(each, 0)[:, :, None, None] for part in (scale, shift))
        return self.after(torch.addcmul(shift, x, scale))


def _split_norms(network: nn.Module, count: int) -> list[SplitNorm]:
    """Replace every batch norm of `network`, in place; returns the new ones."""
    found = [
        (parent, name, child)
        for parent in network.modules()
        for name, child in parent.named_children()
        if isinstance(child, _BatchNorm)
    ]
    if not found:
        log.warning("the backbone has no batch norm: its features cannot be adapted to a modality")
    norms = []
    for parent, name, child in found:
        norm = SplitNorm(child, count).eval()
        setattr(parent, name, norm)
        norms.append(norm)
    return norms
