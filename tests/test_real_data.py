"""Detectors on real sensor data, end to end through the public calls. Skipped where the data is not kept."""

from __future__ import annotations

from pathlib import Path

import pytest

import polyspect as ps

pytestmark = [pytest.mark.real_data, pytest.mark.slow]


@pytest.mark.parametrize(
    ("detector", "settings", "floors", "accepted"),
    [
        ("patchcore", {}, {"i_auroc": 0.99, "aupro@0.3": 0.9}, 20),
        ("crd", {"epochs": 8, "lr_decay": 0.6}, {"i_auroc": 0.98, "aupro@0.3": 0.85}, 20),
        ("mmrd", {"epochs": 8, "lr_decay": 0.6}, {"i_auroc": 0.95, "aupro@0.3": 0.8}, 45),  # eight epochs of forty
        (
            "reverse_distillation",
            {"epochs": 8, "lr_decay": 0.6, "modalities": ["depth"]},
            {"i_auroc": 0.98, "aupro@0.3": 0.85},
            20,
        ),
    ],
    ids=["patchcore", "crd", "mmrd", "reverse_distillation"],
)
def test_any_object_on_a_bare_table_is_found(detector, settings, floors, accepted, osd_root: Path, tmp_path: Path):
    where = {"root": osd_root, "category": "tabletop"}
    options = {"settings": settings, "prepare": {"size": 128}, "max_train": 70, "device": "cpu"}
    model = ps.fit(detector, preset="fast", out=tmp_path / "m.safetensors", **options, **where)
    assert model.calibration.n == 25
    results = ps.evaluate(tmp_path / "m.safetensors", bootstrap=0, **where)
    assert (results.data["n_good"], results.data["n_anomalous"]) == (50, 82)
    for metric, floor in floors.items():
        assert results.metrics[metric] >= floor, (metric, results.metrics[metric])
    assert results.decisions["good_rejected"] <= 10
    assert results.decisions["anomalous_accepted"] <= accepted
