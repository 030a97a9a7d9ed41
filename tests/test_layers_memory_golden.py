"""Scores and maps of memory banks against what M3DM's classes gave, working values included."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from golden import Golden
from polyspect.layers.decision import DecisionLayer
from polyspect.layers.memory import MemoryBank, reweight
from polyspect.layers.patches import match_patches, worst_patch
from polyspect.layers.smoothing import pil_blur

GUARD = 1e-5  # of the classes with one bank, points or RGB
FACTORS = {"xyz": 1.0, "rgb": 0.1, "fusion": 1.0}
CLASSES = {  # prefix: banks, guard, shrink
    "rgb_only": (("rgb",), GUARD, 1.0),
    "xyz_only": (("xyz",), GUARD, 1.0),
    "fusion_only": (("fusion",), 0.0, 1.0),
    "double": (("xyz", "rgb"), 0.0, 1000.0),
    "double_add": (("xyz", "rgb"), 0.0, 1.0),
    "triple": (("xyz", "rgb", "fusion"), 0.0, 1.0),
}
SINGLE = [(prefix, name) for prefix, (names, _, _) in CLASSES.items() for name in names]


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden("04_m3dm_uff_scores.npz")


def bank_score(bank: MemoryBank, patches: Tensor, guard: float = 0.0, shrink: float = 1.0) -> tuple[Tensor, Tensor]:
    """Image scores (B,) and patch distances (B, P) of parts' patches (B, P, D), as M3DM scores them."""
    grid = patches[:, None]  # B 1 P D
    counts = torch.ones(grid.shape[:3], dtype=torch.bool)
    distances, matches = match_patches(bank, grid, counts)
    score = worst_patch(
        bank, grid, distances, matches, counts, form="btf", scaled=True, n=3, guard=guard, divisor=shrink
    )
    return score, distances[:, 0]


def bank_of(golden: Golden, prefix: str, name: str) -> MemoryBank:
    """The bank as the class had it, normalised by the statistics that it used."""
    normalise = f"{prefix}_mean" in golden.stored
    bank = MemoryBank(name, ratio=1.0, normalise=normalise)
    bank.add(golden.tensor(f"bank_{name}"))
    bank.build(statistics=(golden.number(f"{prefix}_mean"), golden.number(f"{prefix}_std")) if normalise else None)
    if (prefix, name) == ("triple", "xyz"):  # the class appends a row of zeros after normalising
        bank.vectors = torch.cat([bank.vectors, torch.zeros_like(bank.vectors[:1])])
    return bank


def scored(golden: Golden, prefix: str, name: str) -> tuple[Tensor, Tensor]:
    """Score () and blurred map (224, 224) of one bank."""
    _, guard, shrink = CLASSES[prefix]
    patches = golden.tensor(f"patches_{name}")
    score, distances = bank_score(bank_of(golden, prefix, name), patches[None], guard=guard, shrink=shrink)
    side = round(len(patches) ** 0.5)
    grid = distances.view(1, 1, side, side)
    large = F.interpolate(grid, size=(224, 224), mode="bilinear", align_corners=False)[:, 0]
    return score[0], pil_blur(large, 4)[0]


def check_map(golden: Golden, name: str, got: Tensor) -> None:
    """Within one level of 255 of the map's maximum: the blur works in 8 bits."""
    got = got.flatten()[:: int(golden.number(f"{name}__stride"))]
    assert_close(got.double(), golden.tensor(f"{name}__sample").double(), rtol=0, atol=float(got.max()) / 255 + 1e-6)


@pytest.mark.parametrize(("prefix", "name"), SINGLE)
def test_working_values_of_a_bank(golden: Golden, prefix: str, name: str):
    several = len(CLASSES[prefix][0]) > 1
    key = f"{prefix}_{name}" if several else prefix
    bank, patches = bank_of(golden, prefix, name), golden.tensor(f"patches_{name}")
    distances, matches = bank.distance(patches)
    assert_close(distances, golden.tensor(f"{key}_D"), rtol=1e-5, atol=0)
    assert_close(matches, golden.tensor(f"{key}_nn_idx"))
    worst = int(distances.argmax())
    assert worst == golden.number(f"{key}_s_idx")
    assert float(distances[worst]) == pytest.approx(golden.number(f"{key}_s_star"), rel=1e-5)
    around = bank.around(patches[worst][None], matches[worst][None], 3)
    assert_close(around[0, 1:], golden.tensor(f"{key}_mstar_knn_dist"), rtol=1e-5, atol=0)
    _, guard, shrink = CLASSES[prefix]
    weight = reweight(distances[worst][None] / shrink, around / shrink, patches.shape[1], guard=guard)
    assert float(weight) == pytest.approx(golden.number(f"{key}_w"), rel=1e-5)
    score, blurred = scored(golden, prefix, name)
    assert float(score) == pytest.approx(golden.stored[f"{key}_score"].item(), rel=1e-5)
    check_map(golden, f"{key}_map", blurred)


def test_own_statistics(golden: Golden):
    bank = MemoryBank("rgb", normalise=True)
    bank.add(golden.tensor("bank_rgb"))
    assert bank.statistics() == pytest.approx((golden.number("rgb_only_mean"), golden.number("rgb_only_std")), rel=1e-6)


def test_plain_sum_of_two_banks(golden: Golden):
    score, blurred = (sum(parts) for parts in zip(*(scored(golden, "double_add", name) for name in ("xyz", "rgb"))))
    assert float(score) == pytest.approx(golden.stored["double_add_score"].item(), rel=1e-5)
    check_map(golden, "double_add_map", blurred)  # type: ignore[arg-type]


@pytest.mark.parametrize("prefix", ["double", "triple"])
def test_decision_layer_over_the_banks(golden: Golden, prefix: str):
    pytest.importorskip("sklearn", reason="the published program's solver needs scikit-learn")
    names = CLASSES[prefix][0]
    parts = [scored(golden, prefix, name) for name in names]
    factors = torch.tensor([FACTORS[name] for name in names])
    for kind, stored, values in (
        ("score", "dlf_scores", torch.stack([score for score, _ in parts])),
        ("map", "dlf_mapscores", torch.stack([blurred for _, blurred in parts], dim=-1)),
    ):
        layer = DecisionLayer(len(names), solver="sgd")
        layer.observe(golden.tensor(stored)[:, : len(names)])
        layer.fit()
        joined = layer.score(values * factors)
        if kind == "score":
            assert float(joined) == pytest.approx(golden.stored[f"{prefix}_score"].item(), rel=1e-5)
        else:
            check_map(golden, f"{prefix}_map", joined)
