"""Crossmodal Reverse Distillation: structure, gradients, scoring rules, fitting."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch.testing import assert_close

from polyspect.detectors.contract import Observe, Optimise, configure
from polyspect.detectors.crd import CRD, CRDConfig, Student
from polyspect.errors import ConfigError, DataError, NotFittedError, ShapeError
from polyspect.layers.blocks import plan_blocks
from polyspect.layers.maps import cosine_map
from polyspect.samples import Batch

WIDE, SMALL = (256, 512, 1024), (64, 128, 256)


def crd(**settings):
    return CRD(CRDConfig(**{"weights": "random", "epochs": 3, "batch_size": 4} | settings))


def parts(count, seed=0, size=64, defects=0, names=("rgb", "depth")):
    """Discs with a radial shade; the first `defects` ones have a bright spot in rgb and a pit in depth."""
    generator = torch.Generator().manual_seed(seed)
    row, column = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    images = {name: [] for name in names}
    foreground = torch.zeros(count, size, size, dtype=torch.bool)
    for index in range(count):
        centre = size / 2 + 2 * torch.randn(2, generator=generator)
        radius = torch.hypot(row - centre[0], column - centre[1]) / (0.35 * size)
        disc, shade = radius < 1, (1 - 0.4 * radius**2).clamp(min=0)
        spot = torch.zeros(size, size, dtype=torch.bool)
        if index < defects:
            spot[size // 2 : size // 2 + 10, size // 2 - 4 : size // 2 + 6] = True
        rgb = torch.stack([disc * shade * level for level in (0.8, 0.5, 0.3)])
        noise = 0.02 * torch.randn(4, size, size, generator=generator)
        views = {"depth": (disc * (0.1 + 0.8 * shade))[None], "rgb": rgb, "heat": rgb.flip(0)}
        for name in names:
            view = torch.where(spot, 0.1 if name == "depth" else 0.95, views[name])
            images[name].append((view + noise[: len(view)]).clamp(0, 1))
        foreground[index] = disc
    stacked = {name: torch.stack(rows) for name, rows in images.items()}
    return Batch([str(i) for i in range(count)], stacked, torch.ones_like(foreground), foreground)


def features_of(detector, count=3, seed=0, **kwargs):
    with torch.no_grad():
        return dict(detector.extract(parts(count, seed, names=detector.modalities, **kwargs)))


def fit(detector, train, validation, seed=0):
    """Run the stages as an engine does; returns the mean loss of each epoch."""
    losses = []
    for stage in detector.stages():
        batch = {"train": train, "validation": validation}[stage.split]
        with torch.no_grad():
            features = detector.eval().extract(batch)
        if isinstance(stage, Optimise):
            losses = optimise(detector, stage, features, seed)
        else:
            with torch.no_grad():
                for rows in torch.arange(len(batch)).split(3):
                    stage.update({name: x[rows] for name, x in features.items()})
                stage.finish()
    detector.eval().requires_grad_(False).fitted.fill_(True)
    return losses


def optimise(detector, stage, features, seed):
    optimizer = stage.optimizer(list(stage.parameters()))
    schedule, generator, losses = stage.schedule(optimizer), torch.Generator().manual_seed(seed), []
    detector.train()
    for _ in range(stage.epochs):
        total = 0.0
        batches = torch.randperm(len(features["valid"]), generator=generator).split(stage.batch_size)
        for rows in batches:
            loss = sum(stage.loss({name: x[rows] for name, x in features.items()}).values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += float(loss.detach()) / len(batches)
        schedule.step()
        losses.append(total)
    return losses


@pytest.fixture(scope="module")
def fitted():
    detector = crd()
    fit(detector, parts(9), parts(4, seed=1))
    return detector


# -- structure ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backbone", "channels", "settings", "count"),
    [
        ("wide_resnet50_2.tv_in1k", WIDE, {"crossmodal_filter": False, "crossmodal_amplifier": False}, 83_802_624),
        ("wide_resnet50_2.tv_in1k", WIDE, {"crossmodal_amplifier": False}, 175_451_136),
        ("wide_resnet50_2.tv_in1k", WIDE, {"crossmodal_filter": False}, 101_708_294),
        ("wide_resnet50_2.tv_in1k", WIDE, {}, 193_356_806),
        ("resnet18.tv_in1k", SMALL, {}, 22_238_470),
    ],
)
def test_students_have_the_published_number_of_parameters(backbone, channels, settings, count):
    with torch.device("meta"):
        student = Student(channels, ["depth"], CRDConfig(**settings), plan_blocks(backbone, channels))
        assert sum(p.numel() for p in student.parameters()) == count
        own = [torch.empty(1, c, 256 // s, 256 // s) for c, s in zip(channels, (4, 8, 16))]
        restored = student(own, {"depth": own})
    assert restored.embedding.shape == (1, 2 * channels[2], 8, 8)
    kinds = [restored.raw, restored.mixed, *restored.filtered.values(), *restored.amplified.values()]
    assert len(kinds) == 2 + settings.get("crossmodal_filter", True) + settings.get("crossmodal_amplifier", True)
    assert all([x.shape for x in maps] == [x.shape for x in own] for maps in kinds)


def test_defaults_and_presets_are_the_papers():
    paper = CRDConfig(**CRD.PRESETS["paper"])
    assert (paper.backbone, paper.epochs, paper.batch_size) == ("wide_resnet50_2.tv_in1k", 200, 16)
    assert (paper.learning_rate, paper.betas, paper.lr_decay, paper.seed) == (0.005, (0.5, 0.999), 0.95, 42)
    assert dataclasses.replace(paper, backbone="efficientnet_lite0") == CRDConfig()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("modalities", []),
        ("modalities", ["rgb", "rgb"]),
        ("modalities", ["rgb", "xyz"]),
        ("modalities", ["rgb", "a.b"]),
        ("modalities", ["rgb", "training"]),
        ("epochs", 0),
        ("batch_size", 0),
        ("learning_rate", 0.0),
        ("lr_decay", 1.5),
        ("betas", [0.5, 1.0]),
        ("filter_stride", 8),
        ("amplifier_expansion", 0),
        ("loss", "l2"),
        ("aggregation", "max"),
        ("report", "normals"),
        ("smoothing", -1.0),
    ],
)
def test_settings_out_of_range_are_named(field, value):
    direct = tuple(value) if isinstance(value, list) else value
    with pytest.raises(ConfigError, match=field):
        CRDConfig(**{field: direct})


def test_settings_from_plain_values_are_checked_too():
    assert configure(CRD, {"filter_stride": None, "amplifier_expansion": None}, "fast").filter_stride is None
    assert configure(CRD, {"modalities": ["rgb", "normals"]}).modalities == ("rgb", "normals")
    for field, value in (("epochs", 0), ("filter_stride", 8), ("betas", [0.5, 1.0])):
        with pytest.raises(ConfigError, match=field):
            configure(CRD, {field: value})


def test_two_teachers_of_one_pass_see_what_each_alone_would():
    detector, batch = crd(), parts(2)
    features = detector.extract(batch)
    assert set(features) == {"valid", "foreground"} | {f"{name}.{i}" for name in ("rgb", "depth") for i in (1, 2, 3)}
    alone = detector.teacher(batch.images["depth"].expand(-1, 3, -1, -1))
    for scale, x in enumerate(alone, start=1):
        assert_close(features[f"depth.{scale}"], x)
    assert not any(x.requires_grad for x in features.values())


@pytest.mark.parametrize("size", [48, 32, 80])
def test_sizes_that_do_not_divide_are_refused(size):
    with pytest.raises(ShapeError, match=f"{size}x{size}"):
        crd().extract(parts(1, size=size))


def test_unfitted_and_incomplete_parts_are_refused(fitted):
    with pytest.raises(NotFittedError):
        crd()(parts(1))
    with pytest.raises(DataError, match="depth"):
        fitted(parts(1, names=("rgb",)))


def test_building_leaves_the_global_generator_alone_and_repeats_itself():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, second = crd(), crd()
    assert torch.equal(torch.rand(3), expected)
    for key, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[key])
    other = crd(seed=1).students.state_dict()
    assert not all(torch.equal(x, other[key]) for key, x in first.students.state_dict().items())


# -- gradients ---------------------------------------------------------------------------------------------------------


def numbers(terms):
    assert all(value.shape == () for value in terms.values())
    return {name: float(value.detach()) for name, value in terms.items()}


def with_gradient(module):
    return {name for name, p in module.named_parameters() if p.grad is not None and bool(p.grad.abs().sum() > 0)}


def test_gradients_of_one_branch_stay_in_its_student():
    detector = crd().train()
    terms = detector.loss(features_of(detector))
    sum(value for name, value in terms.items() if name.startswith("rgb.")).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in detector.students["rgb"].parameters())
    assert with_gradient(detector.students["rgb"]) == {name for name, _ in detector.students["rgb"].named_parameters()}
    assert all(p.grad is None for p in detector.students["depth"].parameters())
    assert all(p.grad is None for p in detector.teacher.parameters())


@pytest.mark.parametrize("detach", [False, True])
def test_the_restored_loss_reaches_the_assistants_unless_they_are_detached(detach):
    detector = crd(detach_assistants=detach).train()
    detector.loss(features_of(detector))["rgb.restored"].backward()
    student = detector.students["rgb"]
    filters, amplifiers = student.filters["depth"].scales, student.amplifiers["depth"].scales
    assert [bool(with_gradient(scale)) for scale in filters] == [not detach] * 3
    # D_2 and D_1 see what was mixed at scales 3 and 2; the mix at scale 1 is only compared
    assert [bool(with_gradient(scale)) for scale in amplifiers] == [False, not detach, not detach]
    assert [theta.grad is not None for theta in student.decoder.theta] == [True, True, False]  # theta_3, _2, _1


def test_detached_assistants_still_learn_from_their_own_losses():
    detector = crd(detach_assistants=True).train()
    sum(detector.loss(features_of(detector)).values()).backward()
    assert with_gradient(detector) == {name for name, _ in detector.named_parameters() if name.startswith("students.")}


def test_one_backward_over_both_branches_equals_one_each():
    detector = crd().double().train()
    features = {name: x.double() if x.is_floating_point() else x for name, x in features_of(crd()).items()}
    # batch-norm in train mode does not depend on its running statistics, so a second forward sees the same network
    sum(detector.loss(features).values()).backward()
    together = [p.grad.clone() for p in detector.students.parameters()]
    detector.zero_grad()
    for name in detector.modalities:
        terms = detector.loss(features)
        sum(value for term, value in terms.items() if term.startswith(f"{name}.")).backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(together, detector.students.parameters()))


# -- losses and scores -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "kinds"),
    [
        ({}, {"restored", "filter_depth", "amplifier_depth", "mixed"}),
        ({"crossmodal_filter": False}, {"restored", "amplifier_depth", "mixed"}),
        ({"crossmodal_amplifier": False}, {"restored", "filter_depth"}),
        ({"crossmodal_filter": False, "crossmodal_amplifier": False}, {"restored"}),
        ({"modalities": ("rgb",)}, {"restored"}),
        (
            {"modalities": ("rgb", "depth", "heat")},
            {"restored", "filter_depth", "amplifier_depth", "filter_heat", "amplifier_heat", "mixed"},
        ),
    ],
    ids=["full", "amplifier", "filter", "none", "one modality", "three modalities"],
)
def test_every_build_trains_on_its_own_terms_and_scores(settings, kinds):
    detector = crd(**settings)
    features = features_of(detector)
    terms = numbers(detector.train().loss(features))
    assert {name.removeprefix("rgb.") for name in terms if name.startswith("rgb.")} == kinds
    assert len(terms) == len(kinds) * len(detector.modalities)
    assert all(0 < value < 6 for value in terms.values())
    with torch.no_grad():
        prediction = detector.eval().score(features)
    assert prediction.map.shape == (3, 64, 64)
    assert tuple(prediction.branch_maps) == detector.modalities
    assert_close(prediction.map, sum(prediction.branch_maps.values()))
    assert torch.equal(prediction.score, prediction.map.flatten(1).amax(1))


def test_single_modality_is_reverse_distillation_without_assistants():
    alone = crd(modalities=("rgb",))
    bare = crd(crossmodal_filter=False, crossmodal_amplifier=False)
    assert set(alone.students["rgb"].state_dict()) == set(bare.students["rgb"].state_dict())
    assert not any("theta" in key or "filters" in key for key in alone.students.state_dict())


def raw_maps(detector, features):
    with torch.no_grad():
        return {name: cosine_map(r.mixed, t, (64, 64)) for name, (t, r) in detector.restore(features).items()}


def test_score_equals_equations_10_and_11_with_scipys_filter(fitted):
    features = features_of(fitted, seed=3, defects=1)
    prediction = fitted.score(features)
    total = 0
    for index, (name, raw) in enumerate(raw_maps(fitted, features).items()):
        standard = (raw - fitted.map_mean[index]) / fitted.map_std[index]
        smooth = torch.stack([torch.from_numpy(gaussian_filter(m.numpy(), 4)) for m in standard])
        assert_close(prediction.branch_maps[name].double(), smooth, atol=1e-5, rtol=1e-5)
        total = total + smooth
    assert_close(prediction.map.double(), total, atol=1e-5, rtol=1e-5)
    assert_close(prediction.score.double(), total.flatten(1).amax(1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rule", ["sum", "product"])
def test_raw_maps_can_be_summed_or_multiplied(fitted, rule):
    other = crd(aggregation=rule).eval()
    other.load_tensors(fitted.state_dict())
    features = features_of(fitted, seed=3)
    rgb, depth = raw_maps(fitted, features).values()
    combined = rgb + depth if rule == "sum" else rgb * depth
    expected = torch.stack([torch.from_numpy(gaussian_filter(m.numpy(), 4)) for m in combined])
    prediction = other.score(features)
    assert_close(prediction.map.double(), expected, atol=1e-5, rtol=1e-5)
    for name, branch in fitted.score(features).branch_maps.items():
        assert torch.equal(prediction.branch_maps[name], branch)


@pytest.mark.parametrize("branch", ["rgb", "depth"])
def test_one_branch_can_be_the_answer(fitted, branch):
    other = crd(report=branch).eval()
    other.load_tensors(fitted.state_dict())
    features = features_of(fitted, seed=3)
    prediction = other.score(features)
    assert torch.equal(prediction.map, fitted.score(features).branch_maps[branch])
    assert torch.equal(prediction.score, prediction.map.flatten(1).amax(1))


def test_constant_maps_standardise_to_the_papers_numbers(monkeypatch):
    detector, values = crd().eval(), iter([1.0, 3.0, 4.0])

    def constant(_features):
        return torch.full((1, 2, 64, 64), next(values), dtype=torch.float64)

    monkeypatch.setattr(detector, "_raw_maps", constant)
    features = {"valid": torch.ones(1, 64, 64, dtype=torch.bool)}
    observe = detector.stages()[1]
    assert isinstance(observe, Observe)
    assert observe.split == "validation"
    observe.update(features)
    observe.update(features)
    observe.finish()
    assert detector.map_mean.tolist() == [2, 2]
    assert detector.map_std.tolist() == [1, 1]
    prediction = detector.score(features)
    assert_close(prediction.score, torch.tensor([4.0]))
    assert_close(prediction.branch_maps["depth"], torch.full((1, 64, 64), 2.0))


def test_branches_without_spread_are_refused(monkeypatch):
    detector = crd().eval()
    monkeypatch.setattr(detector, "_raw_maps", lambda _features: torch.ones(1, 2, 64, 64, dtype=torch.float64))
    observe = detector.stages()[1]
    observe.update({"valid": torch.ones(1, 64, 64, dtype=torch.bool)})
    with pytest.raises(DataError, match="branch 'rgb'"):
        observe.finish()


def test_swapping_modalities_and_their_students_changes_nothing(fitted):
    features = features_of(fitted, seed=3)
    swapped = crd(modalities=("depth", "rgb")).eval()
    tensors = dict(fitted.state_dict())
    for name in ("map_mean", "map_std"):
        tensors[name] = tensors[name].flip(0)
    swapped.load_tensors(tensors)
    assert_close(swapped.score(features).map, fitted.score(features).map, atol=1e-5, rtol=1e-5)


def test_a_part_does_not_see_its_batch_mates(fitted):
    batch = parts(4, seed=3, defects=1)
    together = fitted(batch)
    order = [2, 0, 3, 1]
    images = {name: x[order] for name, x in batch.images.items()}
    shuffled = fitted(Batch(order, images, batch.valid[order], batch.foreground[order]))
    assert_close(shuffled.map, together.map[order], atol=1e-4, rtol=1e-4)
    one = fitted(Batch(["1"], {k: x[1:2] for k, x in batch.images.items()}, batch.valid[1:2], batch.foreground[1:2]))
    assert_close(one.map, together.map[1:2], atol=1e-4, rtol=1e-4)


def test_scoring_in_training_mode_gives_the_same_and_changes_nothing(fitted):
    features = features_of(fitted, seed=3)
    expected, before = fitted.score(features), {k: x.clone() for k, x in fitted.state_dict().items()}
    fitted.train()
    again = fitted.score(features)
    assert fitted.students.training
    assert not fitted.teacher.training
    fitted.eval()
    assert torch.equal(again.map, expected.map)
    assert all(torch.equal(x, before[key]) for key, x in fitted.state_dict().items())


# -- parts without 3D data ---------------------------------------------------------------------------------------------


def test_masked_positions_count_in_rgb_only():
    detector = crd(mask_invalid=True).eval()
    plain = crd().eval()
    features = features_of(detector)
    assert numbers(detector.loss(features)) == pytest.approx(numbers(plain.loss(features)), rel=1e-5)
    features["valid"] = features["valid"].clone()
    features["valid"][:, 16:48, 32:] = False
    masked, whole = numbers(detector.loss(features)), numbers(plain.loss(features))
    for name in whole:
        assert (abs(masked[name] - whole[name]) > 1e-5) == name.startswith("depth.")
    detector.map_mean.fill_(0.5)
    detector.config = dataclasses.replace(detector.config, smoothing=0.0)
    maps = detector.score(features).branch_maps
    assert torch.equal(maps["depth"] == 0, ~features["valid"])
    assert not bool((maps["rgb"] == 0).any())


def test_map_levels_leave_masked_pixels_out():
    detector = crd(mask_invalid=True).eval()
    features = features_of(detector)
    features["valid"] = features["valid"].clone()
    features["valid"][:, :, 32:] = False
    observe = detector.stages()[1]
    with torch.no_grad():
        observe.update(features)
        observe.finish()
        raw = {
            n: cosine_map(r.mixed, t, (64, 64), detector._kept(features, n))
            for n, (t, r) in detector.restore(features).items()
        }
    assert_close(detector.map_mean[0], raw["rgb"].mean().float())
    assert_close(detector.map_mean[1], raw["depth"][features["valid"]].mean().float())
    assert_close(detector.map_std[1], raw["depth"][features["valid"]].std(correction=0).float())
    features["valid"][:] = False
    observe.update(features)
    with pytest.raises(DataError, match="branch 'depth'"):
        observe.finish()


# -- fitting -----------------------------------------------------------------------------------------------------------


def test_learning_rate_decays_by_epoch():
    stage = crd(epochs=200).stages()[0]
    assert isinstance(stage, Optimise)
    assert (stage.epochs, stage.schedule_every, stage.split) == (200, "epoch", "train")
    optimizer = stage.optimizer([torch.nn.Parameter(torch.zeros(1))])
    schedule, rates = stage.schedule(optimizer), []
    for _ in range(200):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[0] == 0.005
    assert rates[100] == pytest.approx(2.960e-5, rel=1e-3)
    assert rates[199] == pytest.approx(1.845e-7, rel=1e-3)


def test_two_fits_with_one_seed_have_the_same_bits(fitted):
    again = crd()
    fit(again, parts(9), parts(4, seed=1))
    for key, tensor in fitted.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[key]), key


def test_loss_falls_and_a_planted_defect_stands_out():
    detector = crd(epochs=12, lr_decay=0.8)
    losses = fit(detector, parts(12), parts(6, seed=1))
    assert losses[-1] < 0.5 * losses[0]
    prediction = detector(parts(8, seed=2, defects=4))
    assert float(prediction.score[:4].min()) > float(prediction.score[4:].max())
    for part in prediction.map[:4]:  # the peak lies on the defect: rows 32-41, columns 28-37
        row, column = divmod(int(part.argmax()), 64)
        assert 26 <= row <= 47
        assert 22 <= column <= 43


@pytest.mark.slow
def test_a_resnet_teacher_is_learnt_as_quickly_as_the_card_says():
    """Plain RD on four random images: loss about 1.7 at first, below 0.65 after 10 steps, below 0.45 after 40."""
    detector = crd(backbone="resnet18", modalities=("rgb",), epochs=41, batch_size=4, lr_decay=1.0)
    noise = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    everywhere = torch.ones(4, 64, 64, dtype=torch.bool)
    with torch.no_grad():
        features = detector.extract(Batch(list("abcd"), {"rgb": noise}, everywhere, everywhere))
    stage = detector.stages()[0]
    assert isinstance(stage, Optimise)
    losses = optimise(detector, stage, features, seed=0)
    assert 1.2 < losses[0] < 2.2
    assert losses[10] < 0.65
    assert losses[40] < 0.45
