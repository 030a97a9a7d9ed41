"""The Point-MAE encoder: features of a cloud's groups, from raw coordinates.

Pang et al., "Masked Autoencoders for Point Cloud Self-supervised Learning" (ECCV 2022), as M3DM, CMDIAD and CFM use it.
Geometry makes the groups; here each of G groups of M points, shifted to its centre, becomes one token, and a
transformer lets the tokens see each other:

    y = W2 relu(N1(W1 x + b1)) + b2                        (1)  every point x of a group, (256,)
    t = max over the group of W4 relu(N2(W3 [max y, y] + b3)) + b4     (2)  the group's token, (384,)
    p = P2 gelu(P1 c + q1) + q2                            (3)  position of the group's centre c, (384,)
    h <- block(h + p), from h = t, for every block         (4)  the position is added again before EVERY block
    f = [LN(h after block l) for l in layers]              (5)  one final LayerNorm for all

N1 and N2 are batch norms. The methods' released programs never leave training mode, so that N1 and N2 take their mean
and (biased) variance from the cloud at hand. That is the default here, ``statistics="cloud"``, written as an explicit
normalisation: nothing is updated, and clouds of one batch do not mix. ``statistics="stored"`` uses the checkpoint's
running statistics, which belong to unit-sphere clouds: on parts in metres they flatten the first layer to its bias. The
released programs also drop whole residual branches at random (DropPath up to 0.1) at test time; that is left out.

In eval mode `forward` computes the same function with less work and bounded memory, `chunk` points at a time:

* norms are folded into the layers before them;
* nothing is concatenated: W3 [g, y] = Wg g + Wl y, where Wg g is one product per group;
* there is no nonlinearity between W2 and Wl, so a point takes one 128 -> 512 product, (Wl W2), instead of 256 -> 512;
* the cloud's statistics need no pass over the wide layers. With S the covariance of its inputs, the variance of a
  linear layer's output k is (W S W^T)_kk: S is 3x3 before N1, and before N2 it follows from the groups' means and the
  128x128 scatter within groups (law of total variance).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError, nearest_names
from ..samples import check_shapes

Statistics = Literal["cloud", "stored"]


@dataclass(frozen=True, kw_only=True)
class PointSize:
    """How large a point transformer is."""

    width: int  # channels of a token
    heads: int  # of an attention, width / heads channels each
    blocks: int
    point_channels: tuple[int, int, int]  # of a point after W1, W2 and W3; P1 is as wide as W1
    layers: tuple[int, ...]  # blocks returned unless others are asked for: after a third, two thirds, and the last
    token: int | None = None  # channels that a group's token has before a linear layer brings it to `width`; None: none


SIZES = {
    "base": PointSize(width=384, heads=6, blocks=12, point_channels=(128, 256, 512), layers=(3, 7, 11)),
    "small": PointSize(width=192, heads=3, blocks=8, point_channels=(64, 128, 256), layers=(2, 5, 7)),
}
"""``base`` is the published encoder; ``small`` is ours: 3,691,200 parameters, for machines without a GPU."""

POINT_BERT = PointSize(width=384, heads=6, blocks=12, point_channels=(128, 256, 512), layers=(3, 7, 11), token=256)
"""Size ``bert``, Point-BERT's encoder: narrower tokens, and before them a class token with a position of its own, which
the features leave out; 21,858,816 parameters. It is no size of our pre-training."""


class PointTransformer(nn.Module):
    """Features of point groups (Eqs. 1 to 5); 21,825,024 parameters with all 12 blocks of the size ``base``.

    Blocks behind the deepest wanted one are not built. Layers used by the methods, counted from 0: M3DM and CFM
    (3, 7, 11); CMDIAD (3, 11); CFM with 8 blocks (1, 4, 7), with 4 blocks (1, 2, 3), with another number only the last.
    Numbers of channels in this file are those of ``base``.

    Attributes:
        size: Name of the size.
        layers: Blocks whose outputs are returned.
        channels: Channels of the features, 384 per layer.
        encoder: `GroupEncoder` that makes the tokens.
        position: Eq. 3.
    """

    def __init__(
        self,
        layers: Sequence[int] | None = None,
        *,
        size: str = "base",
        statistics: Statistics = "cloud",
        chunk: int = 8192,
    ) -> None:
        """Build the network; its numbers are random until a checkpoint is loaded (`polyspect.weights.point_mae`).

        Args:
            layers: Blocks to return, from 0, ascending; None for the size's own, (3, 7, 11).
            size: A name in `SIZES`, or ``bert``: `POINT_BERT`.
            statistics: Where the norms of the group encoder take mean and variance from.
            chunk: Points handled at a time in eval mode (about 5 kB each); whole groups, at least one.

        Raises:
            ConfigError: unknown size; `layers` empty, not ascending or out of range; unknown `statistics`; `chunk`
                below 1.
        """
        super().__init__()
        sizes = {**SIZES, "bert": POINT_BERT}
        if size not in sizes:
            raise ConfigError(f"unknown size '{size}' of the point transformer: {nearest_names(size, sizes)}")
        shape = sizes[size]
        self.size = size
        self.layers = shape.layers if layers is None else tuple(layers)
        if not self.layers or list(self.layers) != sorted({*self.layers} & {*range(shape.blocks)}):
            raise ConfigError(
                f"`layers` of the point transformer must be ascending block numbers from 0 to {shape.blocks - 1}, each "
                f"once, got {list(self.layers)}"
            )
        self.channels = shape.width * len(self.layers)
        self.encoder = GroupEncoder(statistics, chunk, (*shape.point_channels, shape.token or shape.width))
        self.reduce: nn.Linear | None = None
        if shape.token is not None:
            self.reduce = nn.Linear(shape.token, shape.width)
            self.class_token = nn.Parameter(torch.zeros(1, 1, shape.width))
            self.class_position = nn.Parameter(torch.randn(1, 1, shape.width))
        self.position = position_layers(shape)
        self.blocks = nn.ModuleList(Block(shape.width, shape.heads) for _ in range(self.layers[-1] + 1))
        self.norm = nn.LayerNorm(shape.width)

    def forward(self, groups: Tensor, centres: Tensor) -> Tensor:
        """Features (B, G, 384 * layers), those of the earliest layer first.

        Args:
            groups: (B, G, M, 3) points minus their group's centre; metres in the methods.
            centres: (B, G, 3) in the cloud's own frame: features change when the part moves.

        Raises:
            ShapeError: the shapes do not fit each other.
        """
        return self._join(self._outputs(groups, centres, plain=self.training))

    def plain(self, groups: Tensor, centres: Tensor) -> Tensor:
        """As `forward`, but as Eqs. 1 to 5 are written; what train mode computes and eval mode must equal."""
        return self._join(self._outputs(groups, centres, plain=True))

    def block_outputs(self, groups: Tensor, centres: Tensor) -> list[Tensor]:
        """Outputs (B, G, 384) of the chosen layers before the final norm."""
        return self._outputs(groups, centres, plain=self.training)

    def extra_repr(self) -> str:
        """Size, layers and origin of the statistics, for printing."""
        return f"size='{self.size}', layers={self.layers}, statistics='{self.encoder.statistics}'"

    def _outputs(self, groups: Tensor, centres: Tensor, plain: bool) -> list[Tensor]:
        check_shapes(groups=(groups, "B G M 3"), centres=(centres, "B G 3"))
        h = self.encoder.plain(groups) if plain else self.encoder(groups)  # B G C
        position = self.position(centres)  # B G C, Eq. 3
        if self.reduce is not None:  # B 1+G C
            h = torch.cat([self.class_token.expand(len(h), -1, -1), self.reduce(h)], dim=1)
            position = torch.cat([self.class_position.expand(len(h), -1, -1), position], dim=1)
        outputs = []
        for block in self.blocks:
            h = block(h + position, plain)  # Eq. 4
            outputs.append(h if self.reduce is None else h[:, 1:])
        return [outputs[layer] for layer in self.layers]

    def _join(self, outputs: Sequence[Tensor]) -> Tensor:
        return torch.cat([self.norm(h) for h in outputs], dim=-1)  # Eq. 5


def position_layers(size: PointSize) -> nn.Sequential:
    """Eq. 3: from centres (..., 3) to (..., 384)."""
    hidden = size.point_channels[0]
    return nn.Sequential(nn.Linear(3, hidden), nn.GELU(), nn.Linear(hidden, size.width))


class GroupEncoder(nn.Module):
    """One token per group (Eqs. 1 and 2), whatever the order of its points; 494,464 parameters."""

    def __init__(
        self,
        statistics: Statistics = "cloud",
        chunk: int = 8192,
        channels: tuple[int, int, int, int] = (128, 256, 512, 384),
    ) -> None:
        super().__init__()
        if statistics not in ("cloud", "stored"):
            raise ConfigError(f"`statistics` must be 'cloud' or 'stored', got '{statistics}'")
        if chunk < 1:
            raise ConfigError(f"`chunk` must be at least 1 point, got {chunk}")
        self.statistics = statistics
        self.chunk = chunk
        first, second, third, width = channels
        self.local1 = nn.Linear(3, first)  # W1
        self.norm1 = FoldableNorm(first)
        self.local2 = nn.Linear(first, second)  # W2
        self.joint1 = nn.Linear(2 * second, third)  # W3: the group's half of the columns, then the point's
        self.norm2 = FoldableNorm(third)
        self.joint2 = nn.Linear(third, width)  # W4

    def forward(self, groups: Tensor) -> Tensor:
        """Tokens (B, G, 384) of groups (B, G, M, 3), each cloud on its own, by the fast form."""
        return torch.stack([self._fast(cloud) for cloud in groups])

    def plain(self, groups: Tensor) -> Tensor:
        """Eqs. 1 and 2 as they are written, for (B, G, M, 3)."""
        y = self.local2(F.relu(self._normalise(self.norm1, self.local1(groups))))  # B G M 256, Eq. 1
        whole = y.amax(2, keepdim=True).expand_as(y)
        z = self._normalise(self.norm2, self.joint1(torch.cat([whole, y], dim=-1)))  # B G M 512
        return self.joint2(F.relu(z)).amax(2)  # B G 384, Eq. 2

    def _normalise(self, norm: FoldableNorm, x: Tensor) -> Tensor:
        """Normalise (B, G, M, C) by the stored statistics or by those of each cloud."""
        if self.statistics == "stored":
            return norm(x, norm.mean, norm.var)
        var, mean = torch.var_mean(x, (1, 2), correction=0, keepdim=True)  # B 1 1 C
        return norm(x, mean, var)

    def _fast(self, points: Tensor) -> Tensor:
        """Tokens (G, 384) of one cloud's groups (G, M, 3)."""
        cloud = self.statistics == "cloud"
        chunks = points.split(max(1, self.chunk // points.shape[1]))
        W1, b1 = self.norm1.fold(self.local1, *self._input_moments(points) if cloud else ())
        W_group, W_local = self.joint1.weight.chunk(2, dim=1)
        W_point = W_local @ self.local2.weight  # 512 128

        tops, means, scatter = [], [], points.new_zeros(len(W1), len(W1))
        for chunk in chunks:
            r = F.relu(F.linear(chunk, W1, b1))  # g M 128
            tops.append(F.linear(r, self.local2.weight).amax(1))
            if cloud:
                means.append(r.mean(1))
                centred = (r - means[-1][:, None]).flatten(0, 1)
                scatter = scatter + centred.T @ centred
        top = torch.cat(tops) + self.local2.bias  # G 256
        shift = F.linear(top, W_group, self.joint1.bias) + F.linear(self.local2.bias, W_local)  # G 512
        if cloud:
            var, mean = torch.var_mean(shift + torch.cat(means) @ W_point.T, 0, correction=0)  # of the groups' means
            var = var + ((W_point @ scatter) * W_point).sum(1) / points.shape[:2].numel()  # within the groups
            scale, offset = self.norm2.affine(mean, var)
        else:
            scale, offset = self.norm2.affine(self.norm2.mean, self.norm2.var)
        W_point, shift = W_point * scale[:, None], shift * scale + offset

        tokens = []
        for chunk, own in zip(chunks, shift.split(len(chunks[0]))):
            r = F.relu(F.linear(chunk, W1, b1))
            z = F.linear(r, W_point).add_(own[:, None]).relu_()  # g M 512
            tokens.append(F.linear(z, self.joint2.weight).amax(1))
        return torch.cat(tokens) + self.joint2.bias

    def _input_moments(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance (128,) of W1 x + b1 over all points, from those of x."""
        x = points.flatten(0, 1)
        mean = x.mean(0)
        centred = x - mean
        S = centred.T @ centred / len(x)  # 3 3
        W = self.local1.weight
        return self.local1(mean), ((W @ S) * W).sum(1)


class FoldableNorm(nn.Module):
    """Batch norm over the last dimension with given statistics, which it never updates."""

    mean: Tensor
    var: Tensor

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("var", torch.ones(channels))
        self.eps = eps

    def forward(self, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        """Normalise (..., C) by `mean` and `var`, then scale and shift."""
        return (x - mean) * torch.rsqrt(var + self.eps) * self.weight + self.bias

    def affine(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """The norm as ``x * scale + offset``: (C,) each."""
        scale = self.weight * torch.rsqrt(var + self.eps)
        return scale, self.bias - mean * scale

    def fold(self, layer: nn.Linear, mean: Tensor | None = None, var: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weight and bias of `layer` and this norm as one layer; stored statistics unless others are given."""
        scale, offset = self.affine(self.mean if mean is None else mean, self.var if var is None else var)
        return layer.weight * scale[:, None], layer.bias * scale + offset


class Block(nn.Module):
    """Pre-norm transformer block: h + attention(LN(h)), then h + mlp(LN(h)); 1,773,312 parameters."""

    def __init__(self, width: int = 384, heads: int = 6) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.projection = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, h: Tensor, plain: bool = False, keep: Tensor | None = None) -> Tensor:
        """Map tokens (B, G, 384) to the same shape.

        Args:
            h: The tokens.
            plain: Write the attention out.
            keep: Factors (2, B, 1, 1) of the two branches, for DropPath in pre-training; None for 1.
        """
        qkv = self.qkv(self.attention_norm(h))
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # B heads G 64
        if plain:
            weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)  # B heads G G
            mixed = weights @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v)
        mixed = self.projection(mixed.transpose(1, 2).flatten(2))
        h = h + (mixed if keep is None else mixed * keep[0])
        mixed = self.mlp(self.mlp_norm(h))
        return h + (mixed if keep is None else mixed * keep[1])
