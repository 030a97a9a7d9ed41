"""Results as tables for the terminal: one run in full, several runs side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..evaluation.results import Results
from .names import GROUP_TITLES, GROUPS, MISSING, count, defined, interval, number, ordered, percent, short

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

_COMPARED = ("i_auroc", "p_auroc", "aupro@0.3", "aupro_sampled@0.3")


def results_table(results: Results) -> Group:
    """One run for the terminal: metrics with intervals, defect types, branches, and a line on the decisions."""
    from rich.console import Group
    from rich.markup import escape
    from rich.text import Text

    detector, category = results.model.get("detector", "detector"), results.data.get("category", "parts")
    said = f"[bold]{escape(str(detector))}[/] on [bold]{escape(str(category))}[/]: {_parts_line(results)}"
    pieces: list[Table | Text] = [Text.from_markup(said)]
    if results.synthetic:
        pieces.append(Text("synthetic data: generated parts, not photographs", style="yellow"))
    if defined(results.metrics):
        pieces.append(_metric_table(results))
    if results.per_defect:
        rows = {name: (entry.get("n"), entry.get("metrics", {})) for name, entry in results.per_defect.items()}
        pieces.append(_wide_table("defect type", rows))
    if results.branches:
        pieces.append(_wide_table("branch", {name: (None, metrics) for name, metrics in results.branches.items()}))
    pieces.append(Text(decision_line(results)))
    if results.skipped:
        pieces.append(Text(f"{count(len(results.skipped), 'part')} skipped; see 'skipped' in results.json", "yellow"))
    return Group(*pieces)


def compare_table(several: Sequence[Results]) -> Table:
    """Several runs, one row each, and the mean over categories of every detector that has more than one.

    Exact and sampled AUPRO stand in different columns. A mean is given only where every category has the number.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table(caption="AUPRO up to a false-positive rate of 0.3", caption_justify="left")
    for title in ("detector", "category"):
        table.add_column(title, no_wrap=True)
    heads = ("I-AUROC", "P-AUROC", "AUPRO exact", "AUPRO sampled")  # of _COMPARED
    for title in ("good + anomalous", *heads, "false alarms", "missed", "parts/s"):
        table.add_column(title, justify="right")
    by_detector: dict[str, list[Results]] = {}
    for results in several:
        by_detector.setdefault(str(results.model.get("detector", MISSING)), []).append(results)
    for detector, runs in by_detector.items():
        for results in runs:
            category = Text(str(results.data.get("category", MISSING)))
            table.add_row(Text(detector), category, *_compared_cells(results))
        if len({run.data.get("category") for run in runs}) > 1:
            means = [number(_mean([run.metrics.get(key) for run in runs])) for key in _COMPARED]
            table.add_row(Text(detector), Text("mean"), "", *means, "", "", "", style="bold", end_section=True)
    return table


def decision_line(results: Results) -> str:
    """The decisions in one sentence: threshold, wished rate, and what went wrong how often."""
    if results.calibration is None:
        return "not calibrated: no part was accepted or rejected"
    rate = results.calibration.get("false_reject")
    wish = "" if rate is None else f" (wished false-reject rate {percent(float(rate))})"
    threshold = short(results.threshold) if results.threshold is not None else "none, nothing is ever rejected"
    line = f"threshold {threshold}{wish}"
    counts = results.decisions
    good = counts.get("good_rejected", 0) + counts.get("good_accepted", 0)
    bad = counts.get("anomalous_rejected", 0) + counts.get("anomalous_accepted", 0)
    if good:
        line += f"; {counts['good_rejected']} of {count(good, 'good part')} rejected"
    if bad:
        line += f"; {counts['anomalous_accepted']} of {count(bad, 'anomalous part')} missed"
    if not good and not bad:
        rejected = sum(part.decision == "reject" for part in results.parts)
        line += f"; {rejected} of {count(len(results.parts), 'part')} rejected"
    return line


def _parts_line(results: Results) -> str:
    good, bad, unknown = (sum(part.label == label for part in results.parts) for label in (0, 1, None))
    said = [f"{good} good", f"{bad} anomalous"] if good or bad else []
    said += [f"{unknown} without a label"] if unknown else []
    return f"{count(len(results.parts), 'part')} ({', '.join(said)})" if said else "no parts"


def _metric_table(results: Results) -> Table:
    from rich.table import Table

    table = Table("metric", title_justify="left")
    table.add_column("value", justify="right")
    table.add_column("95 % interval", justify="right")
    group = ""
    for item in ordered(results.metrics):
        if group and item.group != group:
            table.add_section()
        group = item.group
        table.add_row(item.full, number(results.metrics[item.key]), interval(results.intervals.get(item.key)))
    return table


def _wide_table(title: str, rows: Mapping[str, tuple[int | None, Mapping[str, float | None]]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title_justify="left")
    table.add_column(title, overflow="fold")
    counted = any(n is not None for n, _ in rows.values())
    if counted:
        table.add_column("parts", justify="right")
    items = [item for item in ordered(key for _, metrics in rows.values() for key in metrics) if item.title in _NARROW]
    for item in items:
        head = item.full if item.group in GROUPS[:2] else f"{GROUP_TITLES[item.group]} {item.title}"
        table.add_column(head, justify="right")
    for name, (n, metrics) in rows.items():
        cells = [number(metrics.get(item.key)) for item in items]
        table.add_row(Text(name), *([MISSING if n is None else str(n)] if counted else []), *cells)
    return table


_NARROW = ("AUROC", "0.3")  # a terminal is narrow: per type and branch only these; all are in results.json and the page


def _compared_cells(results: Results) -> list[str]:
    labels = [part.label for part in results.parts]
    cells = [f"{labels.count(0)} + {labels.count(1)}"]
    cells += [number(results.metrics.get(key)) for key in _COMPARED]
    counts = results.decisions
    cells += [str(counts[key]) if key in counts else MISSING for key in ("good_rejected", "anomalous_accepted")]
    return [*cells, short(results.timing.get("images_per_s"))]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None
