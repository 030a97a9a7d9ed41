"""Preparation of a part: the papers' hand cases, invariances, degenerate clouds, real parts."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest

from polyspect.data.depth_scale import standardise_depth
from polyspect.data.frame import Frame
from polyspect.data.preparation import PREPARATIONS, Preparation, prepare
from polyspect.errors import ConfigError, DataError
from polyspect.samples import Sample

DEFAULT = PREPARATIONS["default"]


def sample_of(xyz, rgb=None, mask=None, **extra):
    """A part as a reader gives it."""
    images = {"xyz": xyz.astype(np.float32), **extra}
    if rgb is not None:
        images["rgb"] = rgb
    return Sample("made/up/part", images, valid=(xyz != 0).any(-1), mask=mask)


def bumpy(size=200, tilt=0.3, part_height=0.02, noise=0.0):
    """A tilted table with a hemisphere cap in the middle; returns the cloud and where the part is, and its height."""
    row, column = np.mgrid[:size, :size]
    x, y = 0.001 * (column - size / 2), 0.001 * (row - size / 2)
    up = np.array([tilt, 0, -1]) / np.hypot(tilt, 1)
    table = np.stack([x, y, 0.5 + tilt * x], -1)
    radius = 0.05
    part = x**2 + y**2 < radius**2
    height = np.where(part, part_height * np.sqrt(np.clip(1 - (x**2 + y**2) / radius**2, 0, None)), 0)
    height = height + noise * np.random.default_rng(0).standard_normal(height.shape)
    return (table + height[..., None] * up).astype(np.float32), part, height


def crd_case():
    """Card section 9.4: a plane, a block 1 cm nearer, a hole in it and a missing background point."""
    row, column = np.mgrid[:32, :32]
    x, y = 0.001 * column, 0.001 * row
    z = 0.5 + 0.1 * x
    z[10:20, 12:24] -= 0.01
    xyz = np.stack([x, y, z], -1).astype(np.float32)
    xyz[14:16, 16:18] = 0
    xyz[5, 5] = 0
    return xyz


CRD32 = replace(PREPARATIONS["crd_paper"], size=32)


def test_crd_pipeline_by_hand():
    prepared = prepare(sample_of(crd_case()), CRD32)
    on = prepared.foreground & prepared.valid
    assert prepared.foreground.sum() == 120
    assert on.sum() == 116
    z = prepared.images["depth"][on]
    assert (z.min(), z.max()) == (pytest.approx(0.4912), pytest.approx(0.4923))
    depth = standardise_depth(prepared, CRD32, None)
    assert np.count_nonzero(depth) == 224
    assert (depth[depth > 0].min(), depth.max()) == (pytest.approx(0.1), pytest.approx(0.9))
    np.testing.assert_allclose(depth[14:16, 16:18], [[0.361809, 0.492713]] * 2, atol=2e-5)
    assert prepared.meta["flags"] == []
    assert prepared.meta["plane"]["found"]


def test_crd_pipeline_with_empty_corners_goes_wrong_as_published_and_says_so():
    xyz = crd_case()
    xyz[:3, :3] = 0
    prepared = prepare(sample_of(xyz), replace(CRD32, closing=0))
    assert prepared.foreground.sum() == 595  # of 1024; that plane runs through the origin, where missing points are
    assert prepared.meta["flags"] == ["empty_corner"]
    xyz[:3, -3:] = xyz[-3:, :3] = 0
    prepared = prepare(sample_of(xyz), CRD32)
    assert not prepared.foreground.any()
    assert prepared.meta["flags"] == ["empty_corner", "no_plane", "all_background"]
    assert not standardise_depth(prepared, CRD32, None).any()


def test_constant_depth_becomes_one_half():
    xyz = crd_case()
    xyz[10:20, 12:24, 2] = 0.48
    depth = standardise_depth(prepare(sample_of(xyz), CRD32), CRD32, None)
    assert set(np.unique(depth)) == {0.0, 0.5}


def test_plane_removal_of_btf():
    xyz, part, height = bumpy()
    rgb = np.random.default_rng(0).integers(1, 256, (200, 200, 3), dtype=np.uint8)
    preparation = replace(PREPARATIONS["btf"], size=200, normals="camera")
    prepared = prepare(sample_of(xyz, rgb), preparation)
    kept = prepared.valid
    assert not kept[~part].any()
    assert kept[height > 0.005].mean() > 0.9
    assert (prepared.foreground == kept).all()
    for name in ("rgb", "xyz", "normals"):
        assert not prepared.images[name][~kept].any()
        assert prepared.images[name][kept].any(axis=-1).all()
    assert prepared.meta["plane"]["removed_share"] == pytest.approx(1 - kept.mean())
    assert prepared.meta["plane"]["tilt_deg"] == pytest.approx(np.degrees(np.arctan(0.3)), abs=0.01)


def test_rgb_of_unmeasured_pixels_stays():
    xyz, _, _ = bumpy()
    xyz[2:5, 2:5] = 0
    rgb = np.full((200, 200, 3), 9, np.uint8)
    prepared = prepare(sample_of(xyz, rgb), replace(PREPARATIONS["btf"], size=200))
    assert prepared.images["rgb"][2:5, 2:5].all()
    assert not prepared.images["rgb"][6:9, 6:9].any()


def test_largest_piece_stays():
    xyz, _, _ = bumpy()
    xyz[20:30, 20:30, 2] -= 0.03
    both = prepare(sample_of(xyz), replace(DEFAULT, size=200, background="plane"))
    assert both.foreground[20:30, 20:30].all()
    one = prepare(sample_of(xyz), replace(DEFAULT, size=200, background="plane", keep_components=1))
    assert not one.foreground[20:30, 20:30].any()
    assert one.foreground[100, 100]
    none = prepare(sample_of(xyz), replace(DEFAULT, size=200, background="plane", min_component_px=10**6))
    assert "all_background" in none.meta["flags"]


def test_height_and_normals_do_not_depend_on_the_cameras_tilt():
    level, part, height = bumpy(tilt=0.0)
    tilted = bumpy(tilt=0.4)[0]
    a, b = (prepare(sample_of(xyz), replace(DEFAULT, size=200)) for xyz in (level, tilted))
    np.testing.assert_allclose(a.images["depth"], height, atol=2e-6)
    np.testing.assert_allclose(b.images["depth"], height, atol=2e-6)
    table = ~part
    table[40:160, 40:160] = False
    for prepared in (a, b):
        normals = prepared.images["normals"][table]
        np.testing.assert_allclose(normals, np.broadcast_to([0, 0, -1], normals.shape), atol=1e-4)
    camera = prepare(sample_of(tilted), replace(DEFAULT, size=200, normals="camera")).images["normals"]
    np.testing.assert_allclose(camera[0, 0], np.array([0.4, 0, -1]) / np.hypot(0.4, 1), atol=1e-4)


def test_default_keeps_everything_and_leaves_the_input_alone():
    xyz, part, _ = bumpy()
    rgb = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    sample = sample_of(xyz, rgb, mask=part)
    before = hashlib.sha256(b"".join(a.tobytes() for a in (xyz, rgb, sample.valid, part))).hexdigest()
    prepared = prepare(sample, DEFAULT)
    assert hashlib.sha256(b"".join(a.tobytes() for a in (xyz, rgb, sample.valid, part))).hexdigest() == before
    assert prepared.foreground.all()
    assert prepared.size == (256, 256)
    assert {name: (a.shape, a.dtype) for name, a in prepared.images.items()} == {
        "xyz": ((256, 256, 3), np.float32), "rgb": ((256, 256, 3), np.float32), "depth": ((256, 256), np.float32),
        "normals": ((256, 256, 3), np.float32),
    }  # fmt: skip
    assert 0 <= prepared.images["rgb"].min() <= prepared.images["rgb"].max() <= 1
    np.testing.assert_allclose(prepared.images["rgb"].mean(), rgb.mean() / 255, atol=2e-3)
    assert prepared.mask.mean() == pytest.approx(part.mean(), abs=0.01)
    assert isinstance(prepared.meta["frame"], Frame)


def test_same_bits_twice_for_every_preset():
    xyz, _, _ = bumpy(noise=3e-4)
    for preparation in PREPARATIONS.values():
        one, two = (prepare(sample_of(xyz), preparation) for _ in range(2))
        for name in one.images:
            assert one.images[name].tobytes() == two.images[name].tobytes()
        assert one.meta == two.meta


def test_geometry_on_the_input_grid_agrees_with_geometry_on_the_prepared_one():
    xyz, _, _ = bumpy(noise=2e-4)
    base = replace(DEFAULT, size=100, background="plane", plane_tolerance_mm=6)
    late, early = (prepare(sample_of(xyz), replace(base, geometry_at=at)) for at in ("input", "prepared"))
    on = late.foreground & early.foreground
    assert on.sum() / (late.foreground | early.foreground).sum() > 0.97
    np.testing.assert_allclose(late.images["depth"][on], early.images["depth"][on], atol=2e-4)


def test_non_square_parts_are_padded_and_the_padding_is_not_the_part():
    xyz = bumpy()[0][40:160]
    prepared = prepare(sample_of(xyz, np.full((120, 200, 3), 7, np.uint8)), replace(DEFAULT, size=100))
    assert prepared.foreground.sum() == prepared.valid.sum() == 60 * 100
    outside = ~prepared.foreground
    for name in ("xyz", "depth", "normals"):
        assert not prepared.images[name][outside].any()
    assert not prepared.images["rgb"][:18].any()  # the filter spreads the edge by two pixels, as in the papers
    edge = prepare(sample_of(xyz, np.full((120, 200, 3), 7, np.uint8)), replace(DEFAULT, size=100, pad_rgb="edge"))
    assert edge.images["rgb"].min() > 0


def test_normals_from_a_file_are_used_and_sobel_is_trds():
    xyz, _, _ = bumpy(tilt=0.0)
    given = np.broadcast_to(np.float32([0, 0.6, -0.8]), xyz.shape).copy()
    prepared = prepare(sample_of(xyz, normals=given), replace(DEFAULT, size=200))
    np.testing.assert_allclose(prepared.images["normals"], given, atol=1e-6)
    sobel = prepare(sample_of(xyz), replace(DEFAULT, size=200, normals_method="sobel")).images["normals"]
    np.testing.assert_allclose(np.linalg.norm(sobel, axis=-1), 1, atol=1e-6)
    assert (sobel[..., 2] > 0).all()
    assert "normals" not in prepare(sample_of(xyz), replace(DEFAULT, normals="none")).images


def test_views_without_a_cloud():
    rgb = np.zeros((40, 40, 3), np.uint8)
    picture = Sample(
        "p", {"rgb": rgb, "uv": rgb[..., 0], "ir": np.full((40, 40), 65535, np.uint16)}, np.ones((40, 40), bool)
    )
    prepared = prepare(picture, DEFAULT)
    assert set(prepared.images) == {"rgb", "uv", "ir"}
    assert prepared.meta["plane"] is None
    assert (prepared.images["ir"] == 1).all()
    with pytest.raises(DataError, match=r"'p'.*needs 'xyz'.*rgb"):
        prepare(picture, replace(DEFAULT, background="plane"))
    z = np.linspace(0.4, 0.6, 1600, dtype=np.float32).reshape(40, 40)
    prepared = prepare(Sample("d", {"depth": z}, np.ones((40, 40), bool)), replace(DEFAULT, size=40))
    assert prepared.meta["flags"] == ["no_cloud"]
    np.testing.assert_allclose(prepared.images["depth"], np.median(z) - z, atol=1e-6)


def degenerate():
    size = 48
    nothing, one, line = (np.zeros((size, size, 3), np.float32) for _ in range(3))
    one[3, 4] = 0.1, 0.1, 0.5
    line[10] = np.linspace([0, 0, 0.5], [0.1, 0.05, 0.6], size)
    flat = bumpy(size, part_height=0.0)[0]
    same = np.broadcast_to(np.float32([0.1, 0.1, 0.5]), flat.shape).copy()
    return {"nothing": nothing, "one": one, "line": line, "flat": flat, "same": same}


@pytest.mark.parametrize("cloud", ["nothing", "one", "line", "flat", "same"])
@pytest.mark.parametrize("background", ["keep", "plane", "corners"])
@pytest.mark.parametrize("geometry_at", ["prepared", "input"])
@pytest.mark.parametrize("size", [48, 64])
def test_degenerate_clouds_are_flagged_and_finite(cloud, background, geometry_at, size):
    preparation = replace(
        DEFAULT, size=size, background=background, geometry_at=geometry_at, keep_components=1, depth_range="image"
    )
    for depth, fill, method in (("height", "full", "surface"), ("z", "rounds", "sobel")):
        chosen = replace(preparation, depth=depth, depth_fill=fill, normals_method=method)
        prepared = prepare(sample_of(degenerate()[cloud], np.zeros((48, 48, 3), np.uint8)), chosen)
        assert all(np.isfinite(image).all() for image in prepared.images.values())
        image = standardise_depth(prepared, chosen, None)
        assert np.isfinite(image).all()
    flags = prepared.meta["flags"]
    assert ("no_valid_points" in flags) == (cloud == "nothing")
    if background != "keep":
        assert ("no_plane" in flags) == (cloud != "flat")
    if cloud == "flat" and background != "keep":
        assert "all_background" in flags


def test_height_without_a_plane_counts_from_the_median():
    xyz = np.random.default_rng(0).uniform(0.3, 0.6, (40, 40, 3)).astype(np.float32)  # no surface at all
    prepared = prepare(sample_of(xyz), replace(DEFAULT, size=40))
    assert prepared.meta["flags"] == ["no_plane"]
    assert prepared.meta["plane"] == {"found": False, "removed_share": 0.0}
    np.testing.assert_allclose(prepared.images["depth"], np.median(xyz[..., 2]) - xyz[..., 2], atol=1e-6)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"size": 4}, "`size`.*at least 8"),
        ({"plane_tolerance_mm": 0}, "above 0"),
        ({"aspect": "stretch"}, "'stretch'.*pad"),
        ({"normals_window": 4}, "odd"),
        ({"sise": 128}, "'sise'.*did you mean 'size'"),
    ],
)
def test_wrong_settings_are_refused(values, words):
    with pytest.raises(ConfigError, match=words):
        Preparation.from_dict(values)


@pytest.mark.parametrize("name", sorted(PREPARATIONS))
def test_settings_survive_json(name):
    preparation = PREPARATIONS[name]
    assert Preparation.from_dict(preparation.to_dict()) == preparation


@pytest.mark.real_data
def test_real_parts(osd_root):
    from polyspect.data.source import open_reader

    reader = open_reader("mvtec3d", osd_root)
    records = [record for record in reader.records("tabletop", "test") if record.label == 1]
    for record in records[::30]:
        files = {path: path.read_bytes() for path in record.files.values()}
        prepared = prepare(reader.read(record), replace(DEFAULT, background="plane"))
        assert 45 < prepared.meta["plane"]["tilt_deg"] < 58  # the camera looks down at the table obliquely
        assert prepared.meta["plane"]["rms_mm"] < 3  # "flat to 2-5 mm"
        both = prepared.foreground & prepared.mask & prepared.valid
        assert both.sum() > 0.8 * (prepared.mask & prepared.valid).sum()  # objects stand out of the table
        assert all(path.read_bytes() == content for path, content in files.items())
