"""Organised PLY and PCD files, written here byte by byte from their specifications."""

import struct

import numpy as np
import pytest

from polyspect.data.clouds import read_pcd, read_ply
from polyspect.errors import DataError

H, W = 3, 4
XYZ = np.random.default_rng(0).normal(size=(H, W, 3)).astype(np.float32)
XYZ[1, 2] = np.nan
NORMALS = np.random.default_rng(1).normal(size=(H, W, 3)).astype(np.float32)
RGB = np.random.default_rng(2).integers(0, 256, (H, W, 3), dtype=np.uint8)
TABLE = np.empty(
    H * W, dtype=[(c, "<f4") for c in ("x", "y", "z", "nx", "ny", "nz")] + [(c, "u1") for c in ("red", "green", "blue")]
)
for i, axis in enumerate("xyz"):
    TABLE[axis], TABLE["n" + axis] = XYZ[..., i].ravel(), NORMALS[..., i].ravel()
for i, colour in enumerate(("red", "green", "blue")):
    TABLE[colour] = RGB[..., i].ravel()
PROPERTIES = "".join(
    f"property {'float' if TABLE.dtype[name] == np.float32 else 'uchar'} {name}\n" for name in TABLE.dtype.names
)
SIZE = f"obj_info num_cols {W}\nobj_info num_rows {H}\n"


def ply(kind="binary_little_endian", extra=SIZE, before="", after="", count=H * W):
    return f"ply\nformat {kind} 1.0\n{extra}{before}element vertex {count}\n{PROPERTIES}{after}end_header\n".encode()


def ascii_rows(table):
    return "".join(" ".join(str(v) for v in row) + "\n" for row in table.tolist()).encode()


def check(cloud):
    assert cloud.xyz.dtype == np.float32
    np.testing.assert_array_equal(cloud.xyz, XYZ)
    np.testing.assert_array_equal(cloud.normals, NORMALS)
    assert cloud.rgb.dtype == np.uint8
    np.testing.assert_array_equal(cloud.rgb, RGB)


def save(path, data):
    path.write_bytes(data)
    return path


# ----------------------------------------------------------------------------------------------------------------- PLY


def test_ply_in_all_three_encodings(tmp_path):
    check(read_ply(save(tmp_path / "l.ply", ply() + TABLE.tobytes())))
    big = TABLE.astype(TABLE.dtype.newbyteorder(">"))
    check(read_ply(save(tmp_path / "b.ply", ply("binary_big_endian") + big.tobytes())))
    check(read_ply(save(tmp_path / "a.ply", ply("ascii") + ascii_rows(TABLE))))


def test_ply_skips_other_elements_before_and_after_the_points(tmp_path):
    before = "element camera 2\nproperty double a\nproperty uchar b\n"
    after = "element face 1\nproperty list uchar int vertex_indices\n"
    faces = struct.pack("<Biii", 3, 0, 1, 2)
    header = ply(before=before, after=after)
    check(read_ply(save(tmp_path / "b.ply", header + bytes(18) + TABLE.tobytes() + faces)))
    header = ply("ascii", before=before, after=after)
    check(read_ply(save(tmp_path / "a.ply", header + b"1 2\n3 4\n" + ascii_rows(TABLE) + b"3 0 1 2\n")))


def test_the_grid_of_a_ply_comes_from_comments_or_from_the_caller(tmp_path):
    comments = f"comment width: {W}\ncomment Height {H}\n"
    check(read_ply(save(tmp_path / "c.ply", ply(extra=comments) + TABLE.tobytes())))
    path = save(tmp_path / "n.ply", ply(extra="") + TABLE.tobytes())
    check(read_ply(path, (H, W)))
    with pytest.raises(DataError, match=r"n\.ply: holds a list of 12 points without a grid; .*`cloud_size: "):
        read_ply(path)
    with pytest.raises(DataError, match=r"n\.ply: holds 12 points but the grid is 5x2 = 10; .*unmeasured points kept"):
        read_ply(path, (2, 5))


def test_a_ply_of_positions_alone_has_no_colours_and_no_normals(tmp_path):
    header = f"ply\nformat ascii 1.0\n{SIZE}element vertex {H * W}\n" + "".join(f"property double {a}\n" for a in "xyz")
    cloud = read_ply(save(tmp_path / "p.ply", header.encode() + b"end_header\n" + ascii_rows(TABLE[["x", "y", "z"]])))
    np.testing.assert_array_equal(cloud.xyz, XYZ)
    assert cloud.rgb is None
    assert cloud.normals is None


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (ply() + TABLE.tobytes()[:-1], r"holds 11 points, its header promises 12; the file is cut off: copy it again"),
        (ply("ascii") + ascii_rows(TABLE[:7]), r"holds 7 points of 9 values, its header promises 12 of 9"),
        (ply()[:40], r"its header never ends \(no line 'end_header'\); the file is cut off"),
        (b"solid cube\n", r"not a PLY file: it begins with b'solid cube"),
        (ply("text") + TABLE.tobytes(), r"unknown PLY format 'text'; expected ascii or binary_little_endian"),
        (ply(before="element g 1\nproperty list uchar int i\n") + TABLE.tobytes(), r"lists .*'g'.*export points only"),
        (ply(count=0), r"holds no points"),
        (b"ply\nformat ascii 1.0\nelement face 0\nend_header\n", r"has no element 'vertex'"),
        (b"ply\nformat ascii 1.0\nelement vertex 1\nproperty float u\nend_header\n1\n", r"has no field x, y, z; .*u"),
        (ply("ascii") + ascii_rows(TABLE[:3]) + b"one two\n", r"cannot be read as a PLY point cloud: .*damaged"),
    ],
)  # fmt: skip
def test_broken_plys_are_named(tmp_path, data, message):
    path = save(tmp_path / "broken.ply", data)
    with pytest.raises(DataError, match=rf"broken\.ply: {message}"):
        read_ply(path)


# ----------------------------------------------------------------------------------------------------------------- PCD

PCD_TABLE = np.empty(
    H * W, dtype=[(c, "<f4") for c in ("x", "y", "z")] + [("rgb", "<u4")] + [(f"normal_{c}", "<f4") for c in "xyz"]
)
for i, axis in enumerate("xyz"):
    PCD_TABLE[axis], PCD_TABLE[f"normal_{axis}"] = XYZ[..., i].ravel(), NORMALS[..., i].ravel()
PCD_TABLE["rgb"] = (RGB.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)).ravel()


def pcd(data="binary", rgb="F", size=(W, H), points=H * W):
    return (
        "# .PCD v.7 - Point Cloud Data file format\nVERSION .7\nFIELDS x y z rgb normal_x normal_y normal_z\n"
        f"SIZE 4 4 4 4 4 4 4\nTYPE F F F {rgb} F F F\nCOUNT 1 1 1 1 1 1 1\nWIDTH {size[0]}\nHEIGHT {size[1]}\n"
        f"VIEWPOINT 0 0 0 1 0 0 0\nPOINTS {points}\nDATA {data}\n"
    ).encode()


def lzf_literals(data):
    """LZF without any compression: runs of up to 32 literal bytes."""
    return b"".join(bytes([len(data[i : i + 32]) - 1]) + data[i : i + 32] for i in range(0, len(data), 32))


def compressed(table):
    columns = b"".join(np.ascontiguousarray(table[name]).tobytes() for name in table.dtype.names)
    packed = lzf_literals(columns)
    return struct.pack("<II", len(packed), len(columns)) + packed


def test_pcd_in_all_three_encodings(tmp_path):
    check(read_pcd(save(tmp_path / "b.pcd", pcd() + PCD_TABLE.tobytes())))
    check(read_pcd(save(tmp_path / "c.pcd", pcd("binary_compressed") + compressed(PCD_TABLE))))
    check(read_pcd(save(tmp_path / "u.pcd", pcd("ascii", rgb="U") + ascii_rows(PCD_TABLE))))


def test_packed_colours_survive_as_text_of_a_float(tmp_path):
    table = PCD_TABLE.astype([(n, "<f4") for n in PCD_TABLE.dtype.names])
    table["rgb"] = PCD_TABLE["rgb"].view(np.float32)
    check(read_pcd(save(tmp_path / "f.pcd", pcd("ascii") + ascii_rows(table))))


def test_lzf_back_references_are_followed(tmp_path):
    zeros = np.zeros_like(PCD_TABLE)
    columns = len(zeros.tobytes())
    packed = b"\x00\x00"  # one literal zero, then copies of 264 bytes from one byte back
    left = columns - 1
    while left >= 9:
        n = min(left, 264)
        packed += bytes([7 << 5, n - 9, 0])
        left -= n
    packed += lzf_literals(bytes(left)) if left else b""
    body = struct.pack("<II", len(packed), columns) + packed
    np.testing.assert_array_equal(read_pcd(save(tmp_path / "z.pcd", pcd("binary_compressed") + body)).xyz, 0)


def test_a_pcd_of_height_1_takes_the_callers_grid(tmp_path):
    path = save(tmp_path / "flat.pcd", pcd(size=(H * W, 1)) + PCD_TABLE.tobytes())
    check(read_pcd(path, (H, W)))
    with pytest.raises(
        DataError, match=r"flat\.pcd: holds a list of 12 points without a grid; .*PCD with HEIGHT above 1"
    ):
        read_pcd(path)


def test_padding_fields_and_counts_are_skipped(tmp_path):
    table = np.zeros(H * W, dtype=[("x", "<f4"), ("_", "u1", (3,)), ("y", "<f8"), ("h", "<f4", (2,)), ("z", "<f4")])
    for i, axis in enumerate("xyz"):
        table[axis] = XYZ[..., i].ravel()
    header = "VERSION 0.7\nFIELDS x _ y h z\nSIZE 4 1 8 4 4\nTYPE F U F F F\nCOUNT 1 3 1 2 1\n"
    header += f"WIDTH {W}\nHEIGHT {H}\nDATA binary\n"
    np.testing.assert_array_equal(read_pcd(save(tmp_path / "p.pcd", header.encode() + table.tobytes())).xyz, XYZ)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (pcd() + PCD_TABLE.tobytes()[:-5], r"holds 11 points, its header promises 12; the file is cut off"),
        (pcd("ascii") + b"1 2 3\n", r"holds 1 points of 3 values, its header promises 12 of 7"),
        (pcd("binary_compressed") + compressed(PCD_TABLE)[:-4], r"holds 343 of 347 compressed .* cut off"),
        (pcd("binary_compressed") + compressed(PCD_TABLE[:5]), r"holds 140 bytes of points, expected 336 "),
        (pcd("packed"), r"unknown DATA 'packed'; expected ascii, binary or binary_compressed"),
        (pcd(points=11) + PCD_TABLE.tobytes(), r"POINTS is 11 but WIDTH x HEIGHT is 4 x 3"),
        (pcd(rgb="X") + PCD_TABLE.tobytes(), r"unknown field type X4"),
        (pcd()[:60], r"its header never ends \(no line 'DATA'\)"),
        (b"ply\n", r"not a PCD file"),
        (b"VERSION 0.7\nFIELDS x y z\nDATA ascii\n", r"its header lacks SIZE, TYPE, WIDTH, HEIGHT"),
        (b"VERSION 0.7\nFIELDS x y\nSIZE 4\nTYPE F\nWIDTH 1\nHEIGHT 1\nDATA ascii\n1 2\n", r"FIELDS, SIZE, TYPE and"),
    ],
)  # fmt: skip
def test_broken_pcds_are_named(tmp_path, data, message):
    path = save(tmp_path / "broken.pcd", data)
    with pytest.raises(DataError, match=rf"broken\.pcd: {message}"):
        read_pcd(path)
