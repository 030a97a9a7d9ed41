"""Several banks and their decision layers against the equations as loops."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from polyspect.errors import ConfigError, NotFittedError
from polyspect.layers.coreset import l1_coreset
from polyspect.layers.decision import DecisionLayer
from polyspect.layers.distances import Metric, MetricBank
from polyspect.layers.joined_banks import Banks, Decisions, Patches
from polyspect.layers.memory import MemoryBank


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bank(name: str, rows: Tensor) -> MemoryBank:
    made = MemoryBank(name, ratio=1.0)
    made.add(rows)
    made.build()
    return made


@pytest.fixture
def banks() -> Banks:
    return Banks({"a": bank("a", random(9, 4)), "b": bank("b", random(7, 3, seed=1))})


@pytest.fixture
def patches() -> dict[str, Patches]:
    counts = torch.ones(2, 3, 2, dtype=torch.bool)
    counts[0, 1, 1] = False
    return {
        "a": Patches(random(2, 3, 2, 4, seed=2), counts),
        "b": Patches(random(2, 3, 2, 3, seed=3), torch.ones_like(counts)),
    }


def test_scores_and_maps_of_each_bank_as_loops(banks: Banks, patches: dict[str, Patches]):
    banks["a"].mean.fill_(0.5)
    scores, maps = banks.measure(patches, (6, 4), blur="gaussian", sigma=0.0, form="none", n=3)
    for j, (name, one) in enumerate(banks.named()):
        own = patches[name]
        for b in range(2):
            nearest = torch.cdist(own.values[b].flatten(0, 1), one.vectors).amin(1).view(3, 2)
            nearest[~own.counts[b]] = 0.5
            assert_close(scores[b, j], nearest[own.counts[b]].max())
            large = F.interpolate(nearest[None, None], size=(6, 4), mode="bilinear", align_corners=False)
            assert_close(maps[b, ..., j], large[0, 0])


def test_levels_are_of_the_patches_that_count_and_leave_banks_out(banks: Banks, patches: dict[str, Patches]):
    banks.observe_levels(patches, but=("b",))
    banks.set_levels(but=("b",))
    own = patches["a"]
    distances = torch.cdist(own.values[own.counts], banks["a"].vectors).amin(1)
    assert float(banks["a"].mean) == pytest.approx(float(distances.mean()), rel=1e-6)
    assert float(banks["b"].mean) == 0


def test_a_decision_is_the_sum_of_weighted_factors_times_values():
    decisions = Decisions({"a": 2.0, "b": 0.5}, partial(DecisionLayer, nu=0.5))
    scores, pixels = random(20, 2).abs() + 1, random(300, 2, seed=1).abs() + 1
    with pytest.raises(NotFittedError):
        decisions.shares("score", scores)
    decisions.observe(scores, pixels)
    decisions.fit()
    alone = DecisionLayer(2, nu=0.5)
    alone.observe(pixels * torch.tensor([2.0, 0.5]))
    alone.fit()
    assert torch.equal(decisions["map"].weight, alone.weight)
    maps = random(1, 4, 5, 2, seed=2).abs()
    found = decisions.judge(scores[:1], maps, "reweighted", 0.01)
    w, v = (decisions[kind].weight.float() for kind in ("score", "map"))
    assert_close(found.score[0], 2.0 * scores[0, 0] * w[0] + 0.5 * scores[0, 1] * w[1])
    assert_close(found.branch_maps["b"], 0.5 * maps[..., 1] * v[1])
    assert_close(found.map, sum(found.branch_maps.values()))
    assert torch.equal(decisions.judge(scores[:1], maps, "max_map", 0.01).score, found.map.flatten(1).amax(1))


def test_without_a_layer_values_are_added_as_they_are():
    decisions = Decisions({"a": 2.0, "b": 0.5}, None)
    assert len(decisions) == 0
    values = random(3, 2)
    assert decisions.shares("score", values) is values


@pytest.mark.parametrize("metric", ["l2", "l1", "cos"])
def test_a_bank_by_another_metric(metric: Metric):
    rows, queries = random(8, 5), random(3, 5, seed=1)
    one = MetricBank("x", metric, metric, metric, ratio=1.0, normalise=True)
    with pytest.raises(NotFittedError, match="memory bank 'x' is empty"):
        one.distance(queries)
    one.add(rows)
    one.build()
    scaled = (queries - rows.mean()) / rows.std()

    def distance(a: Tensor, b: Tensor) -> Tensor:
        if metric == "cos":
            return 1 - F.cosine_similarity(a, b, dim=-1)
        return (a - b).abs().sum(-1) if metric == "l1" else (a - b).norm(dim=-1)

    table = distance(scaled[:, None], one.vectors)  # queries rows
    distances, matches = one.distance(queries)
    assert_close(distances, table.amin(1), rtol=1e-4, atol=1e-6)
    assert torch.equal(matches, table.argmin(1))
    beside = distance(one.vectors[matches][:, None], one.vectors).argsort(1)[:, :3]
    assert_close(one.around(queries, matches, 3), table.gather(1, beside), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("metric", ["l1", "cos"])
def test_the_coreset_of_another_metric_is_chosen_by_it(metric: Metric):
    rows = random(40, 6) * torch.linspace(0.2, 5, 40)[:, None]
    bank = MetricBank("x", metric, metric, metric, ratio=0.2)
    bank.add(rows)
    bank.build()
    unit = F.normalize(rows, dim=1)
    table = torch.cdist(rows, rows, p=1.0) if metric == "l1" else 1 - unit @ unit.T
    chosen = [0]
    while len(chosen) < 8:
        chosen.append(int(table[chosen].amin(0).argmax()))
    assert torch.equal(bank.vectors, rows[chosen])
    other = MetricBank("x", metric, metric, "l2", ratio=0.2)
    other.add(rows)
    other.build()
    assert not torch.equal(other.vectors, bank.vectors)


def test_an_l1_coreset_takes_copies_last_and_ties_by_index():
    rows = torch.tensor([[0.0], [2.0], [-2.0], [0.0], [2.0]])
    seen = []
    assert l1_coreset(rows, 5, progress=lambda done, size: seen.append((done, size))).tolist() == [0, 1, 2, 3, 4]
    assert seen[-1] == (5, 5)
    assert l1_coreset(rows, 1, start=2).tolist() == [2]
    with pytest.raises(ConfigError, match="6 rows"):
        l1_coreset(rows, 6)


def test_pixels_without_a_group_have_the_banks_level():
    bank = MemoryBank("x", ratio=1.0)
    bank.add(random(6, 4))
    bank.build()
    bank.observe(torch.tensor([2.0, 3.0]))
    bank.set_level()
    near = torch.zeros(1, 16, 2, dtype=torch.int64)
    share = torch.zeros(1, 16, 2)
    share[:, :8] = 0.5  # the upper half listens to group 0
    patches = Patches(random(1, 1, 3, 4, seed=1), torch.ones(1, 1, 3, dtype=torch.bool), near=near, share=share)
    maps = Banks({"x": bank}).measure({"x": patches}, (4, 4), blur="none", sigma=0.0, form="none", n=1)[1][0, ..., 0]
    own = bank.distance(patches.values[0, 0])[0][0]
    assert_close(maps[:2], own.expand(2, 4))
    assert_close(maps[2:], torch.full((2, 4), 2.5))
