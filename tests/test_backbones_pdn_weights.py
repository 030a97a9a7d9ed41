"""Patch description networks by name: what comes with polyspect, what must be supplied, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from golden import filled_state
from polyspect.backbones.image import ImageBackbone
from polyspect.backbones.patch_description import PatchDescription
from polyspect.backbones.pdn_weights import DEFAULT_PATCH_NETWORK, PATCH_NETWORKS, load_patch_description
from polyspect.data.made_up_images import MadeUpImages
from polyspect.errors import ConfigError, WeightsError
from polyspect.weights import KNOWN, check, list_weights
from polyspect.weights.resolve import FOLDER_VARIABLE
from published_networks import pdn


@pytest.fixture(autouse=True)
def bare_machine(monkeypatch, tmp_path):
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "none"))


def own_file(path, size="small", **about):
    network = PatchDescription(size)
    header = {"patch_description": {"size": size, "outputs": 384, "made": {"updates": 7}} | about}
    state = {name: tensor.half() for name, tensor in network.state_dict().items()}
    save_file(state, path, metadata={"polyspect": json.dumps(header)})
    return state


def test_the_default_comes_with_polyspect_and_says_how_it_was_made():
    loaded = load_patch_description()
    assert DEFAULT_PATCH_NETWORK == "pdn_small"
    assert loaded.source["source"] == "shipped"
    assert loaded.source["sha256"] == KNOWN["pdn_small"].files["pdn_small.safetensors"]
    assert (loaded.network.size, loaded.network.outputs, loaded.network.padding) == ("small", 384, False)
    assert [source["source"] for source in loaded.made["pictures"]] == ["folder", "made up"]
    losses = [loss for _, loss in loaded.made["curve"]]
    assert losses[-1] < 0.8 * losses[0]
    untrained = load_patch_description(weights="random").network
    for (name, a), b in zip(loaded.network.named_parameters(), untrained.parameters()):
        assert a.dtype == torch.float32
        assert not torch.equal(a, b), name


def test_its_answers_have_the_statistics_of_what_it_learned():
    """Mean near 0 and deviation below 1, as a regression onto standardised targets gives; random ones have neither."""
    source = MadeUpImages(20, seed=7, size=128)
    image = torch.stack([torch.tensor(source.picture(i)) for i in range(20)]).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        answers = load_patch_description().network(image)  # 20 384 24 24
    deviation = answers.transpose(0, 1).flatten(1).std(1)
    assert float(answers.mean((0, 2, 3)).abs().mean()) < 0.4
    assert 0.2 < float(deviation.mean()) < 1.1
    assert float(deviation.min()) > 0.05  # no channel is dead


def test_it_is_listed_checked_and_small():
    file = check("pdn_small")
    assert file.path.stat().st_size < 8e6
    rows = {row.name: row for row in list_weights()}
    assert rows["pdn_small"].available
    assert rows["pdn_small"].where.startswith("shipped: ")
    assert not rows["pdn_small_efficientad"].available
    assert "pretrained_teacher_small.pth" in rows["pdn_small_efficientad"].where


def test_random_weights_depend_on_the_seed_alone_and_have_no_hash():
    before = torch.random.get_rng_state()
    a, b, c = (load_patch_description(weights="random", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert a.source == {"name": "pdn_small", "source": "random", "sha256": ""}
    assert torch.equal(a.network.convolutions[0].weight, b.network.convolutions[0].weight)
    assert not torch.equal(a.network.convolutions[0].weight, c.network.convolutions[0].weight)
    assert not a.network.training
    assert not any(p.requires_grad for p in a.network.parameters())
    assert load_patch_description(pretrained=False).source["source"] == "none"
    assert load_patch_description(pretrained=False, padding=True).network.padding


@pytest.mark.parametrize("size", ["small", "medium"])
@pytest.mark.parametrize("file", ["pretrained_teacher_{}.pth", "teacher_{}.pth"])
def test_the_published_files_are_found_in_the_weight_folder(monkeypatch, tmp_path, size, file):
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    state, name = filled_state(pdn(size)), f"pdn_{size}_efficientad"
    with pytest.raises(WeightsError, match=f"Put pretrained_teacher_{size}.pth into"):
        load_patch_description(name)
    torch.save(state, tmp_path / file.format(size))
    loaded = load_patch_description(name)
    assert (loaded.source["source"], loaded.network.size, dict(loaded.made)) == ("folder", size, {})
    assert torch.equal(loaded.network.convolutions[0].weight, state["conv1.weight"])
    if size == "medium":
        with pytest.raises(WeightsError, match="use that backbone name"):
            load_patch_description("pdn_small", weights=str(tmp_path / file.format(size)))


def test_a_file_of_our_own_says_what_it_holds(tmp_path):
    path = tmp_path / "own.safetensors"
    state = own_file(path)
    loaded = load_patch_description(weights=str(path))
    assert loaded.made == {"updates": 7}
    assert loaded.source["source"] == "file"
    assert len(loaded.source["sha256"]) == 64
    for name, tensor in loaded.network.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, state[name].float())
    with pytest.raises(WeightsError, match="size 'small' with 384 outputs, but 'pdn_medium_efficientad' is of size"):
        load_patch_description("pdn_medium_efficientad", weights=str(path))


def test_names_and_files_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="pdn_small"):
        load_patch_description("pdn_smal")
    with pytest.raises(ConfigError, match="load_patch_description"):
        ImageBackbone("pdn_small")
    torch.save(filled_state(pdn("small")), tmp_path / "my.pth")
    with pytest.raises(WeightsError, match="no header"):
        load_patch_description(weights=str(tmp_path / "my.pth"))
    assert load_patch_description("pdn_small_efficientad", weights=str(tmp_path / "my.pth")).source["source"] == "file"
    path = tmp_path / "x.safetensors"
    own_file(path, outputs=768)
    with pytest.raises(WeightsError, match="768 outputs"):
        load_patch_description(weights=str(path))
    save_file({"a": torch.zeros(1)}, path, metadata={"polyspect": '{"patch_description": {"size": "small"}}'})
    with pytest.raises(WeightsError, match="does not say the network's outputs"):
        load_patch_description(weights=str(path))


def test_every_name_is_a_known_set_of_weights():
    assert {name for name, entry in KNOWN.items() if entry.kind == "patches"} == set(PATCH_NETWORKS)
