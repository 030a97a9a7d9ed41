"""Opening files so that whatever goes wrong names the file, what was found and what to do.

Decoders written by others raise whatever they like; `decoding` turns all of it into one `DataError` with one line.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from ..errors import DataError, nearest_names

log = logging.getLogger(__name__)


def check_file(path: str | Path, what: str) -> Path:
    """Return `path` after checking that a file with at least one byte is there.

    Raises:
        DataError: missing (names the nearest file of its folder), a folder, not readable, or empty.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise DataError(f"{path}: {what} not found; {_neighbours(path)}") from None
    except OSError as error:
        raise DataError(
            f"{path}: {what} cannot be opened: {error.strerror or error}; check the path and rights"
        ) from error
    if path.is_dir():
        raise DataError(f"{path}: expected {what}, found a folder; name the file itself")
    if size == 0:
        raise DataError(
            f"{path}: {what} is empty (0 bytes); it was probably cut off while it was written: copy it again"
        )
    return path


@contextmanager
def decoding(path: Path, what: str) -> Iterator[None]:
    """Turn any exception of a decoder into a `DataError` about `path`."""
    try:
        yield
    except (DataError, MemoryError):
        raise
    except Exception as error:
        detail = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{path}: cannot be read as {what}: {detail}; the file is damaged, cut off or of another kind: "
            "copy or export it again"
        ) from error


def read_mapping(path: str | Path, what: str = "settings") -> dict[str, Any]:
    """The top-level mapping of a JSON or YAML file (UTF-8).

    Raises:
        DataError: missing, not valid JSON or YAML, or its top level is not a mapping.
    """
    path = check_file(path, what)
    with decoding(path, f"{what} in JSON or YAML"):
        text = path.read_text(encoding="utf-8-sig")
        content = json.loads(text) if path.suffix.lower() == ".json" else yaml.safe_load(text)
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise DataError(f"{path}: expected names with values ('key: value' lines), found {type(content).__name__}")
    return content


@functools.lru_cache(maxsize=1024)
def warn_once(subject: str, advice: str) -> None:
    """Log one warning per subject (a folder), however many of its files deserve it."""
    log.warning("%s: %s", subject, advice)


def _neighbours(path: Path) -> str:
    """What the folder of a missing file does hold: the nearest names, or that the folder is missing too."""
    if not path.parent.is_dir():
        return f"the folder {path.parent} does not exist either: check the path"
    names = sorted(entry.name for entry in path.parent.iterdir())
    if not names:
        return "its folder is empty: check the path, or copy the file there"
    if len(names) > 8:
        hint = nearest_names(path.name, names).partition("known:")[0].strip()
        return f"{hint or 'its folder holds no similar name:'} check the path ({len(names)} files there)"
    return nearest_names(path.name, names).replace("known:", "its folder holds:") + "; check the path"
