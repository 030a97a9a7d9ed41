"""MDSS: its loss, masks, maps and fusion by hand and by definition; networks trained on little; switches; fitting."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from golden import noise
from polyspect.data.preparation import PREPARATIONS
from polyspect.detectors.completion import Completion, CompletionConfig
from polyspect.detectors.contract import Observe, Optimise, configure
from polyspect.detectors.mdss import (
    MDSS,
    MDSSConfig,
    crop_around,
    dynamic_loss,
    ends,
    grow,
    learning_factor,
    mask_cells,
    of_nearest_centre,
)
from polyspect.errors import CalibrationError, ConfigError, DataError, ShapeError
from polyspect.fitting.engine import Engine, EngineConfig
from polyspect.geometry.sampling import farthest_points
from polyspect.layers.cloud_patches import cut_patches, draw_patches, patch_centres
from polyspect.layers.maps import gaussian_smooth
from polyspect.layers.signed_distance import SignedDistance, normalise_patches, sample_queries, to_pixels
from polyspect.metrics import auroc
from polyspect.samples import Batch, Features
from tiny import TinyParts, blinded, only, take, tiny_batch

TINY = {
    "teacher_weights": "random",
    "student_steps": 2,
    "distance_steps": 2,
    "distance_batch": 4,
    "patch": 60,
    "neighbour": 10,
    "train_density": 1.0,
    "score_density": 1.0,
    "code": 8,
    "pooled": 16,
    "width": 16,
    "depth": 1,
}


def build(**settings: Any) -> MDSS:
    return MDSS(MDSSConfig(**{**TINY, **settings}))


def fit(detector: MDSS, count: int = 5, checkpoint: Path | None = None, resume: bool = False) -> MDSS:
    engine = Engine(EngineConfig(device="cpu", block=4), checkpoint)
    parts = {"train": TinyParts(range(count)), "validation": TinyParts(range(50, 53))}
    return engine.fit(detector, parts, resume=resume)


@pytest.fixture(scope="module")
def fitted() -> MDSS:
    return fit(build())


@pytest.fixture(scope="module")
def features(fitted: MDSS) -> Features:
    return fitted.extract(tiny_batch([1, 2, 3]))


def switched(detector: MDSS, **settings: Any) -> MDSS:
    """The same tensors under other settings."""
    other = build(**settings)
    other.load_state_dict(detector.state_dict())
    return other.eval()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- Eqs. 1 and 2 ------------------------------------------------------------------------------------------------------


def test_the_factor_rises_by_half_a_cosine():
    config = MDSSConfig(student_steps=400)
    found = [learning_factor(config, step) for step in (0, 100, 200, 300, 400)]
    assert found == pytest.approx([0.990000, 0.991318, 0.994500, 0.997682, 0.999000], abs=1e-6)
    down = MDSSConfig(student_steps=400, factor="down")
    assert [learning_factor(down, step) for step in (400, 300, 200, 100, 0)] == pytest.approx(found)
    cycle = MDSSConfig(factor="cyclic", factor_period=200)
    assert [learning_factor(cycle, step) for step in (0, 25, 50, 75, 100)] == pytest.approx(found)
    assert [learning_factor(cycle, step) for step in (150, 450)] == pytest.approx([found[2]] * 2)
    assert learning_factor(MDSSConfig(factor="fixed", fixed_factor=0.999), 7) == 0.999


def test_the_loss_is_the_mean_above_the_quantile():
    error = torch.arange(1000)[torch.randperm(1000, generator=generator())] / 1000
    assert float(dynamic_loss(error, 0.99)) == pytest.approx(0.9945, abs=1e-6)
    assert float(dynamic_loss(error, 0.999)) == pytest.approx(0.999, abs=1e-6)
    assert float(dynamic_loss(7 * error, 0.99)) == pytest.approx(7 * 0.9945, abs=1e-5)


@pytest.mark.parametrize("d", [0.0, 0.5, 0.9, 0.987, 0.999])
@pytest.mark.parametrize("kind", ["continuous", "ties", "mostly zero"])
def test_the_loss_equals_the_definition(d, kind):
    error = noise("e", 2, 5, 11, 3).square()
    if kind == "ties":
        error = (3 * error).round()
    if kind == "mostly zero":
        error = error * (noise("m", 2, 5, 11, 3) > 2)
    above = error[error > torch.quantile(error.flatten(), d)]
    expected = above.mean() if len(above) else torch.tensor(0.0)
    assert_close(dynamic_loss(error, d), expected)
    counts = noise("c", 2, 5, 11, 3) > 0
    among = error[counts]
    above = among[among > torch.quantile(among, d)]
    assert_close(dynamic_loss(error, d, counts), above.mean() if len(above) else torch.tensor(0.0))


def test_gradients_reach_the_elements_above_the_quantile_only():
    error = (torch.arange(100.0) / 100).requires_grad_()
    dynamic_loss(error, 0.95).backward()
    assert error.grad is not None
    assert error.grad.nonzero()[:, 0].tolist() == [95, 96, 97, 98, 99]
    assert_close(error.grad[95:], torch.full((5,), 0.2))


@pytest.mark.parametrize("error", [torch.zeros(50), torch.full((50,), 0.3)])
def test_nothing_above_the_quantile_is_a_loss_of_zero(error):
    error = error.requires_grad_()
    for counts in (None, torch.zeros(50, dtype=torch.bool)):
        loss = dynamic_loss(error, 0.99, counts)
        loss.backward()
        assert float(loss.detach()) == 0


def student_loss(detector: MDSS, features: Features) -> float:
    return float(detector.student_loss(features)["student"])


@torch.no_grad()
def test_the_students_loss_is_written_out(fitted, features):
    c = fitted.config
    features = dict(features) | {"part": features["part"].clone()}
    features["part"][:, :, 36:] = False
    mean, std = fitted.teacher_mean.view(-1, 1, 1), fitted.teacher_std.view(-1, 1, 1)
    error = ((features["rgb.teacher"] - mean) / std - fitted.student(features["rgb.image"])).square()
    cells = mask_cells(grow(features["part"], 8))[:, None]
    assert cells.any()
    assert not cells.all()
    d = learning_factor(c, fitted.step)

    def above(e: Tensor) -> float:
        return float(e[e > torch.quantile(e.flatten(), d)].mean())

    own = [e[:, m] for e, m in zip(error, cells[:, 0])]
    expected = {
        (): above(error * cells),
        ("mask_train",): above(error),
        ("quantile_of",): above(torch.cat([e.flatten() for e in own])),
        ("quantile_over",): float(np.mean([above(e) for e in error * cells])),
        ("quantile_of", "quantile_over"): float(np.mean([above(e) for e in own])),
    }
    values = {"mask_train": False, "quantile_of": "part", "quantile_over": "image"}
    for names, value in expected.items():
        detector = switched(fitted, **{name: values[name] for name in names})
        assert student_loss(detector, features) == pytest.approx(value, rel=1e-4), names
    nothing = features | {"part": torch.zeros_like(features["part"])}
    assert student_loss(fitted, nothing) == 0


# -- masks, grids, crops -----------------------------------------------------------------------------------------------


def test_one_pixel_grows_to_a_square_of_eight():
    part = torch.zeros(1, 20, 24, dtype=torch.bool)
    part[0, 9, 12] = True
    rows, columns = grow(part, 8)[0].nonzero().T
    assert (rows.unique().tolist(), columns.unique().tolist()) == ([*range(5, 13)], [*range(8, 16)])
    assert len(rows) == 64
    part[0, 0, 0] = True  # at the border
    assert grow(part, 8)[0, :4, :4].all()
    assert grow(part, 8)[0, 4:6, :4].any() == False  # noqa: E712
    assert torch.equal(grow(part, 0), part)


def test_a_cell_counts_where_the_mask_touches_its_middle():
    """Feature (i, j) of the unpadded network is centred on pixel (4 i + 16, 4 j + 16)."""
    for y, x in ((16, 16), (19, 16), (20, 31), (44, 47)):
        mask = torch.zeros(1, 64, 64, dtype=torch.bool)
        mask[0, y, x] = True
        assert mask_cells(mask)[0].nonzero().tolist() == [[(y - 16) // 4, (x - 16) // 4]]
    rim = torch.ones(1, 64, 64, dtype=torch.bool)
    rim[:, 16:48, 16:48] = False
    assert not mask_cells(rim).any()


@torch.no_grad()
def test_a_crop_holds_just_the_pixels_of_its_cells():
    detector = build()
    images, target = tiny_batch([1, 2, 3], size=96).images["rgb"], None
    target = detector.teacher(images)  # B C 16 16
    cells = torch.zeros(3, 16, 16, dtype=torch.bool)
    cells[0, 15, 0] = cells[1, 7, 8] = True  # none on the third
    seen, wanted, own = crop_around(images, target, cells, 53, generator())
    assert (seen.shape, wanted.shape, own.shape) == ((3, 3, 53, 53), (3, 384, 6, 6), (3, 6, 6))
    assert_close(detector.teacher(seen), wanted, rtol=1e-4, atol=1e-5)
    assert own.flatten(1).sum(1).tolist() == [1, 1, 0]
    assert own[1, 3, 3]  # the drawn cell is in the middle
    assert torch.equal(crop_around(images, target, cells, 53, generator())[0], seen)
    whole, _, _ = crop_around(images, target, cells, 500, generator())
    assert_close(detector.teacher(whole), target, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("border", ["zero", "edge"])
def test_the_rgb_map_lies_where_its_cells_are(fitted, features, border):
    """A cell's value is found around its centre; padding keeps it there, stretching moves it out."""
    detector = switched(fitted, border=border, mask_score=False)
    apart = (detector._target(features) - detector.student(features["rgb.image"])).square().mean(1)  # B 8 8
    maps = detector.student_map(features)
    for i, j in ((0, 0), (3, 4), (7, 2)):  # between the four pixels in its middle lies the cell itself
        middle = maps[:, 4 * i + 17 : 4 * i + 19, 4 * j + 17 : 4 * j + 19].mean((1, 2))
        around = torch.nn.functional.pad(apart[:, None], (1,) * 4, mode="constant" if border == "zero" else "replicate")
        window = around[:, 0, i : i + 3, j : j + 3]  # bilinear weights at an eighth of a cell
        weight = torch.tensor([1 / 16, 7 / 8, 1 / 16])
        assert_close(middle, (window * weight[:, None] * weight).sum((1, 2)), rtol=1e-4, atol=1e-6)
    assert (maps[:, 0, 0] == (0 if border == "zero" else apart[:, 0, 0])).all()
    stretched = switched(fitted, map_resize="stretch", mask_score=False).student_map(features)
    assert_close(stretched[:, 0, 0], apart[:, 0, 0], rtol=1e-5, atol=0)
    masked = fitted.student_map(features)
    mask = grow(features["part"], 8)
    assert not masked[~mask].any()
    assert_close(masked[mask], switched(fitted, mask_score=False).student_map(features)[mask])


@torch.no_grad()
def test_the_teachers_statistics_are_those_of_the_part(fitted):
    teacher = torch.cat([fitted.extract(tiny_batch([seed]))["rgb.teacher"] for seed in range(5)]).double()
    cells = torch.cat([mask_cells(grow(b.valid & b.foreground, 8)) for b in map(tiny_batch, ([s] for s in range(5)))])
    own = teacher.movedim(1, -1)[cells]  # n C
    assert_close(fitted.teacher_mean, own.mean(0).float(), rtol=1e-4, atol=1e-6)
    assert_close(fitted.teacher_std, own.std(0, correction=0).float(), rtol=1e-4, atol=1e-6)
    everywhere = fit(build(teacher_statistics="all", branches="st", student_steps=1))
    assert_close(everywhere.teacher_mean, teacher.mean((0, 2, 3)).float(), rtol=1e-4, atol=1e-6)
    assert [stage.name for stage in build(teacher_statistics="none").stages()] == ["student", "distance", "alignment"]


# -- signed distances --------------------------------------------------------------------------------------------------


def test_centres_to_learn_from_are_farthest_points_of_the_part():
    batch = tiny_batch([1, 2])
    part = batch.valid & batch.foreground
    part[1, :, 32:] = False
    centres = patch_centres(batch.images["xyz"], part, 60, 2.0)
    assert centres.shape == (2, round(2 * 64 * 64 / 60))
    for xyz, own, found in zip(batch.images["xyz"], part, centres):
        pixels = own.flatten().nonzero()[:, 0]
        count = round(2 * len(pixels) / 60)
        rows = farthest_points(xyz.flatten(1).T[pixels][None], count)[0]
        assert found[:count].tolist() == pixels[rows].tolist()
        assert (found[count:] == -1).all()
    assert (patch_centres(batch.images["xyz"], torch.zeros_like(part), 60, 2.0) == -1).all()


def drawn(features: Features) -> Tensor:
    return draw_patches(features["xyz.points"], features["part"], features["xyz.centres"], 4, 60, generator())


def test_drawn_patches_are_the_nearest_points_of_their_centres(features):
    patches = drawn(features)
    assert patches.shape == (4, 60, 3)
    clouds = [xyz.flatten(1).T[part.flatten()] for xyz, part in zip(features["xyz.points"], features["part"])]
    found = []
    for index, patch in enumerate(patches):  # the parts in turn: 0, 0, 1, 2 of three
        own = 0 if index < 2 else index - 1
        centres = features["xyz.centres"][own]
        candidates = features["xyz.points"][own].flatten(1).T[centres[centres >= 0].long()]
        near = (candidates[:, None] - clouds[own]).square().sum(2).sort(1).values[:, :60]
        radius = (candidates[:, None] - patch).square().sum(2).sort(1).values
        found.append(bool((radius - near).abs().amax(1).min() < 1e-9))
    assert found == [True] * 4
    assert torch.equal(patches, drawn(features))
    small = dict(features) | {"part": features["part"].clone()}
    small["part"][0] = False  # a part without points is passed over
    assert drawn(small).shape == (4, 60, 3)
    small["part"][:] = False
    with pytest.raises(DataError, match="the 60 points of a patch, the largest has 0"):
        drawn(small)


@torch.no_grad()
def test_the_cloud_map_is_written_out(fitted, features):
    """Patch by patch and point by point, for every way to settle overlaps and both units."""
    features = {name: x[:1] for name, x in features.items()}
    for overlap in ("min", "mean", "max", "centre"):
        for metric in (False, True):
            detector = switched(fitted, overlap=overlap, metric=metric, score_density=3.0)
            got = detector.distance_map(features)[0]
            xyz, part = features["xyz.points"][0], features["part"][0]
            pixels = part.flatten().nonzero()[:, 0]
            points = xyz.flatten(1).T[pixels]
            values: dict[int, list[tuple[float, float]]] = {}
            for rows in cut_patches(points, 3.0, 60, cover=True):
                normal = normalise_patches(points[rows][None])
                f = detector.distance(normal.points)[0].abs() / (normal.scale[0] if metric else 1)
                for row, value in zip(rows.tolist(), f.tolist()):
                    values.setdefault(row, []).append((float((points[row] - points[rows[0]]).norm()), value))
            assert len(values) == len(points)
            rule = {
                "min": lambda v: min(x for _, x in v),
                "mean": lambda v: sum(x for _, x in v) / len(v),
                "max": lambda v: max(x for _, x in v),
                "centre": lambda v: min(v)[1],
            }[overlap]
            flat = torch.zeros(part.numel())
            flat[pixels] = torch.tensor([rule(values[row]) for row in range(len(points))])
            assert_close(got, gaussian_smooth(flat.view(part.shape), 4), rtol=1e-3, atol=1e-4 * float(flat.max()))


def test_the_nearest_centres_patch_decides():
    values, apart = torch.tensor([[0.3, 0.5], [0.1, 0.2]]), torch.tensor([[0.0, 1.0], [2.0, 3.0]])
    pixels = torch.tensor([[1, 5], [1, 2]])
    assert_close(of_nearest_centre(values, apart, pixels, (2, 3)), torch.tensor([[0.0, 0.3, 0.2], [0.0, 0.0, 0.5]]))


def test_scattered_values_and_their_blur():
    flat = torch.full((1, 400), 0.7)
    inside = torch.zeros(60, 60, dtype=torch.bool)
    inside[20:40, 20:40] = True
    pixels = inside.flatten().nonzero().T
    spread = to_pixels(flat, pixels, (60, 60))
    assert spread[~inside].any() == False  # noqa: E712
    blurred = gaussian_smooth(to_pixels(torch.full((1, 3600), 0.7), torch.arange(3600)[None], (60, 60)), 4.0)
    assert_close(blurred, torch.full((60, 60), 0.7))
    assert float(gaussian_smooth(spread, 1.0)[30, 30]) == pytest.approx(0.7, abs=1e-4)


def test_noise_is_as_wide_as_the_method_says():
    """On a patch of 500 points on a disc: sigma about 0.18, points moved to about 0.1 of the patch."""
    angle = 2 * math.pi * torch.rand(20, 500, generator=generator())
    radius = torch.rand(20, 500, generator=generator(1)).sqrt()
    disc = normalise_patches(torch.stack([radius * angle.cos(), radius * angle.sin(), 0 * radius], dim=2)).points
    sigma = torch.cdist(disc, disc).kthvalue(51, dim=2).values
    assert sigma.mean().item() == pytest.approx(0.18, abs=0.015)
    drawn = sample_queries(disc, generator(2))
    assert 0.08 < (drawn.points - drawn.targets).norm(dim=2).mean().item() < 0.12
    some = sample_queries(disc, generator(2), count=40)
    assert some.points.shape == some.targets.shape == (20, 40, 3)
    assert 0.08 < (some.points - some.targets).norm(dim=2).mean().item() < 0.13
    with pytest.raises(ConfigError, match=r"`count` must be in 1\.\.500"):
        sample_queries(disc, generator(), count=501)


def curved(count: int, seed: int, height: float = 0.0) -> tuple[Tensor, Tensor]:
    """Patches of 120 points on curved surfaces in any position, with a bump, and which points are on it."""
    g = generator(seed)
    radius = 0.28 * torch.rand(count, 120, generator=g).sqrt()
    angle = 2 * math.pi * torch.rand(count, 120, generator=g)
    u, v = radius * angle.cos(), radius * angle.sin()
    a, b, c = (0.4 * (2 * torch.rand(count, 3, 1, generator=g) - 1)).unbind(1)
    middle = 0.1 * (2 * torch.rand(count, 2, 1, generator=g) - 1)
    apart = ((u - middle[:, 0]).square() + (v - middle[:, 1]).square()).sqrt()
    wide = 0.09 * 0.56  # of the disc's diameter
    z = a * u * u + b * v * v + c * u * v + height * 0.56 * torch.exp(-0.5 * (apart / wide) ** 2)
    turned = torch.linalg.qr(torch.randn(count, 3, 3, generator=g)).Q
    return normalise_patches(torch.stack([u, v, z], dim=2) @ turned.mT).points, apart < wide


def test_a_field_trained_on_smooth_patches_is_off_on_bumps():
    """The method's hypothesis on held-out patches, with a small network and few steps."""
    patches, _ = curved(256, 1)
    torch.manual_seed(0)
    net = SignedDistance(64, 64, 2, 64)
    optimiser = torch.optim.Adam(net.parameters(), lr=5e-3)
    steps = 200
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    draw = generator(3)
    for _ in range(steps):
        some = patches[torch.randint(256, (16,), generator=draw)]
        optimiser.zero_grad()
        net.loss(sample_queries(some, draw, neighbour=12, count=48), some).backward()
        optimiser.step()
        schedule.step()
    net.eval()
    off = {}
    with torch.no_grad():
        for height in (0.0, 0.18, 0.36):
            some, on = curved(60, 60, height)
            off[height] = net(some).abs()[on]
    assert off[0.18].mean() > 1.1 * off[0.0].mean()
    assert off[0.36].mean() > 1.8 * off[0.0].mean()
    scores = torch.cat([off[0.0], off[0.36]]).double().numpy()
    assert auroc(scores, [0] * len(off[0.0]) + [1] * len(off[0.36])) > 0.7


# -- Eqs. 5 and 6 ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_maps_are_aligned_by_all_pixels_above_zero_of_validation_parts(fitted):
    held = fitted.extract(tiny_batch(range(50, 53)))
    rgb, cloud = fitted.student_map(held).double(), fitted.distance_map(held).double()
    (a, b), (c, d) = ((x[x > 0].mean(), x[x > 0].std(correction=0)) for x in (rgb, cloud))
    assert_close(fitted.line.double(), torch.stack([d / b, c - d / b * a]), rtol=1e-4, atol=1e-6)
    aligned = float(fitted.line[0]) * (a + 3 * b) + float(fitted.line[1])
    assert float(aligned) == pytest.approx(float(c + 3 * d), rel=1e-4)
    by_all = switched(fitted, align_over="all")
    by_all._set_line([(rgb, cloud)])
    (a, b), (c, d) = ((x.mean(), x.std(correction=0)) for x in (rgb, cloud))
    assert_close(by_all.line.double(), torch.stack([d / b, c - d / b * a]), rtol=1e-4, atol=1e-6)
    by_ends = switched(fitted, align="minmax")
    by_ends._set_line([(rgb, cloud)])
    assert_close(by_ends.line, ends(rgb, cloud, False).float())
    assert [stage.name for stage in build(align="none").stages()] == ["teacher", "student", "distance"]


def test_ends_meet_by_hand():
    rgb, cloud = torch.tensor([0.0, 2.0, 6.0]), torch.tensor([[0.03, 0.05], [0.01, 0.0]])
    assert_close(ends(rgb, cloud, False), torch.tensor([0.01, -0.01], dtype=torch.float64), rtol=1e-5, atol=1e-8)
    assert_close(ends(rgb, cloud, True), torch.tensor([0.05 / 6, 0.0], dtype=torch.float64), rtol=1e-5, atol=1e-8)
    with pytest.raises(CalibrationError, match="no two different values"):
        ends(torch.zeros(4), cloud, False)


class Given(MDSS):
    """MDSS whose branches see what the test says."""

    def student_map(self, features: Features) -> Tensor:
        return features["rgb.image"]

    def distance_map(self, features: Features) -> Tensor:
        return features["xyz.points"]


def given(**settings: Any) -> tuple[Any, Features]:
    detector = Given(MDSSConfig(**{**TINY, **settings}))
    detector.line.copy_(torch.tensor([0.02, -0.01]))
    rgb = torch.tensor([[[3.5, 0.5], [0.0, 4.0]], [[1.0, 1.0], [1.0, 1.0]]])
    cloud = torch.tensor([[[0.02, 0.01], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    return detector, {"rgb.image": rgb, "xyz.points": cloud}


def test_fusion_by_hand():
    detector, features = given()
    got = detector.score(features)
    assert_close(got.branch_maps["rgb"][0], torch.tensor([[0.06, 0.0], [0.0, 0.07]]))
    assert_close(got.map[0], torch.tensor([[0.06, 0.01], [0.0, 0.07]]))
    assert_close(got.score, torch.tensor([0.08, 1.0]))  # 4 x 0.02; without any point the RGB map's maximum
    expected = {
        ("fuse_map", "sum"): torch.tensor([[0.08, 0.01], [0.0, 0.07]]),
        ("fuse_map", "product"): torch.tensor([[0.0012, 0.0], [0.0, 0.0]]),
        ("lift_background", True): torch.tensor([[0.06, 0.01], [0.0, 0.07]]),
    }
    for (field, value), fused in expected.items():
        detector, features = given(**{field: value})
        assert_close(detector.score(features).map[0], fused)
        assert_close(detector.score(features).score[:1], torch.tensor([0.08]))
    for value, score in (("max", 0.07), ("sum", 0.09)):
        detector, features = given(fuse_score=value)
        assert_close(detector.score(features).score[0], torch.tensor(score))
    detector, features = given(lift_background=True)
    detector.line.copy_(torch.tensor([0.02, 0.01]))
    assert_close(detector.score(features).branch_maps["rgb"][0, 1, 0], torch.tensor(0.01))


# -- fitting -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained() -> MDSS:
    """Trained enough to see something."""
    settings = {
        "student_steps": 12,
        "student_batch": 2,
        "distance_steps": 160,
        "distance_batch": 8,
        "patch": 150,
        "queries": 40,
    }
    settings |= {"width": 32, "depth": 2, "pooled": 64, "code": 32, "distance_rate": 5e-3, "encoder_input": "patch"}
    return fit(MDSS(MDSSConfig(**{**TINY, **settings, "border": "edge"})), count=8)


def spotted(batch: Batch, seed: int, *, colour: bool) -> tuple[Batch, Tensor]:
    """The batch with a red spot or a bump of 12 mm, and the pixels of it."""
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    spots = []
    for index in range(len(batch)):
        cy, cx = (32 + 8 * (2 * torch.rand(2, generator=generator(seed + index)) - 1)).tolist()
        spots.append(((y - cy).square() + (x - cx).square()).sqrt())
    apart = torch.stack(spots)
    images = {name: image.clone() for name, image in batch.images.items()}
    if colour:
        red = torch.tensor([0.9, 0.1, 0.1])[:, None, None]
        images["rgb"] = torch.where((apart < 5)[:, None], red, images["rgb"])
    else:
        images["xyz"][:, 2] -= 0.012 * torch.exp(-0.5 * (apart / 3) ** 2) * batch.valid
    return dataclasses.replace(batch, images=images), apart < 5


@pytest.mark.parametrize("colour", [True, False])
def test_what_one_view_sees_shows_in_the_fused_map_and_score(trained, colour):
    good = tiny_batch(range(300, 312))
    bad, spot = spotted(tiny_batch(range(400, 412)), 7, colour=colour)
    before, after = trained(good), trained(bad)
    scores = torch.cat([before.score, after.score]).double().numpy()
    assert auroc(scores, [0] * 12 + [1] * 12) >= 0.9
    on_part = bad.valid & bad.foreground
    values = after.map[on_part].double().numpy()
    assert auroc(values, spot[on_part].int().numpy()) >= 0.9
    view, other = ("rgb", "xyz") if colour else ("xyz", "rgb")
    raised = {name: float(after.branch_maps[name][spot].mean() / before.branch_maps[name][spot].mean()) for name in
              (view, other)}  # fmt: skip
    assert raised[view] > 1.3 * raised[other], raised


def test_half_an_epoch_later_the_bits_are_the_same(tmp_path, monkeypatch):
    """Killed inside the student's and inside the field's training; d and draws go on where they were."""
    settings = {"student_steps": 3, "student_batch": 2, "crop": 45, "distance_steps": 3, "distance_parts": 2}
    whole = fit(build(**settings), count=4).state_dict()
    for stage in (0, 1):
        checkpoint = tmp_path / f"{stage}.safetensors"
        saves: list[int] = []
        save = Engine._save

        def stop(self, *args, stage_wanted=stage, seen=saves, original=save, **kwargs):
            original(self, *args, **kwargs)
            if kwargs["stage"] == 1 + stage_wanted and kwargs["epoch"] == 1:
                seen.append(1)
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Engine, "_save", stop)
            with pytest.raises(KeyboardInterrupt):
                fit(build(**settings), 4, checkpoint)
        assert saves
        resumed = fit(build(**settings), 4, checkpoint, resume=True).state_dict()
        assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []


def test_schedules_are_a_step_and_half_a_cosine():
    detector = build(student_steps=100, distance_steps=100, student_rate=1e-3, distance_rate=1e-4)
    stages = {stage.name: stage for stage in detector.stages()}
    for name, expected in (
        ("student", {0: 1e-3, 94: 1e-3, 95: 1e-4, 99: 1e-4}),
        ("distance", {0: 1e-4, 50: 5e-5, 100: 0.0}),
    ):
        stage = stages[name]
        assert isinstance(stage, Optimise)
        assert stage.schedule_every == "step"
        optimiser = stage.optimizer(list(stage.parameters()))
        schedule = stage.schedule(optimiser)
        rates = []
        for _ in range(101):
            assert detector.step == len(rates)
            rates.append(optimiser.param_groups[0]["lr"])
            optimiser.step()
            schedule.step()
        assert [rates[step] for step in expected] == pytest.approx([*expected.values()], abs=1e-12)
    assert isinstance(stages["teacher"], Observe)
    assert stages["alignment"].split == "validation"


# -- branches, settings, parts without points --------------------------------------------------------------------------


def test_branches_ask_for_what_they_look_at(fitted):
    def asked(**settings: Any) -> tuple[tuple[str, ...], tuple[str, ...], list[str]]:
        detector = build(**settings)
        return detector.modalities, detector.required, [stage.name for stage in detector.stages()]

    both, student, distance = ("rgb", "xyz"), ["teacher", "student"], ["distance"]
    assert asked() == (both, both, [*student, *distance, "alignment"])
    assert asked(branches="st") == (both, both, student)
    assert asked(branches="st", mask_score=False) == (both, ("rgb",), student)
    assert asked(branches="sdl") == (both, ("xyz",), distance)
    assert asked(modalities=["rgb"]) == (("rgb",), ("rgb",), student)
    assert asked(modalities=["xyz"]) == (("xyz",), ("xyz",), distance)


def test_a_branch_is_the_same_alone_and_in_company(fitted):
    batch = tiny_batch([7, 8])
    cloud, rgb = fit(build(modalities=["xyz"])), fit(build(branches="st"))
    together = fitted.extract(batch)
    assert torch.equal(cloud(batch).map, cloud.distance_map(cloud.extract(batch)))
    only_xyz = dataclasses.replace(batch, images={"xyz": batch.images["xyz"]})
    assert torch.equal(cloud(batch).map, cloud(only_xyz).map)
    assert torch.equal(rgb(batch).map, fitted.student_map(together))
    assert torch.equal(rgb(batch).score, rgb(batch).map.flatten(1).amax(1))
    assert set(rgb(batch).branch_maps) == {"rgb"}
    assert set(cloud(batch).branch_maps) == {"xyz"}


def test_rgb_alone_looks_at_no_cloud():
    detector = fit(build(modalities=["rgb"], student_steps=1))
    batch = tiny_batch([7])
    image = dataclasses.replace(batch, images={"rgb": batch.images["rgb"]})
    assert torch.equal(detector(image).map, detector(blinded(image)).map)
    assert (detector(image).map[:, 20:44, 20:44] > 0).all()


def test_without_a_view_the_other_branch_judges_alone(fitted):
    features = fitted.extract(tiny_batch([7, 8]))
    cloud = fitted.score({key: x for key, x in features.items() if not key.startswith("rgb")})
    assert set(cloud.branch_maps) == {"xyz"}
    assert torch.equal(cloud.map, fitted.distance_map(features))
    assert torch.equal(cloud.score, cloud.map.flatten(1).amax(1))
    rgb = fitted.score({key: x for key, x in features.items() if not key.startswith("xyz")})
    assert set(rgb.branch_maps) == {"rgb"}
    assert torch.equal(rgb.map, fitted.student_map(features))


def test_a_completed_model_judges_parts_with_one_view(fitted):
    completion = Completion(fitted, CompletionConfig(epochs=200, batch_size=4, patches=None))
    completion = Engine(EngineConfig(device="cpu")).fit(completion, {"train": TinyParts(range(12))})
    assert list(completion.networks) == ["rgb_to_part"]
    batch = tiny_batch([100, 101])
    assert torch.equal(completion(batch).map, fitted(batch).map)
    photo, scan = only(batch, ["rgb"]), only(batch, ["xyz"])
    assert torch.equal(completion(scan).map, fitted.distance_map(fitted.extract(batch)))
    place = completion.complete(completion.extract(photo))["part"]
    seen = batch.valid & batch.foreground
    assert float((place & seen).sum() / (place | seen).sum()) > 0.6
    features = fitted.extract(batch) | {"part": place}
    assert torch.equal(completion(photo).map, fitted.student_map(features))


def test_parts_with_few_points_or_none_are_scored(fitted):
    batch = tiny_batch([7, 8, 9])
    part = batch.foreground.clone()
    part[0] = False
    part[1].view(-1)[part[1].flatten().nonzero()[30:, 0]] = False  # fewer than a patch
    prediction = fitted(dataclasses.replace(batch, foreground=part))
    assert torch.isfinite(prediction.map).all()
    everywhere = fitted(dataclasses.replace(batch, foreground=torch.ones_like(part)))
    assert float(prediction.score[0]) == float(everywhere.score[0]) > 0  # all that was measured
    assert torch.equal(prediction.map[0], everywhere.map[0])
    with torch.no_grad():
        features = fitted.extract(blinded(take(batch, [0])))  # nothing measured: RGB alone, all of it
        unmasked = fitted.student_map(features | {"part": torch.ones_like(features["part"])})
        assert torch.equal(fitted.score(features).score, unmasked.amax((1, 2)))
    assert prediction.branch_maps["xyz"][1].any()
    alone = fitted(take(batch, [2]))
    assert_close(prediction.map[2], alone.map[0], rtol=1e-5, atol=1e-6 * float(alone.map.max()))


def test_settings_are_the_papers_and_the_cards():
    c = configure(MDSS, preset="paper")
    assert (c.student_batch, c.distance_batch, c.patch, c.dilation) == (4, 32, 500, 8)
    assert (c.student_rate, c.factor, c.factor_range) == (1e-3, "up", (0.99, 0.999))
    assert (c.student_steps, c.distance_steps, c.distance_rate) == (17_500, 60_000, 1e-4)
    assert (c.train_density, c.score_density, c.blur_sigma, c.overlap) == (5, 10, 4, "min")
    assert (c.fuse_map, c.fuse_score, c.align, c.mask_train, c.mask_score) == ("max", "product", "mean3std", True, True)
    prepared = PREPARATIONS[MDSS.PREPARATION["paper"]]
    assert (prepared.size, prepared.background, prepared.rgb_filter) == (256, "plane", "bicubic")
    assert "rgb" in prepared.remove_from
    with torch.device("meta"):
        assert sum(p.numel() for p in SignedDistance(c.code, c.width, c.depth, c.pooled).parameters()) == 3_170_433


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"modalities": ["rgb", "depth"]}, "modalities"),
        ({"modalities": []}, "modalities"),
        ({"modalities": ["rgb"], "branches": "sdl"}, "branches"),
        ({"modalities": ["xyz"], "branches": "st"}, "branches"),
        ({"factor": "sideways"}, "factor"),
        ({"quantile_of": "part", "mask_train": False}, "quantile_of"),
        ({"factor_range": [0.999, 0.99]}, "factor_range"),
        ({"fixed_factor": 1.0}, "fixed_factor"),
        ({"crop": 32}, "crop"),
        ({"patch": 50}, "patch"),
        ({"student_steps": 0}, "student_steps"),
        ({"queries": 0}, "queries"),
        ({"queries": 501}, "queries"),
        ({"distance_batch": 1}, "distance_batch"),
        ({"train_density": 0.0}, "train_density"),
        ({"student_rate_drop": 0.0}, "student_rate_drop"),
        ({"blur_sigma": -1.0}, "blur_sigma"),
        ({"align": "both"}, "align"),
    ],
)
def test_settings_out_of_range_are_named(settings, field):
    with pytest.raises(ConfigError, match=field):
        configure(MDSS, settings)


@pytest.mark.parametrize(("size", "message"), [(66, "multiples of 4"), (32, "at least 33")])
def test_sizes_that_do_not_fit_are_refused(size, message):
    with pytest.raises(ShapeError, match=message):
        build().extract(tiny_batch([1], size=size))
