"""The figures of the report as SVG text: score histogram, ROC and PRO curve.

Drawn with matplotlib's object interface, so no window system, no current figure and no setting outside the call is
touched. The same results give the same bytes.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np

from ..evaluation.results import Results
from .names import number, percent, short

INK, MUTED, RULE = "#1d2430", "#5b6472", "#d8dce3"
GOOD, BAD, UNKNOWN = "#4f7fb5", "#d9662b", "#8a8f98"
PRO_LIMIT = 0.3
_SETTINGS = {
    "svg.hashsalt": "polyspect",
    "svg.fonttype": "none",
    "font.family": ["DejaVu Sans"],
    "font.size": 8.5,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "text.color": INK,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "legend.frameon": False,
    "legend.fontsize": 8,
}


def draw(paint: Callable[[Any], None]) -> str:
    """The SVG text of one small figure whose axes `paint` fills."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(4.1, 3.0), layout="constrained")
        paint(figure.add_subplot())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace("'DejaVu Sans'", "system-ui, 'Segoe UI', 'DejaVu Sans'")


def score_histogram(results: Results) -> str:
    """How the image scores of good, anomalous and unlabelled parts are spread, with the threshold."""
    groups = [
        ("good", GOOD, [part.score for part in results.parts if part.label == 0]),
        ("anomalous", BAD, [part.score for part in results.parts if part.label == 1]),
        ("no label", UNKNOWN, [part.score for part in results.parts if part.label is None]),
    ]
    scores = np.array([part.score for part in results.parts])
    marks = scores if results.threshold is None else np.append(scores, results.threshold)
    low, high = float(marks.min()), float(marks.max())
    room = 0.03 * (high - low) or 0.5
    edges = np.linspace(low - room, high + room, 1 + int(np.clip(2 * np.sqrt(scores.size), 12, 40)))

    def paint(axes: Any) -> None:
        for name, tint, values in groups:
            if values:
                label = f"{name} ({len(values)})"
                axes.hist(values, edges, color=tint, alpha=0.55, label=label, edgecolor="white", linewidth=0.5)
                if scores.size <= 150:
                    axes.plot(values, np.zeros(len(values)), "|", color=tint, markersize=9, clip_on=False, zorder=4)
        if results.threshold is not None:
            label = f"threshold {short(results.threshold)}"
            axes.axvline(results.threshold, color=INK, linewidth=1.2, linestyle=(0, (4, 2)), label=label)
        axes.set(title="Scores", xlabel="image score (higher is more anomalous)", ylabel="parts", xlim=edges[[0, -1]])
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.margins(y=0.12)
        axes.figure.legend(loc="outside lower left", ncols=3, handlelength=1.4, columnspacing=1.2)

    return draw(paint)


def roc_curve(results: Results) -> str | None:
    """Caught anomalous parts over rejected good parts; None if the results hold no such curve."""
    curve = results.curves.get("roc")
    if not curve or not len(curve["fpr"]):
        return None

    def paint(axes: Any) -> None:
        axes.plot([0, 1], [0, 1], color=RULE, linewidth=1)
        axes.plot(curve["fpr"], curve["tpr"], color=BAD, linewidth=1.8, clip_on=False)
        point = operating_point(results)
        if point is not None:
            label = f"at the threshold: {percent(point[1])} caught,\n{percent(point[0])} of good parts rejected"
            axes.plot(*point, "o", color=INK, markersize=6, label=label, clip_on=False, zorder=5)
            axes.legend(loc="lower right")
        axes.set(title=f"ROC over parts, I-AUROC {number(results.metrics.get('i_auroc'))}")
        axes.set(xlabel="good parts rejected", ylabel="anomalous parts caught", xlim=(0, 1), ylim=(0, 1.02))

    return draw(paint)


def pro_curve(results: Results) -> str | None:
    """Overlap with the true regions over the pixels' false-positive rate, shaded up to 0.3; None if absent."""
    curve = results.curves.get("pro")
    if not curve or not len(curve["fpr"]):
        return None
    fpr, pro = np.asarray(curve["fpr"], float), np.asarray(curve["pro"], float)

    def paint(axes: Any) -> None:
        inside = fpr < PRO_LIMIT
        x = np.append(fpr[inside], min(PRO_LIMIT, fpr[-1]))
        y = np.append(pro[inside], np.interp(x[-1], fpr, pro))
        label = f"area up to {PRO_LIMIT:g}, divided by {PRO_LIMIT:g}:\n{number(results.metrics.get('aupro@0.3'))}"
        axes.fill_between(x, y, color=BAD, alpha=0.16, linewidth=0, label=label)
        axes.axvline(PRO_LIMIT, color=MUTED, linewidth=1, linestyle=(0, (2, 2)))
        axes.plot(fpr, pro, color=BAD, linewidth=1.8, clip_on=False)
        axes.set(title="PRO over pixels, AUPRO exact", xlabel="false-positive rate of good pixels")
        axes.set(ylabel="mean overlap per region", xlim=(0, max(fpr[-1], PRO_LIMIT)), ylim=(0, 1.02))
        axes.legend(loc="lower right")

    return draw(paint)


def operating_point(results: Results) -> tuple[float, float] | None:
    """False- and true-positive rate of the decisions; None unless both kinds of part were decided on."""
    counts = [
        results.decisions.get(name, 0)
        for name in ("good_rejected", "good_accepted", "anomalous_rejected", "anomalous_accepted")
    ]
    good, bad = counts[0] + counts[1], counts[2] + counts[3]
    return (counts[0] / good, counts[2] / bad) if good and bad else None
