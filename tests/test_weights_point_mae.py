"""The official Point-MAE checkpoint under our names: all of it used, or dropped by a rule."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from golden import filled_state, learned
from polyspect.backbones.point_transformer import PointTransformer
from polyspect.errors import WeightsError
from polyspect.weights.point_mae import SHA256, point_bert_state, point_mae_state
from published_networks import POINT_BERT, POINT_MAE, POINT_MAE_ENCODER


@pytest.fixture(scope="module")
def encoder():
    return filled_state(POINT_MAE_ENCODER)


@pytest.fixture(scope="module")
def whole(encoder):
    rest = filled_state({name: shape for name, shape in POINT_MAE.items() if not name.startswith("MAE_encoder.")})
    return {name: rest[name] if name in rest else encoder[name.removeprefix("MAE_encoder.")] for name in POINT_MAE}


@pytest.fixture(scope="module")
def network():
    with torch.device("meta"):
        return PointTransformer()


def test_the_made_up_file_is_as_large_as_the_published_one(whole):
    assert len(POINT_MAE_ENCODER) == 156
    assert learned(whole) == 29_006_432
    assert len(SHA256) == 64


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("wrapped", [True, False])
def test_the_whole_file_gives_the_encoder(whole, encoder, network, prefix, wrapped):
    state = {prefix + name: tensor for name, tensor in whole.items()}
    content = {"base_model": state, "optimizer": {"state": {}}, "epoch": 300, "metrics": {}} if wrapped else state
    got = point_mae_state(content, network)
    assert list(got) == list(network.state_dict())
    expected = [x for name, x in encoder.items() if not name.endswith("batches_tracked")]
    assert sum(x.numel() for x in got.values()) == sum(x.numel() for x in expected)
    assert_close(got["encoder.joint1.weight"], encoder["encoder.second_conv.0.weight"][:, :, 0], rtol=0, atol=0)
    assert torch.equal(got["encoder.norm1.var"], encoder["encoder.first_conv.1.running_var"])
    assert torch.equal(got["encoder.norm2.bias"], encoder["encoder.second_conv.1.bias"])
    assert torch.equal(got["blocks.11.mlp_norm.weight"], encoder["blocks.blocks.11.norm2.weight"])
    PointTransformer().load_state_dict(got)


def test_the_encoder_alone_is_enough(encoder, network):
    assert list(point_mae_state(encoder, network)) == list(network.state_dict())


def test_blocks_that_the_network_lacks_are_dropped(encoder):
    short = PointTransformer((1, 3))
    short.load_state_dict(point_mae_state(encoder, short))
    assert torch.equal(short.blocks[3].qkv.weight, encoder["blocks.blocks.3.attn.qkv.weight"])


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("norm.weight", "norm.weight"),
        ("encoder.first_conv.1.running_var", "encoder.norm1.var"),
        ("blocks.blocks.7.attn.proj.bias", "blocks.7.projection.bias"),
    ],
)
def test_a_missing_tensor_is_named(whole, network, name, named):
    state = {key: x for key, x in whole.items() if key != f"MAE_encoder.{name}"}
    with pytest.raises(WeightsError, match=f"nothing for '{named}'"):
        point_mae_state(state, network)


@pytest.mark.parametrize("name", ["cls_token", "blocks.blocks.12.norm1.weight", "blocks.blocks.0.attn.qkv.bias"])
def test_a_left_over_tensor_is_named(whole, network, name):
    with pytest.raises(WeightsError, match=f"'{name}'"):
        point_mae_state(whole | {f"MAE_encoder.{name}": torch.zeros(384)}, network)


def test_a_tensor_outside_the_published_network_is_named(whole, network):
    with pytest.raises(WeightsError, match=r"'cls_head\.weight', which is no part of Point-MAE"):
        point_mae_state(whole | {"cls_head.weight": torch.zeros(3)}, network)


def test_a_wrong_shape_a_wrong_kind_and_damage_are_named(encoder, network):
    with pytest.raises(WeightsError, match=r"'norm\.weight' has shape \(256,\), the network needs \(384,\)"):
        point_mae_state(encoder | {"norm.weight": torch.zeros(256)}, network)
    wide = {"encoder.first_conv.3.weight": torch.zeros(256, 128, 3)}
    with pytest.raises(WeightsError, match=r"'encoder\.local2\.weight' has shape \(256, 128, 3\), the network needs"):
        point_mae_state(encoder | wide, network)
    with pytest.raises(WeightsError, match=r"'norm\.weight' is of type torch\.int64"):
        point_mae_state(encoder | {"norm.weight": torch.zeros(384, dtype=torch.int64)}, network)
    with pytest.raises(WeightsError, match=r"'norm\.weight' holds numbers that are not finite"):
        point_mae_state(encoder | {"norm.weight": torch.full((384,), torch.nan)}, network)


@pytest.mark.parametrize("content", [None, {}, {"base_model": {}}, {"epoch": 3}])
def test_what_holds_no_tensors_is_refused(network, content):
    with pytest.raises(WeightsError, match=r"expected (tensors by name|a tensor)"):
        point_mae_state(content, network)


# -- Point-BERT --------------------------------------------------------------------------------------------------------


def point_bert(**changed):
    return {"base_model": {f"module.{name}": x for name, x in (filled_state(POINT_BERT) | changed).items()}}


def test_point_bert_has_the_published_size_and_every_tensor_is_used():
    network = PointTransformer(size="bert")
    assert sum(p.numel() for p in network.parameters()) == 21_858_816
    state = filled_state(POINT_BERT)
    got = point_bert_state(point_bert(), network)
    network.load_state_dict(got)
    assert torch.equal(got["class_position"], state["transformer_q.cls_pos"])
    assert torch.equal(got["reduce.weight"], state["transformer_q.reduce_dim.weight"])
    assert got["encoder.joint2.weight"].shape == (256, 512)


def test_point_bert_puts_a_class_token_before_the_groups_and_drops_it():
    network = PointTransformer((0, 1), size="bert").eval()
    network.load_state_dict(point_bert_state(point_bert(), network))
    generator = torch.Generator().manual_seed(0)
    groups, centres = torch.randn(2, 5, 4, 3, generator=generator), torch.randn(2, 5, 3, generator=generator)
    with torch.no_grad():
        tokens = network.reduce(network.encoder.plain(groups))
        h = torch.cat([network.class_token.expand(2, 1, -1), tokens], dim=1)
        position = torch.cat([network.class_position.expand(2, 1, -1), network.position(centres)], dim=1)
        expected = []
        for block in network.blocks:
            h = block(h + position, True)
            expected.append(network.norm(h)[:, 1:])
        found = network(groups, centres)
    assert_close(found, torch.cat(expected, dim=-1), rtol=1e-4, atol=1e-4)


def test_a_point_bert_tensor_that_is_missing_unknown_or_misshapen_is_named():
    with torch.device("meta"):
        network = PointTransformer(size="bert")
    state = filled_state(POINT_BERT)
    with pytest.raises(WeightsError, match="nothing for 'class_token'"):
        point_bert_state({n: x for n, x in state.items() if n != "transformer_q.cls_token"}, network)
    with pytest.raises(WeightsError, match=r"has 'odd_token', for which"):
        point_bert_state(point_bert(**{"transformer_q.odd_token": torch.zeros(1)}), network)
    with pytest.raises(WeightsError, match=r"'reduce\.weight' has shape \(384, 384\)"):
        point_bert_state(point_bert(**{"transformer_q.reduce_dim.weight": torch.zeros(384, 384)}), network)
    with pytest.raises(WeightsError, match=r"no tensor under 'transformer_q\.'"):
        point_bert_state(filled_state({"MAE_encoder.norm.weight": (3,)}), network)
