"""The feature cache: what a detector's frozen part computes is computed once, on disk, memory-mapped and bounded.

One folder per (extractor, list of parts): ``index.json`` names the tensors, ``NAME.bin`` holds one row per part,
``done.bin`` one byte per block of parts that is complete. A block is written before it is marked, so a killed process
leaves a cache that the next one goes on filling. Parts beyond the byte limit are computed afresh each time they are
asked for.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..samples import Batch, Features

log = logging.getLogger("polyspect")


class PartSource(Protocol):
    """The parts of one split, as the engine sees them (`polyspect.data.parts.Parts`)."""

    def __len__(self) -> int:
        """How many parts there are."""
        ...

    def keys(self) -> list[str]:
        """One content key per part: changes when its files or its preparation change."""
        ...

    def batch(self, indices: Sequence[int]) -> Batch:
        """The prepared parts at `indices`, stacked."""
        ...


class FeatureStore:
    """Features of all parts of a split, by row.

    Args:
        extract: From a batch of parts (their indices) to features on the compute device.
        key: What decides the features: extractor and parts. The folder's name.
        count: Number of parts.
        folder: Where caches lie; None keeps the rows in memory.
        max_bytes: Most that this store may take.
        block: Parts per extraction; the same on every run, so that cached and fresh features have the same bits.
    """

    def __init__(
        self,
        extract: Callable[[Sequence[int]], Features],
        key: str,
        count: int,
        *,
        folder: Path | None,
        max_bytes: int,
        block: int = 8,
    ) -> None:
        self._extract = extract
        self.count = count
        self._block = block
        self._folder = folder / key if folder is not None else None
        self._max_bytes = max_bytes
        self._rows: dict[str, Any] = {}  # name -> (capacity, ...) array, memory-mapped or in memory
        self._done: Any = None  # one byte per block
        self._capacity = 0
        if self._folder is not None and (self._folder / "index.json").is_file():
            self._open(json.loads((self._folder / "index.json").read_text()))

    @property
    def complete(self) -> bool:
        """Whether every row that fits is there."""
        return self._done is not None and bool(self._done.all())

    def fill(self, advance: Callable[..., None]) -> None:
        """Compute all rows that are not there yet."""
        for first in range(0, self.count, self._block):
            self._need(range(first, min(first + self._block, self.count)))
            advance(min(self._block, self.count - first))

    def rows(self, indices: Sequence[int], device: torch.device | str) -> dict[str, Tensor]:
        """Features of the parts at `indices`, in that order, on `device`."""
        self._need(indices)
        inside = [position for position, index in enumerate(indices) if index < self._capacity]
        outside = [position for position, index in enumerate(indices) if index >= self._capacity]
        fresh = self._extract([indices[p] for p in outside]) if outside else {}
        if not inside:
            return {name: tensor.to(device) for name, tensor in fresh.items()}
        wanted = np.array([indices[p] for p in inside])
        stored = {name: torch.from_numpy(np.array(array[wanted])).to(device) for name, array in self._rows.items()}
        if not outside:
            return stored
        order = torch.tensor(np.argsort(np.array(inside + outside)), device=device)
        return {name: torch.cat([stored[name], fresh[name].to(device)])[order] for name in stored}

    def _need(self, indices: Sequence[int]) -> None:
        for block in sorted({index // self._block for index in indices}):
            if self._done is not None and (block >= len(self._done) or self._done[block]):
                continue
            members = range(block * self._block, min((block + 1) * self._block, self.count))
            features = self._extract(list(members))
            arrays = {name: tensor.cpu().numpy() for name, tensor in features.items()}
            if self._done is None:
                self._create(arrays)
            if block >= len(self._done):
                continue
            for name, array in arrays.items():
                self._rows[name][members.start : members.stop] = array
            if self._folder is not None:
                for array in self._rows.values():
                    array.flush()
            self._done[block] = 1

    def _create(self, arrays: dict[str, np.ndarray[Any, Any]]) -> None:
        per_part = sum(array[0].nbytes for array in arrays.values())
        fitting = min(self.count, self._max_bytes // max(per_part, 1))
        blocks = -(-self.count // self._block) if fitting == self.count else fitting // self._block
        index: dict[str, Any] = {
            "count": self.count,
            "block": self._block,
            "capacity": min(self.count, blocks * self._block),
            "blocks": blocks,
            "arrays": {name: {"shape": list(a.shape[1:]), "dtype": str(a.dtype)} for name, a in arrays.items()},
        }
        if blocks * self._block < self.count:
            log.warning(
                "the feature cache holds %d of %d parts (%.1f MiB each, limit %.0f MiB); the rest is computed anew",
                index["capacity"], self.count, per_part / 2**20, self._max_bytes / 2**20,
            )  # fmt: skip
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            for position, spec in enumerate(index["arrays"].values()):
                size = int(np.prod([index["capacity"], *spec["shape"]])) * np.dtype(spec["dtype"]).itemsize
                with open(self._folder / f"{position}.bin", "wb") as file:
                    file.truncate(size)
            (self._folder / "done.bin").write_bytes(bytes(blocks))
            beside = self._folder / "index.json.part"
            beside.write_text(json.dumps(index))
            beside.replace(self._folder / "index.json")
        self._open(index)

    def _open(self, index: dict[str, Any]) -> None:
        self._block, self._capacity = index["block"], index["capacity"]
        for position, (name, spec) in enumerate(index["arrays"].items()):
            shape, dtype = (self._capacity, *spec["shape"]), np.dtype(spec["dtype"])
            if self._folder is None or 0 in shape:
                self._rows[name] = np.zeros(shape, dtype)
            else:
                self._rows[name] = np.memmap(self._folder / f"{position}.bin", dtype, "r+", shape=shape)
        if self._folder is None or index["blocks"] == 0:
            self._done = np.zeros(index["blocks"], np.uint8)
        else:
            self._done = np.memmap(self._folder / "done.bin", np.uint8, "r+", shape=(index["blocks"],))


def store_key(extractor: str, parts: Sequence[str], precision: str) -> str:
    """Folder name of a store: which extractor, over which parts, at which precision, with which torch."""
    text = "\n".join([extractor, precision, torch.__version__, str(torch.get_num_threads()), *parts])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def make_room(folder: Path, max_bytes: int, keep: set[str]) -> None:
    """Delete the least recently used stores under `folder` until at most `max_bytes` are taken; never one in `keep`."""
    if not folder.is_dir():
        return
    stores = []
    for store in folder.iterdir():
        if store.is_dir():
            files = [file.stat() for file in store.iterdir()]
            stores.append((max((f.st_mtime for f in files), default=0.0), sum(f.st_blocks * 512 for f in files), store))
    taken = sum(size for _, size, _ in stores)
    for _, size, store in sorted(stores, key=lambda item: item[0]):
        if taken <= max_bytes:
            return
        if store.name not in keep:
            shutil.rmtree(store, ignore_errors=True)
            taken -= size
