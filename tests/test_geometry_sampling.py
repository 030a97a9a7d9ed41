"""Farthest points and padded clouds: hand cases, a loop twin with ties, invariances, padding, stored outputs."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from polyspect.errors import ConfigError, DataError, ShapeError
from polyspect.geometry import sampling
from polyspect.geometry.padding import pack_points, pad_clouds
from polyspect.geometry.sampling import RELEASED_SKIP, farthest_points

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "reference" / "golden"
CORNERS = torch.tensor([[0.0, 0, 1], [1, 0, 1], [0, 1, 1], [1, 1, 1], [0.5, 0.5, 1]])


def cloud(points: int, seed: int = 0) -> Tensor:
    return torch.randn(points, 3, generator=torch.Generator().manual_seed(seed))


def greedy_loop(points: Tensor, count: int, start: int = 0) -> list[int]:
    """The definition: the point whose nearest chosen point is farthest; the first of equals."""
    chosen = [start]
    while len(chosen) < count:
        best, gap = -1, -1.0
        for row, p in enumerate(points):
            step = p - points[chosen]
            nearest = float((step[:, 0] ** 2 + step[:, 1] ** 2 + step[:, 2] ** 2).min())
            if nearest > gap:
                best, gap = row, nearest
        chosen.append(best)
    return chosen


@pytest.fixture(params=["numpy", "torch"])
def engine(request, monkeypatch):
    """Run a test once per engine: the CPU's and the one of other devices."""
    if request.param == "torch":
        monkeypatch.setattr(sampling, "_on_cpu", lambda points: False)
    return request.param


def test_hand_case_with_a_tie(engine):
    assert farthest_points(CORNERS[None], 3).tolist() == [[0, 3, 1]]  # 1 and 2 tie: the lower row
    assert farthest_points(CORNERS[None], 5, start=4).tolist() == [[4, 0, 1, 2, 3]]


def test_points_near_the_origin_are_skipped_as_in_the_released_code(engine):
    points = torch.tensor([[0.0, 0, 0.5], [0, 0, 0.01], [0, 0.1, 0.5], [0, 0, 0.031], [0, 0, 0.032]])[None]
    assert farthest_points(points, 5).tolist() == [[0, 1, 2, 4, 3]]
    assert farthest_points(points, 3, skip_squared_norm=RELEASED_SKIP).tolist() == [[0, 4, 2]]
    near = farthest_points(points, 4, start=1, skip_squared_norm=RELEASED_SKIP)
    assert near.tolist() == [[1, 2, 0, 4]]  # the start may lie there
    with pytest.raises(DataError, match="cloud 0 has only 3 points"):
        farthest_points(points, 4, skip_squared_norm=RELEASED_SKIP)
    repeated = farthest_points(points / 100, 3, skip_squared_norm=RELEASED_SKIP, allow_repeats=True, start=2)
    assert repeated.tolist() == [[2, 2, 2]]  # nothing but skipped points


@given(st.lists(st.tuples(*[st.integers(0, 3)] * 3), min_size=1, max_size=24), st.data())
@settings(max_examples=60, deadline=None)
def test_equals_the_definition_where_many_distances_tie(rows, data):
    points = torch.tensor(rows, dtype=torch.float32)
    count = data.draw(st.integers(1, len(rows)))
    start = data.draw(st.integers(0, len(rows) - 1))
    expected = greedy_loop(points, count, start)
    assert farthest_points(points[None], count, start=start).tolist() == [expected]
    first, valid = torch.tensor([start]), torch.ones(1, len(rows), dtype=torch.bool)
    assert sampling._choose(points[None], valid, first, count).tolist() == [expected]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_definition_on_a_random_cloud(engine, dtype):
    points = cloud(300).to(dtype)
    expected = greedy_loop(points, 40, start=7)
    assert farthest_points(points[None], 40, start=7).tolist() == [expected]


def test_fewer_centres_are_the_first_and_gaps_never_grow():
    points = cloud(500)
    chosen = farthest_points(points[None], 60)[0]
    assert torch.equal(farthest_points(points[None], 17)[0], chosen[:17])
    gaps = [float((points[c] - points[chosen[:i]]).norm(dim=1).min()) for i, c in enumerate(chosen) if i]
    assert all(later <= sooner for sooner, later in pairwise(gaps))


def test_copies_come_last_and_repeats_only_on_request(engine):
    points = cloud(20).repeat(2, 1)[None]
    chosen = farthest_points(points, 40)[0]
    assert sorted(chosen[:20].tolist()) == list(range(20))
    assert chosen[20:].tolist() == [0] * 20  # every distance is 0 by then
    with pytest.raises(DataError, match=r"41 farthest points .* cloud 0 has only 40"):
        farthest_points(points, 41)
    assert farthest_points(points, 41, allow_repeats=True)[0, -1] == 0


def test_order_of_points_and_place_of_the_cloud_do_not_matter():
    points = cloud(400).double()
    chosen = points[farthest_points(points[None], 50)[0]]
    order = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + torch.randperm(399)])
    assert torch.equal(points[order][farthest_points(points[order][None], 50)[0]], chosen)
    turn = torch.linalg.qr(cloud(3).double()).Q
    moved = points @ turn + torch.tensor([0.3, -2.0, 0.5])
    assert torch.equal(points[farthest_points(moved[None], 50)[0]], chosen)


def test_padded_rows_change_nothing_wherever_they_are(engine):
    clouds = [cloud(n, seed=n) + 10 for n in (40, 25, 33)]  # far from the 0 that padding may be read as
    points, valid = torch.full((3, 50, 3), torch.nan), torch.zeros(3, 50, dtype=torch.bool)
    for b, single in enumerate(clouds):
        rows = torch.randperm(50, generator=torch.Generator().manual_seed(b))[: len(single)].sort().values
        points[b, rows], valid[b, rows] = single, True
        expected = rows[farthest_points(single[None], 12, start=3)[0]]
        assert torch.equal(farthest_points(points[b : b + 1], 12, valid=valid[b : b + 1], start=3)[0], expected)
    together = farthest_points(points, 12, valid=valid, start=3)
    singles = [farthest_points(points[b : b + 1], 12, valid=valid[b : b + 1], start=3) for b in range(3)]
    assert torch.equal(together, torch.cat(singles))


def test_errors_say_which_cloud_and_what_to_do():
    points, valid = pad_clouds([cloud(5), cloud(2)])
    with pytest.raises(DataError, match=r"3 farthest points .* cloud 1 has only 2 .* ask for fewer"):
        farthest_points(points, 3, valid=valid)
    with pytest.raises(ConfigError, match="valid point 2: cloud 1 has 2 valid points"):
        farthest_points(points, 1, valid=valid, start=2)
    with pytest.raises(ConfigError, match="leave empty clouds out"):
        farthest_points(points, 1, valid=valid & torch.tensor([[True], [False]]))
    with pytest.raises(ConfigError, match="at least 1 farthest point"):
        farthest_points(points, 0)
    with pytest.raises(ShapeError, match="the mask of points"):
        farthest_points(points, 1, valid=valid[:, :3])
    with pytest.raises(DataError, match="float16"):
        farthest_points(points.half(), 1)
    points[1, 1, 2] = torch.nan
    with pytest.raises(DataError, match=r"row 1 of cloud 1 .*not valid"):
        farthest_points(points, 1, valid=valid)
    assert farthest_points(points[:0], 4).shape == (0, 4)


@pytest.mark.parametrize(("name", "cloud_name"), [("01_group.npz", "cloud"), ("03_interpolate_pool.npz", "valid_xyz")])
def test_stored_choices_of_the_reference(engine, name, cloud_name):
    if not (GOLDEN / name).is_file():
        pytest.skip(f"stored outputs are not here: {GOLDEN / name}")
    with np.load(GOLDEN / name) as stored:
        points, expected = torch.from_numpy(stored[cloud_name])[None], torch.from_numpy(stored["fps_idx"])
    assert torch.equal(farthest_points(points, len(expected))[0], expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_same_rows_on_a_gpu():
    points, valid = pad_clouds([cloud(3000), cloud(2000, seed=1)])
    expected = farthest_points(points, 300, valid=valid)
    assert torch.equal(farthest_points(points.cuda(), 300, valid=valid.cuda()).cpu(), expected)


# -- padding ----------------------------------------------------------------------------------------------------------


def test_packed_points_are_the_valid_pixels_in_order():
    xyz = cloud(2 * 3 * 4).view(2, 3, 4, 3).permute(0, 3, 1, 2)
    valid = torch.zeros(2, 3, 4, dtype=torch.bool)
    valid[0, 1, 2] = valid[0, 0, 3] = valid[1, 2, 0] = True
    packed = pack_points(xyz, valid)
    assert packed.pixels.tolist() == [[3, 6], [8, 0]]
    assert packed.valid.tolist() == [[True, True], [True, False]]
    assert_close(packed.points[0], torch.stack([xyz[0, :, 0, 3], xyz[0, :, 1, 2]]), rtol=0, atol=0)
    assert_close(packed.points[1], torch.stack([xyz[1, :, 2, 0], torch.zeros(3)]), rtol=0, atol=0)
    assert pack_points(xyz, torch.zeros_like(valid)).points.shape == (2, 0, 3)
