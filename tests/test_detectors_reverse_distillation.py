"""Reverse and forward distillation of one modality: sizes, switches, gradients, learning."""

from __future__ import annotations

import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch.testing import assert_close

from polyspect.detectors.contract import configure
from polyspect.detectors.forward_distillation import ForwardDistillation, ForwardDistillationConfig
from polyspect.detectors.reverse_distillation import ReverseDistillation, ReverseDistillationConfig
from polyspect.errors import ConfigError, ShapeError
from polyspect.fitting.engine import Engine, EngineConfig
from polyspect.layers.maps import cosine_map
from tiny import TinyParts, blinded, tiny_batch

SHORT = {"weights": "random", "epochs": 2, "batch_size": 4}


def reverse(**settings):
    return ReverseDistillation(ReverseDistillationConfig(**SHORT | settings))


def forward(**settings):
    return ForwardDistillation(ForwardDistillationConfig(**SHORT | settings))


def features_of(detector, seeds=(1, 2, 3)):
    with torch.no_grad():
        return dict(detector.extract(tiny_batch(seeds)))


def fit(detector, count=8):
    splits = {"train": TinyParts(range(count)), "validation": TinyParts(range(50, 54))}
    return Engine(EngineConfig(device="cpu", block=4)).fit(detector, splits)


@pytest.mark.parametrize(
    ("backbone", "count"), [("resnet18", 15_383_168), ("resnet34", 22_171_264), ("resnet10t", 15_383_168)]
)
def test_students_have_the_published_number_of_parameters(backbone, count):
    student = reverse(backbone=backbone).student
    assert sum(p.numel() for p in student.parameters()) == count


@pytest.mark.parametrize("backbone", ["regnety_002", "mobilenetv3_large_100", "convnext_atto", "hrnet_w18_small"])
@pytest.mark.parametrize("make", [reverse, forward])
def test_any_backbone_with_three_stages_serves(make, backbone):
    detector = make(backbone=backbone)
    features = features_of(detector)
    assert sum(float(term.detach()) for term in detector.loss(features).values()) > 0
    detector.eval().fitted.fill_(True)
    with torch.no_grad():
        assert bool(detector(tiny_batch([1])).map.isfinite().all())


@pytest.mark.parametrize("make", [reverse, forward])
def test_one_modality_only(make):
    with pytest.raises(ConfigError, match="modalities"):
        make(modalities=("rgb", "depth"))
    with pytest.raises(ShapeError, match="80x80"):
        make().extract(tiny_batch([1], size=80))


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (ReverseDistillation, "loss", "l2"),
        (ReverseDistillation, "map_mode", "max"),
        (ReverseDistillation, "image_score", "mean"),
        (ReverseDistillation, "lr_decay", 0.0),
        (ForwardDistillation, "optimizer", "rmsprop"),
        (ForwardDistillation, "momentum", 1.0),
        (ForwardDistillation, "loss", "l2"),
        (ForwardDistillation, "batch_size", 0),
    ],
)
def test_settings_out_of_range_are_named(kind, field, value):
    with pytest.raises(ConfigError, match=field):
        configure(kind, {field: value})


def test_presets_are_the_three_published_recipes_and_stfpm():
    paper, mmrd, crd = (configure(ReverseDistillation, preset=name) for name in ("paper", "mmrd", "crd"))
    assert (paper.learning_rate, paper.epochs, paper.lr_decay) == (0.005, 200, 1.0)
    assert (mmrd.learning_rate, mmrd.epochs, mmrd.lr_decay) == (0.001, 400, 1.0)
    assert (crd.learning_rate, crd.epochs, crd.lr_decay) == (0.005, 200, 0.95)
    stfpm = configure(ForwardDistillation, preset="stfpm")
    assert (stfpm.optimizer, stfpm.learning_rate, stfpm.batch_size, stfpm.epochs) == ("sgd", 0.4, 32, 100)
    optimizer = ForwardDistillation(stfpm, pretrained=False).stages()[0].optimizer([torch.nn.Parameter(torch.ones(1))])
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.defaults["momentum"] == 0.9
    assert optimizer.defaults["weight_decay"] == 1e-4


@pytest.mark.parametrize("make", [reverse, forward])
def test_gradients_reach_every_part_of_the_student_and_nothing_else(make):
    detector = make().train()
    buffers = {key: tensor.clone() for key, tensor in detector.teacher.state_dict().items()}
    sum(detector.loss(features_of(detector)).values()).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in detector.student.parameters())
    assert all(p.grad is None for p in detector.teacher.parameters())
    assert all(torch.equal(tensor, buffers[key]) for key, tensor in detector.teacher.state_dict().items())


def test_a_student_that_is_the_teacher_gives_a_zero_map_in_eval_mode_only():
    detector = forward(backbone="resnet18")
    detector.student.load_state_dict(detector.teacher.network.state_dict())
    features = features_of(detector)
    assert float(sum(detector.train().loss(features).values()).detach()) > 1e-3
    detector.student.load_state_dict(detector.teacher.network.state_dict())
    with torch.no_grad():
        assert float(detector.eval().score(features).map.abs().max()) < 1e-5


@pytest.mark.parametrize("mode", ["add", "multiply"])
@pytest.mark.parametrize("rule", ["max", "sum"])
def test_reverse_score_equals_equation_3_with_scipys_filter(mode, rule):
    detector = reverse(map_mode=mode, image_score=rule).eval()
    features = features_of(detector)
    with torch.no_grad():
        teacher = [features[f"rgb.{scale}"] for scale in (1, 2, 3)]
        scales = [cosine_map([s], [t], (64, 64)) for s, t in zip(detector.student(teacher), teacher)]
        prediction = detector.score(features)
    raw = sum(scales) if mode == "add" else scales[0] * scales[1] * scales[2]
    expected = torch.stack([torch.from_numpy(gaussian_filter(m.numpy(), 4)) for m in raw]).float()
    assert_close(prediction.map, expected, rtol=1e-4, atol=1e-5)
    flat = expected.flatten(1)
    assert_close(prediction.score, flat.amax(1) if rule == "max" else flat.sum(1), rtol=1e-4, atol=1e-4)
    assert torch.equal(prediction.branch_maps["rgb"], prediction.map)


def test_squared_loss_and_multiplied_map_are_squared_distances_of_unit_vectors():
    detector = forward(loss="squared", map_mode="multiply", smoothing=0.0)
    features = features_of(detector)
    with torch.no_grad():
        student, teacher = detector._answers(features)
        unit = torch.nn.functional.normalize
        squares = [(unit(s, dim=1) - unit(t, dim=1)).square().sum(1) for s, t in zip(student, teacher)]
        loss = sum(detector.loss(features).values())
    assert_close(loss, sum(square.mean() for square in squares), rtol=1e-4, atol=1e-5)
    detector.eval()
    with torch.no_grad():
        student, teacher = detector._answers(features)
        product = torch.ones(3, 64, 64)
        for s, t in zip(student, teacher):
            square = (unit(s, dim=1) - unit(t, dim=1)).square().sum(1, keepdim=True)
            product *= torch.nn.functional.interpolate(square, size=(64, 64), mode="bilinear", align_corners=True)[:, 0]
        assert_close(detector.score(features).map, product, rtol=1e-3, atol=1e-4)


def test_parts_of_the_embedding_can_be_left_out():
    sizes = {}
    for fuse in (True, False):
        for compress in (True, False):
            detector = reverse(fuse_scales=fuse, compress=compress, backbone="resnet18")
            features = features_of(detector)
            teacher = [features[f"rgb.{scale}"] for scale in (1, 2, 3)]
            assert detector.student.embedding(teacher).shape == (3, 512, 2, 2)
            sizes[fuse, compress] = sum(p.numel() for p in detector.student.embedding.parameters())
            if not fuse:  # the shallow features do not matter then
                other = [torch.zeros_like(teacher[0]), torch.zeros_like(teacher[1]), teacher[2]]
                with torch.no_grad():
                    embedding = detector.student.eval().embedding
                    assert torch.equal(embedding(teacher), embedding(other))
    assert sizes[False, False] == 256 * 512
    assert sizes[True, False] == 3 * 256 * 512 + 64 * 128 * 9 + 2 * 128 * 256 * 9 + 2 * (128 + 256 + 256)


@pytest.mark.parametrize("make", [reverse, forward])
def test_unmeasured_cells_change_neither_loss_nor_the_map_elsewhere(make):
    detector = fit(make(modalities=("depth",), mask_invalid=True), count=4)
    batch = tiny_batch([7, 8])
    batch.valid[:, :, :32] = False
    features = dict(detector.extract(batch))
    clean, loss = detector.score(features), sum(detector.loss(features).values())
    spoilt = dict(features)
    for scale, stride in ((1, 4), (2, 8), (3, 16)):
        x = features[f"depth.{scale}"].clone()
        x[..., : 32 // stride] += 0 if make is reverse else 50.0
        spoilt[f"depth.{scale}"] = x
    assert_close(sum(detector.loss(spoilt).values()), loss)
    assert_close(detector.score(spoilt).map, clean.map)
    blind = detector(blinded(batch))
    assert torch.equal(blind.map, torch.zeros_like(blind.map))


@pytest.mark.slow
@pytest.mark.parametrize(("make", "early"), [(reverse, 0.65), (forward, 1.0)])
def test_a_resnet_teacher_is_learnt(make, early):
    """Four random images: the loss falls below 0.45 within 40 steps; RD's, measured elsewhere, below 0.65 within 10."""
    detector = make(backbone="resnet18", learning_rate=0.005, batch_size=4).train()
    batch = tiny_batch(range(4))
    batch.images["rgb"].copy_(torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        features = dict(detector.extract(batch))
    stage = detector.stages()[0]
    optimizer, losses = stage.optimizer(list(stage.parameters())), []
    for _ in range(41):
        loss = sum(stage.loss(features).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[10] < early
    assert losses[40] < 0.45
