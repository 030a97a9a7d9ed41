"""One function per kind of file: what is written comes back, and what is broken is named."""

import logging
import math

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from polyspect.data import files, opening
from polyspect.data.camera import Intrinsics, depth_to_xyz
from polyspect.errors import DataError

RGB = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
XYZ = np.random.default_rng(1).normal(size=(6, 5, 3)).astype(np.float32)


def write_tiff(path, array, **options):
    """A TIFF with the channels last, whatever tifffile's default will be."""
    if array.ndim == 3 and "photometric" not in options:
        options["photometric"] = "rgb"
    tifffile.imwrite(path, array, **options)


# -------------------------------------------------------------------------------------------------------------- images


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tif"])
def test_lossless_colour_images_come_back_exactly(tmp_path, name):
    Image.fromarray(RGB).save(tmp_path / name)
    image = files.read_image(tmp_path / name)
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, RGB)
    assert files.image_size(tmp_path / name) == (6, 5)


def test_jpeg_is_read_as_rgb_not_bgr(tmp_path):
    red = np.zeros((16, 16, 3), np.uint8)
    red[..., 0] = 200
    Image.fromarray(red).save(tmp_path / "a.jpg", quality=95)
    assert np.abs(files.read_image(tmp_path / "a.jpg").astype(int) - red).max() <= 3


def test_grey_becomes_three_equal_channels_and_alpha_is_dropped_unblended(tmp_path):
    Image.fromarray(RGB[..., 0]).save(tmp_path / "grey.png")
    rgba = np.dstack([RGB, np.zeros((6, 5), np.uint8)])
    Image.fromarray(rgba).save(tmp_path / "alpha.png")
    np.testing.assert_array_equal(files.read_image(tmp_path / "grey.png"), np.dstack([RGB[..., 0]] * 3))
    np.testing.assert_array_equal(files.read_image(tmp_path / "alpha.png"), RGB)


def test_a_palette_is_looked_up_and_a_bilevel_image_is_black_and_white(tmp_path):
    picture = Image.new("P", (2, 1))
    picture.putpalette([10, 20, 30, 40, 50, 60])
    picture.putdata([0, 1])
    picture.save(tmp_path / "p.png")
    np.testing.assert_array_equal(files.read_image(tmp_path / "p.png"), [[[10, 20, 30], [40, 50, 60]]])
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "b.png")
    np.testing.assert_array_equal(files.read_image(tmp_path / "b.png")[..., 0], [[255, 0]])


@pytest.mark.parametrize("name", ["a.png", "a.tiff"])
def test_of_16_bits_the_high_byte_is_kept(tmp_path, name):
    values = np.array([[0, 255, 256], [511, 65535, 0x1234]], np.uint16)
    cv2.imwrite(str(tmp_path / name), values)
    np.testing.assert_array_equal(files.read_image(tmp_path / name)[..., 1], [[0, 0, 1], [1, 255, 0x12]])
    colour = np.dstack([values, values[::-1], values])
    cv2.imwrite(str(tmp_path / name), colour)  # BGR, symmetric in the outer channels
    np.testing.assert_array_equal(files.read_image(tmp_path / name), (colour >> 8).astype(np.uint8))


def test_a_12_bit_image_in_16_bits_is_pointed_out(tmp_path, caplog):
    cv2.imwrite(str(tmp_path / "a.png"), np.full((4, 4), 4095, np.uint16))
    with caplog.at_level(logging.WARNING):
        assert files.read_image(tmp_path / "a.png").max() == 15
    assert str(tmp_path) in caplog.text
    assert "less than 12 bits" in caplog.text


def test_exif_orientation_is_not_applied_but_said_once(tmp_path, caplog):
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("a.jpg", "b.jpg"):
        Image.fromarray(np.zeros((4, 9, 3), np.uint8)).save(tmp_path / name, exif=exif)
    with caplog.at_level(logging.WARNING):
        assert files.read_image(tmp_path / "a.jpg").shape == (4, 9, 3)
        files.read_image(tmp_path / "b.jpg")
    assert caplog.text.count("EXIF orientation is not applied") == 1


def test_content_decides_not_the_suffix(tmp_path):
    write_tiff(tmp_path / "really_tiff.png", RGB, photometric="rgb")
    np.testing.assert_array_equal(files.read_image(tmp_path / "really_tiff.png"), RGB)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif"])
def test_truncated_images_are_refused(tmp_path, name):
    noise = np.random.default_rng(3).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / name
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=r"(?i)truncated|cut off") as error:
        files.read_image(path)
    assert str(path) in str(error.value)
    assert "copy" in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_no_image_is_told_apart(tmp_path):
    path = tmp_path / "a.png"
    with pytest.raises(DataError, match="image not found; its folder is empty"):
        files.read_image(path)
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"a\.png: image is empty \(0 bytes\).*copy it again"):
        files.read_image(path)
    path.write_bytes(b"hello, world")
    with pytest.raises(DataError, match=r"a\.png: not a PNG, JPEG, BMP or TIFF image; it begins with b'hello, w'"):
        files.read_image(path)
    with pytest.raises(DataError, match="expected image, found a folder"):
        files.read_image(tmp_path)
    Image.new("CMYK", (4, 4)).save(tmp_path / "c.jpg")
    with pytest.raises(DataError, match="colour space CMYK; expected RGB or grey"):
        files.read_image(tmp_path / "c.jpg")


def test_a_missing_file_names_its_nearest_neighbour(tmp_path):
    for stem in ("000", "001", "bolt"):
        Image.fromarray(RGB).save(tmp_path / f"{stem}.png")
    with pytest.raises(DataError, match=r"bolts\.png: image not found; did you mean 'bolt\.png'\? its folder holds"):
        files.read_image(tmp_path / "bolts.png")
    with pytest.raises(DataError, match=r"the folder .*nowhere does not exist either"):
        files.read_image(tmp_path / "nowhere" / "a.png")


def test_wrong_kinds_of_numbers_and_channels_are_named(tmp_path):
    write_tiff(tmp_path / "float.tiff", XYZ)
    with pytest.raises(
        DataError, match=r"float\.tiff: holds shape 6x5x3 of float32; expected an image of 8 or 16 bits"
    ):
        files.read_image(tmp_path / "float.tiff")
    write_tiff(tmp_path / "five.tiff", np.zeros((7, 7, 5), np.uint8), photometric="minisblack", planarconfig=1)
    with pytest.raises(DataError, match=r"shape 7x7x5 of uint8; expected 1 \(grey\) or 3 \(RGB\) channels"):
        files.read_image(tmp_path / "five.tiff")
    write_tiff(tmp_path / "inverted.tiff", RGB[..., 0], photometric="miniswhite")
    with pytest.raises(DataError, match="colour space MINISWHITE"):
        files.read_image(tmp_path / "inverted.tiff")
    with tifffile.TiffWriter(tmp_path / "two.tiff") as writer:
        writer.write(RGB, photometric="rgb")
        writer.write(np.zeros((3, 3), np.uint8))
    with pytest.raises(DataError, match="holds 2 separate images; expected one: split the file"):
        files.read_image(tmp_path / "two.tiff")


def test_non_ascii_and_very_long_paths(tmp_path):
    folder = tmp_path / "Prüfling №7 ナット" / ("d" * 200) / ("e" * 200)
    folder.mkdir(parents=True)
    path = folder / ("ß" * 100 + ".png")
    Image.fromarray(RGB).save(path)
    np.testing.assert_array_equal(files.read_image(path), RGB)
    write_tiff(path.with_suffix(".tiff"), XYZ)
    np.testing.assert_array_equal(files.read_xyz_tiff(path.with_suffix(".tiff")), XYZ)
    with pytest.raises(DataError, match="cannot be opened: File name too long"):
        files.read_image(folder / ("x" * 300 + ".png"))


# --------------------------------------------------------------------------------------------------------------- masks


def test_masks_of_0_1_and_0_255_and_any_colour_are_equal(tmp_path):
    truth = np.zeros((6, 5), bool)
    truth[1:3, 2:4] = True
    for name, values in {
        "one.png": truth.astype(np.uint8),
        "full.png": truth.astype(np.uint8) * 255,
        "wide.tiff": truth.astype(np.uint16) * 300,
        "bool.png": truth,
        "red.png": np.dstack([truth * 255, truth * 0, truth * 0]).astype(np.uint8),
        "alpha.png": np.dstack([np.dstack([truth * 9] * 3), np.full((6, 5), 255)]).astype(np.uint8),
    }.items():
        if name.endswith("tiff"):
            write_tiff(tmp_path / name, values)
        else:
            Image.fromarray(values).save(tmp_path / name)
        mask = files.read_mask(tmp_path / name)
        assert mask.dtype == bool
        np.testing.assert_array_equal(mask, truth, err_msg=name)
    np.save(tmp_path / "a.npy", truth)
    np.testing.assert_array_equal(files.read_mask(tmp_path / "a.npy"), truth)


def test_a_jpeg_mask_is_refused(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "m.jpg")
    with pytest.raises(
        DataError, match=r"m\.jpg: is a JPEG; its artefacts would count as defect pixels: save masks as PNG"
    ):
        files.read_mask(tmp_path / "m.jpg")


# -------------------------------------------------------------------------------------------------------------- clouds


@pytest.mark.parametrize("options", [{}, {"compression": "zlib"}, {"rowsperstrip": 2}, {"byteorder": ">"}])
def test_an_xyz_tiff_comes_back_bit_for_bit(tmp_path, options):
    write_tiff(tmp_path / "a.tiff", XYZ, **options)
    xyz = files.read_xyz_tiff(tmp_path / "a.tiff")
    assert xyz.dtype == np.dtype("=f4")
    np.testing.assert_array_equal(xyz, XYZ)


def test_channels_first_and_three_pages_are_turned(tmp_path):
    write_tiff(tmp_path / "planes.tiff", np.moveaxis(XYZ, 2, 0), photometric="rgb", planarconfig="separate")
    with tifffile.TiffWriter(tmp_path / "pages.tiff") as writer:
        for axis in range(3):
            writer.write(np.ascontiguousarray(XYZ[..., axis]), metadata=None)
    for name in ("planes.tiff", "pages.tiff"):
        np.testing.assert_array_equal(files.read_xyz_tiff(tmp_path / name), XYZ, err_msg=name)


@pytest.mark.parametrize(
    "options", [{}, {"compression": "zlib"}, {"rowsperstrip": 16}, {"compression": "zlib", "rowsperstrip": 8}]
)
@pytest.mark.parametrize("share", [0.002, 0.5, 0.999])
def test_truncated_tiffs_are_refused(tmp_path, options, share):
    path = tmp_path / "a.tiff"
    write_tiff(path, np.random.default_rng(0).normal(size=(64, 64, 3)).astype(np.float32), **options)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(DataError, match=r"a\.tiff.*(truncated TIFF|cut off|not a cloud)"):
        files.read_xyz(path)


def test_a_tiff_that_claims_an_absurd_size_is_refused_before_memory_is_asked_for(tmp_path):
    path = tmp_path / "a.tiff"
    write_tiff(path, XYZ)
    data = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as file:
        for name in ("ImageLength", "ImageWidth"):
            tag = file.pages.first.tags[name]
            data[tag.valueoffset : tag.valueoffset + 2] = b"\xff\xff"
    path.write_bytes(data)
    with pytest.raises(
        DataError, match=r"a\.tiff: claims shape \(65535, 65535, 3\), far more than its \d+ bytes can hold"
    ):
        files.read_xyz(path)


def test_wrong_clouds_are_named(tmp_path):
    write_tiff(tmp_path / "depth.tiff", XYZ[..., 2])
    with pytest.raises(
        DataError, match=r"depth\.tiff: holds shape 6x5 of float32, one channel; expected 3 .*intrinsics"
    ):
        files.read_xyz(tmp_path / "depth.tiff")
    write_tiff(tmp_path / "rgb.tiff", RGB, photometric="rgb")
    with pytest.raises(DataError, match=r"rgb\.tiff: holds shape 6x5x3 of uint8; expected \(H, W, 3\) float32"):
        files.read_xyz(tmp_path / "rgb.tiff")
    Image.fromarray(RGB).save(tmp_path / "rgb.png")
    with pytest.raises(DataError, match="not a cloud we can read; expected TIFF"):
        files.read_xyz(tmp_path / "rgb.png")


def test_arrays(tmp_path):
    np.save(tmp_path / "a.npy", XYZ.astype(np.float64))
    np.testing.assert_array_equal(files.read_xyz(tmp_path / "a.npy").xyz, XYZ)
    np.savez(tmp_path / "a.npz", xyz=XYZ, rgb=RGB, normals=XYZ, depth=XYZ[..., 2])
    cloud = files.read_xyz(tmp_path / "a.npz")
    np.testing.assert_array_equal(cloud.rgb, RGB)
    np.testing.assert_allclose(np.linalg.norm(cloud.normals, axis=2), 1, rtol=1e-6)
    np.testing.assert_array_equal(np.isnan(files.read_depth(tmp_path / "a.npz")), XYZ[..., 2] <= 0)
    np.savez(tmp_path / "b.npz", points=XYZ, colours=RGB)
    with pytest.raises(DataError, match=r"b\.npz: has no array 'xyz'; it holds points, colours: save it with key xyz"):
        files.read_xyz(tmp_path / "b.npz")
    np.save(tmp_path / "o.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"o\.npy: cannot be read as an NPY array without pickled objects"):
        files.read_xyz(tmp_path / "o.npy")
    np.save(tmp_path / "z.npy", np.zeros((0, 5, 3), np.float32))
    with pytest.raises(DataError, match=r"z\.npy: holds shape 0x5x3 of float32; expected .* at least one pixel"):
        files.read_xyz(tmp_path / "z.npy")
    (tmp_path / "t.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:200])
    with pytest.raises(DataError, match=r"t\.npz: cannot be read as an NPZ archive"):
        files.read_xyz(tmp_path / "t.npz")


# --------------------------------------------------------------------------------------------------- depth and cameras


def test_16_bit_depth_in_millimetres(tmp_path):
    counts = np.array([[0, 1000], [65535, 1]], np.uint16)
    cv2.imwrite(str(tmp_path / "d.png"), counts)
    depth = files.read_depth(tmp_path / "d.png", Intrinsics(500, 500, 0, 0, scale=0.001))
    np.testing.assert_allclose(depth, [[np.nan, 1.0], [65.535, 0.001]], rtol=1e-6)
    far = files.read_depth(tmp_path / "d.png", Intrinsics(500, 500, 0, 0, scale=0.001, invalid=(0, 65535)))
    np.testing.assert_array_equal(np.isnan(far), [[True, False], [True, False]])
    np.testing.assert_allclose(files.read_depth(tmp_path / "d.png", metres_per_unit=0.001), depth)


def test_a_16_bit_depth_without_a_scale_is_an_error(tmp_path):
    cv2.imwrite(str(tmp_path / "d.png"), np.ones((3, 4), np.uint16))
    for camera in (None, Intrinsics(500, 500, 0, 0)):
        with pytest.raises(
            DataError, match=r"d\.png: holds shape 3x4 of uint16 and nothing says how long one count is.*`scale`"
        ):
            files.read_depth(tmp_path / "d.png", camera)


def test_float_depth_from_tiff_and_npy_with_holes(tmp_path):
    depth = np.array([[1.0, np.nan], [np.inf, -1.0], [0.0, -9999.9]], np.float32)
    expected = np.array([[1.0, np.nan], [np.nan, np.nan], [np.nan, np.nan]])
    write_tiff(tmp_path / "d.tiff", depth)
    np.save(tmp_path / "d.npy", depth)
    for name in ("d.tiff", "d.npy"):
        np.testing.assert_array_equal(files.read_depth(tmp_path / name), expected)
    flat = Intrinsics(1000, 1000, 0, 0, model="orthographic", invalid=(-9999.9,))
    heights = files.read_depth(tmp_path / "d.npy", flat)  # heights may be 0 or below
    np.testing.assert_array_equal(heights, [[1.0, np.nan], [np.nan, -1.0], [0.0, np.nan]])


def test_wrong_depths_are_named(tmp_path):
    Image.fromarray(RGB[..., 0]).save(tmp_path / "8bit.png")
    with pytest.raises(
        DataError, match=r"8bit\.png: holds shape 6x5 of uint8; expected a depth map of one channel, 16-bit"
    ):
        files.read_depth(tmp_path / "8bit.png")
    write_tiff(tmp_path / "xyz.tiff", XYZ)
    with pytest.raises(
        DataError, match=r"xyz\.tiff: holds shape 6x5x3 of float32; expected a depth map of one channel"
    ):
        files.read_depth(tmp_path / "xyz.tiff")


def test_a_pinhole_projects_back_onto_its_own_pixels():
    camera = Intrinsics(fx=520.0, fy=510.0, cx=2.25, cy=1.5)
    depth = np.random.default_rng(0).uniform(0.3, 2, (4, 6)).astype(np.float32)
    x, y, z = np.moveaxis(depth_to_xyz(depth, camera).astype(np.float64), 2, 0)
    v, u = np.mgrid[:4, :6]
    np.testing.assert_allclose(camera.fx * x / z + camera.cx, u, atol=1e-5)
    np.testing.assert_allclose(camera.fy * y / z + camera.cy, v, atol=1e-5)
    np.testing.assert_array_equal(z.astype(np.float32), depth)


def test_depth_to_xyz_by_hand():
    pinhole = depth_to_xyz(np.array([[2.0, 0.0, np.nan]], np.float32), Intrinsics(4, 4, 1, -2))
    np.testing.assert_array_equal(pinhole[0], [[-0.5, 1.0, 2.0], [0, 0, 0], [np.nan] * 3])
    flat = Intrinsics.from_mapping({"model": "orthographic", "pixel_pitch": [0.5, 0.25]})
    xyz = depth_to_xyz(np.array([[3.0, 0.0], [np.nan, -1.0]], np.float32), flat)
    np.testing.assert_array_equal(xyz, [[[0, 0, 3], [0.5, 0, 0]], [[np.nan] * 3, [0.5, 0.25, -1]]])


def test_intrinsics_from_json_yaml_and_a_camera_matrix(tmp_path):
    expected = Intrinsics(525.0, 524.0, 319.5, 239.5, scale=0.001, invalid=(0.0, 65535.0))
    (tmp_path / "a.yaml").write_text("fx: 525\nfy: 524\ncx: 319.5\ncy: 239.5\nscale: 0.001\ninvalid: [0, 65535]\n")
    (tmp_path / "a.json").write_text(
        '{"K": [[525, 0, 319.5], [0, 524, 239.5], [0, 0, 1]], "scale": 1e-3, "invalid": [0, 65535]}'
    )
    assert Intrinsics.load(tmp_path / "a.yaml") == expected
    assert Intrinsics.load(tmp_path / "a.json") == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fx: 1\nfy: 1\ncx: 0\n", r"c\.yaml: camera intrinsics lack cy; expected fx, fy, cx, cy"),
        ("fx: 1\nfy: 1\ncx: 0\ncy: 0\nscal: 2\n", r"c\.yaml: unknown key 'scal': did you mean 'scale'\?"),
        ("fx: 1\nfy: one\ncx: 0\ncy: 0\n", r"c\.yaml: camera intrinsics must be numbers"),
        ("fx: 0\nfy: 1\ncx: 0\ncy: 0\n", r"c\.yaml: intrinsics need finite numbers, fx and fy above 0"),
        ("fx: 1\nfy: 1\ncx: 0\ncy: 0\nmodel: fisheye\n", r"c\.yaml: unknown camera model 'fisheye'"),
        ("K: [1, 2]\n", r"c\.yaml: camera intrinsics must be numbers: K has 2 numbers, expected 9"),
        ("model: orthographic\npixel_pitch: 0\n", "pixel_pitch must be above 0 metres"),
        ("- 1\n- 2\n", r"c\.yaml: expected names with values .*, found list"),
        ("fx: [1\n", r"c\.yaml: cannot be read as camera intrinsics in JSON or YAML"),
    ],
)
def test_wrong_intrinsics_are_named(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(DataError, match=message) as error:
        Intrinsics.load(tmp_path / "c.yaml")
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------------------- normals


def test_normals_from_float_and_8_bit_files_agree(tmp_path):
    vectors = XYZ / np.linalg.norm(XYZ, axis=2, keepdims=True)
    vectors[0, 0] = 0
    write_tiff(tmp_path / "n.tiff", vectors * 3)  # length does not matter
    encoded = np.rint((vectors + 1) / 2 * 255).astype(np.uint8)
    encoded[0, 0] = 0
    encoded[0, 1] = 127  # a vector of nearly no length
    Image.fromarray(encoded).save(tmp_path / "n.png")
    exact, coarse = files.read_normals(tmp_path / "n.tiff"), files.read_normals(tmp_path / "n.png")
    np.testing.assert_allclose(exact, vectors, atol=1e-6)
    np.testing.assert_array_equal(coarse[0, :2], 0)
    np.testing.assert_allclose(coarse[1:], vectors[1:], atol=1.5 / 255)
    assert math.isclose(float(np.linalg.norm(coarse[3, 3])), 1, rel_tol=1e-6)


def test_normals_that_are_not_numbers_are_zero_and_wrong_ones_named(tmp_path):
    vectors = np.full((2, 2, 3), np.nan, np.float32)
    vectors[1, 1] = [0, 0, -2]
    np.save(tmp_path / "n.npy", vectors)
    np.testing.assert_array_equal(files.read_normals(tmp_path / "n.npy"), [[[0] * 3] * 2, [[0] * 3, [0, 0, -1]]])
    Image.fromarray(RGB[..., 0]).save(tmp_path / "grey.png")
    with pytest.raises(DataError, match=r"grey\.png: holds shape 6x5 of uint8; expected normals \(H, W, 3\)"):
        files.read_normals(tmp_path / "grey.png")


def test_a_decoder_out_of_memory_is_not_called_a_damaged_file(tmp_path):
    with pytest.raises(MemoryError), opening.decoding(tmp_path, "anything"):
        raise MemoryError
