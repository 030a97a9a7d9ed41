"""Verdicts on new parts: one table, and per part its map as numbers and as a picture."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data.frame import restore
from ..evaluation.results import write_atomically
from ..model import PartResult
from ..samples import Array
from .pictures import colour, overlay

COLUMNS = ("id", "score", "p_value", "decision", "used", "map", "picture")


def write_verdicts(
    results: Iterable[PartResult],
    out: Path | None,
    skipped: Sequence[tuple[str, str]] = (),
    threshold: Callable[[Sequence[str]], float | None] | None = None,
) -> dict[str, Any]:
    """Collect verdicts and, with `out`, write them with their maps.

    ``OUT/predictions.json`` and ``OUT/predictions.csv`` hold one row per part; ``OUT/maps/ID.tiff`` is the raw anomaly
    map on the part's original pixel grid, float32. With a `threshold` (of the modalities that a part was judged by)
    ``OUT/maps/ID.png`` shows the map over the prepared part, the middle of the scale being the threshold.

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
            "used": list(result.used),
            "branch_scores": {name: float(branch.max()) for name, branch in result.branch_maps.items()},
            "map": None,
            "picture": None,
        }
        if out is not None:
            row["map"] = _write_map(result, out)
            limit = None if threshold is None else threshold(result.used)
            if limit is not None and limit > 0:
                row["picture"] = _write_picture(result, out, limit)
        rows.append(row)
    report = {"parts": rows, "skipped": [{"id": part, "reason": reason} for part, reason in skipped]}
    if out is not None:
        table = io.StringIO()
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows([[_cell(row[name]) for name in COLUMNS] for row in rows])
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / "predictions.csv", table.getvalue().encode())
        write_atomically(out / "predictions.json", json.dumps(report, indent=1, ensure_ascii=False).encode() + b"\n")
    return report


def _cell(value: Any) -> Any:
    if isinstance(value, list):
        return "+".join(value)
    return "" if value is None else value


def _write_map(result: PartResult, out: Path) -> str:
    import tifffile

    content = io.BytesIO()
    tifffile.imwrite(content, restore(result.map, result.sample.meta["frame"]).astype("float32"))
    return _write(result, out, ".tiff", content)


def _write_picture(result: PartResult, out: Path, threshold: float) -> str:
    from PIL import Image

    heat: Array = np.clip(result.map / (2 * threshold), 0, 1)
    rgb = result.sample.images.get("rgb")
    shown = colour(heat) if rgb is None else overlay(np.rint(rgb * 255).astype(np.uint8), heat)
    content = io.BytesIO()
    Image.fromarray(shown).save(content, "PNG")
    return _write(result, out, ".png", content)


def _write(result: PartResult, out: Path, suffix: str, content: io.BytesIO) -> str:
    """Write under a file name made from the part's id; returns it, relative to `out`."""
    safe = [re.sub(r"[^\w.\-]+", "_", piece) for piece in result.id.split("/") if piece not in ("", ".", "..")]
    name = "/".join(["maps", *safe]) + suffix
    path = out / name
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content.getvalue())
    return name
