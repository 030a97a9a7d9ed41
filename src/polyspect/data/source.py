"""What every data set looks like from above: categories, splits, records of parts, and a way to read one part.

A reader is a class with the methods of `Reader`. It lists parts without opening them (a `Record` each) and reads one
part into a `Sample`. Originals are never written to.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ..errors import ConfigError, DataError, nearest_names
from ..samples import Sample

SPLITS = ("train", "validation", "test")
"""The splits of every data set, whatever its folders are called."""

READERS: dict[str, str] = {
    "mvtec3d": "polyspect.data.mvtec3d:MVTec3D",
    "eyecandies": "polyspect.data.eyecandies:Eyecandies",
    "folder": "polyspect.data.folder:Folder",
}
"""Reader name -> where its class is; imported when used."""


@dataclass(frozen=True)
class Record:
    """One part as the file system shows it, before anything is opened.

    Attributes:
        id: ``"category/split/defect/stem"``; unique within the data set.
        category: Category in the data set's spelling.
        split: ``"train"``, ``"validation"`` or ``"test"``.
        defect: Defect type in the data set's spelling, ``"good"`` for good parts, None unknown (new parts).
        label: 0 good, 1 anomalous, None unknown. From the folder or CSV, never from the mask.
        files: Role -> file. Roles are modality names, plus ``"mask"`` and ``"intrinsics"``.
    """

    id: str
    category: str
    split: str
    defect: str | None
    label: int | None
    files: Mapping[str, Path]
    meta: Mapping[str, Any] = field(default_factory=dict)

    def input_files(self) -> list[Path]:
        """The files a detector may see: everything but the ground truth."""
        return [path for role, path in sorted(self.files.items()) if role != "mask"]


class Reader(Protocol):
    """A data set in one of the supported layouts."""

    name: str
    root: Path

    def categories(self) -> list[str]:
        """All categories under `root`, sorted."""
        ...

    def records(self, category: str, split: str, broken: dict[str, str] | None = None) -> list[Record]:
        """All parts of one split, sorted by id.

        Args:
            category: In the data set's spelling.
            split: One of `SPLITS`.
            broken: If given, parts that lack one of their files are left out and noted here, id -> what is wrong.

        Raises:
            DataError: unknown category (names the nearest), missing or empty split, a part without one of its files
                (names it) unless `broken` is given.
            ConfigError: `split` is not one of `SPLITS`.
        """
        ...

    def has_split(self, category: str, split: str) -> bool:
        """Whether `records(category, split)` has parts to list; False also for a folder that holds none.

        Raises:
            DataError: unknown category (names the nearest).
            ConfigError: `split` is not one of `SPLITS`.
        """
        ...

    def read(self, record: Record) -> Sample:
        """Open the files of one part.

        Raises:
            DataError: names the file, what was found, what was expected and the remedy.
        """
        ...


def open_reader(name: str, root: str | Path, **options: Any) -> Reader:
    """The reader called `name` over the data set at `root`.

    Raises:
        ConfigError: no reader of that name, or it has no such option; names the nearest.
        DataError: `root` is not a folder.
    """
    if name not in READERS:
        raise ConfigError(f"unknown data reader '{name}': {nearest_names(name, READERS)}")
    module, _, cls = READERS[name].partition(":")
    factory = getattr(importlib.import_module(module), cls)
    known = [option for option in inspect.signature(factory).parameters if option != "root"]
    for option in options:
        if option not in known:
            raise ConfigError(f"data reader '{name}' has no option '{option}': {nearest_names(option, known)}")
    reader: Reader = factory(Path(root), **options)
    return reader


def check_root(root: str | Path) -> Path:
    """The folder of a data set.

    Raises:
        DataError: there is no folder at `root`.
    """
    root = Path(root)
    if not root.is_dir():
        found = "a file" if root.is_file() else "nothing"
        raise DataError(f"{root}: expected the folder of a data set, found {found}; check the path")
    return root


def check_split(split: str) -> str:
    """Return `split` after checking that it is one of `SPLITS`.

    Raises:
        ConfigError: it is not; names the nearest.
    """
    if split not in SPLITS:
        raise ConfigError(f"unknown split '{split}': {nearest_names(split, SPLITS)}")
    return split


_hashes: dict[tuple[str, int, int], str] = {}  # (path, time of change, size) -> sha256


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes, as 64 hex digits; remembered while its size and time of change stay."""
    try:
        status = path.stat()
        seen = (os.path.abspath(path), status.st_mtime_ns, status.st_size)
        if seen not in _hashes:
            with open(path, "rb") as file:
                _hashes[seen] = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"'{path}' cannot be read: {error.strerror or error}") from None
    return _hashes[seen]


def content_hash(record: Record) -> str:
    """sha256 over the content of all input files of a part (not its name, not its ground truth)."""
    digest = hashlib.sha256()
    for role, path in sorted(record.files.items()):
        if role != "mask":
            digest.update(f"{role}:{file_hash(path)}\n".encode())
    return digest.hexdigest()
