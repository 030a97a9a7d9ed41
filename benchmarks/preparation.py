"""How long one 800x800 part takes from disk to prepared: python benchmarks/preparation.py

Writes a synthetic part in MVTec 3D-AD's layout (float32 TIFF cloud, 8-bit PNG) to a temporary folder and prints medians
of wall and process time, and the peak memory. Files are in the page cache, as in the second epoch of any run.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import tifffile

from polyspect.data.batches import collate
from polyspect.data.depth_scale import fit_depth_scale
from polyspect.data.preparation import PREPARATIONS, prepare
from polyspect.data.prepared_cache import PreparedCache
from polyspect.data.source import open_reader
from polyspect.geometry.normals import surface_normals
from polyspect.geometry.plane import fit_plane


def write_part(root: Path, size: int) -> None:
    """A bumpy disc on a tilted table, 184 mm across, 3 % of the points missing."""
    generator = np.random.default_rng(0)
    row, column = np.mgrid[:size, :size]
    x, y = (0.184 * (k / size - 0.5) for k in (column, row))
    disc = x**2 + y**2 < 0.06**2
    height = np.where(disc, 0.02 + 0.003 * np.sin(200 * x) * np.cos(150 * y), 0)
    height = height + 1e-4 * generator.standard_normal(height.shape)
    xyz = np.stack([x, y, 0.5 + 0.1 * x - height], -1).astype(np.float32)
    xyz[generator.random((size, size)) < 0.03] = 0
    grain = cv2.GaussianBlur(generator.integers(0, 256, (size, size, 3), dtype=np.uint8), (0, 0), 2)
    for name in ("rgb", "xyz"):
        (root / "part" / "train" / "good" / name).mkdir(parents=True)
    tifffile.imwrite(root / "part/train/good/xyz/000.tiff", xyz)
    cv2.imwrite(str(root / "part/train/good/rgb/000.png"), grain)


def timed(what: Callable[[], object], repeats: int) -> str:
    """Median and best wall time and median process time; the last counts all threads and suffers less from others."""
    what()  # warms up
    wall, cpu = [], []
    for _ in range(repeats):
        start, start_cpu = time.perf_counter(), time.process_time()
        what()
        wall.append(1000 * (time.perf_counter() - start))
        cpu.append(1000 * (time.process_time() - start_cpu))
    return f"{statistics.median(wall):7.1f} ms  best {min(wall):6.1f}  cpu {statistics.median(cpu):6.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=800, help="side of the part in pixels")
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    default = PREPARATIONS["default"]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_part(root, arguments.size)
        reader = open_reader("mvtec3d", root)
        record = reader.records("part", "train")[0]
        sample = reader.read(record)
        prepared = prepare(sample, default)
        scale = fit_depth_scale([prepared])
        cache = PreparedCache(root / "cache")
        cache.get(reader, record, default)
        rows: dict[str, Callable[[], object]] = {"read TIFF + PNG": lambda: reader.read(record)}
        for name in PREPARATIONS:
            rows[f"prepare, {name}"] = lambda name=name: prepare(sample, PREPARATIONS[name])  # type: ignore[misc]
        removed = replace(default, background="plane", keep_components=1)
        rows["prepare, default with plane removal, largest piece"] = lambda: prepare(sample, removed)
        rows["read + prepare, default"] = lambda: prepare(reader.read(record), default)
        rows["the same from the cache"] = lambda: cache.get(reader, record, default)
        rows["plane alone, at 800"] = lambda: fit_plane(sample.images["xyz"], sample.valid)
        rows["normals alone, at 256"] = lambda: surface_normals(prepared.images["xyz"], prepared.valid)
        rows["collate one part"] = lambda: collate([prepared], default, scale)
        for name, what in rows.items():
            print(f"{name:55s}{timed(what, arguments.repeats)}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"peak memory of the process {peak:.0f} MiB, most of it torch")


if __name__ == "__main__":
    main()
