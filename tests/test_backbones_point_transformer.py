"""The Point-MAE encoder against stored outputs, its written-out form, hand values and invariances."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from golden import Golden, filled_state, parameters
from polyspect.backbones.point_transformer import Block, GroupEncoder, PointTransformer
from polyspect.errors import ConfigError, ShapeError
from polyspect.weights.point_mae import point_mae_state
from published_networks import POINT_MAE_ENCODER

MODES = ("cloud", "stored")
LAYERS = (0, 1)  # of the small networks here


def clouds(B=1, G=12, M=9, seed=0, scale=0.1) -> tuple[Tensor, Tensor]:
    """Groups (B, G, M, 3), the centre itself first, and centres (B, G, 3)."""
    generator = torch.Generator().manual_seed(seed)
    groups = scale * torch.randn(B, G, M, 3, generator=generator)
    groups[:, :, 0] = 0
    return groups, torch.randn(B, G, 3, generator=generator)


@cache
def published() -> dict[str, Tensor]:
    """The published encoder's tensors, as the stored runs filled them; nobody changes them."""
    return filled_state(POINT_MAE_ENCODER)


def network(layers=LAYERS, **options) -> PointTransformer:
    """A network in eval mode whose every tensor, statistics included, is far from its initial value."""
    net = PointTransformer(layers, **options).eval()
    net.load_state_dict(point_mae_state(published(), net))
    return net


def difference(got: Tensor, expected: Tensor) -> float:
    """Largest difference in standard deviations."""
    return float((got - expected).abs().max() / expected.std())


# -- stored outputs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["fast", "plain"])
def test_features_with_stored_statistics_equal_the_official_code(form):
    groups, golden = Golden("01_group.npz"), Golden("02_point_transformer.npz")
    net = network((3, 7, 11), statistics="stored")
    inputs = groups.tensor("neighborhood")[None], groups.tensor("centers")[None]
    with torch.no_grad():
        golden.check(
            "group_tokens", net.encoder(inputs[0])[0] if form == "fast" else net.encoder.plain(inputs[0])[0], 5e-5
        )
        golden.check("pos_embed", net.position(inputs[1])[0], 5e-5)
        features = (net if form == "fast" else net.plain)(*inputs)[0].T  # C G
        golden.check("features", features, 5e-5)
        golden.check("features_first4", features[:, :4], 5e-5)
        golden.check("cfm_features", features, 5e-5)
        for layer, output in zip((3, 7, 11), net.block_outputs(*inputs)):
            golden.check(f"block{layer}", output[0], 5e-5)
        golden.check("cmdiad_features", network((3, 11), statistics="stored")(*inputs)[0].T, 5e-5)


@pytest.mark.parametrize("form", ["fast", "plain"])
def test_features_with_the_clouds_statistics_equal_the_official_code(form):
    groups, golden = Golden("01_group.npz"), Golden("02_point_transformer.npz")
    net = network((3, 7, 11))
    inputs = groups.tensor("neighborhood")[None], groups.tensor("centers")[None]
    with torch.no_grad():
        tokens = net.encoder(inputs[0]) if form == "fast" else net.encoder.plain(inputs[0])
        golden.check("batchstat_group_tokens", tokens[0], 5e-5)
        golden.check("batchstat_features", (net if form == "fast" else net.plain)(*inputs)[0].T, 5e-5)


def test_parameter_counts():
    net = PointTransformer()
    assert parameters(net) == 21_825_024
    assert parameters(net.encoder) == 494_464
    assert parameters(net.position) == 50_048
    assert {parameters(block) for block in net.blocks} == {1_773_312}
    assert parameters(PointTransformer((1, 4, 7))) == 21_825_024 - 4 * 1_773_312
    assert net.channels == 1152


# -- the fast form -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("statistics", MODES)
@pytest.mark.parametrize("chunk", [1, 20, 100_000])
def test_fast_form_equals_the_plain_one(statistics, chunk):
    net, inputs = network(statistics=statistics, chunk=chunk), clouds(B=2, scale=0.004)
    with torch.no_grad():
        assert difference(net(*inputs), net.plain(*inputs)) < 1e-5
        assert_close(net.encoder(inputs[0]), net.encoder.plain(inputs[0]), rtol=1e-5, atol=1e-5)
        net, inputs = net.double(), [x.double() for x in inputs]
        assert difference(net(*inputs), net.plain(*inputs)) < 1e-12


@pytest.mark.parametrize("statistics", MODES)
def test_fast_and_plain_form_have_the_same_gradients(statistics):
    net, (groups, centres) = network(statistics=statistics, chunk=20).double(), clouds()
    gradients = []
    for form in (net, net.plain):
        inputs = groups.double().requires_grad_(), centres.double().requires_grad_()
        net.zero_grad()
        form(*inputs).square().mean().backward()
        gradients.append([x.grad.clone() for x in (*inputs, *net.parameters()) if x.grad is not None])
        assert len(gradients[-1]) == 2 + len(list(net.parameters()))
    for fast, plain in zip(*gradients):
        assert_close(fast, plain, rtol=1e-7, atol=1e-12)


def test_eval_mode_takes_the_fast_form_and_train_mode_the_plain_one(monkeypatch):
    net, inputs = network(), clouds()
    monkeypatch.setattr(GroupEncoder, "plain", lambda self, groups: pytest.fail("plain"))
    net(*inputs)
    with pytest.raises(pytest.fail.Exception, match="plain"):
        net.train()(*inputs)


# -- what it computes --------------------------------------------------------------------------------------------------


def test_token_equals_eqs_1_and_2_written_as_loops():
    net, (groups, _) = network(statistics="stored").encoder.double(), clouds(G=3, M=4)

    def norm(layer, x):
        return (x - layer.mean) / (layer.var + 1e-5).sqrt() * layer.weight + layer.bias

    with torch.no_grad():
        tokens = net(groups.double())[0]
        for group, token in zip(groups[0].double(), tokens):
            ys = [net.local2(F.relu(norm(net.norm1, net.local1(x)))) for x in group]
            top = torch.stack(ys).max(0).values
            ts = [net.joint2(F.relu(norm(net.norm2, net.joint1(torch.cat([top, y]))))) for y in ys]
            assert_close(token, torch.stack(ts).max(0).values)


def test_attention_equals_its_definition():
    torch.manual_seed(0)
    block, h = Block().double(), torch.randn(1, 5, 384, dtype=torch.float64)
    with torch.no_grad():
        q, k, v = block.qkv(block.attention_norm(h))[0].split(384, dim=1)  # G 384 each
        heads = []
        for part in range(6):
            own = slice(64 * part, 64 * part + 64)
            heads.append(torch.softmax(q[:, own] @ k[:, own].T / 8, dim=1) @ v[:, own])
        attended = h + block.projection(torch.cat(heads, dim=1))
        expected = attended + block.mlp(block.mlp_norm(attended))
        assert_close(block(h), expected)
        assert_close(block(h, plain=True), expected)


def test_position_is_added_before_every_block():
    net, inputs = network(), clouds()
    with torch.no_grad():
        h, position = net.encoder(inputs[0]), net.position(inputs[1])
        for block, output in zip(net.blocks, net.block_outputs(*inputs)):
            h = block(h + position)
            assert_close(output, h)


def test_each_layers_features_come_from_the_final_norm():
    net = network()
    with torch.no_grad():
        net.norm.weight.fill_(1)
        net.norm.bias.zero_()
        for part in net(*clouds()).split(384, dim=-1):
            assert_close(part.mean(-1), torch.zeros(1, 12), rtol=0, atol=1e-5)
            assert_close(part.var(-1, correction=0), torch.ones(1, 12), rtol=0, atol=1e-4)


@pytest.mark.parametrize("statistics", MODES)
def test_order_of_points_does_not_matter_and_order_of_groups_carries_over(statistics):
    net, (groups, centres) = network(statistics=statistics), clouds(scale=1)
    generator = torch.Generator().manual_seed(1)
    points, order = torch.randperm(9, generator=generator), torch.randperm(12, generator=generator)
    with torch.no_grad():
        expected = net(groups, centres)
        assert difference(net(groups[:, :, points], centres), expected) < 1e-4
        assert difference(net(groups[:, order], centres[:, order]), expected[:, order]) < 1e-4


@pytest.mark.parametrize("statistics", MODES)
def test_a_cloud_does_not_see_its_neighbours_in_the_batch(statistics):
    net, (groups, centres) = network(statistics=statistics), clouds(B=3)
    groups[1] *= 20  # so that shared statistics would show
    with torch.no_grad():
        together = net(groups, centres)
        assert torch.equal(together, net(groups, centres))
        for index in range(3):
            alone = net(groups[index : index + 1], centres[index : index + 1])
            assert_close(together[index : index + 1], alone, rtol=1e-5, atol=1e-5)
            plain = net.plain(groups, centres)[index : index + 1]
            assert_close(plain, net.plain(groups[index : index + 1], centres[index : index + 1]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("train", [False, True])
def test_statistics_are_never_updated(train):
    net = network().train(train)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    net(*clouds())
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_clouds_statistics_keep_groups_in_metres_apart():
    """The reason for the default: stored statistics, of unit-sphere clouds, flatten groups of millimetres."""
    groups, _ = clouds(G=64, M=32, scale=0.003)
    with torch.no_grad():
        spread = {}
        for statistics in MODES:
            tokens = network(statistics=statistics).encoder(groups)[0]
            spread[statistics] = float(tokens.std(0).norm() / tokens.mean(0).norm())
    assert spread["cloud"] > 0.1 > 3 * spread["stored"], spread


# -- arguments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [(), (3, 3), (7, 3), (-1,), (12,)])
def test_impossible_layers_are_refused(layers):
    with pytest.raises(ConfigError, match="ascending block numbers from 0 to 11"):
        PointTransformer(layers)


def test_unknown_statistics_and_empty_chunks_are_refused():
    with pytest.raises(ConfigError, match="'cloud' or 'stored', got 'batch'"):
        PointTransformer(statistics="batch")
    with pytest.raises(ConfigError, match="`chunk` must be at least 1"):
        PointTransformer(chunk=0)


def test_shapes_must_fit_each_other():
    net, (groups, centres) = network((0,)), clouds()
    with pytest.raises(ShapeError, match="centres"):
        net(groups, centres[:, :-1])
    with pytest.raises(ShapeError, match="groups"):
        net(groups[0], centres)
