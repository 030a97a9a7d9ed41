"""Residual blocks and the reverse decoder that distillation methods share.

A distillation student mirrors its teacher: blocks of the teacher's kind, run backwards, from a compressed embedding at
stride 32 up to the teacher's strides 16, 8 and 4 ("Anomaly Detection via Reverse Distillation from One-Class
Embedding", Sec. 3; Crossmodal Reverse Distillation, Sec. 4). Feature lists are always shallow first: strides 4, 8, 16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Change = Literal["same", "down", "up"]  # what a block does to height and width: keep, halve, double
Priors = Literal["none", "input", "output"]  # where a decoder takes priors in


@dataclass(frozen=True)
class BlockPlan:
    """Which residual blocks a student is built from.

    Attributes:
        kind: ``"basic"`` (two 3x3) or ``"bottleneck"`` (1x1, 3x3, 1x1).
        shrink: Output width over inner width of a bottleneck; 1 for basic blocks.
        embedding_blocks: Blocks of the residual stage that makes the embedding.
        decoder_blocks: Blocks of the decoder's stages, deepest stage first.
    """

    kind: Literal["basic", "bottleneck"]
    shrink: int
    embedding_blocks: int
    decoder_blocks: tuple[int, int, int]


def plan_blocks(backbone: str, channels: Sequence[int]) -> BlockPlan:
    """The blocks that fit a timm backbone with `channels` at strides 4, 8, 16.

    Networks with more than 512 channels at stride 16 get bottlenecks, as ResNet-50 has (inner width a quarter of the
    output's, a half in wide ResNets); all others get basic blocks, as many as ResNet-18 has (ResNet-34: its own).
    """
    name = backbone.rsplit("/", 1)[-1].split(".", 1)[0]
    if name.startswith("wide_resnet"):
        return BlockPlan("bottleneck", 2, 3, (3, 4, 6))
    if channels[-1] > 512:
        return BlockPlan("bottleneck", 4, 3, (3, 4, 6))
    if name == "resnet34":
        return BlockPlan("basic", 1, 3, (3, 4, 6))
    return BlockPlan("basic", 1, 2, (2, 2, 2))


class Basic(nn.Module):
    """Two 3x3 convolutions and a shortcut; doubling replaces the first by a 2x2 transposed one.

    `last_relu=False` leaves the sum as it is, for targets that can be negative.
    """

    def __init__(self, inputs: int, outputs: int, change: Change = "same", *, last_relu: bool = True) -> None:
        super().__init__()
        self.conv1 = _spatial(inputs, outputs, change)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = _spatial(outputs, outputs, "same")
        self.bn2 = nn.BatchNorm2d(outputs)
        _add_shortcut(self, inputs, outputs, change)
        self.last_relu = last_relu

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inputs, h, w) to (B, outputs, h', w')."""
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return _join(self, self.bn2(self.conv2(y)), x)


class Bottleneck(nn.Module):
    """1x1, spatial (3x3, or 2x2 transposed), 1x1 convolutions and a shortcut; the stride is on the spatial one."""

    def __init__(
        self, inputs: int, outputs: int, change: Change = "same", *, shrink: int = 4, last_relu: bool = True
    ) -> None:
        super().__init__()
        inner = outputs // shrink
        self.conv1 = nn.Conv2d(inputs, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = _spatial(inner, inner, change)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        _add_shortcut(self, inputs, outputs, change)
        self.last_relu = last_relu

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inputs, h, w) to (B, outputs, h', w')."""
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        return _join(self, self.bn3(self.conv3(y)), x)


def residual_stage(
    plan: BlockPlan, inputs: int, outputs: int, blocks: int, change: Change, *, last_relu: bool = True
) -> nn.Sequential:
    """`blocks` blocks of the plan's kind; the first changes width and resolution, the last may end without ReLU."""

    def block(index: int) -> nn.Module:
        width, step = (inputs, change) if index == 0 else (outputs, "same")
        relu = last_relu or index < blocks - 1
        if plan.kind == "basic":
            return Basic(width, outputs, step, last_relu=relu)
        return Bottleneck(width, outputs, step, shrink=plan.shrink, last_relu=relu)

    return nn.Sequential(*(block(index) for index in range(blocks)))


class ReverseDecoder(nn.Module):
    """Restores features at strides 16, 8, 4 from an embedding at stride 32, optionally helped by other feature maps.

    Stage i makes R_i from what came before. With `assistants` > 0 a learned convex combination of R_i and the
    assistants' Q_i is passed on (CRD, Sec. 4.2, Eq. 3; the weights are softmax(theta_i), equal at the start):

        G_i = u_i0 R_i + sum_j u_ij Q_ij,    u_i = softmax(theta_i)

    With `priors` a map of the stage's own width goes along with it (MMRD, Eq. 8): beside the input of the next stage,
    R_{i-1} = D_{i-1}([G_i ; prior_i]) for i = 3, 2, or behind every stage, G_i = conv1x1([D_i(...) ; prior_i]).

    `nonneg` says that the features to restore are never negative, so that each stage may end in a ReLU.
    """

    def __init__(
        self,
        channels: Sequence[int],
        plan: BlockPlan,
        *,
        nonneg: bool = True,
        assistants: int = 0,
        priors: Priors = "none",
    ) -> None:
        super().__init__()
        c1, c2, c3 = channels
        wider = 2 if priors == "input" else 1
        steps = ((2 * c3, c3), (wider * c3, c2), (wider * c2, c1))  # deepest first, as `theta`
        self.priors = priors
        self.stages = nn.ModuleList(
            residual_stage(plan, inputs, outputs, blocks, "up", last_relu=nonneg)
            for (inputs, outputs), blocks in zip(steps, plan.decoder_blocks)
        )
        joined = (c3, c2, c1) if priors == "output" else ()
        self.join = nn.ModuleList(nn.Conv2d(2 * width, width, 1) for width in joined)
        sizes = [1 + assistants] * 3 if assistants else []
        self.theta = nn.ParameterList(nn.Parameter(torch.ones(size)) for size in sizes)

    def forward(
        self, embedding: Tensor, assistants: Sequence[Sequence[Tensor]] = (), priors: Sequence[Tensor] = ()
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Decode an embedding (B, 2 C_3, h, w).

        Args:
            assistants: For each assistant its Q_1, Q_2, Q_3, shallow first, each (B, C_i, h_i, w_i).
            priors: The prior of each scale, shallow first, each (B, C_i, h_i, w_i); needed unless `priors` is "none".
                Beside the input the first one is not used.

        Returns:
            The restored features R and the mixed ones G, shallow first; equal without assistants and joined priors.
        """
        x, raw, mixed = embedding, [], []
        for depth, stage in enumerate(self.stages):
            x = stage(x)
            raw.append(x)
            if self.theta:
                u = self.theta[depth].softmax(0)
                x = u[0] * x
                for share, assistant in zip(u[1:], assistants, strict=True):
                    x = x + share * assistant[2 - depth]
            if self.join:
                x = self.join[depth](torch.cat([x, priors[2 - depth]], dim=1))
            mixed.append(x)
            if self.priors == "input" and depth < 2:
                x = torch.cat([x, priors[2 - depth]], dim=1)
        return raw[::-1], mixed[::-1]


class ForwardTrunk(nn.Module):
    """An untrained image network with features at strides 4, 8, 16: the student of forward distillation.

    Stem (7x7 stride 2, norm, ReLU, 3x3 max-pool stride 2) and three residual stages; with the plan of a ResNet it is
    that ResNet's trunk. With `priors` the inputs of stages 2 and 3 carry a map of the stage before beside them.

    Args:
        channels: C_1, C_2, C_3.
        inputs: Channels of the image.
        priors: Whether `forward` takes priors.
        nonneg: Whether the features to imitate are never negative, so that each stage may end in a ReLU.
    """

    def __init__(
        self, channels: Sequence[int], plan: BlockPlan, *, inputs: int = 3, priors: bool = False, nonneg: bool = True
    ) -> None:
        super().__init__()
        c1, c2, c3 = channels
        stem, wider = min(64, c1), 2 if priors else 1
        self.stem = nn.Sequential(
            nn.Conv2d(inputs, stem, 7, stride=2, padding=3, bias=False),
            nn.BatchNorm2d(stem),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2, padding=1),
        )
        steps: tuple[tuple[int, int, Change], ...] = (
            (stem, c1, "same"),
            (wider * c1, c2, "down"),
            (wider * c2, c3, "down"),
        )
        self.stages = nn.ModuleList(
            residual_stage(plan, before, after, blocks, change, last_relu=nonneg)
            for (before, after, change), blocks in zip(steps, plan.decoder_blocks)
        )

    def forward(self, images: Tensor, priors: Sequence[Tensor] = ()) -> list[Tensor]:
        """Features of images (B, inputs, H, W), shallow first; `priors` as those of `ReverseDecoder`, last unused."""
        x, features = self.stem(images), []
        for index, stage in enumerate(self.stages):
            if priors and index > 0:
                x = torch.cat([x, priors[index - 1]], dim=1)
            x = stage(x)
            features.append(x)
        return features


def init_convolutions(module: nn.Module) -> None:
    """Kaiming-normal (fan-out) weights for every convolution; transposed ones and norms keep torch's defaults.

    Transposed convolutions are left out on purpose: the reverse-distillation code that the published figures come from
    initialises ``Conv2d`` only.
    """
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")


def _spatial(inputs: int, outputs: int, change: Change) -> nn.Module:
    if change == "up":
        return nn.ConvTranspose2d(inputs, outputs, 2, stride=2, bias=False)
    return nn.Conv2d(inputs, outputs, 3, stride=2 if change == "down" else 1, padding=1, bias=False)


def _add_shortcut(block: nn.Module, inputs: int, outputs: int, change: Change) -> None:
    """Give the block a projection where its input does not fit its output (names as in the published checkpoints)."""
    if change == "up":
        convolution: nn.Module = nn.ConvTranspose2d(inputs, outputs, 2, stride=2, bias=False)
        block.add_module("upsample", nn.Sequential(convolution, nn.BatchNorm2d(outputs)))
    elif change == "down" or inputs != outputs:
        convolution = nn.Conv2d(inputs, outputs, 1, stride=2 if change == "down" else 1, bias=False)
        block.add_module("downsample", nn.Sequential(convolution, nn.BatchNorm2d(outputs)))


def _join(block: nn.Module, y: Tensor, x: Tensor) -> Tensor:
    shortcut = getattr(block, "upsample", None) or getattr(block, "downsample", None)
    y = y + (x if shortcut is None else shortcut(x))
    return F.relu(y, inplace=True) if block.last_relu else y
