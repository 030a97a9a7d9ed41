"""The unit frame of clouds."""

import pytest
import torch
from torch.testing import assert_close

from polyspect.errors import DataError
from polyspect.geometry.unit import to_unit_frame


def test_by_hand():
    points = torch.tensor([[[1.0, 1, 0], [3, 1, 0], [2, 1, 0]]])  # centroid (2, 1, 0), largest radius 1
    assert_close(to_unit_frame(5 * points), torch.tensor([[[-1.0, 0, 0], [1, 0, 0], [0, 0, 0]]]))


def test_moving_and_scaling_a_cloud_changes_nothing():
    points = torch.randn(2, 50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    unit = to_unit_frame(points)
    assert_close(to_unit_frame(0.02 * points + 0.5), unit)
    assert_close(unit.norm(dim=2).amax(1), torch.ones(2, dtype=torch.float64))
    assert_close(unit.mean(1), torch.zeros(2, 3, dtype=torch.float64))


def test_padding_counts_for_nothing_and_a_cloud_without_extent_comes_out_as_zero():
    points = torch.randn(2, 9, 3, generator=torch.Generator().manual_seed(0))
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[0, 5:] = False
    padded = points.clone()
    padded[0, 5:] = torch.nan
    unit = to_unit_frame(padded, valid)
    assert_close(unit[0, :5], to_unit_frame(points[:1, :5])[0])
    assert not bool(unit[0, 5:].any())
    assert_close(unit[1], to_unit_frame(points[1:])[0])
    assert not bool(to_unit_frame(torch.ones(1, 4, 3)).any())
    assert not bool(to_unit_frame(torch.ones(1, 4, 3), torch.zeros(1, 4, dtype=torch.bool)).any())
    valid[0, 6] = True
    with pytest.raises(DataError, match="row 6 of cloud 0"):
        to_unit_frame(padded, valid)
