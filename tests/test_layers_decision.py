"""The decision layer against hand values, the SVM's own objective, and the outputs of the published program."""

from __future__ import annotations

import logging
import sys

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor
from torch.testing import assert_close

from golden import Golden
from polyspect.errors import ConfigError, DataError, MissingExtraError, NotFittedError
from polyspect.layers import decision
from polyspect.layers.decision import DecisionLayer


def fitted(rows: Tensor, **settings: object) -> DecisionLayer:
    layer = DecisionLayer(rows.shape[1], **settings)  # type: ignore[arg-type]
    for part in rows.split(700):
        layer.observe(part)
    layer.fit()
    return layer


def values(n: int, *, seed: int = 0) -> Tensor:
    """Rows like the distances of three banks: positive, skewed, related."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(n, 1, generator=generator)
    return torch.exp(0.5 * common + 0.3 * torch.randn(n, 3, generator=generator)) * torch.tensor([2.0, 0.3, 5.0])


def test_weights_of_worked_examples():
    rows = torch.tensor([[1.0, 1], [2, 1], [3, 3], [4, 2]])
    layer = fitted(rows)
    assert_close(layer.weight, torch.tensor([1.5, 1.0]).double())
    assert_close(layer.offset, torch.tensor(4.0).double())  # w.x of the second row, the last of the lower half
    assert_close(layer.score(rows), torch.tensor([2.5, 4.0, 7.5, 8.0]))
    assert_close(layer.score(rows.view(2, 2, 2)), torch.tensor([[2.5, 4.0], [7.5, 8.0]]))


def test_a_row_at_the_edge_counts_in_part():
    rows = torch.tensor([[5.0], [1], [4], [2], [3]])
    assert_close(fitted(rows).weight, torch.tensor([(1 + 2 + 0.5 * 3) / 2.5]).double())
    assert_close(fitted(rows, nu=0.1).weight, torch.tensor([1.0]).double())  # half of the lowest row is its mean still
    assert_close(fitted(rows, nu=1.0).weight, torch.tensor([3.0]).double())


def test_the_shortest_mean_may_lie_between_corners():
    # Means of one row of two: the segment from (4, 1) to (1, 3); its point nearest to 0 is perpendicular to it
    layer = fitted(torch.tensor([[4.0, 1], [1, 3]]))
    assert_close(layer.weight, torch.tensor([22 / 13, 33 / 13]).double())


def test_balanced_values_count_alike_whatever_their_unit():
    rows, units = values(3000), torch.tensor([1e-3, 50.0, 1.0])
    layer, other = fitted(rows, balanced=[True] * 3), fitted(rows * units, balanced=[True] * 3)
    assert_close(layer.shares(rows), other.shares(rows * units), rtol=1e-5, atol=0)
    plain = fitted(rows / rows.mean(0))
    assert_close(layer.weight, plain.weight / rows.double().mean(0), rtol=1e-5, atol=0)
    shares = layer.shares(rows).mean(0)
    assert float(shares.min()) > 0.5 * float(shares.max())
    plain_shares = fitted(rows).shares(rows).mean(0)
    assert float(plain_shares[1]) < 0.02 * float(plain_shares[2])  # without: the largest unit rules
    own = torch.tensor([float(rows[:, 0].mean()), 1.0, 1.0])
    assert_close(
        fitted(rows, balanced=[True, False, False]).shares(rows),
        fitted(rows / own).shares(rows / own),
        rtol=1e-5,
        atol=0,
    )


def test_a_balanced_value_that_is_always_0_is_left_as_it_is():
    rows = torch.cat([values(50)[:, :1], torch.zeros(50, 1)], dim=1)
    layer = fitted(rows, balanced=[True, True])
    assert bool(layer.weight.isfinite().all())
    assert float(layer.weight[1]) == 0
    with pytest.raises(ConfigError, match="must have 2 entries, got 1"):
        DecisionLayer(2, balanced=[True])


@pytest.mark.parametrize("nu", [0.5, 0.23, 1.0])
@pytest.mark.parametrize("shift", [0.0, 0.6])
def test_weights_minimise_the_objective_of_the_machine(nu: float, shift: float):
    rows = values(61) - shift  # with a shift some values are negative
    layer = fitted(rows, nu=nu)
    x = rows.double().numpy()

    def dual(share: np.ndarray) -> tuple[float, np.ndarray]:  # Eq. 1's dual: |sum_i share_i x_i|^2 / 2
        w = share @ x
        return float(w @ w) / 2, x @ w

    n = len(x)
    found = minimize(
        dual,
        np.full(n, 1 / n),
        jac=True,
        method="SLSQP",
        bounds=[(0, 1 / (nu * n))] * n,
        constraints={"type": "eq", "fun": lambda share: share.sum() - 1, "jac": lambda share: np.ones(n)},
        options={"ftol": 1e-14, "maxiter": 1000},
    )
    assert_close(layer.weight, torch.from_numpy(found.x @ x), rtol=1e-5, atol=1e-6)
    weight, offset = layer.weight.numpy(), float(layer.offset)

    def primal(w: np.ndarray, rho: float) -> float:
        return float(nu / 2 * w @ w - nu * rho + np.maximum(0, rho - x @ w).mean())

    assert primal(weight, offset) == pytest.approx(-nu * found.fun, rel=1e-6)  # primal = dual: nothing is smaller


def test_neither_order_nor_batches_nor_blocks_matter(monkeypatch: pytest.MonkeyPatch):
    rows = values(5000)
    whole = fitted(rows).weight
    shuffled = rows[torch.randperm(5000, generator=torch.Generator().manual_seed(1))]
    assert_close(fitted(shuffled).weight, whole, rtol=1e-12, atol=0)
    monkeypatch.setattr(decision, "ROWS", 333)
    assert_close(fitted(rows).weight, whole, rtol=1e-12, atol=0)


def test_copies_and_ties_at_the_edge_change_nothing():
    rows = values(300).round(decimals=0)  # many equal rows
    assert_close(fitted(rows.repeat(4, 1)).weight, fitted(rows).weight, rtol=1e-9, atol=0)


def test_a_factor_counts_squared():
    rows = torch.exp(0.01 * torch.randn(4000, 2, generator=torch.Generator().manual_seed(0)))
    factor = torch.tensor([1.0, 0.1])
    effective = fitted(rows * factor).weight * factor
    assert float(effective[1] / effective[0]) == pytest.approx(0.01, rel=0.1)


@pytest.mark.parametrize(("name", "stored"), [("score", "dlf_scores"), ("map", "dlf_mapscores")])
@pytest.mark.parametrize("features", [2, 3])
def test_weights_of_the_published_program(name: str, stored: str, features: int):
    golden = Golden("04_m3dm_uff_scores.npz")
    rows, expected = golden.tensor(stored)[:, :features], golden.tensor(f"dlf{features}_{name}_coef_f64")
    exact = fitted(rows).weight
    assert float(torch.nn.functional.cosine_similarity(exact, expected, dim=0)) > 0.9999
    assert 0.15 < float(expected.norm() / exact.norm()) < 1  # the descent stops early
    pytest.importorskip("sklearn", reason="solver='sgd' needs scikit-learn")
    layer = fitted(rows, solver="sgd")
    assert_close(layer.weight, expected, rtol=1e-6, atol=0)
    assert_close(layer.offset, golden.tensor(f"dlf{features}_{name}_offset_f64")[0], rtol=1e-6, atol=0)


def test_weights_travel_in_the_state_dict():
    layer, other = fitted(values(400)), DecisionLayer(3)
    with pytest.raises(NotFittedError, match="decision layer"):
        other.score(torch.ones(1, 3))
    other.load_state_dict(layer.state_dict())
    x = values(10, seed=1)
    assert torch.equal(other.score(x), layer.score(x))


def test_too_many_rows_become_a_random_sample_and_a_warning(caplog: pytest.LogCaptureFixture):
    rows = values(40_000)
    with caplog.at_level(logging.WARNING, logger="polyspect"):
        layer = fitted(rows, max_bytes=12 * 10_000)
    assert "40000 rows" in caplog.text
    assert layer.counts.tolist() == [40_000, 10_000]
    assert_close(layer.weight, fitted(rows).weight, rtol=0.03, atol=0)


def test_what_cannot_be_learned_from_is_refused(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(DataError, match="no row"):
        DecisionLayer(3).fit()
    with pytest.raises(DataError, match="not finite"):
        fitted(torch.tensor([[1.0, torch.nan]]))
    with pytest.raises(DataError, match="all zero"):
        fitted(torch.cat([torch.zeros(6, 2), torch.ones(5, 2)]))
    with pytest.raises(DataError, match="cancel"):
        fitted(torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]]))
    for settings in ({"nu": 0.0}, {"nu": 1.5}, {"solver": "newton"}, {"features": 0}):
        with pytest.raises(ConfigError, match="decision layer"):
            DecisionLayer(**{"features": 3, **settings})  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(MissingExtraError, match=r"polyspect\[sklearn\]"):
        fitted(values(10), solver="sgd")
