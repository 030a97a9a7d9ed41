"""Signed distances to the surface of small patches of a point cloud: a code per patch, a field per code.

Chu et al., "Shape-Guided Dual-Memory Learning for 3D Anomaly Detection" (ICML 2023), as released; MDSS (PRCV 2024)
trains the same networks per category. Idea and field are those of Ma et al., "Surface Reconstruction from Point Clouds
by Learning Predictive Context Priors" (CVPR 2022).

    z = E(patch)        128 numbers, a PointNet                      `PatchEncoder`
    f(z, x)             distance of point x to the patch's surface   `DistanceField`
    g(q) = q - f(z, q) n,    n = grad_q f / sqrt(|grad_q f|^2 + 1e-12)                       `pull`
    loss = mean over q of |t(q) - g(q)|,    t(q) the nearest point of the patch              `pull_loss`

All lengths are in the frame of the patch (`normalise_patches`): the longest side of its box is 1, its mean 0. The loss
is the same for f and -f, so the sign of a trained field is arbitrary and may differ between patches: only |f| means
something.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError, ShapeError
from ..samples import check_shapes

Reduce = Literal["min", "mean", "max"]

_POINTS = 1 << 14  # points that go through the networks at a time where no gradient is wanted
_EPSILON = 1e-12  # in the length of the gradient
_REDUCE = {"min": "amin", "mean": "mean", "max": "amax"}


# -- patches -----------------------------------------------------------------------------------------------------------


class NormalisedPatches(NamedTuple):
    """Patches in their own frames: ``points = scale * (given - centre)``.

    Attributes:
        points: (P, N, 3); the longest side of each patch's box is 1, its mean 0.
        scale: (P,), 1 / longest side; 1 for patches without extent.
        centre: (P, 3), mean of the given points.
    """

    points: Tensor
    scale: Tensor
    centre: Tensor


class Queries(NamedTuple):
    """Points around patches, and where they belong.

    Attributes:
        points: (P, N, 3).
        targets: (P, N, 3), the nearest point of the patch to each.
    """

    points: Tensor
    targets: Tensor


def normalise_patches(patches: Tensor) -> NormalisedPatches:
    """Shift patches (P, N, 3) to mean 0 and scale them to a longest side of 1; no rotation, one scale for all axes.

    Raises:
        ShapeError: another shape.
    """
    check_shapes(patches=(patches, "P N 3"))
    side = (patches.amax(1) - patches.amin(1)).amax(1)
    scale = torch.where(side > 0, 1 / side, torch.ones_like(side))
    centre = patches.mean(1)
    return NormalisedPatches((patches - centre[:, None]) * scale[:, None, None], scale, centre)


def sample_queries(
    patches: Tensor,
    generator: torch.Generator,
    *,
    neighbour: int = 50,
    narrow: float = 0.5,
    wide: float = 1.0,
    narrow_share: float = 0.65,
    count: int | None = None,
) -> Queries:
    """One noisy copy of each patch, or of some of its points, and their targets: q = p + a sigma_p N(0, I).

    sigma_p is the distance of p to its `neighbour`-th neighbour in the patch; a is `narrow` for a patch with
    probability `narrow_share`, else `wide`. The released program stores 13 narrow and 7 wide copies of every patch and
    draws one of them per epoch.

    Args:
        patches: (P, N, 3), normalised or not.
        generator: On the CPU; the noise is the same on every device.
        count: How many points of every patch are copied, drawn without repeats, the same rows in all; None: all N.

    Raises:
        ConfigError: `neighbour` is not in 1..N-1, or `count` not in 1..N.
    """
    P, N = (check_shapes(patches=(patches, "P N 3"))[letter] for letter in "PN")
    if not 1 <= neighbour < N:
        raise ConfigError(f"`neighbour` must be in 1..{N - 1} for patches of {N} points, got {neighbour}")
    if count is not None and not 1 <= count <= N:
        raise ConfigError(f"`count` must be in 1..{N} for patches of {N} points, got {count}")
    copied = patches if count is None else patches[:, torch.randperm(N, generator=generator)[:count].to(patches.device)]
    n = copied.shape[1]
    among = torch.cdist(copied, patches, compute_mode="donot_use_mm_for_euclid_dist")  # P n N
    sigma = among.kthvalue(neighbour + 1, dim=2).values  # a point finds itself first
    is_narrow = torch.rand(P, 1, 1, generator=generator) < narrow_share
    spread = torch.where(is_narrow, narrow, wide).to(patches) * sigma[..., None]
    points = copied + spread * torch.randn(P, n, 3, generator=generator).to(patches)
    nearest = torch.cdist(points, patches, compute_mode="donot_use_mm_for_euclid_dist").argmin(2)
    return Queries(points, patches.gather(1, nearest[..., None].expand(-1, -1, 3)))


# -- networks ----------------------------------------------------------------------------------------------------------


class PatchEncoder(nn.Module):
    """PointNet of a patch: 3 - 64 - 128 - 1024 per point, maximum, 1024 - 512 - 128; 734,848 parameters.

    Batch norm and ReLU follow every layer, so codes are not negative. In train mode the norms need two patches.
    In eval mode the norms are folded into the layers, once per call, and the maximum comes before bias and ReLU, which
    commute with it; `plain` is the network as written.

    Args:
        code: Numbers of a code.
        pooled: Channels of the maximum; the layer behind it has half as many.
    """

    def __init__(self, code: int = 128, pooled: int = 1024) -> None:
        super().__init__()
        widths = ((3, 64), (64, 128), (128, pooled), (pooled, pooled // 2), (pooled // 2, code))
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in widths)
        self.norms = nn.ModuleList(nn.BatchNorm1d(b) for _, b in widths)

    def forward(self, patches: Tensor) -> Tensor:
        """Map normalised patches (P, N, 3) to codes (P, code), whatever the order of the points.

        Raises:
            ShapeError: another shape, or a single patch in train mode.
        """
        P = check_shapes(patches=(patches, "P N 3"))["P"]
        if self.training:
            if P < 2:
                raise ShapeError(f"`patches` has {P} patch; batch norm needs at least 2 while it is trained")
            return self.plain(patches)
        folded = [_fold(layer, norm) for layer, norm in zip(self.layers, self.norms)]
        pooled = [_pooled(part, folded[:3]) for part in _parts(patches, patches.shape[1])]
        x = torch.cat(pooled) if len(pooled) > 1 else pooled[0]
        for weight, bias in folded[3:]:
            x = F.relu(F.linear(x, weight, bias))
        return x

    def plain(self, patches: Tensor) -> Tensor:
        """`forward` layer after layer; what train mode computes."""
        P, N, _ = patches.shape
        x = patches.flatten(0, 1)  # P*N 3
        for index, (layer, norm) in enumerate(zip(self.layers, self.norms)):
            x = F.relu(norm(layer(x)))
            if index == 2:
                x = x.unflatten(0, (P, N)).amax(1)
        return x


class NormedLinear(nn.Module):
    """Linear layer of weight g v / |v|, row by row (Salimans and Kingma, 2016)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.direction = nn.Parameter(torch.empty(outputs, inputs))  # v
        self.gain = nn.Parameter(torch.empty(outputs))  # g
        self.bias = nn.Parameter(torch.zeros(outputs))

    def weight(self) -> Tensor:
        """g v / |v|, (outputs, inputs)."""
        length = torch.linalg.vector_norm(self.direction, dim=1, keepdim=True)
        return self.direction * (self.gain[:, None] / length)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., inputs) to (..., outputs)."""
        return F.linear(x, self.weight(), self.bias)


class DistanceField(nn.Module):
    """Signed distance of points to the surface that a code stands for; 2,435,585 parameters.

    Point and code each go through a layer of 512, together through one more, then through seven weight-normalised ones.
    Weight norm stays a matter of the parameters, so that a file can be trained further; its weights are made once per
    call. The first joint layer is split into its half for points and its half for codes, which is computed once per
    patch. `plain` is the network as written.
    """

    def __init__(self, code: int = 128, width: int = 512, depth: int = 7) -> None:
        super().__init__()
        self.of_point, self.of_code = nn.Linear(3, width), nn.Linear(code, width)
        self.join = nn.Linear(2 * width, width)  # points first
        self.hidden = nn.ModuleList(NormedLinear(width, width) for _ in range(depth))
        self.output = nn.Linear(width, 1)
        self._init()

    def _normed(self) -> list[NormedLinear]:
        return [cast(NormedLinear, layer) for layer in self.hidden]

    @torch.no_grad()
    def _init(self) -> None:
        width = self.output.in_features
        deviation = math.sqrt(2 / width)
        nn.init.normal_(self.join.weight, std=deviation)
        nn.init.zeros_(self.join.bias)
        for layer in self._normed():
            nn.init.normal_(layer.direction, std=deviation)
            layer.gain.copy_(torch.linalg.vector_norm(layer.direction, dim=1))
        nn.init.normal_(self.output.weight, mean=2 * math.sqrt(math.pi / width), std=1e-6)
        nn.init.constant_(self.output.bias, -0.5)

    def forward(self, codes: Tensor, points: Tensor) -> Tensor:
        """Distances (P, N) of points (P, N, 3) in the frames of their patches, given the codes (P, code).

        Where no gradient is wanted, patches go through in groups, so that memory does not grow with P.

        Raises:
            ShapeError: the shapes do not fit.
        """
        check_shapes(codes=(codes, f"P {self.of_code.in_features}"), points=(points, "P N 3"))
        width = self.output.in_features
        of_point, of_code = self.join.weight.split(width, dim=1)
        shift = F.linear(F.relu(self.of_code(codes)), of_code, self.join.bias)[:, None]  # P 1 width
        weights = [layer.weight() for layer in self._normed()]
        if torch.is_grad_enabled():
            return self._field(points, shift, of_point, weights)
        found = [
            self._field(part, some, of_point, weights)
            for part, some in zip(_parts(points, points.shape[1]), _parts(shift, points.shape[1]))
        ]
        return torch.cat(found) if len(found) > 1 else found[0]

    def plain(self, codes: Tensor, points: Tensor) -> Tensor:
        """`forward` layer after layer, every point with a code of its own."""
        tiled = codes[:, None].expand(-1, points.shape[1], -1)
        x = torch.cat([F.relu(self.of_point(points)), F.relu(self.of_code(tiled))], dim=2)
        x = F.relu(self.join(x))
        for layer in self.hidden:
            x = F.relu(layer(x))
        return self.output(x)[..., 0]

    def _field(self, points: Tensor, shift: Tensor, of_point: Tensor, weights: list[Tensor]) -> Tensor:
        x = F.relu(self.of_point(points))
        x = F.relu(F.linear(x, of_point) + shift)
        for layer, weight in zip(self._normed(), weights):
            x = F.relu(F.linear(x, weight, layer.bias))
        return self.output(x)[..., 0]


class SignedDistance(nn.Module):
    """Encoder and field together, 3,170,433 parameters."""

    def __init__(self, code: int = 128, width: int = 512, depth: int = 7, pooled: int = 1024) -> None:
        super().__init__()
        self.encoder = PatchEncoder(code, pooled)
        self.field = DistanceField(code, width, depth)

    def forward(self, patches: Tensor, points: Tensor | None = None) -> Tensor:
        """Distances (P, N) of points (P, N, 3), those of the patches (P, M, 3) themselves if None are given."""
        distances: Tensor = self.field(self.encoder(patches), patches if points is None else points)
        return distances

    def loss(self, queries: Queries, encoded: Tensor | None = None) -> Tensor:
        """`pull_loss` of queries; a scalar.

        Args:
            encoded: (P, M, 3), what the encoder sees; None: the targets of the queries, a multiset of the patch's
                points, as the released program has it. The whole patch is what it sees when parts are scored.
        """
        codes = self.encoder(queries.targets if encoded is None else encoded)
        return pull_loss(pull(self.field, codes, queries.points), queries.targets)


# -- pulling -----------------------------------------------------------------------------------------------------------


def pull(field: nn.Module, codes: Tensor, points: Tensor) -> Tensor:
    """Move points (P, N, 3) by their signed distance against the field's gradient; (P, N, 3).

    Differentiable in the codes and the field's parameters where gradients are enabled, not in the points. Does not work
    within `torch.inference_mode`.

    Args:
        field: ``field(codes, points)`` gives distances (P, N), each of which depends on its own point only.
    """
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        points = points.detach().requires_grad_()
        distance = field(codes, points)
        (slope,) = torch.autograd.grad(distance.sum(), points, create_graph=differentiable)
        length = (slope.square().sum(2, keepdim=True) + _EPSILON).sqrt()
        pulled = points - distance[..., None] * slope / length
    return pulled if differentiable else pulled.detach()


def pull_loss(pulled: Tensor, targets: Tensor) -> Tensor:
    """Mean distance, not squared, between pulled points and their targets, (P, N, 3) each; a scalar.

    Raises:
        ShapeError: the shapes differ.
    """
    check_shapes(pulled=(pulled, "P N 3"), targets=(targets, "P N 3"))
    return torch.linalg.vector_norm(targets - pulled, dim=2).mean()


def to_pixels(values: Tensor, pixels: Tensor, size: tuple[int, int], reduce: Reduce = "min") -> Tensor:
    """Write values of points (P, N) to the pixels they came from; a map (H, W), 0 where there is no point.

    Args:
        pixels: (P, N) int64, flat indices ``row * W + column``.
        size: H, W.
        reduce: Of the values that meet in a pixel. Patches extrapolate badly at their rims, and the least value comes
            from the patch in which the pixel lies furthest inside.

    Raises:
        ConfigError: unknown `reduce`.
        ShapeError: the shapes differ.
    """
    check_shapes(values=(values, "P N"), pixels=(pixels, "P N"))
    if reduce not in _REDUCE:
        raise ConfigError(f"`reduce` must be 'min', 'mean' or 'max', got '{reduce}'")
    flat = values.new_zeros(size[0] * size[1])
    flat = flat.scatter_reduce(0, pixels.flatten(), values.flatten(), _REDUCE[reduce], include_self=False)
    return flat.view(size)


def _fold(layer: nn.Module, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer and the norm behind it, with the norm's stored statistics."""
    layer, norm = cast(nn.Linear, layer), cast(nn.BatchNorm1d, norm)
    mean, var = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
    scale = norm.weight * torch.rsqrt(var + norm.eps)
    return layer.weight * scale[:, None], (layer.bias - mean) * scale + norm.bias


def _pooled(patches: Tensor, folded: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The pointwise layers and the maximum: patches (P, N, 3) to (P, pooled)."""
    x = patches
    for weight, bias in folded[:-1]:
        x = F.relu(F.linear(x, weight, bias))
    weight, bias = folded[-1]
    return F.relu(F.linear(x, weight).amax(1) + bias)


def _parts(x: Tensor, points: int) -> tuple[Tensor, ...]:
    """Groups of patches (P, ...), about `_POINTS` points in each where a patch has `points`."""
    return x.split(max(1, _POINTS // max(1, points)))
