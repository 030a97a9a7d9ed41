"""Hand-made descriptors of depth images on a grid: raw values, oriented gradients (HOG), dense SIFT. In torch.

    hog     [n_1 .. n_8] of a cell, n_k the sum of gradient magnitudes in orientation sector k, clipped and scaled   (1)
    sift    16 spatial bins x 8 directions around every pixel, clipped and scaled, then the root of the L1 shares    (2)

HOG: Dalal and Triggs, "Histograms of Oriented Gradients for Human Detection" (CVPR 2005), with unsigned orientations,
one cell per block and the block norm L2-Hys, as scikit-image computes it. SIFT: Lowe, "Distinctive Image Features from
Scale-Invariant Keypoints" (IJCV 2004), Sec. 6, without turning or weighting the window; its root: Arandjelovic and
Zisserman, "Three things everyone should know to improve object retrieval" (CVPR 2012). BTF ("Back to the Feature",
CVPR-W 2023) runs all of them on the z channel of organised clouds.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import ShapeError
from ..samples import check_shapes

CELL = 8  # pixels per side of a cell of `raw_rows`, `raw_blocks` and `hog`
ORIENTATIONS = 8
SPATIAL_BINS = 4  # per side of a SIFT window
CLIP = 0.2  # of L2-normalised histograms, before they are normalised again


def raw_rows(image: Tensor) -> Tensor:
    """The image cut into runs of 64 values in raster order: (B, 1, H, W) -> (B, 64, H / 8, W / 8).

    What BTF's code calls raw: cell (i, j) of the grid holds the run of that number, which is a piece of a row or two,
    not the pixels under the cell. `raw_blocks` holds those.

    Raises:
        ShapeError: H or W is no multiple of 8.
    """
    B, h, w = _grid(image)
    return image.reshape(B, h, w, CELL**2).movedim(-1, 1)


def raw_blocks(image: Tensor) -> Tensor:
    """The 8 x 8 pixels under each cell, row by row: (B, 1, H, W) -> (B, 64, H / 8, W / 8).

    Raises:
        ShapeError: H or W is no multiple of 8.
    """
    _grid(image)
    return F.pixel_unshuffle(image, CELL)


def hog(image: Tensor, *, epsilon: float = 1e-5) -> Tensor:
    """Histograms of oriented gradients of 8 x 8 cells: (B, 1, H, W) -> (B, 8, H // 8, W // 8), Eq. 1.

    Gradients are differences of the two neighbours, 0 in the first and last row (down) and column (across). A pixel
    counts with its magnitude, in the one of 8 sectors of 0..180 degrees that holds its direction, the means over the
    cell. The histogram is divided by its norm, sqrt(|v|^2 + epsilon^2), clipped at 0.2, and divided by its norm again.
    Rows and columns that fill no cell are left out.

    Args:
        image: (B, 1, H, W); gradients well below `epsilon` give histograms near 0.
        epsilon: In the unit of the image.

    Raises:
        ShapeError: the image is smaller than one cell.
    """
    check_shapes(image=(image, "B 1 H W"))
    if min(image.shape[-2:]) < CELL:
        raise ShapeError(f"an image of {image.shape[3]}x{image.shape[2]} pixels holds no cell of {CELL}x{CELL}")
    x = image.double()
    down = F.pad(x[:, :, 2:] - x[:, :, :-2], (0, 0, 1, 1))  # B 1 H W
    across = F.pad(x[..., 2:] - x[..., :-2], (1, 1))
    degrees = torch.rad2deg(torch.atan2(down, across)).remainder(180.0)
    sector = (degrees * (ORIENTATIONS / 180)).floor().long().clamp(0, ORIENTATIONS - 1)
    votes = torch.zeros_like(x).repeat(1, ORIENTATIONS, 1, 1).scatter_(1, sector, torch.hypot(down, across))
    histogram = F.avg_pool2d(votes, CELL)  # B 8 h w
    for clip in (CLIP, math.inf):
        histogram = histogram / (histogram.square().sum(1, keepdim=True) + epsilon**2).sqrt()
        histogram = histogram.clamp(max=clip)
    return histogram.to(image.dtype)


def dense_sift(image: Tensor, *, bin_size: int = 4, step: int = 1, epsilon: float = 1e-10) -> Tensor:
    """A rootSIFT descriptor of every pixel: (B, 1, H, W) -> (B, 128, H, W), Eq. 2.

    The magnitude of a pixel's gradient (half the difference of its neighbours; beyond the border the image is its edge)
    is shared between the two of 8 directions that it lies between. A spatial bin adds up the `bin_size` pixels around
    it per side with weights that fall linearly from its centre. 4 x 4 bins, `step` pixels apart, make up the window.
    The descriptor is divided by its norm, clipped at 0.2, divided again, and becomes sqrt(share of its sum + epsilon).

    Args:
        image: (B, 1, H, W).
        bin_size: Pixels per side that a spatial bin adds up, even.
        step: Pixels between bins. 1, as kornia and so BTF's code have it: the bins overlap and the window reaches
            ``bin_size + 3`` pixels; `bin_size` is Lowe's window of bins side by side. The bin in row and column 1
            (counted from 0) of the window lies half a pixel above and to the left of the pixel.
        epsilon: Added to squared magnitudes, in the square of the image's unit, so that a flat place has a magnitude of
            1e-5 (in direction 0), and under the last root.

    Returns:
        Channel ``16 * direction + 4 * row + column``; nonnegative, the squares of each pixel add up to 1.
    """
    check_shapes(image=(image, "B 1 H W"))
    H, W = image.shape[-2:]
    edged = F.pad(image, (1, 1, 1, 1), mode="replicate")
    across = (edged[:, :, 1:-1, 2:] - edged[:, :, 1:-1, :-2]) / 2  # B 1 H W
    down = (edged[:, :, 2:, 1:-1] - edged[:, :, :-2, 1:-1]) / 2
    magnitude = (across.square() + down.square() + epsilon).sqrt()
    turn = torch.atan2(down, across).remainder(2 * math.pi) * (ORIENTATIONS / (2 * math.pi))
    first = turn.floor()
    upper = (turn - first) * magnitude
    votes = torch.zeros_like(image).repeat(1, ORIENTATIONS, 1, 1)
    votes.scatter_(1, first.long() % ORIENTATIONS, magnitude - upper)
    votes.scatter_add_(1, (first.long() + 1) % ORIENTATIONS, upper)

    profile = bin_size / 2 - (torch.arange(bin_size) + 0.5 - bin_size / 2).abs()
    weight = (torch.outer(profile, profile) / (bin_size / 2) ** 2).to(votes)
    around = bin_size // 2
    bins = F.conv2d(votes, weight.expand(ORIENTATIONS, 1, -1, -1), padding=around, groups=ORIENTATIONS)  # B 8 H+1 W+1
    reach = (SPATIAL_BINS - 1) * step  # from the first bin of a window to the last
    lead = reach // 2  # bins before the pixel
    padded = F.pad(bins, (lead, reach - lead, lead, reach - lead))
    places = [(step * i, step * j) for i in range(SPATIAL_BINS) for j in range(SPATIAL_BINS)]
    windows = torch.stack([padded[..., i : i + H, j : j + W] for i, j in places], 2).flatten(1, 2)  # B 128 H W

    unit = F.normalize(F.normalize(windows, dim=1).clamp(max=CLIP), dim=1)
    return (F.normalize(unit, p=1, dim=1) + epsilon).sqrt()


def _grid(image: Tensor) -> tuple[int, int, int]:
    """B and the number of cells down and across."""
    sizes = check_shapes(image=(image, "B 1 H W"))
    if sizes["H"] % CELL or sizes["W"] % CELL:
        raise ShapeError(
            f"an image of {sizes['W']}x{sizes['H']} pixels cannot be cut into cells of {CELL}x{CELL}: resize it to "
            f"multiples of {CELL}"
        )
    return sizes["B"], sizes["H"] // CELL, sizes["W"] // CELL
