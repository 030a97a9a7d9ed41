"""Listing the files of parts without opening them, and checking that every part has all of its files.

Readers share these: a folder's files by stem, and the rule that every part of a split has the same views. A view may be
absent from a whole split (a set of pictures only); a single missing partner is an error that names the file expected.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from ..errors import DataError, nearest_names
from .files import ARRAY_SUFFIXES, CLOUD_SUFFIXES, IMAGE_SUFFIXES
from .source import Record
from .views import NOT_VIEWS

SUFFIXES: dict[str, tuple[str, ...]] = {
    "rgb": IMAGE_SUFFIXES,
    "xyz": (".tiff", ".tif", *ARRAY_SUFFIXES, *CLOUD_SUFFIXES),
    "depth": (".png", ".tiff", ".tif", *ARRAY_SUFFIXES),
    "normals": (".png", ".tiff", ".tif", ".bmp", *ARRAY_SUFFIXES),
    "mask": (".png", ".bmp", ".tif", ".tiff", ".npy", ".jpg", ".jpeg"),
    "intrinsics": (".json", ".yaml", ".yml"),
}
"""Role -> suffixes that its files may have. A JPEG mask is listed so that reading it can say what is wrong."""


def subfolders(folder: Path) -> list[Path]:
    """Visible sub-folders, sorted by name."""
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def visible_files(folder: Path) -> list[Path]:
    """Files, sorted by name, without hidden ones and what file managers leave behind."""
    debris = {"thumbs.db", "desktop.ini"}
    entries = sorted(folder.iterdir())
    return [f for f in entries if f.is_file() and not f.name.startswith(".") and f.name.lower() not in debris]


def files_by_stem(folder: Path, role: str, suffixes: Sequence[str] | None = None) -> dict[str, Path]:
    """Stem -> file of a folder that holds one role, e.g. ``{"003": .../rgb/003.png}``.

    Raises:
        DataError: a file of a kind that the role cannot have, or two files with one stem.
    """
    suffixes = suffixes or SUFFIXES.get(role, IMAGE_SUFFIXES)
    found: dict[str, Path] = {}
    for path in visible_files(folder):
        if path.suffix.lower() not in suffixes:
            raise DataError(
                f"{path}: does not belong into a folder of '{role}' files; expected {', '.join(suffixes)}: move it away"
            )
        if path.stem in found:
            raise DataError(f"{found[path.stem]} and {path.name}: two '{role}' files of one part; keep one of them")
        found[path.stem] = path
    return found


def category_folder(root: Path, category: str, categories: Sequence[str]) -> Path:
    """The folder of a category.

    Raises:
        DataError: unknown category; names the nearest.
    """
    if category not in categories:
        raise DataError(f"{root}: has no category '{category}': {nearest_names(category, categories)}")
    return root / category


def check_partners(
    records: Sequence[Record], place: Callable[[Record, str], str | Path], broken: dict[str, str] | None
) -> list[Record]:
    """The parts that have all the views of their split; masks and intrinsics are left to the reader.

    Args:
        records: The parts.
        place: Says where the file of a role should be for a part that lacks it.
        broken: Takes id -> what is wrong for the parts that lack a view; None to raise instead.

    Raises:
        DataError: names the file that is there, the one that is not, and what to do; only if `broken` is None.
    """
    roles = {role for record in records for role in record.files} - set(NOT_VIEWS)
    views = sorted(roles, key=lambda role: (role != "rgb", role))  # the picture is what people know a part by
    for record in records:
        for role in views:
            if role not in record.files:
                witness = record.files[next(view for view in views if view in record.files)]
                problem = (
                    f"{witness}: its partner is missing: expected '{role}' at {place(record, role)}; every part of a "
                    "split needs the same views: add the file, or move this part away"
                )
                if broken is None:
                    raise DataError(problem)
                broken[record.id] = problem
    return [record for record in records if broken is None or record.id not in broken]


def unique_ids(records: Iterable[Record]) -> list[Record]:
    """Records sorted by id.

    Raises:
        DataError: two parts with one id; names a file of each.
    """
    seen: dict[str, Record] = {}
    for record in records:
        if record.id in seen:
            first, second = (next(iter(r.files.values())) for r in (seen[record.id], record))
            raise DataError(f"{first} and {second}: two parts with the id '{record.id}'; rename one")
        seen[record.id] = record
    return [seen[id] for id in sorted(seen)]
