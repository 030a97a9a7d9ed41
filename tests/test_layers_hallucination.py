"""CMDIAD's hallucination networks and losses against stored outputs, loops, hand values and invariances."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from golden import Golden, filled_state, learned, noise, parameters
from polyspect.errors import ConfigError, ShapeError
from polyspect.layers.hallucination import (
    ConvHallucination,
    FeaturesFromImage,
    ImageHallucination,
    PatchHallucination,
    PatchImageHallucination,
    _enlarge,
    hallucination_loss,
)
from polyspect.weights.cross_modal import (
    conv_hallucination_state,
    features_from_image_state,
    image_hallucination_state,
    patch_hallucination_state,
    patch_image_hallucination_state,
)
from published_networks import f2f_conv, f2f_mlp, f2i_conv, f2i_mlp, i2f

ARCHIVE = "06_cmdiad_nets.npz"
LOSSES = {"l2": "l2", "cosine": "cos_dist", "smooth_l1": "smooth_l1"}  # ours -> the stored runs'


def to_map(patches: Tensor) -> Tensor:
    """(B, h*w, C) in raster order to (B, C, h, w)."""
    return patches.transpose(1, 2).unflatten(2, (56, 56))


# -- stored outputs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize(("source", "target"), [("xyz", "rgb"), ("rgb", "xyz")])
def test_patch_hallucination_equals_the_official_code(depth, source, target):
    golden, net = Golden(ARCHIVE), PatchHallucination(depth=depth)
    net.load_state_dict(patch_hallucination_state(filled_state(f2f_mlp(depth)), net, source))
    with torch.no_grad():
        predicted = net(noise(source, 1, 24, 768))
    golden.check(f"f2f_mlp{depth}_{target}_from_{source}", predicted, 1e-4)
    for kind, stored in LOSSES.items():
        expected = float(golden.stored[f"f2f_mlp{depth}_loss_{stored}"][["xyz", "rgb"].index(target)])
        assert float(hallucination_loss(predicted, noise(target, 1, 24, 768), kind)) == pytest.approx(
            expected, rel=1e-5
        )


@pytest.mark.parametrize(("source", "target"), [("xyz", "rgb"), ("rgb", "xyz")])
def test_conv_hallucination_equals_the_official_code(source, target):
    golden, net = Golden(ARCHIVE), ConvHallucination().eval()
    net.load_state_dict(conv_hallucination_state(filled_state(f2f_conv()), net, source))
    with torch.no_grad():
        predicted = net(to_map(noise(f"{source}_full", 1, 3136, 768)))
    golden.check(f"f2f_conv_{target}_from_{source}", predicted.flatten(2).transpose(1, 2), 1e-4)


def test_image_hallucinations_equal_the_official_code():
    golden, features, image = Golden(ARCHIVE), to_map(noise("rgb_full", 1, 3136, 768)), noise("image", 1, 3, 224, 224)
    conv, mlp = ImageHallucination(), PatchImageHallucination()
    conv.load_state_dict(image_hallucination_state(filled_state(f2i_conv()), conv))
    mlp.load_state_dict(patch_image_hallucination_state(filled_state(f2i_mlp()), mlp))
    for name, net in (("f2i_conv", conv), ("f2i_mlp", mlp)):
        with torch.no_grad():
            predicted = net(features)
        golden.check(name, predicted, 1e-4)
        loss = hallucination_loss(predicted, image, channels=1)
        assert float(loss) == pytest.approx(golden.number(f"{name}_loss"), rel=1e-5)


def test_features_from_image_equal_the_official_code():
    golden, net = Golden(ARCHIVE), FeaturesFromImage().eval()
    net.load_state_dict(features_from_image_state(filled_state(i2f()), net))
    with torch.no_grad():
        predicted = net(noise("image", 1, 3, 224, 224))
    golden.check("i2f_hrnet", predicted, 1e-4)
    loss = hallucination_loss(predicted, to_map(noise("rgb_full", 1, 3136, 768)), channels=1)
    assert float(loss) == pytest.approx(golden.number("i2f_hrnet_loss"), rel=1e-5)


def test_parameter_counts():
    assert 2 * parameters(PatchHallucination()) == 13_283_328
    assert 2 * parameters(PatchHallucination(depth=2)) == 26_563_584
    assert 2 * parameters(ConvHallucination()) == 42_476_544
    assert parameters(PatchImageHallucination()) == 1_367_427


def test_parameter_counts_where_the_published_network_has_unused_parts():
    norm = learned({name: torch.empty(shape) for name, shape in f2i_conv().items() if name.startswith("norm.")})
    stage = learned({name: torch.empty(shape) for name, shape in i2f().items() if name.startswith("layer4.")})
    assert (norm, stage) == (1_536, 1_120_256)
    assert parameters(ImageHallucination()) + norm == 3_016_547
    assert parameters(FeaturesFromImage()) + stage == 4_968_256


# -- features to features ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2])
def test_patch_hallucination_is_layer_after_layer_with_gelu(depth):
    torch.manual_seed(0)
    net, x = PatchHallucination(8, 3, depth), noise("x", 2, 5, 8)
    widths = [(layer.in_features, layer.out_features) for layer in net.layers]
    assert widths == [(8, 20), (20, 20), (20, 8)] * (depth - 1) + [(8, 20), (20, 20), (20, 3)]
    expected = net.norm(x)
    for layer in net.layers:
        expected = F.gelu(layer(expected))
    assert_close(net(x), expected)


def test_released_output_activation_bounds_predictions_from_below_and_can_be_left_out():
    for activation in ("gelu", "none"):
        torch.manual_seed(0)
        net = PatchHallucination(8, output_activation=activation)
        torch.nn.init.constant_(net.layers[-1].bias, -0.5)
        least = net(noise("x", 1, 50, 8)).min().item()
        assert (least > -0.171) == (activation == "gelu"), least


def test_patches_are_hallucinated_each_on_its_own():
    torch.manual_seed(0)
    net, x = PatchHallucination(8), noise("x", 2, 5, 8)
    assert_close(net(x.flip(1)), net(x).flip(1))
    assert_close(net(x[1:]), net(x)[1:])


# -- networks that know the grid ---------------------------------------------------------------------------------------


GRID_NETS = {
    "f2f_conv": (lambda: ConvHallucination(6), (6, 5, 4), (6, 5, 4)),
    "f2i_conv": (lambda: ImageHallucination(6), (6, 5, 4), (3, 20, 16)),
    "f2i_depth": (lambda: ImageHallucination(6, 1, 8), (6, 5, 4), (1, 40, 32)),
    "f2i_mlp": (lambda: PatchImageHallucination(16), (16, 5, 4), (3, 20, 16)),
    "i2f": (lambda: FeaturesFromImage(7, 32, (1, 2)), (3, 20, 16), (7, 5, 4)),
}


@pytest.mark.parametrize("name", GRID_NETS)
def test_shapes_gradients_and_batches(name):
    build, inputs, outputs = GRID_NETS[name]
    torch.manual_seed(0)
    net, x = build(), noise("x", 3, *inputs)
    net(x)  # so that batch norms know something
    net.eval()
    predicted = net(x)
    assert predicted.shape == (3, *outputs)
    assert_close(net(x[1:2]), predicted[1:2], rtol=1e-4, atol=1e-5)
    predicted.square().sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []
    with pytest.raises(ShapeError):
        net(x[:, :-1])


def test_a_constant_map_gives_an_image_that_is_constant_inside():
    torch.manual_seed(0)
    image = ImageHallucination(6)(noise("x", 1, 6, 1, 1).expand(1, 6, 12, 12))
    inside = image[:, :, 16:-16, 16:-16]  # 1 cell of the first kernel, 2 of the enlargement, 3 pixels of the others
    assert_close(inside, inside[:, :, :1, :1].expand_as(inside))


def test_enlarging_by_products_is_bicubic_interpolation():
    x = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    for factor in (1, 4, 8):
        expected = F.interpolate(x, scale_factor=float(factor), mode="bicubic", align_corners=False)
        assert_close(_enlarge(x, factor), expected, rtol=1e-5, atol=1e-5)


def test_maps_keep_their_raster_order():
    """A feature that is the row index stays one after enlargement: values rise downwards, equal along rows."""
    net = PatchImageHallucination(16)
    net.mlp = torch.nn.Identity()
    net.norm.forward = lambda x: x
    rows = torch.arange(6.0).view(1, 1, 6, 1).expand(1, 16, 6, 5)
    image = net(rows)[0, 0]
    assert bool((image[4:-4].diff(dim=0) > 0).all())
    centres = (torch.arange(8, 16) + 0.5) / 4 - 0.5
    assert_close(image[8:-8], centres[:, None].expand(8, 20), rtol=0, atol=0.05)  # bicubic bends a ramp a little


# -- losses ------------------------------------------------------------------------------------------------------------


def test_losses_by_hand():
    predicted, target = torch.zeros(1, 2, 3), torch.zeros(1, 2, 3)
    predicted[0, 0, :2] = torch.tensor([3.0, 4.0])
    assert float(hallucination_loss(predicted, target)) == 5
    assert float(hallucination_loss(predicted, target, "smooth_l1")) == 2.5 + 3.5
    assert float(hallucination_loss(predicted.mT, target.mT, channels=1)) == 5
    assert float(hallucination_loss(predicted.repeat(2, 1, 1), target.repeat(2, 1, 1))) == 5
    turned = torch.tensor([[[1.0, 0.0], [1.0, 1.0], [-2.0, 0.0]]])
    along = torch.tensor([[[5.0, 0.0], [1.0, 0.0], [1.0, 0.0]]])
    assert float(hallucination_loss(turned, along, "cosine")) == pytest.approx(0 + 1 - 0.5**0.5 + 2)


@pytest.mark.parametrize("kind", LOSSES)
def test_gradients_are_finite_where_the_prediction_is_perfect(kind):
    predicted = noise("p", 2, 3, 4).requires_grad_()
    target = predicted.detach().clone()
    target[1] = noise("t", 3, 4)
    hallucination_loss(predicted, target, kind).backward()
    assert bool(predicted.grad.isfinite().all())
    assert bool(predicted.grad[1].any())


def test_training_beats_the_mean_vector():
    torch.manual_seed(0)
    xyz = noise("x", 4, 30, 8)
    rgb = F.gelu(xyz @ noise("A", 8, 8))
    net = PatchHallucination(8)
    optimiser = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(60):
        optimiser.zero_grad()
        hallucination_loss(net(xyz), rgb).backward()
        optimiser.step()
    constant = rgb.mean((0, 1)).expand_as(rgb)
    assert hallucination_loss(net(xyz), rgb).item() < 0.5 * hallucination_loss(constant, rgb).item()


# -- arguments ---------------------------------------------------------------------------------------------------------


def test_errors_say_what_does_not_fit():
    x = torch.ones(1, 2, 3)
    with pytest.raises(ShapeError, match="predicted"):
        hallucination_loss(x, x[:, :1])
    with pytest.raises(ConfigError, match="'l2', 'cosine' or 'smooth_l1', got 'l1'"):
        hallucination_loss(x, x, "l1")
    with pytest.raises(ShapeError, match="patches"):
        PatchHallucination(8)(x)
    with pytest.raises(ConfigError, match="`depth`"):
        PatchHallucination(8, depth=0)
    with pytest.raises(ConfigError, match="'gelu' or 'none', got 'relu'"):
        PatchHallucination(8, output_activation="relu")
    with pytest.raises(ConfigError, match="`width` must be a multiple of 4"):
        FeaturesFromImage(width=6)
    with pytest.raises(ConfigError, match="`blocks`"):
        FeaturesFromImage(width=8, blocks=(4, 0))
