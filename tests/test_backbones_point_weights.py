"""Point backbones by name: what comes with polyspect, what must be supplied, and what is refused."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from golden import filled_state
from polyspect.backbones.image import ImageBackbone
from polyspect.backbones.point_transformer import PointTransformer
from polyspect.backbones.point_weights import DEFAULT_POINT_BACKBONE, POINT_BACKBONES, load_point_transformer
from polyspect.errors import ConfigError, WeightsError
from polyspect.weights import KNOWN, check, list_weights
from polyspect.weights.resolve import FOLDER_VARIABLE
from published_networks import POINT_BERT, POINT_MAE_ENCODER


@pytest.fixture(autouse=True)
def bare_machine(monkeypatch, tmp_path):
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "none"))


def test_the_default_comes_with_polyspect_and_says_how_it_was_made():
    loaded = load_point_transformer()
    assert DEFAULT_POINT_BACKBONE == "point_mae_small"
    assert loaded.source["source"] == "shipped"
    assert loaded.source["sha256"] == KNOWN["point_mae_small"].files["point_mae_small.safetensors"]
    assert (loaded.frame, loaded.network.size, loaded.network.layers) == ("unit", "small", (2, 5, 7))
    assert loaded.made["clouds"]["source"] == "shapes"
    assert not loaded.network.training
    assert not any(p.requires_grad for p in loaded.network.parameters())
    untrained = load_point_transformer(weights="random").network
    for (name, a), b in zip(loaded.network.named_parameters(), untrained.parameters()):
        assert a.dtype == torch.float32
        assert not torch.equal(a, b), name


def test_it_is_listed_checked_and_small():
    file = check("point_mae_small")
    assert file.path.stat().st_size < 8e6
    rows = {row.name: row for row in list_weights()}
    assert rows["point_mae_small"].available
    assert rows["point_mae_small"].where.startswith("shipped: ")
    assert not rows["point_mae"].available
    assert "pointmae_pretrain.pth" in rows["point_mae"].where


def test_random_weights_depend_on_the_seed_alone_and_have_no_hash():
    before = torch.random.get_rng_state()
    a, b, c = (load_point_transformer(weights="random", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert a.source == {"name": "point_mae_small", "source": "random", "sha256": ""}
    assert torch.equal(a.network.blocks[0].qkv.weight, b.network.blocks[0].qkv.weight)
    assert not torch.equal(a.network.blocks[0].qkv.weight, c.network.blocks[0].qkv.weight)
    assert load_point_transformer(pretrained=False).source["source"] == "none"


@pytest.mark.parametrize("file", ["pointmae_pretrain.pth", "pretrain.pth"])
def test_the_published_file_is_found_in_the_weight_folder_and_its_hash_verified(monkeypatch, tmp_path, file):
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    torch.save({"base_model": {"MAE_encoder.x": torch.zeros(1)}}, tmp_path / file)
    with pytest.raises(WeightsError, match="expected 27ded932"):
        load_point_transformer("point_mae")


def test_an_encoder_with_the_published_names_is_taken_as_a_named_file(tmp_path):
    state = filled_state(POINT_MAE_ENCODER)
    torch.save({"base_model": {f"module.MAE_encoder.{name}": x for name, x in state.items()}}, tmp_path / "my.pth")
    loaded = load_point_transformer("point_mae", weights=str(tmp_path / "my.pth"))
    assert (loaded.frame, loaded.source["source"]) == ("camera", "file")
    assert torch.equal(loaded.network.norm.weight, state["norm.weight"])
    assert loaded.network.layers == (3, 7, 11)
    with pytest.raises(WeightsError, match="no header"):
        load_point_transformer("point_mae_small", weights=str(tmp_path / "my.pth"))


def test_point_bert_is_taken_as_a_named_file(tmp_path):
    torch.save({"base_model": filled_state(POINT_BERT)}, tmp_path / "my.pth")
    loaded = load_point_transformer("point_bert", weights=str(tmp_path / "my.pth"))
    assert (loaded.frame, loaded.network.size, loaded.network.layers) == ("camera", "bert", (3, 7, 11))
    assert torch.equal(loaded.network.norm.weight, filled_state(POINT_BERT)["transformer_q.norm.weight"])


def test_names_layers_and_files_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="point_mae"):
        load_point_transformer("point_mea")
    with pytest.raises(ConfigError, match="0 to 7"):
        load_point_transformer(layers=(3, 8))
    with pytest.raises(ConfigError, match="statistics='cloud'"):
        load_point_transformer(statistics="stored")
    with pytest.raises(ConfigError, match="takes no images"):
        ImageBackbone("point_mae_small")
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(1)}, path, metadata={"polyspect": '{"point_transformer": {"size": "tiny"}}'})
    with pytest.raises(WeightsError, match="size 'tiny'"):
        load_point_transformer(weights=str(path))


def test_every_name_is_a_known_set_of_weights():
    assert {name for name, entry in KNOWN.items() if entry.kind == "points"} == set(POINT_BACKBONES)
    with torch.device("meta"):
        for entry in POINT_BACKBONES.values():
            PointTransformer(size=entry.size)
