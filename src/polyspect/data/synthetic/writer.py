"""A synthetic data set on disk, in the folder layout of MVTec 3D-AD: resumable, the same bytes every time."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tifffile

from ...errors import ConfigError, DataError, nearest_names
from ...samples import Array
from ...version import __version__
from .categories import CATEGORIES
from .part import GENERATOR, make_part, part_seed
from .render import DISTANCE_MM, Camera

MARKER = "synthetic.json"
_FOLDERS = {"rgb": ".png", "xyz": ".tiff", "normals": ".png", "gt": ".png", "meta": ".json"}
_NOTE = "Synthetic parts, rendered by polyspect. No photograph and no measurement of a real part is in this folder."
_README = f"""# Synthetic parts

{_NOTE}

The folder layout is that of MVTec 3D-AD; the categories and defects are not, and results on them compare with no
published number. Seed, version and settings are in `{MARKER}`; each part's own seed, pose and defect (kind, modality,
place and size in mm) in its `meta/NNN.json`. `polyspect data make-synthetic` with the same settings writes the same
files again.
"""


@dataclass(frozen=True)
class _Place:
    """One part of a data set: which, and where its files go."""

    root: Path
    category: str
    split: str
    defect: str  # "good" for good parts
    index: int
    seed: int  # the data set's
    size: int
    camera: str

    @property
    def id(self) -> str:
        return f"{self.category}/{self.split}/{self.defect}/{self.index:03d}"

    def files(self) -> dict[str, Path]:
        folder = self.root / self.category / self.split / self.defect
        roles = [role for role in _FOLDERS if role != "gt" or self.split == "test"]
        return {role: folder / role / f"{self.index:03d}{_FOLDERS[role]}" for role in roles}


def write_dataset(
    root: str | Path,
    categories: Sequence[str] | None = None,
    train: int = 60,
    validation: int = 20,
    test_good: int = 20,
    test_per_defect: int = 8,
    size: int = 256,
    seed: int = 0,
    camera: str = "pinhole",
    progress: Callable[[int, int, str], None] | None = None,
    workers: int = 1,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a synthetic data set in the folder layout of MVTec 3D-AD.

    ``CATEGORY/{train,validation}/good/{rgb,xyz,normals,meta}`` and ``CATEGORY/test/{good,DEFECT}/{rgb,xyz,normals,gt,
    meta}`` hold ``NNN.png``, ``.tiff`` (float32 metres, uncompressed; 0,0,0 where nothing was measured) and ``.json``;
    ``CATEGORY/camera.json`` the camera; ``synthetic.json`` the settings, ``SYNTHETIC.md`` a note for people.

    A part's meta file is written last: parts that have theirs are complete and are not rendered again when the same
    call is repeated. More parts or categories can be added later; none is removed.

    Args:
        root: Folder to write to; made if it is not there.
        categories: Names in `CATEGORIES`; None for all ten.
        train, validation, test_good: Good parts per category in each split.
        test_per_defect: Test parts per category and defect kind.
        size, camera: As for `make_part`.
        seed: The data set's seed, 0 or larger.
        progress: Called as ``progress(done, total, id)`` after each part.
        workers: Processes that render; the files do not depend on it.
        overwrite: Replace a synthetic data set with other settings (its category folders are deleted first), or write
            into a folder that holds other things (which stay untouched).

    Returns:
        ``root``, ``categories``, ``parts``, ``written``, ``skipped`` (already there) and ``seconds``.

    Raises:
        ConfigError: unknown category or camera, or a number out of range.
        DataError: `root` holds something else, or synthetic parts with other settings, and `overwrite` is False; or a
            category folder there is not ours (never replaced).
    """
    started = time.perf_counter()
    root = Path(root)
    names = list(CATEGORIES) if categories is None else list(dict.fromkeys(categories))
    counts = {"train": train, "validation": validation, "test_good": test_good, "test_per_defect": test_per_defect}
    _check(names, counts, seed, size, camera, workers)
    settings = {"seed": seed, "size": size, "camera": camera, "generator": GENERATOR}
    known = _claim(root, names, settings, overwrite)
    everything = [name for name in CATEGORIES if name in names or name in known]
    head = {"synthetic": True, "note": _NOTE, "made_by": f"polyspect {__version__}", "settings": settings}
    _write_json(root / MARKER, {**head, "categories": everything, "counts": counts})
    _write(root / "SYNTHETIC.md", _README.encode())
    for name in names:
        view = Camera(camera, size, CATEGORIES[name].field_mm / size)
        _write_json(root / name / "camera.json", {**view.describe(), "distance_m": DISTANCE_MM / 1000, "unit": "m"})

    places = [_Place(root, *place, seed, size, camera) for name in names for place in _plan(name, counts)]
    written = 0
    for done, (place, fresh) in enumerate(_write_all(places, workers), start=1):
        written += fresh
        if progress is not None:
            progress(done, len(places), place.id)
    return {
        "root": str(root),
        "categories": names,
        "parts": len(places),
        "written": written,
        "skipped": len(places) - written,
        "seconds": time.perf_counter() - started,
    }


def _check(names: Sequence[str], counts: dict[str, int], seed: int, size: int, camera: str, workers: int) -> None:
    for name in names:
        if name not in CATEGORIES:
            raise ConfigError(f"unknown synthetic category '{name}': {nearest_names(name, CATEGORIES)}")
    if not names:
        raise ConfigError(f"`categories` is empty: name at least one of {', '.join(CATEGORIES)}, or None for all")
    for field, low, value in [*((field, 0, value) for field, value in counts.items()), ("workers", 1, workers)]:
        if value < low:
            raise ConfigError(f"`{field}` must be at least {low}, got {value}")
    make_part(names[0], seed, None, size, camera)  # raises what one part would


def _claim(root: Path, names: Sequence[str], settings: dict[str, Any], overwrite: bool) -> list[str]:
    """Make sure that `root` may be written to; the categories that are ours there already.

    Raises:
        DataError: see `write_dataset`.
    """
    if root.exists() and not root.is_dir():
        raise DataError(f"'{root}' is a file: name a folder for the synthetic parts")
    root.mkdir(parents=True, exist_ok=True)
    ours = _read_marker(root / MARKER)
    if ours is None:
        if any(root.iterdir()) and not overwrite:
            raise DataError(
                f"'{root}' is not empty and holds no {MARKER}: name another folder, or pass overwrite to add the "
                f"synthetic parts beside what is there"
            )
        taken = [name for name in names if (root / name).exists()]
        if taken:
            raise DataError(
                f"'{root / taken[0]}' is there and not synthetic, so it is not touched: name another folder"
            )
        return []
    known = [str(name) for name in ours["categories"] if name in CATEGORIES]
    if ours["settings"] == settings:
        if overwrite:
            _remove(root, [name for name in names if name in known])
        return known
    if not overwrite:
        raise DataError(
            f"'{root}' holds synthetic parts with other settings ({ours['settings']}, asked for {settings}): "
            f"name another folder, or pass overwrite to replace them"
        )
    _remove(root, known)
    return []


def _read_marker(path: Path) -> dict[str, Any] | None:
    """The contents of a data set's marker file; None if there is none.

    Raises:
        DataError: the file is damaged.
    """
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["synthetic"] is True and isinstance(found["settings"], dict) and isinstance(found["categories"], list):
            return dict(found)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise DataError(f"'{path}' is not what polyspect writes: remove it, or name another folder")


def _remove(root: Path, names: Sequence[str]) -> None:
    for name in names:
        if (root / name).is_dir():
            shutil.rmtree(root / name)


def _plan(category: str, counts: dict[str, int]) -> list[tuple[str, str, str, int]]:
    """(category, split, defect, index) of every part."""
    groups = [("train", "good", counts["train"]), ("validation", "good", counts["validation"])]
    groups += [("test", "good", counts["test_good"])]
    groups += [("test", kind, counts["test_per_defect"]) for kind in CATEGORIES[category].defects]
    return [(category, split, defect, index) for split, defect, count in groups for index in range(count)]


def _write_all(places: Sequence[_Place], workers: int) -> Iterator[tuple[_Place, bool]]:
    if workers == 1:
        yield from ((place, _write_part(place)) for place in places)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=cv2.setNumThreads, initargs=(1,)) as pool:
        yield from zip(places, pool.map(_write_part, places, chunksize=4))


def _write_part(place: _Place) -> bool:
    """Render and write one part unless it is complete; whether it was written."""
    files = place.files()
    seed = part_seed(place.seed, place.category, place.split, place.defect, place.index)
    if all(path.exists() for path in files.values()) and _made_with(files["meta"], seed, place):
        return False
    sample = make_part(place.category, seed, place.defect, place.size, place.camera)
    assert sample.mask is not None
    content = {
        "rgb": _png(sample.images["rgb"], noisy=True),
        "xyz": _tiff(sample.images["xyz"]),
        "normals": _png(np.rint((sample.images["normals"] + 1) * 127.5).astype(np.uint8), noisy=True),
        "gt": _png(sample.mask.astype(np.uint8) * 255, noisy=False),
        "meta": _json({"id": place.id, **sample.meta}),
    }
    for role, path in files.items():  # the meta file is the last: it says that the part is complete
        _write(path, content[role])
    return True


def _made_with(meta: Path, seed: int, place: _Place) -> bool:
    try:
        found = json.loads(meta.read_text(encoding="utf-8"))
        made = (found["generator"], found["seed"], found["size"], found["camera"]["model"])
    except (ValueError, KeyError, TypeError):
        return False
    return made == (GENERATOR, seed, place.size, place.camera)


def _png(image: Array, noisy: bool) -> bytes:
    colours = image if image.ndim == 2 else cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    # Noise holds no repeats to search for: without the search the file is smaller and twice as fast to write.
    strategy = cv2.IMWRITE_PNG_STRATEGY_HUFFMAN_ONLY if noisy else cv2.IMWRITE_PNG_STRATEGY_RLE
    how = [cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_STRATEGY, strategy]
    return cv2.imencode(".png", colours, how)[1].tobytes()


def _tiff(xyz: Array) -> bytes:
    """Uncompressed: zlib would save a fifth and take half as long as rendering the part."""
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, xyz, photometric="minisblack", planarconfig="contig", metadata=None, software="polyspect")
    return buffer.getvalue()


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()


def _write_json(path: Path, content: dict[str, Any]) -> None:
    _write(path, _json(content))


def _write(path: Path, content: bytes) -> None:
    """Write beside the target, flush, rename: a file under its final name is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(beside, "wb") as file:
            file.write(content)
            file.flush()
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
