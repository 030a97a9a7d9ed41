"""Prepared parts on disk: same bytes, right keys, damage, bounds."""

import hashlib
import logging
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from polyspect.data import source
from polyspect.data.camera import Intrinsics
from polyspect.data.preparation import PREPARATIONS, Preparation, prepare
from polyspect.data.prepared_cache import PreparedCache
from polyspect.data.source import Record
from polyspect.errors import ConfigError, DataError
from polyspect.samples import Sample

SMALL = Preparation(size=32)


@dataclass
class Options:
    unit: float = 1.0


class NumpyReader:
    """Reads .npy clouds and pictures, and counts how often."""

    name = "numpy"

    def __init__(self, root, unit=1.0):
        self.root = Path(root)
        self.options = Options(unit)
        self._reads = 0

    def read(self, record):
        self._reads += 1
        xyz = np.load(record.files["xyz"], allow_pickle=False) * np.float32(self.options.unit)
        rgb = np.load(record.files["rgb"], allow_pickle=False)
        mask = np.load(record.files["mask"], allow_pickle=False)
        meta = {
            "files": {role: str(path) for role, path in record.files.items()},
            "intrinsics": Intrinsics(500.0, 500.0, 10.0, 10.0),
            "pose": np.eye(3, dtype=np.float32),
            "flags": (),
        }
        return Sample(
            record.id, {"rgb": rgb, "xyz": xyz}, (xyz != 0).any(-1), None, mask, record.label, record.defect, meta
        )


def write_part(folder, seed=0):
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    row, column = np.mgrid[:20, :20]
    xyz = np.stack([0.005 * column, 0.005 * row, 0.5 + 0.01 * np.sin(row + seed)], -1).astype(np.float32)
    xyz[3, 3] = 0
    files = {"rgb": folder / f"rgb{seed}.npy", "xyz": folder / f"xyz{seed}.npy", "mask": folder / f"mask{seed}.npy"}
    np.save(files["rgb"], generator.integers(0, 256, (20, 20, 3), dtype=np.uint8))
    np.save(files["xyz"], xyz)
    np.save(files["mask"], row > 15)
    return Record(f"c/test/bent/{seed}", "c", "test", "bent", 1, files)


def same(a, b):
    assert a.id == b.id
    assert (a.label, a.defect) == (b.label, b.defect)
    assert list(a.images) == list(b.images)
    for one, other in [*((a.images[n], b.images[n]) for n in a.images), (a.valid, b.valid), (a.mask, b.mask),
                       (a.foreground, b.foreground)]:  # fmt: skip
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    assert {k: v for k, v in a.meta.items() if k != "pose"} == {k: v for k, v in b.meta.items() if k != "pose"}
    np.testing.assert_array_equal(a.meta["pose"], b.meta["pose"])


@pytest.mark.parametrize("preset", sorted(PREPARATIONS))
def test_kept_parts_equal_prepared_ones_and_originals_are_only_read(tmp_path, preset):
    record, reader = write_part(tmp_path / "data"), NumpyReader(tmp_path / "data")
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in record.files.values()}
    preparation = replace(PREPARATIONS[preset], size=32)
    expected = prepare(reader.read(record), preparation)
    cache = PreparedCache(tmp_path / "cache")
    same(cache.get(reader, record, preparation), expected)
    reads = reader._reads
    same(cache.get(reader, record, preparation), expected)
    same(PreparedCache(tmp_path / "cache").get(reader, record, preparation), expected)
    assert reader._reads == reads
    same(PreparedCache(None).get(reader, record, preparation), expected)
    assert before == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in record.files.values()}


def test_same_bytes_in_another_folder_and_another_process(tmp_path):
    record, reader = write_part(tmp_path / "data"), NumpyReader(tmp_path / "data")
    caches = [PreparedCache(tmp_path / name) for name in "ab"]
    for cache in caches:
        cache.get(reader, record, SMALL)
    one, two = (cache.path(reader, record, SMALL) for cache in caches)
    assert one.name == two.name
    assert one.read_bytes() == two.read_bytes()
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; import test_data_prepared_cache as t\n"
        "root = Path(sys.argv[2]); record, reader = t.write_part(root / 'again'), t.NumpyReader(root / 'again')\n"
        "cache = t.PreparedCache(root / 'c'); cache.get(reader, record, t.SMALL)"
    )
    subprocess.run([sys.executable, "-c", program, str(Path(__file__).parent), str(tmp_path)], check=True)
    assert (tmp_path / "c" / one.name).read_bytes() == one.read_bytes()
    kept = PreparedCache(tmp_path / "c").get(reader, record, SMALL)
    same(kept, caches[0].get(reader, record, SMALL))  # paths in the meta are those of the record that asks


def test_a_changed_file_setting_reader_or_label_is_another_key(tmp_path):
    record, reader = write_part(tmp_path / "data"), NumpyReader(tmp_path / "data")
    cache = PreparedCache(tmp_path / "cache")
    keys = {cache.path(reader, record, SMALL)}
    keys.add(cache.path(reader, record, replace(SMALL, closing=1)))
    keys.add(cache.path(NumpyReader(tmp_path, unit=0.001), record, SMALL))
    keys.add(cache.path(reader, replace(record, label=None), SMALL))
    for role in ("xyz", "rgb", "mask"):
        np.save(record.files[role], np.load(record.files[role])[::-1].copy())
        os.utime(record.files[role], ns=(1, len(keys)))  # even if the clock is coarse
        keys.add(cache.path(reader, record, SMALL))
    assert len(keys) == 7
    elsewhere = cache.path(NumpyReader("/other/root"), replace(record, id="other/name"), SMALL)
    assert elsewhere == cache.path(reader, record, SMALL)  # names and places do not count


def test_files_are_hashed_once(tmp_path, monkeypatch):
    record, reader = write_part(tmp_path), NumpyReader(tmp_path)
    seen = []
    monkeypatch.setattr(source, "_hashes", {})
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, kind: seen.append(Path(file.name)) or digest(file, kind))
    cache = PreparedCache(tmp_path / "cache")
    for _ in range(3):
        cache.get(reader, record, SMALL)
    assert sorted(seen) == sorted(record.files.values())


def flip_last_byte(content):
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[: len(content) // 2],
        lambda content: b"not a tensor file at all",
        flip_last_byte,
        lambda content: content.replace(b'\\"format\\": 1', b'\\"format\\": 0'),
    ],
    ids=["empty", "truncated", "foreign", "flipped bit", "other format"],
)
def test_damaged_entries_are_rebuilt_with_a_warning(tmp_path, caplog, damage):
    record, reader = write_part(tmp_path), NumpyReader(tmp_path)
    cache = PreparedCache(tmp_path / "cache")
    expected = cache.get(reader, record, SMALL)
    path = cache.path(reader, record, SMALL)
    good = path.read_bytes()
    assert damage(good) != good
    path.write_bytes(damage(good))
    with caplog.at_level(logging.WARNING, logger="polyspect"):
        same(cache.get(reader, record, SMALL), expected)
    assert "rebuilding the damaged cache entry" in caplog.text
    assert record.id in caplog.text
    assert path.read_bytes() == good


def test_size_is_bounded_and_what_was_not_used_for_longest_goes(tmp_path):
    reader = NumpyReader(tmp_path)
    records = [write_part(tmp_path, seed) for seed in range(4)]
    probe = PreparedCache(tmp_path / "probe")
    probe.get(reader, records[0], SMALL)
    size = probe.path(reader, records[0], SMALL).stat().st_size
    cache = PreparedCache(tmp_path / "cache", max_bytes=int(2.5 * size))
    paths = [cache.path(reader, record, SMALL) for record in records]
    for index in (0, 1):
        cache.get(reader, records[index], SMALL)
        os.utime(paths[index], ns=(10**9 * index, 10**9 * index))
    cache.get(reader, records[0], SMALL)  # used again, so 1 is now the oldest
    cache.get(reader, records[2], SMALL)
    assert [path.exists() for path in paths] == [True, False, True, False]
    tiny = PreparedCache(tmp_path / "cache", max_bytes=1)
    tiny.get(reader, records[3], SMALL)
    assert [path.exists() for path in paths] == [False, False, False, True]
    assert not list((tmp_path / "cache").glob("*.part"))


def test_nothing_is_left_behind_when_writing_fails(tmp_path, monkeypatch):
    record, reader = write_part(tmp_path), NumpyReader(tmp_path)
    cache = PreparedCache(tmp_path / "cache")

    def fail(*paths):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        cache.get(reader, record, SMALL)
    assert list((tmp_path / "cache").iterdir()) == []


def test_wrong_use_is_refused(tmp_path):
    record, reader = write_part(tmp_path), NumpyReader(tmp_path)
    with pytest.raises(ConfigError, match="at least 1 byte"):
        PreparedCache(tmp_path, max_bytes=0)
    with pytest.raises(ConfigError, match="no directory"):
        PreparedCache(None).path(reader, record, SMALL)
    odd = replace(record, meta={"thing": object()})
    with pytest.raises(DataError, match="object"):
        PreparedCache(tmp_path / "cache").get(reader, odd, SMALL)
