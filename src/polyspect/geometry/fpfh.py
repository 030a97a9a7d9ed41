"""Normals by principal components, and Fast Point Feature Histograms (FPFH), of unorganised clouds.

For a pair of points with unit normals n_1, n_2 and unit direction e from the first to the second, let phi_1 = n_1.e and
phi_2 = n_2.e. The source of the pair is the point whose normal makes the smaller angle with the line; with phi that
normal's cosine towards the other point and psi the other normal's cosine in the same direction:

    alpha = e.(n_1 x n_2) / s,     theta = atan2((psi - phi n_1.n_2) / s, n_1.n_2),     s = sqrt(1 - phi^2)       (1)

(the Darboux frame u, v = e x u / s, w = u x v of Rusu et al. in scalar products: v.n = alpha s / s, w.n = (psi - phi
n_1.n_2) / s). All three are 0 where the points coincide or s = 0. Theta, alpha and phi of a point with its neighbours
are counted in 11 bins each, over -pi..pi, -1..1 and -1..1, and each block is scaled to a sum of 100: the simplified
histogram S. Then, over the neighbours j at a distance d_j > 0,

    FPFH_i = S_i + sum_j S_j / d_j^2 / sum_j 1 / d_j^2                                                            (2)

so that each block sums to 200. Rusu, Blodow and Beetz, "Fast Point Feature Histograms (FPFH) for 3D Registration"
(ICRA 2009), Sec. III; weights, bins, order of blocks and neighbourhoods are those of Open3D, which BTF calls ("Back to
the Feature", CVPR-W 2023): there they are 1/d^2, where the paper has 1/d.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import ConfigError
from ..samples import check_shapes
from .neighbours import ball_neighbours, gather_rows
from .padding import valid_rows

BINS = 11
Sign = Literal["camera", "solver"]
_PAIRS = 2**15  # pairs at a time: what fits the caches of a core


def estimate_normals(
    points: Tensor,
    *,
    radius: float = 0.1,
    max_neighbours: int = 30,
    sign: Sign = "camera",
    valid: Tensor | None = None,
) -> Tensor:
    """Unit normals (B, N, 3): the direction in which the neighbourhood of a point is thinnest.

    The smallest principal axis of the points strictly within `radius`, the nearest `max_neighbours` at most, the point
    itself included; the defaults are BTF's.

    Args:
        points: (B, N, 3).
        radius: In the unit of the points.
        max_neighbours: At least 3.
        sign: ``"camera"``, n.p <= 0: towards the origin, where the camera is. ``"solver"``: as it falls out of the
            closed-form eigenvector solver of Open3D, and so in BTF: away from the camera on most of a surface, towards
            it on a few per cent of the points. FPFH depends on it.
        valid: (B, N) bool; other points are no neighbours and get a normal of 0.

    Returns:
        In the dtype of the points. For a point with fewer than two others in its ball the optical axis: (0, 0, -1), or
        (0, 0, 1) with the solver's sign.

    Raises:
        ConfigError: `radius`, `max_neighbours` or `sign` is out of range.
        DataError: a valid point is not finite.
    """
    if sign not in get_args(Sign):
        raise ConfigError(f"`sign` of the normals is '{sign}'; it must be one of {', '.join(get_args(Sign))}")
    if max_neighbours < 3:
        raise ConfigError(f"a normal needs at least 3 points, got max_neighbours = {max_neighbours}")
    valid = valid_rows(points, valid, "points")
    near = ball_neighbours(points, points, radius, max_neighbours, valid=valid, queries_valid=valid)
    exact = points.double()
    spread = gather_rows(exact, near.rows) - exact[:, :, None]  # B N k 3
    count = near.found.sum(-1)[..., None, None]  # B N 1 1
    share = near.found[..., None] / count.clamp(min=1)  # B N k 1
    spread = torch.where(near.found[..., None], spread - (share * spread).sum(2, keepdim=True), 0)
    covariance = spread.mT @ spread  # B N 3 3, times the count
    values, axes = torch.linalg.eigh(covariance)  # ascending
    if sign == "solver":
        normal = _as_solved(covariance, values, axes)
    else:
        normal = axes[..., 0]
        normal = torch.where(_dot(normal, exact) > 0, -normal, normal)
    lonely = normal.new_tensor([0.0, 0.0, 1.0 if sign == "solver" else -1.0])
    normal = torch.where(count[..., 0] < 3, lonely, normal)
    return torch.where(valid[..., None], normal, 0).to(points.dtype)


def fpfh(
    points: Tensor,
    normals: Tensor,
    *,
    radius: float = 0.25,
    max_neighbours: int = 100,
    valid: Tensor | None = None,
) -> Tensor:
    """Fast Point Feature Histograms (B, N, 33): 11 bins each of theta, alpha and phi; every block sums to 200 (Eq. 2).

    Where all neighbours coincide with the point, to 100.

    Computed in float64. Invariant to rigid motions of points and normals together, but not to the sign of the normals.

    Args:
        points: (B, N, 3).
        normals: (B, N, 3) unit vectors; a zero vector makes the angles of its pairs 0.
        radius: Neighbours lie strictly within, in the unit of the points. The default is BTF's.
        max_neighbours: The nearest so many count, the point itself among them.
        valid: (B, N) bool; other points are no neighbours and get zeros.

    Returns:
        In the dtype of the points; 0 for a point with nothing else in its ball.

    Raises:
        ConfigError: `radius` or `max_neighbours` is out of range.
        ShapeError: points and normals do not fit.
        DataError: a valid point is not finite.
    """
    check_shapes(points=(points, "B N 3"), normals=(normals, "B N 3"))
    valid = valid_rows(points, valid, "points")
    near = ball_neighbours(points.double(), points.double(), radius, max_neighbours, valid=valid, queries_valid=valid)
    features = [_fpfh_cloud(*cloud) for cloud in zip(points.double(), normals.double(), *near)]
    return torch.stack(features).to(points.dtype) if features else points.new_zeros(*points.shape[:2], 3 * BINS)


def _as_solved(covariance: Tensor, values: Tensor, axes: Tensor) -> Tensor:
    """The smallest axis (..., 3) with the sign of Eberly's "A Robust Eigensolver for 3x3 Symmetric Matrices" (2014).

    The solver starts from the eigenvalue farthest from the other two. On a surface that is the smallest, and its vector
    is a cross product of two rows of A - lambda I, those with the longest product. On a line it is the largest; the
    middle vector is then found in the plane across it, spanned by U and V, and the normal is a cross product of both.

    Args:
        covariance: A (..., 3, 3).
        values: Ascending, (..., 3).
        axes: The eigenvectors as columns, of any sign, (..., 3, 3).
    """
    smallest, middle, largest = axes.unbind(-1)
    w = _cross_signed(largest)
    x, y, z = w.unbind(-1)
    zero = torch.zeros_like(x)
    U = torch.where((x.abs() > y.abs())[..., None], torch.stack([-z, zero, x], -1), torch.stack([zero, z, -y], -1))
    U = F.normalize(U, dim=-1)
    V = torch.linalg.cross(w, U)
    a = _dot(U, (covariance @ U[..., None])[..., 0]) - values[..., 1:2]  # A - lambda I in the basis U, V: a b; b c
    b = _dot(U, (covariance @ V[..., None])[..., 0])
    c = _dot(V, (covariance @ V[..., None])[..., 0]) - values[..., 1:2]
    by_first_row = a.abs() >= c.abs()  # middle = b U - a V, otherwise c U - b V; the larger coefficient made positive
    along_u = torch.where(by_first_row, b.abs() > a.abs(), c.abs() >= b.abs())
    turned = torch.where(along_u, _dot(middle, U), -_dot(middle, V))
    on_a_line = torch.linalg.cross(torch.where(turned < 0, -middle, middle), w)
    surface = values[..., 1:2] > values.mean(-1, keepdim=True)
    return torch.where(surface, _cross_signed(smallest), on_a_line)


def _cross_signed(vector: Tensor) -> Tensor:
    """Unit vectors (..., 3) with the sign of the longest cross product of two rows: the largest of +x, -y, +z."""
    largest = vector.abs().argmax(-1, keepdim=True)
    sign = vector.new_tensor([1.0, -1.0, 1.0])[largest]
    return torch.where(sign * vector.gather(-1, largest) < 0, -vector, vector)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)


def _fpfh_cloud(points: Tensor, normals: Tensor, index: Tensor, squared: Tensor, found: Tensor) -> Tensor:
    """One cloud (N, 3), float64, whose first neighbour slot is the point itself (or a copy of it)."""
    index, squared, found = index[:, 1:], squared[:, 1:], found[:, 1:]  # N k
    axes, normal_axes = points.T.contiguous(), F.normalize(normals).T.contiguous()  # 3 N
    block = max(1, _PAIRS // max(1, index.shape[1])) if points.device.type == "cpu" else len(points)
    blocks = zip(torch.arange(len(points), device=index.device).split(block), index.split(block), found.split(block))
    simple = torch.cat([_simple_histograms(axes, normal_axes, *part) for part in blocks])  # N 33
    weight = torch.where(found & (squared > 0), 1 / squared, 0)
    weight /= weight.sum(1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)
    return simple + F.embedding_bag(index, simple, mode="sum", per_sample_weights=weight)  # Eq. 2


def _simple_histograms(axes: Tensor, normal_axes: Tensor, rows: Tensor, index: Tensor, found: Tensor) -> Tensor:
    """S (n, 33) of the points `rows` (n,) with their neighbours `index` (n, k) where `found`."""
    bins = _pair_bins(axes, normal_axes, rows, index)  # 3 n k
    histogram = 3 * BINS * torch.arange(len(rows), device=index.device)[:, None]  # n 1
    places = [(histogram + BINS * block + code).flatten() for block, code in enumerate(bins)]
    if not bool(found.all()):  # as a rule every ball is full, and picking costs as much as counting
        places = [place[found.flatten()] for place in places]
    counts = torch.bincount(torch.cat(places), minlength=3 * BINS * len(rows)).view(len(rows), 3 * BINS)
    return counts * (100 / found.sum(1, keepdim=True).clamp(min=1).double())


def _pair_bins(axes: Tensor, normal_axes: Tensor, rows: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The bins of theta, alpha and phi (Eq. 1), (n, k) int64 each, of the pairs of `rows` with `index`."""
    ex, ey, ez = (axis[index] - axis[rows, None] for axis in axes)
    ax, ay, az = (axis[rows, None] for axis in normal_axes)  # n_1, n 1
    bx, by, bz = (axis[index] for axis in normal_axes)  # n_2, n k
    length = (ex * ex + ey * ey + ez * ez).sqrt_()
    apart = length > 0
    inverse = 1 / torch.where(apart, length, 1)
    phi_1 = (ax * ex + ay * ey + az * ez) * inverse
    phi_2 = (bx * ex + by * ey + bz * ez) * inverse
    cosine = ax * bx + ay * by + az * bz
    triple = (ex * (ay * bz - az * by) + ey * (az * bx - ax * bz) + ez * (ax * by - ay * bx)) * inverse
    swap = phi_1.abs() < phi_2.abs()  # the second point is the source, and looks back along -e
    phi, psi = torch.where(swap, -phi_2, phi_1), torch.where(swap, -phi_1, phi_2)
    squared_sine = 1 - phi * phi
    defined = apart & (squared_sine > 0)
    s = torch.where(defined, squared_sine, 1).sqrt_()
    theta = torch.atan2((psi - phi * cosine) / s, cosine)
    values = ((theta + math.pi) / (2 * math.pi), (triple / s + 1) / 2, (phi + 1) / 2)
    middle = BINS // 2  # the bin of an angle of 0
    theta_bin, alpha_bin, phi_bin = (
        torch.where(defined, (BINS * value).floor_().long().clamp_(0, BINS - 1), middle) for value in values
    )
    return theta_bin, alpha_bin, phi_bin
