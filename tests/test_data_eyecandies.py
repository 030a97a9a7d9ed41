"""The Eyecandies layout, on tiny parts written here with the names and encodings of the real data set."""

import cv2
import numpy as np
import pytest
import yaml
from PIL import Image

from polyspect.data.eyecandies import Eyecandies
from polyspect.data.source import open_reader
from polyspect.errors import ConfigError, DataError

SIZE = 8
DEFECTS = ("bumps", "dents", "colors", "normals")


def add_candy(data, number, seed=0, defects=(), public=True):
    """One part: six lights, depth with its bounds, normals, pose, and (not in test_private) metadata and masks."""
    data.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for light in range(6):
        picture = np.full((SIZE, SIZE, 3), [10 * light, seed % 256, 7], np.uint8)
        Image.fromarray(picture).save(data / f"{number}_image_{light}.png")
    depth = rng.integers(0, 65536, (SIZE, SIZE), dtype=np.uint16)
    depth[0, 0], depth[0, 1] = 0, 65535
    cv2.imwrite(str(data / f"{number}_depth.png"), depth)
    (data / f"{number}_info_depth.yaml").write_text(yaml.safe_dump({"normalization": {"min": 0.5, "max": 2.0}}))
    normals = np.full((SIZE, SIZE, 3), [128, 128, 255], np.uint8)
    normals[1, 1] = [128, 255, 128]  # y up
    Image.fromarray(normals).save(data / f"{number}_normals.png")
    np.savetxt(data / f"{number}_pose.txt", np.eye(4))
    if not public:
        return
    (data / f"{number}_metadata.yaml").write_text(yaml.safe_dump({"anomalous": int(bool(defects))}))
    union = np.zeros((SIZE, SIZE), np.uint8)
    for i, kind in enumerate(DEFECTS):
        mask = np.zeros((SIZE, SIZE), np.uint8)
        mask[2 * i] = 255 * (kind in defects)
        union |= mask
        Image.fromarray(mask).save(data / f"{number}_{kind}_mask.png")
    Image.fromarray(union).save(data / f"{number}_mask.png")


@pytest.fixture
def root(tmp_path):
    candy = tmp_path / "CandyCane"
    for i in range(3):
        add_candy(candy / "train" / "data", f"{i:03d}", seed=i)
    add_candy(candy / "val" / "data", "00", seed=5)
    add_candy(candy / "test_public" / "data", "00", seed=6)
    add_candy(candy / "test_public" / "data", "01", seed=7, defects=("bumps", "colors"))
    add_candy(candy / "test_public" / "data", "02", seed=8, defects=("normals",))
    add_candy(candy / "test_private" / "data", "000", seed=9, public=False)
    return tmp_path


def test_lists_splits_labels_and_defect_types(root):
    reader = open_reader("eyecandies", root)
    assert reader.categories() == ["CandyCane"]
    assert [r.id for r in reader.records("CandyCane", "train")] == [f"CandyCane/train/good/{i:03d}" for i in range(3)]
    assert [r.id for r in reader.records("CandyCane", "validation")] == ["CandyCane/validation/good/00"]
    assert [(r.id, r.defect, r.label) for r in reader.records("CandyCane", "test")] == [
        ("CandyCane/test/bumps+colors/01", "bumps+colors", 1),
        ("CandyCane/test/good/00", "good", 0),
        ("CandyCane/test/normals/02", "normals", 1),
    ]
    assert all(reader.has_split("CandyCane", split) for split in ("train", "validation", "test"))


def test_depth_is_denormalised_and_projected_with_the_published_camera(root):
    reader = Eyecandies(root)
    sample = reader.read(reader.records("CandyCane", "train")[0])
    raw = cv2.imread(str(root / "CandyCane/train/data/000_depth.png"), cv2.IMREAD_UNCHANGED)
    depth = 0.5 + raw / 65535 * 1.5
    assert sample.images["depth"][0, 0] == 0.5
    assert sample.images["depth"][0, 1] == 2.0
    np.testing.assert_allclose(sample.images["depth"], depth, rtol=1e-6)
    assert sample.valid.all()
    v, u = np.mgrid[:SIZE, :SIZE]
    focal = 711.11 * SIZE / 512
    np.testing.assert_allclose(sample.images["xyz"][..., 0], (u - SIZE / 2) * depth / focal, rtol=1e-5)
    np.testing.assert_allclose(sample.images["xyz"][..., 1], (v - SIZE / 2) * depth / focal, rtol=1e-5)
    np.testing.assert_array_equal(sample.meta["pose"], np.eye(4))
    assert sample.mask is None


def test_normals_are_turned_into_the_cameras_frame(root):
    reader = Eyecandies(root)
    normals = reader.read(reader.records("CandyCane", "train")[0]).images["normals"]
    np.testing.assert_allclose(normals[0, 0], [0, 0, -1], atol=0.01)  # towards the camera
    np.testing.assert_allclose(normals[1, 1], [0, -1, 0], atol=0.01)  # y points down
    np.testing.assert_allclose(np.linalg.norm(normals, axis=2), 1, rtol=1e-6)


def test_the_light_is_chosen_and_further_ones_are_views_of_their_own(root):
    reader = Eyecandies(root)
    assert reader.read(reader.records("CandyCane", "train")[0]).images["rgb"][0, 0, 0] == 40
    reader = open_reader("eyecandies", root, light="image_0", extra_lights=["image_5"])
    images = reader.read(reader.records("CandyCane", "train")[0]).images
    assert set(images) == {"rgb", "image_5", "xyz", "depth", "normals"}
    assert (images["rgb"][0, 0, 0], images["image_5"][0, 0, 0]) == (0, 50)
    with pytest.raises(ConfigError, match=r"no light 'image_6': did you mean 'image_\d'\? known: image_0"):
        Eyecandies(root, light="image_6")


def test_masks_and_the_private_test_set(root):
    reader = Eyecandies(root)
    both, good, _ = reader.records("CandyCane", "test")
    assert np.flatnonzero(reader.read(both).mask.any(axis=1)).tolist() == [0, 4]
    assert not reader.read(good).mask.any()
    private = Eyecandies(root, test="test_private")
    (record,) = private.records("CandyCane", "test")
    assert (record.label, record.defect, record.id) == (None, None, "CandyCane/test/unlabelled/000")
    assert private.read(record).mask is None
    with pytest.raises(ConfigError, match="`test` must be 'test_public' or 'test_private', got 'test'"):
        Eyecandies(root, test="test")


def test_without_metadata_the_mask_tells_the_label(root):
    for path in (root / "CandyCane/test_public/data").glob("*_metadata.yaml"):
        path.unlink()
    assert [r.label for r in Eyecandies(root).records("CandyCane", "test")] == [1, 0, 1]


def test_pictures_and_normals_alone_are_enough(root):
    for path in (root / "CandyCane/train/data").glob("*depth*"):
        path.unlink()
    reader = Eyecandies(root)
    assert set(reader.read(reader.records("CandyCane", "train")[0]).images) == {"rgb", "normals"}


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        (
            "train/001_depth.png",
            r"001_image_4\.png: its partner is missing: expected 'depth' at .*train/data/001_depth\.png",
        ),
        ("train/002_image_4.png", r"002_\w+\.png: its partner is missing: expected 'rgb' at .*002_image_4\.png"),
        ("train/000_info_depth.yaml", r"000_depth\.png: its partner 000_info_depth\.yaml is missing; .* no scale"),
        ("test_public/01_mask.png", r"01_image_4\.png: anomalous, but 01_mask\.png is missing; add it"),
    ],
)
def test_missing_files_are_named(root, gone, message):
    split, name = gone.split("/")
    (root / "CandyCane" / split / "data" / name).unlink()
    with pytest.raises(DataError, match=message):
        Eyecandies(root).records("CandyCane", "train" if split == "train" else "test")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "000_info_depth.yaml",
            "min: 1\n",
            r"000_info_depth\.yaml: expected 'normalization: \{min: metres, max: metres\}'",
        ),
        (
            "000_info_depth.yaml",
            "normalization: {min: 2, max: 1}",
            r"expected min below max, found min 2\.0 and max 1\.0",
        ),
        ("000_pose.txt", "1 2 3\n", r"000_pose\.txt: expected a 4 x 4 matrix, found 1 x 3"),
        ("000_pose.txt", "one\n", r"000_pose\.txt: cannot be read as a 4 x 4 matrix"),
    ],
)
def test_broken_small_files_are_named(root, name, text, message):
    (root / "CandyCane/train/data" / name).write_text(text)
    reader = Eyecandies(root)
    with pytest.raises(DataError, match=message):
        reader.read(reader.records("CandyCane", "train")[0])


def test_broken_metadata_is_named(root):
    (root / "CandyCane/test_public/data/00_metadata.yaml").write_text("anomalous: maybe\n")
    with pytest.raises(DataError, match=r"00_metadata\.yaml: expected 'anomalous: 0' or 'anomalous: 1', found"):
        Eyecandies(root).records("CandyCane", "test")


def test_missing_splits_and_roots(root, tmp_path_factory):
    for path in (root / "CandyCane/val/data").iterdir():
        path.unlink()
    reader = Eyecandies(root)
    assert not reader.has_split("CandyCane", "validation")
    with pytest.raises(DataError, match=r"val/data: holds no parts; expected .*000_image_4\.png"):
        reader.records("CandyCane", "validation")
    (root / "CandyCane/val/data").rmdir()
    with pytest.raises(DataError, match=r"val/data: the split 'validation' is missing"):
        reader.records("CandyCane", "validation")
    with pytest.raises(DataError, match=r"no category 'CandyCone': did you mean 'CandyCane'\?"):
        reader.records("CandyCone", "train")
    with pytest.raises(DataError, match="holds no Eyecandies category; expected"):
        Eyecandies(tmp_path_factory.mktemp("empty")).categories()
