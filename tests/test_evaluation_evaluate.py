"""Evaluation says what the predictions say: nothing rescaled, nothing dropped, nothing made up."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

import polyspect as ps
from polyspect.data.synthetic import write_dataset
from polyspect.errors import DataError
from polyspect.evaluation.results import read_part, read_results
from polyspect.metrics import evaluate_maps
from polyspect.model import Model

WHERE = {"category": "gasket"}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    write_dataset(folder, ["gasket"], train=6, validation=4, test_good=3, test_per_defect=1, size=64)
    return folder


@pytest.fixture(scope="module")
def model(root: Path) -> Model:
    return ps.fit("patchcore", root=root, settings={"bank_limit": 100}, prepare={"size": 64}, device="cpu", **WHERE)


def test_metrics_are_those_of_the_predictions(model: Model, root: Path, tmp_path: Path):
    results = ps.evaluate(model, root=root, out=tmp_path, bootstrap=30, **WHERE)
    parts = list(ps.predict(model, data="mvtec3d", root=root, **WHERE))
    labels = [part.sample.label for part in parts]
    masks = np.stack([part.sample.mask for part in parts])
    expected = evaluate_maps([part.score for part in parts], labels, np.stack([part.map for part in parts]), masks)
    assert results.metrics == pytest.approx(expected)
    rgb = np.stack([part.branch_maps["rgb"] for part in parts])
    alone = evaluate_maps(rgb.max((1, 2)), labels, rgb, masks)
    assert results.branches["rgb"] == pytest.approx({name: alone[name] for name in results.branches["rgb"]})
    kinds = {part.sample.defect for part in parts} - {"good"}
    assert {kind: entry["n"] for kind, entry in results.per_defect.items()} == dict.fromkeys(kinds, 1)
    rejected = [part.decision == "reject" for part in parts]
    assert results.decisions["anomalous_rejected"] == sum(r for r, label in zip(rejected, labels) if label == 1)
    assert sum(results.decisions.values()) == len(parts)
    stored = read_results(tmp_path)
    assert stored.metrics == pytest.approx(results.metrics)
    for row, part in zip(stored.parts, parts):
        assert (row.id, row.label, row.decision) == (part.id, part.sample.label, part.decision)
        np.testing.assert_allclose(read_part(tmp_path, row.index)["map"], part.map, rtol=1e-5, atol=1e-5)


def test_unmeasured_pixels_can_be_left_out(model: Model, root: Path):
    results = ps.evaluate(model, root=root, bootstrap=0, ignore_invalid=True, **WHERE)
    parts = list(ps.predict(model, data="mvtec3d", root=root, **WHERE))
    assert any(not part.sample.valid.all() for part in parts)
    expected = evaluate_maps(
        [part.score for part in parts],
        [part.sample.label for part in parts],
        np.stack([part.map for part in parts]),
        np.stack([part.sample.mask for part in parts]),
        ignore=np.stack([~part.sample.valid for part in parts]),
    )
    assert results.metrics == pytest.approx(expected)
    assert results.metrics["p_auroc"] != ps.evaluate(model, root=root, bootstrap=0, **WHERE).metrics["p_auroc"]
    assert results.grid.endswith("pixels without 3D data left out")


def test_good_parts_alone_leave_metrics_undefined(model: Model, root: Path, tmp_path: Path):
    copy = Path(shutil.copytree(root, tmp_path / "parts"))
    for folder in (copy / "gasket" / "test").iterdir():
        if folder.name != "good":
            shutil.rmtree(folder)
    results = ps.evaluate(model, root=copy, out=tmp_path / "out", bootstrap=30, **WHERE)
    assert set(results.metrics.values()) == {None}
    assert results.per_defect == {}
    assert results.curves == {}
    assert results.intervals == {}
    assert results.decisions["good_accepted"] + results.decisions["good_rejected"] == 3
    assert (tmp_path / "out" / "report.html").is_file()


def test_parts_without_label_or_mask_cannot_be_evaluated(model: Model, root: Path, tmp_path: Path):
    new = tmp_path / "new"
    for view in ("rgb", "xyz", "normals"):
        shutil.copytree(root / "gasket" / "test" / "good" / view, new / view)
    with pytest.raises(DataError, match="has no label: only labelled parts can be evaluated"):
        ps.evaluate(model, data="folder", root=new, category="new")
    bad = tmp_path / "bad"
    kind = next(f.name for f in sorted((root / "gasket" / "test").iterdir()) if f.name != "good")
    for split, source in [("train/good", "train/good"), ("test/good", "test/good"), (f"test/{kind}", f"test/{kind}")]:
        for view in ("rgb", "xyz", "normals"):
            shutil.copytree(root / "gasket" / source / view, bad / split / view)
    with pytest.raises(DataError, match="is anomalous and has no ground-truth mask"):
        ps.evaluate(model, data="folder", root=bad, category="bad")
