"""Alignment of two maps' ranges against a stored output and by hand."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from golden import Golden, noise
from polyspect.errors import CalibrationError
from polyspect.layers.alignment import align, matching_line


def test_equals_the_official_code():
    golden = Golden("08_shape_guided.npz")
    target = noise("sdf_pix", 5000).clamp(min=0)
    source = 3 * (noise("rgb_pix", 5000) + 0.2).clamp(min=0)
    assert_close(matching_line(source, target), golden.tensor("alignment_weight_bias_f64"), rtol=1e-6, atol=1e-6)


def test_by_hand():
    line = matching_line(torch.tensor([1.5, 0.0, 2.5, 0.0]), torch.tensor([[0.02, 0.04]]))
    assert_close(line, torch.tensor([0.02, -0.01], dtype=torch.float64), rtol=1e-5, atol=1e-7)
    assert_close(align(torch.tensor([[3.5, 0.5, 0.4, 0.0]]), line), torch.tensor([[0.06, 0.0, 0.0, 0.0]]))
    assert align(torch.tensor([0.0, 1.0]), torch.tensor([2.0, 5.0])).tolist() == [0, 7]
    assert align(torch.tensor([0.0, 1.0]), torch.tensor([2.0, 5.0]), background=True).tolist() == [5, 7]


def test_mean_and_three_deviations_meet():
    a, b = noise("a", 40, 50).double().exp(), 0.1 * noise("b", 300).double().square() + 1
    weight, offset = matching_line(a, b)
    moved = weight * a + offset
    for side in (-3, 0, 3):
        assert_close(moved.mean() + side * moved.std(correction=0), b.mean() + side * b.std(correction=0))


def test_maps_without_a_range_are_refused():
    some = torch.tensor([1.0, 2.0])
    with pytest.raises(CalibrationError, match="`source` has 0 values"):
        matching_line(torch.zeros(9), some)
    with pytest.raises(CalibrationError, match="`target` has 1 values"):
        matching_line(some, torch.tensor([0.0, 1.0]))
    with pytest.raises(CalibrationError, match="are equal"):
        matching_line(torch.ones(5), some)
