"""Evaluate a model on labelled parts: metrics with intervals, per defect type, per modality, and a results folder.

Every pixel metric sees the detector's own raw map on the grid of the prepared input. The ground truth is resized to
that grid (nearest), as the papers do; the results say so.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data.parts import Parts
from ..data.source import file_hash
from ..errors import DataError
from ..fitting.memory import peak_rss_mib
from ..fitting.progress import Progress
from ..metrics import StreamingMetrics, bootstrap, roc_curve
from ..metrics.pro import exact_curve, pool
from ..model import Model, PartResult
from ..samples import Array
from .results import PartRow, Results, clear_results, write_part, write_results

INTERVALS = ("i_auroc", "i_ap", "p_auroc", "aupro@0.3", "aupro@0.05")
BRANCH_METRICS = ("i_auroc", "i_ap", "p_auroc", "p_ap", "aupro@0.3", "aupro_sampled@0.3")


def evaluate(
    model: Model,
    parts: Parts,
    about: Mapping[str, Any],
    *,
    out: Path | None = None,
    path: Path | None = None,
    resamples: int = 200,
    ignore_invalid: bool = False,
    progress: Progress | None = None,
) -> Results:
    """Judge all parts and compute every metric.

    Args:
        model: A fitted model.
        parts: Labelled parts.
        about: What the results say of the data: reader, category, split, synthetic.
        out: Results folder to write; None writes nothing.
        path: The model's file, for its name and hash in the results.
        resamples: Bootstrap resamples; 0 for no intervals.
        ignore_invalid: Leave pixels that the 3D sensor did not measure out of the pixel metrics; the papers count them.
        progress: Where progress is shown.

    Raises:
        DataError: a part cannot be read, has no label, or a part's score is not finite.
    """
    unlabelled = [record.id for record in parts.records if record.label is None]
    if unlabelled:
        raise DataError(f"part '{unlabelled[0]}' has no label: only labelled parts can be evaluated; use `predict`")
    progress = progress or Progress()
    started = time.perf_counter()
    if out is not None:
        clear_results(out)
    with progress:
        with progress.task("prepare", len(parts)) as advance:
            parts.check(advance=advance)
        prepared_s = time.perf_counter() - started
        with progress.task("predict", len(parts)) as advance:
            rows, fused, branches = _judge(model, parts, out, ignore_invalid, advance)
        with progress.task("metrics", 2 + len(branches)) as advance:
            metrics = fused.compute()
            advance(1)
            intervals = bootstrap(fused.parts, INTERVALS, resamples=resamples) if resamples else {}
            advance(1, note="")
            branch_metrics = {}
            for name, streaming in branches.items():
                values = streaming.compute()
                branch_metrics[name] = {metric: values[metric] for metric in BRANCH_METRICS}
                advance(1)
    calibration = model.calibration_for(parts.choices[0] or model.modalities)
    results = Results(
        model=_about_model(model, path, parts.choices[0] or model.modalities),
        data={**about, **_counts(rows), "fingerprint": parts.fingerprint()},
        parts=rows,
        metrics=metrics,
        intervals={name: list(ends) for name, ends in intervals.items() if ends is not None},
        per_defect=_per_defect(fused, rows),
        branches=branch_metrics,
        calibration=calibration.to_dict() if calibration else None,
        decisions=_decisions(rows),
        timing=_timing(model, len(rows), prepared_s, time.perf_counter() - started),
        skipped=[{"id": part, "reason": reason} for part, reason in parts.skipped],
        curves=_curves(fused),
        grid=_grid(model, ignore_invalid),
    ).check()
    if out is not None:
        write_results(out, results)
    return results


def _judge(
    model: Model, parts: Parts, out: Path | None, ignore_invalid: bool, advance: Any
) -> tuple[list[PartRow], StreamingMetrics, dict[str, StreamingMetrics]]:
    """Predict all parts: their rows, the metrics' input of the fused map, and of each branch."""
    rows: list[PartRow] = []
    fused, branches = StreamingMetrics(), dict[str, StreamingMetrics]()
    for index, result in enumerate(model.predict(parts)):
        row = _row(index, result)
        rows.append(row)
        ignore = ~result.sample.valid if ignore_invalid else None
        _update(fused, row, row.score, result.map, result, ignore)
        for name, branch in result.branch_maps.items():
            own = branches.setdefault(name, StreamingMetrics())
            _update(own, row, row.branch_scores[name], branch, result, ignore)
        if out is not None:
            write_part(out, index, _arrays(result, model.preparation.depth))
        advance(1)
    return rows, fused, branches


def _grid(model: Model, ignore_invalid: bool) -> str:
    side = model.preparation.size
    left_out = "; pixels without 3D data left out" if ignore_invalid else ""
    return f"prepared, {side} x {side} pixels; ground truth resized to it (nearest){left_out}"


def _row(index: int, result: PartResult) -> PartRow:
    decision: Any = result.decision
    return PartRow(
        index=index,
        id=result.id,
        score=result.score,
        label=result.sample.label,
        defect=result.sample.defect,
        p_value=result.p_value,
        decision=decision,
        branch_scores={name: float(branch.max()) for name, branch in result.branch_maps.items()},
    )


def _update(
    metrics: StreamingMetrics, row: PartRow, score: float, image: Array, result: PartResult, ignore: Array | None
) -> None:
    """Add one part; a part without ground-truth mask counts as free of defect pixels only if it is good."""
    mask = result.sample.mask
    if mask is None and row.label == 1:
        raise DataError(
            f"part '{row.id}' is anomalous and has no ground-truth mask: pixel metrics need one; "
            f"supply it, or use `polyspect predict` for scores alone"
        )
    truth = np.zeros(image.shape, bool) if mask is None else mask
    metrics.update(
        [score],
        [row.label],
        [image],
        [truth],
        defects=[row.defect or "unknown"],
        ids=[row.id],
        ignore=None if ignore is None else [ignore],
    )


def _arrays(result: PartResult, depth: str) -> dict[str, Array]:
    """What the results folder keeps of a part; `depth` says what the prepared depth is: ``z`` or ``height``."""
    sample = result.sample
    arrays: dict[str, Array] = {"map": result.map, "valid": sample.valid}
    arrays |= {f"branch.{name}": branch for name, branch in result.branch_maps.items()}
    arrays |= {name: sample.images[name] for name in ("rgb", "normals", "xyz") if name in sample.images}
    if "depth" in sample.images:
        arrays["height" if depth == "height" else "depth"] = sample.images["depth"]
    if sample.foreground is not None:
        arrays["foreground"] = sample.foreground
    if sample.mask is not None:
        arrays["mask"] = sample.mask
    return arrays


def _about_model(model: Model, path: Path | None, used: Sequence[str]) -> dict[str, Any]:
    header = model.header()
    return {
        "path": path.name if path else None,
        "sha256": file_hash(path) if path else None,
        "detector": model.name,
        "config": header["config"],
        "modalities": list(used),
        "preparation": header["preparation"],
        "seed": model.info.get("seed"),
        "weights": model.info.get("weights"),
        "versions": model.info.get("versions"),
        "trained_on": model.info.get("data"),
    }


def _counts(rows: Iterable[PartRow]) -> dict[str, int]:
    labels = [row.label for row in rows]
    return {"n_good": labels.count(0), "n_anomalous": labels.count(1)}


def _decisions(rows: Iterable[PartRow]) -> dict[str, int]:
    """How the decisions fell, by truth; empty for an uncalibrated model."""
    counts: dict[str, int] = {}
    for row in rows:
        if row.decision is not None:
            for truth, label in (("good", 0), ("anomalous", 1)):
                for word in ("accepted", "rejected"):
                    hit = row.label == label and row.decision == word[:6]
                    counts[f"{truth}_{word}"] = counts.get(f"{truth}_{word}", 0) + hit
    return counts


def _per_defect(fused: StreamingMetrics, rows: list[PartRow]) -> dict[str, dict[str, Any]]:
    kinds = [row.defect or "unknown" for row in rows if row.label == 1]
    if not kinds or all(row.label == 1 for row in rows):
        return {}
    return {kind: {"n": kinds.count(kind), "metrics": values} for kind, values in fused.compute_per_defect().items()}


def _curves(fused: StreamingMetrics) -> dict[str, dict[str, list[float]]]:
    """ROC over images and PRO over pixels, as points to draw."""
    parts = fused.parts
    if parts.labels.all() or not parts.labels.any():
        return {}
    fpr, tpr, _ = roc_curve(parts.scores, parts.labels)
    curves = {"roc": {"fpr": [float(v) for v in fpr], "tpr": [float(v) for v in tpr]}}
    if parts.pixels is not None:
        ranks = pool(parts.pixels)
        if ranks is None:
            return curves
        x, y = exact_curve(ranks, points=501)
        curves["pro"] = {"fpr": [float(v) for v in x], "pro": [float(v) for v in y]}
    return curves


def _timing(model: Model, count: int, prepared_s: float, total_s: float) -> dict[str, float | None]:
    predict_s = model.seconds.get("predict", 0.0)
    return {
        "total_s": total_s,
        "prepare_s": prepared_s,
        "read_s": model.seconds.get("read"),
        "predict_s": predict_s,
        "images_per_s": count / predict_s if predict_s else None,
        "peak_rss_mib": peak_rss_mib(),
    }
