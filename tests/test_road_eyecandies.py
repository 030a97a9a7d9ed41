"""The whole road on data in Eyecandies' layout: RGB + normals, as CRD reads them."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import yaml
from PIL import Image

import polyspect as ps
from polyspect.data.eyecandies import DEFECTS
from polyspect.data.synthetic import make_part

SIZE = 64


def add_candy(folder: Path, number: int, defect: str | None = None) -> None:
    """A synthetic part stored as Eyecandies stores one (normals with y up and z towards the camera)."""
    folder.mkdir(parents=True, exist_ok=True)
    part = make_part("bun", seed=number, defect=defect, size=SIZE, severity=None if defect is None else 0.9)
    Image.fromarray(part.images["rgb"]).save(folder / f"{number:03d}_image_4.png")
    normals = part.images["normals"] * (1, -1, -1)
    Image.fromarray(np.rint((normals + 1) * 127.5).astype(np.uint8)).save(folder / f"{number:03d}_normals.png")
    low, high = 0.0, 1.0
    counts = np.rint((part.images["depth"] - low) / (high - low) * 65535).astype(np.uint16)
    cv2.imwrite(str(folder / f"{number:03d}_depth.png"), counts)
    info = {"normalization": {"min": low, "max": high}}
    (folder / f"{number:03d}_info_depth.yaml").write_text(yaml.safe_dump(info))
    (folder / f"{number:03d}_metadata.yaml").write_text(yaml.safe_dump({"anomalous": int(defect is not None)}))
    union = part.mask.astype(np.uint8) * 255
    for kind in DEFECTS:
        own = union if kind == "bumps" else np.zeros_like(union)
        Image.fromarray(own).save(folder / f"{number:03d}_{kind}_mask.png")
    Image.fromarray(union).save(folder / f"{number:03d}_mask.png")


def test_crd_learns_and_is_evaluated_on_eyecandies_layout(tmp_path: Path):
    candy = tmp_path / "Bun"
    for number in range(10):
        add_candy(candy / "train" / "data", number)
    for number in range(20, 24):
        add_candy(candy / "val" / "data", number)
    for number in range(40, 44):
        add_candy(candy / "test_public" / "data", number)
    for number in range(50, 54):
        add_candy(candy / "test_public" / "data", number, defect="contamination")
    where = {"data": "eyecandies", "root": tmp_path, "category": "Bun"}
    settings = {"modalities": ["rgb", "normals"], "epochs": 12, "lr_decay": 0.8, "batch_size": 4}
    model = ps.fit("crd", preset="fast", settings=settings, prepare={"size": SIZE}, device="cpu", **where)
    results = ps.evaluate(model, bootstrap=0, **where)
    assert set(results.branches) == {"rgb", "normals"}
    assert (results.data["n_good"], results.data["n_anomalous"]) == (4, 4)
    assert set(results.per_defect) == {"bumps"}
    assert results.metrics["i_auroc"] >= 0.75
    assert results.metrics["p_auroc"] >= 0.7
