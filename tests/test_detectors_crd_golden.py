"""CRD and plain RD against stored outputs of the official code, with weights that both sides make from a formula."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from polyspect.backbones.image import ImageBackbone
from polyspect.detectors.crd import CRD, SCALES, CRDConfig
from polyspect.layers.blocks import ReverseDecoder, plan_blocks
from polyspect.layers.bottleneck import OneClassEmbedding
from polyspect.layers.distillation import cosine_losses
from polyspect.layers.maps import MapMoments, cosine_map, gaussian_smooth

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "reference" / "golden"
OTHER = {"rgb": "depth", "depth": "rgb"}

# where the tensors of a published student lie in ours: {other} is the assisting modality
EMBEDDING_PREFIXES = {
    "bn.conv1.": "embedding.paths.0.0.",
    "bn.bn1.": "embedding.paths.0.1.",
    "bn.conv2.": "embedding.paths.0.3.",
    "bn.bn2.": "embedding.paths.0.4.",
    "bn.conv3.": "embedding.paths.1.0.",
    "bn.bn3.": "embedding.paths.1.1.",
    "bn.conv4.": "embedding.paths.2.0.",
    "bn.bn4.": "embedding.paths.2.1.",
    "bn.bn_layer.": "embedding.stage.",
    "decoder.layer1.": "decoder.stages.0.",
    "decoder.layer2.": "decoder.stages.1.",
    "decoder.layer3.": "decoder.stages.2.",
}
STUDENT_PREFIXES = EMBEDDING_PREFIXES | {
    "decoder.w_a": "decoder.theta.0",
    "decoder.w_b": "decoder.theta.1",
    "decoder.w_c": "decoder.theta.2",
    "projector_filter.conv_a.": "filters.{other}.scales.0.",
    "projector_filter.conv_b.": "filters.{other}.scales.1.",
    "projector_filter.conv_c.": "filters.{other}.scales.2.",
    "projector_amply.conv_a.": "amplifiers.{other}.scales.0.",
    "projector_amply.conv_b.": "amplifiers.{other}.scales.1.",
    "projector_amply.conv_c.": "amplifiers.{other}.scales.2.",
}


def noise(name, shape):
    """Standard normal numbers that depend on the name only."""
    generator = np.random.default_rng(zlib.crc32(f"0:{name}".encode()))
    return generator.standard_normal(tuple(shape)).astype(np.float32)


def filled(name, shape):
    """The golden weights: He-scaled kernels, norms near one, small biases."""
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "num_batches_tracked":
        return torch.zeros(tuple(shape), dtype=torch.int64)
    z = noise(name, shape)
    if leaf == "running_var":
        z = 1 + 0.2 * np.abs(z)
    elif leaf == "bias":
        z = 0.05 * z
    elif len(shape) >= 2:
        z = z * np.float32(np.sqrt(2 / np.prod(shape[1:])))
    elif leaf == "weight":
        z = 1 + 0.1 * z
    else:
        z = 0.1 * z
    return torch.from_numpy(np.ascontiguousarray(z))


def fill_module(module, prefixes, root, other=""):
    """Fill every tensor of `module` under its published name; a tensor without one is an error."""
    back = {ours.format(other=other): theirs for theirs, ours in prefixes.items()}
    for key, tensor in module.state_dict().items():
        start = next(ours for ours in back if key.startswith(ours))
        tensor.copy_(filled(root + back[start] + key[len(start) :], tensor.shape))


def fill_teacher(teacher, root):
    """Fill a timm ResNet, which keeps torchvision's names, wherever the backbone holds it."""
    inner = next(key for key in teacher.state_dict() if key.endswith("layer1.0.conv1.weight"))
    start = inner.removesuffix("layer1.0.conv1.weight")
    for key, tensor in teacher.state_dict().items():
        if key.startswith(start):
            tensor.copy_(filled(root + key.removeprefix(start), tensor.shape))


class Golden:
    """One archive of stored outputs, whole or as (size, spread, every k-th number)."""

    def __init__(self, name):
        path = GOLDEN / name
        if not path.is_file():
            pytest.skip(f"stored outputs are not here: {path}")
        with np.load(path, allow_pickle=False) as archive:
            self.stored = dict(archive)

    def check(self, name, got):
        got = got.detach().double().numpy()
        if name in self.stored:
            expected = np.asarray(self.stored[name], dtype=np.float64)
            spread = expected.std()
        else:
            assert got.shape == tuple(self.stored[f"{name}__shape"])
            expected, spread = self.stored[f"{name}__sample"], self.stored[f"{name}__std"]
            got = got.ravel()[:: int(self.stored[f"{name}__stride"])]
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4 * spread, err_msg=name)

    def check_number(self, name, got):
        np.testing.assert_allclose(got.detach().double().numpy(), self.stored[name], rtol=5e-5, err_msg=name)

    def image(self, name):
        return torch.from_numpy(noise(name, self.stored[f"input__{name}__shape"]))


def check_student(golden, detector, features, name):
    """P, Q, E, R, G and the four losses of one branch."""
    (target, restored), other = detector.restore(features)[name], OTHER[name]
    for index, scale in enumerate(SCALES):
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
@pytest.mark.parametrize("backbone", ["resnet50", "wide_resnet50_2"])
def test_crd_equals_the_official_code(backbone):
    golden = Golden(f"crd_{backbone}.npz")
    detector = CRD(CRDConfig(backbone=backbone, weights="random"), pretrained=False).eval()
    with torch.no_grad():
        fill_teacher(detector.teacher, "teacher.encoder.")
        for name, student in detector.students.items():
            fill_module(student, STUDENT_PREFIXES, f"student_{name}.", OTHER[name])
        features = {}
        for name in OTHER:
            image = golden.image(name)
            assert_close(image.flatten()[:8], torch.from_numpy(golden.stored[f"check__{name}_first8"]))
            maps = detector.teacher.features(image)
            features |= {f"{name}.{scale}": x for scale, x in zip(SCALES, maps)}
            features["valid"] = torch.ones(len(image), *image.shape[-2:], dtype=torch.bool)
        for name in OTHER:
            check_student(golden, detector, features, name)
        check_maps(golden, detector, features, "map", 64)
        check_maps(golden, detector, features, "map256", 256)


def test_plain_reverse_distillation_equals_the_official_code():
    golden = Golden("rd4ad_resnet18.npz")
    teacher = ImageBackbone("resnet18", weights="random", pretrained=False)
    channels = tuple(teacher.channels)
    plan = plan_blocks("resnet18", channels)
    student = torch.nn.Module()
    student.embedding, student.decoder = OneClassEmbedding(channels, plan), ReverseDecoder(channels, plan)
    student.eval()
    with torch.no_grad():
        fill_teacher(teacher, "encoder.")
        fill_module(student, EMBEDDING_PREFIXES, "")
        image = golden.image("rgb")
        target = teacher.features(image)
        embedding = student.embedding(target)
        restored, same = student.decoder(embedding)
        golden.check("embedding", embedding)
        for scale, (t, s) in enumerate(zip(target, restored), start=1):
            golden.check(f"teacher_{scale}", t)
            golden.check(f"decoder_{scale}", s)
        golden.check_number("loss", cosine_losses({"loss": restored}, target)["loss"])
        raw = cosine_map(same, target, image.shape[-2:])
        golden.check("map_raw", raw)
        golden.check("map", gaussian_smooth(raw, 4))
        golden.check_number("image_score", gaussian_smooth(raw, 4).flatten(1).amax(1))
