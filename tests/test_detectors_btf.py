"""BTF: its equations as loops, every feature of its table, its switches, and what was not measured."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from polyspect.detectors import detector_class
from polyspect.detectors.btf import BTF, BTFConfig, Feature
from polyspect.detectors.contract import configure
from polyspect.errors import ConfigError, DataError
from polyspect.geometry.descriptors import dense_sift, hog
from polyspect.geometry.fpfh import estimate_normals, fpfh
from polyspect.samples import Batch, Prediction
from tiny import blinded, take, tiny_batch

SIZE = 32
GRID = 4  # cells of 8 x 8 pixels
ALL: tuple[Feature, ...] = get_args(Feature)
CHANNELS = {"raw": 64, "raw_blocks": 64, "hog": 8, "sift": 128, "fpfh": 33, "depth_inet": 152, "rgb_inet": 152}


def build(**settings: Any) -> BTF:
    return BTF(
        BTFConfig(**{"weights": "random", "grid": GRID, "coreset_ratio": 0.5, "point_step": 1, **settings})
    ).eval()


def fitted(detector: BTF | None = None, train: Batch | None = None, **settings: Any) -> BTF:
    detector = detector or build(**settings)
    train = tiny_batch(range(8), size=SIZE) if train is None else train
    splits = {"train": train, "validation": tiny_batch(range(50, 53), size=SIZE)}
    with torch.no_grad():
        for stage in detector.stages():
            stage.update(detector.extract(splits[stage.split]))
            stage.finish()
    detector.fitted.fill_(True)
    return detector


@pytest.fixture(scope="module")
def parts() -> Batch:
    return tiny_batch([100, 101], size=SIZE)


def predict(detector: BTF, batch: Batch) -> Prediction:
    with torch.no_grad():
        return detector(batch)


def joined(detector: BTF, features: dict[str, Tensor]) -> Tensor:
    """Cells (B, h, w, C) before any scale."""
    return torch.cat([features[f"{name}.cells"] for name in detector.config.features], 1).permute(0, 2, 3, 1)


# -- Eqs. 1 to 5 -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale_fusion", ["none", "std"])
def test_map_score_and_shares_equal_eqs_1_to_5_written_as_loops(scale_fusion: str, parts: Batch):
    detector = fitted(scale_fusion=scale_fusion, blur="none", image_score="reweighted")
    blank = replace(parts, valid=parts.valid.clone())
    blank.valid[:, :8, 8:16] = False  # one cell
    features, result = detector.extract(blank), predict(detector, blank)
    cells = joined(detector, features)
    C = cells.shape[-1]
    s = detector.scale
    scale = torch.cat([s[0].expand(152), s[1].expand(33)])
    d = torch.full((2, GRID, GRID), float(detector.bank.mean))
    shares = detector.level.float().repeat(2, GRID, GRID, 1)
    for b in range(2):
        worst = (torch.zeros(()), torch.zeros(C), 0)
        for i in range(GRID):
            for j in range(GRID):
                if (i, j) == (0, 1):
                    continue
                f = cells[b, i, j] / scale
                gaps = (detector.bank.vectors - f).norm(dim=1)
                d[b, i, j] = gaps.min()
                squared = (detector.bank.vectors[gaps.argmin()] - f).square()
                shares[b, i, j] = torch.stack([squared[:152].sum(), squared[152:].sum()]) / gaps.min()
                if gaps.min() > worst[0]:
                    worst = (gaps.min(), f, int(gaps.argmin()))
        near = (detector.bank.vectors - detector.bank.vectors[worst[2]]).norm(dim=1).argsort()[1:3]
        away = (detector.bank.vectors[near] - worst[1]).norm(dim=1)
        w = 1 - 1 / ((away - worst[0]) / C**0.5).double().exp().sum()
        assert_close(result.score[b], (w * worst[0]).float(), rtol=1e-4, atol=0)
    tolerance = {"rtol": 1e-4, "atol": 1e-4 * float(d.max())}
    enlarged = F.interpolate(d[:, None], size=SIZE, mode="bilinear")[:, 0]
    assert_close(result.map, enlarged, **tolerance)
    for index, name in enumerate(("rgb", "xyz")):
        share = F.interpolate(shares[..., index][:, None], size=SIZE, mode="bilinear")[:, 0]
        assert_close(result.branch_maps[name], share, **tolerance)


def test_shares_of_the_modalities_add_up_to_the_map(parts: Batch):
    result = predict(fitted(features=("rgb_inet", "sift", "fpfh", "hog"), scale_fusion="std"), parts)
    assert list(result.branch_maps) == ["rgb", "xyz"]
    assert_close(sum(result.branch_maps.values()), result.map, rtol=1e-4, atol=1e-4)
    assert float(min(branch.min() for branch in result.branch_maps.values())) >= 0


def test_scaled_features_have_one_spread(parts: Batch):
    detector = fitted(scale_fusion="std", mask_invalid=False)
    cells = joined(detector, detector.extract(tiny_batch(range(8), size=SIZE))).flatten(0, 2)
    for part, scale in zip(cells.split([152, 33], dim=1), detector.scale):
        assert_close(scale, (part - part.mean(0)).square().sum(1).mean().sqrt(), rtol=1e-4, atol=0)
    assert torch.equal(fitted().scale, torch.ones(2))


def test_a_feature_that_does_not_vary_cannot_be_scaled():
    train = tiny_batch(range(2), size=SIZE)
    flat = replace(train, images={**train.images, "rgb": torch.zeros_like(train.images["rgb"])})
    detector = build(features=("hog",), depth_from="depth", scale_fusion="std")
    flat.images["depth"].zero_()
    with pytest.raises(DataError, match="'hog' does not vary"):
        fitted(detector, flat)


@pytest.mark.parametrize("image_score", ["top_mean", "max_map"])
def test_image_scores_of_the_map(image_score: str, parts: Batch):
    result = predict(fitted(features=("fpfh",), image_score=image_score), parts)
    pixels = result.map.flatten(1).sort(1, descending=True).values
    count = SIZE * SIZE // 100 if image_score == "top_mean" else 1
    assert_close(result.score, pixels[:, :count].mean(1))


@pytest.mark.parametrize("blur", ["gaussian", "pil", "none"])
def test_training_parts_against_the_whole_bank_score_zero(blur: str):
    settings = {"features": ("fpfh", "sift"), "coreset_ratio": 1.0, "bank_limit": None, "blur": blur}
    train = tiny_batch(range(8), size=SIZE)
    result = predict(fitted(**settings, image_score="reweighted", mask_invalid=False), train)
    assert not result.map.any()
    assert not result.score.any()
    assert all(bool(branch.isfinite().all()) for branch in result.branch_maps.values())


# -- features --------------------------------------------------------------------------------------------------------


def test_every_feature_has_its_cells(parts: Batch):
    features = build(features=ALL).extract(parts)
    shapes = {name: tuple(features[f"{name}.cells"].shape) for name in ALL}
    assert shapes == {name: (2, channels, GRID, GRID) for name, channels in CHANNELS.items()}
    assert all(tensor.dtype == torch.float32 for name, tensor in features.items() if name.endswith(".cells"))


def test_published_shapes():
    detector = BTF(BTFConfig(**{**BTF.PRESETS["paper"], "weights": "random"})).eval()
    assert detector.config.modalities == ("rgb", "xyz")
    with torch.no_grad():
        features = detector.extract(tiny_batch([1], size=224))
    assert features["rgb_inet.cells"].shape == (1, 1536, 28, 28)
    assert features["fpfh.cells"].shape == (1, 33, 28, 28)
    assert detector._cells(features).shape == (1, 28, 28, 1569)


def test_image_features_see_what_they_should(parts: Batch):
    features = build(features=ALL).extract(parts)
    z = parts.images["xyz"][:, 2:]
    assert torch.equal(features["raw.cells"].flatten(2).mT.flatten(1), z.flatten(1))
    assert torch.equal(features["raw_blocks.cells"][:, :, 1, 2], z[:, 0, 8:16, 16:24].flatten(1))
    assert torch.equal(features["hog.cells"], hog(z))
    means = F.adaptive_avg_pool2d(F.avg_pool2d(dense_sift(z), 3, stride=1), GRID)
    assert_close(features["sift.cells"], means)
    prepared = build(features=("raw_blocks",), depth_from="depth").extract(parts)["raw_blocks.cells"]
    assert torch.equal(prepared[:, :, 1, 2], parts.images["depth"][:, 0, 8:16, 16:24].flatten(1))


def test_depth_in_metres_reaches_the_network_as_it_is(parts: Batch):
    detector = build(features=("rgb_inet", "depth_inet"))
    both = detector.extract(parts)
    for name, image in {
        "rgb_inet": (parts.images["rgb"] - detector.backbone.mean) / detector.backbone.std,
        "depth_inet": parts.images["xyz"][:, 2:].expand(-1, 3, -1, -1),
    }.items():
        with torch.no_grad():
            stages = detector.backbone.features(image)
        pooled = [F.adaptive_avg_pool2d(F.avg_pool2d(m, 3, 1) if m.shape[-1] > 2 else m, GRID) for m in stages]
        assert_close(both[f"{name}.cells"], torch.cat(pooled, 1), rtol=1e-4, atol=1e-4)


def test_fpfh_is_scattered_to_pixels_and_averaged(parts: Batch):
    cells = build(features=("fpfh",)).extract(parts)["fpfh.cells"]
    for b in range(2):
        points = parts.images["xyz"][b].permute(1, 2, 0)[parts.valid[b]][None].double()
        normals = estimate_normals(points, sign="solver")
        image = torch.zeros(SIZE, SIZE, 33, dtype=torch.float64)
        image[parts.valid[b]] = fpfh(points, normals)[0]
        pooled = F.adaptive_avg_pool2d(F.avg_pool2d(image.permute(2, 0, 1)[None], 3, stride=1), GRID)[0]
        # normals of float32 points turn a few toss-ups at bin edges
        assert float((cells[b].double() - pooled).abs().mean()) < 0.1


def test_fpfh_of_a_plane_has_one_bin_per_block_and_the_measured_share():
    y, x = torch.meshgrid(*2 * (torch.arange(96) / 1024,), indexing="ij")
    valid = torch.ones(1, 96, 96, dtype=torch.bool)
    valid[:, :, 66:] = False
    xyz = torch.stack([x, y, 0.5 + 0 * x])[None] * valid[:, None]
    cells = build(features=("fpfh",)).extract(Batch(["plane"], {"xyz": xyz}, valid, valid))["fpfh.cells"][0]
    expected = torch.zeros(33)
    expected[[5, 16, 27]] = 200
    assert_close(cells[:, 1, 1], expected, rtol=0, atol=1e-3)  # far from the border, where the solver's signs may turn
    # cell 2 pools the window means 47 to 70: 17 of measured columns only, then 2/3, 1/3 and 5 times nothing
    assert_close(cells[:, 1, 2].view(3, 11).sum(1), torch.full((3,), 150.0), rtol=1e-5, atol=0)
    assert not cells[:, :, 3].any()


def test_fewer_points_and_smaller_neighbourhoods(parts: Batch):
    default = build(features=("fpfh",)).extract(parts)["fpfh.cells"]
    for settings in (
        {"k_normal": 9},
        {"k_fpfh": 20},
        {"points": "foreground"},
        {"point_step": 2},
        {"radius_fpfh": 0.02},
    ):
        cells = build(features=("fpfh",), **settings).extract(parts)["fpfh.cells"]
        assert bool(cells.isfinite().all())
        assert not torch.allclose(cells, default, atol=1.0)
    for points, measured in (("valid", True), ("foreground", False)):
        cells = build(features=("fpfh",), points=points, grid=8).extract(parts)["fpfh.cells"]
        assert bool(cells[:, :, 0, 0].any()) == measured  # the corner lies off the part


@pytest.mark.parametrize("feature", ALL)
def test_every_feature_fits_alone_and_is_finite(feature: Feature, parts: Batch):
    detector = fitted(features=(feature,))
    batch = replace(parts, images={detector.modalities[0]: parts.images[detector.modalities[0]]})
    for seen in (batch, blinded(batch)):
        result = predict(detector, seen)
        assert result.map.shape == (2, SIZE, SIZE)
        assert bool(result.map.isfinite().all())
        assert bool(result.score.isfinite().all())
        assert list(result.branch_maps) == list(detector.modalities)
    assert hasattr(detector.backbone, "network") == feature.endswith("inet")


# -- what was not measured -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{}, {"image_score": "reweighted"}, {"foreground_only": True, "points": "foreground"}]
)
def test_a_part_without_any_3d_point_is_average(settings: dict[str, Any], parts: Batch):
    detector = fitted(**settings)
    result = predict(detector, blinded(parts))
    mean = float(detector.bank.mean)
    assert_close(result.map, torch.full_like(result.map, mean), rtol=1e-4, atol=0)
    assert_close(result.score, torch.full((2,), mean), rtol=1e-4, atol=0)
    for share, name in zip(detector.level, ("rgb", "xyz")):
        assert_close(result.branch_maps[name], torch.full_like(result.map, float(share)), rtol=1e-4, atol=1e-6)


def test_without_masking_such_a_part_is_finite_too(parts: Batch):
    result = predict(fitted(mask_invalid=False, image_score="reweighted", blur="pil"), blinded(parts))
    assert bool(result.map.isfinite().all())
    assert bool(result.score.isfinite().all())


def test_cells_that_do_not_count_stay_out_of_the_bank():
    train = tiny_batch(range(8), size=SIZE)
    train.valid[:, :8, :16] = False
    assert fitted(train=train).bank.counts.tolist() == [8 * 14, 8 * 14]
    assert fitted(train=train, mask_invalid=False).bank.counts[0] == 8 * 16
    assert fitted(train=train, features=("rgb_inet",)).bank.counts[0] == 8 * 16  # RGB needs no point
    blind = blinded(train)
    with pytest.raises(DataError, match=r"'rgb_inet \+ fpfh' got no patch"):
        fitted(train=blind)


# -- the contract ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [("fpfh",), ("rgb_inet", "fpfh"), ("sift", "hog", "rgb_inet")])
def test_it_detects(features: tuple[Feature, ...]):
    detector = fitted(
        build(features=features, weights="auto", grid=14, point_step=2, scale_fusion="std"),
        tiny_batch(range(8), size=64),
    )
    good = predict(detector, tiny_batch(range(300, 308)))
    bad = predict(detector, tiny_batch(range(400, 408), defect=True))
    assert float((bad.score[:, None] > good.score).float().mean()) >= 0.95


def test_banks_and_scores_of_other_settings_share_cells():
    key = build().extractor_key()
    for settings in ({"coreset_ratio": 0.1}, {"blur": "pil"}, {"image_score": "max_map"}, {"scale_fusion": "std"}):
        assert build(**settings).extractor_key() == key
    for settings in ({"features": ("fpfh",)}, {"k_fpfh": 50}, {"points": "foreground"}, {"grid": 8}, {"seed": 1}):
        assert build(**settings).extractor_key() != key


@pytest.mark.parametrize("settings", [{}, {"features": ("sift", "fpfh"), "scale_fusion": "std"}])
def test_stored_tensors_give_the_same_bits(settings: dict[str, Any], parts: Batch):
    detector = fitted(**settings)
    fresh = BTF(detector.config, pretrained=False)
    fresh.load_tensors({name: tensor.clone() for name, tensor in detector.state_dict().items()})
    fresh.eval()
    before, after = predict(detector, parts), predict(fresh, parts)
    assert torch.equal(before.map, after.map)
    assert torch.equal(before.score, after.score)
    assert all(torch.equal(before.branch_maps[name], after.branch_maps[name]) for name in before.branch_maps)


def test_a_part_is_judged_alone(parts: Batch):
    detector = fitted(features=ALL)
    many = predict(detector, parts)
    one = predict(detector, take(parts, [1]))
    assert_close(one.map[0], many.map[1], rtol=1e-4, atol=1e-4)


def test_modalities_follow_from_the_features():
    assert BTFConfig().modalities == ("rgb", "xyz")
    assert BTFConfig(features=("sift", "fpfh")).modalities == ("xyz",)
    assert BTFConfig(features=("sift", "fpfh", "rgb_inet"), depth_from="depth").modalities == ("depth", "xyz", "rgb")
    assert build(features=("hog",), depth_from="depth").modalities == ("depth",)
    with pytest.raises(ConfigError, match=r"`modalities` of BTFConfig is no setting, .*: The views that `features`"):
        configure(BTF, {"modalities": ["rgb"]})


def test_config_presets_and_registry():
    assert detector_class("btf") is BTF
    paper = configure(BTF, preset="paper")
    assert (paper.grid, paper.bank_limit, paper.blur, paper.mask_invalid, paper.point_step) == (
        28,
        None,
        "pil",
        False,
        1,
    )
    assert configure(BTF, {"features": ["fpfh"]}, "fast").features == ("fpfh",)
    assert {preset: BTF.PREPARATION[preset] for preset in ("", *BTF.PRESETS)} == {
        "": "cloud",
        "fast": "cloud",
        "paper": "btf",
    }
    for wrong in (
        {"features": ()},
        {"features": ("fpfh", "fpfh")},
        {"features": ("fphf",)},
        {"k_normal": 2},
        {"k_fpfh": 1},
        {"point_step": 0},
        {"radius_fpfh": 0.0},
        {"coreset_ratio": 1.5},
        {"blur": "boxes"},
        {"image_score": "max"},
    ):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            BTFConfig(**wrong)  # type: ignore[arg-type]
