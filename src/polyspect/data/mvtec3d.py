"""MVTec 3D-AD, and any data in its layout.

    ROOT/CATEGORY/{train,validation}/good/{rgb,xyz}/NNN.{png,tiff}
    ROOT/CATEGORY/test/{good,DEFECT}/{rgb,xyz,gt}/NNN.{png,tiff,png}

Beside ``rgb`` and ``xyz`` a type folder may hold ``normals`` (a third view) and ``meta`` (NNN.json, free content that
travels along as ``Sample.meta["metadata"]``). Coordinates are metres in the camera's frame, (0, 0, 0) where nothing was
measured. Bergmann et al., "The MVTec 3D-AD Dataset for Unsupervised 3D Anomaly Detection and Localization", 2022.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import DataError
from ..samples import Sample
from .listing import category_folder, check_partners, files_by_stem, subfolders, unique_ids
from .source import SPLITS, Record, check_root, check_split
from .views import ReadOptions, read_record, sentinels

VIEWS = ("rgb", "xyz", "normals")


class MVTec3D:
    """Reader of the MVTec 3D-AD layout.

    Args:
        root: The folder that holds the categories.
        unit: Unit of the coordinates, ``"m"`` (as in MVTec 3D-AD) or ``"mm"``.
        invalid: Further coordinate values (one or several) that mean "not measured".
    """

    name = "mvtec3d"

    def __init__(self, root: str | Path, unit: str = "m", invalid: float | Sequence[float] = ()) -> None:
        self.root = check_root(root)
        self.options = ReadOptions(unit=unit, invalid=sentinels(invalid))

    def categories(self) -> list[str]:
        """Sub-folders of the root that hold a ``train`` or ``test`` folder.

        Raises:
            DataError: there is none.
        """
        found = [f.name for f in subfolders(self.root) if any((f / split).is_dir() for split in SPLITS)]
        if found:
            return found
        if any((self.root / split).is_dir() for split in SPLITS):
            raise DataError(f"{self.root}: is a single category; give its parent {self.root.parent} as the root")
        raise DataError(f"{self.root}: holds no category; expected {self.root / 'CATEGORY' / 'train' / 'good' / 'rgb'}")

    def has_split(self, category: str, split: str) -> bool:
        """Whether the split's folder is there and holds any type of part."""
        folder = category_folder(self.root, category, self.categories()) / check_split(split)
        return folder.is_dir() and bool(subfolders(folder))

    def records(self, category: str, split: str, broken: dict[str, str] | None = None) -> list[Record]:
        """All parts of one split, sorted by id.

        Raises:
            DataError: unknown category; missing or empty split; a part without one of its files, or without ground
                truth though anomalous; a training part that is not good; a file that belongs to nothing.
        """
        folder = category_folder(self.root, category, self.categories()) / check_split(split)
        if not folder.is_dir():
            there = ", ".join(f.name for f in subfolders(folder.parent))
            raise DataError(
                f"{folder}: the split '{split}' is missing; '{category}' holds {there}: create or rename the "
                "folder, or use a split that is there"
            )
        records = []
        for kind in subfolders(folder):
            if split != "test" and kind.name != "good":
                raise DataError(f"{kind}: '{split}' must hold good parts only, in 'good'; move '{kind.name}' to 'test'")
            for stem, files in _type_files(kind).items():
                meta = {"metadata_file": files.pop("meta")} if "meta" in files else {}
                id, label = f"{category}/{split}/{kind.name}/{stem}", int(kind.name != "good")
                records.append(Record(id, category, split, kind.name, label, files, meta))
        if not records:
            raise DataError(f"{folder}: holds no parts; expected {folder / 'good' / 'rgb' / '000.png'} and so on")
        records = check_partners(records, _place, broken)
        if split == "test":
            records = _check_ground_truth(records, broken)
        return unique_ids(records)

    def read(self, record: Record) -> Sample:
        """Open the files of one part; depth is the cloud's z.

        A cloud without a single valid point is read, with ``"no_valid_points"`` in ``meta["flags"]``.

        Raises:
            DataError: names the file, what was found, what was expected and the remedy.
        """
        return read_record(record, self.options)


def _type_files(kind: Path) -> dict[str, dict[str, Path]]:
    """Stem -> role -> file of one type folder (``good``, ``hole``, ...)."""
    folders = {f.name: f for f in subfolders(kind)}
    if not set(folders) & set(VIEWS):
        raise DataError(
            f"{kind}: holds neither 'rgb' nor 'xyz' but {', '.join(folders) or 'no folder'}; expected {kind / 'rgb'} "
            f"and {kind / 'xyz'}"
        )
    found: dict[str, dict[str, Path]] = {}
    for name, role in [*((view, view) for view in VIEWS), ("gt", "mask"), ("meta", "meta")]:
        if name in folders:
            for stem, path in files_by_stem(folders[name], role, (".json",) if role == "meta" else None).items():
                found.setdefault(stem, {})[role] = path
    for files in found.values():
        if not set(files) & set(VIEWS):
            path = next(iter(files.values()))
            raise DataError(
                f"{path}: belongs to no part: there is no {kind / 'rgb' / path.stem}.png; add the part's views or move "
                "the file away"
            )
    return found


def _place(record: Record, role: str) -> Path:
    """Where a part's file of a role should be."""
    view = next(iter(record.files.values()))
    return view.parent.parent / role / (view.stem + {"xyz": ".tiff"}.get(role, ".png"))


def _check_ground_truth(records: Sequence[Record], broken: dict[str, str] | None) -> list[Record]:
    for record in records:
        if record.label == 1 and "mask" not in record.files:
            view = next(iter(record.files.values()))
            expected = view.parent.parent / "gt" / f"{view.stem}.png"
            problem = (
                f"{view}: anomalous, but its ground truth {expected} is missing; add the mask, or use the reader "
                "'folder', which takes test parts without masks"
            )
            if broken is None:
                raise DataError(problem)
            broken[record.id] = problem
    return [record for record in records if broken is None or record.id not in broken]
