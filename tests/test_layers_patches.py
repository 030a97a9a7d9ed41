"""Grids of patches: pooled means, which cells count, matches with a bank and the weight of the worst patch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from polyspect.layers.memory import MemoryBank
from polyspect.layers.patches import counting_cells, join_stages, match_patches, pool_to_grid, worst_patch


def bank_of(vectors: Tensor, mean: float = 0.0) -> MemoryBank:
    bank = MemoryBank("bank", ratio=1.0)
    bank.add(vectors)
    bank.build()
    bank.mean.fill_(mean)
    return bank


def test_patches_are_3x3_means_on_the_finest_grid():
    fine, coarse = torch.rand(1, 2, 4, 6), torch.rand(1, 3, 2, 3)
    joined = join_stages([fine, coarse], None)
    assert joined.shape == (1, 5, 4, 6)
    assert_close(joined[0, 1, 2, 3], fine[0, 1, 1:4, 2:5].mean())
    assert_close(joined[0, 1, 0, 0], fine[0, 1, :2, :2].mean())  # border cells average what they have
    assert_close(join_stages([torch.ones_like(fine), torch.ones_like(coarse)], None), torch.ones(1, 5, 4, 6))


def test_fixed_grid_drops_the_border_and_pools_as_published():
    fine, coarse = torch.rand(1, 512, 28, 28), torch.rand(1, 16, 14, 14)
    joined = join_stages([fine, coarse], 28)
    assert joined.shape == (1, 528, 28, 28)
    inner = torch.stack([fine[0, 7, i : i + 3, j : j + 3].mean() for i in range(26) for j in range(26)]).view(26, 26)
    assert_close(joined[0, 7], F.adaptive_avg_pool2d(inner[None], 28)[0])


def test_small_maps_are_pooled_without_a_window():
    maps = torch.tensor([[[[1.0, 2], [3, 4]]]])
    assert_close(pool_to_grid(maps, 4), maps.repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_cells_count_by_their_pixels():
    valid, foreground = torch.zeros(2, 8, 8, dtype=torch.bool), torch.zeros(2, 8, 8, dtype=torch.bool)
    valid[0, 3, 3] = valid[0, 4, 7] = foreground[0, 0, 0] = foreground[0, 7, 7] = True
    masks = {"valid": valid, "foreground": foreground}
    assert bool(counting_cells(masks, (2, 2), measured=False, on_part=False).all())
    assert counting_cells(masks, (2, 2), measured=True, on_part=False).tolist() == [
        [[True, False], [False, True]],
        [[False, False], [False, False]],
    ]
    assert counting_cells(masks, (4, 4), measured=False, on_part=True)[0].nonzero().tolist() == [[0, 0], [3, 3]]
    assert counting_cells(masks, (4, 4), measured=True, on_part=True).sum() == 0


def test_a_patch_that_does_not_count_has_the_mean_distance():
    bank = bank_of(torch.tensor([[0.0, 0], [3, 4]]), mean=7.0)
    patches = torch.tensor([[[[0.0, 1], [3, 2], [9, 9]]]])  # B=1, 1 x 3 cells
    distances, matches = match_patches(bank, patches, torch.tensor([[[True, True, False]]]))
    assert distances.tolist() == [[[1.0, 2.0, 7.0]]]
    assert matches.tolist() == [[[0, 1, 0]]]


@pytest.mark.parametrize(
    ("near", "form", "scaled", "expected"),
    [
        # D = 4, s* = 2: rows of the bank at distances 2 (the match), 2, 2 of the worst patch: w = 1/2
        ((2.0, 2.0), "btf", True, 1.0),
        # 2 and 4: w = 1 - e / (e + e^2)
        ((2.0, 4.0), "btf", True, 2 * (1 - math.e / (math.e + math.e**2))),
        ((2.0, 4.0), "btf", False, 2 * (1 - math.e**2 / (math.e**2 + math.e**4))),
        ((2.0, 4.0), "patchcore", True, 2 * (1 - math.e / (2 * math.e + math.e**2))),
        ((2.0, 4.0), "none", True, 2.0),
    ],
)
def test_weight_of_the_worst_patch(near, form, scaled, expected):
    worst = torch.zeros(4)
    rows = torch.zeros(4, 4)
    rows[0, 0] = 2.0  # the match m*
    rows[1, 1], rows[2, 2] = near  # the rows nearest to m*
    rows[3, 3] = 50.0
    patches = torch.stack([worst, rows[0]]).view(1, 1, 2, 4)
    bank = bank_of(rows)
    counts = torch.ones(1, 1, 2, dtype=torch.bool)
    distances, matches = match_patches(bank, patches, counts)
    score = worst_patch(bank, patches, distances, matches, counts, form=form, scaled=scaled, n=3)
    assert_close(score, torch.tensor([expected]), rtol=1e-6, atol=0)


def test_a_part_in_which_no_patch_counts_has_the_mean_distance_as_score():
    bank = bank_of(torch.eye(4), mean=3.0)
    patches, counts = torch.rand(2, 2, 2, 4), torch.ones(2, 2, 2, dtype=torch.bool)
    counts[1] = False
    distances, matches = match_patches(bank, patches, counts)
    score = worst_patch(bank, patches, distances, matches, counts, form="btf", scaled=True, n=3)
    assert float(score[1]) == 3.0
    assert 0 < float(score[0]) < float(distances[0].max())
