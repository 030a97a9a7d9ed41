"""Parts that lack a modality: hallucination around any fitted detector, one threshold per set of modalities."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import polyspect as ps
from polyspect.cli import main
from polyspect.data.source import open_reader
from polyspect.data.synthetic import make_part, write_dataset
from polyspect.detectors import detector_class
from polyspect.detectors.completion import Completion, CompletionConfig
from polyspect.detectors.contract import configure
from polyspect.errors import CalibrationError, ConfigError, DataError, NotFittedError
from polyspect.fitting.engine import Engine, EngineConfig
from polyspect.layers.rgb_points import groups_on_grid, point_grid, point_patches
from polyspect.metrics import auroc
from polyspect.samples import Batch
from tiny import TinyParts, only, tiny_batch

TRAIN, HELD = TinyParts(range(12)), TinyParts(range(50, 56))


def engine() -> Engine:
    return Engine(EngineConfig(device="cpu"))


@pytest.fixture(scope="module")
def inner():
    kind = detector_class("patchcore")
    detector = kind(configure(kind, {"bank_limit": 200}))
    return engine().fit(detector, {"train": TRAIN, "validation": HELD})


@pytest.fixture(scope="module")
def completed(inner) -> Completion:
    return engine().fit(Completion(inner, CompletionConfig(epochs=30, batch_size=4)), {"train": TRAIN})


def test_complete_parts_are_judged_as_before_bit_for_bit(inner, completed):
    batch = tiny_batch([100, 101])
    assert torch.equal(inner(batch).map, completed(batch).map)
    assert torch.equal(inner(batch).score, completed(batch).score)


@pytest.mark.parametrize("names", [("rgb",), ("normals",)])
def test_a_part_with_one_modality_is_judged_and_defects_are_found(completed, names):
    good, bad = tiny_batch(range(100, 108)), tiny_batch(range(100, 108), defect=True)
    scores = torch.cat([completed(only(good, names)).score, completed(only(bad, names)).score])
    assert auroc(scores.numpy(), np.repeat([0, 1], 8)) >= 0.85


def test_what_is_absent_does_not_matter(completed):
    batch = tiny_batch([100, 101], defect=True)
    left_out = only(batch, ("rgb",))
    noise = replace(left_out, images={**left_out.images, "something": torch.rand(2, 1, 64, 64)})
    assert torch.equal(completed(left_out).map, completed(noise).map)


def test_a_part_does_not_depend_on_its_batch_mates(completed):
    batch = only(tiny_batch([100, 101, 102]), ("rgb",))
    alone = Batch(batch.ids[:1], {n: x[:1] for n, x in batch.images.items()}, batch.valid[:1], batch.foreground[:1])
    torch.testing.assert_close(completed(alone).map, completed(batch).map[:1], rtol=1e-4, atol=1e-4)


def test_the_loss_falls_and_is_relative_to_the_features_size(inner, completed):
    features = inner.extract(tiny_batch(range(8)))
    fresh = Completion(inner, CompletionConfig(patches=None))
    whole = Completion(inner, CompletionConfig(patches=None))
    whole.networks.load_state_dict(completed.networks.state_dict())
    with torch.no_grad():
        before, after = fresh.loss(features), whole.loss(features)
    assert set(before) == {"rgb_to_normals", "normals_to_rgb"}
    assert all(float(after[pair]) < 0.6 * float(before[pair]) for pair in before)
    silent = Completion(inner, CompletionConfig(patches=None))
    with torch.no_grad():
        for parameter in silent.networks.parameters():
            parameter.zero_()
        values = silent.loss(features).values()
    assert [float(value) for value in values] == pytest.approx([1, 1], abs=1e-5)  # H = 0: |R| / |R|


def test_training_leaves_the_detector_alone(inner, completed):
    assert completed.inner is inner
    assert completed.extractor_key() == inner.extractor_key()
    assert not any(parameter.requires_grad for parameter in inner.parameters())


def test_before_training_only_complete_parts_are_served(inner):
    fresh = Completion(inner)
    fresh.inner.fitted.fill_(True)
    features = fresh.extract(only(tiny_batch([1]), ("rgb",)))
    with pytest.raises(NotFittedError, match="stand in for a missing modality"):
        fresh.score(features)


def test_a_part_with_nothing_is_refused(completed):
    batch = tiny_batch([1])
    with pytest.raises(DataError, match="has no 'rgb'"):
        completed(replace(batch, images={"other": batch.images["rgb"]}))


def test_detectors_that_cannot_be_completed_say_why(inner):
    kind = detector_class("patchcore")
    with pytest.raises(ConfigError, match="no second modality"):
        Completion(kind(configure(kind, {"modalities": ("rgb",)})))
    with pytest.raises(ConfigError, match="epochs"):
        CompletionConfig(epochs=0)


def test_groups_on_a_grid_are_that_grid_again():
    grid = torch.randn(2, 5, 8, 8, generator=torch.Generator().manual_seed(0))
    counted = torch.ones(2, 64, 64, dtype=torch.bool)
    features = {f"xyz.{name}": x for name, x in groups_on_grid(grid, counted).items()} | {"valid": counted}
    torch.testing.assert_close(point_patches(features, (8, 8), window=1).mT.unflatten(2, (8, 8)), grid)
    counted[0] = False
    features = {f"xyz.{name}": x for name, x in groups_on_grid(grid, counted).items()} | {"valid": counted}
    assert float(point_grid(features, (8, 8))[0].abs().max()) == 0


def test_a_fine_grid_of_groups_keeps_its_places():
    """More cells than 16 bits count."""
    made = groups_on_grid(torch.zeros(1, 1, 200, 200), torch.ones(1, 200, 200, dtype=torch.bool))
    assert made["near"][0, :, 0].tolist() == list(range(200 * 200))


def test_networks_are_probed_where_the_detector_is(inner):
    """On the meta device here; a probe on the CPU would not meet the detector's tensors."""
    moved = copy.deepcopy(inner).to("meta")
    assert [tuple(x.shape) for x in Completion(moved).parameters()] == [
        tuple(x.shape) for x in Completion(inner).parameters()
    ]


# -- the whole road ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    write_dataset(folder, ["bottle_cap"], train=8, validation=5, test_good=2, test_per_defect=1, size=64)
    return folder


@pytest.fixture(scope="module")
def files(root: Path, tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    where = {"root": root, "category": "bottle_cap"}
    ps.fit("patchcore", **where, settings={"bank_limit": 100}, prepare={"size": 64}, out=folder / "m.safetensors")
    status = main(
        ["complete", str(folder / "m.safetensors"), "--root", str(root), "--category", "bottle_cap", "--no-cache",
         "--out", str(folder / "any.safetensors"), "--set", "epochs=4", "--set", "warmup_epochs=1"]
    )  # fmt: skip
    assert status == 0
    return folder / "m.safetensors", folder / "any.safetensors"


def test_one_file_serves_every_set_of_modalities_with_its_own_threshold(files, root: Path):
    model = ps.load(files[1])
    assert model.choices == [("rgb", "normals"), ("rgb",), ("normals",)]
    assert set(model.partial) == {"rgb", "normals"}
    sample = make_part("bottle_cap", 5, size=64)
    flat = replace(sample, images={"rgb": sample.images["rgb"]}, valid=np.ones_like(sample.valid))
    results = {"both": model.predict_sample(sample), "rgb": model.predict_sample(flat)}
    assert results["both"].used == ("rgb", "normals")
    assert results["rgb"].used == ("rgb",)
    for result, calibration in ((results["both"], model.calibration), (results["rgb"], model.partial["rgb"])):
        assert result.decision == ("reject" if result.score > calibration.threshold else "accept")
    assert results["both"].score == pytest.approx(ps.load(files[0]).predict_sample(sample).score, rel=1e-6)
    blind = replace(
        sample,
        images={n: x if n == "rgb" else np.zeros_like(x) for n, x in sample.images.items()},
        valid=np.zeros_like(sample.valid),
    )
    assert model.predict_sample(blind).used == ("rgb",)  # a sensor that saw nothing is a modality that is missing


def test_the_validation_parts_score_as_each_calibration_says(files, root: Path):
    model = ps.load(files[1])
    reader = open_reader("mvtec3d", root)
    scores = []
    for record in reader.records("bottle_cap", "validation"):
        sample = reader.read(record)
        scores.append(model.predict_sample(replace(sample, images={"rgb": sample.images["rgb"]})).score)
    assert np.sort(scores) == pytest.approx(np.sort(model.partial["rgb"].scores), rel=1e-4)


def test_the_command_line_says_what_was_used(files, root: Path, tmp_path: Path, capsys):
    photo = next((root / "bottle_cap" / "test").rglob("rgb/*.png"))
    capsys.readouterr()
    assert main(["predict", str(files[1]), str(photo), "--json", "--out", str(tmp_path)]) == 0
    row = json.loads(capsys.readouterr().out)["parts"][0]
    assert row["used"] == ["rgb"]
    assert row["decision"] in ("accept", "reject")
    assert "rgb" in (tmp_path / "predictions.csv").read_text().splitlines()[1].split(",")
    assert main(["predict", str(files[0]), str(photo)]) == 2
    assert "has no 'normals'" in capsys.readouterr().err


def test_evaluation_by_one_modality(files, root: Path, capsys):
    where = ["--root", str(root), "--category", "bottle_cap", "--no-cache", "--bootstrap", "0", "--json"]
    assert main(["evaluate", str(files[1]), "--only", "rgb", *where]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["model"]["modalities"] == ["rgb"]
    assert results["calibration"]["scores"] == ps.load(files[1]).partial["rgb"].to_dict()["scores"]
    assert main(["evaluate", str(files[0]), "--only", "rgb", *where]) == 2
    assert "polyspect complete" in capsys.readouterr().err


def test_a_model_is_completed_once_and_only_if_it_is_calibrated(files, root: Path):
    where = {"root": root, "category": "bottle_cap"}
    with pytest.raises(ConfigError, match="completed already"):
        ps.complete(files[1], **where)
    model = ps.load(files[0])
    model.calibration = None
    with pytest.raises(CalibrationError, match="never calibrated"):
        ps.complete(model, **where)
    model = ps.load(files[0])
    model.preparation = replace(model.preparation, background="plane", remove_from=("rgb", "xyz"))
    with pytest.raises(ConfigError, match="blanks RGB"):
        ps.complete(model, **where)


POINTS = {"point_weights": "random", "groups": 32, "group_size": 8, "point_layers": (0,)}


@pytest.mark.parametrize(
    ("name", "small"),
    [
        ("m3dm", POINTS | {"uff_steps": 4, "uff_warmup": 1}),
        ("cfm", POINTS | {"epochs": 2}),
        ("cmdiad", POINTS | {"banks": "dual"}),
        ("btf", {"features": ("rgb_inet", "hog")}),  # on a grid of 28 cells, whatever the size of the part
        ("mmrd", {"modalities": ("rgb", "depth"), "epochs": 2}),
    ],
)
def test_every_kind_of_features_is_filled_in(name: str, small: dict):
    kind = detector_class(name)
    detector = engine().fit(kind(configure(kind, small, "fast")), {"train": TRAIN, "validation": HELD})
    completion = engine().fit(Completion(detector, CompletionConfig(epochs=4, batch_size=4)), {"train": TRAIN})
    batch = tiny_batch([100, 101])
    for names in completion.choices[1:]:
        prediction = completion(only(batch, names))
        assert bool(torch.isfinite(prediction.map).all())
        assert float(prediction.map.flatten(1).std(1).min()) > 0
