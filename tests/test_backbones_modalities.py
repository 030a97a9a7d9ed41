"""Modalities as backbone input, and one pass for all of them."""

import pytest
import torch
from torch.testing import assert_close

from polyspect.backbones.image import ImageBackbone
from polyspect.backbones.modalities import modality_features, modality_image, split_modalities, stack_modalities
from polyspect.errors import ConfigError, DataError, ShapeError
from polyspect.samples import Batch


@pytest.fixture
def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    valid = torch.rand(2, 32, 48, generator=generator) > 0.2
    normals = torch.nn.functional.normalize(torch.randn(2, 3, 32, 48, generator=generator), dim=1)
    images = {
        "rgb": torch.rand(2, 3, 32, 48, generator=generator),
        "xyz": torch.rand(2, 3, 32, 48, generator=generator),
        "depth": torch.rand(2, 1, 32, 48, generator=generator),
        "normals": normals * valid[:, None],
        "infrared": torch.rand(2, 1, 32, 48, generator=generator),
        "polar": torch.rand(2, 3, 32, 48, generator=generator),
        "spectral": torch.rand(2, 5, 32, 48, generator=generator),
    }
    return Batch(("a/0", "a/1"), images, valid, valid)


def test_rgb_and_extra_colour_are_passed_as_they_are(batch):
    assert modality_image(batch, "rgb") is batch.images["rgb"]
    assert modality_image(batch, "polar") is batch.images["polar"]


@pytest.mark.parametrize("name", ["depth", "infrared"])
def test_one_channel_is_copied_to_three(batch, name):
    image = modality_image(batch, name)
    assert image.shape == (2, 3, 32, 48)
    for channel in range(3):
        assert torch.equal(image[:, channel], batch.images[name][:, 0])


def test_normals_are_mapped_to_0_1_where_valid_and_0_elsewhere(batch):
    image = modality_image(batch, "normals")
    for b in range(2):
        for y in range(0, 32, 5):
            for x in range(0, 48, 7):
                n = batch.images["normals"][b, :, y, x]
                wanted = (n + 1) / 2 if batch.valid[b, y, x] else torch.zeros(3)
                assert torch.equal(image[b, :, y, x], wanted)
    assert 0 <= float(image.min()) <= float(image.max()) <= 1


def test_what_is_no_image_is_refused_with_a_hint(batch):
    with pytest.raises(ConfigError, match="'depth' or 'normals'"):
        modality_image(batch, "xyz")
    with pytest.raises(DataError, match=r"'a/0' has no 'thermal'; the batch has rgb"):
        modality_image(batch, "thermal")
    with pytest.raises(ShapeError, match=r"'spectral' has 5 channels"):
        modality_image(batch, "spectral")


def test_stack_then_split_is_the_identity(batch):
    names = ("depth", "rgb", "normals")
    stacked = stack_modalities(batch, names)
    assert stacked.shape == (6, 3, 32, 48)
    for name, (image,) in split_modalities([stacked], names).items():
        assert torch.equal(image, modality_image(batch, name))


@torch.inference_mode()
def test_one_pass_equals_a_pass_per_modality(batch):
    backbone = ImageBackbone("resnet18", (4, 8), weights="random")
    calls = []
    backbone.register_forward_hook(lambda *_: calls.append(1))
    together = modality_features(backbone, batch, ("rgb", "depth"))
    assert len(calls) == 1
    assert list(together) == ["rgb", "depth"]
    for name, stages in together.items():
        for got, want in zip(stages, backbone(modality_image(batch, name)), strict=True):
            assert got.shape[0] == 2
            assert_close(got, want, rtol=1e-5, atol=1e-5)
