"""CFM's mapping networks and loss against stored outputs, loops, hand values and invariances."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from golden import Golden, filled_state, noise, parameters
from polyspect.errors import ConfigError, DataError, ShapeError
from polyspect.layers.feature_mapping import FeatureMapping, mapping_loss
from polyspect.weights.cross_modal import feature_mapping_state
from published_networks import mapping

DIRECTIONS = [("2Dto3D", "rgb", 768, 1152), ("3Dto2D", "xyz", 1152, 768)]


def small(hidden_layers=1) -> FeatureMapping:
    torch.manual_seed(0)
    return FeatureMapping(6, 4, hidden_layers)


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize(("direction", "source", "inputs", "outputs"), DIRECTIONS)
def test_mapping_equals_the_official_code(direction, source, inputs, outputs, big):
    golden, net = Golden("07_cfm.npz"), FeatureMapping(inputs, outputs, 5 if big else 1)
    net.load_state_dict(feature_mapping_state(filled_state(mapping(inputs, outputs, big)), net))
    with torch.no_grad():
        golden.check(f"mlp_{'big_' if big else ''}{direction}", net(noise(source, 40, inputs)), 2e-5)


def test_parameter_counts():
    assert parameters(FeatureMapping(768, 1152)) == 2_767_872
    assert parameters(FeatureMapping(1152, 768)) == 2_767_488
    assert parameters(FeatureMapping(768, 1152, 5)) == 6_458_112
    assert parameters(FeatureMapping(1152, 768, 5)) == 6_457_728
    assert FeatureMapping(768, 384).hidden[0].in_features == 576  # "last block only": points of 384 channels


@pytest.mark.parametrize("hidden_layers", [0, 1, 3])
def test_mapping_is_layer_after_layer_with_gelu_between(hidden_layers):
    net, x = small(hidden_layers), noise("x", 5, 6)
    expected = F.gelu(net.input(x))
    for layer in net.hidden:
        expected = F.gelu(layer(expected))
    assert_close(net(x), net.output(expected))
    assert len(net.hidden) == hidden_layers


def test_pixels_are_mapped_each_on_its_own():
    net, x = small(), noise("x", 2, 3, 5, 6)
    assert net(x).shape == (2, 3, 5, 4)
    assert_close(net(x)[1, 2, 4], net(x[1, 2, 4]))
    assert_close(net(x.flip(1)), net(x).flip(1))


def test_lifting_commutes_with_interpolation():
    net, tokens = small().double(), noise("x", 1, 4, 4, 6).double()

    def enlarge(x):
        return F.interpolate(x.permute(0, 3, 1, 2), size=(32, 32), mode="bilinear").permute(0, 2, 3, 1)

    assert_close(net.finish(enlarge(net.lift(tokens))), net(enlarge(tokens)))


def test_loss_by_hand():
    target = noise("t", 20, 6)
    assert float(mapping_loss(target * 3, target)) == pytest.approx(0, abs=1e-6)
    assert float(mapping_loss(-target, target)) == pytest.approx(2, abs=1e-6)
    crossed = mapping_loss(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([[0.0, 5.0], [1.0, 0.0]]))
    assert float(crossed) == pytest.approx(1 - 0.5**1.5, abs=1e-6)  # mean of cosines 0 and 1 / sqrt(2)


def test_loss_averages_over_the_valid_pixels_of_the_whole_batch():
    mapped, target = noise("m", 2, 3, 4, 5), noise("t", 2, 3, 4, 5)
    valid = noise("v", 2, 3, 4) > 0
    valid[0, 0] = True
    cosines = []
    for b, i, j in valid.nonzero():
        p, t = mapped[b, i, j], target[b, i, j]
        cosines.append(p @ t / (p.norm() * t.norm()))
    assert_close(mapping_loss(mapped, target, valid), 1 - sum(cosines) / len(cosines))


def test_what_invalid_pixels_hold_does_not_matter():
    valid = torch.tensor([True, False, True])
    results = []
    for rest in (0.0, float("nan")):
        mapped, target = noise("m", 3, 5), noise("t", 3, 5)
        mapped[1], target[1] = rest, rest
        mapped.requires_grad_()
        loss = mapping_loss(mapped, target, valid)
        loss.backward()
        results.append((loss.detach(), mapped.grad))
    assert_close(results[0], results[1], rtol=0, atol=0)


def test_both_directions_learn_apart_and_the_loss_falls():
    torch.manual_seed(0)
    there, back = FeatureMapping(6, 4), FeatureMapping(4, 6)
    rgb = noise("x", 64, 6)
    xyz = rgb[:, :4] + rgb[:, 2:]
    first = mapping_loss(there(rgb), xyz)
    first.backward()
    assert all(bool(p.grad.any()) for p in there.parameters())
    assert all(p.grad is None for p in back.parameters())
    optimiser = torch.optim.Adam(there.parameters(), lr=0.01)
    for _ in range(50):
        optimiser.zero_grad()
        mapping_loss(there(rgb), xyz).backward()
        optimiser.step()
    assert mapping_loss(there(rgb), xyz).item() < 0.5 * first.item()


def test_errors_say_what_does_not_fit():
    x = torch.ones(3, 4)
    with pytest.raises(ShapeError, match="expected 6 channels"):
        small()(x)
    with pytest.raises(ShapeError, match="do not fit each other"):
        mapping_loss(x, x[:2])
    with pytest.raises(ShapeError, match=r"`valid` \(2,\)"):
        mapping_loss(x, x, torch.ones(2, dtype=torch.bool))
    with pytest.raises(DataError, match="no pixel of this batch is valid"):
        mapping_loss(x, x, torch.zeros(3, dtype=torch.bool))
    with pytest.raises(ConfigError, match="`hidden_layers` must be 0 or more"):
        FeatureMapping(6, 4, -1)
