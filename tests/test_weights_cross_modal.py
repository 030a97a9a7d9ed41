"""Published fusion, hallucination and mapping files under our names: all of it used, or dropped by a rule."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from golden import filled_state
from polyspect.errors import WeightsError
from polyspect.layers.feature_fusion import FeatureFusion
from polyspect.layers.feature_mapping import FeatureMapping
from polyspect.layers.hallucination import (
    ConvHallucination,
    FeaturesFromImage,
    ImageHallucination,
    PatchHallucination,
    PatchImageHallucination,
)
from polyspect.weights import cross_modal
from published_networks import f2f_conv, f2f_mlp, f2i_conv, f2i_mlp, fusion, i2f, mapping

# name -> file, network, converter, start of the names that are dropped
CASES = {
    "fusion": (fusion(), FeatureFusion, cross_modal.feature_fusion_state, ()),
    "f2f_mlp": (
        f2f_mlp(2),
        partial(PatchHallucination, depth=2),
        partial(cross_modal.patch_hallucination_state, source="xyz"),
        ("rgb_",),
    ),
    "f2f_conv": (
        f2f_conv(6),
        partial(ConvHallucination, 6),
        partial(cross_modal.conv_hallucination_state, source="rgb"),
        ("xyz_",),
    ),
    "f2i_conv": (f2i_conv(), ImageHallucination, cross_modal.image_hallucination_state, ("norm.",)),
    "f2i_mlp": (f2i_mlp(), PatchImageHallucination, cross_modal.patch_image_hallucination_state, ()),
    "i2f": (i2f(), FeaturesFromImage, cross_modal.features_from_image_state, ("layer4.",)),
    "mapping": (mapping(6, 4), partial(FeatureMapping, 6, 4), cross_modal.feature_mapping_state, ()),
    "big": (mapping(6, 4, big=True), partial(FeatureMapping, 6, 4, 5), cross_modal.feature_mapping_state, ()),
}


@pytest.fixture(params=CASES)
def case(request):
    shapes, build, convert, dropped = CASES[request.param]
    with torch.device("meta"):
        network = build()
    return filled_state(shapes), network, partial(convert, network=network), dropped


def test_every_tensor_is_used_once_or_dropped_by_a_rule(case):
    state, network, convert, dropped = case
    kept = {name: tensor for name, tensor in state.items() if not name.startswith(dropped or ("-",))}
    got = convert({"model": state, "epoch": 3})
    assert list(got) == list(network.state_dict())
    assert len(got) == len(kept)
    assert {id(tensor) for tensor in got.values()} == {id(tensor) for tensor in kept.values()}
    network.load_state_dict(got, assign=True)


def test_missing_left_over_and_misshapen_tensors_are_named(case):
    state, _, convert, dropped = case
    name = next(name for name in state if not name.startswith(dropped or ("-",)))
    with pytest.raises(WeightsError, match="has nothing for"):
        convert({key: tensor for key, tensor in state.items() if key != name})
    with pytest.raises(WeightsError, match=r"'extra\.weight', for which"):
        convert(state | {"extra.weight": torch.zeros(2)})
    with pytest.raises(WeightsError, match=r"has shape \(3, 2, 1, 1\)"):
        convert(state | {name: torch.zeros(3, 2, 1, 1)})


@pytest.mark.parametrize("source", ["xyz", "rgb"])
def test_each_direction_is_taken_under_its_source(source):
    state = filled_state(f2f_mlp())
    net = PatchHallucination()
    net.load_state_dict(cross_modal.patch_hallucination_state(state, net, source))
    assert torch.equal(net.layers[1].weight, state[f"{source}_mlp.mlp_module.0.fc2.weight"])


def test_a_deeper_file_is_refused():
    with pytest.raises(WeightsError, match=r"xyz_mlp\.mlp_module\.1\.fc1\.weight"):
        cross_modal.patch_hallucination_state(filled_state(f2f_mlp(2)), PatchHallucination(), "xyz")


def test_the_other_direction_and_the_other_variant_of_a_mapping_are_refused():
    base, big = filled_state(mapping(6, 4)), filled_state(mapping(6, 4, big=True))
    with pytest.raises(WeightsError, match=r"'input\.weight' has shape \(5, 6\), the network needs \(5, 4\)"):
        cross_modal.feature_mapping_state(base, FeatureMapping(4, 6))
    with pytest.raises(WeightsError, match=r"'projection_b\.weight', 'projection_b\.bias'"):
        cross_modal.feature_mapping_state(big, FeatureMapping(6, 4))
    with pytest.raises(WeightsError, match=r"nothing for 'hidden\.1\.weight'"):
        cross_modal.feature_mapping_state(base, FeatureMapping(6, 4, 5))
    with pytest.raises(WeightsError, match=r"'projection_a\.weight'"):
        cross_modal.feature_mapping_state(base | big, FeatureMapping(6, 4, 5))
