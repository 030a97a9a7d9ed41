"""M3DM: its equations as loops, its switches, the released program's stored outputs."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from golden import Golden, filled_state, layer
from polyspect.cli import main
from polyspect.detectors.contract import configure
from polyspect.detectors.m3dm import (
    M3DM,
    RELEASED_UPDATES,
    M3DMConfig,
    Patches,
    released_pairs,
    released_rate,
    warmup_cosine,
)
from polyspect.errors import ConfigError, ShapeError, WeightsError
from polyspect.layers.rgb_points import measured_patches, point_patches
from polyspect.samples import Batch, Features
from tiny import SIZE, blinded, take, tiny_batch

SMALL = {
    "weights": "random",
    "point_weights": "random",
    "point_backbone": "point_mae",
    "image_score": "reweighted",
    "point_layers": (0, 1),
    "groups": 32,
    "group_size": 8,
    "patch": 8,
    "ratio_xyz": 0.5,
    "ratio_rgb": 0.5,
    "ratio_fused": 0.5,
}


def fit(detector: M3DM, train: Batch, validation: Batch) -> M3DM:
    """Run the stages that observe, part by part; feature fusion keeps its first weights."""
    splits = {"train": train, "validation": validation}
    detector.eval()
    with torch.no_grad():
        for stage in detector.stages():
            if hasattr(stage, "update"):
                batch = splits[stage.split]
                for index in range(len(batch)):
                    stage.update(detector.extract(take(batch, [index])))
                stage.finish()
    detector.fitted.fill_(True)
    return detector


LAMBDAS = {"lambda_xyz": 1.0, "lambda_rgb": 0.1, "lambda_fused": 1.0}  # the program's


def fitted(**settings: Any) -> M3DM:
    return fit(M3DM(M3DMConfig(**{**SMALL, **settings})), tiny_batch(range(5)), tiny_batch(range(50, 52)))


@pytest.fixture(scope="module")
def detector() -> M3DM:
    return fitted()


@pytest.fixture(scope="module")
def parts() -> Batch:
    return tiny_batch([100, 101], defect=True)


# -- the equations ---------------------------------------------------------------------------------------------------


def test_scores_equal_the_equations_written_as_loops(parts: Batch):
    detector = fitted(blur="none", **LAMBDAS)
    with torch.no_grad():
        features, result = detector.extract(parts), detector(parts)
        uff = detector.uff
        assert uff is not None
        x = point_patches(features, (8, 8))
        measured = measured_patches(features, (8, 8))
        r = features["rgb.grid"].flatten(2).mT
        patches = {"xyz": x, "rgb": r, "fused": uff(x, r)}
    total, score = torch.zeros(2, SIZE, SIZE, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for j, (name, bank) in enumerate(detector.named_banks()):
        factor = {"xyz": 1.0, "rgb": 0.1, "fused": 1.0}[name]
        normal = (patches[name] - bank.feature_mean) / bank.feature_std
        for b in range(2):
            d, best = torch.full((64,), float(bank.mean), dtype=torch.float64), (-1.0, 0, 0)
            for p in range(64):
                if name != "rgb" and not measured[b, p]:
                    continue
                gaps = (bank.vectors - normal[b, p]).norm(dim=1)
                d[p] = gaps.min()
                if float(gaps.min()) > best[0]:
                    best = (float(gaps.min()), p, int(gaps.argmin()))
            near = (bank.vectors - bank.vectors[best[2]]).norm(dim=1).argsort()[1:3]
            gaps = (bank.vectors[near] - normal[b, best[1]]).norm(dim=1)
            root = normal.shape[-1] ** 0.5
            w = 1 - math.exp(best[0] / root) / float((gaps / root).exp().sum())
            score[b] += detector.decisions["score"].weight[j] * factor * w * best[0]
            up = F.interpolate(d.view(1, 1, 8, 8), size=(SIZE, SIZE), mode="bilinear")[0, 0]
            total[b] += detector.decisions["map"].weight[j] * factor * up
    assert_close(result.map.double(), total, rtol=1e-4, atol=1e-4)
    assert_close(result.score.double(), score, rtol=1e-4, atol=1e-4)


def test_branch_maps_add_up_to_the_map(detector: M3DM, parts: Batch):
    result = detector(parts)
    assert list(result.branch_maps) == ["xyz", "rgb", "fused"]
    assert_close(sum(result.branch_maps.values()), result.map)


def test_the_card_s_bank_of_two_dimensions():
    """Bank (0,0), (1,0), (0,2), (5,5), patches (0.2, 0.1) and (3, 0)."""
    rows = torch.tensor([[0.0, 0], [1, 0], [0, 2], [5, 5]])
    patches = torch.tensor([[0.2, 0.1], [3, 0]]).view(1, 1, 2, 2)
    for divisor, weight in ((1.0, 0.805455), (1000.0, 0.500460)):
        detector = M3DM(
            M3DMConfig(
                **{**SMALL, "ratio_rgb": 1.0}, banks=("rgb",), bank_stats="none", blur="none", reweight_divisor=divisor
            )
        )
        detector.add_patches({"rgb": counted(rows.view(1, 2, 2, 2))})
        detector.build_banks()
        scores, maps = detector.measure({"rgb": counted(patches)}, (1, 2))
        assert_close(maps.flatten(), torch.tensor([0.223607, 2.0]), rtol=1e-5, atol=0)
        assert float(scores) == pytest.approx(weight * 2.0 / divisor, rel=1e-5)


def counted(values: Tensor) -> Patches:
    return Patches(values, torch.ones(values.shape[:3], dtype=torch.bool))


@pytest.mark.parametrize("balanced", [False, True])
def test_values_of_training_parts_decide(balanced: bool):
    """Rows of the layer: parts and pixels with points; nu-fraction of lowest rows has mean w at the minimum."""
    detector, train = fitted(**({} if balanced else LAMBDAS)), tiny_batch(range(5))
    with torch.no_grad():
        features = detector.extract(train)
        scores, maps = detector.measure(detector.patches(features), (SIZE, SIZE))
    on_part = (features["xyz.share"].sum(-1) > 0).view(5, SIZE, SIZE)
    assert 0 < int(on_part.sum()) < on_part.numel()
    for kind, rows in (("score", scores), ("map", maps[on_part])):
        layer = detector.decisions[kind]
        factors = 1 / rows.double().mean(0) if balanced else torch.tensor([1.0, 0.1, 1.0]).double()
        rows = rows.double() * factors
        assert layer.counts.tolist() == [len(rows)] * 2
        weight = layer.weight / factors if balanced else layer.weight  # a balanced layer takes values as they come
        values = rows @ weight
        cut = values.sort().values[: len(rows) // 2]
        assert float(cut.mean()) == pytest.approx(float(weight @ weight), rel=0.5 / len(cut) + 1e-3)


# -- banks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("banks", [("xyz",), ("rgb",), ("fused",), ("rgb", "xyz"), ("xyz", "fused"), ("rgb", "fused")])
def test_any_banks(banks: tuple[str, ...], parts: Batch):
    detector = fitted(banks=banks)
    needed = set(detector.modalities)
    assert needed == ({"rgb", "xyz"} if "fused" in banks or len(banks) == 2 else set(banks))
    images = {name: image for name, image in parts.images.items() if name in needed}
    result = detector(replace(parts, images=images))
    assert list(result.branch_maps) == list(banks)
    assert len(detector.decisions) == (2 if len(banks) == 2 else 0)
    if len(banks) == 1:
        assert torch.equal(result.map, result.branch_maps[banks[0]])
    blind = detector(blinded(parts))
    assert bool(blind.map.isfinite().all())
    assert bool(blind.score.isfinite().all())


def test_sum_instead_of_a_decision(parts: Batch):
    detector = fitted(fusion="sum")
    scores, maps = detector.measure(detector.patches(detector.extract(parts)), (SIZE, SIZE))
    result = detector(parts)
    assert_close(result.score, scores.sum(-1))
    assert_close(result.map, maps.sum(-1))
    assert [stage.name for stage in detector.stages()] == ["feature_fusion", "banks", "levels"]


def test_scores_of_the_map(parts: Batch):
    result = fitted(image_score="max_map")(parts)
    assert_close(result.score, result.map.flatten(1).amax(1))
    result = fitted(image_score="top_mean", top_share=0.5)(parts)
    assert_close(result.score, result.map.flatten(1).sort(1, descending=True).values[:, : SIZE * SIZE // 2].mean(1))


def test_unmeasured_patches_are_out_or_exact_zeros(parts: Batch):
    whole = {"ratio_xyz": 1.0, "ratio_rgb": 1.0, "ratio_fused": 1.0, "bank_stats": "none", "fusion": "sum"}
    masked, kept = fitted(**whole), fitted(**whole, mask_invalid=False)
    train = masked.extract(tiny_batch(range(5)))
    on_part = int(measured_patches(train, (8, 8)).sum())
    assert [len(bank.vectors) for _, bank in masked.named_banks()] == [on_part, 320, on_part]
    assert [len(bank.vectors) for _, bank in kept.named_banks()] == [320, 320, 320]
    zeros = {name: int((bank.vectors == 0).all(1).sum()) for name, bank in kept.named_banks()}
    assert zeros == {"xyz": 320 - on_part, "rgb": 0, "fused": 0}
    empty = ~measured_patches(kept.extract(parts), (8, 8)).view(2, 8, 8)
    own = kept.patches(kept.extract(parts))["xyz"]
    distances = dict(kept.named_banks())["xyz"].distance(own.values[empty])[0]
    assert torch.equal(distances, torch.zeros_like(distances))  # the card's acceptance check 11
    with torch.no_grad():
        blind = masked.measure(masked.patches(masked.extract(blinded(parts))), (SIZE, SIZE))[1]
    for j, name in ((0, "xyz"), (2, "fused")):
        level = dict(masked.named_banks())[name].mean.float()
        assert_close(blind[..., j], level.expand(2, SIZE, SIZE), rtol=1e-4, atol=0)


@pytest.mark.parametrize(("patch", "uff"), [(8, True), (4, True), (4, False), (6, True)])
def test_patches_that_are_alike_are_matched_once(patch: int, uff: bool, parts: Batch):
    detector = fitted(mask_invalid=False, patch=patch, uff=uff)
    with torch.no_grad():
        patches = detector.patches(detector.extract(parts))
        quick = detector.measure(patches, (SIZE, SIZE))
        slow = detector.measure({n: replace(own, alike=None) for n, own in patches.items()}, (SIZE, SIZE))
    assert_close(quick, slow, rtol=1e-5, atol=1e-5)
    for name in ("xyz", "fused"):
        alike, values = patches[name].alike, patches[name].values.flatten(0, 2)
        if alike is None:
            assert (name, patch) == ("fused", 6)
            continue
        distinct, number = alike.flatten().unique(return_inverse=True)
        assert len(distinct) < len(number) or (name, patch) == ("fused", 8)  # tokens as coarse as the patches
        assert len(values.unique(dim=0)) <= len(distinct)
        for n in range(len(distinct)):
            same = values[number == n]
            assert torch.equal(same, same[:1].expand_as(same))


def test_only_the_first_parts_fill_the_geometric_banks():
    detector = fitted(xyz_parts=2, mask_invalid=False, ratio_rgb=1.0, ratio_xyz=1.0)
    assert [bank.counts.tolist() for _, bank in detector.named_banks()] == [[128] * 2, [320] * 2, [128] * 2]
    features = detector.extract(tiny_batch(range(2)))
    assert torch.equal(
        detector.named_banks()[0][1].vectors,
        (point_patches(features, (8, 8)).flatten(0, 1) - detector.named_banks()[0][1].feature_mean.float())
        / detector.named_banks()[0][1].feature_std.float(),
    )


def test_released_statistics_and_sizes():
    detector = fitted(bank_stats="released", coreset_sizes="released", mask_invalid=False, remove_zero_rows=True)
    features = detector.extract(tiny_batch(range(5)))
    with torch.no_grad():
        patches = detector.patches(features)
    banks = dict(detector.named_banks())
    for bank in banks.values():
        assert float(bank.feature_mean) == pytest.approx(float(patches["xyz"].values.double().mean()), rel=1e-4)
        assert float(bank.feature_std) == pytest.approx(float(patches["rgb"].values.double().std()), rel=1e-4)
    assert [len(bank.vectors) for bank in banks.values()] == [161, 80, 80]  # half of 320 and a row of zeros; halves
    assert bool((banks["xyz"].vectors[-1] == 0).all())
    own = fitted(mask_invalid=False)
    assert [len(bank.vectors) for _, bank in own.named_banks()] == [160, 160, 160]
    for name, bank in own.named_banks():
        assert float(bank.feature_std) == pytest.approx(float(patches[name].values.double().std()), rel=1e-4)


def test_rows_with_a_zero_go_where_nothing_was_normalised():
    detector = fitted(bank_stats="none", remove_zero_rows=True, mask_invalid=False, ratio_xyz=1.0)
    rows = dict(detector.named_banks())["xyz"].vectors
    assert len(rows) == 1 + int(measured_patches(detector.extract(tiny_batch(range(5))), (8, 8)).sum())
    assert (rows == 0).all(1).nonzero().flatten().tolist() == [len(rows) - 1]


def test_distances_scale_with_features_and_ignore_a_shift(parts: Batch):
    detector, moved = (M3DM(M3DMConfig(**SMALL, banks=("rgb",), bank_stats="none", blur="none")) for _ in range(2))
    values = detector.patches(detector.extract(tiny_batch(range(5))))["rgb"].values
    test = detector.patches(detector.extract(parts))["rgb"].values
    shift = torch.linspace(-1, 1, values.shape[-1])
    for one, change in ((detector, lambda v: v), (moved, lambda v: 3 * v + shift)):
        one.add_patches({"rgb": counted(change(values))})
        one.build_banks()
    before = detector.measure({"rgb": counted(test)}, (8, 8))[1]
    after = moved.measure({"rgb": counted(3 * test + shift)}, (8, 8))[1]
    assert_close(after, 3 * before, rtol=1e-4, atol=1e-4)


# -- whole groups ----------------------------------------------------------------------------------------------------


def test_distances_of_groups_are_interpolated_at_the_pixels(parts: Batch):
    detector = fitted(banks=("xyz",), patch="groups", blur="none")
    with torch.no_grad():
        features, result = detector.extract(parts), detector(parts)
    bank = dict(detector.named_banks())["xyz"]
    values = (features["xyz.groups"] - bank.feature_mean.float()) / bank.feature_std.float()
    d = torch.stack([torch.cdist(v, bank.vectors).amin(1) for v in values])  # B G
    for b, pixel in ((0, 32 * SIZE + 30), (1, 25 * SIZE + 40), (0, 0)):
        near, share = features["xyz.near"][b, pixel].long(), features["xyz.share"][b, pixel]
        expected = sum(float(d[b, g] * s) for g, s in zip(near, share)) + float((1 - share.sum()) * bank.mean)
        assert float(result.map[b].flatten()[pixel]) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    nothing = detector(blinded(parts))  # a part without points is average, no paragon
    assert_close(nothing.map, torch.full_like(nothing.map, float(bank.mean)))
    assert_close(nothing.score, torch.full_like(nothing.score, float(bank.mean)))
    with pytest.raises(ConfigError, match="patch"):
        M3DMConfig(patch="groups")


# -- feature fusion --------------------------------------------------------------------------------------------------


def test_every_patch_is_fused_as_eq_3(parts: Batch):
    for settings in ({"patch": 8}, {"patch": 4}, {"patch": 6}):
        detector = M3DM(M3DMConfig(**{**SMALL, **settings}))
        with torch.no_grad():
            features = detector.extract(parts)
            got = detector.patches(features)["fused"].values
            grid = (got.shape[1], got.shape[2])
            assert detector.uff is not None
            r = F.adaptive_avg_pool2d(features["rgb.grid"], grid).flatten(2).mT
            assert_close(got.flatten(1, 2), detector.uff(point_patches(features, grid), r), rtol=1e-4, atol=1e-5)
    plain = M3DM(M3DMConfig(**SMALL, uff=False))
    assert plain.uff is None
    with torch.no_grad():
        got = plain.patches(features)["fused"].values.flatten(1, 2)
    x, r = point_patches(features, (8, 8)), features["rgb.grid"].flatten(2).mT
    assert torch.equal(got, torch.cat([x, r], dim=-1))


def test_loss_is_eq_2_over_measured_patches():
    detector = M3DM(M3DMConfig(**SMALL, uff_patches=None))
    assert detector.uff is not None
    features = detector.extract(tiny_batch(range(4)))

    @torch.no_grad()
    def expected(some: Features) -> float:
        x, measured = point_patches(some, (8, 8)), measured_patches(some, (8, 8))
        u, v = detector.uff.xyz(x[measured]), detector.uff.rgb(some["rgb.grid"].flatten(2).mT[measured])
        q, k = F.normalize(detector.uff.rgb.head(v), dim=1), F.normalize(detector.uff.xyz.head(u), dim=1)
        return float(2 * F.cross_entropy(q @ k.T, torch.arange(len(q))))

    assert detector.loss(features)["contrast"].item() == pytest.approx(expected(features), rel=1e-4)
    pairs = [{name: tensor[at : at + 2] for name, tensor in features.items()} for at in (0, 2)]
    apart = M3DM(M3DMConfig(**SMALL, uff_patches=None, uff_contrast=2))
    mean = sum(map(expected, pairs)) / 2
    value = apart.loss(features)["contrast"]
    assert value.item() == pytest.approx(mean, rel=1e-4)
    value.backward()
    assert apart.uff is not None
    assert float(apart.uff.rgb.head.weight.grad.abs().max()) > 0
    few = M3DM(M3DMConfig(**SMALL, uff_patches=10))
    assert 2 * math.log(1 + 9 / math.e**2) <= few.loss(features)["contrast"].item() <= 2 * math.log(1 + 9 * math.e**2)


def test_training_lowers_the_loss():
    detector = M3DM(M3DMConfig(**SMALL, uff_steps=15, uff_warmup=3, uff_batch=3))
    stage = detector.stages()[0]
    features = detector.extract(tiny_batch(range(3)))
    optimizer = stage.optimizer(list(stage.parameters()))  # type: ignore[union-attr]
    schedule = stage.schedule(optimizer)  # type: ignore[union-attr,misc]
    first = detector.loss(features)["contrast"].item()
    for _ in range(15):
        optimizer.zero_grad()
        detector.loss(features)["contrast"].backward()
        optimizer.step()
        schedule.step()
    assert detector.loss(features)["contrast"].item() < first - 0.1
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0)


def test_rates():
    assert [warmup_cosine(step, 4, 8) for step in range(9)] == pytest.approx(
        [0.25, 0.5, 0.75, 1, 1, 0.853553, 0.5, 0.146447, 0], abs=1e-6
    )
    rates = [0.003 * released_rate(step) for step in range(RELEASED_UPDATES)]
    assert rates[:2] == pytest.approx([0, 0.000289], abs=5e-7)
    assert rates[9:12] == pytest.approx([0.002602, 0.003, 0.002983], abs=5e-7)
    assert rates[-1] == pytest.approx(0.000032, abs=5e-7)


def test_released_pairs():
    tokens = torch.arange(784.0).view(1, 1, 28, 28)
    paired = released_pairs(tokens, (56, 56))[0, :, 0]
    assert paired[[0, 1, 2, 784]].tolist() == [0, 4, 8, 1]
    place = F.interpolate(tokens, scale_factor=2, mode="nearest").flatten()
    assert int((paired == place).sum()) == 8
    with pytest.raises(ShapeError, match="half as fine as the 56x28"):
        released_pairs(tokens, (56, 28))
    detector = M3DM(M3DMConfig(**{**SMALL, "patch": 4}, uff_pairs="released"))
    features = detector.extract(tiny_batch([0, 1]))
    aligned = M3DM(M3DMConfig(**{**SMALL, "patch": 4}))
    assert detector.loss(features)["contrast"].item() != aligned.loss(features)["contrast"].item()


def test_a_trained_file_is_used_instead_of_training(tmp_path):
    detector = M3DM(M3DMConfig(**SMALL))
    wide = detector.extractor.channels
    shapes: dict[str, tuple[int, ...]] = {}
    for half, C in wide.items():
        shapes |= layer(f"{half}_norm", C) | layer(f"{half}_head", 256, C)
        shapes |= layer(f"{half}_mlp.fc1", 4 * C, C) | layer(f"{half}_mlp.fc2", C, 4 * C)
    state = filled_state(shapes)
    path = tmp_path / "uff.pth"
    torch.save({"model": state, "epoch": 0}, path)
    loaded = M3DM(M3DMConfig(**SMALL, uff_checkpoint=str(path)))
    assert loaded.uff is not None
    assert torch.equal(loaded.uff.rgb.mlp[2].weight, state["rgb_mlp.fc2.weight"])
    assert [stage.name for stage in loaded.stages()] == ["banks", "levels", "decision"]
    assert loaded.sources["uff"]["source"] == "file"
    written = tmp_path / "uff.safetensors"
    assert main(["weights", "import", str(path), "--out", str(written)]) == 0
    imported = M3DM(M3DMConfig(**SMALL, uff_checkpoint=str(written))).uff
    assert imported is not None
    assert all(torch.equal(a, b) for a, b in zip(imported.parameters(), loaded.uff.parameters(), strict=True))
    del state["xyz_head.bias"]
    torch.save({"model": state}, path)
    with pytest.raises(WeightsError, match=r"xyz\.head\.bias"):
        M3DM(M3DMConfig(**SMALL, uff_checkpoint=str(path)))


# -- the released program --------------------------------------------------------------------------------------------

CLASSES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {  # prefix of stored outputs: banks, settings
    "xyz_only": (("xyz",), {"reweight_guard": 1e-5}),
    "rgb_only": (("rgb",), {"reweight_guard": 1e-5}),
    "fusion_only": (("fused",), {}),
    "double": (("xyz", "rgb"), {"reweight_divisor": 1000.0}),
    "double_add": (("xyz", "rgb"), {"fusion": "sum"}),
    "triple": (("xyz", "rgb", "fused"), {"remove_zero_rows": True}),
}


@pytest.mark.parametrize("prefix", list(CLASSES))
def test_released_classes_against_their_stored_outputs(prefix: str):
    pytest.importorskip("sklearn", reason="the released program's solver needs scikit-learn")
    golden = Golden("04_m3dm_uff_scores.npz")
    banks, settings = CLASSES[prefix]
    preset = {**SMALL, "remove_zero_rows": False, "coreset_sizes": "share", "banks": banks}
    whole = {"ratio_xyz": 1.0, "ratio_rgb": 1.0, "ratio_fused": 1.0}
    light = {"backbone": "efficientnet_lite0", "reductions": (16,), "point_layers": (0,)}
    detector = M3DM(configure(M3DM, {**preset, **whole, **light, **settings}, "released"))
    stored = {"xyz": "xyz", "rgb": "rgb", "fused": "fusion"}
    detector.add_patches({b: counted(golden.tensor(f"bank_{stored[b]}")[None, None]) for b in banks})
    detector.build_banks()
    if detector.config.decides:
        factors = detector.decisions.weighted(torch.ones(len(banks)))
        rows = (golden.tensor(name)[:, : len(banks)] / factors for name in ("dlf_scores", "dlf_mapscores"))
        detector.decisions.observe(*rows)  # the stored ones hold their factors already
        detector.decisions.fit()
    patches = {}
    for name in banks:
        values = golden.tensor(f"patches_{stored[name]}")
        side = math.isqrt(len(values))
        patches[name] = counted(values.view(1, side, side, -1))
    scores, maps = detector.measure(patches, (224, 224))
    for j, name in enumerate(banks):
        key = f"{prefix}_{stored[name]}" if len(banks) > 1 else prefix
        assert float(scores[0, j]) == pytest.approx(golden.stored[f"{key}_score"].item(), rel=1e-5)
        check_map(golden, f"{key}_map", maps[0, ..., j])
    result = detector.judge(patches, (224, 224))
    assert float(result.score) == pytest.approx(golden.stored[f"{prefix}_score"].item(), rel=1e-5)
    check_map(golden, f"{prefix}_map", result.map[0])


def check_map(golden: Golden, name: str, got: Tensor) -> None:
    """Within one level of 255 of the map's maximum: the blur works in 8 bits."""
    got = got.flatten()[:: int(golden.number(f"{name}__stride"))]
    assert_close(got.double(), golden.tensor(f"{name}__sample").double(), rtol=0, atol=float(got.max()) / 255 + 1e-6)


# -- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"banks": ()}, "banks"),
        ({"banks": ("xyz", "xyz")}, "banks"),
        ({"nu": 0.0}, "nu"),
        ({"ratio_rgb": 1.5}, "ratio_rgb"),
        ({"uff_warmup": 751}, "uff_warmup"),
        ({"uff_schedule": "released"}, "uff_steps"),
        ({"banks": ("rgb", "fused"), "bank_stats": "released"}, "bank_stats"),
        ({"banks": ("rgb", "fused"), "coreset_sizes": "released"}, "coreset_sizes"),
        ({"patch": 0}, "patch"),
        ({"lambda_rgb": -1.0}, "lambda_rgb"),
    ],
)
def test_settings_out_of_range_are_named(settings: dict[str, Any], field: str):
    with pytest.raises(ConfigError, match=f"`{field}` of M3DM"):
        M3DMConfig(**settings)


def test_presets():
    paper, released = configure(M3DM, preset="paper"), configure(M3DM, preset="released")
    assert (paper.uff_steps, paper.uff_warmup, paper.bank_stats, paper.blur) == (750, 250, "own", "gaussian")
    assert (released.uff_steps, released.uff_pairs, released.dlf_solver) == (RELEASED_UPDATES, "released", "sgd")
    assert (paper.released_sampling, released.released_sampling) == (False, True)
    assert configure(M3DM, {"patch": "groups", "banks": ["xyz"]}).patch == "groups"
    with pytest.raises(ConfigError, match="modalities"):
        configure(M3DM, {"modalities": ["rgb"]})
