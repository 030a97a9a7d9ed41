"""One function per kind of file: images, masks, clouds, depth maps, normals, arrays.

Every function returns what the file holds, on the file's own pixel grid; the unit of clouds, sentinels and the `valid`
mask are the business of `views`. Every failure is a `DataError` that names the file, what was found, what was expected
and what to do. Images are told apart by their content (a TIFF called ``.png`` is read as TIFF), the rest by its suffix.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tifffile
from PIL import Image, UnidentifiedImageError

from ..errors import DataError
from ..samples import Array
from .camera import Intrinsics as Intrinsics  # re-exported: readers and callers look for them here
from .camera import depth_to_xyz as depth_to_xyz
from .clouds import Cloud, read_pcd, read_ply
from .opening import check_file, decoding, warn_once

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
ARRAY_SUFFIXES = (".npy", ".npz")
CLOUD_SUFFIXES = (".ply", ".pcd")
_TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_TIFF_COLOURS = (1, 2, 6)  # photometric: 0 is black, RGB, YCbCr (decoded to RGB)
_PLAUSIBLE_BYTES, _MAX_COMPRESSION = 64 * 2**20, 5000  # a TIFF that claims more than both is damaged
_ORIENTATION = 0x0112  # EXIF tag


def read_image(path: str | Path) -> Array:
    """Read a picture as (H, W, 3) uint8.

    PNG, JPEG, BMP or TIFF with 8 or 16 bits. Of 16 bits the high byte is kept (v >> 8). One channel becomes three equal
    ones, an alpha channel is dropped without blending. An EXIF orientation is *not* applied, since it would part the
    picture from the cloud measured on the same pixels; a warning says so.

    Raises:
        DataError: missing, truncated, another kind of file, float values, or a number of channels other than 1 to 4.
    """
    path = check_file(path, "image")
    pixels = _raster(path)
    if pixels.dtype == np.bool_:
        pixels = pixels.astype(np.uint8) * np.uint8(255)
    if pixels.dtype not in (np.uint8, np.uint16):
        raise DataError(
            f"{path}: holds {_describe(pixels)}; expected an image of 8 or 16 bits: if these are coordinates or "
            "depths, name the file as xyz or depth"
        )
    if pixels.dtype == np.uint16:
        if pixels.max() < 4096:
            advice = "16-bit images use less than 12 bits and come out dark; scale them to the full 16 bits when saving"
            warn_once(str(path.parent), advice)
        pixels = (pixels >> 8).astype(np.uint8)
    colours = _drop_alpha(path, pixels)
    return np.ascontiguousarray(np.broadcast_to(colours, (*colours.shape[:2], 3)))


def read_mask(path: str | Path) -> Array:
    """Read a ground-truth mask as (H, W) bool: True where any colour channel is above 0 (0/1 and 0/255 masks alike).

    Images and NPY arrays. JPEG is refused: its artefacts around a defect would all count as defect.

    Raises:
        DataError: missing, truncated, JPEG, or not image-like.
    """
    path = check_file(path, "mask")
    with open(path, "rb") as file:
        start = file.read(3)
    if start == b"\xff\xd8\xff":
        raise DataError(f"{path}: is a JPEG; its artefacts would count as defect pixels: save masks as PNG")
    pixels = _array(path, "mask") if path.suffix.lower() in ARRAY_SUFFIXES else _raster(path)
    if pixels.ndim == 2:
        return np.ascontiguousarray(pixels > 0)
    return np.asarray((_drop_alpha(path, pixels) > 0).any(axis=2))


def read_xyz_tiff(path: str | Path) -> Array:
    """Read an organised cloud from a floating-point TIFF with 3 channels, as (H, W, 3) float32 in the file's unit.

    Channels may come last, first, or as three pages. Unmeasured points are as in the file.

    Raises:
        DataError: missing, truncated, not floating point, or not 3 channels.
    """
    path = check_file(path, "xyz cloud")
    return _check_xyz(path, _tiff(path))


def read_xyz(path: str | Path, size: tuple[int, int] | None = None) -> Cloud:
    """Read an organised cloud from TIFF, NPY, NPZ (key ``xyz``), PLY or PCD.

    Args:
        path: The file.
        size: (height, width) for PLY and PCD files that do not state their grid.

    Returns:
        The cloud in the file's unit, with the colours and normals that PLY, PCD and NPZ files may carry.

    Raises:
        DataError: missing, damaged, wrong kind, or not organised.
    """
    path = check_file(path, "xyz cloud")
    suffix = path.suffix.lower()
    if suffix in CLOUD_SUFFIXES:
        cloud = read_ply(path, size) if suffix == ".ply" else read_pcd(path, size)
        return Cloud(cloud.xyz, cloud.rgb, None if cloud.normals is None else _check_normals(path, cloud.normals))
    if suffix == ".npy":
        return Cloud(_check_xyz(path, _array(path, "xyz")))
    if suffix == ".npz":
        arrays = read_arrays(path)
        if "xyz" not in arrays:
            raise DataError(
                f"{path}: has no array 'xyz'; it holds {', '.join(arrays) or 'nothing'}: save it with key xyz"
            )
        rgb, normals = arrays.get("rgb"), arrays.get("normals")
        if rgb is not None and (rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[2] != 3):
            raise DataError(f"{path}: array 'rgb' holds {_describe(rgb)}; expected (H, W, 3) uint8")
        normals = None if normals is None else _check_normals(path, normals)
        return Cloud(_check_xyz(path, arrays["xyz"]), rgb, normals)
    if not _is_tiff(path):
        raise DataError(f"{path}: not a cloud we can read; expected TIFF (float32), NPY, NPZ, PLY or PCD: convert it")
    return Cloud(read_xyz_tiff(path))


def read_points(path: str | Path) -> Array:
    """The measured points of a cloud, organised or not, as (N, 3) float32 in the file's unit.

    Left out are points that are not finite and (0, 0, 0). A PLY or PCD file may hold a list without a grid, an NPY file
    (N, 3) numbers; anything else as `read_xyz`.

    Raises:
        DataError: as `read_xyz`.
    """
    path = check_file(path, "point cloud")
    suffix = path.suffix.lower()
    if suffix in CLOUD_SUFFIXES:
        xyz = (read_ply if suffix == ".ply" else read_pcd)(path, listed=True).xyz
    elif suffix == ".npy":
        array = _array(path, "xyz")
        xyz = _check_xyz(path, array[:, None] if array.ndim == 2 and array.shape[1] == 3 else array)
    else:
        xyz = read_xyz(path).xyz
    points = xyz.reshape(-1, 3)
    return points[np.isfinite(points).all(1) & (points != 0).any(1)]


def read_depth(
    path: str | Path,
    intrinsics: Intrinsics | None = None,
    metres_per_unit: float | None = None,
    invalid: tuple[float, ...] = (),
) -> Array:
    """Read a depth map as (H, W) float32 metres, NaN where not measured.

    16-bit PNG or TIFF, floating-point TIFF, NPY, NPZ (key ``depth``). metres = raw * scale + offset, with the scale of
    the intrinsics, or else `metres_per_unit` (or else 1, for floating point only).

    Not measured: NaN, infinities, the raw values `invalid`, the intrinsics' own `invalid` (0 by default) and, for a
    pinhole, depths of 0 m or less.

    Raises:
        DataError: missing, truncated, not one channel, 8-bit, or integers without a scale.
    """
    path = check_file(path, "depth map")
    raw = _array(path, "depth") if path.suffix.lower() in ARRAY_SUFFIXES else _raster(path)
    if raw.ndim == 3 and raw.shape[2] == 1:
        raw = raw[..., 0]
    if raw.ndim != 2 or raw.dtype.kind not in "fiu" or raw.dtype.itemsize < 2:
        raise DataError(f"{path}: holds {_describe(raw)}; expected a depth map of one channel, 16-bit integer or float")
    scale = metres_per_unit if intrinsics is None or intrinsics.scale is None else intrinsics.scale
    if scale is None and raw.dtype.kind != "f":
        raise DataError(
            f"{path}: holds {_describe(raw)} and nothing says how long one count is; give intrinsics with `scale` in "
            "metres per count (0.001 for millimetres), or the unit mm"
        )
    offset, own = (0.0, (0.0,)) if intrinsics is None else (intrinsics.offset, intrinsics.invalid)
    depth = (raw * (1.0 if scale is None else scale) + offset).astype(np.float32)
    sentinels = np.asarray(own + invalid, dtype=raw.dtype if raw.dtype.kind == "f" else np.float64)
    missing = ~np.isfinite(depth) | np.isin(raw, sentinels)
    if intrinsics is None or intrinsics.model == "pinhole":
        missing |= depth <= 0
    depth[missing] = np.nan
    return depth


def read_normals(path: str | Path) -> Array:
    """Read surface normals as (H, W, 3) float32 unit vectors, 0 where there is none.

    Floating-point TIFF, NPY or NPZ (key ``normals``) hold the vectors themselves; an image of 8 or 16 bits holds
    n = 2 v / max - 1 with max 255 or 65535. All vectors are scaled to length 1. No normal: NaN, length 0, a black
    pixel, or a pixel whose vector is shorter than 0.5.

    Raises:
        DataError: missing, truncated, or not 3 channels.
    """
    path = check_file(path, "normals")
    pixels = _array(path, "normals") if path.suffix.lower() in ARRAY_SUFFIXES else _raster(path)
    return _check_normals(path, pixels)


def read_arrays(path: str | Path) -> dict[str, Array]:
    """All arrays of an NPZ file. Pickled objects are refused.

    Raises:
        DataError: missing, damaged, or it holds objects.
    """
    path = check_file(path, "NPZ archive")
    with decoding(path, "an NPZ archive of plain arrays"), open(path, "rb") as file:
        archive = np.load(file, allow_pickle=False)
        return {name: archive[name] for name in archive.files}


def read_raw(path: str | Path) -> Array:
    """An image, TIFF or NPY file as it is: (H, W) or (H, W, C) with the file's own number type.

    Raises:
        DataError: missing, damaged or of another kind.
    """
    path = check_file(path, "file")
    return _array(path, "") if path.suffix.lower() in ARRAY_SUFFIXES else _raster(path)


def image_size(path: str | Path) -> tuple[int, int]:
    """(height, width) of a PNG, JPEG, BMP or TIFF, from its header."""
    path = check_file(path, "image")
    with decoding(path, "an image"):
        if _is_tiff(path):
            with tifffile.TiffFile(path) as file:
                return int(file.pages.first.imagelength), int(file.pages.first.imagewidth)
        with Image.open(path, formats=("PNG", "JPEG", "BMP")) as image:
            return image.height, image.width


def _is_tiff(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4) in _TIFF_STARTS


def _raster(path: Path) -> Array:
    """(H, W) or (H, W, C) with the file's own number type; a palette is looked up."""
    if _is_tiff(path):
        return _tiff(path)
    try:
        with decoding(path, "an image"), Image.open(path, formats=("PNG", "JPEG", "BMP")) as image:
            if "exif" in image.info and image.getexif().get(_ORIENTATION, 1) != 1:
                warn_once(
                    str(path.parent),
                    "EXIF orientation is not applied; pixels are read as stored, to match the 3D views",
                )
            if image.mode == "P":
                return np.asarray(image.convert("RGBA" if "transparency" in image.info else "RGB"))
            if image.mode not in ("1", "L", "LA", "RGB", "RGBA", "I", "I;16", "I;16B"):
                raise DataError(
                    f"{path}: is an image in colour space {image.mode}; expected RGB or grey: save it as RGB"
                )
            pixels = np.asarray(image)
            return pixels.astype(np.uint16) if image.mode.startswith("I") else pixels
    except DataError as error:
        if isinstance(error.__cause__, UnidentifiedImageError):
            with open(path, "rb") as file:
                start = file.read(8)
            raise DataError(
                f"{path}: not a PNG, JPEG, BMP or TIFF image; it begins with {start!r}: check the file, or convert it"
            ) from error
        raise


def _tiff(path: Path) -> Array:
    """The one image of a TIFF, channels last."""
    with decoding(path, "TIFF"), tifffile.TiffFile(path) as file:
        if len(file.series) != 1:
            raise DataError(f"{path}: holds {len(file.series)} separate images; expected one: split the file")
        page, length = file.pages.first, path.stat().st_size
        if file.series[0].nbytes > max(_PLAUSIBLE_BYTES, _MAX_COMPRESSION * length):
            raise DataError(
                f"{path}: claims shape {file.series[0].shape}, far more than its {length} bytes can hold; it is damaged"
            )
        ends = [start + count for start, count in zip(page.dataoffsets, page.databytecounts)]
        if max(ends, default=0) > length:
            raise DataError(
                f"{path}: truncated TIFF: its pixels reach to byte {max(ends)} but the file has {length}; copy it again"
            )
        pixels = np.asarray(file.series[0].asarray())
        if pixels.dtype.kind in "bu" and int(page.photometric) not in _TIFF_COLOURS:
            raise DataError(
                f"{path}: is a TIFF in colour space {page.photometric.name}; expected RGB or grey with 0 = black"
            )
    if pixels.ndim == 3 and pixels.shape[0] in (1, 3, 4) and pixels.shape[2] not in (1, 2, 3, 4):
        pixels = np.moveaxis(pixels, 0, -1)  # planes or pages -> channels last
    if pixels.size == 0 or pixels.ndim not in (2, 3):
        raise DataError(f"{path}: holds {_describe(pixels)}; expected one image (H, W) or (H, W, C)")
    return pixels.astype(pixels.dtype.newbyteorder("="), copy=False)


def _array(path: Path, key: str) -> Array:
    """The array of an NPY file, or `key` (or the only array) of an NPZ file."""
    if path.suffix.lower() == ".npz":
        arrays = read_arrays(path)
        if key not in arrays and len(arrays) != 1:
            raise DataError(
                f"{path}: has no array '{key}'; it holds {', '.join(arrays) or 'nothing'}: save it by that key"
            )
        array = arrays.get(key, next(iter(arrays.values())))
    else:
        with decoding(path, "an NPY array without pickled objects"):
            array = np.load(path, allow_pickle=False)
    if array.size == 0 or array.ndim not in (2, 3):
        raise DataError(f"{path}: holds {_describe(array)}; expected (H, W) or (H, W, C) with at least one pixel")
    return array


def _drop_alpha(path: Path, pixels: Array) -> Array:
    """(H, W) or (H, W, C) -> (H, W, 1 or 3) without alpha."""
    if pixels.ndim == 2:
        return pixels[..., None]
    channels = pixels.shape[2]
    if channels not in (1, 2, 3, 4):
        raise DataError(
            f"{path}: holds {_describe(pixels)}; expected 1 (grey) or 3 (RGB) channels, or those with alpha"
        )
    return pixels[..., : 3 if channels >= 3 else 1]


def _check_xyz(path: Path, points: Array) -> Array:
    if points.ndim == 2 or points.shape[2] == 1:
        raise DataError(
            f"{path}: holds {_describe(points)}, one channel; expected 3 (x, y, z): if this is a depth map, name it as "
            "depth and give the camera's intrinsics"
        )
    if points.shape[2] != 3 or points.dtype.kind != "f" or points.size == 0:
        raise DataError(f"{path}: holds {_describe(points)}; expected (H, W, 3) float32 coordinates x, y, z")
    return np.ascontiguousarray(points, dtype=np.float32)


def _check_normals(path: Path, pixels: Array) -> Array:
    if pixels.ndim != 3 or pixels.shape[2] not in (3, 4) or pixels.dtype.kind not in "fu":
        raise DataError(f"{path}: holds {_describe(pixels)}; expected normals (H, W, 3), float or 8-bit image")
    vectors = pixels[..., :3].astype(np.float32)
    shortest = np.float32(1e-6)
    if pixels.dtype.kind == "u":
        black = (pixels[..., :3] == 0).all(axis=2)
        vectors = vectors * np.float32(2.0 / np.iinfo(pixels.dtype).max) - np.float32(1)
        vectors[black] = 0
        shortest = np.float32(0.5)
    length = np.sqrt(np.einsum("hwc,hwc->hw", vectors, vectors))
    known = np.isfinite(length) & (length > shortest)
    scale = np.divide(np.float32(1), length, out=np.zeros_like(length), where=known)
    return np.where(known[..., None], vectors * scale[..., None], np.float32(0))


def _describe(array: Array) -> str:
    """Shape and number type, in words."""
    return f"shape {'x'.join(map(str, array.shape)) or 'of a single number'} of {array.dtype}"
