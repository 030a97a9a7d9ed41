"""All pictures of a folder, for distillation: no labels, no categories."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..samples import Array
from .files import IMAGE_SUFFIXES, read_image


class ImageFolder:
    """The pictures in a folder and the folders below it, in the order of their paths.

    Files are told by their suffix (`IMAGE_SUFFIXES`). Where depth maps or masks lie beside pictures, name the folder
    that holds the pictures alone (``rgb`` in MVTec 3D-AD).

    Args:
        folder: The folder.

    Raises:
        DataError: no such folder, or no picture in it.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        if not self.folder.is_dir():
            raise DataError(f"there is no folder '{self.folder}': name the folder that holds the pictures")
        self.paths = sorted(p for p in self.folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
        if not self.paths:
            raise DataError(f"no picture in '{self.folder}': expected files with suffix {', '.join(IMAGE_SUFFIXES)}")

    def __len__(self) -> int:
        return len(self.paths)

    def picture(self, index: int) -> Array:
        """RGB (H, W, 3) uint8.

        Raises:
            DataError: the file cannot be read as a picture.
        """
        return read_image(self.paths[index])

    def about(self) -> dict[str, Any]:
        """Number of pictures and a hash of names and sizes; no path."""
        names = [f"{path.relative_to(self.folder).as_posix()} {path.stat().st_size}" for path in self.paths]
        digest = hashlib.sha256("\n".join(names).encode()).hexdigest()
        return {"source": "folder", "count": len(self.paths), "files": digest}
