"""All metrics of a test set under their fixed names, from one sort; at once or streamed batch by batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..errors import DataError, ShapeError
from ..samples import Array
from .parts import PartPixels, ScoredParts
from .pro import LIMITS, SAMPLED_THRESHOLDS, area_below, check_limits, pool, sampled_curve
from .ranking import rank

IMAGE_METRICS = ("i_auroc", "i_ap", "f1_max")
PIXEL_METRICS = ("p_auroc", "p_ap", "p_f1_max")


def metric_names(limits: Iterable[float] = LIMITS) -> tuple[str, ...]:
    """The names of all metrics in table order: ``i_auroc, i_ap, f1_max, p_auroc, p_ap, p_f1_max, aupro@0.3, ...``."""
    limits = check_limits(limits)
    pro = [f"{evaluator}@{limit:g}" for evaluator in ("aupro", "aupro_sampled") for limit in limits]
    return (*IMAGE_METRICS, *PIXEL_METRICS, *pro)


def evaluate_maps(
    scores: Any,
    labels: Any,
    maps: Any = None,
    masks: Any = None,
    limits: Iterable[float] = LIMITS,
    *,
    ignore: Any = None,
    thresholds: int = SAMPLED_THRESHOLDS,
) -> dict[str, float | None]:
    """Every metric of a test set, by name; None where the parts do not define it.

    Args:
        scores: Image scores (N,); larger is more anomalous.
        labels: (N,), 0 good, 1 anomalous.
        maps: Anomaly maps (N, H, W), or N arrays (H, W) of any sizes; None for image metrics only.
        masks: Ground truth like `maps`, bool or integer, non-zero on a defect.
        limits: False-positive-rate limits of both AUPRO evaluators.
        ignore: Pixels to leave out of all pixel metrics, like `masks`; single entries may be None.
        thresholds: Of the sampled evaluator.

    Raises:
        ShapeError, DataError: the arrays do not fit or hold NaN, see `ScoredParts.collect`.
        ConfigError: a limit is not in (0, 1], or fewer than two thresholds.
    """
    return evaluate_parts(ScoredParts.collect(scores, labels, maps, masks, ignore=ignore), limits, thresholds)


def evaluate_parts(
    parts: ScoredParts, limits: Iterable[float] = LIMITS, thresholds: int = SAMPLED_THRESHOLDS
) -> dict[str, float | None]:
    """`evaluate_maps` for parts that were collected before."""
    limits = check_limits(limits)
    values: dict[str, float | None] = dict.fromkeys(metric_names(limits))
    good, bad = parts.scores[~parts.labels], parts.scores[parts.labels]
    if good.size and bad.size:
        image = rank(bad, good)
        values.update(i_auroc=image.auroc(), i_ap=image.average_precision(), f1_max=image.f1_max()[0])
    pixel = None if parts.pixels is None else pool(parts.pixels)
    if pixel is not None:
        values.update(p_auroc=pixel.auroc(), p_ap=pixel.average_precision(), p_f1_max=pixel.f1_max()[0])
        fpr, pro = sampled_curve(pixel, thresholds)
        for limit in limits:
            values[f"aupro@{limit:g}"] = pixel.area(limit) / limit
            values[f"aupro_sampled@{limit:g}"] = area_below(fpr, pro, limit) / limit
    return values


class StreamingMetrics:
    """Collects results batch by batch. Holds one float32 copy of each map's counted pixels and nothing else.

    Memory is 4 bytes per pixel seen; `compute` needs as much again for a moment.
    """

    def __init__(self, limits: Iterable[float] = LIMITS, thresholds: int = SAMPLED_THRESHOLDS) -> None:
        self.limits = check_limits(limits)
        self.thresholds = thresholds
        self._batches: list[ScoredParts] = []
        self._seen: set[str] = set()

    def __len__(self) -> int:
        return sum(len(batch) for batch in self._batches)

    def update(
        self,
        scores: Any,
        labels: Any,
        maps: Any = None,
        masks: Any = None,
        defects: Sequence[str] | None = None,
        ids: Sequence[str] | None = None,
        ignore: Any = None,
    ) -> None:
        """Add the parts of a batch; arguments as in `ScoredParts.collect`.

        Raises:
            ShapeError: arrays do not fit, or this batch brings more or less (maps, ids, defects) than those before.
            DataError: NaN, a bad label, or an id that was seen before.
        """
        batch = ScoredParts.collect(scores, labels, maps, masks, ignore=ignore, ids=ids, defects=defects)
        if len(batch) == 0:
            return
        if self._batches:
            _check_alike(self._batches[0], batch)
        names = set(batch.ids)
        twice = names & self._seen or {name for name in names if batch.ids.count(name) > 1}
        if twice:
            raise DataError(f"part '{min(twice)}' was added twice: every test part counts once")
        self._seen |= names
        if batch.pixels is not None:
            batch = replace(batch, pixels=tuple(_own(part) for part in batch.pixels))
        self._batches.append(batch)

    @property
    def parts(self) -> ScoredParts:
        """All parts so far, in the order they came (input of `bootstrap` and `paired_difference`).

        Raises:
            DataError: there is none.
        """
        if not self._batches:
            raise DataError("no part was added: call update() before computing metrics")
        batches = self._batches
        pixels = [batch.pixels for batch in batches if batch.pixels is not None]
        return ScoredParts(
            np.concatenate([batch.scores for batch in batches]),
            np.concatenate([batch.labels for batch in batches]),
            tuple(part for group in pixels for part in group) if pixels else None,
            tuple(name for batch in batches for name in batch.ids),
            tuple(name for batch in batches for name in batch.defects),
        )

    def compute(self) -> dict[str, float | None]:
        """All metrics over all parts, as `evaluate_maps` gives them."""
        return evaluate_parts(self.parts, self.limits, self.thresholds)

    def compute_per_defect(self) -> dict[str, dict[str, float | None]]:
        """Defect type -> all metrics over the good parts and the anomalous parts of that type, types in sorted order.

        Raises:
            DataError: defect types were not given to `update`.
        """
        parts = self.parts
        if not parts.defects:
            raise DataError("metrics per defect type need `defects`: pass each part's defect type to update()")
        types = np.array(parts.defects)
        return {
            str(kind): evaluate_parts(parts.select(~parts.labels | (types == kind)), self.limits, self.thresholds)
            for kind in np.unique(types[parts.labels])
        }


def _own(part: PartPixels) -> PartPixels:
    """A float32 copy that keeps none of the caller's arrays alive."""
    return replace(part, ok=_copy(part.ok), defect=_copy(part.defect))


def _copy(values: Array) -> Array:
    return np.array(values, dtype=np.float32)


def _check_alike(first: ScoredParts, batch: ScoredParts) -> None:
    for name in ("pixels", "ids", "defects"):
        before, now = bool(getattr(first, name)), bool(getattr(batch, name))
        if before != now:
            what = "maps and masks" if name == "pixels" else name
            raise ShapeError(
                f"this batch comes {'with' if now else 'without'} {what}, those before came "
                f"{'with' if before else 'without'}: give {what} for every batch or for none"
            )
