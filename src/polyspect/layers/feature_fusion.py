"""Unsupervised feature fusion (UFF): one fused vector per patch from point and RGB features.

Wang et al., "Multimodal Industrial Anomaly Detection via Hybrid Fusion" (M3DM, CVPR 2023), Sec. 3.3. For patch i:

    u_i = MLP_xyz(LN(x_i)),  v_i = MLP_rgb(LN(r_i)),  fused_i = [u_i, v_i]                       (Eq. 3)
    q_i = H_rgb v_i,  k_i = H_xyz u_i,  both scaled to length 1
    loss = 2T mean_i [ log sum_j exp(q_i . k_j / T) - q_i . k_i / T ],  T = 1                    (Eq. 2)

The loss asks that the two halves of a patch find each other among all patches of the batch. Eq. 2 as printed lacks the
exponential and the logarithm; Eq. 3 as printed has RGB first. Both follow the released program here, points first.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..errors import ConfigError, DataError
from ..samples import check_shapes

_ROWS = 4096  # rows of the similarity matrix handled at a time


class FeatureFusion(nn.Module):
    """Fuse patch features of points and RGB; 15,840,896 parameters by default, 492,032 of them heads for training.

    Args:
        xyz_channels: Channels of a point patch.
        rgb_channels: Channels of an RGB patch.
        expansion: Hidden width of each MLP over its channels.
        embedding: Channels of q and k.
    """

    def __init__(
        self, xyz_channels: int = 1152, rgb_channels: int = 768, *, expansion: int = 4, embedding: int = 256
    ) -> None:
        super().__init__()
        self.xyz = _Half(xyz_channels, expansion, embedding)
        self.rgb = _Half(rgb_channels, expansion, embedding)
        self.channels = xyz_channels + rgb_channels

    def forward(self, xyz: Tensor, rgb: Tensor) -> Tensor:
        """Fused patches (B, P, C_xyz + C_rgb), points first, of xyz (B, P, C_xyz) and rgb (B, P, C_rgb).

        Raises:
            ShapeError: the patches do not belong together, or have another width.
        """
        self._check(xyz, rgb)
        return torch.cat([self.xyz(xyz), self.rgb(rgb)], dim=-1)  # Eq. 3

    def loss(self, xyz: Tensor, rgb: Tensor, measured: Tensor | None = None, *, temperature: float = 1.0) -> Tensor:
        """Eq. 2 over the measured patches of the batch, a scalar.

        Args:
            xyz: (B, P, C_xyz).
            rgb: (B, P, C_rgb).
            measured: (B, P) bool, patches that count; None takes those whose point features are all nonzero, as the
                released program does.
            temperature: T.

        Raises:
            DataError: no patch counts.
            ConfigError: `temperature` is not positive.
            ShapeError: as `forward`.
        """
        self._check(xyz, rgb)
        if measured is None:
            measured = (xyz != 0).all(-1)
        check_shapes(xyz=(xyz, "B P C"), measured=(measured, "B P"))
        if not bool(measured.any()):
            raise DataError("no patch of this batch has points: feature fusion has nothing to learn from")
        u, v = self.xyz(xyz[measured]), self.rgb(rgb[measured])  # N C_xyz, N C_rgb
        return patch_contrast(self.rgb.head(v), self.xyz.head(u), temperature)

    def _check(self, xyz: Tensor, rgb: Tensor) -> None:
        widths = self.xyz.norm.normalized_shape[0], self.rgb.norm.normalized_shape[0]
        check_shapes(xyz=(xyz, f"B P {widths[0]}"), rgb=(rgb, f"B P {widths[1]}"))


class _Half(nn.Module):
    """LayerNorm and MLP of one modality, and the head that only its loss needs."""

    def __init__(self, channels: int, expansion: int, embedding: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(
            nn.Linear(channels, expansion * channels), nn.GELU(), nn.Linear(expansion * channels, channels)
        )
        self.head = nn.Linear(channels, embedding)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.norm(x))


def patch_contrast(q: Tensor, k: Tensor, temperature: float = 1.0) -> Tensor:
    """M3DM's patch-wise contrastive loss (Eq. 2) of q (N, D) with k (N, D), row by row a pair; a scalar.

    One direction only: q looks for its k. Lengths do not count. With T = 1 it lies between
    ``2 log(1 + (N - 1) / e^2)`` and ``2 log(1 + (N - 1) e^2)``. No more than 4096 rows of the N x N similarities are
    held at a time; where there are more, gradients compute them a second time.

    Raises:
        ConfigError: `temperature` is not positive.
        ShapeError: q and k differ in shape.
    """
    check_shapes(q=(q, "N D"), k=(k, "N D"))
    if not temperature > 0:
        raise ConfigError(f"`temperature` must be positive, got {temperature}")
    q, k = F.normalize(q.float(), dim=1), F.normalize(k.float(), dim=1)
    if len(q) <= _ROWS:
        others = _log_sum(q, k, temperature)
    else:
        rows = [checkpoint(_log_sum, part, k, temperature, use_reentrant=False) for part in q.split(_ROWS)]
        others = torch.cat(rows)
    own = (q * k).sum(1) / temperature
    return 2 * temperature * (others - own).mean()


def _log_sum(q: Tensor, k: Tensor, temperature: float) -> Tensor:
    return (q @ k.T / temperature).logsumexp(1)
