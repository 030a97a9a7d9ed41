"""CRD and plain RD against stored outputs of the official code, with weights that both sides make from a formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from golden import Golden, filled, noise
from polyspect.backbones.modalities import name_stages
from polyspect.detectors.crd import CRD, CRDConfig
from polyspect.detectors.reverse_distillation import ReverseDistillation, ReverseDistillationConfig
from polyspect.layers.maps import MapMoments, cosine_map
from polyspect.weights import official
from published import RESNET18, RESNET50, WIDE_RESNET50, crd_shapes, filled_state, rd4ad_shapes

OTHER = {"rgb": "depth", "depth": "rgb"}

# golden archive -> the network whose published checkpoint it was made with
CRD_NETWORKS = {"resnet50": RESNET50, "wide_resnet50_2": WIDE_RESNET50}
RD_NETWORKS = {"resnet18": RESNET18, "wide_resnet50_2": WIDE_RESNET50}


def fill_teacher(teacher, root):
    """Fill a timm ResNet, which keeps torchvision's names, wherever the backbone holds it."""
    inner = next(key for key in teacher.state_dict() if key.endswith("layer1.0.conv1.weight"))
    start = inner.removesuffix("layer1.0.conv1.weight")
    for key, tensor in teacher.state_dict().items():
        if key.startswith(start):
            tensor.copy_(filled(root + key.removeprefix(start), *tensor.shape))


def load_imported(detector, tensors, part):
    """Load converted tensors; together they are all of the detector under `part`, and nothing else."""
    assert set(tensors) == {name for name in detector.state_dict() if name.startswith(part)}
    detector.load_state_dict(tensors, strict=False)


class Stored(Golden):
    """An archive at the tolerances of the distillation networks."""

    def check(self, name, got):
        super().check(name, got, 1e-4, relative=1e-4)

    def check_number(self, name, got):
        np.testing.assert_allclose(got.detach().double().numpy(), self.stored[name], rtol=5e-5, err_msg=name)

    def image(self, name):
        return noise(name, *self.stored[f"input__{name}__shape"])


def check_student(golden, detector, features, name):
    """P, Q, E, R, G and the four losses of one branch."""
    (target, restored), other = detector.restore(features)[name], OTHER[name]
    for index, scale in enumerate((1, 2, 3)):
        golden.check(f"{name}_T_{scale}", target[index])
        golden.check(f"{name}_P_{scale}", restored.filtered[other][index])
        golden.check(f"{name}_Q_{scale}", restored.amplified[other][index])
        golden.check(f"{name}_R_{scale}", restored.raw[index])
        golden.check(f"{name}_G_{scale}", restored.mixed[index])
    golden.check(f"{name}_embedding", restored.embedding)
    terms = detector.loss(features)
    parts = {"R": "restored", "P": f"filter_{other}", "Q": f"amplifier_{other}", "G": "mixed"}
    for letter, part in parts.items():
        golden.check_number(f"{name}_loss_{letter}", terms[f"{name}.{part}"])
    golden.check_number(f"{name}_loss", sum(terms[f"{name}.{part}"] for part in parts.values()))


def check_maps(golden, detector, features, prefix, size):
    """Raw, branch and fused maps, image scores and validation statistics at one map size."""
    B = len(features["valid"])
    features = features | {"valid": torch.ones(B, size, size, dtype=torch.bool)}
    mean_rgb, std_rgb, mean_depth, std_depth = golden.stored["params"]
    detector.map_mean.copy_(torch.tensor([mean_rgb, mean_depth]))
    detector.map_std.copy_(torch.tensor([std_rgb, std_depth]))
    prediction = detector.score(features)
    golden.check(f"{prefix}_fused", prediction.map)
    golden.check_number(f"{prefix}_image_score", prediction.score)
    raw = []
    for name, (target, restored) in detector.restore(features).items():
        golden.check(f"{prefix}_{name}", prediction.branch_maps[name])
        raw.append(cosine_map(restored.mixed, target, (size, size)))
        golden.check(f"{prefix}_{name}_raw", raw[-1])
    moments = MapMoments()
    for part in torch.stack(raw, dim=1).split(1):  # the official validation step sees one part at a time
        moments.add(part, torch.ones_like(part, dtype=torch.bool))
    _, mean, std = moments.take()
    golden.check_number(f"{prefix}_valid_stats", torch.stack([mean, std], dim=1).flatten())


@pytest.mark.slow
@pytest.mark.parametrize("backbone", CRD_NETWORKS)
def test_crd_equals_the_official_code(backbone):
    golden = Stored(f"crd_{backbone}.npz")
    detector = CRD(CRDConfig(backbone=backbone, weights="random"), pretrained=False).eval()
    with torch.no_grad():
        fill_teacher(detector.teacher, "teacher.encoder.")
        shapes = crd_shapes(CRD_NETWORKS[backbone])
        file = {f"student_{name}": filled_state(shapes, f"student_{name}.") for name in OTHER}
        load_imported(detector, official.crd(file).tensors, "students.")
        features = {}
        for name in OTHER:
            image = golden.image(name)
            assert_close(image.flatten()[:8], torch.from_numpy(golden.stored[f"check__{name}_first8"]))
            maps = detector.teacher.features(image)
            features |= name_stages({name: maps})
            features["valid"] = torch.ones(len(image), *image.shape[-2:], dtype=torch.bool)
        for name in OTHER:
            check_student(golden, detector, features, name)
        check_maps(golden, detector, features, "map", 64)
        check_maps(golden, detector, features, "map256", 256)


@pytest.mark.parametrize("backbone", ["resnet18", pytest.param("wide_resnet50_2", marks=pytest.mark.slow)])
def test_reverse_distillation_equals_the_official_code(backbone):
    golden = Stored(f"rd4ad_{backbone}.npz")
    config = ReverseDistillationConfig(backbone=backbone, weights="random")
    detector = ReverseDistillation(config, pretrained=False).eval()
    with torch.no_grad():
        fill_teacher(detector.teacher, "encoder.")
        parts = rd4ad_shapes(RD_NETWORKS[backbone])
        file = {part: filled_state(shapes, f"{part}.") for part, shapes in parts.items()}
        load_imported(detector, official.rd4ad(file).tensors, "student.")
        image = golden.image("rgb")
        target = detector.teacher.features(image)
        features = name_stages({"rgb": target}) | {"valid": torch.ones(len(image), *image.shape[-2:], dtype=torch.bool)}
        golden.check("embedding", detector.student.embedding(target))
        for scale, (t, s) in enumerate(zip(target, detector.student(target)), start=1):
            golden.check(f"teacher_{scale}", t)
            golden.check(f"decoder_{scale}", s)
        golden.check_number("loss", detector.loss(features)["restored"])
        golden.check("map_raw", cosine_map(detector.student(target), target, image.shape[-2:]))
        prediction = detector.score(features)
        golden.check("map", prediction.map)
        golden.check_number("image_score", prediction.score)
