"""Organised point clouds in PLY and PCD files.

A cloud is organised when its points lie on a pixel grid, row by row: PCD says so with HEIGHT above 1, PLY with
``obj_info num_cols`` / ``num_rows`` (or comments ``width`` / ``height``). Otherwise the caller gives the grid, and it
must hold exactly as many points as the file: a list from which the unmeasured points were dropped cannot be put back on
its grid and is an error.

Formats: PLY 1.0 (ascii, binary little and big endian), PCD 0.6 / 0.7 (ascii, binary, binary_compressed).
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import DataError
from ..samples import Array
from .opening import check_file, decoding

_MAX_HEADER = 64 * 1024  # bytes; a header has a few lines
_PLY_TYPES = {
    "char": "i1", "int8": "i1", "uchar": "u1", "uint8": "u1", "short": "i2", "int16": "i2", "ushort": "u2",
    "uint16": "u2", "int": "i4", "int32": "i4", "uint": "u4", "uint32": "u4", "float": "f4", "float32": "f4",
    "double": "f8", "float64": "f8",
}  # fmt: skip
_PLY_SIZE = re.compile(r"(?:obj_info|comment)\s+(num_cols|num_rows|width|height)\s*[:=]?\s*(\d+)\s*$", re.IGNORECASE)
_PCD_TYPES = {("F", 4), ("F", 8), ("U", 1), ("U", 2), ("U", 4), ("U", 8), ("I", 1), ("I", 2), ("I", 4), ("I", 8)}


@dataclass(frozen=True, eq=False)
class Cloud:
    """An organised cloud as the file holds it, in the file's unit.

    Attributes:
        xyz: (H, W, 3) float32; unmeasured points as in the file (NaN, zeros or a sentinel).
        rgb: (H, W, 3) uint8, or None.
        normals: (H, W, 3) float32, or None.
    """

    xyz: Array
    rgb: Array | None = None
    normals: Array | None = None


def read_ply(path: str | Path, size: tuple[int, int] | None = None, *, listed: bool = False) -> Cloud:
    """Read an organised PLY file.

    Args:
        path: The file.
        size: (height, width) of the grid, used where the header does not state it.
        listed: Take a list of N points without a grid for a grid of (N, 1).

    Raises:
        DataError: missing or truncated file, no x, y, z, or points that do not fill the grid.
    """
    path = check_file(path, "point cloud")
    with decoding(path, "a PLY point cloud"):
        data = path.read_bytes()
        lines, body = _split_header(path, data, rb"ply\b", b"end_header")
        fmt, count, skip, columns, sizes = _parse_ply_header(path, lines)
        if fmt == "ascii":
            table = _ascii_table(path, data[body:], columns, count, skip_rows=skip)
        else:
            order = "<" if fmt == "binary_little_endian" else ">"
            dtype = np.dtype([(name, order + kind) for name, kind in columns])
            table = _binary_table(path, data, body + skip, dtype, count)
    cols, rows = sizes.get("num_cols", sizes.get("width")), sizes.get("num_rows", sizes.get("height"))
    stated = (rows, cols) if rows and cols else None
    return _organise(path, {name: table[name] for name, _ in columns}, count, stated or size or _list(count, listed))


def read_pcd(path: str | Path, size: tuple[int, int] | None = None, *, listed: bool = False) -> Cloud:
    """Read an organised PCD file.

    Args:
        path: The file.
        size: (height, width) of the grid, used where the file says HEIGHT 1.
        listed: Take a list of N points without a grid for a grid of (N, 1).

    Raises:
        DataError: missing or truncated file, no x, y, z, or points that do not fill the grid.
    """
    path = check_file(path, "point cloud")
    with decoding(path, "a PCD point cloud"):
        data = path.read_bytes()
        lines, body = _split_header(path, data, rb"#|VERSION\b|FIELDS\b", b"DATA")
        header = {line.split()[0].upper(): line.split()[1:] for line in lines if line.split() and line[0] != "#"}
        columns = _pcd_columns(path, header)
        width, height = int(header["WIDTH"][0]), int(header["HEIGHT"][0])
        count = int(header.get("POINTS", [str(width * height)])[0])
        if count != width * height:
            raise DataError(
                f"{path}: POINTS is {count} but WIDTH x HEIGHT is {width} x {height}; export the cloud again"
            )
        table = _pcd_table(path, data, body, header["DATA"][0].lower(), columns, count)
    stated = (height, width) if height > 1 else None
    return _organise(path, table, count, stated or size or _list(count, listed))


def _list(count: int, listed: bool) -> tuple[int, int] | None:
    return (count, 1) if listed else None


def _split_header(path: Path, data: bytes, starts: bytes, ends: bytes) -> tuple[list[str], int]:
    """Header lines (with the last one) and where the body begins."""
    head = data[:_MAX_HEADER]
    if not re.match(starts, head):
        raise DataError(f"{path}: not a {path.suffix[1:].upper()} file: it begins with {head[:12]!r}; check its type")
    match = re.search(rb"^" + ends + rb"[^\n]*\n", head, re.MULTILINE)
    if match is None:
        raise DataError(
            f"{path}: its header never ends (no line '{ends.decode()}'); the file is cut off: copy it again"
        )
    return head[: match.end()].decode("ascii", errors="replace").splitlines(), match.end()


def _parse_ply_header(path: Path, lines: list[str]) -> tuple[str, int, int, list[tuple[str, str]], dict[str, int]]:
    """Format, number of points, what precedes them (rows in ascii, else bytes), columns and stated grid sizes."""
    fmt, count, skip = "", -1, 0
    columns: list[tuple[str, str]] = []
    sizes: dict[str, int] = {}
    elements: list[tuple[str, int, list[str]]] = []  # name, rows, kinds of its properties
    for line in lines[1:]:
        words = line.split()
        if match := _PLY_SIZE.match(line.strip()):
            sizes[match[1].lower()] = int(match[2])
        elif words[:1] == ["format"]:
            fmt = words[1]
        elif words[:1] == ["element"]:
            elements.append((words[1], int(words[2]), []))
        elif words[:1] == ["property"]:
            elements[-1][2].append("list" if words[1] == "list" else _PLY_TYPES[words[1]])
            if elements[-1][0] == "vertex":
                columns.append((words[-1], elements[-1][2][-1]))
    if fmt not in ("ascii", "binary_little_endian", "binary_big_endian"):
        raise DataError(f"{path}: unknown PLY format '{fmt}'; expected ascii or binary_little_endian: export it again")
    for name, rows, kinds in elements:
        if "list" in kinds and (name == "vertex" or count < 0):
            raise DataError(
                f"{path}: lists at or before the points (element '{name}') are not supported; export points only"
            )
        if name == "vertex":
            count = rows
            break
        skip += rows if fmt == "ascii" else rows * sum(np.dtype(kind).itemsize for kind in kinds)
    if count < 0:
        raise DataError(f"{path}: has no element 'vertex'; expected points with x, y, z")
    return fmt, count, skip, columns, sizes


def _pcd_columns(path: Path, header: dict[str, list[str]]) -> list[tuple[str, str, int]]:
    """(name, numpy kind, count) of every field."""
    missing = [key for key in ("FIELDS", "SIZE", "TYPE", "WIDTH", "HEIGHT") if key not in header]
    if missing:
        raise DataError(f"{path}: its header lacks {', '.join(missing)}; export the cloud again as PCD 0.7")
    names, sizes, types = header["FIELDS"], [int(s) for s in header["SIZE"]], header["TYPE"]
    counts = [int(c) for c in header.get("COUNT", ["1"] * len(names))]
    if not len(names) == len(sizes) == len(types) == len(counts):
        raise DataError(f"{path}: FIELDS, SIZE, TYPE and COUNT do not have the same length; export the cloud again")
    bad = [f"{t}{s}" for t, s in zip(types, sizes) if (t, s) not in _PCD_TYPES]
    if bad:
        raise DataError(f"{path}: unknown field type {bad[0]}; expected F4, F8, U1..U8 or I1..I8: export it again")
    return [
        (n if n != "_" else f"_{i}", f"<{t.lower()}{s}", c)
        for i, (n, s, t, c) in enumerate(zip(names, sizes, types, counts))
    ]


def _pcd_table(
    path: Path, data: bytes, body: int, kind: str, columns: list[tuple[str, str, int]], count: int
) -> dict[str, Array]:
    """Column name -> (N,) array for each of the three encodings."""
    if kind == "ascii":
        flat = [(f"{n}.{i}" if i else n, dtype) for n, dtype, c in columns for i in range(c)]
        table = _ascii_table(path, data[body:], flat, count)
        return {name: table[name] for name, _ in flat}
    if kind == "binary":
        dtype = np.dtype([(n, t, (c,)) if c > 1 else (n, t) for n, t, c in columns])
        table = _binary_table(path, data, body, dtype, count)
        return {name: table[name] for name, _, _ in columns}
    if kind != "binary_compressed":
        raise DataError(f"{path}: unknown DATA '{kind}'; expected ascii, binary or binary_compressed")
    import imagecodecs

    packed, size = (int(v) for v in np.frombuffer(data, "<u4", 2, body))
    expected = count * sum(np.dtype(t).itemsize * c for _, t, c in columns)
    if len(data) < body + 8 + packed:
        found = len(data) - body - 8
        raise DataError(f"{path}: holds {found} of {packed} compressed bytes; the file is cut off: copy it again")
    if size != expected:
        raise DataError(
            f"{path}: holds {size} bytes of points, expected {expected} for {count}; export the cloud again"
        )
    raw = bytes(imagecodecs.lzf_decode(data[body + 8 : body + 8 + packed], out=size)) if size else b""
    result, start = {}, 0
    for name, t, c in columns:  # one field after the other, not point by point
        result[name] = np.frombuffer(raw, t, count * c, start)
        start += np.dtype(t).itemsize * count * c
    return result


def _ascii_table(path: Path, body: bytes, columns: list[tuple[str, str]], count: int, skip_rows: int = 0) -> Array:
    rows = np.loadtxt(io.BytesIO(body), dtype=np.float64, skiprows=skip_rows, max_rows=count, ndmin=2, comments=None)
    if rows.shape != (count, len(columns)):
        raise DataError(
            f"{path}: holds {rows.shape[0]} points of {rows.shape[1]} values, its header promises {count} of "
            f"{len(columns)}; the file is cut off or damaged: copy it again"
        )
    table = np.empty(count, dtype=[(name, kind) for name, kind in columns])
    for i, (name, _) in enumerate(columns):
        table[name] = rows[:, i]
    return table


def _binary_table(path: Path, data: bytes, start: int, dtype: np.dtype, count: int) -> Array:
    found = max(0, len(data) - start) // dtype.itemsize
    if found < count:
        raise DataError(
            f"{path}: holds {found} points, its header promises {count}; the file is cut off: copy it again"
        )
    return np.frombuffer(data, dtype, count, start)


def _organise(path: Path, table: dict[str, Array], count: int, size: tuple[int, int] | None) -> Cloud:
    """Put the columns on the grid (H, W)."""
    if count == 0:
        raise DataError(f"{path}: holds no points; expected an organised cloud, one point per pixel")
    missing = [axis for axis in "xyz" if axis not in table]
    if missing:
        raise DataError(f"{path}: has no field {', '.join(missing)}; its fields are {', '.join(table)}")
    if size is None:
        raise DataError(
            f"{path}: holds a list of {count} points without a grid; expected an organised cloud: export it organised "
            "(PCD with HEIGHT above 1, PLY with obj_info num_cols and num_rows), or give `cloud_size: [width, height]`"
        )
    H, W = size
    if count != H * W:
        raise DataError(
            f"{path}: holds {count} points but the grid is {W}x{H} = {W * H}; one point per pixel is needed, row by "
            "row: export with the unmeasured points kept (as NaN or 0)"
        )
    xyz = _stack(table, "xyz", H, W).astype(np.float32)
    normals = next(
        (n for n in (("nx", "ny", "nz"), ("normal_x", "normal_y", "normal_z")) if set(n) <= set(table)), None
    )
    return Cloud(
        xyz, _colours(table, H, W), None if normals is None else _stack(table, normals, H, W).astype(np.float32)
    )


def _colours(table: dict[str, Array], H: int, W: int) -> Array | None:
    """uint8 (H, W, 3) from separate channels or from PCD's packed one."""
    for names in (("red", "green", "blue"), ("r", "g", "b"), ("diffuse_red", "diffuse_green", "diffuse_blue")):
        if set(names) <= set(table):
            rgb = _stack(table, names, H, W)
            if rgb.dtype.kind == "f":  # 0..1
                return (np.clip(np.nan_to_num(rgb), 0, 1) * 255 + 0.5).astype(np.uint8)
            return (rgb >> 8).astype(np.uint8) if rgb.dtype.itemsize > 1 else rgb.astype(np.uint8)
    for name in ("rgb", "rgba"):
        if name in table and table[name].dtype.itemsize == 4:
            packed = np.ascontiguousarray(table[name]).view(np.uint32).reshape(H, W, 1)
            return ((packed >> np.array([16, 8, 0], dtype=np.uint32)) & 255).astype(np.uint8)
    return None


def _stack(table: dict[str, Array], names: str | tuple[str, ...], H: int, W: int) -> Array:
    return np.stack([table[name].reshape(H, W) for name in names], axis=-1)  # H W 3
