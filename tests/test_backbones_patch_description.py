"""The patch description network against stored outputs, its receptive field and its padding."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from golden import Golden, filled_state, noise, parameters
from polyspect.backbones.patch_description import MARGIN, RECEPTIVE_FIELD, STRIDE, PatchDescription
from polyspect.errors import ConfigError, ShapeError, WeightsError
from polyspect.weights.patch_networks import patch_description_state
from published_networks import pdn


def test_equals_the_official_code():
    golden, image = Golden("pdn_small.npz"), noise("rgb", 2, 3, 128, 128)
    assert torch.equal(image.flatten()[:8], golden.tensor("check__rgb_first8"))
    state = filled_state(pdn("small"))
    assert sum(t.double().abs().sum().item() for t in state.values()) == pytest.approx(
        golden.number("check__weights_abs_sum")
    )
    for padding, name in ((False, "out_nopad"), (True, "out_pad")):
        net = PatchDescription(padding=padding)
        net.load_state_dict(patch_description_state(state, net))
        with torch.no_grad():
            golden.check(name, net(image), 1e-4, 1e-4)


def test_parameter_counts():
    with torch.device("meta"):
        assert parameters(PatchDescription()) == 2_694_144
        assert parameters(PatchDescription("medium")) == 8_026_624


@pytest.mark.parametrize("size", ["small", "medium"])
def test_grid_sizes(size):
    image = torch.empty(1, 3, 256, 128, device="meta")
    with torch.device("meta"):
        assert PatchDescription(size)(image).shape == (1, 384, 56, 24)
        assert PatchDescription(size, 768, padding=True)(image).shape == (1, 768, 64, 32)


@pytest.mark.parametrize("size", ["small", "medium"])
@pytest.mark.parametrize("padding", [False, True])
def test_a_feature_depends_on_its_33_pixels_and_no_others(size, padding):
    torch.manual_seed(0)
    net = PatchDescription(size, 2, padding=padding)
    image = torch.rand(1, 3, 76, 80, generator=torch.Generator().manual_seed(0)).requires_grad_()
    net(image)[0, :, 4, 5].sum().backward()
    rows, columns = (image.grad[0].abs().amax((0, over)).nonzero()[:, 0] for over in (2, 1))
    start = -16 if padding else 0
    assert (rows.min(), rows.max()) == (STRIDE * 4 + start, STRIDE * 4 + start + RECEPTIVE_FIELD - 1)
    assert (columns.min(), columns.max()) == (STRIDE * 5 + start, STRIDE * 5 + start + RECEPTIVE_FIELD - 1)


@pytest.mark.parametrize("size", ["small", "medium"])
def test_padding_only_adds_cells_around(size):
    torch.manual_seed(0)
    net, image = PatchDescription(size, 6), noise("x", 1, 3, 52, 44)
    padded = PatchDescription(size, 6, padding=True)
    padded.load_state_dict(net.state_dict())
    with torch.no_grad():
        assert_close(padded(image)[..., MARGIN:-MARGIN, MARGIN:-MARGIN], net(image))


def test_features_move_with_the_image():
    torch.manual_seed(0)
    net, image = PatchDescription(outputs=6), noise("x", 1, 3, 60, 60)
    with torch.no_grad():
        features, moved = net(image), net(image[..., 2 * STRIDE :, STRIDE:])
    assert_close(moved, features[..., 2:, 1:])


def test_images_are_normalised_inside_once():
    torch.manual_seed(0)
    net, image = PatchDescription(outputs=6), noise("x", 1, 3, 36, 36)
    with torch.no_grad():
        features = net(image)
        net.mean.zero_()
        net.std.fill_(1)
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        assert_close(net((image - mean.view(3, 1, 1)) / std.view(3, 1, 1)), features)


def test_images_do_not_know_each_other():
    torch.manual_seed(0)
    net, image = PatchDescription(outputs=6), noise("x", 3, 3, 40, 36)
    with torch.no_grad():
        assert_close(net(image)[1:2], net(image[1:2]), rtol=1e-4, atol=1e-5)


def test_both_public_namings_give_the_same_network():
    state = filled_state(pdn("medium", 8))
    with torch.device("meta"):
        net = PatchDescription("medium", 8)
    places = dict(zip([f"conv{n}" for n in range(1, 7)], ["0", "3", "6", "8", "10", "12"]))
    sequence = {f"{places[name.partition('.')[0]]}.{name.partition('.')[2]}": t for name, t in state.items()}
    a, b = patch_description_state(state, net), patch_description_state(sequence, net)
    assert list(a) == list(b) == list(net.state_dict())
    assert all(a[name] is b[name] for name in a)


def test_files_of_the_other_size_are_refused():
    with torch.device("meta"):
        small, medium = PatchDescription(), PatchDescription("medium")
    with pytest.raises(WeightsError, match=r"'conv5\.weight'"):
        patch_description_state(filled_state(pdn("medium")), small)
    with pytest.raises(WeightsError, match=r"nothing for 'convolutions\.4\.weight'"):
        patch_description_state(filled_state(pdn("small")), medium)


def test_errors_say_what_does_not_fit():
    with pytest.raises(ConfigError, match="'small' or 'medium', got 'large'"):
        PatchDescription("large")
    with pytest.raises(ShapeError, match=r"\(32, 40\) pixels.*at least 33"):
        PatchDescription(outputs=2)(torch.zeros(1, 3, 32, 40))
