"""All clouds of a folder, for pre-training: no labels, no categories, no grid needed."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..samples import Array
from .files import CLOUD_SUFFIXES, read_points

SUFFIXES = (*CLOUD_SUFFIXES, ".tif", ".tiff", ".npy", ".npz")


class CloudFolder:
    """The clouds in a folder and the folders below it, in the order of their paths.

    Files are told by their suffix (`SUFFIXES`). Where TIFF pictures lie beside clouds, name the folder that holds the
    clouds alone (``xyz`` in MVTec 3D-AD).

    Args:
        folder: The folder.

    Raises:
        DataError: no such folder, or no cloud in it.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        if not self.folder.is_dir():
            raise DataError(f"there is no folder '{self.folder}': name the folder that holds the clouds")
        self.paths = sorted(p for p in self.folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        if not self.paths:
            raise DataError(f"no cloud in '{self.folder}': expected files with suffix {', '.join(SUFFIXES)}")

    def __len__(self) -> int:
        return len(self.paths)

    def cloud(self, index: int) -> Array:
        """Measured points (N, 3) float32 in the file's unit.

        Raises:
            DataError: the file cannot be read as a cloud.
        """
        return read_points(self.paths[index])

    def about(self) -> dict[str, Any]:
        """Number of clouds and a hash of names and sizes; no path."""
        names = [f"{path.relative_to(self.folder).as_posix()} {path.stat().st_size}" for path in self.paths]
        digest = hashlib.sha256("\n".join(names).encode()).hexdigest()
        return {"source": "folder", "count": len(self.paths), "files": digest}
