"""Sparse codes of nearest rows against stored outputs, scikit-learn and hand values."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

from golden import Golden, noise
from polyspect.errors import ConfigError
from polyspect.layers.sparse_coding import matching_pursuit, rebuild

ARCHIVE = "08_shape_guided.npz"


@pytest.mark.parametrize(("mode", "skip"), [("testing", 0), ("alignment", 1)])
def test_equals_the_official_code(mode, skip):
    golden, bank = Golden(ARCHIVE), noise("sdf_bank", 60, 128).abs()
    queries = noise("sdf_test", 6, 128).abs() if mode == "testing" else bank[:5]
    got = rebuild(queries, bank, skip=skip)
    assert torch.equal(got.rows, golden.tensor(f"omp_{mode}_knn_idx"))
    assert_close(got.vectors, golden.tensor(f"omp_{mode}_dict"), rtol=1e-5, atol=1e-5)
    assert_close(bank[got.rows[:, 0]], golden.tensor(f"omp_{mode}_nn"), rtol=0, atol=0)
    assert got.distance.max().item() == pytest.approx(golden.number(f"omp_{mode}_score"), rel=1e-5)


@pytest.mark.parametrize("atoms", [1, 3, 5])
def test_equals_scikit_learn(atoms):
    from sklearn.linear_model import orthogonal_mp_gram

    dictionaries, queries = noise("d", 40, 10, 16).abs().double(), noise("q", 40, 16).abs().double()
    got = matching_pursuit(queries, dictionaries, atoms)
    for x, rows, mine in zip(queries.numpy(), dictionaries.numpy(), got.numpy()):
        code = orthogonal_mp_gram(rows @ rows.T, rows @ x, n_nonzero_coefs=atoms)
        assert mine == pytest.approx(code @ rows, abs=1e-9)


def test_by_hand():
    """The long atom wins first although the other points the same way as x; together they give x."""
    rows = torch.tensor([[[1.0, 1.0, 0.0], [10.0, 0.0, 0.0], [0.0, 0.0, 0.5]]])
    x = torch.tensor([[2.0, 2.0, 1.0]])
    assert matching_pursuit(x, rows, 1).tolist() == [[2, 0, 0]]
    assert_close(matching_pursuit(x, rows, 2), torch.tensor([[2.0, 2.0, 0.0]]))
    assert_close(matching_pursuit(x, rows, 3), x)


def test_unit_rows_of_the_bank_are_rebuilt_unless_they_are_skipped():
    bank = torch.nn.functional.normalize(noise("b", 30, 8).abs(), dim=1)
    assert rebuild(bank, bank).distance.max() < 1e-5
    left_out = rebuild(bank, bank, skip=1)
    assert left_out.distance.min() > 1e-3
    assert not (left_out.rows == torch.arange(30)[:, None]).any()
    one = rebuild(bank, bank, 4, 2, skip=1)
    alone = rebuild(bank[3:4], bank, 4, 2, skip=1)
    assert_close(one.vectors[3:4], alone.vectors)


def test_long_rows_can_hide_a_row_of_the_bank_from_itself():
    """A property of the released rule, which compares atoms without normalising them."""
    bank = torch.tensor([[1.0, 1.0, 1.0], [9.0, 0.0, 1.0], [0.0, 9.0, 1.0]])
    assert rebuild(bank[:1], bank, 3, 1).distance.item() > 0.5
    assert rebuild(bank[:1], bank, 3, 3).distance.item() < 1e-5


def test_more_atoms_never_rebuild_worse_and_beat_the_nearest_row():
    bank, queries = noise("b", 50, 12).abs(), noise("q", 20, 12).abs()
    found = [rebuild(queries, bank, 10, atoms).distance for atoms in (1, 2, 3, 10)]
    for fewer, more in pairwise(found):
        assert bool((more <= fewer + 1e-6).all())
    nearest = (queries - bank[rebuild(queries, bank).rows[:, 0]]).norm(dim=1)
    assert bool((found[2] <= nearest).float().mean() > 0.9)


def test_repeated_and_empty_atoms_add_nothing():
    rows = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]]])
    assert matching_pursuit(torch.tensor([[3.0, 4.0]]), rows, 3).tolist() == [[3, 0]]
    assert matching_pursuit(torch.zeros(1, 2), rows, 3).tolist() == [[0, 0]]


def test_errors_say_what_does_not_fit():
    bank = torch.eye(4)
    with pytest.raises(ConfigError, match=r"`atoms` must be in 1\.\.2"):
        rebuild(bank, bank, 2, 3)
    with pytest.raises(ConfigError, match="has 4 vectors"):
        rebuild(bank, bank, 4, skip=1)
    with pytest.raises(ConfigError, match="`skip`"):
        rebuild(bank, bank, 2, 2, skip=-1)
