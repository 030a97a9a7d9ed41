"""The point backbone: groups, the way back to pixels, small and empty clouds; RGB and points on one grid."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from polyspect.backbones.image import default_backbone
from polyspect.backbones.points import PointBackbone, patch_features
from polyspect.errors import ConfigError, DataError
from polyspect.geometry.interpolation import interpolation_map, points_to_patches
from polyspect.geometry.neighbours import group, nearest_neighbours
from polyspect.geometry.padding import pack_points
from polyspect.geometry.sampling import farthest_points
from polyspect.geometry.unit import to_unit_frame
from polyspect.layers.rgb_points import RGBPoints, measured_patches, point_patches, rgb_patches
from tiny import blinded, take, tiny_batch

SMALL = {"weights": "random", "groups": 24, "group_size": 8, "layers": (0, 1)}


@pytest.fixture(scope="module")
def backbone() -> PointBackbone:
    return PointBackbone("point_mae", **SMALL)


def by_hand(backbone: PointBackbone, batch, grid: int) -> torch.Tensor:
    """Patches of the first part, step by step from its points."""
    on = batch.valid[:1] & batch.foreground[:1]
    points, pixels, _ = pack_points(batch.images["xyz"][:1], on)
    seen = to_unit_frame(points) if backbone.frame == "unit" else points
    centres = seen[:, farthest_points(seen, backbone.groups)[0]]
    rows = nearest_neighbours(centres, seen, backbone.group_size).rows
    features = backbone.network(group(seen, centres, rows), centres)
    values = interpolation_map(seen, centres).apply(features)  # 1 N C
    return points_to_patches(pixels, tuple(batch.valid.shape[-2:]), (grid, grid)).apply(values)


def test_patches_are_those_of_the_chain_written_out(backbone):
    batch = tiny_batch([0, 1])
    patches = patch_features(backbone(batch), (64, 64), (16, 16))
    assert patches.shape == (2, 256, backbone.channels)
    assert_close(patches[:1], by_hand(backbone, batch, 16), rtol=1e-4, atol=1e-5)


def test_a_part_does_not_depend_on_its_batch_mates(backbone):
    batch = tiny_batch([0, 1, 2])
    together, alone = backbone(batch), backbone(take(batch, [1]))
    assert torch.equal(together["near"][1], alone["near"][0])
    assert torch.equal(together["share"][1], alone["share"][0])
    assert_close(together["groups"][1], alone["groups"][0], rtol=1e-4, atol=1e-5)


def test_shares_sum_to_one_on_the_part_and_to_zero_off_it(backbone):
    batch = tiny_batch([0])
    total = backbone(batch)["share"].sum(-1).view(64, 64)
    part = batch.valid[0] & batch.foreground[0]
    assert_close(total[part], torch.ones(int(part.sum())))
    assert float(total[~part].abs().max()) == 0


def test_the_region_may_be_all_that_was_measured():
    batch = tiny_batch([0])
    everything = PointBackbone("point_mae", **SMALL, region="valid")(batch)["share"].sum(-1) > 0
    assert torch.equal(everything.view(64, 64), batch.valid[0])


def test_a_part_without_foreground_is_seen_whole_and_one_without_points_is_zero(backbone):
    batch = tiny_batch([0, 1])
    bare = replace(batch, foreground=torch.zeros_like(batch.foreground))
    assert int((backbone(bare)["share"].sum(-1) > 0).sum()) == int(batch.valid.sum())
    nothing = blinded(batch)
    features = backbone(nothing)
    assert all(float(features[name].abs().max()) == 0 for name in ("groups", "share"))


def test_small_clouds_repeat_centres_and_neighbours(backbone):
    batch = tiny_batch([0])
    few = torch.zeros_like(batch.valid)
    few[0, 30, 30:35] = batch.valid[0, 30, 30:35]
    features = backbone(replace(batch, valid=few))
    assert torch.isfinite(features["groups"]).all()
    assert float(features["share"].sum()) == pytest.approx(int(few.sum()), rel=1e-5)


def test_the_unit_frame_does_not_know_where_or_how_large_a_part_is():
    backbone = PointBackbone("point_mae", **SMALL, frame="unit")
    batch = tiny_batch([0])
    moved = 2 * batch.images["xyz"] + torch.tensor([0.1, -0.2, 0.3]).view(1, 3, 1, 1)
    other = replace(batch, images={**batch.images, "xyz": moved})
    assert_close(backbone(other)["groups"], backbone(batch)["groups"], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("setting", [{"groups": 0}, {"group_size": 0}, {"neighbours": 0}, {"groups": 40_000}])
def test_settings_out_of_range_are_refused(setting):
    with pytest.raises(ConfigError, match=r"groups|group_size"):
        PointBackbone("point_mae", **{**SMALL, **setting})


def test_the_released_sampler_needs_the_cameras_frame():
    assert PointBackbone("point_mae", released_sampling=True, **SMALL).skip == 1e-3
    with pytest.raises(ConfigError, match=r"`released_sampling` .*see clouds moved to their centroid"):
        PointBackbone("point_mae", released_sampling=True, frame="unit", **SMALL)


def test_halves_elsewhere_do_not_reach_the_network(backbone):
    batch = tiny_batch([3])
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        half = backbone(batch)["groups"]
    assert torch.equal(half, backbone(batch)["groups"])


def test_unknown_names_and_missing_clouds_are_refused(backbone):
    with pytest.raises(ConfigError, match="unknown point backbone"):
        PointBackbone("point_net", weights="random")
    batch = tiny_batch([0])
    with pytest.raises(DataError, match="has no 'xyz'"):
        backbone(replace(batch, images={"rgb": batch.images["rgb"]}))


def test_rgb_and_points_meet_on_one_grid(backbone):
    extractor = RGBPoints(default_backbone((8, 16)), backbone)
    batch = tiny_batch([0, 1])
    features = extractor(batch)
    assert extractor.channels == {"rgb": 152, "xyz": backbone.channels}
    fine = rgb_patches(features, (16, 16)).unflatten(1, (16, 16))
    repeated = features["rgb.grid"].repeat_interleave(2, 2).repeat_interleave(2, 3).permute(0, 2, 3, 1)
    assert torch.equal(fine, repeated)  # from 8 x 8: a whole factor
    points = point_patches(features, (16, 16))
    assert torch.equal(points.abs().sum(-1) > 0, measured_patches(features, (16, 16)))
    assert set(extractor(batch, ("rgb",))) == {"rgb.grid", "valid", "foreground"}


@pytest.mark.parametrize(("size", "grid"), [((7, 5), (21, 10)), ((4, 4), (8, 6)), ((8, 8), (4, 4)), ((6, 6), (6, 6))])
def test_rgb_patches_are_the_adaptive_mean_whether_cells_are_repeated_or_not(size, grid):
    cells = torch.randn(2, 6, *size, generator=torch.Generator().manual_seed(0))
    pooled = torch.nn.functional.adaptive_avg_pool2d(cells, grid).flatten(2).mT
    assert torch.equal(rgb_patches({"rgb.grid": cells}, grid), pooled)


def test_methods_with_one_extractor_share_cached_features():
    from polyspect.detectors import detector_class
    from polyspect.detectors.contract import configure

    def key(name: str, **settings):
        kind = detector_class(name)
        chosen = {"point_weights": "random", "groups": 24, "group_size": 8, "point_layers": (0, 1)}
        return kind(configure(kind, chosen | settings)).extractor_key()

    assert key("m3dm", banks=("xyz", "rgb"), nu=0.3) == key("m3dm") == key("cfm", epochs=3)
    assert len({key("m3dm"), key("m3dm", groups=25), key("m3dm", banks=("xyz",)), key("m3dm", seed=1)}) == 4
