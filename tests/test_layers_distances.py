"""Distances by other metrics against loops."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from polyspect.errors import ConfigError
from polyspect.layers.distances import distances_to, nearest_rows

PLAIN = {
    "l2": lambda a, b: float((a - b).square().sum().sqrt()),
    "l1": lambda a, b: float((a - b).abs().sum()),
    "cos": lambda a, b: float(1 - (a @ b) / (a.norm() * b.norm())),
}


@pytest.fixture
def vectors() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(7, 5, generator=generator), torch.randn(11, 5, generator=generator)


@pytest.mark.parametrize("metric", PLAIN)
def test_nearest_rows_equal_a_loop(vectors, metric):
    queries, rows = vectors
    distances, indices = nearest_rows(queries, rows, 3, metric, block=20)
    for query, own, found in zip(queries, distances.tolist(), indices.tolist()):
        expected = sorted((PLAIN[metric](query, row), at) for at, row in enumerate(rows))[:3]
        assert found == [at for _, at in expected]
        assert own == pytest.approx([distance for distance, _ in expected], abs=1e-5)


@pytest.mark.parametrize("metric", PLAIN)
def test_distances_to_own_rows_equal_a_loop(vectors, metric):
    queries, rows = vectors
    beside = rows[torch.tensor([[0, 3], [10, 2], [5, 5]])]
    expected = [[PLAIN[metric](q, row) for row in own] for q, own in zip(queries[:3], beside)]
    assert_close(distances_to(queries[:3], beside, metric), torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_only_cosine_ignores_length(vectors):
    queries, rows = vectors
    assert_close(nearest_rows(7 * queries, rows, 1, "cos")[0], nearest_rows(queries, rows, 1, "cos")[0])
    assert float(nearest_rows(7 * queries, 7 * rows, 1, "l1")[0].sum()) == pytest.approx(
        7 * float(nearest_rows(queries, rows, 1, "l1")[0].sum()), rel=1e-5
    )


def test_a_vector_of_zeros_has_no_direction():
    rows = torch.tensor([[2.0, 0.0], [0.0, -3.0]])
    assert float(nearest_rows(torch.zeros(1, 2), rows, 1, "cos")[0]) == 0.5
    assert float(nearest_rows(torch.zeros(1, 2), torch.zeros(1, 2), 1, "cos")[0]) == 0


def test_more_neighbours_than_rows_is_an_error(vectors):
    with pytest.raises(ConfigError, match="the bank has 11 vectors"):
        nearest_rows(*vectors, 12, "l1")
