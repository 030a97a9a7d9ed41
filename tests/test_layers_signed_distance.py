"""Signed distances of patches against stored outputs, known surfaces, loops and invariances."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from golden import Golden, filled_state, noise, parameters
from polyspect.errors import ConfigError, ShapeError, WeightsError
from polyspect.layers import signed_distance as module
from polyspect.layers.signed_distance import (
    DistanceField,
    PatchEncoder,
    SignedDistance,
    normalise_patches,
    pull,
    pull_loss,
    sample_queries,
    to_pixels,
)
from polyspect.weights.patch_networks import signed_distance_state
from published_networks import signed_distance

ARCHIVE = "08_shape_guided.npz"


def official() -> SignedDistance:
    net = SignedDistance().eval()
    net.load_state_dict(signed_distance_state({"sdf_model": filled_state(signed_distance())}, net))
    return net


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Known(torch.nn.Module):
    """A field that needs no code."""

    def __init__(self, distance) -> None:
        super().__init__()
        self.distance = distance

    def forward(self, codes, points):
        return self.distance(points)


# -- stored outputs ----------------------------------------------------------------------------------------------------


def test_equals_the_official_code():
    golden, net = Golden(ARCHIVE), official()
    patch, queries = golden.tensor("patch"), golden.tensor("queries")
    with torch.no_grad():
        code = net.encoder(patch)
        golden.check("code", code, 5e-5)
        golden.check("sdf_at_queries", net.field(code, queries)[..., None], 5e-5)
        golden.check("sdf_at_patch", net(patch)[..., None], 5e-5)
        pulled = pull(net.field, code, queries)
    golden.check("pulled_queries", pulled, 5e-5)
    assert float(pull_loss(pulled, patch)) == pytest.approx(golden.number("pull_loss"), rel=1e-5)


def test_map_of_overlapping_patches_equals_the_official_code():
    golden, net = Golden(ARCHIVE), official()
    points = torch.cat([golden.tensor("patch"), golden.tensor("queries")])
    with torch.no_grad():
        distance = net.field(golden.tensor("code").expand(2, -1), points).abs()
    golden.check("score_map", to_pixels(distance, golden.tensor("score_map_pixels"), (28, 28)), 5e-5)


def test_normalisation_is_that_of_the_stored_patch():
    golden = Golden(ARCHIVE)
    patch, (x, y, z, scale) = golden.tensor("patch"), golden.tensor("normalisation_mean_scale")[0].tolist()
    given = (patch + torch.tensor([x, y, z])) / scale
    got = normalise_patches(given)
    assert_close(got.points, patch, rtol=0, atol=2e-6)
    assert_close(got.scale, torch.tensor([scale]), rtol=1e-5, atol=0)
    assert_close(got.scale * got.centre[0], torch.tensor([x, y, z]), rtol=1e-5, atol=0)


def test_parameter_counts():
    with torch.device("meta"):
        assert parameters(PatchEncoder()) == 734_848
        assert parameters(DistanceField()) == 2_435_585
        assert parameters(SignedDistance()) == 3_170_433


# -- patches and queries -----------------------------------------------------------------------------------------------


def test_normalised_patches_have_mean_zero_and_side_one_wherever_they_lay():
    patches = noise("p", 4, 30, 3) * torch.tensor([1.0, 3.0, 0.1])
    got = normalise_patches(patches)
    assert_close(got.points.mean(1), torch.zeros(4, 3), rtol=0, atol=1e-6)
    assert_close((got.points.amax(1) - got.points.amin(1)).amax(1), torch.ones(4))
    assert_close(normalise_patches(0.01 * patches + 0.5).points, got.points, rtol=0, atol=1e-4)
    assert_close(got.points / got.scale[:, None, None] + got.centre[:, None], patches)


def test_patches_without_extent_stay_finite():
    got = normalise_patches(torch.full((1, 5, 3), 0.4))
    assert_close(got.points, torch.zeros(1, 5, 3))
    assert got.scale.tolist() == [1]


def test_queries_scatter_by_the_distance_to_the_50th_neighbour():
    """On a line of step 1 the 4th neighbour of an inner point is 2 away, of the first point 4."""
    line = torch.zeros(2000, 21, 3)
    line[:, :, 0] = torch.arange(21.0)
    got = sample_queries(line, generator(), neighbour=4, narrow_share=1)
    step = got.points - line
    assert_close(step[:, [0, 10]].std(0), torch.tensor([[2.0], [1.0]]).expand(2, 3), rtol=0.06, atol=0)
    wide = sample_queries(line, generator(), neighbour=4, narrow_share=0)
    assert_close(wide.points - line, 2 * step)
    shares = (sample_queries(line, generator(), neighbour=4).points - line - step).abs().sum((1, 2)) < 1e-3
    assert shares.float().mean().item() == pytest.approx(13 / 20, abs=0.03)


def test_targets_are_the_nearest_points_of_the_same_patch():
    patches = noise("p", 3, 12, 3)
    got = sample_queries(patches, generator(), neighbour=5)
    for patch, points, targets in zip(patches, got.points, got.targets):
        for point, target in zip(points, targets):
            assert torch.equal(target, min(patch, key=lambda p: float((p - point).norm())))
    again = sample_queries(patches, generator(), neighbour=5)
    assert torch.equal(got.points, again.points)
    assert not torch.equal(got.points, sample_queries(patches, generator(1), neighbour=5).points)


# -- networks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_call", [1 << 14, 10])
def test_fast_paths_equal_the_plain_networks(monkeypatch, per_call):
    monkeypatch.setattr(module, "_POINTS", per_call)
    net = official()
    patches = noise("p", 3, 7, 3)
    with torch.no_grad():
        code = net.encoder(patches)
        assert_close(code, net.encoder.plain(patches), rtol=1e-4, atol=1e-5)
        distance = net.field(code, patches)
        expected = net.field.plain(code, patches)
    assert_close(distance, expected, rtol=1e-4, atol=1e-5 * expected.std().item())
    assert_close(net.field(code, patches), expected, rtol=1e-4, atol=1e-5 * expected.std().item())


def test_weight_norm_is_torchs():
    torch.manual_seed(0)
    field = DistanceField(8, 16, 2)
    layer = field.hidden[0]
    theirs = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(16, 16))
    layer.gain.data.mul_(noise("g", 16))
    theirs.parametrizations.weight.original0.data = layer.gain.data[:, None]
    theirs.parametrizations.weight.original1.data = layer.direction.data
    assert_close(layer.weight(), theirs.weight)
    fresh = DistanceField(8, 16, 2).hidden[1]
    assert_close(fresh.weight(), fresh.direction)


def test_the_order_of_points_does_not_matter_to_codes_and_follows_through_distances():
    torch.manual_seed(0)
    net, patches = SignedDistance().eval(), noise("p", 2, 9, 3)
    order = torch.randperm(9, generator=generator())
    with torch.no_grad():
        assert_close(net.encoder(patches[:, order]), net.encoder(patches))
        assert_close(net(patches[:, order]), net(patches)[:, order])
        assert_close(net(patches[1:], patches[1:, :4]), net(patches)[1:, :4])


def test_a_fresh_field_is_nearly_constant():
    torch.manual_seed(0)
    with torch.no_grad():
        distance = DistanceField()(noise("z", 1, 128).abs(), noise("x", 1, 200, 3) / 3)
    assert 3 < distance.mean().item() < 30
    assert distance.std().item() < 0.2 * distance.mean().item()


# -- pulling -----------------------------------------------------------------------------------------------------------


def test_points_are_pulled_to_a_known_plane_and_sphere():
    points, none = noise("q", 1, 40, 3), torch.zeros(1, 0)
    normal = torch.tensor([2.0, -1.0, 2.0]) / 3
    pulled = pull(Known(lambda x: x @ normal - 0.25), none, points)
    assert_close(pulled @ normal, torch.full((1, 40), 0.25))
    assert_close((pulled - points).cross(normal.expand_as(points), dim=2), torch.zeros(1, 40, 3), rtol=0, atol=1e-6)
    pulled = pull(Known(lambda x: x.norm(dim=2) - 2), none, points)
    assert_close(pulled, 2 * points / points.norm(dim=2, keepdim=True))
    assert_close(pull(Known(lambda x: 2 - x.norm(dim=2)), none, points), pulled)


def test_pulling_uses_the_direction_of_the_gradient_only():
    points, none = noise("q", 1, 6, 3), torch.zeros(1, 0)
    pulled = pull(Known(lambda x: 5 * x[..., 2]), none, points)  # no distance: five times too long
    assert_close(pulled, points * torch.tensor([1.0, 1.0, -4.0]))
    flat = pull(Known(lambda x: 0 * x.sum(2) + 3), none, points)  # no gradient
    assert_close(flat, points)


def test_loss_by_hand_and_its_gradient_reaches_encoder_and_field():
    assert float(pull_loss(torch.zeros(1, 2, 3), torch.tensor([[[3.0, 4.0, 0.0], [0.0, 0.0, 0.0]]]))) == 2.5
    torch.manual_seed(0)
    net, patches = SignedDistance(8, 16, 2), normalise_patches(noise("p", 3, 12, 3)).points
    net.loss(sample_queries(patches, generator(), neighbour=5)).backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_training_fits_caps_of_spheres():
    """Shape-Guided's recipe on few points; what is asked of it is what the card of the method asks."""
    torch.manual_seed(0)
    radius = torch.linspace(0.7, 3, 4)[:, None]
    reach = 0.5 / radius.clamp(min=0.5)
    angle = 2 * math.pi * torch.rand(4, 60, generator=generator())
    tilt = reach.asin() * torch.rand(4, 60, generator=generator(1)).sqrt()
    normals = torch.stack([tilt.sin() * angle.cos(), tilt.sin() * angle.sin(), tilt.cos()], dim=2)
    frame = normalise_patches(normals * radius[..., None])
    net = SignedDistance(16, 64, 3)
    optimiser = torch.optim.Adam(net.parameters(), lr=5e-3)
    draw = generator(2)
    for _ in range(80):
        optimiser.zero_grad()
        queries = sample_queries(frame.points, draw, neighbour=6)
        loss = net.loss(queries)
        loss.backward()
        optimiser.step()
    still = pull_loss(queries.points, queries.targets).item()
    assert loss.item() < 0.75 * still
    net.eval()
    with torch.no_grad():
        off = {h: net(frame.points, frame.points + h * normals).abs().mean().item() for h in (-0.2, 0.0, 0.2)}
    assert off[0.0] < 0.6 * min(off[-0.2], off[0.2]), off


# -- maps --------------------------------------------------------------------------------------------------------------


def test_pixels_take_the_least_mean_or_greatest_of_their_values():
    values, pixels = torch.tensor([[0.3, 0.5], [0.1, 0.0]]), torch.tensor([[1, 5], [1, 2]])
    for reduce, met in (("min", 0.1), ("mean", 0.2), ("max", 0.3)):
        expected = torch.tensor([[0.0, met, 0.0], [0.0, 0.0, 0.5]])
        assert_close(to_pixels(values, pixels, (2, 3), reduce), expected)


# -- checkpoints and arguments -----------------------------------------------------------------------------------------


def test_both_generations_of_weight_norm_are_read():
    state = filled_state(signed_distance())
    with torch.device("meta"):
        net = SignedDistance()
    new = {
        name.replace("weight_g", "parametrizations.weight.original0").replace(
            "weight_v", "parametrizations.weight.original1"
        ): tensor
        for name, tensor in state.items()
    }
    a = signed_distance_state({"sdf_model": state, "current_iteration": 601}, net)
    b = signed_distance_state(new, net)
    assert len(state) == len(a) == 64
    assert list(a) == list(b) == list(net.state_dict())
    assert all(torch.equal(a[name], b[name]) for name in a)
    with pytest.raises(WeightsError, match=r"nothing for 'field\.hidden\.3\.gain'"):
        signed_distance_state({name: t for name, t in state.items() if name != "NIF.fc43.weight_g"}, net)
    with pytest.raises(WeightsError, match=r"'NIF\.fc43\.weight_g'"):
        signed_distance_state(new | {"NIF.fc43.weight_g": state["NIF.fc43.weight_g"]}, net)


def test_errors_say_what_does_not_fit():
    net = SignedDistance(8, 16, 2)
    with pytest.raises(ShapeError, match="at least 2"):
        net.encoder(torch.zeros(1, 5, 3))
    with pytest.raises(ShapeError, match="codes"):
        net.field(torch.zeros(1, 7), torch.zeros(1, 5, 3))
    with pytest.raises(ShapeError, match="points"):
        net.field(torch.zeros(2, 8), torch.zeros(1, 5, 3))
    with pytest.raises(ConfigError, match=r"in 1\.\.4 for patches of 5 points, got 50"):
        sample_queries(torch.zeros(1, 5, 3), generator())
    with pytest.raises(ConfigError, match="got 'sum'"):
        to_pixels(torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.int64), (1, 1), "sum")
