"""From the files of one part to a `Sample`: one grid, metres, one `valid` mask.

The valid rule. A point was measured unless one of its coordinates is NaN, infinite or a sentinel, or all three are
exactly 0. If a depth map is given beside the cloud, both must have measured. Without a cloud the depth map decides (its
own rule is in `read_depth`), without either the normals do (length above 0); with pictures alone every pixel is valid.
Where ``valid`` is False every geometric view is exactly 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, DataError, nearest_names
from ..samples import MODALITIES, Array, Sample
from .camera import Intrinsics, depth_to_xyz
from .files import CLOUD_SUFFIXES, read_depth, read_image, read_mask, read_normals, read_raw, read_xyz
from .opening import check_file, read_mapping, warn_once
from .source import Record

UNITS = {"m": 1.0, "mm": 1e-3}
"""Unit of the coordinates in the files -> metres."""

GEOMETRIC = {"xyz", "depth", "normals"}
NOT_VIEWS = ("mask", "intrinsics")
"""Roles of files that are no view of the part."""


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """How the files of a data set are to be understood.

    Attributes:
        unit: Unit of clouds and floating-point depth maps: ``"m"`` or ``"mm"``.
        invalid: Values (in the file's unit) that mean "not measured" in a cloud, when any coordinate has one, or in a
            depth map. On top of NaN, infinities and (0, 0, 0).
        intrinsics: The camera of the depth maps, for parts without an intrinsics file of their own.
        cloud_size: (width, height) of PLY and PCD clouds that do not state it; otherwise the RGB image's is tried.
        flip_normals: Normals are stored with y up and z towards the camera; turn y and z over into the camera's frame.
    """

    unit: str = "m"
    invalid: tuple[float, ...] = ()
    intrinsics: Intrinsics | None = None
    cloud_size: tuple[int, int] | None = None
    flip_normals: bool = False

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise ConfigError(f"unknown unit '{self.unit}': {nearest_names(self.unit, UNITS)}")
        if self.cloud_size is not None and (len(self.cloud_size) != 2 or min(self.cloud_size) < 1):
            raise ConfigError(f"`cloud_size` must be [width, height] in pixels, got {self.cloud_size}")


def sentinels(values: float | Sequence[float] | None) -> tuple[float, ...]:
    """Values that mean "not measured", given as one number, several or None.

    Raises:
        ConfigError: one of them is not a number.
    """
    listed: list[Any] = [] if values is None else list(values) if isinstance(values, list | tuple) else [values]
    try:
        return tuple(float(value) for value in listed)
    except (TypeError, ValueError):
        raise ConfigError(f"`invalid` must be a number or a list of numbers, got {values!r}") from None


def read_record(record: Record, options: ReadOptions) -> Sample:
    """Read the files of a record.

    A good test part without a mask file gets a mask that is False everywhere.

    Raises:
        DataError: see `files_sample`; also a part labelled good whose mask marks a defect.
    """
    sample = files_sample(record.files, id=record.id, options=options)
    mask, flags = sample.mask, sample.meta["flags"]
    if mask is None and record.label == 0 and record.split == "test":
        mask = np.zeros(sample.size, dtype=np.bool_)
    if mask is not None and record.label == 0 and mask.any():
        raise DataError(
            f"{record.files['mask']}: marks {int(mask.sum())} defect pixels but the part is labelled good; move the "
            "part to a defect folder (or correct its label), or clear the mask"
        )
    if mask is not None and record.label == 1 and not mask.any():
        flags = (*flags, "empty_mask")
        warn_once(str(record.files["mask"]), "marks no defect pixel but the part is labelled anomalous")
    meta = {**record.meta, **sample.meta, "flags": flags}
    if "metadata_file" in meta:
        meta["metadata"] = read_mapping(meta.pop("metadata_file"), "metadata")
    return sample.with_(mask=mask, label=record.label, defect=record.defect, meta=meta)


def files_sample(
    files: Mapping[str, str | Path],
    intrinsics: Intrinsics | None = None,
    id: str | None = None,
    *,
    options: ReadOptions | None = None,
) -> Sample:
    """One part from loose files.

    Args:
        files: Role -> file. Roles: ``rgb``, ``xyz``, ``depth``, ``normals``, ``mask``, ``intrinsics`` (JSON or YAML),
            or any other name for an extra image-like view. A PLY, PCD or NPZ cloud may bring colours and normals
            along; they count where no file of that role is given.
        intrinsics: The camera of a depth map, for when `files` names no intrinsics; with it the cloud is computed.
        id: Name of the part; the stem of its first file otherwise.
        options: Unit, sentinels and the like.

    Returns:
        A sample without label. ``meta`` holds ``files`` (role -> path), ``flags`` (``"no_valid_points"``,
        ``"looks_like_mm"``) and, where known, ``intrinsics``.

    Raises:
        DataError: no view at all, a file that cannot be read, or views of different size (names both files).
    """
    options = options or ReadOptions()
    paths = {role: check_file(path, f"{role} file") for role, path in files.items()}
    views = [role for role in paths if role not in NOT_VIEWS]
    if not views:
        raise DataError(
            f"part '{id}': no view among its files ({', '.join(paths) or 'none'}); give at least rgb or xyz"
        )
    id = paths[views[0]].stem if id is None else id
    camera = Intrinsics.load(paths["intrinsics"]) if "intrinsics" in paths else intrinsics or options.intrinsics
    images = _read_views(paths, camera, options)
    mask = read_mask(paths["mask"]) if "mask" in paths else None
    _check_sizes(images if mask is None else {**images, "mask": mask}, paths)
    meta: dict[str, Any] = {"files": {role: str(path) for role, path in paths.items()}}
    if camera is not None:
        meta["intrinsics"] = camera
    flags = []
    if "xyz" in images and options.unit == "m" and _looks_like_millimetres(images["xyz"]):
        flags.append("looks_like_mm")
        folder = str(paths.get("xyz", paths.get("depth", Path())).parent)
        warn_once(folder, "its coordinates look like millimetres (median |z| above 50); if so, set the unit to mm")
    valid = _measured(images, cloud_given="xyz" in paths)
    for name in GEOMETRIC & set(images):
        images[name][~valid] = 0  # arrays of our own, just read
    if not valid.any():
        flags.append("no_valid_points")
    return Sample(id, images, valid, mask=mask, meta={**meta, "flags": tuple(flags)}).check()


def guess_roles(paths: Iterable[str | Path]) -> dict[str, Path]:
    """Role of each loose file, by its name and content.

    A file in a folder named after a view (``rgb/000.png``, ``normals/000.png``) is that view. PLY and PCD are ``xyz``;
    JSON and YAML ``intrinsics``. TIFF, NPY and images go by their numbers: floating point with
    3 channels ``xyz``, or ``normals`` if ``normal`` is in the name or every vector has length 0 or 1; one channel of
    floating point or 16-bit ``depth``; otherwise ``rgb`` (or ``normals`` / ``mask`` by name).

    Raises:
        DataError: two files with one role (names both), or a file of no known kind.
    """
    roles: dict[str, Path] = {}
    for path in map(Path, paths):
        role = _guess_role(check_file(path, "file"))
        if role in roles:
            raise DataError(f"{roles[role]} and {path} both look like '{role}'; say which is which: ROLE=FILE")
        roles[role] = path
    return roles


def _guess_role(path: Path) -> str:
    suffix, name = path.suffix.lower(), path.stem.lower()
    if path.absolute().parent.name.lower() in MODALITIES:
        return path.absolute().parent.name.lower()
    if suffix in CLOUD_SUFFIXES or suffix == ".npz":
        return "xyz"
    if suffix in (".json", ".yaml", ".yml"):
        return "intrinsics"
    pixels = read_raw(path)
    single = pixels.ndim == 2 or pixels.shape[2] == 1
    if single and (pixels.dtype.kind == "f" or pixels.dtype.itemsize == 2):
        return "depth"
    if pixels.dtype.kind == "f":
        length = np.linalg.norm(np.nan_to_num(pixels[..., :3]), axis=2)
        unit = bool((length > 0).any()) and bool(((length == 0) | (np.abs(length - 1) < 1e-3)).all())
        return "normals" if unit or "normal" in name else "xyz"
    words = name.replace("-", "_").split("_")
    if "mask" in words or "gt" in words:
        return "mask"
    return "normals" if "normal" in name else "rgb"


def _read_views(paths: Mapping[str, Path], camera: Intrinsics | None, options: ReadOptions) -> dict[str, Array]:
    """Role -> array in metres, unmeasured points as NaN (or as in the file where that is 0)."""
    images: dict[str, Array] = {}
    for role in sorted(set(paths) - {"xyz", "depth", "normals", *NOT_VIEWS}):
        images[role] = read_image(paths[role])
    if "xyz" in paths:
        size = options.cloud_size[::-1] if options.cloud_size else images["rgb"].shape[:2] if "rgb" in images else None
        cloud = read_xyz(paths["xyz"], size)
        images["xyz"] = _to_metres(cloud.xyz, options)
        if cloud.rgb is not None:
            images.setdefault("rgb", cloud.rgb)
        if cloud.normals is not None:
            images["normals"] = cloud.normals
    if "depth" in paths:
        images["depth"] = _depth(paths["depth"], camera, options)
        if camera is not None and "xyz" not in images:
            images["xyz"] = depth_to_xyz(images["depth"], camera)
    elif "xyz" in images:
        images["depth"] = images["xyz"][..., 2].copy()
    if "normals" in paths:
        images["normals"] = read_normals(paths["normals"])
    if "normals" in images and options.flip_normals:
        images["normals"] = images["normals"] * np.array([1, -1, -1], dtype=np.float32)
    return images


def _depth(path: Path, camera: Intrinsics | None, options: ReadOptions) -> Array:
    """Depth in metres; the data set's sentinels count beside the camera's."""
    metres = UNITS[options.unit] if options.unit != "m" else None
    return read_depth(path, camera, metres, options.invalid)


def _to_metres(xyz: Array, options: ReadOptions) -> Array:
    if options.invalid:
        xyz = xyz.copy()
        xyz[np.isin(xyz, np.asarray(options.invalid, dtype=xyz.dtype)).any(axis=2)] = np.nan
    scale = UNITS[options.unit]
    return xyz if scale == 1 else xyz * np.float32(scale)


def _check_sizes(images: Mapping[str, Array], paths: Mapping[str, Path]) -> None:
    """All views on one grid; the message names the two files."""
    first = next(iter(images))
    for role, image in images.items():
        if image.shape[:2] != images[first].shape[:2]:
            (h, w), (H, W) = image.shape[:2], images[first].shape[:2]
            raise DataError(
                f"{paths.get(role, role)}: '{role}' is {w}x{h} pixels (width x height) but '{first}' "
                f"({paths.get(first, first)}) is {W}x{H}; all views of a part must be registered on one grid: resample "
                "one onto the other"
            )


def _looks_like_millimetres(xyz: Array) -> bool:
    z = xyz[::8, ::8, 2]  # a sample of the grid is enough for a hint
    z = z[np.isfinite(z) & (z != 0)]
    return z.size > 0 and float(np.median(np.abs(z))) > 50


def _measured(images: Mapping[str, Array], cloud_given: bool) -> Array:
    """The valid rule (see the top of the file), as (H, W) bool."""
    valid = np.ones(next(iter(images.values())).shape[:2], dtype=np.bool_)
    if "depth" in images:
        valid = np.isfinite(images["depth"])
    if cloud_given or ("normals" in images and "depth" not in images):
        size = np.abs(images["xyz" if cloud_given else "normals"]) @ np.ones(3, dtype=np.float32)  # |x| + |y| + |z|
        valid &= (size > 0) & (size < np.inf)  # false for NaN too
    return valid
