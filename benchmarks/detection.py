"""What the detectors detect: a grid of detectors x modalities x categories, fitted, evaluated and put into one table.

    python benchmarks/detection.py --root DATA --categories tabletop_boxes --detectors patchcore crd:fast \\
        --modalities rgb normals rgb,normals --out out/detection

A detector is NAME or NAME:PRESET, with settings behind an @ if there are any: 'm3dm:fast@banks=[xyz],uff=false'
(commas inside brackets do not separate). Without --modalities every detector uses its own. Runs that are already in
--out are read, not repeated, so a broken grid goes on. The table is Markdown, with 95 % bootstrap intervals; times are
wall seconds of fitting (features from a warm cache if there is one) and of predicting per part, on this machine. With
several categories a second table has their means.
"""

from __future__ import annotations

import argparse
import re
import time
from pathlib import Path
from typing import Any

import yaml

import polyspect as ps
from polyspect.errors import PolyspectError
from polyspect.evaluation.results import Results, read_results
from polyspect.fitting.progress import TerminalProgress

OWN = "own"  # the modalities that the detector's settings imply


def run_one(a: argparse.Namespace, detector: str, modalities: str, category: str) -> tuple[Results, float]:
    """Fit and evaluate one cell of the grid, or read it if it is there."""
    method, _, chosen = detector.partition("@")
    name, _, preset = method.partition(":")
    settings = {key: yaml.safe_load(value) for key, _, value in (item.partition("=") for item in _items(chosen))}
    if modalities != OWN:
        settings["modalities"] = modalities.split(",")
    label = re.sub(r"[^\w.=+-]+", "-", f"{category}-{detector}-{modalities.replace(',', '+')}")
    folder = Path(a.out) / label
    if (folder / "results.json").is_file():
        return read_results(folder), float((folder / "fit_seconds.txt").read_text())
    model_file = folder / "model.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    ps.fit(
        name,
        preset=preset or None,
        data=a.data,
        root=a.root,
        category=category,
        out=model_file,
        settings=settings,
        preparation=a.preparation,
        cache=a.cache,
        resume=Path(f"{model_file}.checkpoint").is_file(),
        progress=TerminalProgress(),
    )
    seconds = time.perf_counter() - started
    (folder / "fit_seconds.txt").write_text(f"{seconds:.1f}")
    where: dict[str, Any] = {"data": a.data, "root": a.root, "category": category, "cache": a.cache}
    return ps.evaluate(model_file, out=folder, bootstrap=a.bootstrap, progress=TerminalProgress(), **where), seconds


def _items(text: str) -> list[str]:
    """``"a=1,b=[x,y]"`` -> ``["a=1", "b=[x,y]"]``."""
    return re.findall(r"[^,\[]+(?:\[[^\]]*\])?", text)


def cell(results: Results, metric: str) -> str:
    """A metric with its interval."""
    value, ends = results.metrics[metric], results.intervals.get(metric)
    text = "–" if value is None else f"{value:.3f}"
    return text if ends is None else f"{text} ({ends[0]:.3f}–{ends[1]:.3f})"


def means(categories: list[str], found: dict[tuple[str, str], list[Results]]) -> str:
    """One row per detector and set of modalities: its two metrics in every category, and their means."""
    lines = ["| detector | modalities | " + " | ".join([*categories, "mean"]) + " |"]
    lines.append("| --- " * (len(categories) + 3) + "|")
    for (detector, modalities), rows in found.items():
        values = [(float(r.metrics["i_auroc"] or "nan"), float(r.metrics["aupro@0.3"] or "nan")) for r in rows]
        values.append((sum(v for v, _ in values) / len(rows), sum(v for _, v in values) / len(rows)))
        cells = [f"{score:.3f} / {area:.3f}" for score, area in values]
        lines.append("| " + " | ".join([detector, modalities, *cells]) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run the grid and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="mvtec3d")
    parser.add_argument("--root", required=True)
    parser.add_argument("--categories", nargs="+", required=True)
    parser.add_argument("--detectors", nargs="+", required=True, metavar="NAME[:PRESET][@SETTINGS]")
    parser.add_argument("--modalities", nargs="+", default=[OWN], help="comma-separated sets, e.g. rgb rgb,depth")
    parser.add_argument("--preparation", help="named preparation (default: the one that goes with the preset)")
    parser.add_argument("--out", default="out/detection")
    parser.add_argument("--cache", default="out/cache")
    parser.add_argument("--bootstrap", type=int, default=1000)
    a = parser.parse_args()
    found: dict[tuple[str, str], list[Results]] = {}
    lines = ["| category | detector | modalities | I-AUROC | AUPRO@0.3, exact | fit s | predict ms/part |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for category in a.categories:
        for detector in a.detectors:
            for modalities in a.modalities:
                results, seconds = run_one(a, detector, modalities, category)
                found.setdefault((detector, modalities), []).append(results)
                rate = results.timing["images_per_s"] or float("nan")
                lines.append(
                    f"| {category} | {detector} | {modalities} | {cell(results, 'i_auroc')} | "
                    f"{cell(results, 'aupro@0.3')} | {seconds:.0f} | {1000 / rate:.0f} |"
                )
                print(lines[-1], flush=True)
    print("\n" + "\n".join(lines))
    if len(a.categories) > 1:
        print("\nI-AUROC / AUPRO@0.3\n\n" + means(a.categories, found))


if __name__ == "__main__":
    try:
        main()
    except PolyspectError as error:
        raise SystemExit(f"error: {error}") from None
