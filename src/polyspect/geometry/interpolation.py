"""From group features to points and patches: inverse-distance interpolation and pooling, as sparse linear maps.

A point p takes the features h of its three nearest group centres c_1, c_2, c_3:

    a_i = 1 / (|p - c_i|^2 + eps),      h(p) = sum_i a_i h_i / sum_i a_i                                          (1)

with eps = 1e-8 in the square of the cloud's unit (Qi et al., "PointNet++", NeurIPS 2017, Eq. 2, with squared distances;
M3DM's code does this where its paper, Eq. 1, prints a sum over all centres). To reach patches, M3DM, CMDIAD and CFM
write h(p) into a zero image at the pixel of p, average 3x3 windows (stride 1, no padding) and pool adaptively to h x w:

    patches = A_adaptive A_window S W h                                                                           (2)

Every factor is linear and none depends on h, so the product is built once per cloud, as a sparse (h*w, G) matrix, and
the C x H x W image never exists. Both poolings are separable: rows are pooled first, equal entries are merged, then
columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ..errors import ConfigError, DataError
from ..samples import check_shapes
from .neighbours import nearest_neighbours


@dataclass(frozen=True, eq=False)
class LinearMap:
    """A sparse matrix per cloud of a batch, row after row (compressed rows of the block-diagonal matrix).

    Attributes:
        batch: B.
        rows: Rows per cloud, R.
        columns: Columns per cloud, G.
        offset: (B*R + 1,) int64; row r has the entries ``offset[r]`` to ``offset[r + 1]``.
        column: (entries,) int64, ``b * G + column``.
        weight: (entries,).
    """

    batch: int
    rows: int
    columns: int
    offset: Tensor
    column: Tensor
    weight: Tensor

    def apply(self, features: Tensor) -> Tensor:
        """Map features (B, G, C) to (B, R, C). Differentiable in the features; the same bits in every run."""
        check_shapes(features=(features, f"{self.batch} {self.columns} C"))
        C = features.shape[-1]
        flat = F.embedding_bag(
            self.column,
            features.reshape(self.batch * self.columns, C),
            self.offset,
            mode="sum",
            per_sample_weights=self.weight.to(features.dtype),
            include_last_offset=True,
        )
        return flat.view(self.batch, self.rows, C)

    def dense(self) -> Tensor:
        """The matrices, (B, R, G)."""
        row = torch.repeat_interleave(self.offset.diff())
        matrix = self.weight.new_zeros(self.batch * self.rows, self.columns)
        matrix.index_put_((row, self.column % self.columns), self.weight, accumulate=True)
        return matrix.view(self.batch, self.rows, self.columns)

    def to(self, device: torch.device | str) -> LinearMap:
        """The same map on another device."""
        tensors = (tensor.to(device) for tensor in (self.offset, self.column, self.weight))
        return LinearMap(self.batch, self.rows, self.columns, *tensors)


def interpolation_weights(
    points: Tensor,
    centres: Tensor,
    *,
    neighbours: int = 3,
    epsilon: float = 1e-8,
    valid: Tensor | None = None,
    centres_valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The centres that each point listens to, nearest first, and how much (Eq. 1).

    Args:
        points: (B, N, 3).
        centres: (B, G, 3), the same unit.
        neighbours: k, how many centres; all of them where there are fewer.
        epsilon: Added to squared distances, in the square of the unit.
        valid: (B, N) bool; other points get weights of 0.
        centres_valid: (B, G) bool; other centres are not listened to.

    Returns:
        Rows of `centres`, (B, N, k) int64, and weights (B, N, k) in the dtype of the points: in 0..1, sum 1.

    Raises:
        ConfigError: `neighbours` is below 1 or `epsilon` not above 0.
        DataError: a cloud with points has no centre, or (with `centres_valid`) fewer than k; a valid point is not
            finite.
    """
    if not epsilon > 0:
        raise ConfigError(f"`epsilon` of the interpolation must be above 0, got {epsilon}")
    k = min(neighbours, centres.shape[1]) if centres.shape[1] else neighbours
    # float64 from here: a point next to its centre has a squared distance far below float32's steps
    near = nearest_neighbours(points.double(), centres.double(), k, valid=centres_valid, queries_valid=valid)
    closeness = 1 / (near.squared_distance + epsilon)  # B N k; 0 for padding, infinitely far
    weight = closeness / closeness.sum(-1, keepdim=True).clamp(min=torch.finfo(closeness.dtype).tiny)
    return near.rows, weight.to(points.dtype)


def interpolation_map(
    points: Tensor,
    centres: Tensor,
    *,
    neighbours: int = 3,
    epsilon: float = 1e-8,
    valid: Tensor | None = None,
    centres_valid: Tensor | None = None,
) -> LinearMap:
    """`interpolation_weights` as a map from group features (B, G, C) to points (B, N, C); 0 for padded points."""
    index, weight = interpolation_weights(
        points, centres, neighbours=neighbours, epsilon=epsilon, valid=valid, centres_valid=centres_valid
    )
    B, N, k = index.shape
    G = centres.shape[1]
    if valid is None:
        valid = torch.ones(B, N, dtype=torch.bool, device=index.device)
    offset = F.pad(k * valid.flatten().cumsum(0), (1, 0))
    column = index + G * torch.arange(B, device=index.device)[:, None, None]
    return LinearMap(B, N, G, offset, column[valid].flatten(), weight[valid].flatten())


def points_to_patches(
    pixels: Tensor,
    size: tuple[int, int],
    patches: tuple[int, int],
    *,
    window: int = 3,
    valid: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> LinearMap:
    """The map from point features (B, N, C) to patches (B, h*w, C), row-major: Eq. 2 without the interpolation.

    Args:
        pixels: (B, N) int64, the flat pixel ``row * W + column`` of each point; no pixel twice in a cloud.
        size: H, W of the image.
        patches: h, w. Coarser or finer than the image.
        window: Side of the averaged windows; 1 for none.
        valid: (B, N) bool; other points are left out.
        dtype: Of the weights.

    Raises:
        ConfigError: the window does not fit the image, or a patch grid is empty.
        DataError: a pixel lies outside the image.
    """
    B, N = pixels.shape
    index = torch.arange(N, device=pixels.device).expand(B, N)[..., None]
    weight = torch.ones(B, N, 1, dtype=dtype, device=pixels.device)
    return _pooled(index, weight, N, pixels, size, patches, window, valid)


def groups_to_patches(
    points: Tensor,
    centres: Tensor,
    pixels: Tensor,
    size: tuple[int, int],
    patches: tuple[int, int],
    *,
    window: int = 3,
    neighbours: int = 3,
    epsilon: float = 1e-8,
    valid: Tensor | None = None,
    centres_valid: Tensor | None = None,
) -> LinearMap:
    """The map from group features (B, G, C) to patches (B, h*w, C), row-major: the whole of Eq. 2 in one matrix.

    The weights of a patch add up to the share of measured pixels in its window: 1 inside the part, 0 in the background.

    Args:
        points: (B, N, 3).
        centres: (B, G, 3), the same unit.
        pixels, size, patches, window, valid: See `points_to_patches`.
        neighbours, epsilon, centres_valid: See `interpolation_weights`.

    Raises:
        ConfigError, DataError: as those two.
    """
    check_shapes(points=(points, "B N 3"), pixels=(pixels, "B N"))
    index, weight = interpolation_weights(
        points, centres, neighbours=neighbours, epsilon=epsilon, valid=valid, centres_valid=centres_valid
    )
    return _pooled(index, weight, centres.shape[1], pixels, size, patches, window, valid)


def pool_pixels(
    index: Tensor,
    weight: Tensor,
    columns: int,
    size: tuple[int, int],
    patches: tuple[int, int],
    *,
    window: int = 3,
) -> LinearMap:
    """The map of `groups_to_patches` from interpolation weights that are kept per pixel.

    Args:
        index: (B, H*W, k) int64, the groups that a pixel listens to.
        weight: (B, H*W, k), how much; 0 where a pixel has no point.
        columns: G, groups per cloud.
        size, patches, window: See `points_to_patches`.

    Raises:
        ConfigError: as `points_to_patches`.
        ShapeError: `index` and `weight` do not fit each other or the image.
    """
    H, W = size
    check_shapes(index=(index, f"B {H * W} k"), weight=(weight, f"B {H * W} k"))
    pixels = torch.arange(H * W, device=index.device).expand(len(index), -1)
    return _pooled(index, weight, columns, pixels, size, patches, window, None)


def pool_pixels_at(
    index: Tensor,
    weight: Tensor,
    columns: int,
    size: tuple[int, int],
    patches: tuple[int, int],
    rows: Tensor,
    *,
    window: int = 3,
) -> LinearMap:
    """Some rows of the map of `pool_pixels`, of one cloud: where patches are as fine as pixels and few are wanted.

    Args:
        index: (H*W, k) int64 or int16, the groups that a pixel listens to.
        weight: (H*W, k), how much; 0 where a pixel has no point.
        columns: G, groups of the cloud.
        size, patches, window: See `points_to_patches`.
        rows: (R,) int64, the patches wanted, ``i * w + j``.

    Returns:
        The map from (1, G, C) to (1, R, C).

    Raises:
        ConfigError: as `points_to_patches`.
        ShapeError: `index` and `weight` do not fit each other or the image.
        DataError: a row lies outside the grid.
    """
    (H, W), (h, w), R = size, patches, len(rows)
    check_shapes(index=(index, f"{H * W} k"), weight=(weight, f"{H * W} k"), rows=(rows, "R"))
    if bool(((rows < 0) | (rows >= h * w)).any()):
        raise DataError(f"`rows` must be patches of a grid of {h}x{w}, 0 to {h * w - 1}, counted as row * w + column")
    y, y_share = _pixels_of_cells(rows // w, H, h, window)  # R m
    x, x_share = _pixels_of_cells(rows % w, W, w, window)  # R n
    pixel = (y[:, :, None] * W + x[:, None, :]).flatten(1)  # R m*n
    share = (y_share[:, :, None] * x_share[:, None, :]).flatten(1)
    value = (share[..., None] * weight[pixel]).flatten(1)  # R m*n*k
    column = torch.where(value > 0, index[pixel].flatten(1).int(), columns)
    column, order = column.sort(dim=1, stable=True)
    total = F.pad(value.gather(1, order).cumsum(1), (1, 0))  # equal columns of a row are neighbours now
    last = F.pad(column[:, 1:] != column[:, :-1], (0, 1), value=True)
    kept = last & (column < columns)
    row, place = kept.nonzero().unbind(1)
    end = total[row, place + 1]
    start = F.pad(end[:-1], (1, 0))  # where the entry before ended, if it is of this row
    begins = F.pad(row[1:] != row[:-1], (1, 0), value=True)
    value = torch.where(begins[: len(row)], end, end - start)
    offset = F.pad(kept.sum(1).cumsum(0), (1, 0))
    return LinearMap(1, R, columns, offset, column[row, place].long(), value.to(weight.dtype))


def enlarge_at(grid: tuple[int, int], size: tuple[int, int], rows: Tensor) -> LinearMap:
    """Some rows of bilinear interpolation (corners not aligned) from a grid h x w to H x W pixels.

    Args:
        grid: h, w.
        size: H, W.
        rows: (R,) int64, the pixels wanted, ``row * W + column``.

    Returns:
        The map from (1, h*w, C) to (1, R, C).
    """
    (h, w), (H, W) = grid, size
    y, y_share = _bilinear(rows // W, H, h)  # R 2
    x, x_share = _bilinear(rows % W, W, w)
    column = (y[:, :, None] * w + x[:, None, :]).flatten()
    weight = (y_share[:, :, None] * x_share[:, None, :]).flatten()
    offset = 4 * torch.arange(len(rows) + 1, device=rows.device)
    return LinearMap(1, len(rows), h * w, offset, column, weight.float())


def _bilinear(position: Tensor, size: int, cells: int) -> tuple[Tensor, Tensor]:
    """The two cells between which each position (R,) along an axis lies, and their shares: (R, 2) each."""
    place = ((position.double() + 0.5) * cells / size - 0.5).clamp(0, cells - 1)
    low = place.floor()
    beyond = place - low
    cell = torch.stack([low, (low + 1).clamp(max=cells - 1)], 1).long()
    return cell, torch.stack([1 - beyond, beyond], 1)


def _pooled(
    index: Tensor,
    weight: Tensor,
    columns: int,
    pixels: Tensor,
    size: tuple[int, int],
    patches: tuple[int, int],
    window: int,
    valid: Tensor | None,
) -> LinearMap:
    """Pool the sparse image whose pixel ``pixels[b, n]`` is the sum of `weight` times column `index`, (B, N, k)."""
    (H, W), (h, w), (B, N, k) = size, patches, index.shape
    if valid is None:
        valid = torch.ones_like(pixels, dtype=torch.bool)
    check_shapes(pixels=(pixels, "B N"), index=(index, "B N k"), valid=(valid, "B N"))
    outside = valid & ((pixels < 0) | (pixels >= H * W))
    if outside.any():
        b, n = outside.nonzero()[0].tolist()
        raise DataError(
            f"point {n} of cloud {b} has pixel {int(pixels[b, n])}, but an image of {H}x{W} has pixels 0 to "
            f"{H * W - 1}; pixels are counted as row * W + column"
        )
    kept = valid[..., None] & (weight > 0)  # B N k
    cloud = torch.arange(B, device=pixels.device)[:, None, None].expand(B, N, k)[kept]  # entries
    pixel = pixels[..., None].expand(B, N, k)[kept]
    column, value = index[kept], weight[kept].double()

    cells, share = _pool_axis(pixel // W, H, h, window)  # entries m
    key = (((cloud[:, None] * h + cells) * W + (pixel % W)[:, None]) * columns) + column[:, None]
    key, value = _merge(key[share > 0], (share * value[:, None])[share > 0])

    place, column = key // columns, key % columns  # place: (b * h + i) * W + x
    cells, share = _pool_axis(place % W, W, w, window)
    key = ((place // W)[:, None] * w + cells) * columns + column[:, None]
    key, value = _merge(key[share > 0], (share * value[:, None])[share > 0])

    starts = torch.arange(B * h * w + 1, device=key.device) * columns
    row = key // columns  # b * h * w + i * w + j
    return LinearMap(
        B,
        h * w,
        columns,
        torch.searchsorted(key, starts),
        row // (h * w) * columns + key % columns,
        value.to(weight.dtype),
    )


def _pool_axis(position: Tensor, size: int, cells: int, window: int) -> tuple[Tensor, Tensor]:
    """Which cells each position (n,) along an axis reaches, and its share in them: (n, m) each, share 0 where none.

    Cell i is the mean over the window means i L / cells (rounded down) to (i + 1) L / cells (rounded up), of the
    L = size - window + 1 there are.
    """
    table = _pooling(size, cells, window)
    pixel = np.arange(size)
    first = (table > 0).argmax(axis=0)  # the cells that a pixel reaches are neighbours
    reach = first[:, None] + np.arange(int((table > 0).sum(axis=0).max()))  # size m
    share = np.where(reach < cells, table[np.minimum(reach, cells - 1), pixel[:, None]], 0)
    return tuple(torch.from_numpy(part).to(position.device)[position] for part in (reach, share))  # type: ignore[return-value]


def _pixels_of_cells(cell: Tensor, size: int, cells: int, window: int) -> tuple[Tensor, Tensor]:
    """The positions along an axis that each cell (n,) averages, and their shares: (n, m) each, share 0 where none."""
    table = _pooling(size, cells, window)
    first = (table > 0).argmax(axis=1)  # the pixels of a cell are neighbours
    reach = np.minimum(first[:, None] + np.arange(int((table > 0).sum(axis=1).max())), size - 1)  # cells m
    share = np.take_along_axis(table, reach, axis=1)
    share[:, 1:] *= reach[:, 1:] > reach[:, :-1]  # the last pixel counts once
    return tuple(torch.from_numpy(part).to(cell.device)[cell] for part in (reach, share))  # type: ignore[return-value]


@lru_cache(maxsize=16)
def _pooling(size: int, cells: int, window: int) -> NDArray[np.float64]:
    """The matrix (cells, size) of pooling along an axis, see `_pool_axis`; read only."""
    L = size - window + 1
    if L < 1 or window < 1 or cells < 1:
        raise ConfigError(
            f"{size} pixels cannot be averaged in windows of {window} and pooled to {cells} patches; "
            "the window must fit the image and all must be at least 1"
        )
    i, j = np.arange(cells)[:, None], np.arange(L)
    low, high = i * L // cells, -(-(i + 1) * L // cells)
    adaptive = ((low <= j) & (j < high)) / (high - low)  # cells L
    start, pixel = np.arange(L)[:, None], np.arange(size)
    means = ((start <= pixel) & (pixel < start + window)) / window  # L size
    table: NDArray[np.float64] = adaptive @ means
    table.flags.writeable = False
    return table


def _merge(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Sort entries by key and add up those with the same one, in their order (no atomics: the same bits every time)."""
    key, order = key.sort(stable=True)
    key, counts = key.unique_consecutive(return_counts=True)
    offset = F.pad(counts.cumsum(0), (1, 0))
    total = F.embedding_bag(order, value[:, None], offset, mode="sum", include_last_offset=True)
    return key, total[:, 0]
