"""M3DM's feature fusion and its contrastive loss against stored outputs, loops, hand values and invariances."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from golden import Golden, filled_state, noise, parameters
from polyspect.errors import ConfigError, DataError, ShapeError
from polyspect.layers import feature_fusion
from polyspect.layers.feature_fusion import FeatureFusion, patch_contrast
from polyspect.weights.cross_modal import feature_fusion_state
from published_networks import fusion


def small() -> FeatureFusion:
    torch.manual_seed(0)
    return FeatureFusion(6, 4, embedding=5)


def patches(B=2, P=7) -> tuple[Tensor, Tensor]:
    return noise("a", B, P, 6), noise("b", B, P, 4)


def test_fusion_equals_the_official_code():
    golden, net = Golden("04_m3dm_uff_scores.npz"), FeatureFusion()
    net.load_state_dict(feature_fusion_state(filled_state(fusion()), net))
    xyz, rgb = noise("xyz", 1, 24, 1152), noise("rgb", 1, 24, 768)
    xyz[:, ::5] = 0
    with torch.no_grad():
        golden.check("uff_fused", net(xyz, rgb), 2e-5)
        assert float(net.loss(xyz, rgb)) == pytest.approx(golden.number("uff_loss"), rel=1e-6)
    contrast = patch_contrast(noise("q", 9, 256), noise("k", 9, 256))
    assert float(contrast) == pytest.approx(golden.number("contrastive_loss_qk"), rel=1e-6)


def test_parameter_counts():
    net = FeatureFusion()
    assert parameters(net) == 15_840_896
    assert parameters(net.xyz.head) + parameters(net.rgb.head) == 492_032
    assert net.channels == 1920


def test_fused_patches_have_points_first():
    net, (xyz, rgb) = small(), patches()
    fused = net(xyz, rgb)
    assert fused.shape == (2, 7, 10)
    assert torch.equal(fused[..., :6], net(xyz, rgb + 1)[..., :6])
    assert torch.equal(fused[..., 6:], net(xyz.flip(0), rgb)[..., 6:])


def test_patches_and_parts_are_fused_each_on_its_own():
    net, (xyz, rgb) = small(), patches()
    fused, order = net(xyz, rgb), torch.tensor([3, 0, 6, 1, 5, 2, 4])
    assert_close(net(xyz[:, order], rgb[:, order]), fused[:, order])
    assert_close(net(xyz[1:], rgb[1:]), fused[1:])


@pytest.mark.parametrize(("size", "expected"), [(2, 0.626523), (8, 2.548018)])
def test_contrast_of_perfect_pairs_by_hand(size, expected):
    eye = torch.eye(size)
    assert float(patch_contrast(eye, 3 * eye)) == pytest.approx(expected, abs=1e-6)  # 2 log(1 + (N - 1) / e)
    assert expected == pytest.approx(2 * math.log(1 + (size - 1) / math.e), abs=1e-6)


def test_contrast_of_equal_rows_is_twice_the_log_of_their_number():
    q = torch.ones(8, 3)
    assert float(patch_contrast(q, q)) == pytest.approx(2 * math.log(8), abs=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.2])
def test_contrast_equals_eq_2_written_as_loops(temperature):
    q, k = noise("q", 6, 4).double(), noise("k", 6, 4).double()
    terms = []
    for i in range(6):
        similar = [float(q[i] @ k[j] / (q[i].norm() * k[j].norm())) / temperature for j in range(6)]
        terms.append(math.log(sum(math.exp(s) for s in similar)) - similar[i])
    expected = 2 * temperature * sum(terms) / 6
    assert float(patch_contrast(q, k, temperature)) == pytest.approx(expected, rel=1e-5)


def test_contrast_in_blocks_equals_contrast_at_once(monkeypatch):
    results = []
    for rows in (1000, 4):
        monkeypatch.setattr(feature_fusion, "_ROWS", rows)
        q, k = noise("q", 11, 4).requires_grad_(), noise("k", 11, 4).requires_grad_()
        loss = patch_contrast(q, k)
        loss.backward()
        results.append((loss.detach(), q.grad, k.grad))
    assert_close(results[0], results[1])


def test_loss_leaves_patches_without_points_out():
    net, (xyz, rgb) = small(), patches()
    measured = torch.ones(2, 7, dtype=torch.bool)
    measured[0, ::2] = False
    expected = net.loss(xyz, rgb, measured)
    hidden = torch.where(measured[..., None], xyz, 0)
    assert_close(net.loss(hidden, rgb), expected)
    hidden[0, 0, :] = xyz[0, 0]
    hidden[0, 0, 2] = 0  # as released, one zero among the point features is enough
    assert_close(net.loss(hidden, rgb), expected)
    other = torch.where(measured[..., None], rgb, 7)
    assert_close(net.loss(xyz, other, measured), expected)
    kept = net.loss(xyz[measured][None], rgb[measured][None])
    assert_close(kept, expected)


def test_loss_reaches_every_tensor_and_training_lowers_it():
    net, (xyz, rgb) = small(), patches()
    optimiser = torch.optim.AdamW(net.parameters(), lr=0.003)
    first = net.loss(xyz, rgb)
    first.backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []
    for _ in range(20):
        optimiser.zero_grad()
        net.loss(xyz, rgb).backward()
        optimiser.step()
    assert net.loss(xyz, rgb).item() < first.item() - 0.1


def test_errors_say_what_does_not_fit():
    net, (xyz, rgb) = small(), patches()
    with pytest.raises(ShapeError, match="rgb"):
        net(xyz, rgb[:, :3])
    with pytest.raises(ShapeError, match="xyz"):
        net(rgb, rgb)
    with pytest.raises(ShapeError, match="measured"):
        net.loss(xyz, rgb, torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(DataError, match="no patch of this batch has points"):
        net.loss(torch.zeros_like(xyz), rgb)
    with pytest.raises(ConfigError, match="temperature"):
        net.loss(xyz, rgb, temperature=0)
    with pytest.raises(ShapeError, match="`k`"):
        patch_contrast(torch.ones(3, 2), torch.ones(4, 2))
