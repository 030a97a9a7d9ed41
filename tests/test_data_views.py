"""From the files of one part to a Sample: the valid rule, units, sizes, and roles told from content."""

import logging

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from polyspect.data.camera import Intrinsics, depth_to_xyz
from polyspect.data.source import Record
from polyspect.data.views import ReadOptions, files_sample, guess_roles, read_record
from polyspect.errors import ConfigError, DataError

H, W = 4, 5
RGB = np.random.default_rng(0).integers(0, 256, (H, W, 3), dtype=np.uint8)
XYZ = np.random.default_rng(1).uniform(0.2, 0.6, (H, W, 3)).astype(np.float32)
CAMERA = Intrinsics(500, 500, 2, 1.5, scale=0.001)


def save_rgb(path, rgb=RGB):
    Image.fromarray(rgb).save(path)
    return path


def save_xyz(path, xyz=XYZ):
    tifffile.imwrite(path, xyz, photometric="rgb")
    return path


def save_depth(path, counts):
    cv2.imwrite(str(path), counts)
    return path


# ------------------------------------------------------------------------------------------------------ the valid rule


def test_nan_inf_zero_and_sentinels_become_one_mask_and_exact_zeros(tmp_path):
    xyz = XYZ.copy()
    xyz[0, 0] = np.nan
    xyz[0, 1, 1] = np.inf
    xyz[0, 2] = 0
    xyz[0, 3, 2] = -9999
    xyz[0, 4] = [0, 0, 0.5]  # on the optical axis: measured
    sample = files_sample({"xyz": save_xyz(tmp_path / "a.tiff", xyz)}, options=ReadOptions(invalid=(-9999,)))
    expected = np.ones((H, W), bool)
    expected[0, :4] = False
    np.testing.assert_array_equal(sample.valid, expected)
    assert sample.valid.dtype == bool
    for name in ("xyz", "depth"):
        assert sample.images[name].dtype == np.float32
        assert not sample.images[name][~expected].any()
    np.testing.assert_array_equal(sample.images["xyz"][expected], xyz[expected])
    np.testing.assert_array_equal(sample.images["depth"], sample.images["xyz"][..., 2])
    assert sample.meta["flags"] == ()


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_a_cloud_without_a_point_is_read_and_flagged(tmp_path, value):
    sample = files_sample({"xyz": save_xyz(tmp_path / "a.tiff", np.full_like(XYZ, value))})
    assert not sample.valid.any()
    assert not sample.images["xyz"].any()
    assert "no_valid_points" in sample.meta["flags"]


def test_pictures_alone_are_valid_everywhere(tmp_path):
    sample = files_sample(
        {"rgb": save_rgb(tmp_path / "part 7.png"), "thermal": save_rgb(tmp_path / "t.png", 255 - RGB)}
    )
    assert sample.id == "part 7"
    assert sample.valid.all()
    assert set(sample.images) == {"rgb", "thermal"}
    np.testing.assert_array_equal(sample.images["thermal"], 255 - RGB)
    assert (sample.label, sample.mask, sample.defect) == (None, None, None)


def test_depth_with_a_camera_gives_the_cloud_and_without_one_only_depth(tmp_path):
    counts = np.random.default_rng(2).integers(1, 2000, (H, W), dtype=np.uint16)
    counts[2, 3] = 0
    path = save_depth(tmp_path / "d.png", counts)
    sample = files_sample({"depth": path}, CAMERA)
    expected = depth_to_xyz(counts * np.float32(0.001), CAMERA)
    np.testing.assert_allclose(sample.images["xyz"], expected, rtol=1e-6)
    np.testing.assert_array_equal(sample.valid, counts > 0)
    assert sample.meta["intrinsics"] == CAMERA
    (tmp_path / "camera.json").write_text('{"fx": 500, "fy": 500, "cx": 2, "cy": 1.5, "scale": 0.001}')
    same = files_sample({"depth": path, "intrinsics": tmp_path / "camera.json"})
    np.testing.assert_array_equal(same.images["xyz"], sample.images["xyz"])
    only = files_sample({"depth": path}, options=ReadOptions(unit="mm"))
    assert set(only.images) == {"depth"}
    np.testing.assert_allclose(only.images["depth"], counts * 1e-3, rtol=1e-6)


def test_a_height_of_zero_counts_where_the_camera_says_so(tmp_path):
    flat = Intrinsics(1000, 1000, 0, 0, model="orthographic", invalid=(-1,))
    np.save(tmp_path / "h.npy", np.array([[0.0, -1.0], [2.0, np.nan]], np.float32))
    sample = files_sample({"depth": tmp_path / "h.npy"}, flat)
    np.testing.assert_array_equal(sample.valid, [[True, False], [True, False]])
    np.testing.assert_allclose(sample.images["xyz"][1, 0], [0, 0.001, 2])


def test_cloud_and_depth_together_must_both_have_measured(tmp_path):
    xyz, counts = XYZ.copy(), np.full((H, W), 500, np.uint16)
    xyz[0, 0], counts[1, 1] = 0, 0
    paths = {"xyz": save_xyz(tmp_path / "a.tiff", xyz), "depth": save_depth(tmp_path / "d.png", counts)}
    sample = files_sample(paths, CAMERA)
    assert np.argwhere(~sample.valid).tolist() == [[0, 0], [1, 1]]
    assert not sample.images["xyz"][1, 1].any()
    np.testing.assert_array_equal(sample.images["xyz"][2:], xyz[2:])  # the file, not the depth's projection


def test_missing_normals_do_not_make_measured_points_invalid(tmp_path):
    normals = np.zeros((H, W, 3), np.float32)
    normals[..., 2] = -1
    normals[0] = np.nan
    xyz = XYZ.copy()
    xyz[3] = 0
    save_xyz(tmp_path / "n.tiff", normals)
    sample = files_sample({"xyz": save_xyz(tmp_path / "a.tiff", xyz), "normals": tmp_path / "n.tiff"})
    np.testing.assert_array_equal(sample.valid[:, 0], [True, True, True, False])
    np.testing.assert_array_equal(sample.images["normals"][:, 0, 2], [0, -1, -1, 0])
    alone = files_sample({"normals": tmp_path / "n.tiff"}, options=ReadOptions(flip_normals=True))
    np.testing.assert_array_equal(alone.valid[:, 0], [False, True, True, True])
    np.testing.assert_array_equal(alone.images["normals"][1, 0], [0, 0, 1])


# ---------------------------------------------------------------------------------------------- units, sizes, contents


def test_millimetres_become_metres_and_are_hinted_at_once_when_forgotten(tmp_path, caplog):
    paths = [save_xyz(tmp_path / f"{i}.tiff", XYZ * 1000) for i in range(2)]
    sample = files_sample({"xyz": paths[0]}, options=ReadOptions(unit="mm"))
    np.testing.assert_allclose(sample.images["xyz"], XYZ, rtol=1e-6)
    with caplog.at_level(logging.WARNING):
        for path in paths:
            assert "looks_like_mm" in files_sample({"xyz": path}).meta["flags"]
    assert caplog.text.count("look like millimetres") == 1
    assert str(tmp_path) in caplog.text
    with pytest.raises(ConfigError, match=r"unknown unit 'cm': .*known: m, mm"):
        ReadOptions(unit="cm")


def test_views_of_different_size_name_both_files(tmp_path):
    rgb = save_rgb(tmp_path / "a.png", np.zeros((8, 10, 3), np.uint8))
    xyz = save_xyz(tmp_path / "a.tiff")
    with pytest.raises(DataError, match=r"a\.tiff: 'xyz' is 5x4 pixels .* but 'rgb' \(.*a\.png\) is 10x8; .*resample"):
        files_sample({"rgb": rgb, "xyz": xyz})
    with pytest.raises(DataError, match=r"m\.png: 'mask' is 10x8 pixels .* but 'xyz' \(.*a\.tiff\) is 5x4"):
        files_sample({"xyz": xyz, "mask": save_rgb(tmp_path / "m.png", np.zeros((8, 10, 3), np.uint8))})


def test_a_cloud_may_bring_colours_and_take_its_grid_from_the_picture(tmp_path):
    np.savez(tmp_path / "a.npz", xyz=XYZ, rgb=RGB)
    np.testing.assert_array_equal(files_sample({"xyz": tmp_path / "a.npz"}).images["rgb"], RGB)
    other = save_rgb(tmp_path / "o.png", 255 - RGB)
    np.testing.assert_array_equal(files_sample({"xyz": tmp_path / "a.npz", "rgb": other}).images["rgb"], 255 - RGB)
    rows = "".join(" ".join(map(str, p)) + "\n" for p in XYZ.reshape(-1, 3).tolist())
    header = f"ply\nformat ascii 1.0\nelement vertex {H * W}\nproperty float x\nproperty float y\nproperty float z\n"
    (tmp_path / "list.ply").write_text(header + "end_header\n" + rows)
    sample = files_sample({"rgb": other, "xyz": tmp_path / "list.ply"})
    np.testing.assert_array_equal(sample.images["xyz"], XYZ)
    sized = files_sample({"xyz": tmp_path / "list.ply"}, options=ReadOptions(cloud_size=(W, H)))
    np.testing.assert_array_equal(sized.images["xyz"], XYZ)


def test_a_part_without_a_view_or_with_a_missing_file(tmp_path):
    with pytest.raises(DataError, match=r"part 'p': no view among its files \(mask\); give at least rgb or xyz"):
        files_sample({"mask": save_rgb(tmp_path / "m.png")}, id="p")
    with pytest.raises(DataError, match=r"gone\.tiff: xyz file not found; its folder holds: m\.png"):
        files_sample({"xyz": tmp_path / "gone.tiff"})


# ------------------------------------------------------------------------------------------------- labels against masks


def record(tmp_path, label, split="test", mask=None):
    files = {"rgb": save_rgb(tmp_path / "a.png")}
    if mask is not None:
        files["mask"] = tmp_path / "m.png"
        Image.fromarray(mask).save(files["mask"])
    return Record("c/test/x/a", "c", split, "x", label, files)


def test_masks_must_agree_with_labels(tmp_path, caplog):
    marked = np.zeros((H, W), np.uint8)
    marked[1, 1:3] = 255
    assert read_record(record(tmp_path, 1, mask=marked), ReadOptions()).mask.sum() == 2
    assert not read_record(record(tmp_path, 0), ReadOptions()).mask.any()  # good test part without a file
    assert read_record(record(tmp_path, None), ReadOptions()).mask is None
    assert read_record(record(tmp_path, 0, split="train"), ReadOptions()).mask is None
    with pytest.raises(DataError, match=r"m\.png: marks 2 defect pixels but the part is labelled good; move the part"):
        read_record(record(tmp_path, 0, mask=marked), ReadOptions())
    with caplog.at_level(logging.WARNING):
        sample = read_record(record(tmp_path, 1, mask=marked * 0), ReadOptions())
    assert "empty_mask" in sample.meta["flags"]
    assert "m.png: marks no defect pixel but the part is labelled anomalous" in caplog.text


# --------------------------------------------------------------------------------------------------------- guess_roles


def test_roles_are_told_from_content(tmp_path):
    unit = XYZ / np.linalg.norm(XYZ, axis=2, keepdims=True)
    unit[0, 0] = 0
    paths = {
        "rgb": save_rgb(tmp_path / "1.png"),
        "xyz": save_xyz(tmp_path / "2.tiff"),
        "depth": save_depth(tmp_path / "3.png", np.ones((H, W), np.uint16)),
        "normals": save_xyz(tmp_path / "4.tiff", unit),
        "mask": save_rgb(tmp_path / "a_mask.png"),
        "intrinsics": tmp_path / "camera.yaml",
    }
    paths["intrinsics"].write_text("fx: 1\n")
    assert guess_roles(paths.values()) == paths
    np.save(tmp_path / "d.npy", XYZ[..., 2])
    (tmp_path / "c.pcd").write_text("VERSION .7\n")
    assert guess_roles([tmp_path / "d.npy", tmp_path / "c.pcd"]) == {
        "depth": tmp_path / "d.npy",
        "xyz": tmp_path / "c.pcd",
    }
    assert guess_roles([save_rgb(tmp_path / "part_normals.png")]) == {"normals": tmp_path / "part_normals.png"}


def test_two_files_of_one_role_are_named(tmp_path):
    first, second = save_rgb(tmp_path / "1.png"), save_rgb(tmp_path / "2.png")
    with pytest.raises(DataError, match=r"1\.png and .*2\.png both look like 'rgb'; say which is which: ROLE=FILE"):
        guess_roles([first, second])
