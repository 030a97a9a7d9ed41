"""The order in which people should look at parts: the worst mistakes first.

Every part with a known label has a margin: how far its score lies on the right side of the threshold. Missed defects
come first, false alarms second, each by margin (most wrong first); then all other parts, the closest calls first; then
parts without a label, the highest score first.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..evaluation.results import PartRow, Results

_GROUPS = {"missed": 0, "false alarm": 1}


def reference_score(results: Results) -> float | None:
    """The score that margins are measured from.

    The calibrated threshold; without one, the score that parts good and anomalous parts best (largest difference of
    the two rates, Youden's index), used for nothing but the order; None if one of the two kinds is absent.
    """
    if results.threshold is not None:
        return results.threshold
    good = np.array([part.score for part in results.parts if part.label == 0])
    bad = np.array([part.score for part in results.parts if part.label == 1])
    if not good.size or not bad.size:
        return None
    candidates = np.unique(np.concatenate([good, bad]))
    caught = (bad[None] >= candidates[:, None]).mean(1)
    alarms = (good[None] >= candidates[:, None]).mean(1)
    return float(candidates[np.argmax(caught - alarms)])


def margin(part: PartRow, reference: float | None) -> float:
    """How far the score lies on the right side of `reference`; negative for a mistake. Unknown labels: minus the score.

    With no reference (None), the order among parts of one label is kept: anomalous parts by rising, good parts by
    falling score.
    """
    if part.label is None:
        return -part.score
    distance = part.score - (reference or 0.0)
    return distance if part.label == 1 else -distance


def ranked(results: Results) -> list[PartRow]:
    """All parts, the worst mistakes first (see the module header); equal margins in the order of their indices."""
    reference = reference_score(results)

    def place(part: PartRow) -> tuple[int, float, int]:
        group = 3 if part.label is None else _GROUPS.get(part.outcome, 2)
        return group, margin(part, reference), part.index

    return sorted(results.parts, key=place)


def selected(parts: Sequence[PartRow], most: int) -> list[PartRow]:
    """At most `most` of the ranked parts, in their order: not all places go to one kind of mistake.

    Missed defects take up to half of the places and false alarms up to a quarter as long as others wait for the rest;
    places that stay empty are filled in ranked order.
    """
    limits = {"missed": max(1, most // 2), "false alarm": max(1, most // 4)}
    taken: dict[str, int] = {}
    first: list[PartRow] = []
    waiting: list[PartRow] = []
    for part in parts:
        kind = part.outcome if part.outcome in limits else "other"
        taken[kind] = taken.get(kind, 0) + 1
        (first if taken[kind] <= limits.get(kind, most) else waiting).append(part)
    chosen = {part.index for part in [*first, *waiting][: max(most, 0)]}
    return [part for part in parts if part.index in chosen]
