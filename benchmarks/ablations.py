"""Run the ablation rows of the distillation papers on synthetic parts and print them beside the papers' figures.

    python benchmarks/ablations.py --root parts --categories bracket gear --tables mmrd-2a mmrd-2e crd-3 crd-4 crd-7
    python benchmarks/ablations.py --list

Every row is one fit with preset `fast` and the row's switches, on each category; a table shows I-AUROC and exact
AUPRO@0.3 per category and their mean. Rows that differ in scoring only (CRD Tables 3 and 7) share the fit of the full
model. Rows that are already in --out are read, not repeated. The papers' figures are I-AUROC and PRO on other data
(MMRD: Eyecandies; CRD: MVTec 3D-AD) with another backbone and at full length: compare the order of rows, not numbers.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

import polyspect as ps
from polyspect.errors import PolyspectError
from polyspect.fitting.progress import TerminalProgress
from polyspect.model import Model


@dataclass(frozen=True)
class Row:
    """One row of a table: what is fitted, and, where rows share a fit, what is changed for scoring."""

    label: str
    paper: str  # I-AUROC / PRO of the paper, in percent
    settings: dict[str, Any] = field(default_factory=dict)
    scoring: dict[str, Any] = field(default_factory=dict)
    detector: str = ""  # the table's, unless named


PAIR = ["rgb", "depth"]
PLAIN = {"prototypes": [0, 0, 0]}
TABLES: dict[str, tuple[str, list[Row]]] = {
    "mmrd-2a": (
        "mmrd",
        [
            Row(
                "baseline (RD, RGB)",
                "84.0 / 88.9",
                {"modalities": ["rgb"], "fusion": "rgb_only", "bn_adapt": "none", **PLAIN},
            ),
            Row("+ MMT", "91.5 / 91.5", PLAIN),
            Row("+ MMT + PG", "92.6 / 92.0", {"interaction": "none"}),
            Row("all", "94.0 / 93.6"),
        ],
    ),
    "mmrd-2b": (
        "mmrd",
        [
            Row("none", "93.2 / 92.8", {"bn_adapt": "none"}),
            Row("auxiliary", "93.4 / 93.0", {"bn_adapt": "aux"}),
            Row("RGB", "93.8 / 93.4", {"bn_adapt": "main"}),
            Row("both", "94.0 / 93.6"),
        ],
    ),
    "mmrd-2e": (
        "mmrd",
        [
            Row("CSA", "91.2 / 92.4", {"fusion": "csa"}),
            Row("SSA", "92.5 / 91.6", {"fusion": "ssa"}),
            Row("alpha = 1", "93.0 / 92.8", {"fusion": "add"}),
            Row("alpha(F^A)", "93.4 / 93.1", {"fusion": "alpha_aux"}),
            Row("alpha(F)", "94.0 / 93.6"),
            Row("SEM", "90.2 / 92.6", {"fusion": "sem"}),
        ],
    ),
    "crd-3": (
        "crd",
        [
            Row("RGB", "86.8 / 95.4", {"modalities": ["rgb"]}),
            Row("RGB + crossmodal", "88.9 / 95.8", scoring={"report": "rgb"}),
            Row("depth", "87.1 / 88.8", {"modalities": ["depth"]}),
            Row("depth + crossmodal", "87.3 / 90.1", scoring={"report": "depth"}),
            Row("RGB + depth", "93.9 / 97.4", {"crossmodal_filter": False, "crossmodal_amplifier": False}),
            Row("RGB + depth + crossmodal", "96.2 / 97.7"),
        ],
    ),
    "crd-4": (
        "crd",
        [
            Row("neither", "93.9 / 97.4", {"crossmodal_filter": False, "crossmodal_amplifier": False}),
            Row("filter", "94.2 / 97.5", {"crossmodal_amplifier": False}),
            Row("amplifier", "95.6 / 97.7", {"crossmodal_filter": False}),
            Row("both", "96.2 / 97.7"),
        ],
    ),
    "crd-7": (
        "crd",
        [
            Row("normalised sum", "96.2 / 97.7"),
            Row("sum", "95.6 / 97.6", scoring={"aggregation": "sum"}),
            Row("product", "94.3 / 97.2", scoring={"aggregation": "product"}),
        ],
    ),
}


def run_row(a: argparse.Namespace, detector: str, row: Row, category: str) -> tuple[float, float]:
    """I-AUROC and AUPRO@0.3 of one row on one category, from --out if they are there."""
    common = {name: yaml.safe_load(value) for name, _, value in (pair.partition("=") for pair in a.set)}
    settings = {"modalities": PAIR, **row.settings, **common}
    name = "-".join([detector, category, *(f"{key}={value}" for key, value in sorted(settings.items()))])
    folder = Path(a.out) / "".join(c if c.isalnum() or c in "-=_" else "" for c in name)
    scored = folder / ("".join(f"{key}-{value}" for key, value in row.scoring.items()) or "as-fitted")
    file = scored.with_suffix(".json")
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        model_file = folder / "model.safetensors"
        where: dict[str, Any] = {"root": a.root, "category": category, "cache": a.cache, "progress": TerminalProgress()}
        if not model_file.is_file():
            resume = Path(f"{model_file}.checkpoint").is_file()
            ps.fit(detector, preset="fast", out=model_file, settings=settings, resume=resume, **where)
        model = Model.load(model_file)
        model.detector.config = replace(model.detector.config, **row.scoring)
        results = ps.evaluate(model, bootstrap=0, **where)
        file.write_text(json.dumps(results.metrics))
    metrics = json.loads(file.read_text())
    return metrics["i_auroc"], metrics["aupro@0.3"]


def print_table(a: argparse.Namespace, name: str) -> None:
    """Run a table and print it as Markdown."""
    detector, rows = TABLES[name]
    print(f"\n{name}\n\n| row | " + " | ".join([*a.categories, "mean", "paper"]) + " |")
    print("| --- " * (len(a.categories) + 3) + "|")
    for row in rows:
        values = [run_row(a, row.detector or detector, row, category) for category in a.categories]
        values.append(tuple(sum(column) / len(values) for column in zip(*values)))  # type: ignore[arg-type]
        cells = [f"{100 * score:.1f} / {100 * area:.1f}" for score, area in values]
        print("| " + " | ".join([row.label, *cells, row.paper]) + " |", flush=True)


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", help="folder that `polyspect data make-synthetic` wrote")
    parser.add_argument("--categories", nargs="+", default=["bracket", "gear"])
    parser.add_argument("--tables", nargs="+", default=list(TABLES), choices=list(TABLES))
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings for all rows")
    parser.add_argument("--out", default="out/ablations")
    parser.add_argument("--cache", default="out/cache")
    parser.add_argument("--list", action="store_true", help="print the rows and stop")
    a = parser.parse_args()
    if a.list or not a.root:
        for name, (detector, rows) in TABLES.items():
            for row in rows:
                print(f"{name:8} {row.label:26} {detector} {row.settings} {row.scoring or ''}")
        return
    for name in a.tables:
        print_table(a, name)


if __name__ == "__main__":
    try:
        main()
    except PolyspectError as error:
        raise SystemExit(f"error: {error}") from None
