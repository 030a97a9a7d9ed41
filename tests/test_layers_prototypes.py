"""Prototypes of normal features: Eqs. 4-6 of MMRD by hand, and the sample that they start from."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from polyspect.layers.prototypes import Prototypes, RandomRows, prototype_loss


def bank(vectors, tau=1.0):
    vectors = torch.as_tensor(vectors)
    made = Prototypes(*vectors.shape, tau)
    with torch.no_grad():
        made.vectors.copy_(vectors)
    return made


def one(vector):
    return torch.tensor(vector).view(1, -1, 1, 1)


def test_two_prototypes_by_hand():
    prototypes, feature = bank([[1.0, 0.0], [0.0, 2.0]]), one([3.0, 4.0])
    assert_close(prototypes.weights(feature).flatten(), torch.tensor([0.450166, 0.549834]), atol=1e-6, rtol=0)
    prior = prototypes(feature)
    assert_close(prior.flatten(), torch.tensor([0.450166, 1.099668]), atol=1e-6, rtol=0)
    assert float(prototype_loss(feature, prior).detach()) == pytest.approx(7.456789, rel=1e-6)
    sharp = bank([[1.0, 0.0], [0.0, 2.0]], tau=0.1)
    assert_close(sharp.weights(feature).flatten(), torch.tensor([0.119203, 0.880797]), atol=1e-6, rtol=0)


def test_weights_of_one_match_among_fifty():
    vectors = torch.eye(50)
    weights = bank(vectors).weights(one([1.0] + [0.0] * 49)).flatten()
    assert_close(weights[:2], torch.tensor([0.052559, 0.019336]), atol=1e-6, rtol=0)
    x = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    many = bank(torch.randn(30, 8, generator=torch.Generator().manual_seed(1))).weights(x)
    assert float((many.amax(-1) / many.amin(-1)).detach().max()) <= math.e**2
    assert_close(many.sum(-1), torch.ones(2, 4, 4))


def test_mixed_precision_leaves_them_in_single_precision():
    vectors = torch.randn(7, 5, generator=torch.Generator().manual_seed(1))
    x = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(2))
    plain = bank(vectors)(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = bank(vectors)(x)
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, plain)


def test_the_order_of_prototypes_does_not_matter_and_zero_features_weigh_all_alike():
    vectors = torch.randn(7, 5, generator=torch.Generator().manual_seed(1))
    x = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(2))
    assert_close(bank(vectors)(x), bank(vectors.flip(0))(x))
    assert_close(bank(vectors).weights(torch.zeros(1, 5, 1, 1)).flatten(), torch.full((7,), 1 / 7))


def test_equations_as_loops():
    vectors = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    x = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(2))
    prior = bank(vectors, tau=0.3)(x)
    for b, i, j in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(4)):
        f = x[b, :, i, j]
        w = torch.stack([f @ p / (f.norm() * p.norm() * 0.3) for p in vectors]).softmax(0)
        assert_close(prior[b, :, i, j], w @ vectors)


def test_one_prototype_learns_the_mean_feature():
    x = torch.randn(3, 6, 4, 4, generator=torch.Generator().manual_seed(0)) + 2
    mean = x.mean((0, 2, 3))
    best = bank(mean[None])
    assert_close(best(x), mean.view(1, 6, 1, 1).expand(3, 6, 4, 4))
    loss = prototype_loss(x, best(x))
    assert float(loss.detach()) == pytest.approx(float(x.var((0, 2, 3), unbiased=False).mean()), rel=1e-5)
    loss.backward()
    assert_close(best.vectors.grad, torch.zeros(1, 6), atol=1e-6, rtol=0)


def test_masked_loss_is_the_loss_of_what_counts():
    x, y = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    cells = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(1)) > 0.5
    expected = torch.stack([(x - y).square()[b, :, i, j].mean() for b, i, j in cells.nonzero()]).mean()
    assert_close(prototype_loss(x, y, cells), expected)
    assert float(prototype_loss(x, y, torch.zeros_like(cells))) == 0


def test_random_rows_are_distinct_rows_whatever_the_batches():
    rows = torch.arange(1000.0)[:, None]
    sample = RandomRows(40, seed=3)
    for part in rows.split(170):
        sample.add(part)
    drawn = sample.take()
    assert drawn.shape == (40, 1)
    assert len(set(drawn.flatten().tolist())) == 40
    assert sample.take().numel() == 0
    small = RandomRows(40, seed=3)
    small.add(rows[:7])
    assert sorted(small.take().flatten().tolist()) == list(range(7))


def test_random_rows_are_uniform():
    hits = torch.zeros(60)
    for seed in range(600):
        sample = RandomRows(6, seed)
        for part in torch.arange(60).split(25):
            sample.add(part[:, None].float())
        hits[sample.take().flatten().long()] += 1
    assert hits.sum() == 3600
    assert float(((hits - 60) ** 2 / 54).sum()) < 90  # chi-squared with 59 degrees of freedom: 0.6 % above 90
