"""The one-class bottleneck embedding (OCBE): three feature maps fused and squeezed into one.

Reverse Distillation, Sec. 3.2: the features at strides 4 and 8 are brought to stride 16, joined with those at stride
16 and compressed by one residual stage to stride 32, so that little but the normal pattern gets through. Crossmodal
Reverse Distillation, Sec. 4.2, widens its input by the features that other modalities predict.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .blocks import BlockPlan, residual_stage


class OneClassEmbedding(nn.Module):
    """Fuse features at strides 4, 8, 16 into one embedding (B, 2 C_3, h, w) at stride 32.

    Args:
        channels: C_1, C_2, C_3 of one modality's features.
        plan: The kind and number of residual blocks.
        sources: How many feature sets of these widths are stacked along the channels: 1 is plain Reverse Distillation,
            whose path at stride 16 is the identity; each further one comes from another modality.
        fuse: False leaves the multi-scale fusion out: only the features at stride 16 are embedded.
        compress: False replaces the residual stage by a 2x2 mean and a 1x1 convolution to the same width.
    """

    def __init__(
        self,
        channels: Sequence[int],
        plan: BlockPlan,
        sources: int = 1,
        *,
        fuse: bool = True,
        compress: bool = True,
    ) -> None:
        super().__init__()
        c1, c2, c3 = (sources * width for width in channels)
        out = channels[-1]
        deep: nn.Module = nn.Identity() if sources == 1 else conv_unit(c3, out, 3)
        wide = nn.Sequential(*conv_unit(c1, c2, 3, stride=2), *conv_unit(c2, out, 3, stride=2)) if fuse else None
        middle = conv_unit(c2, out, 3, stride=2) if fuse else None
        self.paths = nn.ModuleList([path for path in (wide, middle, deep) if path is not None])
        joined = len(self.paths) * out
        self.stage: nn.Module = (
            residual_stage(plan, joined, 2 * out, plan.embedding_blocks, "down")
            if compress
            else nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(joined, 2 * out, 1, bias=False))
        )

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Embed three maps, shallow first, each (B, sources * C_i, h_i, w_i)."""
        seen = list(features)[-len(self.paths) :]
        fused = torch.cat([path(x) for path, x in zip(self.paths, seen, strict=True)], dim=1)
        return self.stage(fused)


def conv_unit(inputs: int, outputs: int, kernel: int, *, stride: int = 1, relu: bool = True) -> nn.Sequential:
    """Convolution without bias that keeps (or divides by `stride`) the resolution, batch norm and, usually, ReLU."""
    convolution = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=(kernel - 1) // 2, bias=False)
    parts: list[nn.Module] = [convolution, nn.BatchNorm2d(outputs)]
    return nn.Sequential(*parts, nn.ReLU(inplace=True)) if relu else nn.Sequential(*parts)
