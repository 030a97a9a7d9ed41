"""One network with batch-norm statistics per modality: separate passes, adaptation, what stays as it was."""

from __future__ import annotations

import logging

import pytest
import torch
from torch.testing import assert_close

from polyspect.backbones.image import ImageBackbone
from polyspect.backbones.siamese import SiameseBackbone, SplitNorm


def network(name="resnet18"):
    return ImageBackbone(name, weights="random")


def images(seed=0, count=4, size=64):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_lite0", "mobilenetv3_small_050"])
def test_before_adaptation_all_modalities_see_the_plain_network(name):
    plain = network(name)
    teacher = SiameseBackbone(network(name), ["rgb", "depth"])
    x = images()
    for ours, theirs in zip(teacher(torch.cat([x, x.flip(0)])), plain(torch.cat([x, x.flip(0)]))):
        assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_one_pass_equals_one_network_per_modality():
    teacher = SiameseBackbone(network(), ["rgb", "depth"])
    teacher.forget("depth")
    teacher.adapt("depth", images(1) * 0.2, 1.0)
    x, y = images(2), images(3)
    together = teacher(torch.cat([x, y]))
    for row, batch in enumerate((x, y)):
        alone = network()
        state = {
            key: t[row] if key.endswith(("running_mean", "running_var")) else t
            for key, t in teacher.backbone.network.state_dict().items()
        }
        missing, unexpected = alone.network.load_state_dict(state, strict=False)
        assert all("num_batches" in key for key in missing)
        assert not unexpected
        for both, single in zip(together, alone(batch)):
            assert_close(both.chunk(2)[row], single, rtol=1e-4, atol=1e-5)


def test_adapting_to_one_batch_normalises_it_and_leaves_the_rest_alone():
    teacher = SiameseBackbone(network(), ["rgb", "depth"])
    before = {key: t.clone() for key, t in teacher.state_dict().items()}
    batch = 0.3 * images(5, count=6) ** 2
    teacher.forget("depth")
    teacher.adapt("depth", batch, 1.0)
    norm = next(norm for norm in teacher.norms)
    seen = []
    handle = norm.register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0]))
    teacher(torch.cat([batch, batch]))
    handle.remove()
    x = seen[0].chunk(2)[1]
    normal = (x - norm.running_mean[1].view(1, -1, 1, 1)) / (norm.running_var[1] + norm.eps).sqrt().view(1, -1, 1, 1)
    assert float(normal.mean((0, 2, 3)).abs().max()) < 1e-4
    assert_close(normal.var((0, 2, 3), unbiased=True), torch.ones(64), rtol=1e-3, atol=0)
    for key, tensor in teacher.state_dict().items():
        if key.endswith(("running_mean", "running_var")):
            assert torch.equal(tensor[0], before[key][0]), key
            assert not torch.equal(tensor[1], before[key][1]), key
        else:
            assert torch.equal(tensor, before[key]), key


def test_cumulative_shares_average_the_batches():
    teacher = SiameseBackbone(network(), ["depth"])
    first = teacher.norms[0]
    single = []
    for seed in (1, 2, 3):
        teacher.forget("depth")
        teacher.adapt("depth", images(seed), 1.0)
        single.append((first.running_mean.clone(), first.running_var.clone()))
    teacher.forget("depth")
    for n, seed in enumerate((1, 2, 3), start=1):
        teacher.adapt("depth", images(seed), 1 / n)
    for index, got in enumerate((first.running_mean, first.running_var)):
        assert_close(got, torch.stack([pair[index] for pair in single]).mean(0), rtol=1e-4, atol=1e-6)


def test_two_modalities_adapted_to_the_same_parts_agree():
    teacher = SiameseBackbone(network(), ["rgb", "depth"])
    for name in teacher.names:
        teacher.forget(name)
        teacher.adapt(name, images(1), 1.0)
    for stage in teacher(torch.cat([images(2), images(2)])):
        assert torch.equal(*stage.chunk(2))


def test_it_stays_frozen_and_keeps_activations_of_timms_norms():
    teacher = SiameseBackbone(network("efficientnet_lite0"), ["rgb"]).train()
    assert not any(module.training for module in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    assert any(len(norm.after) > 0 for norm in teacher.norms)
    assert all(isinstance(norm, SplitNorm) for norm in teacher.norms)
    state = {key: t.clone() for key, t in teacher.state_dict().items()}
    teacher(images())
    assert all(torch.equal(t, state[key]) for key, t in teacher.state_dict().items())


def test_a_network_without_batch_norm_says_so(caplog):
    with caplog.at_level(logging.WARNING, logger="polyspect"):
        teacher = SiameseBackbone(network("convnext_atto"), ["rgb", "depth"])
    assert "no batch norm" in caplog.text
    assert teacher.norms == []
