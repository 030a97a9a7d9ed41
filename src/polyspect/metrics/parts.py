"""Scored test parts, reduced to what the metrics need: per part the scores of its ok pixels and of its defect pixels.

A defect pixel carries the weight 1 / |component|, the component being the 8-connected piece of ground truth it lies in,
so that the weights of a part add up to its number of components and PRO is a weighted share of pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import DataError, ShapeError
from ..samples import Array
from .ranking import as_floats, as_labels

EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=bool)


@dataclass(frozen=True, eq=False)
class PartPixels:
    """The counted pixels of one part.

    Attributes:
        ok: Scores (n,) where the mask is False; float32 or float64.
        defect: Scores (m,) where the mask is True.
        weight: 1 / size of the component of each defect pixel (m,), float64.
        components: Ground-truth components with at least one counted pixel.
    """

    ok: Array
    defect: Array
    weight: Array
    components: int


@dataclass(frozen=True, eq=False)
class ScoredParts:
    """What one detector said of N test parts, with the truth.

    Attributes:
        scores: Image scores (N,), float64.
        labels: (N,) bool, True where anomalous.
        pixels: One `PartPixels` per part; None if there are no maps.
        ids: One id per part; empty if unknown.
        defects: Defect type per part; empty if unknown.
    """

    scores: Array
    labels: Array
    pixels: tuple[PartPixels, ...] | None = None
    ids: tuple[str, ...] = ()
    defects: tuple[str, ...] = ()

    def __len__(self) -> int:
        return int(self.scores.size)

    @classmethod
    def collect(
        cls,
        scores: Any,
        labels: Any,
        maps: Any = None,
        masks: Any = None,
        *,
        ignore: Any = None,
        ids: Sequence[str] | None = None,
        defects: Sequence[str] | None = None,
    ) -> ScoredParts:
        """Check and reduce the results of a test set. Good parts keep a view of their map where nothing is ignored.

        Args:
            scores: Image scores (N,).
            labels: (N,), 0 good, 1 anomalous.
            maps: Anomaly maps (N, H, W), or N arrays (H, W) of any sizes; None for image metrics only.
            masks: Ground truth like `maps`, bool or integer, non-zero on a defect.
            ignore: Pixels to leave out, like `masks`; single entries may be None.
            ids: Part ids (N,), used in messages and for pairing.
            defects: Defect types (N,).

        Raises:
            ShapeError: numbers or sizes do not fit each other.
            DataError: NaN in a score or in a counted pixel, a bad label, or a good part whose mask is not empty.
        """
        scores, labels = np.array(scores, dtype=np.float64), as_labels(labels).copy()  # a caller may reuse its buffers
        if scores.ndim != 1 or scores.shape != labels.shape:
            raise ShapeError(f"`scores` {scores.shape} and `labels` {labels.shape} must both be (N,)")
        for name, values in (("maps", maps), ("masks", masks), ("ids", ids), ("defects", defects)):
            if values is not None and len(values) != scores.size:
                raise ShapeError(f"there are {len(values)} `{name}` but {scores.size} scores")
        if (maps is None) != (masks is None):
            raise ShapeError("`maps` and `masks` go together: give both, or neither for image metrics only")
        names = tuple(str(i) for i in ids) if ids is not None else ()
        _check_scores(scores, names)
        pixels = None
        if maps is not None:
            pixels = tuple(collect_pixels(maps, masks, ignore, names))
            for index in np.flatnonzero(~labels):
                if pixels[index].components:
                    raise DataError(f"{_part(int(index), names)} is labelled good (0) but its mask has defect pixels")
        return cls(scores, labels, pixels, names, tuple(str(d) for d in defects) if defects is not None else ())

    def select(self, keep: Array) -> ScoredParts:
        """The parts where `keep` (N,) bool is True."""
        rows = np.flatnonzero(keep)
        pixels = None if self.pixels is None else tuple(self.pixels[i] for i in rows)
        ids, defects = (tuple(names[i] for i in rows) if names else () for names in (self.ids, self.defects))
        return ScoredParts(self.scores[rows], self.labels[rows], pixels, ids, defects)


def collect_pixels(maps: Any, masks: Any, ignore: Any = None, ids: Sequence[str] = ()) -> Iterator[PartPixels]:
    """Reduce maps and masks (as in `ScoredParts.collect`) part by part.

    Components are found before ignored pixels are taken out: a hole in the sensor's view does not cut a defect in two.
    The size of a component counts its kept pixels; one without any is not counted.

    Raises:
        ShapeError: numbers or sizes differ; names the part.
        DataError: NaN in a counted pixel, or a mask of floats.
    """
    for name, values in (("masks", masks), ("ignore", ignore)):
        if values is not None and len(values) != len(maps):
            raise ShapeError(f"there are {len(maps)} `maps` but {len(values)} `{name}`")
    for index in range(len(maps)):
        hidden = None if ignore is None else ignore[index]
        yield _reduce(as_floats(maps[index]), masks[index], hidden, _part(index, ids))


def _reduce(image: Array, mask: Any, ignore: Any, part: str) -> PartPixels:
    truth = _as_mask(mask, image, part, "mask")
    keep = None if ignore is None else ~_as_mask(ignore, image, part, "ignore mask")
    if truth.any():
        ok = image[~truth if keep is None else keep & ~truth]
        defect = image[truth if keep is None else keep & truth]
        weight, components = _component_weights(truth, keep)
    else:
        ok = image.ravel() if keep is None else image[keep]
        defect, weight, components = image[:0, 0], np.empty(0), 0
    for pixels in (ok, defect):
        if pixels.size and np.isnan(pixels.min()):
            raise DataError(
                f"the map of {part} has {int(np.isnan(pixels).sum())} NaN: repair the detector, or leave those pixels "
                f"out with `ignore`"
            )
    return PartPixels(ok, defect, weight, components)


def _component_weights(truth: Array, keep: Array | None) -> tuple[Array, int]:
    """1 / component size for the kept defect pixels in row order, and the number of components that keep a pixel."""
    from scipy import ndimage

    rows, columns = np.flatnonzero(truth.any(axis=1)), np.flatnonzero(truth.any(axis=0))
    box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]  # labelling the box alone is several times faster
    labels, _ = ndimage.label(truth[box], structure=EIGHT_NEIGHBOURS)
    own = labels[truth[box] if keep is None else truth[box] & keep[box]]
    sizes = np.bincount(own)
    return 1.0 / sizes[own], int(np.count_nonzero(sizes))


def _as_mask(mask: Any, image: Array, part: str, name: str) -> Array:
    array = np.asarray(mask)
    if image.ndim != 2 or array.shape != image.shape:
        raise ShapeError(f"{part}: the map has shape {image.shape} and the {name} {array.shape}; both must be (H, W)")
    if array.dtype == bool:
        return array
    if not np.issubdtype(array.dtype, np.integer):
        raise DataError(f"{part}: the {name} is {array.dtype}, expected bool or integers; threshold it first")
    return array != 0


def _check_scores(scores: Array, ids: Sequence[str]) -> None:
    wrong = np.flatnonzero(np.isnan(scores))
    if wrong.size:
        raise DataError(f"the image score of {_part(int(wrong[0]), ids)} is NaN ({wrong.size} of {scores.size} are)")


def _part(index: int, ids: Sequence[str]) -> str:
    return f"part '{ids[index]}'" if ids else f"part {index}"
