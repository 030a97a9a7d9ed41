"""The contract suite: every registered detector is held to it by being registered. No method is known by name."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from polyspect.data.preparation import Preparation
from polyspect.detectors import DETECTORS, describe, detector_class
from polyspect.detectors.contract import Detector, Observe, Optimise, configure
from polyspect.errors import ConfigError, DataError, ModelFileError, NotFittedError
from polyspect.fitting.engine import Engine, EngineConfig
from polyspect.metrics import auroc
from polyspect.model import Model
from tiny import TinyParts, blinded, take, tiny_batch

TRAIN, VALIDATION = TinyParts(range(12)), TinyParts(range(100, 104))
SHORT = {  # applied where a method has such a setting
    "epochs": 4,
    "batch_size": 4,
    "point_weights": "random",
    "groups": 64,
    "group_size": 16,
    "uff_steps": 8,
    "uff_warmup": 2,
    "student_width": 32,
    "teacher_hidden": 16,
    "teacher_weights": "random",
    "student_steps": 16,
    "student_batch": 2,
    "distance_steps": 20,
}


def short_config(name: str):
    kind = detector_class(name)
    fields = {field.name for field in dataclasses.fields(kind.Config)}
    return configure(kind, {key: value for key, value in SHORT.items() if key in fields}, "fast")


def build(name: str) -> Detector:
    return detector_class(name)(short_config(name))


def fit(name: str, device: str = "cpu") -> Detector:
    engine = Engine(EngineConfig(seed=3, device=device, block=4))
    return engine.fit(build(name), {"train": TRAIN, "validation": VALIDATION})


@pytest.fixture(scope="module", params=sorted(DETECTORS))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def fitted(name: str) -> Detector:
    return fit(name)


def same_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_two_fits_with_one_seed_have_the_same_bits(name: str, fitted: Detector):
    assert same_tensors(fitted.state_dict(), fit(name).state_dict())


def test_a_part_is_judged_alone(fitted: Detector):
    batch = tiny_batch([200, 201, 202, 203, 204])
    together = fitted(batch)
    order = [3, 0, 4, 2, 1]
    shuffled = fitted(take(batch, order))
    scale = float(together.map.abs().max())
    for index in range(len(batch)):
        alone = fitted(take(batch, [index]))
        assert_close(alone.map[0], together.map[index], rtol=1e-5, atol=1e-5 * scale)
        assert_close(alone.score[0], together.score[index], rtol=1e-5, atol=1e-5 * scale)
    assert_close(shuffled.map, together.map[order], rtol=1e-5, atol=1e-5 * scale)
    assert_close(shuffled.score, together.score[order], rtol=1e-5, atol=1e-5 * scale)


def test_saved_and_loaded_it_answers_with_the_same_bits(name: str, fitted: Detector, tmp_path):
    model = Model(name, fitted, Preparation())
    first, second = model.save(tmp_path / "a.safetensors"), model.save(tmp_path / "b.safetensors")
    assert first.read_bytes() == second.read_bytes()
    loaded = Model.load(first, device="cpu")
    assert same_tensors(fitted.state_dict(), loaded.detector.state_dict())
    batch = tiny_batch([200, 201])
    before, after = fitted(batch), loaded.detector(batch)
    assert torch.equal(before.score, after.score)
    assert torch.equal(before.map, after.map)
    assert loaded.detector.config == fitted.config


def test_a_model_file_cut_in_half_is_refused(name: str, fitted: Detector, tmp_path):
    whole = Model(name, fitted, Preparation()).save(tmp_path / "whole.safetensors").read_bytes()
    half = tmp_path / "half.safetensors"
    half.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelFileError, match=r"half\.safetensors' is damaged or cut short"):
        Model.load(half)


def test_unfitted_raises(name: str):
    with pytest.raises(NotFittedError, match="fit it"):
        build(name)(tiny_batch([1]))


def test_a_sensor_that_saw_nothing_gives_finite_answers(fitted: Detector):
    prediction = fitted(blinded(tiny_batch([200, 201])))
    assert torch.isfinite(prediction.score).all()
    assert torch.isfinite(prediction.map).all()


def test_modes_and_random_states_are_left_alone(name: str, fitted: Detector):
    numpy_state, torch_state = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    detector = fit(name)
    assert not any(module.training for module in detector.modules())
    assert not any(parameter.requires_grad for parameter in detector.parameters())
    before = {key: tensor.clone() for key, tensor in fitted.state_dict().items()}
    fitted(tiny_batch([200]))
    assert same_tensors(before, fitted.state_dict())
    assert np.array_equal(numpy_state, np.random.get_state()[1])  # noqa: NPY002
    assert torch.equal(torch_state, torch.get_rng_state())


def test_frozen_parts_stay_in_eval_mode(name: str):
    detector = build(name).train()
    assert detector.frozen
    for part in detector.frozen:
        assert not any(module.training for module in detector.get_submodule(part).modules())


def test_an_unknown_setting_names_the_nearest(name: str):
    kind = detector_class(name)
    field = dataclasses.fields(kind.Config)[0].name
    with pytest.raises(ConfigError, match=f"did you mean '{field}'"):
        configure(kind, {f"{field}x": 1})
    with pytest.raises(ConfigError, match="unknown preset 'fst': did you mean 'fast'"):
        configure(kind, preset="fst")


def test_a_missing_modality_is_a_clear_error(fitted: Detector):
    batch = tiny_batch([1])
    wanted = fitted.required[-1]
    images = {key: image for key, image in batch.images.items() if key != wanted}
    with pytest.raises(DataError, match=f"part 'tiny/good/1' has no '{wanted}'"):
        fitted(dataclasses.replace(batch, images=images))


def test_the_prediction_has_the_promised_form(fitted: Detector):
    prediction = fitted(tiny_batch([200, 201, 202]))
    assert prediction.score.shape == (3,)
    assert prediction.map.shape == (3, 64, 64)
    assert set(prediction.branch_maps) >= set(fitted.modalities)
    assert all(branch.shape == (3, 64, 64) for branch in prediction.branch_maps.values())


def test_it_detects(fitted: Detector):
    good, bad = tiny_batch(range(300, 312)), tiny_batch(range(400, 412), defect=True)
    scores = torch.cat([fitted(good).score, fitted(bad).score]).double().numpy()
    assert auroc(scores, [0] * 12 + [1] * 12) >= 0.95


def test_what_it_says_of_itself(name: str):
    kind = detector_class(name)
    assert {"paper", "fast"} <= set(kind.PRESETS)
    for preset in kind.PRESETS:
        assert dataclasses.is_dataclass(configure(kind, preset=preset))
    assert kind.__name__.lower() == name.replace("_", "")
    assert len(describe(name)) > 20
    stages = build(name).stages()
    assert stages
    assert all(isinstance(stage, (Observe, Optimise)) for stage in stages)
    assert len({stage.name for stage in stages}) == len(stages)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_it_runs_on_cuda(name: str, fitted: Detector):
    detector = fit(name, device="cuda")
    batch = tiny_batch([200, 201])
    there, here = detector(batch.to("cuda")).cpu(), fitted(batch)
    assert there.map.shape == here.map.shape
    assert torch.isfinite(there.score).all()
