"""Prepared parts kept on disk, so that an epoch or a second method reads 3 MB instead of decoding and preparing again.

One safetensors file per part, named by what it depends on:

    key = sha256(format version, reader, roles and contents of the part's files, preparation)

so a changed file, setting or version is simply another key. The header carries a checksum; a damaged entry is rebuilt.
Originals are only read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import threading
import zlib
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, DataError
from ..samples import Array, Sample
from .camera import Intrinsics
from .frame import Frame
from .preparation import Preparation, prepare
from .source import Reader, Record, file_hash

log = logging.getLogger("polyspect")

FORMAT = 1  # raise when `prepare` or the layout of an entry changes what a sample comes out as

_KEPT_TYPES: dict[str, type[Any]] = {
    "<frame>": Frame,
    "<intrinsics>": Intrinsics,
}  # dataclasses that may stand in a part's meta


class PreparedCache:
    """A folder of prepared parts, bounded in size. Threads and processes may share it.

    Args:
        directory: Where entries live, made when needed; None keeps nothing and prepares every time.
        max_bytes: When the entries grow past this, those not used for longest are deleted.
    """

    def __init__(self, directory: str | Path | None, max_bytes: int = 20 * 2**30) -> None:
        if max_bytes < 1:
            raise ConfigError(f"the limit of the prepared cache must be at least 1 byte, got {max_bytes}")
        self.directory = None if directory is None else Path(directory)
        self.max_bytes = max_bytes
        self._lock = threading.Lock()
        self._held: int | None = None  # bytes of all entries, None until the folder was looked at

    def get(self, reader: Reader, record: Record, preparation: Preparation) -> Sample:
        """The prepared part: from its entry, or read, prepared and kept.

        Raises:
            DataError: the part cannot be read or prepared; see `Reader.read` and `prepare`.
        """
        if self.directory is None:
            return prepare(reader.read(record), preparation)
        path = self.path(reader, record, preparation)
        if path.exists():
            try:
                sample = _decode(path.read_bytes(), record)
            except Exception as error:  # whatever is wrong with the entry, the originals are there
                log.warning("rebuilding the damaged cache entry %s of part '%s': %s", path, record.id, error)
            else:
                os.utime(path)  # used now
                return sample
        content = _encode(prepare(reader.read(record), preparation))
        self._write(path, content)
        return _decode(content, record)  # so that the first time and all others give the same

    def path(self, reader: Reader, record: Record, preparation: Preparation) -> Path:
        """Where the entry of this part, prepared like this, is or would be.

        Raises:
            ConfigError: the cache has no directory.
        """
        if self.directory is None:
            raise ConfigError("this prepared cache has no directory, so parts have no path in it")
        return self.directory / f"{_key(reader, record, preparation)}.safetensors"

    def _write(self, path: Path, content: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        with self._lock:
            if self._held is not None:
                self._held += len(content)
            if self._held is None or self._held > self.max_bytes:
                self._held = self._shrink(path)

    def _shrink(self, newest: Path) -> int:
        """Delete the entries unused for longest until all fit; the newest stays. Returns the bytes left."""
        entries = []
        for path in newest.parent.glob("*.safetensors"):
            try:
                status = path.stat()
            except FileNotFoundError:  # another process deleted it
                continue
            entries.append((path != newest, status.st_mtime_ns, path.name, status.st_size, path))
        held = sum(entry[3] for entry in entries)
        for removable, _, _, size, path in sorted(entries, key=lambda entry: entry[1:3]):
            if held <= self.max_bytes:
                break
            if removable:
                path.unlink(missing_ok=True)
                held -= size
        return held


def _key(reader: Reader, record: Record, preparation: Preparation) -> str:
    meta = {
        name: file_hash(value) if isinstance(value, Path) else _to_json(value) for name, value in record.meta.items()
    }
    content = {
        "format": FORMAT,
        "reader": _describe(reader),
        "files": {role: file_hash(path) for role, path in record.files.items()},
        "meta": meta,
        "label": record.label,  # with the split, these decide what a missing mask means
        "split": record.split,
        "preparation": preparation.to_dict(),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _describe(reader: Reader) -> dict[str, Any]:
    """The reader's class and options: everything that it holds in public and can be written down, but its root."""
    described: dict[str, Any] = {"class": f"{type(reader).__module__}.{type(reader).__qualname__}"}
    for name, value in vars(reader).items():
        if name.startswith("_") or isinstance(value, Path):
            continue
        if is_dataclass(value) and not isinstance(value, type):
            described[name] = json.dumps(asdict(value), sort_keys=True, default=str)
        elif value is None or isinstance(value, (str, int, float, bool, list, tuple, dict)):
            described[name] = json.dumps(value, sort_keys=True, default=str)
    return described


# -- one entry --------------------------------------------------------------------------------------------------------


def _encode(sample: Sample) -> bytes:
    """The bytes of an entry: the same for the same sample."""
    from safetensors.numpy import save

    arrays = {f"image.{name}": _compact(image) for name, image in sample.images.items()}
    arrays |= {"valid": sample.valid}
    for name in ("foreground", "mask"):
        image = getattr(sample, name)
        if image is not None:
            arrays[name] = image
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    meta = dict(sample.meta)
    if "files" in meta:  # where they are is the asking record's business, see `_decode`
        meta["files"] = list(meta["files"])
    header = {
        "format": FORMAT,
        "images": list(sample.images),
        "checksums": {name: _checksum(array) for name, array in arrays.items()},
        "meta": _to_json(meta),
    }
    return save(arrays, metadata={"polyspect": json.dumps(header, sort_keys=True)})


def _decode(content: bytes, record: Record) -> Sample:
    """The sample of an entry, under the record's id.

    Raises:
        DataError: wrong format or checksum.
    """
    from safetensors.numpy import load

    length = int.from_bytes(content[:8], "little")
    header = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["polyspect"])
    if header["format"] != FORMAT:
        raise DataError(f"format {header['format']}, expected {FORMAT}")
    arrays = load(content)
    for name, checksum in header["checksums"].items():
        if _checksum(arrays[name]) != checksum:
            raise DataError(f"'{name}' does not have its checksum")
    meta = _from_json(header["meta"])
    if "files" in meta:
        meta["files"] = {role: str(record.files[role]) for role in meta["files"] if role in record.files}
    return Sample(
        id=record.id,
        images={name: _expand(arrays[f"image.{name}"]) for name in header["images"]},
        valid=arrays["valid"],
        foreground=arrays.get("foreground"),
        mask=arrays.get("mask"),
        label=record.label,
        defect=record.defect,
        meta=meta,
    )


def _compact(image: Array) -> Array:
    """8-bit if the float image is exactly k / 255, which RGB prepared from 8-bit files is; a quarter of the bytes."""
    if image.dtype != np.float32 or not image.size or image.min() < 0 or image.max() > 1:
        return image
    levels = np.rint(image * np.float32(255)).astype(np.uint8)
    return levels if np.array_equal(_expand(levels), image) else image


def _expand(image: Array) -> Array:
    return image.astype(np.float32) / np.float32(255) if image.dtype == np.uint8 else image


def _checksum(array: Array) -> int:
    return zlib.crc32(array.tobytes(), zlib.crc32(f"{array.dtype}{array.shape}".encode()))


def _to_json(value: Any) -> Any:
    """A value of `meta` in JSON's types; what JSON lacks becomes a one-entry object with a name in angle brackets.

    Raises:
        DataError: a type that is not known here.
    """
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, np.generic):
        return _to_json(value.item())
    for tag, kind in _KEPT_TYPES.items():
        if isinstance(value, kind):
            return {tag: {name: _to_json(item) for name, item in asdict(value).items()}}
    if isinstance(value, Path):
        return {"<path>": str(value)}
    if isinstance(value, np.ndarray):
        return {"<array>": [value.dtype.str, list(value.shape), value.ravel().tolist()]}
    if isinstance(value, tuple):
        return {"<tuple>": [_to_json(item) for item in value]}
    if isinstance(value, list):
        return [_to_json(item) for item in value]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _to_json(item) for key, item in value.items()}
    raise DataError(f"a part's meta holds a {type(value).__name__}, which cannot be kept; use plain values or arrays")


def _from_json(value: Any) -> Any:
    if isinstance(value, list):
        return [_from_json(item) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        [(kind, content)] = value.items()
        if kind in _KEPT_TYPES:
            return _KEPT_TYPES[kind](**_from_json(content))
        if kind == "<path>":
            return Path(content)
        if kind == "<array>":
            dtype, shape, items = content
            return np.array(items, dtype=np.dtype(dtype)).reshape(shape)
        if kind == "<tuple>":
            return tuple(_from_json(item) for item in content)
    return {key: _from_json(item) for key, item in value.items()}
