"""The model around a detector: decisions, refusals, the header of its file; and the parts it is fed with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import polyspect as ps
from polyspect.api import HELD_OUT
from polyspect.data.parts import Parts, fingerprint, prefetched
from polyspect.data.preparation import Preparation
from polyspect.data.source import open_reader
from polyspect.data.synthetic import make_part, write_dataset
from polyspect.errors import ConfigError, DataError, ModelFileError
from polyspect.fitting.modelfile import FORMAT, flatten_state, read_header, unflatten_state, write_tensors
from polyspect.model import Model

SETTINGS = {"bank_limit": 100}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    write_dataset(folder, ["bottle_cap"], train=8, validation=5, test_good=2, test_per_defect=1, size=64)
    return folder


@pytest.fixture(scope="module")
def model(root: Path) -> Model:
    where = {"root": root, "category": "bottle_cap"}
    return ps.fit("patchcore", **where, settings=SETTINGS, prepare={"size": 64}, device="cpu")


def test_decisions_follow_the_calibration_scores(model: Model, root: Path):
    scores = np.array(model.calibration.scores)
    for part in ps.predict(model, data="mvtec3d", root=root, category="bottle_cap"):
        assert part.p_value == (1 + np.count_nonzero(scores >= part.score)) / (1 + len(scores))
        assert part.decision == ("reject" if part.score > model.calibration.threshold else "accept")


def test_the_validation_parts_score_as_the_calibration_says(model: Model, root: Path):
    again = [p.score for p in ps.predict(model, data="mvtec3d", root=root, category="bottle_cap", split="validation")]
    assert np.sort(again) == pytest.approx(np.sort(model.calibration.scores), rel=1e-6)


def test_without_calibration_there_is_no_decision(model: Model):
    bare = Model(model.name, model.detector, model.preparation, model.scale)
    result = bare.predict_sample(make_part("bottle_cap", 5, size=64))
    assert (result.p_value, result.decision) == (None, None)
    assert np.isfinite(result.score)


def test_one_sample_is_judged_as_in_a_data_set(model: Model, root: Path):
    reader = open_reader("mvtec3d", root)
    record = reader.records("bottle_cap", "test")[0]
    alone = model.predict_sample(reader.read(record))
    listed = next(iter(ps.predict(model, data="mvtec3d", root=root, category="bottle_cap")))
    assert alone.score == pytest.approx(listed.score, rel=1e-5)
    np.testing.assert_allclose(alone.map, listed.map, rtol=1e-4, atol=1e-4)


def test_a_part_that_lacks_what_is_needed_is_refused(model: Model):
    sample = make_part("bottle_cap", 5, size=64)
    without = replace(sample, images={"rgb": sample.images["rgb"]})
    with pytest.raises(DataError, match="has no 'normals', which this patchcore model needs"):
        model.predict_sample(without)
    blind = replace(
        sample,
        images={name: image if name == "rgb" else np.zeros_like(image) for name, image in sample.images.items()},
        valid=np.zeros_like(sample.valid),
    )
    with pytest.raises(DataError, match="no valid 3D point"):
        model.predict_sample(blind)


def test_a_score_that_is_not_finite_is_refused(model: Model, monkeypatch):
    score = type(model.detector).score

    def broken(self, features):
        prediction = score(self, features)
        return replace(prediction, score=prediction.score * torch.nan)

    monkeypatch.setattr(type(model.detector), "score", broken)
    with pytest.raises(DataError, match=r"score of part .* is not finite"):
        model.predict_sample(make_part("bottle_cap", 5, size=64))


def test_the_header_says_what_made_the_model_and_neither_when_nor_where(model: Model, root: Path, tmp_path: Path):
    header = read_header(model.save(tmp_path / "m.safetensors"))
    assert header["format"] == FORMAT
    assert header["detector"] == "patchcore"
    assert header["config"]["bank_limit"] == 100
    assert header["preparation"]["size"] == 64
    assert header["calibration"]["false_reject"] == 0.05
    assert header["data"]["train"] == 8
    assert len(header["data"]["fingerprint"]) == 64
    assert len(header["weights"]["backbone"]["sha256"]) == 64
    assert {"polyspect", "torch", "timm", "numpy", "python"} <= set(header["versions"])
    assert str(root) not in json.dumps(header)
    assert str(Path.home()) not in json.dumps(header)


def test_files_that_are_no_models_are_refused(tmp_path: Path):
    with pytest.raises(ModelFileError, match="no model file at"):
        Model.load(tmp_path / "absent.safetensors")
    from safetensors.torch import save_file

    save_file({"x": torch.ones(2)}, tmp_path / "foreign.safetensors")
    with pytest.raises(ModelFileError, match="not a polyspect model"):
        Model.load(tmp_path / "foreign.safetensors")
    write_tensors(tmp_path / "c.checkpoint", {"x": torch.ones(2)}, {"format": FORMAT, "checkpoint": "abc"})
    with pytest.raises(ModelFileError, match="checkpoint of an unfinished fit"):
        Model.load(tmp_path / "c.checkpoint")
    write_tensors(tmp_path / "old.safetensors", {"x": torch.ones(2)}, {"format": 99})
    with pytest.raises(ModelFileError, match="format 99"):
        Model.load(tmp_path / "old.safetensors")


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD, torch.optim.AdamW])
def test_an_optimizer_survives_the_checkpoint(kind):
    layer = torch.nn.Linear(3, 2)
    optimizer = kind([{"params": [layer.weight], "lr": 0.1}, {"params": [layer.bias], "lr": 0.2}], lr=0.3)
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    tensors, plain = flatten_state(optimizer.state_dict(), "o")
    fresh = kind([{"params": [layer.weight]}, {"params": [layer.bias]}], lr=0.5)
    fresh.load_state_dict(unflatten_state(tensors, json.loads(json.dumps(plain)), "o"))
    assert [group["lr"] for group in fresh.param_groups] == [0.1, 0.2]
    old, new = optimizer.state_dict()["state"], fresh.state_dict()["state"]
    assert old.keys() == new.keys()
    for index in old:
        for key, value in old[index].items():
            same = torch.equal(value, new[index][key]) if isinstance(value, torch.Tensor) else value == new[index][key]
            assert same


# -- splits and parts ------------------------------------------------------------------------------------------------


def test_without_validation_split_parts_are_held_out(root: Path, tmp_path: Path, caplog):
    import shutil

    copy = Path(shutil.copytree(root, tmp_path / "parts"))
    shutil.rmtree(copy / "bottle_cap" / "validation")
    where = {"root": copy, "category": "bottle_cap", "settings": SETTINGS, "prepare": {"size": 64}}
    first, second = ps.fit("patchcore", **where, seed=1), ps.fit("patchcore", **where, seed=1)
    assert first.info["data"]["validation"] == round(HELD_OUT * 8)
    assert first.info["data"]["train"] == 8 - round(HELD_OUT * 8)
    assert "held out by seed 1" in first.calibration.source
    assert first.info["data"]["fingerprint"] == second.info["data"]["fingerprint"]
    assert "no validation split" in caplog.text
    with pytest.raises(DataError, match="at least two good parts"):
        ps.fit("patchcore", **where, max_train=1)
    with pytest.raises(ConfigError, match="max_train is 0"):
        ps.fit("patchcore", **where, max_train=0)


def test_parts_know_what_they_are_made_of(root: Path):
    reader = open_reader("mvtec3d", root)
    records = reader.records("bottle_cap", "train")
    small, large = Preparation(size=64), Preparation(size=96)
    parts = Parts(reader, records, small, modalities=("rgb", "normals"))
    assert len(set(parts.keys())) == len(parts) == 8
    assert parts.keys() != Parts(reader, records, large).keys()
    assert fingerprint(records) == fingerprint(list(reversed(records))) != fingerprint(records[:-1])
    batch = parts.batch([2, 0])
    assert list(batch.images) == ["rgb", "normals"]
    assert batch.ids == (records[2].id, records[0].id)
    seen = [index for group, _, _ in prefetched(parts, 3) for index in group]
    assert seen == list(range(8))
    with pytest.raises(DataError, match="has no 'depthh'"):
        Parts(reader, records, small, modalities=("depthh",)).check()
    with pytest.raises(ConfigError, match="expected 'raise' or 'skip'"):
        Parts(reader, records, small, on_error="ignore")  # type: ignore[arg-type]


def test_predicting_needs_to_know_what(model: Model, root: Path):
    with pytest.raises(ConfigError, match="files of one part"):
        ps.predict(model)
    with pytest.raises(ConfigError, match="needs its root and a category"):
        ps.predict(model, data="mvtec3d", root=root)
