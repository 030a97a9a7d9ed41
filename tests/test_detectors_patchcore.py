"""PatchCore: its equations as loops, its switches, and what every detector promises."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from polyspect.detectors import detector_class
from polyspect.detectors.contract import configure
from polyspect.detectors.patchcore import PatchCore, PatchCoreConfig
from polyspect.errors import ConfigError, DataError, ModelFileError, NotFittedError
from polyspect.samples import Batch, Features, Prediction

SIZE = 64


def make_batch(parts: int, seed: int, size: int = SIZE) -> Batch:
    """One smooth texture with unit normals, a little different on each part; a corner without 3D points."""
    pattern = torch.rand(1, 6, 8, 8, generator=torch.Generator().manual_seed(0))
    own = torch.rand(parts, 6, 8, 8, generator=torch.Generator().manual_seed(seed))
    waves = F.interpolate(0.8 * pattern + 0.2 * own, size=size, mode="bilinear")
    valid = torch.ones(parts, size, size, dtype=torch.bool)
    valid[:, :16, :16] = False
    foreground = torch.ones_like(valid)
    foreground[:, :, 48:] = False
    normals = F.normalize(waves[:, 3:] - 0.5 + torch.tensor([0.0, 0, -2])[:, None, None], dim=1) * valid[:, None]
    images = {"rgb": 0.3 + 0.2 * waves[:, :3], "normals": normals}
    return Batch([f"part{i}" for i in range(parts)], images, valid, foreground)


def one(batch: Batch, index: int) -> Batch:
    images = {name: image[index : index + 1] for name, image in batch.images.items()}
    return Batch([batch.ids[index]], images, batch.valid[index : index + 1], batch.foreground[index : index + 1])


def fit(detector: PatchCore, train: Batch, validation: Batch) -> PatchCore:
    splits = {"train": train, "validation": validation}
    detector.eval()
    with torch.no_grad():
        for stage in detector.stages():
            for index in range(len(splits[stage.split])):
                stage.update(detector.extract(one(splits[stage.split], index)))
            stage.finish()
    detector.fitted.fill_(True)
    return detector


def fitted(**settings: Any) -> PatchCore:
    detector = PatchCore(PatchCoreConfig(**{"weights": "random", "coreset_ratio": 0.5, **settings}))
    return fit(detector, make_batch(8, seed=1), make_batch(4, seed=2))


@pytest.fixture(scope="module")
def detector() -> PatchCore:
    return fitted()


@pytest.fixture(scope="module")
def parts() -> Batch:
    return make_batch(3, seed=3)


def predict(detector: PatchCore, batch: Batch) -> Prediction:
    with torch.no_grad():
        return detector(batch)


# -- Eqs. 1 to 4 -----------------------------------------------------------------------------------------------------


def test_scores_equal_eqs_1_to_4_written_as_loops(parts: Batch):
    detector = fitted(blur="none", image_score="reweighted")
    features = detector.extract(parts)
    result = predict(detector, parts)
    total, score = torch.zeros(3, SIZE, SIZE), torch.zeros(3)
    for name, bank in detector.named_banks():
        patches = features[f"{name}.patches"]
        B, C, h, w = patches.shape
        d, worst = torch.full((B, h, w), float(bank.mean)), torch.zeros(B)
        for b in range(B):
            best = (-1.0, torch.zeros(()), 0)
            for i in range(h):
                for j in range(w):
                    if name == "normals" and i < 2 and j < 2:  # the corner of 16 pixels, cells of 8
                        continue
                    gaps = (bank.vectors - patches[b, :, i, j]).norm(dim=1)
                    d[b, i, j] = gaps.min()
                    if float(gaps.min()) > best[0]:
                        best = (float(gaps.min()), patches[b, :, i, j], int(gaps.argmin()))
            near = (bank.vectors - bank.vectors[best[2]]).norm(dim=1).argsort()[1:3]
            e = (((bank.vectors[near] - best[1]).norm(dim=1) - best[0]) / C**0.5).exp()
            worst[b] = (1 - 1 / e.sum()) * best[0]
        z = (d - bank.mean) / bank.std
        total += F.interpolate(z[:, None].float(), size=(SIZE, SIZE), mode="bilinear")[:, 0]
        score += ((worst - bank.mean) / bank.std).float()
    assert_close(result.map, total, rtol=1e-4, atol=1e-4)
    assert_close(result.score, score, rtol=1e-4, atol=1e-4)


def test_map_is_the_sum_of_branch_maps_and_the_score_the_mean_of_its_largest_values(detector: PatchCore, parts: Batch):
    result = predict(detector, parts)
    assert set(result.branch_maps) == {"rgb", "normals"}
    assert_close(result.map, result.branch_maps["rgb"] + result.branch_maps["normals"])
    pixels = result.map.flatten(1).sort(1, descending=True).values
    assert_close(result.score, pixels[:, : pixels.shape[1] // 100].mean(1))
    assert result.map.dtype == result.score.dtype == torch.float32


def test_the_maximum_of_the_map_as_score(parts: Batch):
    result = predict(fitted(image_score="max_map"), parts)
    assert torch.equal(result.score, result.map.flatten(1).amax(1))


def test_largest_branch_instead_of_the_sum(parts: Batch):
    result = predict(fitted(fusion="max"), parts)
    assert_close(result.map, torch.stack(list(result.branch_maps.values())).amax(0))


def test_level_comes_from_validation_patches(detector: PatchCore):
    validation = make_batch(4, seed=2)
    features = detector.extract(validation)
    for name, bank in detector.named_banks():
        rows = features[f"{name}.patches"].permute(0, 2, 3, 1)
        measured = torch.ones(rows.shape[:3], dtype=torch.bool)
        measured[:, :2, :2] = name == "rgb"
        d = torch.cdist(rows[measured], bank.vectors).amin(1)
        assert_close(bank.mean.float(), d.mean(), rtol=1e-4, atol=0)
        assert_close(bank.std.float(), d.std(correction=0), rtol=1e-3, atol=0)


def test_training_parts_against_the_whole_bank_score_zero():
    for blur in ("gaussian", "pil", "none"):
        detector = fitted(modalities=("rgb",), coreset_ratio=1.0, bank_limit=None, blur=blur, image_score="reweighted")
        result = predict(detector, make_batch(8, seed=1))
        assert float(result.map.abs().max()) < 1e-3  # convolutions differ in the last bits between batch sizes
        assert float(result.score.abs().max()) < 1e-3
        assert bool(result.branch_maps["rgb"].isfinite().all())


# -- joined features -------------------------------------------------------------------------------------------------


def test_joined_bank_with_scales_is_one_bank_over_scaled_features(parts: Batch):
    detector = fitted(fusion="concat", scale_fusion="std", mask_invalid=False, blur="none")
    train = detector.extract(make_batch(8, seed=1))
    expected = torch.stack([train[f"{name}.patches"].std(correction=0) for name in detector.modalities])
    assert_close(detector.scale, expected, rtol=1e-3, atol=0)
    result, features = predict(detector, parts), detector.extract(parts)
    joined = torch.cat([features[f"{n}.patches"] / s for n, s in zip(detector.modalities, detector.scale)], dim=1)
    bank = dict(detector.named_banks())["joined"]
    d = torch.cdist(joined.permute(0, 2, 3, 1).flatten(0, 2), bank.vectors).amin(1).view(3, 1, 8, 8)
    assert_close(result.map, F.interpolate(d, size=SIZE, mode="bilinear")[:, 0], rtol=1e-3, atol=1e-3)
    assert list(result.branch_maps) == ["joined"]


def test_joined_bank_without_scales_takes_features_as_they_are():
    detector = fitted(fusion="concat")
    assert [stage.name for stage in detector.stages()] == ["banks", "levels"]
    assert torch.equal(detector.scale, torch.ones(2))


# -- what was not measured -------------------------------------------------------------------------------------------


def test_unmeasured_patches_stay_out_of_geometric_banks(detector: PatchCore):
    counts = {name: bank.counts.tolist() for name, bank in detector.named_banks()}
    assert counts == {"rgb": [8 * 64] * 2, "normals": [8 * 60] * 2}
    everything = fitted(mask_invalid=False)
    assert [bank.counts[0].item() for _, bank in everything.named_banks()] == [8 * 64, 8 * 64]
    on_part = fitted(foreground_only=True)
    assert [bank.counts[0].item() for _, bank in on_part.named_banks()] == [8 * 48, 8 * 44]


@pytest.mark.parametrize("settings", [{}, {"image_score": "reweighted"}, {"fusion": "concat"}])
def test_part_without_any_3d_point_is_average_in_geometry(settings: dict[str, Any], parts: Batch):
    images = {**parts.images, "normals": torch.zeros_like(parts.images["normals"])}
    blind = replace(parts, images=images, valid=torch.zeros_like(parts.valid))
    result = predict(fitted(**settings), blind)
    assert bool(result.map.isfinite().all())
    assert bool(result.score.isfinite().all())
    geometric = result.branch_maps.get("normals", result.branch_maps.get("joined"))
    assert geometric is not None
    assert_close(geometric, torch.zeros_like(geometric), rtol=0, atol=1e-4)


def test_fitting_without_any_measured_patch_says_so():
    train = make_batch(2, seed=1)
    blind = replace(train, valid=torch.zeros_like(train.valid))
    with pytest.raises(DataError, match="'normals' got no patch"):
        fit(PatchCore(PatchCoreConfig(weights="random")), blind, blind)
    with pytest.raises(DataError, match=r"'normals'.*no level"):
        fit(PatchCore(PatchCoreConfig(weights="random")), train, blind)


# -- the contract ----------------------------------------------------------------------------------------------------


def test_a_batch_of_many_equals_batches_of_one(detector: PatchCore, parts: Batch):
    many = predict(detector, parts)
    alone = [predict(detector, one(parts, index)) for index in range(len(parts))]
    assert_close(torch.cat([p.score for p in alone]), many.score, rtol=1e-4, atol=1e-4)
    assert_close(torch.cat([p.map for p in alone]), many.map, rtol=1e-4, atol=1e-4)


def test_fitting_twice_gives_the_same_bits_and_scoring_changes_nothing(detector: PatchCore, parts: Batch):
    before = copy.deepcopy(detector.state_dict())
    first = predict(detector, parts)
    assert torch.equal(predict(fitted(), parts).map, first.map)
    assert all(torch.equal(before[name], tensor) for name, tensor in detector.state_dict().items())


@pytest.mark.parametrize("fusion", ["normalised_sum", "concat"])
def test_stored_tensors_give_the_same_bits(fusion: str, parts: Batch):
    detector = fitted(fusion=fusion, scale_fusion="std")
    tensors = {name: tensor.clone() for name, tensor in detector.state_dict().items()}
    fresh = PatchCore(detector.config, pretrained=False)
    with pytest.raises(NotFittedError):
        fresh(parts)
    fresh.load_tensors(tensors)
    fresh.eval()
    assert torch.equal(predict(fresh, parts).map, predict(detector, parts).map)
    assert torch.equal(predict(fresh, parts).score, predict(detector, parts).score)
    del tensors[next(name for name in tensors if name.endswith(".vectors"))]
    with pytest.raises(ModelFileError, match="vectors"):
        fresh.load_tensors(tensors)


@pytest.mark.parametrize("modality", ["rgb", "normals"])
def test_a_planted_blob_is_found_where_it_is(modality: str):
    detector = fitted(weights="auto")
    good = make_batch(6, seed=4)
    image = good.images[modality].clone()
    image[:, :, 36:48, 24:36] = torch.tensor([0.9, 0.1, 0.2] if modality == "rgb" else [0.8, 0.0, -0.6])[:, None, None]
    bad = replace(good, images={**good.images, modality: image})
    normal, anomalous = predict(detector, good), predict(detector, bad)
    assert float(anomalous.score.min()) > float(normal.score.max())
    for found in (anomalous.map, anomalous.branch_maps[modality]):
        peaks = found.flatten(1).argmax(1)
        rows, columns = peaks // SIZE, peaks % SIZE
        assert bool(((rows >= 32) & (rows < 52) & (columns >= 20) & (columns < 40)).all())
    other = "normals" if modality == "rgb" else "rgb"
    assert_close(anomalous.branch_maps[other], normal.branch_maps[other], rtol=1e-4, atol=1e-4)


def test_config_presets_and_registry():
    assert detector_class("patchcore") is PatchCore
    paper = configure(PatchCore, preset="paper")
    assert (paper.grid, paper.bank_limit, paper.modalities) == (28, None, ("rgb",))
    assert configure(PatchCore, {"modalities": ["rgb", "depth"]}, "fast").bank_limit == 1000
    with pytest.raises(ConfigError, match="coreset_ratio"):
        configure(PatchCore, {"coreset_ration": 0.1})
    for wrong in ({"coreset_ratio": 0.0}, {"modalities": ()}, {"modalities": ("rgb", "rgb")}, {"n_reweight": 0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            PatchCoreConfig(**wrong)  # type: ignore[arg-type]


# -- patches ---------------------------------------------------------------------------------------------------------


def test_features_hold_one_grid_per_modality_and_the_masks(detector: PatchCore, parts: Batch):
    features: Features = detector.extract(parts)
    assert {name: tuple(tensor.shape) for name, tensor in features.items()} == {
        "rgb.patches": (3, 152, 8, 8),
        "normals.patches": (3, 152, 8, 8),
        "valid": (3, SIZE, SIZE),
        "foreground": (3, SIZE, SIZE),
    }
