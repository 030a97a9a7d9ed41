"""CMDIAD: its equations as loops, its routes and switches, and that the other modality is really not looked at."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import polyspect as ps
from golden import filled_state, parameters
from polyspect.cli import main
from polyspect.data.preparation import Preparation
from polyspect.data.synthetic import write_dataset
from polyspect.detectors.cmdiad import (
    CMDIAD,
    CMDIADConfig,
    hallucination_network,
    outer_layers,
    published_state,
    steps_per_epoch,
    warmup,
)
from polyspect.detectors.completion import Completion, CompletionConfig
from polyspect.detectors.contract import Observe, configure
from polyspect.errors import ConfigError, DataError, ShapeError, WeightsError
from polyspect.fitting.engine import Engine, EngineConfig, updates_per_epoch
from polyspect.layers.maps import gaussian_smooth
from polyspect.layers.patches import worst_patch
from polyspect.layers.rgb_points import measured_patches, point_patches, rgb_patches
from polyspect.model import Model
from polyspect.samples import Batch
from published_networks import f2f_conv, f2f_mlp, f2i_conv, f2i_mlp, i2f
from tiny import TinyParts, tiny_batch

SMALL = {
    "weights": "random",
    "point_weights": "random",
    "point_backbone": "point_mae",
    "image_score": "reweighted",
    "point_layers": (0,),
    "groups": 24,
    "group_size": 8,
    "patch": 8,
    "patches": 40,
    "width": 16,
    "blocks": (1, 1),
    "epochs": 2,
    "warmup_epochs": 1,
    "batch_size": 3,
    "coreset_ratio": 0.3,
}
TRAIN, HELD = TinyParts(range(6)), TinyParts(range(50, 53))
ROUTES = [(main, route) for main in ("xyz", "rgb") for route in ("f2f", "f2i", "i2f")]


def build(**settings: Any) -> CMDIAD:
    values = {**SMALL, **({"patch": 4} if settings.get("route") == "i2f" else {}), **settings}
    return CMDIAD(CMDIADConfig(**values))


def fit(detector: CMDIAD, checkpoint: Path | None = None, resume: bool = False) -> CMDIAD:
    engine = Engine(EngineConfig(device="cpu", seed=1), checkpoint=checkpoint)
    return engine.fit(detector, {"train": TRAIN, "validation": HELD}, resume=resume)


@cache
def fitted(**settings: Any) -> CMDIAD:
    return fit(build(**settings))


def only(batch: Batch, *names: str) -> Batch:
    return replace(batch, images={name: image for name, image in batch.images.items() if name in names})


def without_3d(batch: Batch) -> Batch:
    """As a reader gives a part that has a photo only: everything counts as valid."""
    everywhere = torch.ones_like(batch.valid)
    return replace(only(batch, "rgb"), valid=everywhere, foreground=everywhere)


# -- one modality at test time -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("main_view", "route"), ROUTES)
def test_the_other_modality_is_not_looked_at(main_view, route, tmp_path):
    detector, batch = fitted(main=main_view, route=route), tiny_batch([100, 101], defect=True)
    assert detector.modalities == ("rgb", "xyz")
    assert detector.required == (main_view,)
    assert detector.choices == [("rgb", "xyz"), (main_view,)]
    expected = detector(batch)
    other = detector.config.other
    noise = torch.randn(batch.images[other].shape, generator=torch.Generator().manual_seed(0))
    alone = only(batch, main_view) if main_view == "xyz" else without_3d(batch)
    loaded = Model.load(Model("cmdiad", detector, Preparation()).save(tmp_path / "m.safetensors"), "cpu").detector
    with torch.no_grad():
        answers = [
            detector(replace(batch, images={**batch.images, other: noise})),
            detector(alone),
            loaded(alone),
            detector.score(detector.extract(batch)),  # the contract: forward is score of extract
        ]
    assert bool(torch.isfinite(expected.map).all())
    assert float(expected.map.std()) > 0
    for answer in answers:
        assert torch.equal(answer.map, expected.map)
        assert torch.equal(answer.score, expected.score)


def test_fitting_needs_both_modalities_and_predicting_the_main_one():
    batch = tiny_batch([100])
    fresh = build()
    assert fresh.required == fresh.modalities
    with pytest.raises(DataError, match="has no 'rgb'"):
        fresh.check_batch(only(batch, "xyz"))
    with pytest.raises(DataError, match="has no 'xyz'"):
        fitted()(only(batch, "rgb"))
    for settings in ({"banks": "dual"}, {"banks": "single", "main": "rgb"}):
        detector = fitted(**settings)
        assert detector.required == detector.modalities
        assert detector.choices == [detector.modalities]


def test_the_network_of_the_other_modality_does_not_run(monkeypatch):
    detector, batch = fitted(), tiny_batch([100])
    expected = detector(batch).map
    monkeypatch.setattr(detector.extractor.rgb, "forward", lambda images: pytest.fail("the RGB network ran"))
    assert torch.equal(detector(batch).map, expected)


def test_completion_serves_f2f_and_refuses_i2f(tmp_path):
    completion = Completion(fitted(), CompletionConfig(epochs=1))
    assert completion.choices == [("rgb", "xyz"), ("rgb",), ("xyz",)]
    assert list(completion.networks) == ["rgb_to_xyz"]  # RGB is hallucinated by CMDIAD itself
    fit(completion)
    model = Model("cmdiad", completion, Preparation())
    loaded = Model.load(model.save(tmp_path / "any.safetensors"), "cpu").detector
    batch = tiny_batch([100, 101])
    with torch.no_grad():
        assert torch.equal(loaded(only(batch, "xyz")).map, fitted()(batch).map)
        assert torch.equal(loaded(without_3d(batch)).map, completion(without_3d(batch)).map)
    with pytest.raises(ConfigError, match=r"'xyz\.image'"):
        Completion(fitted(route="i2f"))


# -- equations as loops ------------------------------------------------------------------------------------------------


def plain_distance(metric: str, a: torch.Tensor, b: torch.Tensor) -> float:
    if metric == "l1":
        return float((a - b).abs().sum())
    return float((a - b).norm() if metric == "l2" else 1 - F.cosine_similarity(a, b, dim=0))


@pytest.mark.parametrize(
    ("metric", "of_w"), [("l2", "same"), ("l1", "same"), ("cos", "same"), ("l1", "l2"), ("cos", "l2")]
)
def test_scores_and_maps_equal_loops(metric, of_w):
    detector = fitted(distance=metric, reweight_distance=of_w, blur_sigma=1.0)
    features = detector.extract(only(tiny_batch([100, 101], defect=True), "xyz"))
    with torch.no_grad():
        patches, (scores, maps) = detector.patches(features), detector.measure(features)
        prediction = detector.score(features)
    measured = measured_patches(features, (8, 8))
    of_xyz = point_patches(features, (8, 8))
    with torch.no_grad():
        of_rgb = detector.network(of_xyz)  # Eq. 1
    assert torch.equal(patches["xyz"].values.flatten(1, 2), of_xyz)
    assert_close(patches["rgb"].values.flatten(1, 2), of_rgb)
    fused_map, fused_score = torch.zeros(2, 64, 64), torch.zeros(2)
    for index, (name, values) in enumerate((("xyz", of_xyz), ("rgb", of_rgb))):
        bank = detector.banks[name]
        rows = bank.vectors
        w_metric = metric if of_w == "same" else "l2"
        for b in range(2):
            distances = torch.full((64,), float(bank.mean))
            matches = {}
            for p in range(64):
                if measured[b, p]:
                    patch = (values[b, p] - bank.feature_mean.float()) / bank.feature_std.float()
                    own = [plain_distance(metric, patch, row) for row in rows]
                    matches[p] = min(range(len(rows)), key=own.__getitem__)
                    distances[p] = own[matches[p]]
            worst = max(matches, key=lambda p: float(distances[p]))
            patch = (values[b, worst] - bank.feature_mean.float()) / bank.feature_std.float()
            match = rows[matches[worst]]
            beside = sorted(range(len(rows)), key=lambda k: plain_distance(w_metric, match, rows[k]))[1:3]
            root = values.shape[2] ** 0.5
            spread = torch.tensor([plain_distance(w_metric, patch, rows[k]) / root for k in beside]).double()
            s = float(distances[worst])
            w = 1 - torch.exp(torch.tensor(s / root).double()) / torch.exp(spread).sum()
            assert float(scores[b, index]) == pytest.approx(float(w) * s, rel=1e-3, abs=1e-4)
            assert of_w == "l2" or 0.5 <= float(w) < 1
            large = F.interpolate(distances.view(1, 1, 8, 8), size=(64, 64), mode="bilinear")[0, 0]
            assert_close(maps[b, ..., index], gaussian_smooth(large, 1.0), rtol=1e-3, atol=1e-4)
        factor = 1.0  # main points 1, hallucinated 1
        fused_map += detector.decisions["map"].weight[index].float() * factor * maps[..., index]
        fused_score += detector.decisions["score"].weight[index].float() * factor * scores[..., index]
    assert_close(prediction.map, fused_map)
    assert_close(prediction.score, fused_score)
    assert_close(sum(prediction.branch_maps.values()), prediction.map)


def test_the_loss_is_the_mean_over_parts_of_summed_distances():
    detector = build(patches=None)
    features = detector.extract(tiny_batch([1, 2]))
    with torch.no_grad():
        loss = detector.loss(features)
        predicted = detector.network(point_patches(features, (8, 8)))
    real = rgb_patches(features, (8, 8))
    expected = sum(float((predicted[b, p] - real[b, p]).norm()) for b in range(2) for p in range(64)) / 2  # Eq. 4
    assert list(loss) == ["xyz_to_rgb"]
    assert float(loss["xyz_to_rgb"]) == pytest.approx(expected, rel=1e-5)
    twice = {name: torch.cat([x, x]) for name, x in features.items()}
    with torch.no_grad():
        assert float(detector.loss(twice)["xyz_to_rgb"]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("main_view", ["xyz", "rgb"])
def test_the_loss_of_images_is_summed_over_pixels(main_view):
    detector, batch = build(route="f2i", main=main_view), tiny_batch([1, 2])
    features = detector.extract(batch)
    with torch.no_grad():
        loss = float(detector._loss(features, None))
        drawn = detector.predict(features)
    region = (batch.valid & batch.foreground)[:, None]
    rgb = detector.extractor.rgb
    target = (batch.images["rgb"] - rgb.mean) / rgb.std if main_view == "xyz" else batch.images["xyz"] * region
    assert drawn.shape == target.shape
    assert loss == pytest.approx(float((drawn - target).norm(dim=1).sum()) / 2, rel=1e-5)  # Eq. 5


def test_a_masked_loss_looks_at_measured_places_only():
    features = build().extract(tiny_batch([1, 2]))
    masked, whole = build(mask_loss=True, patches=None), build(patches=None)
    counts = measured_patches(features, (8, 8))
    with torch.no_grad():
        distance = (whole.predict(features) - rgb_patches(features, (8, 8))).norm(dim=2)
        assert float(whole.loss(features)["xyz_to_rgb"]) == pytest.approx(float(distance.sum()) / 2, rel=1e-5)
        assert float(masked.loss(features)["xyz_to_rgb"]) == pytest.approx(float(distance[counts].sum()) / 2, rel=1e-5)
    assert 0 < int(counts.sum()) < counts.numel()


def test_f2f_learns_a_linear_relation(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    detector = build(patches=None, output_activation="none")
    xyz = torch.randn(2, 64, 384, generator=generator)
    rgb = xyz @ torch.randn(384, 152, generator=generator) / 20
    monkeypatch.setattr(detector, "real", lambda features, name, grid: xyz if name == "xyz" else rgb)
    features = {"valid": torch.ones(2, 64, 64, dtype=torch.bool)}
    optimizer = torch.optim.Adam(detector.network.parameters(), lr=5e-4)
    for _ in range(60):
        optimizer.zero_grad()
        loss = detector.loss(features)["xyz_to_rgb"]
        loss.backward()
        optimizer.step()
    of_mean = float((rgb - rgb.mean((0, 1))).norm(dim=2).sum() / 2)
    assert float(loss.detach()) < 0.8 * of_mean


def test_a_perfect_hallucination_is_a_dual_bank(monkeypatch):
    settings = {"mask_invalid": False, "reductions": (8,), "seed": 4}
    dual, mtfi = build(banks="dual", **settings), build(trained=False, **settings)
    monkeypatch.setattr(mtfi, "hallucinate", lambda f: rgb_patches(f, (8, 8)).unflatten(1, (8, 8)))
    monkeypatch.setattr(CMDIAD, "forward", lambda self, batch: self.score(self.extract(batch)))
    batch = tiny_batch([100, 101], defect=True)
    assert_close(fit(mtfi)(batch).map, fit(dual)(batch).map, rtol=1e-5, atol=1e-6)
    assert_close(mtfi(batch).score, dual(batch).score, rtol=1e-5, atol=1e-6)


# -- routes and grids --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("main_view", "route", "patch", "grids"),
    [
        ("xyz", "f2f", 4, {"xyz": (16, 384), "rgb": (16, 152)}),
        ("rgb", "f2f", 4, {"rgb": (8, 152), "xyz": (16, 384)}),
        ("xyz", "f2i", 4, {"xyz": (16, 384), "rgb": (8, 152)}),
        ("rgb", "f2i", 4, {"rgb": (8, 152), "xyz": (16, 384)}),
        ("xyz", "i2f", 4, {"xyz": (16, 384), "rgb": (16, 152)}),
        ("rgb", "i2f", 4, {"rgb": (8, 152), "xyz": (16, 384)}),
    ],
)
def test_grids_of_the_banks(main_view, route, patch, grids):
    detector = build(main=main_view, route=route, patch=patch)
    with torch.no_grad():
        patches = detector.patches(detector.extract(tiny_batch([1])))
    assert list(patches) == list(grids)
    for name, (side, channels) in grids.items():
        assert patches[name].values.shape == (1, side, side, channels)
        assert patches[name].counts.shape == (1, side, side)


@pytest.mark.parametrize("route", ["f2f", "f2i"])
def test_patches_keep_their_place_as_maps(route, monkeypatch):
    same_width = {"reductions": (8,), "network": "conv"} if route == "f2f" else {}
    detector = build(route=route, trained=False)
    detector.network = nn.Identity()
    row_index = torch.arange(8.0).repeat_interleave(8)[None, :, None].expand(1, 64, 3)
    monkeypatch.setattr(detector, "real", lambda features, name, grid: row_index)
    if same_width:
        object.__setattr__(detector.config, "network", "conv")
    drawn = detector.predict({"valid": torch.ones(1, 64, 64, dtype=torch.bool)})
    if route == "f2f":
        assert torch.equal(drawn, row_index)
    else:
        assert torch.equal(drawn[0, 0], torch.arange(8.0)[:, None].expand(8, 8))


def test_f2i_of_points_feeds_the_rgb_extractor_its_own_prediction(monkeypatch):
    detector, batch = build(route="f2i"), tiny_batch([1])
    rgb = detector.extractor.rgb
    monkeypatch.setattr(detector, "predict", lambda features: (batch.images["rgb"] - rgb.mean) / rgb.std)
    features = detector.extract(batch)
    got = detector.hallucinate(features)
    assert_close(got.permute(0, 3, 1, 2), features["rgb.grid"], rtol=1e-4, atol=1e-4)


def test_f2i_of_rgb_feeds_the_point_extractor_and_can_mask(monkeypatch):
    batch = tiny_batch([1])
    cloud = batch.images["xyz"] * (batch.valid & batch.foreground)[:, None]
    got = {}
    for masks in (True, False):
        detector = build(route="f2i", main="rgb", mask_predicted=masks)
        monkeypatch.setattr(detector, "predict", lambda features: cloud)
        detector._see_batch(batch)
        detector._set_parts()
        features = detector.extract(batch)
        got[masks] = detector.hallucinate(features).flatten(1, 2)
    nearest = float(cloud.norm(dim=1)[cloud.norm(dim=1) > 0].min())
    detector = build(route="f2i", main="rgb", mask_predicted=True)
    detector._see_batch(batch)
    detector._set_parts()
    assert float(detector.nearest_point) == pytest.approx(nearest)
    assert_close(got[True], point_patches(features, (8, 8)), rtol=1e-4, atol=1e-5)  # what the real cloud gives
    assert not torch.allclose(got[False], got[True], atol=1e-3)  # zeros count as points


def test_networks_have_the_published_sizes():
    wide = {"xyz": 768, "rgb": 768}
    sizes = {("f2f", "paper"): 6_641_664, ("f2f", "conv"): 21_238_272, ("f2i", "paper"): 3_015_011,
             ("f2i", "mlp"): 1_367_427, ("i2f", "paper"): 3_848_000}  # fmt: skip
    for (route, network), size in sizes.items():
        with torch.device("meta"):
            built = hallucination_network(CMDIADConfig(route=route, network=network), wide)
        assert parameters(built) == size
    with pytest.raises(ConfigError, match="differ in width"):
        hallucination_network(CMDIADConfig(network="conv"), {"xyz": 768, "rgb": 152})


def test_first_and_last_layer_of_the_point_network():
    assert outer_layers("point_mae") == (3, 11)
    detector = CMDIAD(CMDIADConfig(**{**SMALL, "point_backbone": "point_mae", "point_layers": None}))
    assert detector.extractor.channels["xyz"] == 768


# -- fitting -----------------------------------------------------------------------------------------------------------


def test_learning_rates_are_the_released_ones():
    steps = steps_per_epoch(2656, 32)
    assert steps == 83
    for epoch, step in ((0, 0), (0, 41), (3, 7), (9, 82), (10, 0), (64, 3)):
        expected = min(1.0, (epoch + step / 83) / 10)
        assert warmup(83 * epoch + step, first=0, length=10 * 83) == pytest.approx(expected)
        assert warmup(step, first=83 * epoch, length=10 * 83) == pytest.approx(expected)  # a stage that goes on
    assert warmup(0, first=0, length=0) == 1
    for parts in range(1, 12):
        for batch in range(1, 6):
            assert steps_per_epoch(parts, batch) == updates_per_epoch(parts, batch)


def test_the_warm_up_goes_on_where_the_stage_before_ended():
    detector = build(select_every=2, epochs=6, warmup_epochs=5, batch_size=3, learning_rate=1.0)
    detector.parts.fill_(6)  # two steps per epoch
    rates = []
    for stage in detector.stages():
        if stage.name.startswith("hallucination"):
            optimizer = stage.optimizer([nn.Parameter(torch.zeros(1))])
            schedule = stage.schedule(optimizer)
            for _ in range(2 * stage.epochs):
                rates.append(optimizer.param_groups[0]["lr"])
                optimizer.step()
                schedule.step()
    assert rates == pytest.approx([min(1.0, step / 10) for step in range(12)])


def test_rates_of_the_routes():
    for route, rate in (("f2f", 5e-4), ("f2i", 5e-4), ("i2f", 3e-4)):
        stage = build(route=route).stages()[1]
        assert stage.optimizer([nn.Parameter(torch.zeros(1))]).defaults["lr"] == rate
    stage = build(learning_rate=2e-4).stages()[1]
    optimizer = stage.optimizer([nn.Parameter(torch.zeros(1))])
    assert optimizer.defaults["lr"] == 2e-4
    assert (optimizer.defaults["betas"], optimizer.defaults["weight_decay"]) == ((0.9, 0.999), 0)


def test_levels_are_measured_where_they_are_read():
    """A bank whose patches all count needs no level of validation parts."""
    looked = {
        name: [stage.name for stage in build(**settings).stages() if isinstance(stage, Observe)]
        for name, settings in {
            "xyz": {}, "rgb": {"main": "rgb"}, "all": {"mask_invalid": False}, "dual": {"banks": "dual"},
        }.items()
    }  # fmt: skip
    assert {name for name, stages in looked.items() if "levels" in stages} == {"xyz", "dual"}
    dual = fitted(banks="dual").banks
    assert float(dual["xyz"].mean) > 0
    assert float(dual["rgb"].mean) == 0


def test_the_best_network_on_validation_parts_wins(monkeypatch):
    detector = build(select_every=2, epochs=5)
    names = [stage.name for stage in detector.stages()]
    assert names == [
        "parts", "hallucination to epoch 2", "selection to epoch 2", "hallucination to epoch 4",
        "selection to epoch 4", "hallucination to epoch 5", "selection to epoch 5", "banks", "levels", "decision",
    ]  # fmt: skip
    selections = [stage for stage in detector.stages() if stage.name.startswith("selection")]
    assert all(isinstance(stage, Observe) and stage.split == "validation" for stage in selections)
    valid = {"valid": torch.ones(2, 64, 64)}
    with torch.no_grad():
        for number, (loss, stage) in enumerate(zip((3.0, 1.0, 2.0), selections)):
            for parameter in detector.network.parameters():
                parameter.fill_(number)
            monkeypatch.setattr(detector, "_loss", lambda features, most, loss=loss: torch.tensor(loss))
            stage.update(valid)
            stage.finish()
            assert (detector.best.numel() > 0) == (number < 2)
    assert all(bool((parameter == 1).all()) for parameter in detector.network.parameters())
    assert float(detector.best_loss) == 1


def test_a_fit_with_selection_that_was_killed_goes_on_with_the_same_bits(tmp_path, monkeypatch):
    settings = {"select_every": 1, "batch_size": 6}
    whole = fit(build(**settings))
    broken = build(**settings)
    calls = []

    def select(last: bool) -> None:
        calls.append(last)
        if len(calls) == 2:
            raise KeyboardInterrupt
        CMDIAD._select(broken, last)

    monkeypatch.setattr(broken, "_select", select)
    with pytest.raises(KeyboardInterrupt):
        fit(broken, tmp_path / "c")
    resumed = fit(build(**settings), tmp_path / "c", resume=True)
    state = resumed.state_dict()
    assert all(torch.equal(x, state[name]) for name, x in whole.state_dict().items())
    assert torch.isfinite(whole.best_loss)
    assert whole.best.numel() == 0


def test_an_untrained_network_stays_as_it_was_drawn():
    detector, drawn = fitted(trained=False), build(trained=False)
    state = detector.network.state_dict()
    assert all(torch.equal(x, state[name]) for name, x in drawn.network.state_dict().items())
    assert not any(stage.name.startswith(("hallucination", "parts")) for stage in drawn.stages())
    batch = tiny_batch([100])
    assert torch.isfinite(detector(batch).map).all()
    assert torch.equal(detector(batch).map, fit(build(trained=False))(batch).map)


def test_training_changes_the_network_of_the_needed_direction():
    before, after = build().network.state_dict(), fitted().network.state_dict()
    assert all(not torch.equal(x, after[name]) for name, x in before.items())


def test_banks_keep_their_share_of_their_own_rows():
    detector = fitted(main="rgb", patch=4, coreset_ratio=0.1, bank_limit=None)
    rows = {"rgb": 6 * 8 * 8, "xyz": 6 * 16 * 16}
    for name, bank in detector.banks.items():
        assert bank.counts.tolist() == [rows[name]] * 2
        assert len(bank.vectors) == int(0.1 * rows[name])
    # 244 parts at 224 pixels
    assert [int(0.1 * n) for n in (244 * 3136, 244 * 784)] == [76_518, 19_129]


def test_statistics_of_the_banks():
    features = build().extract(TRAIN.batch(range(6)))
    xyz = point_patches(features, (8, 8))
    rgb = rgb_patches(features, (8, 8))
    released = fitted(bank_stats="released")
    for bank in released.banks.values():
        assert float(bank.feature_mean) == pytest.approx(float(xyz.mean()), abs=1e-6)
        assert float(bank.feature_std) == pytest.approx(float(rgb.std()), rel=1e-4)
    assert abs(float(rgb.mean() - xyz.mean())) > 1e-3
    assert abs(float(rgb.std() / xyz.std()) - 1) > 1e-2
    own = fitted()
    measured = measured_patches(features, (8, 8))
    with torch.no_grad():
        hallucinated = own.hallucinate(features).flatten(1, 2)
    for name, values in (("xyz", xyz), ("rgb", hallucinated)):
        assert float(own.banks[name].feature_mean) == pytest.approx(float(values[measured].mean()), abs=1e-5)
        assert float(own.banks[name].feature_std) == pytest.approx(float(values[measured].std()), rel=1e-3)
    none = fitted(bank_stats="none")
    assert [float(bank.feature_std) for bank in none.banks.values()] == [1, 1]
    single = fitted(banks="single", bank_stats="released").banks["xyz"]
    assert float(single.feature_std) == float(fitted(banks="single").banks["xyz"].feature_std)


def test_the_second_bank_can_hold_real_features():
    batch = tiny_batch([1, 2])
    for kind in ("real", "hallucinated"):
        detector = build(hallucination_bank=kind)
        features = detector.extract(batch)
        with torch.no_grad():
            filling, scoring = detector.patches(features, filling=True)["rgb"], detector.patches(features)["rgb"]
            hallucinated = detector.hallucinate(features)
        assert torch.equal(scoring.values, hallucinated)
        expected = rgb_patches(features, (8, 8)).view(2, 8, 8, 152) if kind == "real" else hallucinated
        assert torch.equal(filling.values, expected)
        assert torch.equal(filling.counts, measured_patches(features, (8, 8)).view(2, 8, 8))


def test_factors_of_the_decision_layer():
    table = {
        ("dual", "xyz"): {"xyz": 1.0, "rgb": 0.1},
        ("mtfi", "xyz"): {"xyz": 1.0, "rgb": 1.0},
        ("mtfi", "rgb"): {"rgb": 0.1, "xyz": 1.0},
    }
    for (banks, main_view), factors in table.items():
        config = CMDIADConfig(**{**CMDIAD.PRESETS["paper"], "banks": banks, "main": main_view})
        assert {name: config.factor(name) for name in config.names} == factors
        config = CMDIADConfig(banks=banks, main=main_view)
        assert {config.factor(name) for name in config.names} == {None}
    detector = fitted(banks="dual", lambda_xyz=1.0, lambda_rgb=0.1)
    features = detector.extract(tiny_batch([100]))
    with torch.no_grad():
        scores, _ = detector.measure(features)
    weight = detector.decisions["score"].weight.float() * torch.tensor([1.0, 0.1])
    assert_close(detector.score(features).score, scores @ weight)


@pytest.mark.parametrize("main_view", ["xyz", "rgb"])
def test_a_single_bank_answers_for_itself(main_view):
    detector = fitted(banks="single", main=main_view)
    assert detector.network is None
    assert len(detector.decisions) == 0  # of one feature it would be a factor: no ranking changes
    features = detector.extract(tiny_batch([100, 101]))
    scores, maps = detector.measure(features)
    prediction = detector.score(features)
    assert torch.equal(prediction.score, scores[:, 0])
    assert torch.equal(prediction.map, maps[..., 0])
    assert list(prediction.branch_maps) == [main_view]


def test_reweighting_and_image_scores():
    detector = fitted()
    features = detector.extract(tiny_batch([100]))
    with torch.no_grad():
        patches = detector.patches(features)["xyz"]
        bank = detector.banks["xyz"]
        distances, matches = torch.zeros(1, 8, 8), torch.zeros(1, 8, 8, dtype=torch.int64)
        found = bank.distance(patches.values[patches.counts])
        distances[patches.counts], matches[patches.counts] = found
        counts, score = patches.counts, partial(worst_patch, bank, patches.values, scaled=True, n=3)
        weighted = score(distances, matches, counts, form=detector.config.reweight)
        plain = score(distances, matches, counts, form="none")
        nothing = torch.zeros_like(counts)
        level = score(torch.full_like(distances, 7), matches, nothing, form=detector.config.reweight)
    assert float(plain) == float(distances.max())  # Eq. 10
    assert 0.5 <= float(weighted / plain) < 1
    assert float(level) == 7
    top = fitted(image_score="max_map")(tiny_batch([100]))
    assert torch.equal(top.score, top.map.flatten(1).amax(1))


# -- published files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "shapes"),
    [
        ({"route": "f2f"}, f2f_mlp(1)),
        ({"route": "f2f", "main": "rgb", "depth": 2}, f2f_mlp(2)),
        ({"route": "f2f", "network": "conv"}, f2f_conv(6)),
        ({"route": "f2i"}, f2i_conv()),
        ({"route": "f2i", "network": "mlp"}, f2i_mlp()),
        ({"route": "i2f"}, i2f()),
    ],
)
def test_published_files_fit_the_network_of_their_route(settings, shapes):
    config, channels = CMDIADConfig(**settings), {"xyz": 768, "rgb": 768}
    if settings.get("network") == "conv":
        channels = {"xyz": 6, "rgb": 6}
    with torch.device("meta"):
        network = hallucination_network(config, channels)
    content = {"model": filled_state(shapes), "epoch": 64}
    assert list(published_state(config, content, network, "f")) == list(network.state_dict())
    with pytest.raises(WeightsError, match="has"):
        published_state(config, {"model": {**content["model"], "odd.weight": torch.zeros(1)}}, network, "f")


def test_a_published_file_is_used_as_it_is(tmp_path):
    own = build().network.state_dict()
    generator = torch.Generator().manual_seed(5)
    published = {}
    for name, tensor in own.items():
        start, _, kind = name.rpartition(".")
        inner = "norm" if start == "norm" else f"mlp.mlp_module.0.fc{int(start.rpartition('.')[2]) + 1}"
        for half in ("xyz", "rgb"):  # the file holds both directions
            published[f"{half}_{inner}.{kind}"] = torch.randn(tensor.shape, generator=generator)
    torch.save({"model": published, "epoch": 64}, tmp_path / "MTFI_FtoF_PCs.pth")
    detector = build(checkpoint=str(tmp_path / "MTFI_FtoF_PCs.pth"))
    assert torch.equal(detector.network.norm.weight, published["xyz_norm.weight"])
    assert not any(stage.name.startswith("hallucination") for stage in detector.stages())
    assert len(detector.sources["network"]["sha256"]) == 64
    written = str(tmp_path / "both.safetensors")
    assert main(["weights", "import", str(tmp_path / "MTFI_FtoF_PCs.pth"), "--out", written]) == 0
    again = build(checkpoint=written).network.state_dict()
    assert all(torch.equal(again[name], x) for name, x in detector.network.state_dict().items())
    with pytest.raises(WeightsError, match=r"has 'rgb\.layers\.0\.bias', .*for which ImageHall"):
        build(checkpoint=written, route="f2i")
    with pytest.raises(ConfigError, match="`trained` of CMDIAD must be true with a `checkpoint`"):
        build(checkpoint="x.pth", trained=False)


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": 0}, "`epochs`"),
        ({"select_every": 0}, "`select_every`"),
        ({"learning_rate": 0.0}, "`learning_rate`"),
        ({"coreset_ratio": 0.0}, "`coreset_ratio`"),
        ({"coreset_eps": 1.0}, "`coreset_eps`"),
        ({"lambda_rgb": -1.0}, "`lambda_rgb`"),
        ({"route": "i2f", "patch": 8}, "`patch`"),
        ({"route": "i2f", "network": "conv"}, "`network`"),
        ({"max_gib": 0.0}, "`max_gib`"),
    ],
)
def test_settings_out_of_range_are_named(values, message):
    with pytest.raises(ConfigError, match=message):
        CMDIADConfig(**values)


def test_presets():
    paper = configure(CMDIAD, preset="paper")
    assert (paper.backbone, paper.reductions, paper.point_backbone) == ("vit_base_patch8_224.dino", (8,), "point_mae")
    assert (paper.batch_size, paper.epochs, paper.coreset_ratio, paper.bank_limit) == (32, 100, 0.1, None)
    released = configure(CMDIAD, preset="released")
    assert (released.bank_stats, released.blur, released.decision) == ("released", "pil", "sgd")
    assert (paper.coreset_distance, released.coreset_distance) == ("same", "l2")
    configure(CMDIAD, {"banks": "single"}, preset="released")  # a row of the tables
    assert CMDIAD.PREPARATION == {"": "cloud", "fast": "cloud", "paper": "btf", "released": "btf"}


def test_a_size_that_patches_do_not_divide_is_refused():
    with pytest.raises(ShapeError, match="multiples of 8"):
        build().extract(tiny_batch([1], size=60))


# -- the whole road ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("main_view", ["xyz", "rgb"])
def test_a_part_with_the_main_file_alone_gets_the_same_decision(main_view, tmp_path, capsys):
    root = tmp_path / "parts"
    write_dataset(root, ["bottle_cap"], train=5, validation=4, test_good=1, test_per_defect=1, size=64)
    model = tmp_path / "m.safetensors"
    settings = {**SMALL, "main": main_view, "epochs": 1, "bank_limit": 50}
    ps.fit("cmdiad", root=root, category="bottle_cap", settings=settings, prepare={"size": 64}, out=model)
    photo = next((root / "bottle_cap" / "test").rglob("rgb/*.png"))
    scan = next(photo.parent.parent.joinpath("xyz").glob(f"{photo.stem}.*"))
    capsys.readouterr()
    rows = []
    for files in ([photo, scan], [scan if main_view == "xyz" else photo]):
        assert main(["predict", str(model), *map(str, files), "--json", "--out", str(tmp_path / "out")]) == 0
        rows.append(json.loads(capsys.readouterr().out)["parts"][0])
    assert rows[0]["score"] == rows[1]["score"]
    assert rows[0]["decision"] == rows[1]["decision"] in ("accept", "reject")
    assert rows[0]["used"] == rows[1]["used"] == [main_view]
    assert main(["predict", str(model), str(photo if main_view == "xyz" else scan)]) == 2
    assert f"'{main_view}'" in capsys.readouterr().err
