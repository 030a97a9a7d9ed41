"""Patches of a cloud against their definition, coverage and invariances."""

from __future__ import annotations

import pytest
import torch

from golden import noise
from polyspect.errors import ConfigError, DataError, ShapeError
from polyspect.geometry.sampling import farthest_points
from polyspect.layers.cloud_patches import cut_patches, patch_count


def test_counts_are_rounded_shares_of_the_points():
    assert [patch_count(12_345, density, 500) for density in (5, 10)] == [123, 247]
    assert (patch_count(30, 0.1, 500), patch_count(30, 1e4, 500)) == (1, 30)


def test_patches_are_the_nearest_points_of_farthest_points():
    cloud = noise("cloud", 90, 3)
    rows = cut_patches(cloud, 2.0, 20)
    centres = farthest_points(cloud[None], 9)[0]
    assert torch.equal(rows[:, 0], centres)
    for centre, patch in zip(centres, rows):
        apart = sorted(range(90), key=lambda row: float((cloud[row] - cloud[centre]).double().norm()))
        assert patch.tolist() == apart[:20]
    assert cut_patches(cloud, 2.0, 20, start=7)[0, 0] == 7


def test_with_cover_every_point_is_in_a_patch_and_added_centres_are_the_farthest_of_those_left_out():
    dense, sparse = 0.1 * noise("dense", 400, 3), 3 * noise("sparse", 200, 3)
    cloud = torch.cat([dense, sparse])
    few, covered = cut_patches(cloud, 1.0, 20), cut_patches(cloud, 1.0, 20, cover=True)
    assert len(few.unique()) < 600
    assert len(covered.unique()) == 600
    assert torch.equal(covered[: len(few)], few)
    assert len(covered) > len(few) + 1
    for count in range(len(few), len(covered)):
        before, added = covered[:count], covered[count]
        left = sorted(set(range(600)) - set(before.flatten().tolist()))
        assert left  # a patch is added only while points are left out
        away = [float((cloud[row] - cloud[before[:, 0]]).norm(dim=1).min()) for row in left]
        assert added[0] == left[max(range(len(left)), key=away.__getitem__)]
        apart = (cloud - cloud[added[0]]).square().sum(1)
        assert torch.equal(added, apart.argsort(stable=True)[:20])


def test_moving_and_scaling_a_cloud_changes_no_patch():
    cloud = noise("cloud", 150, 3).double()
    rows = cut_patches(cloud, 1.0, 30, cover=True)
    assert torch.equal(rows, cut_patches(0.003 * cloud + 0.5, 1.0, 30, cover=True))


def test_a_cloud_of_one_patch_is_that_patch():
    cloud = noise("cloud", 20, 3)
    for cover in (False, True):
        assert cut_patches(cloud, 1.0, 20, cover=cover).sort().values.tolist() == [list(range(20))]


def test_equal_points_are_covered_too():
    assert len(cut_patches(torch.zeros(25, 3), 1.0, 10, cover=True).unique()) == 25


def test_errors_say_what_is_wrong():
    with pytest.raises(DataError, match="takes 500 points and the cloud has 40"):
        cut_patches(torch.zeros(40, 3), 5.0)
    with pytest.raises(ConfigError, match="density"):
        cut_patches(torch.zeros(40, 3), 0.0, 4)
    with pytest.raises(ShapeError, match="points"):
        cut_patches(torch.zeros(40, 2), 1.0, 4)
