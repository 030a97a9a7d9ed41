"""Shape-Guided: cells by hand, memories and candidates by definition, guidance, holes, fusion, and what it finds."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from golden import filled_state
from polyspect.cli import main
from polyspect.detectors.completion import Completion, CompletionConfig
from polyspect.detectors.contract import Observe, Optimise, configure
from polyspect.detectors.shape_guided import Cloud, ShapeGuided, ShapeGuidedConfig, shifted_cells
from polyspect.errors import ConfigError, DataError, ShapeError, WeightsError
from polyspect.fitting.engine import Engine, EngineConfig
from polyspect.layers.alignment import align
from polyspect.layers.smoothing import smooth
from polyspect.layers.sparse_coding import Rebuilt, rebuild
from polyspect.metrics import auroc
from published_networks import signed_distance
from tiny import TinyParts, blinded, only, tiny_batch

TINY = {
    "distance_steps": 30,
    "distance_batch": 8,
    "distance_rate": 2e-3,
    "encoder_input": "patch",
    "patch": 60,
    "queries": 40,
    "neighbour": 10,
    "train_density": 2.0,
    "score_density": 2.0,
    "code": 16,
    "pooled": 32,
    "width": 32,
    "depth": 1,
}


def build(**settings: Any) -> ShapeGuided:
    return ShapeGuided(ShapeGuidedConfig(**{**TINY, **settings}))


def fit(detector: ShapeGuided, count: int = 5, checkpoint: Path | None = None, resume: bool = False) -> ShapeGuided:
    engine = Engine(EngineConfig(device="cpu", block=4), checkpoint)
    parts = {"train": TinyParts(range(count)), "validation": TinyParts(range(50, 54))}
    return engine.fit(detector, parts, resume=resume)


@pytest.fixture(scope="module")
def fitted() -> ShapeGuided:
    return fit(build(cells="touched"))


def switched(detector: ShapeGuided, **settings: Any) -> ShapeGuided:
    """The same tensors under other settings."""
    other = build(**{"cells": "touched", **settings})
    other.load_tensors(detector.state_dict())
    return other.eval()


# -- cells -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "column", "cells"),
    [(100, 100, {292, 346, 350, 404}), (0, 0, {2, 56}), (100, 216, {307, 361, 365, 419}), (223, 223, {727, 781})],
)
def test_the_programs_cells_of_one_pixel(row, column, cells):
    pixels = torch.tensor([[row * 224 + column]])
    found = build(cells="released")._cells_of(pixels, 224, (28, 28))
    assert set(found[0].nonzero()[:, 0].tolist()) == cells


def test_cells_of_a_patch_are_those_of_its_points_together():
    cells = torch.tensor([[0, 30, 31], [700, 701, 783]])
    moved = shifted_cells(cells, 2, (28, 28))
    assert moved.shape == (2, 12)
    expected = []
    for patch in cells.tolist():
        flat = [c + d for c in patch for d in (2, -2, 56, -56)]
        flat = [max(flat) if c < 0 else c for c in flat]
        expected.append({min(flat) if c > 783 else c for c in flat})
    assert [set(row) for row in moved.tolist()] == expected


def test_dilated_cells_keep_the_touched_ones_and_do_not_wrap():
    pixels = torch.tensor([[100 * 224 + 220]])  # row 12, column 27, the last
    found = build(cells="dilated", cell_shift=1)._cells_of(pixels, 224, (28, 28))
    assert set(found[0].nonzero()[:, 0].tolist()) == {28 * r + c for r in (11, 12, 13) for c in (26, 27)}
    touched = build(cells="touched")._cells_of(pixels, 224, (28, 28))
    assert touched[0].nonzero()[:, 0].tolist() == [12 * 28 + 27]


# -- memories ----------------------------------------------------------------------------------------------------------


def test_memories_hold_the_codes_and_the_cells_of_every_patch():
    detector = fit(build(cells="touched"), count=2)
    features = detector.extract(tiny_batch([0, 1]))
    clouds = [detector.cloud(features, index) for index in range(2)]
    assert_close(detector.codes, torch.cat([cloud.codes for cloud in clouds]), rtol=1e-5, atol=1e-6)
    k = 0
    for index, cloud in enumerate(clouds):
        values = features["rgb.cells"][index].flatten(1).T
        for cells in cloud.cells:
            rows = detector.owned[detector.owned_from[k] : detector.owned_from[k + 1]].long()
            assert_close(detector.colours[rows], values[cells])
            k += 1
    assert k == len(detector.codes)
    assert len(detector.colours) == sum(int(cloud.cells.any(0).sum()) for cloud in clouds)  # no row that nobody owns


def test_candidates_are_the_rows_of_the_patches_found(fitted):
    found = torch.tensor([[0, 3], [3, len(fitted.codes) - 1]])
    rows: set[int] = set()
    for patch in set(found.flatten().tolist()):
        rows |= set(fitted.owned[fitted.owned_from[patch] : fitted.owned_from[patch + 1]].tolist())
    assert set(fitted.candidates(found).nonzero()[:, 0].tolist()) == rows


def test_a_part_of_the_memory_is_rebuilt_from_itself_unless_its_own_rows_are_skipped(fitted):
    detector = switched(fitted, reconstruction="nearest")
    features = detector.extract(tiny_batch([2]))
    s_rgb, _, s_3d, _ = detector.judge(features, 0)
    assert float(s_3d) < 1e-4
    assert float(s_rgb) < 1e-3
    s_rgb, _, s_3d, _ = detector.judge(features, 0, skip=1)
    assert float(s_3d) > 1e-3
    assert float(s_rgb) > 1e-2
    one = switched(fitted, reconstruction="nearest", k_sdf=1)  # the same shape, and no other may guide
    guided, _, alone, _ = one.judge(features, 0, skip=1)
    assert float(alone) == float(s_3d)
    assert float(guided) >= float(s_rgb)


@pytest.mark.parametrize("left_out", ["", "rgb.cells"])
def test_a_part_of_which_nothing_is_known_is_judged_by_all_that_was_measured(fitted, left_out):
    batch = tiny_batch([2])
    answers = []
    for foreground in (torch.zeros_like(batch.foreground), torch.ones_like(batch.foreground)):
        features = fitted.extract(dataclasses.replace(batch, foreground=foreground))
        answers.append(fitted.score({key: x for key, x in features.items() if key != left_out}))
    nowhere, everywhere = answers
    assert torch.equal(nowhere.score, everywhere.score)
    assert torch.equal(nowhere.map, everywhere.map)
    assert float(nowhere.score) > 0


def test_sparse_coding_need_not_find_a_row_of_the_memory_again(fitted):
    features = fitted.extract(tiny_batch([2]))
    cloud = fitted.cloud(features, 0)
    _, _, s_3d, _ = fitted.judge(features, 0)
    found = rebuild(cloud.codes, fitted.codes, 10, 3)
    assert_close(found.rows[:, 0], (torch.cdist(cloud.codes, fitted.codes)).argmin(1))
    assert_close(cloud.codes, fitted.codes[found.rows[:, 0]], rtol=1e-5, atol=1e-6)  # each is there
    assert float(s_3d) > 1e-3  # and a longer row won the first choice


def test_the_maps_are_written_out(fitted):
    detector = switched(fitted, blur="none")
    features = detector.extract(tiny_batch([70], defect=True))
    s_rgb, rgb, s_3d, xyz = detector.judge(features, 0)
    cloud = detector.cloud(features, 0)
    assert cloud is not None
    found = rebuild(cloud.codes, detector.codes, 10, 3)
    assert_close(s_3d, (cloud.codes - found.vectors).norm(dim=1).max())
    with torch.no_grad():
        distances = detector.distance.field.plain(found.vectors, cloud.points).abs()
    expected: dict[int, float] = {}
    for pixel, value in zip(cloud.pixels.flatten().tolist(), distances.flatten().tolist()):
        expected[pixel] = min(value, expected.get(pixel, value))
    assert_close(xyz.flatten()[list(expected)], torch.tensor(list(expected.values())), rtol=1e-4, atol=1e-5)
    asked = cloud.cells.any(0)
    values = features["rgb.cells"][0].flatten(1).T[asked]
    again = rebuild(values, detector.colours[detector.candidates(found.rows)], 5, 3)
    assert_close(s_rgb, again.distance.max())
    assert rgb.shape == xyz.shape == (64, 64)
    prediction = detector.score(features)
    assert_close(prediction.score[0], s_rgb * s_3d)
    assert_close(prediction.map[0], torch.maximum(align(rgb, detector.line), xyz))
    blurred = switched(fitted).score(features)  # the greater of both first, then the blur
    assert_close(blurred.map, smooth(prediction.map, "gaussian", 4.0))


# -- guidance ----------------------------------------------------------------------------------------------------------


def test_a_flat_patch_in_the_colour_of_curved_ones_is_found_only_if_guided():
    generator = torch.Generator().manual_seed(0)
    fields = {"flat": torch.tensor([1.0, 0, 0]), "curved": torch.tensor([0, 1.0, 0])}
    colours = {"flat": torch.tensor([0, 0, 1.0, 0]), "curved": torch.tensor([0, 0, 0, 1.0])}
    residuals = {}
    for guided in (True, False):
        detector = build(guided=guided, code=3, cells="touched", k_sdf=3)
        near = [0.01 * torch.randn(12, n, generator=generator) for n in (3, 3, 4, 4)]
        near[2][:, 3] = near[3][:, 2] = 0  # no differences of one colour's rows point to the other colour
        detector.codes = torch.cat([fields["flat"] + near[0], fields["curved"] + near[1]])
        detector.colours = torch.cat([colours["flat"] + near[2], colours["curved"] + near[3]])
        detector.owned = torch.arange(24, dtype=torch.int32)  # a cell per patch
        detector.owned_from = torch.arange(25)
        found = rebuild(fields["flat"][None], detector.codes, 3, 3)
        assert not detector.candidates(found.rows)[12:].any()
        cells = torch.zeros(4, 2, 2)
        cells[:, 0, 0], cells[:, 0, 1] = colours["flat"], colours["curved"]
        for index, name in enumerate(("flat", "curved")):
            touched = torch.zeros(1, 4, dtype=torch.bool)
            touched[0, index] = True
            cloud = Cloud(torch.zeros(1, 60, 3), torch.zeros(1, 60, dtype=torch.int64), fields["flat"][None], touched)
            part = torch.ones(16, 16, dtype=torch.bool)
            residuals[guided, name] = float(detector._colour_residuals(cells, cloud, found, 0, part)[0])
    assert residuals[True, "flat"] < 0.05
    assert residuals[True, "curved"] > 0.5
    assert residuals[False, "curved"] < 0.05


def test_where_no_candidate_is_left_all_rows_may_be_used():
    detector = build(code=3, cells="touched")
    detector.codes, detector.colours = torch.eye(3), torch.cat([torch.eye(6)] * 2)
    detector.owned, detector.owned_from = torch.zeros(3, dtype=torch.int32), torch.arange(4)
    found = Rebuilt(torch.eye(3), torch.zeros(3), torch.tensor([[0], [1], [2]]))
    cloud = Cloud(torch.zeros(1, 60, 3), torch.zeros(1, 60, dtype=torch.int64), torch.eye(3), torch.ones(1, 1) > 0)
    part = torch.ones(8, 8, dtype=torch.bool)
    cells = torch.eye(6)[:, 5].view(6, 1, 1)  # in the memory, owned by nobody
    assert float(detector._colour_residuals(cells, cloud, found, 0, part)[0]) > 0.9
    assert float(detector._colour_residuals(cells, cloud, found, 1, part)[0]) < 1e-6


# -- parts that lack something -----------------------------------------------------------------------------------------


def test_there_is_no_map_where_there_are_no_points(fitted):
    batch = tiny_batch([71])
    y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    hole = (y - 30) ** 2 + (x - 34) ** 2 < 49
    batch.valid[:, hole] = False
    batch.foreground[:, hole] = False
    detector = switched(fitted)
    whole, cut = (detector.extract(b) for b in (tiny_batch([71]), batch))
    _, _, s_whole, _ = detector.judge(whole, 0)
    _, _, s_cut, xyz = detector.judge(cut, 0)
    assert not xyz[hole].any()
    assert bool((xyz[batch.foreground[0]] > 0).any())
    assert float(s_cut) > float(s_whole)


def test_a_part_without_points_is_judged_by_rgb(fitted):
    batch = blinded(tiny_batch([72], defect=True))
    prediction = fitted(batch)
    s_rgb, _, s_3d, xyz = fitted.judge(fitted.extract(batch), 0)
    assert float(s_3d) == 0
    assert not xyz.any()
    assert_close(prediction.score[0], s_rgb)


def test_a_known_shape_is_no_missing_one(fitted):
    detector = switched(fitted, reconstruction="nearest")
    batch = tiny_batch([2])
    batch.images["rgb"] = tiny_batch([90]).images["rgb"]
    s_rgb, _, s_3d, _ = detector.judge(detector.extract(batch), 0)
    assert float(s_rgb) > 1e-2
    assert float(s_3d) == 0  # the very codes of the memory
    assert float(detector(batch).score[0]) == 0


def test_a_part_smaller_than_a_patch_is_whole_in_each_of_its_patches(fitted):
    batch = tiny_batch([73])
    keep = torch.zeros_like(batch.valid)
    keep[:, 30:34, 30:36] = True
    batch.valid[:] &= keep
    batch.foreground[:] &= keep
    cloud = fitted.cloud(fitted.extract(batch), 0)
    assert cloud is not None
    pixels = batch.foreground[0].flatten().nonzero()[:, 0]
    assert torch.equal(cloud.pixels.sort(dim=1).values, pixels.expand(len(cloud.pixels), -1))
    assert bool(torch.isfinite(fitted(batch).map).all())


def test_parts_without_any_point_cannot_be_learned_from():
    detector = build(distance_checkpoint=None)
    with pytest.raises(DataError, match=r"the memory of codes has 0 rows, and 10 are needed"):
        detector.build_memories()


def test_without_a_view_the_other_expert_judges_alone(fitted):
    batch = tiny_batch([7, 8])
    features = fitted.extract(batch)
    cloud = fitted.score({key: x for key, x in features.items() if not key.startswith("rgb")})
    assert set(cloud.branch_maps) == {"xyz"}
    s_3d = torch.stack([fitted.judge(features, index)[2] for index in range(2)])
    assert torch.equal(cloud.score, s_3d)
    rgb = fitted.score({key: x for key, x in features.items() if not key.startswith("xyz")})
    assert set(rgb.branch_maps) == {"rgb"}
    touched = torch.nn.functional.max_pool2d(features["part"].float(), 8).flatten(1) > 0
    values = features["rgb.cells"].flatten(2).mT  # all of the memory, no guidance
    expected = [
        rebuild(x[asked], fitted.colours, fitted.config.k_rgb, 3).distance.amax() for x, asked in zip(values, touched)
    ]
    assert_close(rgb.score, torch.stack(expected))


def test_a_completed_model_judges_parts_with_one_view(fitted):
    completion = Completion(fitted, CompletionConfig(epochs=60, batch_size=4))
    completion = Engine(EngineConfig(device="cpu")).fit(completion, {"train": TinyParts(range(12))})
    assert list(completion.networks) == ["rgb_to_part"]
    batch = tiny_batch([100, 101])
    assert torch.equal(completion(batch).map, fitted(batch).map)
    photo, scan = only(batch, ["rgb"]), only(batch, ["xyz"])
    assert set(completion(photo).branch_maps) == {"rgb"}
    assert set(completion(scan).branch_maps) == {"xyz"}
    place = completion.complete(completion.extract(photo))["part"]
    seen = batch.valid & batch.foreground
    assert float((place & seen).sum() / (place | seen).sum()) > 0.6  # cells of 8 of 64 pixels


def test_pictures_must_fit_the_grid(fitted):
    with pytest.raises(ShapeError, match="multiples of 8"):
        fitted.extract(tiny_batch([1], size=60))


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "stages", "required"),
    [
        ({}, ["distance", "memories", "alignment"], ("rgb", "xyz")),
        ({"experts": "sdf"}, ["distance", "memories"], ("xyz",)),
        ({"experts": "rgb"}, ["distance", "memories"], ("rgb", "xyz")),
        ({"experts": "rgb", "guided": False}, ["memories"], ("rgb",)),
        ({"modalities": ("xyz",)}, ["distance", "memories"], ("xyz",)),
        ({"modalities": ("rgb",)}, ["memories"], ("rgb",)),
    ],
)
def test_experts_decide_what_is_trained_and_needed(settings, stages, required):
    detector = build(**settings)
    assert [stage.name for stage in detector.stages()] == stages
    assert all(isinstance(stage, Optimise if stage.name == "distance" else Observe) for stage in detector.stages())
    assert detector.required == required


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"modalities": ("rgb", "depth")}, "`modalities`"),
        ({"experts": "sdf", "modalities": ("rgb",)}, "`experts`"),
        ({"k_sdf": 2}, "`k_sdf`"),
        ({"k_sdf": 0, "reconstruction": "nearest"}, "`k_sdf`"),
        ({"cells": "all"}, "`cells`"),
        ({"neighbour": 60}, "`patch`"),
        ({"queries": 61}, "`queries`"),
        ({"score_density": 0.0}, "`score_density`"),
        ({"align_split": "test"}, "`align_split`"),
    ],
)
def test_settings_out_of_range_are_refused(settings, says):
    with pytest.raises(ConfigError, match=says):
        build(**settings)


def test_the_papers_preset():
    config = configure(ShapeGuided, preset="paper")
    assert (config.backbone, config.reductions) == ("wide_resnet50_2.racm_in1k", (4, 8))
    assert (config.k_sdf, config.k_rgb, config.cells, config.cell_shift) == (10, 5, "released", 2)
    assert (config.align_split, config.align_parts, config.blur, config.lift_background) == ("train", 25, "pil", True)
    assert (config.train_density, config.score_density, config.patch) == (5, 10, 500)


def test_alignment_on_training_parts_looks_at_the_first_so_many_of_them():
    seen: list[int] = []
    detector = build(align_split="train", align_parts=3)
    judge = detector.judge
    detector.judge = lambda features, index, skip=0: (seen.append(skip), judge(features, index, skip))[1]  # type: ignore[method-assign]
    fit(detector)
    assert seen == [1, 1, 1]


# -- what it finds, and published files --------------------------------------------------------------------------------


@pytest.mark.parametrize("modalities", [("rgb", "xyz"), ("xyz",), ("rgb",)])
def test_it_detects(modalities):
    detector = fit(build(modalities=modalities, distance_steps=60, cells="dilated", cell_shift=1), count=8)
    good, bad = detector(tiny_batch(range(60, 66))), detector(tiny_batch(range(80, 86), defect=True))
    scores = torch.cat([good.score, bad.score]).tolist()
    assert auroc(scores, [0] * 6 + [1] * 6) == 1.0
    assert set(bad.branch_maps) == set(modalities)


def test_a_published_network_is_used_as_it_is(tmp_path, capsys):
    published, imported = tmp_path / "ckpt_000601.pth", tmp_path / "sdf.safetensors"
    torch.save({"sdf_model": filled_state(signed_distance()), "current_iteration": 601}, published)
    assert main(["weights", "import", str(published), "--out", str(imported)]) == 0
    assert f"distance_checkpoint={imported}" in capsys.readouterr().out
    networks = []
    for file in (published, imported):
        detector = ShapeGuided(ShapeGuidedConfig(distance_checkpoint=str(file)))
        assert [stage.name for stage in detector.stages()] == ["memories", "alignment"]
        assert set(detector.sources["distance"]) == {"name", "source", "sha256"}
        networks.append(detector.distance.state_dict())
    assert all(torch.equal(networks[0][name], networks[1][name]) for name in networks[0])
    save_file({"encoder.conv9.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match=r"encoder\.conv9"):
        ShapeGuided(ShapeGuidedConfig(distance_checkpoint=str(tmp_path / "other.safetensors")))
