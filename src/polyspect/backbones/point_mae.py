"""Point-MAE's pre-training network: hide most groups of a cloud, and predict their points from the rest.

Pang et al., "Masked Autoencoders for Point Cloud Self-supervised Learning" (ECCV 2022). With groups x_g of M points
minus their centre c_g, of which the set m is hidden:

    h     = LN(encoder blocks of the visible tokens)                                               (1)
    z     = decoder blocks of [h, a mask token per hidden group], positions P'(c) added before each (2)
    y_g   = W LN(z_g), 32 points, for g in m                                                        (3)
    loss  = mean over g in m of  mean_p min_q |y_gp - x_gq|^2 + mean_q min_p |y_gp - x_gq|^2        (4)  "l2"
    or      mean over g in m of (mean_p min_q |y_gp - x_gq|   + mean_q min_p |y_gp - x_gq|) / 2     (5)  "l1"

Chamfer distances of a few dozen points say little about a surface's fine shape, which is what defects change. With
`targets` there is a second task, not in the paper, like the feature prediction of Wei et al. (MaskFeat, CVPR 2022): to
tell a descriptor d_g of each group, for hidden groups behind the decoder, for visible ones from what every block that
is used later (`PointTransformer.layers`) returns:

    added = mean over g in m of |V LN(z_g) - d_g|^2 / n
          + mean over g not in m and layers l of |U LN(h_gl) - d_g|^2 / n                           (6)

Differs from the released program: hidden groups, whose tokens it throws away, do not pass through the token PointNet,
so that batch norms see visible groups only; norms take the statistics of each cloud, as they do in use
(`point_transformer`), where the program takes those of the batch; and layers start as torch starts them. (With
deviations of 0.02 throughout, as there, the positions of a narrow network start at about a thousandth.)
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import ConfigError, nearest_names
from ..geometry.neighbours import gather_rows
from ..samples import check_shapes
from .point_transformer import SIZES, Block, PointTransformer, position_layers

Loss = Literal["l2", "l1"]
Masking = Literal["random", "block"]


class PointMAE(nn.Module):
    """Encoder, decoder and head; 29,006,432 parameters as published (size ``base``, 4 decoder blocks, 32 points).

    Attributes:
        encoder: What is kept: a `PointTransformer` that returns its last block.
        points: Points that the head predicts per group.
        layers: Blocks, from 0, whose outputs must tell a group's descriptor: the size's own layers.
    """

    mask_token: Tensor

    def __init__(
        self,
        size: str = "base",
        *,
        decoder_blocks: int = 4,
        points: int = 32,
        drop_path: float = 0.1,
        normalise: bool = False,
        targets: int = 0,
        branch_scale: float = 1.0,
        chunk: int = 8192,
    ) -> None:
        """Build the network; every number is drawn from torch's global generator, so seed that (`contract.seeded`).

        Args:
            size: Of the encoder, a name in `SIZES`; the decoder is as wide.
            decoder_blocks: At least 1.
            points: Predicted per hidden group; the group itself may have another number.
            drop_path: Share of the last block's branches that are dropped in train mode, growing linearly from 0 in the
                first block, in the encoder and again in the decoder.
            normalise: Predict, and measure the loss, in units of the root mean square of the visible points of each
                cloud. With small groups the head then need not find out how small. The paper does not.
            branch_scale: What the encoder's positions, and what its blocks add to a token, are multiplied by at the
                start: a small number makes a block's output the group's own token at first.
            targets: Values n of a group's descriptor (Eq. 6); 0 for none, as the paper.
            chunk: Points that the token PointNet takes at a time.

        Raises:
            ConfigError: unknown size, or a number out of range.
        """
        super().__init__()
        if decoder_blocks < 1 or points < 1 or targets < 0 or not 0 <= drop_path < 1:
            raise ConfigError(
                "Point-MAE needs at least 1 decoder block, at least 1 point, 0 or more targets and a drop path in "
                f"[0, 1), got {decoder_blocks}, {points}, {targets} and {drop_path}"
            )
        if size not in SIZES:
            raise ConfigError(f"unknown size '{size}' of the point transformer: {nearest_names(size, SIZES)}")
        shape = SIZES[size]
        self.encoder = PointTransformer((shape.blocks - 1,), size=size, chunk=chunk)
        with torch.no_grad():
            ends = [self.encoder.position[2]]
            for block in self.encoder.blocks:
                assert isinstance(block, Block)
                ends += [block.projection, block.mlp[2]]
            for parameter in nn.ModuleList(ends).parameters():
                parameter.mul_(branch_scale)
        self.points, self.drop_path, self.normalise = points, drop_path, normalise
        self.mask_token = nn.Parameter(torch.zeros(shape.width))
        self.decoder_position = position_layers(shape)
        self.decoder = nn.ModuleList(Block(shape.width, shape.heads) for _ in range(decoder_blocks))
        self.decoder_norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, 3 * points)
        self.layers = shape.layers
        self.tell_hidden = nn.Linear(shape.width, targets) if targets else None  # V
        self.tell_visible = nn.Linear(shape.width, targets) if targets else None  # U
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(
        self, groups: Tensor, centres: Tensor, hidden: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """Predicted points (B * hidden groups, points, 3) minus their group's centre, cloud by cloud.

        Args:
            groups: (B, G, M, 3) points minus their centre.
            centres: (B, G, 3).
            hidden: (B, G) bool, True where hidden; the same number in every cloud, at least one seen and one hidden.
            generator: Of DropPath, on the CPU; needed in train mode with a `drop_path` above 0.

        Raises:
            ShapeError: shapes do not fit. ConfigError: clouds that hide different numbers, none or all groups.
        """
        sizes = check_shapes(groups=(groups, "B G M 3"), centres=(centres, "B G 3"), hidden=(hidden, "B G"))
        G = sizes["G"]
        count = self._count_hidden(hidden)
        z, _, _ = self._decode(groups, centres, hidden, generator)
        unit = self._unit(groups, hidden)
        return (self._points(z) * unit)[:, G - count :].flatten(0, 1)

    def loss(
        self,
        groups: Tensor,
        centres: Tensor,
        hidden: Tensor,
        generator: torch.Generator | None = None,
        kind: Loss = "l2",
        visible_weight: float = 0.0,
        descriptors: Tensor | None = None,
        descriptor_weight: float = 1.0,
    ) -> Tensor:
        """Eq. 4 or 5 of a batch, arguments as `forward`.

        With `visible_weight`, the loss of the visible groups, predicted from their own tokens behind the decoder, is
        added with that weight; with `descriptors` (B, G, targets) Eq. 6 with `descriptor_weight`. The paper has neither
        term.

        Raises:
            ConfigError: as `forward`; or descriptors for a network without `targets`. ShapeError: they do not fit.
        """
        count = self._count_hidden(hidden)
        z, outputs, order = self._decode(groups, centres, hidden, generator)
        row = torch.arange(len(groups), device=groups.device)[:, None]
        y, target = self._points(z), groups[row, order] / self._unit(groups, hidden)
        seen = groups.shape[1] - count
        loss = chamfer(y[:, seen:].flatten(0, 1), target[:, seen:].flatten(0, 1), kind).mean()
        if visible_weight:
            there = chamfer(y[:, :seen].flatten(0, 1), target[:, :seen].flatten(0, 1), kind).mean()
            loss = loss + visible_weight * there
        if descriptors is None:
            return loss
        if self.tell_hidden is None or self.tell_visible is None:
            raise ConfigError("descriptors need a network that tells them: build it with `targets`")
        check_shapes(hidden=(hidden, "B G"), descriptors=(descriptors, f"B G {self.tell_hidden.out_features}"))
        wanted = descriptors[row, order]
        told = self.tell_hidden(self.decoder_norm(z[:, seen:]))
        terms = [(told - wanted[:, seen:]).square().mean()]
        for h in outputs:
            terms.append((self.tell_visible(h) - wanted[:, :seen]).square().mean() / len(outputs))
        return loss + descriptor_weight * sum(terms[1:], terms[0])  # Eq. 6

    def _count_hidden(self, hidden: Tensor) -> int:
        count = int(hidden[0].sum())
        if not 0 < count < hidden.shape[1] or bool((hidden.sum(1) != count).any()):
            raise ConfigError(
                "every cloud of a batch must hide the same number of groups and show one at least; hidden are "
                f"{hidden.sum(1).tolist()} of {hidden.shape[1]}"
            )
        return count

    def _decode(
        self, groups: Tensor, centres: Tensor, hidden: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        """z (B, G, C) of all groups, visible ones first; the encoder's layers (B, V, C) of these; that order (B, G)."""
        B, G = hidden.shape
        count = self._count_hidden(hidden)
        order = hidden.to(torch.uint8).argsort(dim=1, stable=True)  # B G, visible ones first
        visible = order[:, : G - count]
        h = self.encoder.encoder(groups[torch.arange(B, device=groups.device)[:, None], visible])  # B V C
        position = self.encoder.position(gather_rows(centres, visible))
        outputs = []
        for index, (block, keep) in enumerate(
            zip(self.encoder.blocks, self._keep(len(self.encoder.blocks), h, generator))
        ):
            h = block(h + position, keep=keep)
            if index in self.layers:
                outputs.append(self.encoder.norm(h))  # Eq. 1, the last of them
        z = torch.cat([outputs[-1], self.mask_token.expand(B, count, -1)], dim=1)  # B G C
        position = self.decoder_position(gather_rows(centres, order))
        for block, keep in zip(self.decoder, self._keep(len(self.decoder), z, generator)):
            z = block(z + position, keep=keep)  # Eq. 2
        return z, outputs, order

    def _points(self, z: Tensor) -> Tensor:
        """Eq. 3: (B, G, points, 3)."""
        return self.head(self.decoder_norm(z)).unflatten(2, (self.points, 3))

    def _unit(self, groups: Tensor, hidden: Tensor) -> Tensor:
        """What the network measures points in, (B, 1, 1, 1)."""
        if not self.normalise:
            return groups.new_ones(len(groups), 1, 1, 1)
        squared = groups.square().sum(3).mean(2)  # B G
        return ((squared * ~hidden).sum(1) / (~hidden).sum(1)).sqrt().clamp(min=1e-6).view(-1, 1, 1, 1)

    def _keep(self, blocks: int, h: Tensor, generator: torch.Generator | None) -> list[Tensor | None]:
        """Factors (2, B, 1, 1) per block: 0 for a dropped branch of a cloud, 1 / (1 - rate) for a kept one."""
        if not self.training or self.drop_path == 0:
            return [None] * blocks
        if generator is None:
            raise ConfigError("drop path in train mode draws from a generator: give one")
        factors: list[Tensor | None] = []
        for rate in torch.linspace(0, self.drop_path, blocks).tolist():
            draw = torch.rand(2, len(h), 1, 1, generator=generator)
            factors.append(((draw >= rate) / (1 - rate)).to(h))
        return factors


def chamfer(a: Tensor, b: Tensor, kind: Loss = "l2") -> Tensor:
    """Symmetric Chamfer distance (n,) of point sets a (n, P, 3) and b (n, Q, 3): Eq. 4, in the square of the unit.

    ``"l1"`` takes roots and halves (Eq. 5), in the unit. Differentiable in both; distances are direct differences.

    Raises:
        ShapeError: shapes do not fit. ConfigError: unknown kind.
    """
    check_shapes(a=(a, "n P 3"), b=(b, "n Q 3"))
    if kind not in ("l2", "l1"):
        raise ConfigError(f"the Chamfer loss is 'l2' or 'l1', got '{kind}'")
    with torch.no_grad():
        squared = a.new_zeros(a.shape[0], a.shape[1], b.shape[1])  # n P Q
        for axis in range(3):
            squared += (a[:, :, None, axis] - b[:, None, :, axis]).square_()
        nearest_b, nearest_a = squared.argmin(2), squared.argmin(1)  # n P, n Q
    there = (a - gather_rows(b, nearest_b)).square().sum(2)  # n P
    back = (b - gather_rows(a, nearest_a)).square().sum(2)  # n Q
    if kind == "l2":
        return there.mean(1) + back.mean(1)
    tiny = torch.finfo(a.dtype).tiny  # the root's slope at 0 is infinite
    return (there.clamp(min=tiny).sqrt().mean(1) + back.clamp(min=tiny).sqrt().mean(1)) / 2


def hide_groups(centres: Tensor, ratio: float, masking: Masking, generator: torch.Generator) -> Tensor:
    """Which groups to hide, (B, G) bool, floor(ratio * G) of every cloud.

    Args:
        centres: (B, G, 3).
        ratio: In (0, 1); at least one group must be hidden and one seen.
        masking: ``"random"``: any groups. ``"block"``: a group drawn at random and those with the nearest centres.
        generator: On the CPU.

    Raises:
        ConfigError: the ratio hides nothing or everything, or unknown `masking`.
    """
    B, G = check_shapes(centres=(centres, "B G 3")).values()
    count = int(ratio * G)
    if not 0 < count < G:
        raise ConfigError(f"a mask ratio of {ratio} hides {count} of {G} groups; hide one at least and show one")
    if masking == "random":
        key = torch.rand(B, G, generator=generator)
    elif masking == "block":
        first = torch.randint(G, (B, 1, 1), generator=generator)
        key = (centres - centres.gather(1, first.to(centres.device).expand(B, 1, 3))).square().sum(2)
    else:
        raise ConfigError(f"`masking` must be 'random' or 'block', got '{masking}'")
    chosen = key.argsort(dim=1, stable=True)[:, :count].to(centres.device)
    return torch.zeros(B, G, dtype=torch.bool, device=centres.device).scatter_(1, chosen, True)
