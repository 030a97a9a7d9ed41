"""The prepared parts of one split: what the engine, the model and the evaluation loop over."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING, Literal

from ..errors import ConfigError, DataError, PolyspectError
from ..samples import Sample, is_geometric
from .batches import collate
from .depth_scale import DepthScale
from .preparation import Preparation, only_views, without_cloud
from .prepared_cache import PreparedCache
from .source import Reader, Record, content_hash

if TYPE_CHECKING:
    from ..samples import Batch

log = logging.getLogger("polyspect")

OnError = Literal["raise", "skip"]


class Parts:
    """The parts of one split, read and prepared on demand.

    Args:
        reader: Where the records come from.
        records: The parts, in order.
        preparation: How each is prepared.
        modalities: What the detector will ask for; parts that cannot supply it are errors here, at the edge.
        scale: How the depth of this category is standardised; None until it has been fitted.
        cache: Keeps prepared parts on disk.
        on_error: ``"raise"``, or ``"skip"``: leave a bad part out and list it in `skipped`.
        broken: Parts that the reader left out already, id -> reason: the start of `skipped`.
        choices: Sets of modalities that a part may be judged by, the best first; a part comes with the first that it
            can supply, and without its other views. None: `modalities`, and every view is kept.
    """

    def __init__(
        self,
        reader: Reader,
        records: Sequence[Record],
        preparation: Preparation,
        *,
        modalities: Sequence[str] = (),
        scale: DepthScale | None = None,
        cache: PreparedCache | None = None,
        on_error: OnError = "raise",
        broken: Mapping[str, str] | None = None,
        choices: Sequence[tuple[str, ...]] | None = None,
    ) -> None:
        if on_error not in ("raise", "skip"):
            raise ConfigError(f"on_error is '{on_error}', expected 'raise' or 'skip'")
        self.reader = reader
        self.records = list(records)
        self.preparation = preparation
        self.modalities = tuple(modalities)
        self.choices = [self.modalities] if choices is None else [tuple(names) for names in choices]
        self.scale = scale
        self.cache = cache or PreparedCache(None)
        self.on_error = on_error
        self.skipped = list((broken or {}).items())  # (id, reason)
        self._keys: list[str] | None = None

    def __len__(self) -> int:
        return len(self.records)

    def check(self, look: Callable[[Sample], None] | None = None, advance: Callable[..., None] | None = None) -> Parts:
        """Read and prepare every part once; `look` sees each good one. Bad ones raise, or are left out and listed.

        Raises:
            DataError: a part is bad and ``on_error == "raise"``, or no part is left.
        """
        kept = []
        for record in self.records:
            try:
                sample = self._prepare(record)
            except PolyspectError as error:
                if self.on_error == "raise":
                    raise
                log.warning("skipped %s: %s", record.id, error)
                self.skipped.append((record.id, str(error)))
            else:
                kept.append(record)
                if look is not None:
                    look(sample)
            if advance is not None:
                advance(1)
        if self.records and not kept:
            raise DataError(
                f"none of the {len(self.records)} parts can be used; "
                f"the first: {self.skipped[0][0]}: {self.skipped[0][1]}"
            )
        self.records, self._keys = kept, None
        return self

    def sample(self, index: int) -> Sample:
        """The prepared part at `index`."""
        return self._prepare(self.records[index])

    def samples(self) -> Iterator[Sample]:
        """All prepared parts, in order."""
        return (self.sample(index) for index in range(len(self)))

    def batch(self, indices: Sequence[int]) -> Batch:
        """The prepared parts at `indices`, stacked; all must come with the same modalities."""
        samples = [self.sample(index) for index in indices]
        return collate(samples, self.preparation, self.scale, self.used(samples[0]) or None)

    def used(self, sample: Sample) -> tuple[str, ...]:
        """The first of `choices` that a prepared part can supply.

        Raises:
            DataError: it can supply none.
        """
        return usable(sample, self.choices)

    def keys(self) -> list[str]:
        """One key per part: changes with the content of its files, the preparation and the depth scale."""
        if self._keys is None:
            settings = json.dumps(
                [asdict(self.preparation), self.scale.to_dict() if self.scale else None], sort_keys=True, default=str
            )
            self._keys = [
                hashlib.sha256(f"{content_hash(record)}{settings}".encode()).hexdigest() for record in self.records
            ]
        return self._keys

    def fingerprint(self) -> str:
        """sha256 over the content of all parts, whatever their order or names."""
        return fingerprint(self.records)

    def _prepare(self, record: Record) -> Sample:
        sample = self.cache.get(self.reader, record, self._preparation(record))
        if self.choices == [()]:  # data check: no method asks for anything
            return sample
        try:
            used = self.used(sample)
        except NoPointsError as error:
            raise DataError(
                f"part '{record.id}' ({_name_file(record)}) {error}; check the sensor and the file, or leave the part "
                f"out with --on-error skip"
            ) from None
        except DataError as error:
            raise DataError(f"part '{record.id}' {error}: supply the file, or choose other modalities") from None
        return sample if used == self.modalities else only_views(sample, used)

    def _preparation(self, record: Record) -> Preparation:
        """How this part is prepared: as all are, or as `without_cloud` says where it may come and does without 3D."""
        if any(is_geometric(role) for role in record.files):
            return self.preparation
        flat = any(not any(is_geometric(name) for name in names) for names in self.choices)
        return without_cloud(self.preparation) if flat and self.modalities else self.preparation


class NoPointsError(DataError):
    """A part with 3D views in which nothing was measured."""


def usable(sample: Sample, choices: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """The first set of modalities that a prepared part can supply; 3D views without a measured point do not count.

    Raises:
        NoPointsError: it could supply one if the sensor had measured something.
        DataError: it can supply none; says what the smallest set lacks.
    """
    there = {name for name in sample.images if sample.valid.any() or not is_geometric(name)}
    for names in choices:
        if set(names) <= there:
            return names
    least = min(choices, key=len)
    if set(least) <= set(sample.images):
        raise NoPointsError("has no valid 3D point: all are zero, NaN or marked invalid")
    missing = next(name for name in least if name not in there)
    raise DataError(f"has no '{missing}' (it has {', '.join(sample.images) or 'nothing'})")


def fingerprint(records: Iterable[Record]) -> str:
    """sha256 over the content of parts, whatever their order or names."""
    return hashlib.sha256("\n".join(sorted(content_hash(record) for record in records)).encode()).hexdigest()


def prefetched(parts: Parts, batch_size: int) -> Iterator[tuple[range, list[Sample], Batch]]:
    """Batches in order, the next one read in the background while the caller works on this one.

    Parts of one batch come with the same modalities; where they differ a group is split.
    """
    groups = [range(first, min(first + batch_size, len(parts))) for first in range(0, len(parts), batch_size)]

    def load(group: range) -> list[tuple[range, list[Sample], Batch]]:
        samples = [parts.sample(index) for index in group]
        used = [parts.used(sample) for sample in samples]
        ready = []
        for names, members in groupby(range(len(samples)), key=used.__getitem__):  # neighbours with the same modalities
            places = list(members)
            alike = [samples[place] for place in places]
            batch = collate(alike, parts.preparation, parts.scale, names or None)
            ready.append((range(group[places[0]], group[places[-1]] + 1), alike, batch))
        return ready

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(load, groups[0]) if groups else None
        for following in [*groups[1:], None]:
            if waiting is None:
                return
            ready = waiting.result()
            waiting = pool.submit(load, following) if following is not None else None
            yield from ready


def _name_file(record: Record) -> str:
    for role in ("xyz", "depth", "normals"):
        if role in record.files:
            return str(record.files[role])
    return ", ".join(str(path) for path in record.input_files())
