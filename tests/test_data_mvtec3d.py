"""The MVTec 3D-AD layout: what it lists and reads, and what it says when a file is amiss."""

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from polyspect.data.mvtec3d import MVTec3D
from polyspect.data.source import content_hash, open_reader
from polyspect.errors import ConfigError, DataError

H, W = 4, 5
OSD = Path(__file__).resolve().parents[2] / "shared" / "data" / "osd_tabletop"


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".tiff":
        tifffile.imwrite(path, array, photometric="rgb")
    else:
        Image.fromarray(array).save(path)


def add_part(kind, stem, mask=None, seed=0):
    """Write rgb, xyz and, if asked, ground truth of one part into a type folder."""
    rng = np.random.default_rng(seed)
    save(kind / "rgb" / f"{stem}.png", rng.integers(0, 256, (H, W, 3), dtype=np.uint8))
    save(kind / "xyz" / f"{stem}.tiff", rng.uniform(0.3, 0.5, (H, W, 3)).astype(np.float32))
    if mask is not None:
        save(kind / "gt" / f"{stem}.png", np.full((H, W), mask, np.uint8))


@pytest.fixture
def root(tmp_path):
    for i in range(3):
        add_part(tmp_path / "nut" / "train" / "good", f"{i:03d}", seed=i)
    add_part(tmp_path / "nut" / "validation" / "good", "000", seed=10)
    add_part(tmp_path / "nut" / "test" / "good", "000", mask=0, seed=20)
    add_part(tmp_path / "nut" / "test" / "good", "001", seed=21)
    add_part(tmp_path / "nut" / "test" / "hole", "000", mask=255, seed=22)
    (tmp_path / "nut" / "calibration").mkdir()
    return tmp_path


def test_lists_categories_splits_and_parts(root):
    reader = open_reader("mvtec3d", root)
    assert reader.categories() == ["nut"]
    assert [r.id for r in reader.records("nut", "train")] == [f"nut/train/good/{i:03d}" for i in range(3)]
    test = reader.records("nut", "test")
    assert [(r.id, r.label, r.defect, "mask" in r.files) for r in test] == [
        ("nut/test/good/000", 0, "good", True),
        ("nut/test/good/001", 0, "good", False),
        ("nut/test/hole/000", 1, "hole", True),
    ]
    assert all(reader.has_split("nut", split) for split in ("train", "validation", "test"))


def test_reads_what_was_written(root):
    reader = MVTec3D(root)
    kind = root / "nut" / "test" / "hole"
    sample = reader.read(reader.records("nut", "test")[2])
    np.testing.assert_array_equal(sample.images["rgb"], np.asarray(Image.open(kind / "rgb" / "000.png")))
    np.testing.assert_array_equal(sample.images["xyz"], tifffile.imread(kind / "xyz" / "000.tiff"))
    np.testing.assert_array_equal(sample.images["depth"], sample.images["xyz"][..., 2])
    assert sample.mask.all()
    assert sample.valid.all()
    assert (sample.label, sample.defect, sample.id) == (1, "hole", "nut/test/hole/000")
    good = reader.read(reader.records("nut", "test")[1])  # no gt file
    assert good.mask.shape == (H, W)
    assert not good.mask.any()


def test_millimetres_and_sentinels(root):
    xyz = np.full((H, W, 3), 250, np.float32)
    xyz[0, 0] = 1e5
    save(root / "nut" / "train" / "good" / "xyz" / "000.tiff", xyz)
    reader = open_reader("mvtec3d", root, unit="mm", invalid=[1e5])
    sample = reader.read(reader.records("nut", "train")[0])
    assert MVTec3D(root, invalid=1e5).options.invalid == reader.options.invalid
    assert not sample.valid[0, 0]
    np.testing.assert_allclose(sample.images["depth"][1:], 0.25)


def test_normals_and_metadata_are_picked_up(root):
    for i in range(3):
        kind = root / "nut" / "train" / "good"
        save(kind / "normals" / f"{i:03d}.png", np.full((H, W, 3), [128, 128, 0], np.uint8))
        (kind / "meta").mkdir(exist_ok=True)
        (kind / "meta" / f"{i:03d}.json").write_text(json.dumps({"seed": i}))
    reader = MVTec3D(root)
    record = reader.records("nut", "train")[2]
    sample = reader.read(record)
    np.testing.assert_allclose(sample.images["normals"][0, 0], [0, 0, -1], atol=0.01)
    assert sample.meta["metadata"] == {"seed": 2}
    assert "metadata_file" not in sample.meta
    before = content_hash(record)  # metadata may tell of the defect, so it is no input
    (root / "nut/train/good/meta/002.json").write_text("{}")
    assert content_hash(reader.records("nut", "train")[2]) == before


@pytest.mark.parametrize(("gone", "kept"), [("xyz", "rgb"), ("rgb", "xyz")])
def test_one_modality_alone_is_allowed_for_a_whole_split(root, gone, kept):
    for path in (root / "nut" / "test").glob(f"*/{gone}/*"):
        path.unlink()
    reader = MVTec3D(root)
    records = reader.records("nut", "test")
    assert all(kept in r.files and gone not in r.files for r in records)
    assert gone not in reader.read(records[0]).images


@pytest.mark.parametrize(
    ("gone", "witness"),
    [("test/hole/xyz/000.tiff", "test/hole/rgb/000.png"), ("train/good/rgb/001.png", "train/good/xyz/001.tiff")],
)
def test_a_missing_partner_names_the_file_expected(root, gone, witness):
    (root / "nut" / gone).unlink()
    with pytest.raises(DataError) as error:
        MVTec3D(root).records("nut", gone.split("/")[0])
    assert str(error.value).startswith(f"{root / 'nut' / witness}: its partner is missing: expected ")
    assert str(root / "nut" / gone) in str(error.value)
    assert "add the file, or move this part away" in str(error.value)


def test_missing_ground_truth_is_named(root):
    (root / "nut/test/hole/gt/000.png").unlink()
    with pytest.raises(DataError, match=r"anomalous, but its ground truth .*hole/gt/000\.png is missing; add the mask"):
        MVTec3D(root).records("nut", "test")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("test/hole/gt/007.png", r"007\.png: belongs to no part: there is no .*hole/rgb/007\.png"),
        ("test/hole/rgb/notes.txt", r"notes\.txt: does not belong into a folder of 'rgb' files; expected \.png"),
        ("test/hole/rgb/000.bmp", r"000\.bmp and 000\.png: two 'rgb' files of one part; keep one"),
        ("train/hole/rgb/000.png", r"hole: 'train' must hold good parts only, in 'good'; move 'hole' to 'test'"),
        ("test/dent/image/000.png", r"dent: holds neither 'rgb' nor 'xyz' but image; expected .*dent/rgb"),
    ],
)
def test_extra_files_are_named(root, extra, message):
    path = root / "nut" / extra
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    with pytest.raises(DataError, match=message):
        MVTec3D(root).records("nut", extra.split("/")[0])


def test_what_file_managers_leave_behind_is_no_part(root):
    for name in (".DS_Store", "Thumbs.db"):
        (root / "nut/train/good/rgb" / name).write_bytes(b"x")
    assert len(MVTec3D(root).records("nut", "train")) == 3


def test_unknown_names_bring_the_nearest(root):
    reader = MVTec3D(root)
    with pytest.raises(DataError, match=r"has no category 'nuts': did you mean 'nut'\? known: nut"):
        reader.records("nuts", "train")
    with pytest.raises(ConfigError, match=r"unknown split 'val': .*known: test, train, validation"):
        reader.records("nut", "val")
    with pytest.raises(ConfigError, match=r"unknown data reader 'mvtec': did you mean 'mvtec3d'\?"):
        open_reader("mvtec", root)
    with pytest.raises(
        ConfigError, match=r"'mvtec3d' has no option 'units': did you mean 'unit'\? known: invalid, unit"
    ):
        open_reader("mvtec3d", root, units="mm")


def test_missing_and_empty_splits(root):
    for path in sorted((root / "nut/validation").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    reader = MVTec3D(root)
    assert not reader.has_split("nut", "validation")
    with pytest.raises(DataError, match=r"validation: holds no parts; expected .*validation/good/rgb/000\.png"):
        reader.records("nut", "validation")
    (root / "nut/validation").rmdir()
    assert not reader.has_split("nut", "validation")
    with pytest.raises(
        DataError,
        match=r"validation: the split 'validation' is missing; 'nut' holds calibration, test, train: create or rename",
    ):
        reader.records("nut", "validation")
    for path in (root / "nut/train/good").rglob("*.*"):
        path.unlink()
    with pytest.raises(DataError, match=r"train: holds no parts; expected .*train/good/rgb/000\.png and so on"):
        reader.records("nut", "train")


def test_wrong_roots(root, tmp_path_factory):
    with pytest.raises(DataError, match=r"nut: is a single category; give its parent"):
        MVTec3D(root / "nut").categories()
    with pytest.raises(DataError, match=r"holds no category; expected .*CATEGORY/train/good/rgb"):
        MVTec3D(tmp_path_factory.mktemp("empty")).categories()
    with pytest.raises(DataError, match="expected the folder of a data set, found nothing"):
        MVTec3D(root / "gone")


def test_one_sample_only(root):
    for stem in ("000", "002"):
        (root / f"nut/train/good/rgb/{stem}.png").unlink()
        (root / f"nut/train/good/xyz/{stem}.tiff").unlink()
    reader = MVTec3D(root)
    (record,) = reader.records("nut", "train")
    assert reader.read(record).size == (H, W)


def test_sizes_and_truncation_are_met_when_reading(root):
    kind = root / "nut/train/good"
    save(kind / "rgb/000.png", np.zeros((2, 2, 3), np.uint8))
    data = (kind / "xyz/001.tiff").read_bytes()
    (kind / "xyz/001.tiff").write_bytes(data[:-30])
    reader = MVTec3D(root)
    first, second, _ = reader.records("nut", "train")
    with pytest.raises(DataError, match=r"xyz/000\.tiff: 'xyz' is 5x4 pixels .* 'rgb' \(.*rgb/000\.png\) is 2x2"):
        reader.read(first)
    with pytest.raises(DataError, match=r"xyz/001\.tiff: truncated TIFF: its pixels reach to byte"):
        reader.read(second)


def test_all_invalid_clouds_are_read(root):
    for stem, value in (("000", 0.0), ("001", np.nan)):
        save(root / f"nut/train/good/xyz/{stem}.tiff", np.full((H, W, 3), value, np.float32))
    reader = MVTec3D(root)
    for record in reader.records("nut", "train")[:2]:
        sample = reader.read(record)
        assert not sample.valid.any()
        assert "no_valid_points" in sample.meta["flags"]


def test_non_ascii_names(tmp_path):
    add_part(tmp_path / "Мутер ø" / "test" / "Ätzung 深い", "Teil №1", mask=255)
    reader = MVTec3D(tmp_path)
    (record,) = reader.records("Мутер ø", "test")
    assert record.id == "Мутер ø/test/Ätzung 深い/Teil №1"
    assert reader.read(record).defect == "Ätzung 深い"


@pytest.mark.real_data
@pytest.mark.skipif(not OSD.is_dir(), reason="the real sensor data of shared/data/osd_tabletop is not here")
def test_real_kinect_parts_obey_the_pinhole_they_were_taken_with():
    reader = MVTec3D(OSD)
    assert reader.categories() == ["tabletop", "tabletop_boxes"]
    counts = {split: len(reader.records("tabletop", split)) for split in ("train", "validation", "test")}
    assert counts == {"train": 140, "validation": 25, "test": 132}
    manifest = [line.split(",") for line in (OSD / "manifest.csv").read_text().splitlines()[1:]]
    invalid = {"/".join(row[:4]): float(row[-1]) for row in manifest}
    corner = {"/".join(row[:4]): (int(row[5]), int(row[6])) for row in manifest}
    for record in reader.records("tabletop", "test")[::40]:
        sample = reader.read(record)
        assert sample.size == (160, 160)
        assert abs((~sample.valid).mean() - invalid[record.id]) < 1e-4
        assert bool(sample.mask.any()) == (record.label == 1)
        x, y, z = np.moveaxis(sample.images["xyz"].astype(np.float64), 2, 0)
        v, u = np.mgrid[:160, :160]
        u0, v0 = corner[record.id]
        np.testing.assert_allclose(x, (u + u0 - 319.5) * z / 525, atol=1e-5)
        np.testing.assert_allclose(y, (v + v0 - 239.5) * z / 525, atol=1e-5)
        assert 0.3 < np.median(z[sample.valid]) < 3
