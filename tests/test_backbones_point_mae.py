"""Point-MAE's pre-training network: the published count, hand-made Chamfer distances and masks, and what it may see."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from golden import parameters
from polyspect.backbones.point_mae import PointMAE, chamfer, hide_groups
from polyspect.backbones.point_transformer import SIZES, PointTransformer
from polyspect.detectors.contract import seeded
from polyspect.errors import ConfigError, ShapeError


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small(**options) -> PointMAE:
    with seeded(0):
        return PointMAE("small", **{"decoder_blocks": 1, "points": 5, "drop_path": 0.0, **options}).eval()


def clouds(B=2, G=10, M=7, seed=0):
    return 0.1 * torch.randn(B, G, M, 3, generator=generator(seed)), torch.randn(B, G, 3, generator=generator(seed + 1))


def test_the_published_model_has_the_published_count():
    with torch.device("meta"):
        net = PointMAE("base")
    assert parameters(net) == 29_006_432
    assert parameters(net.decoder) + parameters(net.decoder_norm) == 7_094_016
    assert parameters(net.decoder_position) == 50_048
    assert parameters(net.head) == 36_960


def test_the_small_encoder_fits_into_8_mb_at_16_bits():
    net = PointTransformer(size="small")
    assert net.layers == (2, 5, 7)
    assert net.channels == 576
    assert 2 * sum(tensor.numel() for tensor in net.state_dict().values()) < 8e6
    for name, size in SIZES.items():
        assert size.layers[-1] == size.blocks - 1, name


def test_branches_of_size_zero_leave_the_tokens_as_they_are():
    net = small(branch_scale=0.0)
    groups, centres = clouds()
    tokens = net.encoder.encoder.plain(groups)
    assert_close(net.encoder(groups, centres), net.encoder.norm(tokens))


def test_descriptors_are_told_by_every_layer_of_visible_groups_and_behind_the_decoder():
    net = small(targets=2)
    groups, centres = clouds()
    hidden = torch.zeros(2, 10, dtype=torch.bool)
    hidden[:, 6:] = True
    plain = net.loss(groups, centres, hidden)
    wanted = torch.randn(2, 10, 2, generator=generator(5))
    with torch.no_grad():
        for layer in (net.tell_hidden, net.tell_visible):
            layer.weight.zero_()
            layer.bias.copy_(torch.tensor([1.0, -1.0]))
    error = (wanted - torch.tensor([1.0, -1.0])).square()
    expected = plain + 0.5 * (error[:, 6:].mean() + error[:, :6].mean())
    assert_close(net.loss(groups, centres, hidden, descriptors=wanted, descriptor_weight=0.5), expected)
    assert net.layers == SIZES["small"].layers
    with torch.no_grad():
        net.tell_visible.weight.normal_(generator=generator(1))
    whole = PointTransformer(net.layers, size="small").eval()
    whole.load_state_dict(net.encoder.state_dict())
    seen = whole(groups[:, :6], centres[:, :6]).unflatten(2, (3, -1))  # B V layers C: hidden groups are not seen
    told = net.tell_visible(seen) - wanted[:, :6, None]
    loss = net.loss(groups, centres, hidden, descriptors=wanted)
    assert_close(loss, plain + error[:, 6:].mean() + told.square().mean())


def test_descriptors_need_a_network_that_tells_them():
    groups, centres = clouds()
    hidden = torch.zeros(2, 10, dtype=torch.bool)
    hidden[:, 6:] = True
    with pytest.raises(ConfigError, match="build it with `targets`"):
        small().loss(groups, centres, hidden, descriptors=torch.zeros(2, 10, 3))
    with pytest.raises(ShapeError):
        small(targets=2).loss(groups, centres, hidden, descriptors=torch.zeros(2, 10, 3))


# -- Chamfer distance --------------------------------------------------------------------------------------------------


def test_chamfer_by_hand():
    a = torch.tensor([[[0.0, 0, 0], [3, 0, 0]]])
    b = torch.tensor([[[0.0, 0, 4], [0, 0, 0], [3, 1, 0]]])
    # from a: 0 and 1; from b: 4^2 to the origin, 0, 1
    assert_close(chamfer(a, b), torch.tensor([1 / 2 + 17 / 3]))
    assert_close(chamfer(a, b, "l1"), torch.tensor([(1 / 2 + 5 / 3) / 2]))
    assert_close(chamfer(a, b), chamfer(b, a))
    with pytest.raises(ConfigError, match="'l2' or 'l1', got 'l3'"):
        chamfer(a, b, "l3")


def test_chamfer_equals_its_definition_and_has_its_gradient():
    a = torch.randn(3, 6, 3, dtype=torch.float64, generator=generator(1)).requires_grad_()
    b = torch.randn(3, 9, 3, dtype=torch.float64, generator=generator(2))
    squared = (a[:, :, None] - b[:, None]).square().sum(-1)
    expected = squared.amin(2).mean(1) + squared.amin(1).mean(1)
    assert_close(chamfer(a, b), expected)
    rooted = (squared.amin(2).sqrt().mean(1) + squared.amin(1).sqrt().mean(1)) / 2
    assert_close(chamfer(a, b, "l1"), rooted)
    (wanted,) = torch.autograd.grad(expected.sum(), a)
    (got,) = torch.autograd.grad(chamfer(a, b).sum(), a)
    assert_close(got, wanted)


def test_l1_has_a_finite_gradient_where_points_meet():
    a = torch.zeros(1, 2, 3, requires_grad=True)
    chamfer(a, torch.zeros(1, 2, 3), "l1").sum().backward()
    assert bool(torch.isfinite(a.grad).all())


# -- masks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masking", ["random", "block"])
def test_masks_hide_the_share_asked_for_and_depend_on_the_generator_alone(masking):
    centres = torch.randn(4, 11, 3, generator=generator(3))
    hidden = hide_groups(centres, 0.6, masking, generator(7))
    assert hidden.sum(1).tolist() == [6] * 4
    assert torch.equal(hidden, hide_groups(centres, 0.6, masking, generator(7)))
    assert not torch.equal(hidden, hide_groups(centres, 0.6, masking, generator(8)))


def test_a_block_is_a_group_and_its_nearest_ones():
    line = torch.arange(10.0)[None, :, None] * torch.tensor([1.0, 0, 0])
    runs = {tuple(hide_groups(line, 0.3, "block", generator(seed))[0].nonzero()[:, 0].tolist()) for seed in range(30)}
    assert all(run[-1] - run[0] == 2 for run in runs)
    assert len(runs) > 4


def test_random_masks_hide_every_group_equally_often():
    hidden = hide_groups(torch.zeros(4000, 5, 3), 0.4, "random", generator())
    assert_close(hidden.float().mean(0), torch.full((5,), 0.4), atol=0.04, rtol=0)


@pytest.mark.parametrize(("ratio", "masking"), [(0.05, "random"), (1.0, "block"), (0.5, "stripes")])
def test_masks_that_cannot_be_are_refused(ratio, masking):
    with pytest.raises(ConfigError):
        hide_groups(torch.zeros(1, 10, 3), ratio, masking, generator())


# -- the network -------------------------------------------------------------------------------------------------------


def test_hidden_groups_are_predicted_from_visible_ones_and_positions_alone():
    net, (groups, centres) = small(), clouds()
    hidden = hide_groups(centres, 0.6, "random", generator())
    with torch.no_grad():
        y = net(groups, centres, hidden)
        assert y.shape == (12, 5, 3)
        changed = torch.where(hidden[..., None, None], torch.rand_like(groups), groups)
        assert torch.equal(net(changed, centres, hidden), y)
        changed = torch.where(hidden[..., None, None], groups, torch.rand_like(groups))
        assert not torch.allclose(net(changed, centres, hidden), y, atol=1e-4)
        one = net(groups[1:], centres[1:], hidden[1:])
        assert_close(y[6:], one, atol=1e-5, rtol=1e-4)


def test_predictions_belong_to_their_own_group():
    net, (groups, centres) = small(), clouds(B=1)
    hidden = torch.zeros(1, 10, dtype=torch.bool)
    hidden[0, [2, 7]] = True
    target = groups[0, [2, 7]]
    with torch.no_grad():
        y = net(groups, centres, hidden)
        assert_close(net.loss(groups, centres, hidden), chamfer(y, target).mean())
        moved = centres.clone()
        moved[0, 7] += 1
        z = net(groups, moved, hidden)
    assert (z[1] - y[1]).abs().max() > 2 * (z[0] - y[0]).abs().max()


def test_normalised_losses_do_not_depend_on_how_small_groups_are():
    (groups, centres), hidden = clouds(), torch.zeros(2, 10, dtype=torch.bool)
    hidden[:, :4] = True
    with torch.no_grad():
        net = small(normalise=True)
        loss = net.loss(groups, centres, hidden)
        assert_close(net.loss(groups / 8, centres, hidden), loss, rtol=0.05, atol=0)  # eps of the norms
        unit = groups[:, 4:].square().sum(3).mean((1, 2)).sqrt()  # B
        y = net(groups, centres, hidden).view(2, 4, 5, 3) / unit[:, None, None, None]
        target = groups[:, :4] / unit[:, None, None, None]
        assert_close(chamfer(y.flatten(0, 1), target.flatten(0, 1)).mean(), loss)
        plain = small()
        assert_close(plain(groups, centres, hidden).view(2, 4, 5, 3), y)


def test_the_visible_term_is_the_loss_of_the_visible_groups():
    net, (groups, centres) = small(), clouds()
    hidden = hide_groups(centres, 0.6, "random", generator())
    with torch.no_grad():
        masked, both, double = (net.loss(groups, centres, hidden, visible_weight=w) for w in (0.0, 1.0, 2.0))
        assert_close(double - both, both - masked)
        changed = torch.where(hidden[..., None, None], groups + 1, groups)
        moved = [net.loss(changed, centres, hidden, visible_weight=w) for w in (0.0, 1.0)]
        assert_close(moved[1] - moved[0], both - masked)
        assert both > masked


def test_drop_path_is_drawn_from_the_generator_and_only_in_train_mode():
    net, (groups, centres) = small(drop_path=0.5), clouds()
    hidden = hide_groups(centres, 0.6, "random", generator())
    with torch.no_grad():
        assert torch.equal(net(groups, centres, hidden), net(groups, centres, hidden))
        net.train()
        first = net(groups, centres, hidden, generator(1))
        assert torch.equal(first, net(groups, centres, hidden, generator(1)))
        assert not torch.allclose(first, net(groups, centres, hidden, generator(2)))
        with pytest.raises(ConfigError, match="generator"):
            net(groups, centres, hidden)


def test_factors_of_drop_path_have_mean_1_and_start_with_none_dropped():
    net = small(drop_path=0.5).train()
    factors = net._keep(3, torch.zeros(20_000, 1), generator())
    assert [sorted(f.unique().tolist()) for f in factors] == [[1.0], [0.0, pytest.approx(4 / 3)], [0.0, 2.0]]
    for factor in factors:
        assert_close(float(factor.mean()), 1.0, atol=0.02, rtol=0)


def test_clouds_that_hide_different_numbers_are_refused():
    net, (groups, centres) = small(), clouds()
    hidden = torch.zeros(2, 10, dtype=torch.bool)
    hidden[0, 0] = True
    with pytest.raises(ConfigError, match="same number"):
        net(groups, centres, hidden)


def test_one_step_learns():
    net, (groups, centres) = small().train(), clouds()
    hidden = hide_groups(centres, 0.6, "random", generator())
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    losses = []
    for _ in range(8):
        loss = net.loss(groups, centres, hidden)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert all(p.grad is not None for p in net.parameters())
    assert losses[-1] < 0.7 * losses[0]
    assert math.isfinite(losses[-1])
