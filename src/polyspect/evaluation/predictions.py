"""Verdicts on new parts: one table and one map per part."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..data.frame import restore
from ..model import PartResult
from .results import write_atomically

COLUMNS = ("id", "score", "p_value", "decision", "map")


def write_predictions(
    results: Iterable[PartResult], out: Path | None, skipped: Sequence[tuple[str, str]] = ()
) -> dict[str, Any]:
    """Collect verdicts and, with `out`, write them with their maps.

    ``OUT/predictions.json`` and ``OUT/predictions.csv`` hold one row per part; ``OUT/maps/ID.tiff`` is the raw anomaly
    map on the part's original pixel grid, float32.

    Returns:
        ``{"parts": [...], "skipped": [...]}``, as in the JSON file.
    """
    rows = []
    for result in results:
        row: dict[str, Any] = {
            "id": result.id,
            "score": result.score,
            "p_value": result.p_value,
            "decision": result.decision,
            "branch_scores": {name: float(branch.max()) for name, branch in result.branch_maps.items()},
            "map": None,
        }
        if out is not None:
            row["map"] = _write_map(result, out)
        rows.append(row)
    report = {"parts": rows, "skipped": [{"id": part, "reason": reason} for part, reason in skipped]}
    if out is not None:
        table = io.StringIO()
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows([["" if row[name] is None else row[name] for name in COLUMNS] for row in rows])
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / "predictions.csv", table.getvalue().encode())
        write_atomically(out / "predictions.json", json.dumps(report, indent=1, ensure_ascii=False).encode() + b"\n")
    return report


def _write_map(result: PartResult, out: Path) -> str:
    import tifffile

    safe = [re.sub(r"[^\w.\-]+", "_", piece) for piece in result.id.split("/") if piece not in ("", ".", "..")]
    name = "/".join(["maps", *safe]) + ".tiff"
    path = out / name
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    tifffile.imwrite(content, restore(result.map, result.sample.meta["frame"]).astype("float32"))
    write_atomically(path, content.getvalue())
    return name
