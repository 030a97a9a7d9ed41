"""Eyecandies: ten rendered candies under six lights, with depth and normals.

    ROOT/CATEGORY/{train,val,test_public,test_private}/data/NNN_ITEM

    image_0 ... image_5   8-bit RGB PNG: all spots; bottom, right, top, left spot alone; global light
    depth                 16-bit PNG, normalised per part
    info_depth            YAML, normalization: {min, max} in metres: z = min + v / 65535 (max - min)        (1)
    normals               8-bit PNG, n = 2 v / 255 - 1, with y up and z towards the camera
    pose                  4 x 4 matrix, camera to world (text)
    metadata              YAML, anomalous: 0 or 1
    mask                  8-bit PNG, union of bumps_mask, dents_mask, colors_mask, normals_mask

One pinhole camera took all pictures: focal length 711.11 pixels at 512 x 512, principal point (W / 2, H / 2). Points
and normals are returned in the camera's frame (x right, y down, z forward); the pose goes along in ``meta["pose"]``.
Bonfiglioli et al., "The Eyecandies Dataset for Unsupervised Multimodal Anomaly Detection and Localization", ACCV 2022.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, DataError, nearest_names
from ..samples import Sample
from .camera import Intrinsics
from .files import image_size, read_mask
from .listing import category_folder, check_partners, subfolders, unique_ids, visible_files
from .opening import check_file, decoding, read_mapping
from .source import Record, check_root, check_split
from .views import ReadOptions, read_record

LIGHTS = tuple(f"image_{i}" for i in range(6))
DEFECTS = ("bumps", "dents", "colors", "normals")
_ITEM = re.compile(r"(\d+)_(\w+)\.(?:png|yaml|yml|txt)", re.IGNORECASE)
_NOMINAL_WIDTH = 512


class Eyecandies:
    """Reader of the Eyecandies data set.

    Args:
        root: The folder that holds the categories (``CandyCane``, ...).
        light: The picture taken as ``rgb``; ``image_4`` in the works on multimodal distillation.
        extra_lights: Further pictures, each a view under its own name.
        test: The folder of the test split, ``"test_public"`` or ``"test_private"`` (which has no labels).
        focal: Focal length in pixels for a picture 512 pixels wide; scaled with the width.
    """

    name = "eyecandies"

    def __init__(
        self,
        root: str | Path,
        light: str = "image_4",
        extra_lights: Sequence[str] = (),
        test: str = "test_public",
        focal: float = 711.11,
    ) -> None:
        self.root = check_root(root)
        for name in (light, *extra_lights):
            if name not in LIGHTS:
                raise ConfigError(f"Eyecandies has no light '{name}': {nearest_names(name, LIGHTS)}")
        if test not in ("test_public", "test_private"):
            raise ConfigError(f"`test` must be 'test_public' or 'test_private', got '{test}'")
        self.roles = {light: "rgb", "depth": "depth", "normals": "normals", "info_depth": "intrinsics", "mask": "mask"}
        self.roles |= {name: name for name in extra_lights if name != light}
        self.light, self.focal = light, focal
        self.splits = {"train": "train", "validation": "val", "test": test}

    def categories(self) -> list[str]:
        """Sub-folders of the root that hold a ``train/data`` or test folder.

        Raises:
            DataError: there is none.
        """
        found = [f.name for f in subfolders(self.root) if any((f / s / "data").is_dir() for s in self.splits.values())]
        if not found:
            raise DataError(
                f"{self.root}: holds no Eyecandies category; expected {self.root / 'CandyCane' / 'train' / 'data'}"
            )
        return found

    def has_split(self, category: str, split: str) -> bool:
        """Whether the split's folder is there and holds any file."""
        folder = self._folder(category, split)
        return folder.is_dir() and bool(visible_files(folder))

    def records(self, category: str, split: str, broken: dict[str, str] | None = None) -> list[Record]:
        """All parts of one split, sorted by id.

        A test part's label is the metadata's ``anomalous``; only without metadata the mask tells. The defect type names
        the masks that mark anything, e.g. ``"bumps+colors"``; for this the masks of anomalous parts are opened.

        Raises:
            DataError: unknown category; missing or empty split; a part without one of its files; no mask though
                anomalous.
        """
        folder = self._folder(category, split)
        if not folder.is_dir():
            raise DataError(f"{folder}: the split '{split}' is missing; unpack it there, or use a split that is there")
        parts: dict[str, dict[str, Path]] = {}
        for path in visible_files(folder):
            if match := _ITEM.fullmatch(path.name):
                parts.setdefault(match[1], {})[match[2]] = path
        records = [self._record(category, split, number, items) for number, items in parts.items()]
        if not records:
            raise DataError(f"{folder}: holds no parts; expected {folder / f'000_{self.light}.png'} and so on")
        records = check_partners(records, self._place, broken)
        return unique_ids(records)

    def read(self, record: Record) -> Sample:
        """Open the files of one part; the cloud is computed from the depth map, Eq. 1 and the pinhole.

        Raises:
            DataError: names the file, what was found, what was expected and the remedy.
        """
        files, options = dict(record.files), ReadOptions(flip_normals=True)
        if "depth" in files:
            camera = self._camera(files["depth"], files.pop("intrinsics"))
            options = replace(options, intrinsics=camera)
        files.pop("intrinsics", None)  # of no use without a depth map
        meta = dict(record.meta)
        if "pose_file" in meta:
            meta["pose"] = _read_pose(meta.pop("pose_file"))
        return read_record(replace(record, files=files, meta=meta), options)

    def _folder(self, category: str, split: str) -> Path:
        root = category_folder(self.root, category, self.categories())
        return root / self.splits[check_split(split)] / "data"

    def _record(self, category: str, split: str, number: str, items: dict[str, Path]) -> Record:
        files = {role: items[item] for item, role in self.roles.items() if item in items}
        if split != "test":
            files.pop("mask", None)  # empty by definition
        if not set(files) - {"mask", "intrinsics"}:
            path = next(iter(items.values()))
            raise DataError(f"{path}: belongs to no part: there is no {path.parent / f'{number}_{self.light}.png'}")
        if "depth" in files and "intrinsics" not in files:
            raise DataError(
                f"{files['depth']}: its partner {number}_info_depth.yaml is missing; without it the depth has no "
                "scale: add the file"
            )
        meta: dict[str, Any] = {f"{item}_file": items[item] for item in ("metadata", "pose") if item in items}
        label, defect = self._label(split, items)
        if label == 1 and "mask" not in files:
            raise DataError(f"{next(iter(files.values()))}: anomalous, but {number}_mask.png is missing; add it")
        id = f"{category}/{split}/{defect or 'unlabelled'}/{number}"
        return Record(id, category, split, defect, label, files, meta)

    def _label(self, split: str, items: dict[str, Path]) -> tuple[int | None, str | None]:
        """Label and defect type of one part; (None, None) in the private test set."""
        label: int | None = 0
        if split == "test" and "metadata" in items:
            label = _anomalous(items["metadata"])
        elif split == "test":
            label = int(read_mask(items["mask"]).any()) if "mask" in items else None
        if label != 1:
            return label, None if label is None else "good"
        masks = {kind: items[f"{kind}_mask"] for kind in DEFECTS if f"{kind}_mask" in items}
        return 1, "+".join(kind for kind, path in masks.items() if read_mask(path).any()) or "anomalous"

    def _place(self, record: Record, role: str) -> Path:
        view = next(iter(record.files.values()))
        item = next(item for item, known in self.roles.items() if known == role)
        return view.parent / f"{record.id.rpartition('/')[2]}_{item}.png"

    def _camera(self, depth: Path, info: Path) -> Intrinsics:
        """Eq. 1 and the pinhole as intrinsics of one part."""
        content = read_mapping(info, "depth normalisation")
        bounds = content.get("normalization")
        try:
            low, high = float(bounds["min"]), float(bounds["max"])  # type: ignore[index]
        except (TypeError, KeyError, ValueError):
            raise DataError(
                f"{info}: expected 'normalization: {{min: metres, max: metres}}', found {content}"
            ) from None
        if not low < high:
            raise DataError(f"{info}: expected min below max, found min {low} and max {high}; unpack the file again")
        H, W = image_size(depth)
        focal = self.focal * W / _NOMINAL_WIDTH
        return Intrinsics(focal, focal, W / 2, H / 2, scale=(high - low) / 65535, offset=low, invalid=())


def _anomalous(path: Path) -> int:
    content = read_mapping(path, "metadata")
    value = content.get("anomalous")
    if value not in (0, 1):  # also True and False
        raise DataError(f"{path}: expected 'anomalous: 0' or 'anomalous: 1', found {content}; unpack the file again")
    return int(value)


def _read_pose(path: Path) -> np.ndarray:
    """(4, 4) float64, camera to world."""
    check_file(path, "pose")
    with decoding(path, "a 4 x 4 matrix"):
        pose = np.loadtxt(path, dtype=np.float64, ndmin=2)
    if pose.shape != (4, 4):
        raise DataError(
            f"{path}: expected a 4 x 4 matrix, found {pose.shape[0]} x {pose.shape[1]}; unpack the file again"
        )
    return pose
