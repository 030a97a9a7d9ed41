"""Interpolation and pooling as sparse maps: hand weights, the dense chain written out, padding, stored outputs."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from polyspect.errors import ConfigError, DataError, ShapeError
from polyspect.geometry.interpolation import (
    LinearMap,
    enlarge_at,
    groups_to_patches,
    interpolation_map,
    interpolation_weights,
    points_to_patches,
    pool_pixels,
    pool_pixels_at,
)
from polyspect.geometry.padding import pack_points, pad_clouds
from polyspect.geometry.sampling import farthest_points

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "reference" / "golden" / "03_interpolate_pool.npz"


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def organised(B: int = 2, H: int = 12, W: int = 9, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Bumpy clouds (B, 3, H, W) half a metre away, float64, and where they are measured."""
    y, x = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
    xyz = torch.stack([x * 1e-3, y * 1e-3, 0.5 + 0 * x]).double() + 2e-4 * random(B, 3, H, W, seed=seed)
    return xyz, random(B, H, W, seed=seed + 1) > -0.7


def interpolate_by_definition(points: Tensor, centres: Tensor, features: Tensor, k: int = 3) -> Tensor:
    """Eq. 1, point by point."""
    out = []
    for p in points:
        squared = (p - centres).square().sum(1)
        near = squared.argsort(stable=True)[:k]
        a = 1 / (squared[near] + 1e-8)
        out.append((a[:, None] * features[near]).sum(0) / a.sum())
    return torch.stack(out)


def pool_by_definition(values: Tensor, pixels: Tensor, size: tuple[int, int], patches: tuple[int, int], window: int):
    """Zero image, 3x3 means, adaptive pooling: what published code does with C x H x W numbers."""
    image = values.new_zeros(values.shape[1], size[0] * size[1])
    image[:, pixels] = values.T
    means = F.avg_pool2d(image.view(1, -1, *size), window, stride=1)
    return F.adaptive_avg_pool2d(means, patches)[0].flatten(1).T


def test_weights_worked_out_by_hand():
    centres = 1e-3 * torch.tensor([[10.0, 0, 0], [1, 0, 0], [0, 2, 0], [0, 0, 3]])[None]
    rows, weights = interpolation_weights(torch.zeros(1, 1, 3), centres)
    assert rows.tolist() == [[[1, 2, 3]]]
    assert_close(weights, torch.tensor([[[0.733155, 0.184660, 0.082185]]]), rtol=0, atol=1e-6)


def test_one_and_two_centres():
    points = random(1, 5, 3)
    rows, weights = interpolation_weights(points, random(1, 1, 3, seed=1))
    assert rows.tolist() == [[[0]] * 5]
    assert weights.tolist() == [[[1.0]] * 5]
    _, weights = interpolation_weights(points, random(1, 2, 3, seed=1))
    assert_close(weights.sum(-1), torch.ones(1, 5))


def test_interpolation_equals_its_definition():
    points, centres, features = 1e-2 * random(2, 40, 3), 1e-2 * random(2, 11, 3, seed=1), random(2, 11, 4, seed=2)
    got = interpolation_map(points, centres).apply(features)
    for b in range(2):
        expected = interpolate_by_definition(points[b].double(), centres[b].double(), features[b].double())
        assert_close(got[b].double(), expected, rtol=0, atol=2e-6)
    assert_close(
        interpolation_map(points, centres, neighbours=5).apply(features)[0].double(),
        interpolate_by_definition(points[0].double(), centres[0].double(), features[0].double(), k=5),
        rtol=0,
        atol=2e-6,
    )


def test_constants_stay_and_a_centre_keeps_its_own_feature():
    xyz, valid = organised(B=1, H=30, W=30)
    points = pack_points(xyz, valid).points.float()
    chosen = farthest_points(points, 20)
    centres = points[:, chosen[0]]
    lift = interpolation_map(points, centres)
    assert_close(lift.apply(torch.ones(1, 20, 2)), torch.ones(1, points.shape[1], 2))
    _, weights = interpolation_weights(centres, centres)
    assert (weights[..., 0] > 0.97).all()
    rows, weights = interpolation_weights(points, centres)
    assert ((weights >= 0) & (weights <= 1)).all()
    lower, weights_lower = interpolation_weights(
        points - torch.tensor([0, 0, 0.5]), centres - torch.tensor([0, 0, 0.5])
    )
    assert (rows == lower).float().mean() > 0.999
    assert_close(weights_lower, weights, rtol=0, atol=1e-3)


SIZES = [((12, 9), (4, 3)), ((12, 9), (5, 7)), ((12, 9), (12, 9)), ((12, 9), (20, 11)), ((12, 9), (1, 1))]


@pytest.mark.parametrize("window", [3, 1])
@pytest.mark.parametrize(("size", "patches"), SIZES)
def test_groups_to_patches_is_the_whole_published_chain(size, patches, window):
    packed = pack_points(*organised(2, *size))
    centres = packed.points[:, farthest_points(packed.points, 8, valid=packed.valid)[0]]  # any points do
    features = random(2, 8, 5, seed=3).double()
    short = groups_to_patches(packed.points, centres, packed.pixels, size, patches, window=window, valid=packed.valid)
    lift = interpolation_map(packed.points, centres, valid=packed.valid)
    pool = points_to_patches(packed.pixels, size, patches, window=window, valid=packed.valid, dtype=torch.float64)
    for b, n in enumerate(packed.valid.sum(1)):
        values = interpolate_by_definition(packed.points[b, :n], centres[b], features[b])
        expected = pool_by_definition(values, packed.pixels[b, :n], size, patches, window)
        assert_close(short.apply(features)[b], expected, rtol=0, atol=1e-12)
        assert_close(pool.apply(lift.apply(features))[b], expected, rtol=0, atol=1e-12)
        share = pool_by_definition(values.new_ones(n, 1), packed.pixels[b, :n], size, patches, window)
        assert_close(short.dense()[b].sum(1, keepdim=True), share, rtol=0, atol=1e-12)
    assert not short.weight.isnan().any()
    key = torch.repeat_interleave(short.offset.diff()) * 16 + short.column
    assert (key.diff() > 0).all()  # sorted, nothing twice


def test_a_batch_is_its_clouds_and_padding_has_no_weight():
    xyz, valid = organised(3)
    packed = pack_points(xyz, valid)
    centres, centres_valid = pad_clouds([p[farthest_points(p[None], n)[0]] for p, n in zip(packed.points, (7, 5, 9))])
    features = random(3, 9, 4, seed=5).double()
    features[~centres_valid] = torch.nan  # nobody may read it
    masks = {"valid": packed.valid, "centres_valid": centres_valid}
    lift = interpolation_map(packed.points, centres, **masks).apply(features)
    assert (lift[~packed.valid] == 0).all()
    pooled = groups_to_patches(packed.points, centres, packed.pixels, (12, 9), (4, 4), **masks).apply(features)
    for b in range(3):
        n, g = int(packed.valid[b].sum()), int(centres_valid[b].sum())
        points, pixels, own = packed.points[b : b + 1, :n], packed.pixels[b : b + 1, :n], centres[b : b + 1, :g]
        alone = interpolation_map(points, own).apply(features[b : b + 1, :g])
        assert torch.equal(lift[b : b + 1, :n], alone)
        alone = groups_to_patches(points, own, pixels, (12, 9), (4, 4)).apply(features[b : b + 1, :g])
        assert torch.equal(pooled[b : b + 1], alone)


def test_a_cloud_without_points_gives_empty_patches():
    xyz, valid = organised(2)
    valid[1] = False
    packed = pack_points(xyz, valid)
    centres = packed.points[:, :4]
    pooled = groups_to_patches(packed.points, centres, packed.pixels, (12, 9), (4, 4), valid=packed.valid)
    assert (pooled.apply(torch.ones(2, 4, 3))[1] == 0).all()
    nothing = points_to_patches(packed.pixels, (12, 9), (4, 4), valid=torch.zeros_like(packed.valid))
    assert (nothing.apply(torch.ones(2, packed.points.shape[1], 3)) == 0).all()


def test_a_map_is_its_matrix_and_lets_gradients_through():
    offset, column = torch.tensor([0, 2, 2, 3, 5]), torch.tensor([0, 2, 4, 3, 5])
    sparse = LinearMap(2, 2, 3, offset, column, torch.tensor([1.0, 2, 3, 4, 5]))
    matrix = torch.tensor([[[1.0, 0, 2], [0, 0, 0]], [[0, 3, 0], [4, 0, 5]]])
    assert torch.equal(sparse.dense(), matrix)
    features = random(2, 3, 4).requires_grad_()
    assert_close(sparse.apply(features), matrix @ features)
    weights = random(2, 2, 4, seed=1)
    (sparse.apply(features) * weights).sum().backward()
    assert_close(features.grad, matrix.mT @ weights)
    assert_close(sparse.to("cpu").apply(features), matrix @ features)
    with pytest.raises(ShapeError, match="features"):
        sparse.apply(features[:1])


def test_errors_say_what_to_do():
    points, pixels = random(1, 4, 3), torch.tensor([[0, 1, 2, 12]])
    with pytest.raises(DataError, match=r"point 3 of cloud 0 has pixel 12, but an image of 3x4 .* row \* W"):
        points_to_patches(pixels, (3, 4), (2, 2))
    outside = torch.tensor([[True, True, True, False]])
    assert points_to_patches(pixels, (3, 4), (2, 2), valid=outside).rows == 4
    with pytest.raises(ConfigError, match="2 pixels cannot be averaged in windows of 3"):
        points_to_patches(pixels, (7, 2), (2, 2))
    with pytest.raises(ConfigError, match="must be above 0"):
        interpolation_weights(points, points, epsilon=0)
    with pytest.raises(ConfigError, match="at least 1 neighbour"):
        interpolation_weights(points, points, neighbours=0)
    with pytest.raises(DataError, match="cloud 0 has only 0"):
        interpolation_weights(points, points[:, :0])
    with pytest.raises(ShapeError, match="pixels"):
        groups_to_patches(points, points, pixels[:, :3], (4, 4), (2, 2))


def test_stored_interpolation_and_patches_of_m3dm():
    if not GOLDEN.is_file():
        pytest.skip(f"stored outputs are not here: {GOLDEN}")
    with np.load(GOLDEN) as archive:
        stored = {name: archive[name] for name in archive}
    generator = np.random.default_rng(zlib.crc32(b"0:features"))
    features = torch.from_numpy(generator.standard_normal((1, 24, 256)).astype(np.float32)).mT
    points, centres = torch.from_numpy(stored["valid_xyz"])[None], torch.from_numpy(stored["centers"])[None]
    pixels = torch.from_numpy(stored["valid_idx"])[None]
    rows, weights = interpolation_weights(points, centres)
    assert np.array_equal(rows[0, :300].numpy(), stored["neighbours_first300"])
    np.testing.assert_allclose(weights[0, :300].numpy(), stored["weights_first300"], rtol=0, atol=1e-6)
    lifted = interpolation_map(points, centres).apply(features)[0].T.flatten()  # C N
    patches = groups_to_patches(points, centres, pixels, (224, 224), (56, 56)).apply(features)[0].flatten()
    for name, got in (("interpolated_double", lifted), ("patches56_double", patches)):
        expected = stored[f"{name}__sample"]
        np.testing.assert_allclose(got[:: int(stored[f"{name}__stride"])].numpy(), expected, rtol=0, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_same_map_on_a_gpu():
    packed = pack_points(*organised(2, 40, 40))
    centres = packed.points[:, :60]
    expected = groups_to_patches(packed.points, centres, packed.pixels, (40, 40), (14, 14), valid=packed.valid)
    points, pixels, valid = (part.cuda() for part in packed)
    got = groups_to_patches(points, centres.cuda(), pixels, (40, 40), (14, 14), valid=valid)
    assert torch.equal(got.column.cpu(), expected.column)
    assert torch.equal(got.offset.cpu(), expected.offset)
    assert_close(got.weight.cpu(), expected.weight, rtol=0, atol=1e-14)
    features = random(2, 60, 33).double()
    assert_close(got.apply(features.cuda()).cpu(), expected.apply(features), rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("patches", [(12, 9), (24, 27), (5, 4)])
def test_some_rows_are_those_of_the_whole_map(patches, window):
    _, measured = organised(B=1)
    index = (random(108, 3).abs() * 3).long()
    weight = random(108, 3, seed=2).abs() * measured.view(108, 1)
    whole = pool_pixels(index[None], weight[None], 20, (12, 9), patches, window=window).dense()[0]
    rows = torch.randperm(patches[0] * patches[1], generator=torch.Generator().manual_seed(1))[:15]
    some = pool_pixels_at(index.short(), weight, 20, (12, 9), patches, rows, window=window)
    assert_close(some.dense()[0], whole[rows])
    assert int(some.offset.diff().max()) <= 20  # equal entries are merged
    none = pool_pixels_at(index, torch.zeros_like(weight), 20, (12, 9), patches, rows, window=window)
    assert not bool(none.apply(random(1, 20, 4)).any())
    empty = pool_pixels_at(index, weight, 20, (12, 9), patches, rows[:0], window=window)
    assert empty.apply(random(1, 20, 4)).shape == (1, 0, 4)


def test_rows_outside_the_grid_are_refused():
    index, weight = torch.zeros(108, 3, dtype=torch.int64), torch.ones(108, 3)
    for row in (-1, 20):
        with pytest.raises(DataError, match="0 to 19"):
            pool_pixels_at(index, weight, 4, (12, 9), (5, 4), torch.tensor([row]))


@pytest.mark.parametrize("size", [(12, 9), (4, 3), (3, 2), (13, 7)])
def test_enlarging_some_pixels_is_bilinear(size):
    grid = random(1, 5, 4, 3)
    expected = F.interpolate(grid, size=size, mode="bilinear", align_corners=False).flatten(2).mT
    rows = torch.arange(size[0] * size[1]).flip(0)
    assert_close(enlarge_at((4, 3), size, rows).apply(grid.flatten(2).mT.contiguous())[0], expected[0, rows])
