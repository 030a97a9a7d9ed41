"""A user's own folders: default layout, name patterns, CSV tables, and what is said when they do not fit."""

import cv2
import numpy as np
import pytest
import tifffile
import yaml
from PIL import Image

from polyspect.data.folder import Folder, files_sample, guess_roles
from polyspect.data.source import open_reader
from polyspect.errors import ConfigError, DataError

H, W = 4, 5
CAMERA = {"fx": 500, "fy": 500, "cx": 2, "cy": 1.5, "scale": 0.001}


def save(path, value=1):
    """A file of the kind that its name asks for, H x W."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".tiff":
        tifffile.imwrite(path, np.full((H, W, 3), value * 0.1, np.float32), photometric="rgb")
    elif path.suffix == ".pcd":
        header = f"VERSION .7\nFIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nWIDTH {W}\nHEIGHT {H}\nDATA binary\n"
        path.write_bytes(header.encode() + np.full(H * W * 3, value * 0.1, "<f4").tobytes())
    elif "depth" in path.name or path.parent.name == "depth":
        cv2.imwrite(str(path), np.full((H, W), value * 100, np.uint16))
    else:
        Image.fromarray(np.full((H, W, 3), value, np.uint8)).save(path)
    return path


def ids(reader, split, category=None):
    return [r.id for r in reader.records(category or reader.categories()[0], split)]


# ------------------------------------------------------------------------------------------------------ default layout


def test_flat_files_with_the_role_at_the_end(tmp_path):
    for i in range(2):
        save(tmp_path / f"train/good/part_{i}_rgb.png")
        save(tmp_path / f"train/good/part_{i}_xyz.tiff")
    save(tmp_path / "test/scratch/a_rgb.png")
    save(tmp_path / "test/scratch/a_xyz.tiff")
    save(tmp_path / "test/scratch/a_mask.png")
    reader = open_reader("folder", tmp_path)
    name = tmp_path.name
    assert reader.categories() == [name]
    assert ids(reader, "train") == [f"{name}/train/good/part_0", f"{name}/train/good/part_1"]
    (record,) = reader.records(name, "test")
    assert (record.label, record.defect, sorted(record.files)) == (1, "scratch", ["mask", "rgb", "xyz"])
    sample = reader.read(record)
    assert sample.mask.all()
    np.testing.assert_allclose(sample.images["xyz"], 0.1)
    assert not reader.has_split(name, "validation")


def test_role_folders_categories_and_extra_views(tmp_path):
    for category in ("bolt", "nut"):
        for role in ("rgb", "depth", "thermal"):
            save(tmp_path / category / "train" / "good" / role / "1.png", 2)
            save(tmp_path / category / "val" / "ok" / role / "1.png", 2)
            save(tmp_path / category / "test" / "dent" / role / "1.png", 2)
        save(tmp_path / category / "test" / "dent" / "gt" / "1.png")
    (tmp_path / "intrinsics.yaml").write_text(yaml.safe_dump(CAMERA))
    reader = Folder(tmp_path, {"extra": ["thermal"]})
    assert reader.categories() == ["bolt", "nut"]
    assert ids(reader, "validation", "nut") == ["nut/validation/good/1"]
    sample = reader.read(reader.records("nut", "test")[0])
    assert set(sample.images) == {"rgb", "depth", "thermal", "xyz"}
    np.testing.assert_allclose(sample.images["depth"], 0.2, rtol=1e-6)
    assert sample.mask.all()


def test_splits_without_label_folders_and_bare_pictures(tmp_path):
    for stem in ("1", "2"):
        save(tmp_path / f"train/{stem}.png")
    save(tmp_path / "test/new.png")
    reader = Folder(tmp_path, category="cap")
    assert [(r.id, r.label) for r in reader.records("cap", "train")] == [
        ("cap/train/good/1", 0),
        ("cap/train/good/2", 0),
    ]
    (record,) = reader.records("cap", "test")
    assert (record.id, record.label, record.defect) == ("cap/test/unlabelled/new", None, None)
    assert reader.read(record).mask is None


def test_new_parts_in_one_folder_have_no_label(tmp_path):
    save(tmp_path / "7_rgb.png")
    save(tmp_path / "7_depth.png")
    (tmp_path / "intrinsics.json").write_text('{"fx": 9, "fy": 9, "cx": 0, "cy": 0, "scale": 0.001}')
    (tmp_path / "README.md").write_text("notes")
    reader = Folder(tmp_path)
    (record,) = reader.records(tmp_path.name, "test")
    assert record.label is None
    assert "xyz" in reader.read(record).images


def test_a_camera_beside_its_parts_or_for_one_part(tmp_path):
    for kind in ("good", "dent"):
        save(tmp_path / f"test/{kind}/1_depth.png")
        (tmp_path / f"test/{kind}/intrinsics.yaml").write_text(yaml.safe_dump(CAMERA))
    (tmp_path / "test/dent/1_intrinsics.yaml").write_text(yaml.safe_dump({**CAMERA, "scale": 0.01}))
    reader = Folder(tmp_path)
    dent, good = reader.records(tmp_path.name, "test")
    assert reader.read(good).images["depth"][0, 0] == pytest.approx(0.1)
    assert reader.read(dent).images["depth"][0, 0] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], r"holds no parts; expected .*train/good/001_rgb\.png or .*train/good/rgb/001\.png, or a mapping"),
        (["foo/bar.png"], r"holds no parts; expected"),
        (["train/good/1_rgb.png", "tset/good/1_rgb.png"], r"tset: 'tset' is no split: .*'test'\?.*`tset: null`"),
        (["train/good/1.tiff"], r"1\.tiff: its role is unknown; expected a name such as 1_xyz\.tiff"),
        (["train/good/rbg/1.png"], r"rbg: is named after no role: did you mean 'rgb'\?"),
        (["train/good/1_mask.png"], r"1_mask\.png: belongs to no part; add the part's rgb or xyz file"),
        (["train/good/1_rgb.png", "train/good/rgb/1.png"], r"rgb/1\.png and 1_rgb\.png: two 'rgb' files of one part"),
        (["train/1_rgb.png", "train/good/1_rgb.png"], r"1_rgb\.png: lies beside the folder 'good'"),
        (["train/good/rgb/1.png", "train/good/rgb/1.bmp"], r"1\.bmp and 1\.png: two 'rgb' files"),
    ],
)  # fmt: skip
def test_layouts_that_do_not_fit(tmp_path, files, message):
    for name in files:
        save(tmp_path / name)
    with pytest.raises(DataError, match=message):
        Folder(tmp_path).categories()


@pytest.mark.parametrize(
    ("files", "split", "message"),
    [
        (["train/good/1_rgb.png", "train/good/1_xyz.tiff", "train/good/2_rgb.png"], "train",
         r"2_rgb\.png: its partner is missing: expected 'xyz' at .*train/good/2_xyz\.\*; .*add the file"),
        (["test/a/rgb/1.png", "test/a/xyz/1.tiff", "test/a/xyz/2.tiff"], "test",
         r"xyz/2\.tiff: its partner is missing: expected 'rgb' at .*a/rgb/2\.\*"),
        (["train/dent/1_rgb.png"], "train", r"1_rgb\.png: labelled 'dent' but in 'train'.*move it to 'test', or add"),
        (["test/a/1_rgb.png", "test/a/1_mask.png", "test/a/2_rgb.png"], "test",
         r"2_rgb\.png: anomalous, but its mask is missing: expected .*2_mask\.\*; add it, or leave out the masks"),
        (["train/good/1_rgb.png"], "test", r"test: '.*' has no parts of the split 'test'; it has train"),
        (["train/good/1_rgb.png", "train/ok/1_rgb.png"], "train", r"two parts with the id '.*/good/1'; rename one"),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit(tmp_path, files, split, message):
    for name in files:
        save(tmp_path / name)
    reader = Folder(tmp_path)
    with pytest.raises(DataError, match=message):
        reader.records(tmp_path.name, split)


# ------------------------------------------------------------------------------------------------------------- patterns

PATTERNS = {
    "rgb": "{split}/{label}/{id}_color.png",
    "xyz": "{split}/{label}/{id}.pcd",
    "mask": "masks/{label}/{id}.png",
}


def add_by_pattern(root, split, label, id, mask=False):
    save(root / split / label / f"{id}_color.png")
    save(root / split / label / f"{id}.pcd", 3)
    if mask:
        save(root / "masks" / label / f"{id}.png")


def test_patterns_as_an_argument(tmp_path):
    add_by_pattern(tmp_path, "train", "good", "7 a")
    add_by_pattern(tmp_path, "test", "Kratzer ß", "8", mask=True)
    reader = Folder(tmp_path, PATTERNS, category="part", unit="mm")
    assert ids(reader, "train") == ["part/train/good/7 a"]
    sample = reader.read(reader.records("part", "test")[0])
    assert sample.defect == "Kratzer ß"
    assert sample.mask.all()
    np.testing.assert_allclose(sample.images["xyz"], 3e-4, rtol=1e-6)


def test_a_mapping_file_in_the_root_says_everything(tmp_path):
    # '1_depth.png' also fits the pattern of rgb, but that of depth says more
    for category in ("a", "b"):
        save(tmp_path / category / "learn-gut-1.png")
        save(tmp_path / category / "learn-gut-1_depth.png", 5)
        save(tmp_path / category / "pruef-neu-2.png")
        save(tmp_path / category / "pruef-neu-2_depth.png")
        save(tmp_path / category / "alt-gut-3.png")
        save(tmp_path / category / "alt-gut-3_depth.png")
    (tmp_path / "camera.yaml").write_text(yaml.safe_dump(CAMERA))
    settings = {
        "patterns": {
            "rgb": "{category}/{split}-{label}-{id}.png",
            "depth": "{category}/{split}-{label}-{id}_depth.png",
        },
        "splits": {"learn": "train", "pruef": "test", "alt": None},
        "good": ["gut"],
        "unlabelled": ["neu"],
        "intrinsics": "camera.yaml",
    }
    (tmp_path / "polyspect.yaml").write_text(yaml.safe_dump(settings))
    reader = Folder(tmp_path)
    assert reader.categories() == ["a", "b"]
    assert ids(reader, "train", "b") == ["b/train/good/1"]
    assert [(r.id, r.label) for r in reader.records("a", "test")] == [("a/test/unlabelled/2", None)]
    assert reader.read(reader.records("a", "train")[0]).images["xyz"][0, 0, 2] == pytest.approx(0.5)


def test_a_pattern_without_split_or_label_finds_new_parts(tmp_path):
    save(tmp_path / "shots/1.png")
    reader = Folder(tmp_path, {"rgb": "shots/{id}.png"}, category="c")
    assert [(r.id, r.label) for r in reader.records("c", "test")] == [("c/test/unlabelled/1", None)]


def test_partners_and_orphans_of_patterns_are_named(tmp_path):
    add_by_pattern(tmp_path, "train", "good", "1")
    add_by_pattern(tmp_path, "train", "good", "2")
    (tmp_path / "train/good/2.pcd").unlink()
    with pytest.raises(DataError, match=r"2_color\.png: its partner is missing: expected 'xyz' at .*train/good/2\.pcd"):
        Folder(tmp_path, {k: PATTERNS[k] for k in ("rgb", "xyz")}).records(tmp_path.name, "train")
    save(tmp_path / "train/good/2.pcd")
    save(tmp_path / "masks/good/9.png")
    with pytest.raises(DataError, match=r"masks/good/9\.png: a 'mask' file without a part; add the part's 'rgb'"):
        Folder(tmp_path, PATTERNS).categories()


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"rgb": "{split}/{id}_x.png"}, r"no file matches the pattern of 'rgb', .*looked for .*train/001_x\.png"),
        ({"rgb": "{splt}/{id}.png"}, r"pattern of 'rgb': unknown field \{splt\} in .*did you mean 'split'\?"),
        ({"patterns": {"rgb": "{split}/a.png"}}, r"pattern of 'rgb': '\{split\}/a\.png' lacks \{id\}"),
        ({"rgb": "../{id}.png"}, r"'\.\./\{id\}\.png' leads out of"),
        ({"rgb": "/data/{id}.png"}, r"leads out of"),
        ({"mask": "{id}.png"}, r"the patterns name no view"),
        ({"rgb": "{split}/good/{id}_color.png", "splits": {"learn": "train"}}, r"'elsewhere' is no split"),
    ],
)  # fmt: skip
def test_wrong_patterns_are_named(tmp_path, mapping, message):
    save(tmp_path / "elsewhere/good/1_color.png")
    with pytest.raises(DataError, match=message):
        Folder(tmp_path, mapping).categories()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "unti: mm\n",
            r"polyspect\.yaml: 'unti' is neither a setting nor a role with a pattern .*did you mean 'unit'\?",
        ),
        ("unit: inch\n", r"polyspect\.yaml: unknown unit 'inch': .*known: m, mm"),
        ("splits: {a: b}\n", r"polyspect\.yaml: splits: 'a' stands for 'b', which is no split"),
        ("intrinsics: gone.yaml\n", r"polyspect\.yaml: .*gone\.yaml: camera intrinsics not found"),
        ("intrinsics: ../../camera.yaml\n", r"polyspect\.yaml: intrinsics: '\.\./\.\./camera\.yaml' leads out of"),
        ("cloud_size: [0, 4]\n", r"polyspect\.yaml: `cloud_size` must be \[width, height\]"),
        ("good: []\n", r"polyspect\.yaml: `good` and `unlabelled` need at least one label"),
        ("invalid: none\n", r"polyspect\.yaml: `invalid` must be a number or a list of numbers, got 'none'"),
        ("unit: [\n", r"polyspect\.yaml: cannot be read as mapping of a folder in JSON or YAML"),
    ],
)
def test_wrong_mapping_files_are_named(tmp_path, text, message):
    (tmp_path / "polyspect.yaml").write_text(text)
    with pytest.raises(DataError, match=message):
        Folder(tmp_path)
    with pytest.raises(ConfigError, match=r"unknown split 'training'"):
        Folder(tmp_path, {}).has_split(tmp_path.name, "training")


# ------------------------------------------------------------------------------------------------------------------ CSV


def write_csv(root, text):
    (root / "parts.csv").write_text(text, encoding="utf-8-sig")
    return root / "parts.csv"


def test_a_csv_lists_parts_with_labels_and_other_columns(tmp_path):
    save(tmp_path / "shots/1.png")
    outside = save(tmp_path.parent / f"{tmp_path.name}_outside" / "2.png")
    save(tmp_path / "m.png")
    table = write_csv(
        tmp_path,
        "id;split;label;defect;rgb;mask;line\n"
        "p1;train;good;;shots/1.png;;A\n"
        f"p2;test;1;Riß;{outside};m.png;B\n"
        f"p3;;;;{outside};;B\n"
        f"p4;test;ng;;{outside};m.png;C\n"
        f"p5;test;;good;{outside};;C\n",
    )
    reader = Folder(tmp_path, table, category="c")
    (train,) = reader.records("c", "train")
    assert (train.id, train.label, train.meta["columns"]) == ("c/train/good/p1", 0, {"line": "A"})
    assert [(r.id, r.label, r.defect) for r in reader.records("c", "test")] == [
        ("c/test/Riß/p2", 1, "Riß"),
        ("c/test/anomalous/p4", 1, "anomalous"),
        ("c/test/good/p5", 0, "good"),
        ("c/test/unlabelled/p3", None, None),
    ]
    sample = reader.read(reader.records("c", "test")[0])
    assert sample.mask.all()
    assert sample.meta["columns"] == {"line": "B"}
    (tmp_path / "polyspect.json").write_text('{"csv": "parts.csv", "category": "d"}')
    assert Folder(tmp_path).categories() == ["d"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,rgb\np1,gone.png\n", r"parts\.csv line 2: the 'rgb' file .*gone\.png is missing; paths are relative"),
        ("id,rgb\np1,../a.png\n", r"parts\.csv line 2, column 'rgb': '\.\./a\.png' leads out of"),
        ("id,split,rgb\n\np1,training,a.png\n", r"parts\.csv line 3: 'training' is no split: did you mean 'train'\?"),
        ("id,label,defect,rgb\np1,good,dent,a.png\n", r"line 2: the label is 'good' but the defect is 'dent'"),
        ("id,rgb,xyz\np1,,\n", r"line 2: part 'p1' has no view; fill in at least 'rgb' or 'xyz'"),
        ("id,rgb\np1,a.png,b.png\n", r"line 2: has not as many cells as the header"),
        ("id,rgb\np1\n", r"line 2: has not as many cells as the header"),
        ("id,rgb\n,a.png\n", r"line 2: the id is ''; expected a name"),
        ("name,rgb\np1,a.png\n", r"needs a column 'id', .*its columns are name, rgb"),
        ("id,rgb\n", r"needs a column 'id', .* at least one row"),
        ('id,rgb\n"p1,a.png\n', r"cannot be read as a CSV table"),
    ],
)
def test_wrong_csv_tables_are_named(tmp_path, text, message):
    save(tmp_path / "a.png")
    with pytest.raises(DataError, match=message):
        Folder(tmp_path, write_csv(tmp_path, text)).categories()


def test_a_csv_part_without_one_of_its_views_and_a_double_id(tmp_path):
    save(tmp_path / "a.png")
    save(tmp_path / "a.tiff")
    table = write_csv(tmp_path, "id,rgb,xyz\np1,a.png,a.tiff\np2,a.png,\n")
    with pytest.raises(
        DataError, match=r"partner is missing: expected 'xyz' at .*parts\.csv, column 'xyz', row of 'p2'"
    ):
        Folder(tmp_path, table, category="c").records("c", "test")
    table = write_csv(tmp_path, "id,rgb\np1,a.png\np1,a.png\n")
    with pytest.raises(DataError, match=r"two parts with the id 'c/test/unlabelled/p1'"):
        Folder(tmp_path, table, category="c").records("c", "test")
    assert Folder(tmp_path, table, category="c").has_split("c", "test")
    with pytest.raises(DataError, match="has no category 'd'"):
        Folder(tmp_path, table, category="c").records("d", "test")


def test_loose_files_are_read_beside_the_reader(tmp_path):
    rgb, xyz = save(tmp_path / "Ω.png"), save(tmp_path / "Ω.tiff")
    sample = files_sample(guess_roles([xyz, rgb]), id="Ω")
    assert (sample.id, set(sample.images)) == ("Ω", {"rgb", "xyz", "depth"})
