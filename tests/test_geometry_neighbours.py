"""Nearest neighbours, balls and groups: naive twins with ties, both engines, padding, stored outputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from polyspect.errors import ConfigError, DataError, ShapeError
from polyspect.geometry import neighbours as module
from polyspect.geometry.neighbours import ball_neighbours, gather_rows, group, nearest_neighbours
from polyspect.geometry.padding import pad_clouds
from polyspect.geometry.sampling import farthest_points

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "reference" / "golden" / "01_group.npz"


def cloud(points: int, seed: int = 0) -> Tensor:
    return torch.randn(points, 3, generator=torch.Generator().manual_seed(seed))


def by_sorting(query: Tensor, points: Tensor) -> list[tuple[float, int]]:
    """(squared distance, row) of all points, in order."""
    rows = []
    for row, p in enumerate(points.double()):
        dx, dy, dz = (query.double() - p).tolist()
        rows.append((dx * dx + dy * dy + dz * dz, row))
    return sorted(rows)


@pytest.fixture(params=["tree", "blocks"])
def engine(request, monkeypatch):
    """Run a test once per engine: the CPU's and the one of other devices."""
    if request.param == "blocks":
        monkeypatch.setattr(module, "search_cloud", lambda q, p, k: module._search_blocks(q.double(), p.double(), k))
    return request.param


def test_hand_case(engine):
    points = torch.tensor([[0.0, 0, 0], [3, 0, 0], [0, 4, 0], [-3, 0, 0], [0, 0, 12]])[None]
    near = nearest_neighbours(torch.tensor([[[0.0, 0, 0], [0, 4, 12]]]), points, 4)
    assert near.rows.tolist() == [[[0, 1, 3, 2], [4, 2, 0, 1]]]  # 1 and 3 tie
    assert near.squared_distance.tolist() == [[[0, 9, 9, 16], [16, 144, 160, 169]]]
    assert near.found.all()


GRID = st.lists(st.tuples(*[st.integers(-1, 2)] * 3), min_size=1, max_size=30)


@given(GRID, GRID, st.data())
@settings(max_examples=80, deadline=None)
def test_equals_sorting_by_distance_and_row_where_many_distances_tie(query_rows, rows, data):
    queries, points = torch.tensor(query_rows).float(), torch.tensor(rows).float()
    k = data.draw(st.integers(1, len(rows)))
    expected = [by_sorting(q, points)[:k] for q in queries]
    for search in (module.search_cloud, module._search_blocks):
        index, squared = search(queries.double(), points.double(), k)
        assert index.tolist() == [[row for _, row in near] for near in expected]
        assert squared.tolist() == [[d for d, _ in near] for near in expected]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_sorting_on_a_random_cloud(engine, dtype, monkeypatch):
    monkeypatch.setattr(module, "_PAIRS", 1000)  # several blocks
    points, queries = cloud(200).to(dtype), cloud(31, seed=1).to(dtype)
    near = nearest_neighbours(queries[None], points[None], 20)
    expected = [by_sorting(q, points)[:20] for q in queries]
    assert near.rows[0].tolist() == [[row for _, row in rows] for rows in expected]
    squared = torch.tensor([[d for d, _ in rows] for rows in expected], dtype=torch.float64)
    assert_close(near.squared_distance[0], squared.to(dtype), rtol=0, atol=0)


def test_far_from_the_origin_nothing_is_confused(engine):
    """Half a metre away and a millimetre apart: what the expanded distance gets wrong in float32."""
    points = torch.tensor([0.02, -0.01, 0.5]) + 1e-3 * cloud(400)
    near = nearest_neighbours(points[None], points[None], 5)
    expected = torch.tensor([[row for _, row in by_sorting(p, points)[:5]] for p in points])
    assert torch.equal(near.rows[0], expected)
    assert torch.equal(near.rows[0, :, 0], torch.arange(400))  # everybody finds itself first
    assert (near.squared_distance[0, :, 0] == 0).all()


def test_all_points_at_one_place(engine):
    near = nearest_neighbours(cloud(1)[None], cloud(1).repeat(50, 1)[None], 3)
    assert near.rows.tolist() == [[[0, 1, 2]]]


def test_ball_by_definition_and_how_it_is_filled(engine):
    points = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 2, 0], [0, 0, 5]])[None]
    queries = torch.tensor([[[0.0, 0, 0], [0, 0, 4.5], [10, 0, 0]]])
    near = ball_neighbours(queries, points, radius=2.0, k=3)
    # strictly inside: row 2 lies on the sphere; the first neighbour fills; nothing near the last query
    assert near.rows.tolist() == [[[0, 1, 0], [3, 3, 3], [1, 1, 1]]]
    assert near.found.tolist() == [[[True, True, False], [True, False, False], [False, False, False]]]
    assert near.squared_distance.tolist() == [[[0, 1, 0], [0.25, 0.25, 0.25], [81, 81, 81]]]
    wide = ball_neighbours(queries, points, radius=100.0, k=6)  # more slots than points
    assert wide.rows[0, 0].tolist() == [0, 1, 2, 3, 0, 0]
    assert wide.found.sum(-1).tolist() == [[4, 4, 4]]


def test_ball_keeps_the_nearest_of_many(engine):
    points = cloud(300)
    near = ball_neighbours(points[None, :20], points[None], radius=0.8, k=12)
    for q in range(20):
        inside = [row for d, row in by_sorting(points[q], points) if d < 0.8**2][:12]
        assert near.rows[0, q][near.found[0, q]].tolist() == inside


def test_padded_rows_are_never_neighbours_and_never_ask(engine):
    clouds, queries = [cloud(40), cloud(25, seed=1)], [cloud(6, seed=2), cloud(9, seed=3)]
    points, valid = torch.full((2, 60, 3), torch.nan), torch.zeros(2, 60, dtype=torch.bool)
    asked, ask = pad_clouds(queries)
    rows = [
        torch.randperm(60, generator=torch.Generator().manual_seed(b))[: len(c)].sort().values
        for b, c in enumerate(clouds)
    ]
    for b, single in enumerate(clouds):
        points[b, rows[b]], valid[b, rows[b]] = single, True
    for search in (
        lambda q, p, **masks: nearest_neighbours(q, p, 7, **masks),
        lambda q, p, **masks: ball_neighbours(q, p, 0.7, 30, **masks),
    ):
        near = search(asked, points, valid=valid, queries_valid=ask)
        assert valid.gather(1, near.rows.flatten(1)).all()
        assert not near.found[~ask].any()
        assert near.squared_distance[~ask].isinf().all()
        for b, (query, single) in enumerate(zip(queries, clouds)):
            alone = search(query[None], single[None])
            assert torch.equal(near.rows[b, : len(query)], rows[b][alone.rows[0]])
            assert torch.equal(near.squared_distance[b, : len(query)], alone.squared_distance[0])
            assert torch.equal(near.found[b, : len(query)], alone.found[0])


def test_groups_are_neighbourhoods_minus_centres_wherever_the_cloud_is():
    points = (cloud(100) * 64).round() / 64  # so that moving by a quarter is exact
    centres = gather_rows(points[None], farthest_points(points[None], 10))
    index = nearest_neighbours(centres, points[None], 8).rows
    neighbourhoods = group(points[None], centres, index)
    assert neighbourhoods.shape == (1, 10, 8, 3)
    assert (neighbourhoods[:, :, 0] == 0).all()
    assert torch.equal(neighbourhoods[0, 3, 5], points[index[0, 3, 5]] - centres[0, 3])
    moved, shift = points[None] + 0.25, centres + 0.25
    assert torch.equal(group(moved, shift, nearest_neighbours(shift, moved, 8).rows), neighbourhoods)
    with pytest.raises(ShapeError, match="index"):
        group(points[None], centres, index[:, :4])


def test_errors_say_which_cloud_and_what_to_do():
    points, valid = pad_clouds([cloud(5), cloud(2)])
    with pytest.raises(DataError, match=r"3 neighbours .* cloud 1 has only 2 valid points"):
        nearest_neighbours(points, points, 3, valid=valid)
    nobody = torch.zeros_like(valid)
    with pytest.raises(DataError, match="cloud 0 has only 0 valid points"):
        ball_neighbours(points, points, 1.0, 3, valid=nobody)
    silent = ball_neighbours(points, points, 1.0, 3, valid=nobody, queries_valid=nobody)
    assert not silent.found.any()  # an empty cloud that nobody asks about is no error
    with pytest.raises(ConfigError, match="at least 1 neighbour"):
        nearest_neighbours(points, points, 0)
    with pytest.raises(ConfigError, match="above 0, got -1"):
        ball_neighbours(points, points, -1, 3)
    with pytest.raises(ShapeError, match="`points`"):
        nearest_neighbours(points, points[:1], 1)
    broken = points.clone()
    broken[1, 0, 0] = torch.inf
    with pytest.raises(DataError, match="`queries`: row 0 of cloud 1"):
        nearest_neighbours(broken, points, 1)
    assert nearest_neighbours(points[:0], points[:0], 2).rows.shape == (0, 5, 2)


@pytest.mark.skipif(not GOLDEN.is_file(), reason=f"stored outputs are not here: {GOLDEN}")
def test_stored_groups_of_m3dm(engine):
    with np.load(GOLDEN) as stored:
        points, centres, index, neighbourhoods = (
            torch.from_numpy(stored[name])[None] for name in ("cloud", "centers", "knn_idx", "neighborhood")
        )
    near = nearest_neighbours(centres, points, 16)
    assert torch.equal(near.rows, index)
    assert torch.equal(group(points, centres, near.rows), neighbourhoods)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_same_rows_on_a_gpu():
    points, valid = pad_clouds([cloud(3000), (4 * cloud(2000, seed=1)).round()])
    expected = nearest_neighbours(points, points, 40, valid=valid, queries_valid=valid)
    near = nearest_neighbours(points.cuda(), points.cuda(), 40, valid=valid.cuda(), queries_valid=valid.cuda())
    for got, wanted in zip(near, expected):
        assert torch.equal(got.cpu(), wanted)
