"""Descriptors of depth images: hand-made cells, plain-loop twins, invariances, other programs where installed."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from polyspect.errors import ShapeError
from polyspect.geometry.descriptors import dense_sift, hog, raw_blocks, raw_rows


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ramp(size: int, angle: float) -> Tensor:
    """A plane that rises by 1 per pixel in direction `angle` (degrees, from right towards down), (1, 1, S, S)."""
    y, x = torch.meshgrid(*2 * (torch.arange(size).double(),), indexing="ij")
    return (x * math.cos(math.radians(angle)) + y * math.sin(math.radians(angle)))[None, None]


# -- raw -------------------------------------------------------------------------------------------------------------


def test_raw_rows_are_runs_and_raw_blocks_are_blocks():
    image = torch.arange(16 * 24.0).view(1, 1, 16, 24)
    rows, blocks = raw_rows(image), raw_blocks(image)
    assert rows.shape == blocks.shape == (1, 64, 2, 3)
    assert rows[0, :, 1, 0].tolist() == list(range(3 * 64, 4 * 64))
    assert blocks[0, :, 1, 2].tolist() == image[0, 0, 8:, 16:].flatten().tolist()


@pytest.mark.parametrize("descriptor", [raw_rows, raw_blocks])
def test_images_that_cannot_be_cut_are_refused(descriptor):
    with pytest.raises(ShapeError, match="20x16 pixels"):
        descriptor(torch.zeros(1, 1, 16, 20))


# -- HOG -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("angle", "sector"), [(0, 0), (10, 0), (50, 2), (100, 4), (179, 7), (190, 0), (350, 7)])
def test_a_ramp_has_one_sector(angle: float, sector: int):
    cell = hog(ramp(24, angle))[0, :, 1, 1]  # the middle cell sees no border
    assert_close(cell, torch.eye(8, dtype=torch.float64)[sector], rtol=0, atol=1e-8)


def test_gradients_are_zero_across_the_border():
    cell = hog(ramp(8, 50))[0, :, 0, 0]
    # corners have none, the 12 pixels of two edges only the step along the border (0 degrees), those of the others only
    # the one down (90 degrees), and the 36 inside both
    votes = torch.zeros(8, dtype=torch.float64)
    votes[0], votes[4], votes[2] = 12 * math.cos(math.radians(50)), 12 * math.sin(math.radians(50)), 36
    clipped = (votes / votes.norm()).clamp(max=0.2)
    assert_close(cell, clipped / clipped.norm(), rtol=0, atol=1e-6)


def hog_in_loops(image: Tensor, epsilon: float = 1e-5) -> Tensor:
    H, W = image.shape
    result = torch.zeros(8, H // 8, W // 8, dtype=torch.float64)
    for y in range(H // 8 * 8):
        for x in range(W // 8 * 8):
            down = float(image[y + 1, x] - image[y - 1, x]) if 0 < y < H - 1 else 0.0
            across = float(image[y, x + 1] - image[y, x - 1]) if 0 < x < W - 1 else 0.0
            sector = int(math.degrees(math.atan2(down, across)) % 180 // 22.5)
            result[sector, y // 8, x // 8] += math.hypot(down, across) / 64
    for i in range(H // 8):
        for j in range(W // 8):
            v = result[:, i, j]
            v = (v / math.sqrt(float(v @ v) + epsilon**2)).clamp(max=0.2)
            result[:, i, j] = v / math.sqrt(float(v @ v) + epsilon**2)
    return result


@pytest.mark.parametrize("scale", [1.0, 1e-5])
def test_hog_equals_its_definition_in_loops(scale: float):
    image = scale * random(2, 1, 24, 21)
    expected = torch.stack([hog_in_loops(part[0]) for part in image])
    assert_close(hog(image), expected, rtol=0, atol=1e-9)
    assert_close(hog(image.float()), expected.float(), rtol=0, atol=1e-4)


def test_hog_equals_scikit_image():
    skimage = pytest.importorskip("skimage.feature", reason="compares with scikit-image, which is not installed")
    image = random(1, 1, 40, 67)
    expected = skimage.hog(image[0, 0].numpy(), orientations=8, pixels_per_cell=(8, 8), cells_per_block=(1, 1))
    assert_close(hog(image)[0].movedim(0, -1).flatten(), torch.from_numpy(expected), rtol=0, atol=1e-6)


def test_hog_of_a_flat_image_is_zero_and_an_image_below_one_cell_is_refused():
    assert not hog(torch.full((1, 1, 16, 16), 0.5)).any()
    with pytest.raises(ShapeError, match="no cell"):
        hog(torch.zeros(1, 1, 7, 30))


# -- SIFT ------------------------------------------------------------------------------------------------------------


def sift_in_loops(image: Tensor, y: int, x: int, step: int, epsilon: float = 1e-10) -> Tensor:
    """The descriptor of one pixel of (H, W)."""
    H, W = image.shape
    result = torch.zeros(8, 4, 4, dtype=torch.float64)
    lead = 3 * step // 2
    for row in range(4):
        for column in range(4):
            # the bin whose four pixels per side begin here
            top, left = y - 2 + step * row - lead, x - 2 + step * column - lead
            if not (0 <= top + 2 <= H and 0 <= left + 2 <= W):
                continue  # beyond the pooled map there is nothing
            for dy, wy in enumerate((0.25, 0.75, 0.75, 0.25)):
                for dx, wx in enumerate((0.25, 0.75, 0.75, 0.25)):
                    i, j = top + dy, left + dx
                    if not (0 <= i < H and 0 <= j < W):
                        continue
                    across = float(image[i, min(j + 1, W - 1)] - image[i, max(j - 1, 0)]) / 2
                    down = float(image[min(i + 1, H - 1), j] - image[max(i - 1, 0), j]) / 2
                    magnitude = math.sqrt(across**2 + down**2 + epsilon)
                    turn = math.degrees(math.atan2(down, across)) % 360 / 45
                    low = math.floor(turn)
                    result[low % 8, row, column] += wy * wx * magnitude * (1 - (turn - low))
                    result[(low + 1) % 8, row, column] += wy * wx * magnitude * (turn - low)
    v = result.flatten()
    v = (v / v.norm()).clamp(max=0.2)
    return (v / v.sum() + epsilon).sqrt()


@pytest.mark.parametrize("step", [1, 4])
def test_sift_equals_its_definition_in_loops(step: int):
    image = random(1, 1, 20, 17, seed=step)
    result = dense_sift(image, step=step)
    assert result.shape == (1, 128, 20, 17)
    for y, x in ((0, 0), (1, 3), (9, 8), (19, 16), (17, 2)):
        assert_close(result[0, :, y, x], sift_in_loops(image[0, 0], y, x, step), rtol=0, atol=1e-9)


def test_sift_of_a_ramp_shares_two_directions():
    inside = dense_sift(ramp(20, 65))[0, :, 8:12, 8:12]
    shares = inside.square().view(8, 16, -1).sum(1)  # per direction: 65 degrees are 4/9 of the way from 45 to 90
    expected = torch.zeros(8, dtype=torch.float64)
    expected[1], expected[2] = 5 / 9, 4 / 9
    assert_close(shares, expected[:, None].expand(8, 16), rtol=0, atol=1e-6)


def test_a_flat_place_looks_like_direction_zero():
    flat = dense_sift(torch.full((1, 1, 16, 16), 0.5))[0, :, 8, 8].view(8, 16)
    assert_close(flat[0], torch.full((16,), 0.25), rtol=0, atol=1e-4)
    assert float(flat[1:].max()) < 1e-4


def test_sift_forgets_offset_and_contrast():
    image = random(1, 1, 16, 16)
    assert_close(dense_sift(3 * image + 2), dense_sift(image), rtol=0, atol=1e-6)
    assert_close(dense_sift(image).square().sum(1), torch.ones(1, 16, 16, dtype=torch.float64), rtol=0, atol=1e-6)


def test_sift_equals_kornia():
    kornia = pytest.importorskip("kornia.feature", reason="compares with kornia, which is not installed")
    descriptor = kornia.DenseSIFTDescriptor()
    descriptor.PoolingConv.dilation = (1, 1)  # bins one pixel apart, as in the version that BTF's code has
    image = 0.01 * random(2, 1, 40, 30)
    with torch.no_grad():
        expected = descriptor.double()(image)
    assert_close(dense_sift(image), expected, rtol=0, atol=1e-6)
