import dataclasses
import hashlib
import json
import math
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile

from polyspect.data.source import open_reader
from polyspect.data.synthetic import CATEGORIES, DEFECTS, make_part, part_seed, render_part, write_dataset
from polyspect.data.synthetic.canvas import Streams, Surface, digits, make_canvas, noise, scatter
from polyspect.data.synthetic.defects import MAKERS
from polyspect.data.synthetic.part import _size_of
from polyspect.data.synthetic.render import (
    BASELINE_MM,
    DEPTH_NOISE_MM,
    DISTANCE_MM,
    Camera,
    cast,
    make_scene,
    measure,
    points,
    seen,
    throw_dice,
)
from polyspect.errors import ConfigError, DataError

SIZE = 96
PAIRS = [(category, kind) for category, spec in CATEGORIES.items() for kind in spec.defects]
SMALL = {"train": 2, "validation": 1, "test_good": 1, "test_per_defect": 1, "size": 64}


def flat_scene(model="pinhole", size=128, pitch_mm=0.5, distance=DISTANCE_MM):
    """A scene seen straight from above: no tilt, turn or shift."""
    rngs = (np.random.default_rng(k) for k in range(3))
    scene = make_scene(Camera(model, size, pitch_mm), 0, (0.1, 0.1, 0.1), *rngs)
    frame = np.array([[1.0, 0, 0], [0, 1, 0], [0, 0, -1]])
    return dataclasses.replace(scene, frame=frame, origin=np.array([0.0, 0, distance]))


def matt(height):
    ones = np.ones_like(height)
    return Surface(height, np.repeat(ones[..., None] * 0.5, 3, 2), 0 * ones, (height > 0).astype(np.float32), 10.0)


def tree_hash(root):
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def test_every_category_has_five_kinds_and_one_of_each_group():
    assert len(CATEGORIES) == 10
    assert set(MAKERS) == set(DEFECTS)
    assert set(DEFECTS.values()) == {"rgb", "3d", "both"}
    for spec in CATEGORIES.values():
        assert len(spec.defects) >= 5
        assert len(set(spec.defects)) == len(spec.defects)
        assert {DEFECTS[kind] for kind in spec.defects} == {"rgb", "3d", "both"}
        assert spec.kind in {"rigid", "natural", "deformable"}


def test_the_documentation_lists_what_there_is():
    page = (Path(__file__).resolve().parents[1] / "docs" / "synthetic.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:3] == "| `"]
    table = {row[0].strip("`"): row[1:] for row in rows}
    assert set(table) == set(CATEGORIES) | set(DEFECTS)
    for name, spec in CATEGORIES.items():
        kind, _, view, kinds = table[name]
        assert (kind, view, tuple(kinds.split(", "))) == (spec.kind, f"{spec.field_mm} mm", spec.defects)
    for name, group in DEFECTS.items():
        assert table[name][0] == group


@pytest.mark.parametrize("category", CATEGORIES)
def test_a_good_part_is_what_a_sample_promises(category):
    part = render_part(category, 3, size=128)
    s = part.sample
    assert (s.label, s.defect, s.mask.any()) == (0, "good", False)
    assert s.images["rgb"].dtype == np.uint8
    assert all(s.images[name].dtype == np.float32 for name in ("xyz", "depth", "normals"))
    assert not s.images["xyz"][~s.valid].any()
    assert not s.images["normals"][~s.valid].any()
    assert (s.images["depth"][s.valid] > 0.3).all()
    np.testing.assert_array_equal(s.images["depth"], s.images["xyz"][..., 2])
    np.testing.assert_allclose(np.linalg.norm(s.images["normals"][s.valid], axis=-1), 1, atol=1e-5)
    assert (s.images["normals"][s.valid] * s.images["xyz"][s.valid]).sum(-1).max() < 0.05  # towards the camera
    assert 0.8 < s.valid[part.part].mean() < 0.995
    plane = np.array(s.meta["table_plane"])
    height = part.xyz @ plane[:3] + plane[3]
    assert (height[part.part] > 0.005).mean() > 0.85  # survives the usual removal of 5 mm around the table
    assert np.abs(height[~part.part]).mean() < 0.001
    border = np.ones_like(part.part)
    border[1:-1, 1:-1] = False
    assert not part.part[border].any()  # nothing is cut off
    json.dumps(s.meta)


@pytest.mark.parametrize(("category", "kind"), PAIRS)
def test_a_defect_changes_its_mask_only_and_only_where_its_group_says(category, kind):
    seed = part_seed(5, category, "test", kind, 0)
    part, good = render_part(category, seed, kind, size=SIZE), make_part(category, seed, size=SIZE)
    bad, mask = part.sample, part.sample.mask
    assert (bad.label, bad.defect) == (1, kind)
    assert mask.sum() >= 6
    assert not (mask & ~part.part).any()
    changed = {name: bad.images[name] != good.images[name] for name in ("rgb", "xyz", "normals")}
    changed = {name: different.any(axis=-1) for name, different in changed.items()}
    for different in changed.values():
        assert not (different & ~mask).any()
    np.testing.assert_array_equal(bad.valid[~mask], good.valid[~mask])
    if DEFECTS[kind] == "rgb":
        assert not changed["xyz"].any()
        assert not changed["normals"].any()
        np.testing.assert_array_equal(bad.valid, good.valid)
    else:
        assert changed["xyz"][mask & bad.valid & good.valid].mean() > 0.3
    if DEFECTS[kind] == "3d":
        assert not changed["rgb"].any()
    else:
        assert changed["rgb"][mask].mean() > 0.5
    described = bad.meta["defect"]
    assert (described["kind"], described["modality"]) == (kind, DEFECTS[kind])
    assert (described["height_mm"] == 0) == (DEFECTS[kind] == "rgb")


@pytest.mark.parametrize("camera", ["pinhole", "orthographic"])
@pytest.mark.parametrize(("category", "kind"), [("gear", "discolouration"), ("tuber", "stain"), ("biscuit", "hole")])
def test_true_area_agrees_with_the_mask_and_the_pixel_pitch(category, kind, camera):
    ratios = []
    for seed in range(4):
        mask = make_part(category, seed, kind, camera=camera, severity=0.8)
        good = render_part(category, seed, camera=camera)  # a hole's mask is drawn where its rim is
        known, area = mask.meta["camera"], mask.meta["defect"]["area_mm2"]
        pitch = good.xyz[..., 2] * 1000 / known["fx"] if camera == "pinhole" else 1000 * known["pitch_m"]
        ray = good.xyz / good.xyz[..., 2:] if camera == "pinhole" else np.array([0.0, 0, 1])
        # A pixel's share of the part's plane, through the surface that it sees at a slant:
        slant = good.normals @ mask.meta["table_plane"][:3] / -(good.normals * ray).sum(-1)
        ratios.append(float((pitch**2 * slant)[mask.mask].sum()) / area)
    assert np.mean(ratios) == pytest.approx(1, abs=0.03)
    assert np.max(np.abs(np.array(ratios) - 1)) < 0.08


def test_size_of_a_disc_is_that_of_a_disc():
    canvas = make_canvas(400, 40.0)
    disc = np.hypot(canvas.x - 4, canvas.y + 7) < 5
    mask = np.zeros((10, 10), bool)
    mask[2:4, 5:9] = True
    found = _size_of(disc, -1.5 * disc, canvas, mask, np.ones((10, 10, 3)))
    assert found["area_mm2"] == pytest.approx(math.pi * 25, rel=0.01)
    assert found["diameter_mm"] == pytest.approx(10, rel=0.01)
    assert found["size_mm"] == pytest.approx([10, 10], abs=0.15)
    assert found["centre_mm"] == pytest.approx([4, -7], abs=0.01)
    assert (found["height_mm"], found["centre_px"], found["area_px"]) == (-1.5, [6.5, 2.5], 8)


@pytest.mark.parametrize("model", ["pinhole", "orthographic"])
def test_a_slab_is_seen_at_its_height_and_in_its_outline(model):
    canvas = make_canvas(256, 60.0)
    slab = np.where((np.abs(canvas.x) < 20) & (np.abs(canvas.y) < 10), 12, 0).astype(np.float32)
    scene = flat_scene(model)
    hits = cast(scene, canvas, slab)
    xyz = points(scene, hits.distance)
    on_top = hits.height > 11.99
    np.testing.assert_allclose(xyz[..., 2][on_top], (DISTANCE_MM - 12) / 1000, atol=1e-6)
    np.testing.assert_allclose(xyz[..., 2][hits.height < 0.01], DISTANCE_MM / 1000, atol=2e-5)
    for axis, width in ((0, 0.040), (1, 0.020)):  # first to last pixel centre: short by less than two pixels
        assert width - 0.001 < np.ptp(xyz[..., axis][on_top]) < width + 0.0002
    known = scene.camera.describe()
    u, v = np.meshgrid(np.arange(128), np.arange(128))
    if model == "pinhole":
        x, y = (u - known["cx"]) / known["fx"] * xyz[..., 2], (v - known["cy"]) / known["fy"] * xyz[..., 2]
    else:
        x, y = (u - known["cx"]) * known["pitch_m"], (v - known["cy"]) * known["pitch_m"]
    np.testing.assert_allclose(xyz[..., 0], x, atol=1e-6)
    np.testing.assert_allclose(xyz[..., 1], y, atol=1e-6)


def test_rays_meet_the_same_point_as_a_fine_walk_along_each_of_them():
    canvas = make_canvas(160, 60.0)
    dome = (15 * np.sqrt(np.clip(1 - (canvas.r / 22) ** 2, 0, 1))).astype(np.float32)
    scene = flat_scene(size=32, pitch_mm=2.0)
    hits = cast(scene, canvas, dome)
    _, direction, _ = scene.camera.rays()
    for i, j in [(16, 16), (12, 20), (9, 9), (20, 7), (2, 30)]:
        levels = np.linspace(15, 0, 20001)
        at = (DISTANCE_MM - levels)[:, None] * direction[i, j]
        ground = 15 * np.sqrt(np.clip(1 - (at[:, 0] ** 2 + at[:, 1] ** 2) / 22**2, 0, 1))
        assert hits.height[i, j] == pytest.approx(levels[np.argmax(ground >= levels)], abs=0.05)


def test_normals_of_a_ramp_and_of_a_tilted_table():
    canvas = make_canvas(128, 60.0)
    ramp = (0.25 * (canvas.x + 30)).astype(np.float32)
    hits = cast(flat_scene(), canvas, ramp)
    expected = np.array([-0.25, 0, -1]) / math.hypot(0.25, 1)
    np.testing.assert_allclose(hits.normals[40:90, 40:90], np.broadcast_to(expected, (50, 50, 3)), atol=1e-4)
    part = render_part("gear", 5, size=64)
    plane = np.array(part.sample.meta["table_plane"])
    far = part.xyz[0, 0]
    assert plane[:3] @ far + plane[3] == pytest.approx(0, abs=1e-6)
    np.testing.assert_allclose(part.normals[0, 0], plane[:3], atol=1e-6)


@pytest.mark.parametrize("distance", [400.0, 600.0])
def test_depth_noise_grows_with_the_square_of_the_distance(distance):
    canvas = make_canvas(64, 40.0)
    surface = matt(np.zeros((64, 64), np.float32))
    scene = flat_scene(distance=distance, size=256, pitch_mm=0.1)
    hits = cast(scene, canvas, surface.height)
    distances, _ = measure(scene, canvas, surface, hits, throw_dice(256, np.random.default_rng(0)))
    expected = DEPTH_NOISE_MM * (distance / DISTANCE_MM) ** 2
    assert np.std(distances - hits.distance) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("model", ["pinhole", "orthographic"])
def test_only_what_the_camera_can_reach_is_seen(model):
    canvas = make_canvas(300, 80.0)
    post = np.where((np.abs(canvas.x - 20) < 5) & (np.abs(canvas.y) < 5), 30, 0).astype(np.float32)
    hidden = ~seen(flat_scene(model), canvas, post)
    # From straight above, the post's far edge at x = 25 hides the table up to where the ray over it comes down:
    reach = 25 * DISTANCE_MM / (DISTANCE_MM - 30) if model == "pinhole" else 25
    columns = np.flatnonzero(hidden[150])
    if model == "orthographic":
        assert len(columns) == 0
    else:
        assert canvas.x[0, columns].min() == pytest.approx(25, abs=0.4)
        assert canvas.x[0, columns].max() == pytest.approx(reach, abs=0.4)


def test_the_projector_leaves_a_shadow_of_the_right_width_on_the_far_side():
    canvas = make_canvas(300, 70.0)
    box = np.where((np.abs(canvas.x) < 10) & (np.abs(canvas.y) < 10), 15, 0).astype(np.float32)
    scene = flat_scene(size=256, pitch_mm=0.25)
    hits = cast(scene, canvas, box)
    dice = throw_dice(256, np.random.default_rng(0))
    clean = dataclasses.replace(dice, keep=np.ones((256, 256)), blotch=np.zeros((256, 256)))
    _, valid = measure(scene, canvas, matt(box), hits, clean)
    row = np.flatnonzero(~valid[128] & (hits.height[128] < 0.01))
    table_x = points(scene, hits.distance)[128, row, 0] * 1000
    # The ray from the projector over the box's upper right edge meets the table here:
    reach = 10 + 15 * (10 + BASELINE_MM) / (DISTANCE_MM - 15)
    assert table_x.max() == pytest.approx(reach, abs=0.6)
    assert table_x.min() > 9  # none on the projector's side


def test_noise_has_unit_variance_and_does_not_depend_on_the_grid():
    fine, coarse = make_canvas(400, 80.0), make_canvas(200, 80.0)
    drawn = noise(np.random.default_rng(1), fine, 1.0)
    assert drawn.std() == pytest.approx(1, abs=0.05)
    assert drawn.mean() == pytest.approx(0, abs=0.05)
    pooled = noise(np.random.default_rng(1), fine, 9.0).reshape(200, 2, 200, 2).mean((1, 3))
    np.testing.assert_allclose(pooled, noise(np.random.default_rng(1), coarse, 9.0), atol=0.01)


def test_noise_passes_through_a_lattice_interpolated_by_hand():
    canvas, rng = make_canvas(50, 25.0), np.random.default_rng(4)
    field = noise(rng, canvas, 5.0)
    lattice = np.random.default_rng(4).standard_normal((8, 8), dtype=np.float32)

    def cubic(d):
        d = abs(d)
        return 1.5 * d**3 - 2.5 * d**2 + 1 if d < 1 else (-0.5 * d**3 + 2.5 * d**2 - 4 * d + 2 if d < 2 else 0.0)

    for row, column in [(0, 0), (13, 40), (49, 7)]:
        wy = np.array([cubic((row + 0.5) * 0.1 + 1 - k) for k in range(8)])
        wx = np.array([cubic((column + 0.5) * 0.1 + 1 - k) for k in range(8)])
        expected = wy @ lattice @ wx / np.linalg.norm(wy) / np.linalg.norm(wx)
        assert field[row, column] == pytest.approx(expected, abs=1e-4)


def test_scattered_spots_come_one_per_filled_square():
    canvas = make_canvas(400, 80.0)
    spots = scatter(np.random.default_rng(0), canvas, 10.0, 1.0, jitter=0.3).spots(2.0, spread=0.0)
    count, _ = cv2.connectedComponents((spots > 0.2).astype(np.uint8))
    assert count - 1 == 64
    assert not scatter(np.random.default_rng(0), canvas, 10.0, 0.0).spots(2.0).any()


def test_digits_are_upright_and_in_place():
    canvas = make_canvas(200, 40.0)
    one = digits(canvas, "1", 5, -5, 8)
    rows, columns = np.nonzero(one > 0.5)
    assert canvas.y[rows, 0].mean() == pytest.approx(-5, abs=1)
    assert canvas.x[0, columns].mean() == pytest.approx(5, abs=1.2)
    foot, head = one[rows.max() - 4], one[rows.min() + 4]
    assert foot.sum() > 2 * head.sum()  # the 1 stands on a bar
    assert not digits(canvas, " ", 0, 0, 8).any()


def test_a_part_is_the_same_at_every_size():
    small = make_part("foam_block", 9, "hole", size=128).meta["defect"]
    large = make_part("foam_block", 9, "hole", size=256).meta["defect"]
    assert small["centre_mm"] == pytest.approx(large["centre_mm"], abs=0.7)
    assert small["area_mm2"] == pytest.approx(large["area_mm2"], rel=0.15)
    assert small["severity"] == large["severity"]


def test_more_severe_is_larger_and_deeper():
    weak, gross = (
        [make_part("bun", s, "dent", size=SIZE, severity=v).meta["defect"] for s in range(4)] for v in (0, 1)
    )
    assert all(b["height_mm"] < 2 * a["height_mm"] < 0 for a, b in zip(weak, gross))
    assert all(b["area_mm2"] > 2 * a["area_mm2"] for a, b in zip(weak, gross))


def test_parts_differ_and_repeat_by_seed_in_any_order():
    first = make_part("washer", 1, "crack", size=64)
    other = make_part("washer", 2, "crack", size=64)
    again = make_part("washer", 1, "crack", size=64)
    for name, image in first.images.items():
        np.testing.assert_array_equal(image, again.images[name])
        assert (image != other.images[name]).any()
    assert first.meta == again.meta
    seeds = {part_seed(0, c, split, k, i) for c, k in PAIRS for split in ("train", "test") for i in range(5)}
    assert len(seeds) == len(PAIRS) * 10
    assert max(seeds) < 2**53
    assert Streams(3)("pose").random() != Streams(3)("light").random()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("braket", 0), "did you mean 'bracket'"),
        (("washer", 0, "bnd"), "'washer' has no defect 'bnd'"),
        (("washer", -1), "`seed` must be 0 or larger, got -1"),
        (("washer", 0, None, 32), "`size` must be at least 64 pixels, got 32"),
        (("washer", 0, None, 64, "fisheye"), "unknown `camera` 'fisheye'"),
        (("washer", 0, "dent", 64, "pinhole", 1.5), "`severity` must be between 0 and 1, got 1.5"),
    ],
)
def test_wrong_settings_are_named(arguments, said):
    with pytest.raises(ConfigError) as caught:
        make_part(*arguments)
    assert said in str(caught.value)


def test_a_data_set_has_the_layout_and_reads_back(tmp_path):
    seen = []
    summary = write_dataset(tmp_path, ["gear"], **SMALL, seed=3, progress=lambda *step: seen.append(step))
    kinds = CATEGORIES["gear"].defects
    assert summary["parts"] == summary["written"] == 4 + len(kinds)
    assert seen[-1] == (summary["parts"], summary["parts"], f"gear/test/{kinds[-1]}/000")
    assert json.loads((tmp_path / "synthetic.json").read_text())["settings"]["seed"] == 3
    assert "no\npublished" in (tmp_path / "SYNTHETIC.md").read_text()
    assert json.loads((tmp_path / "gear" / "camera.json").read_text())["model"] == "pinhole"

    seed = part_seed(3, "gear", "test", "dent", 0)
    expected = make_part("gear", seed, "dent", 64)
    folder = tmp_path / "gear" / "test" / "dent"
    np.testing.assert_array_equal(cv2.imread(str(folder / "rgb" / "000.png"))[..., ::-1], expected.images["rgb"])
    np.testing.assert_array_equal(tifffile.imread(folder / "xyz" / "000.tiff"), expected.images["xyz"])
    np.testing.assert_array_equal(cv2.imread(str(folder / "gt" / "000.png"), -1), 255 * expected.mask)
    meta = json.loads((folder / "meta" / "000.json").read_text())
    assert meta == {"id": "gear/test/dent/000", **expected.meta}
    assert not cv2.imread(str(tmp_path / "gear" / "test" / "good" / "gt" / "000.png"), -1).any()
    assert not (tmp_path / "gear" / "train" / "good" / "gt").exists()

    reader = open_reader("mvtec3d", tmp_path)
    assert reader.categories() == ["gear"]
    assert [len(reader.records("gear", split)) for split in ("train", "validation", "test")] == [2, 1, 1 + len(kinds)]
    record = next(r for r in reader.records("gear", "test") if r.defect == "dent")
    sample = reader.read(record)
    np.testing.assert_array_equal(sample.valid, expected.valid)
    np.testing.assert_array_equal(sample.mask, expected.mask)
    np.testing.assert_allclose(sample.images["normals"], expected.images["normals"], atol=0.01)


def test_writing_twice_in_parts_or_in_one_go_gives_the_same_bytes(tmp_path):
    write_dataset(tmp_path / "a", ["cord", "washer"], **SMALL)
    write_dataset(tmp_path / "b", ["washer"], **SMALL)
    write_dataset(tmp_path / "b", ["cord"], **{**SMALL, "train": 1})
    again = write_dataset(tmp_path / "b", ["cord", "washer"], **SMALL)
    assert again["written"] == 1
    assert tree_hash(tmp_path / "a") == tree_hash(tmp_path / "b")


def test_a_killed_run_is_resumed_with_the_same_bytes(tmp_path):
    first = write_dataset(tmp_path, ["washer"], **SMALL)
    whole = tree_hash(tmp_path)
    (tmp_path / "washer" / "train" / "good" / "meta" / "001.json").unlink()
    (tmp_path / "washer" / "test" / "dent" / "xyz" / "000.tiff").unlink()
    (tmp_path / "washer" / "test" / "crack" / "meta" / "000.json").write_text("{")
    second = write_dataset(tmp_path, ["washer"], **SMALL)
    assert (second["written"], second["skipped"]) == (3, first["parts"] - 3)
    assert tree_hash(tmp_path) == whole


def test_more_workers_write_the_same_bytes(tmp_path):
    write_dataset(tmp_path / "one", ["washer"], **SMALL)
    write_dataset(tmp_path / "two", ["washer"], **SMALL, workers=2)
    assert tree_hash(tmp_path / "one") == tree_hash(tmp_path / "two")


def test_a_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"is not empty and holds no synthetic\.json"):
        write_dataset(tmp_path, ["washer"], **SMALL)
    (tmp_path / "washer").mkdir()
    with pytest.raises(DataError, match="is there and not synthetic"):
        write_dataset(tmp_path, ["washer"], **SMALL, overwrite=True)
    (tmp_path / "washer").rmdir()
    write_dataset(tmp_path, ["washer"], **SMALL, overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with pytest.raises(DataError, match="is a file"):
        write_dataset(tmp_path / "notes.txt", ["washer"], **SMALL)


def test_other_settings_need_overwrite_and_leave_nothing_old(tmp_path):
    write_dataset(tmp_path, ["washer"], **SMALL)
    with pytest.raises(DataError, match="with other settings"):
        write_dataset(tmp_path, ["washer"], **SMALL, seed=1)
    write_dataset(tmp_path, ["washer"], **{**SMALL, "train": 1}, seed=1, overwrite=True)
    assert len(list((tmp_path / "washer" / "train" / "good" / "rgb").iterdir())) == 1
    shutil.rmtree(tmp_path / "washer")
    (tmp_path / "synthetic.json").write_text("[]")
    with pytest.raises(DataError, match="is not what polyspect writes"):
        write_dataset(tmp_path, ["washer"], **SMALL)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"categories": ["gera"]}, "did you mean 'gear'"),
        ({"categories": []}, "`categories` is empty"),
        ({"categories": ["gear"], "train": -1}, "`train` must be at least 0, got -1"),
        ({"categories": ["gear"], "workers": 0}, "`workers` must be at least 1, got 0"),
        ({"categories": ["gear"], "size": 10}, "`size` must be at least 64"),
    ],
)
def test_wrong_options_are_named_before_anything_is_written(tmp_path: Path, options, said):
    with pytest.raises(ConfigError) as caught:
        write_dataset(tmp_path / "new", **options)
    assert said in str(caught.value)
    assert not (tmp_path / "new").exists()
