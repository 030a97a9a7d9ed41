"""Fusion of modalities into one target: Eqs. 2-3 of MMRD by hand, the alternatives of its Table 2e as loops."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from polyspect.layers.fusion import SqueezeExcitation, fuse, modulation


def maps(seed=0, shape=(2, 6, 4, 5)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_modulation_by_hand():
    channel = torch.tensor([[0.0, 0.0], [0.0, 4.0]])  # mean 1, variance 3
    alpha = modulation(channel[None, None])[0, 0]
    assert_close(alpha, torch.tensor([[0.582568, 0.582568], [0.582568, 0.952570]]), atol=1e-6, rtol=0)
    assert_close(modulation(torch.full((1, 3, 2, 2), 7.0)), torch.full((1, 3, 2, 2), 0.5))
    assert float(modulation(maps(shape=(2, 8, 16, 16))).min()) >= 0.5


def test_modulation_looks_at_one_part_and_channel_at_a_time():
    x = maps()
    alone = torch.stack([modulation(part[None, c : c + 1])[0, 0] for part in x for c in range(6)])
    assert_close(modulation(x).flatten(0, 1), alone)


@pytest.mark.parametrize("rule", ["alpha_sum", "alpha_aux", "add", "csa", "ssa", "sem", "rgb_only"])
def test_an_auxiliary_that_says_nothing_changes_nothing(rule):
    main = maps()
    gate = SqueezeExcitation(6)
    parts = fuse(main, [torch.zeros_like(main)], rule, gate=gate)
    assert len(parts) == 2
    assert_close(sum(parts), main)


def test_fusion_rules_by_their_definitions():
    main, other = maps(1), maps(2)
    assert torch.equal(sum(fuse(main, [main], "add")), 2 * main)
    assert_close(sum(fuse(main, [other], "alpha_sum")), main + modulation(main + other) * other)
    assert_close(sum(fuse(main, [other], "alpha_aux")), main + modulation(other) * other)
    assert torch.equal(sum(fuse(main, [other], "rgb_only")), main)
    flat = maps(3, (2, 6, 1, 1)).expand(2, 6, 4, 5)
    assert_close(fuse(flat, [other], "alpha_sum")[1], fuse(flat, [other], "alpha_aux")[1])
    gate = SqueezeExcitation(6)
    assert_close(fuse(main, [other], "sem", gate=gate)[1], gate(main + other) * other)


def test_channel_attention_equals_its_definition():
    main, other = maps(1), maps(2)
    (_, added) = fuse(main, [other], "csa")
    for b in range(2):
        r, a = main[b].flatten(1), other[b].flatten(1)  # C hw
        assert_close(added[b].flatten(1), (r @ a.T / 20**0.5).softmax(1) @ a)


def test_position_attention_equals_its_definition():
    main, other = maps(1), maps(2)
    (_, added) = fuse(main, [other], "ssa")
    for b in range(2):
        r, a = main[b].flatten(1), other[b].flatten(1)
        weights = (r.T @ a / 6**0.5).softmax(1)  # hw hw
        assert_close(added[b].flatten(1), a @ weights.T)


def test_several_auxiliaries_share_one_modulation_or_have_their_own():
    main, first, second = maps(1), maps(2), maps(3)
    together = fuse(main, [first, second], "alpha_sum")
    alpha = modulation(main + first + second)
    assert_close(together[1], alpha * first)
    assert_close(together[2], alpha * second)
    apart = fuse(main, [first, second], "alpha_sum", jointly=False)
    assert_close(apart[1], modulation(main + first) * first)
    assert_close(apart[2], modulation(main + second) * second)
    silent = fuse(main, [first, torch.zeros_like(first)], "alpha_sum")
    assert_close(sum(silent), sum(fuse(main, [first], "alpha_sum")))


def test_one_modality_is_its_own_target():
    main = maps()
    assert [part is main for part in fuse(main, [], "alpha_sum")] == [True]


def test_squeeze_and_excitation_has_the_published_sizes_and_is_a_gate():
    sizes = [sum(p.numel() for p in SqueezeExcitation(c).parameters()) for c in (256, 512, 1024)]
    assert sizes == [8_192, 32_768, 131_072]
    weights = SqueezeExcitation(24)(maps(shape=(2, 24, 3, 3)))
    assert weights.shape == (2, 24, 1, 1)
    assert bool(((weights > 0) & (weights < 1)).all())
    assert SqueezeExcitation(24).down.out_features == 4
