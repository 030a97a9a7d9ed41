"""The report: one HTML page that explains a results folder and needs nothing but itself.

Pictures are inside the page, plotly's script comes from the installed package, and the page's content policy forbids
the browser to fetch anything. There is no date and no random name in it: the same folder gives the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..evaluation.results import BRANCH, PartRow, Results, part_path, read_part, read_results, write_atomically
from ..samples import Array
from . import figures, sections
from .names import count, number
from .pictures import RAMP, Scale, columns_of, depth_span, map_scales, part_pictures
from .ranking import ranked, selected
from .view3d import view_data

_POLICY = (
    "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "worker-src blob:; base-uri 'none'; form-action 'none'"
)
_TITLES = {
    "decision": "Decision",
    "metrics": "Metrics",
    "curves": "Curves",
    "view": "3D view",
    "parts": "Pictures",
    "all": "All parts",
    "skipped": "Skipped",
    "provenance": "Provenance",
}
Shown = list[tuple[PartRow, dict[str, Array]]]


def write_report(folder: str | Path, out: str | Path | None = None, max_parts: int = 24) -> Path:
    """Write the report of a results folder as one self-contained HTML page and return its path.

    Args:
        folder: A results folder (`polyspect.evaluation.results`); nothing else is read.
        out: The page's file; ``report.html`` in the folder by default.
        max_parts: At most so many parts are shown in pictures and in 3D; the table lists all of them.

    Raises:
        DataError: the folder is missing, incomplete or damaged, holds no parts, or `max_parts` is negative.
    """
    folder = Path(folder)
    if max_parts < 0:
        raise DataError(f"`max_parts` must be at least 0, got {max_parts}")
    results = read_results(folder)
    if not results.parts:
        raise DataError(f"'{folder}' holds results of no parts: there is nothing to report")
    path = Path(out) if out is not None else folder / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, page(folder, results, max_parts).encode())
    return path


def page(folder: Path, results: Results, max_parts: int) -> str:
    """The whole page as text."""
    order = ranked(results)
    shown = load_shown(folder, selected(order, max_parts))
    names = columns_of(arrays for _, arrays in shown)
    maps = [name for name in names if name == "map" or name.startswith(BRANCH)]
    scales = map_scales(folder, results, maps) if shown else {}
    view = view_data(shown, scales["map"]) if shown else []
    viewable = {entry["index"] for entry in view}
    body = "".join(
        [
            sections.decision_section(results),
            sections.metric_sections(results),
            _curves(results),
            _view_section(view, scales),
            _gallery(results, shown, names, scales, viewable),
            sections.parts_table(order, {part.index for part, _ in shown}),
            sections.skipped_section(results),
            sections.provenance_section(results),
        ]
    )
    head = sections.heading(results) + sections.cards(results) + _contents(body)
    title = f"{results.model.get('detector', 'detector')} on {results.data.get('category', 'parts')}"
    return _document(title, f"{head}<main>{body}</main>", _scripts(view))


def load_shown(folder: Path, parts: Sequence[PartRow]) -> Shown:
    """The arrays of the parts to be shown; none at all if the evaluation kept no arrays.

    Raises:
        DataError: some parts have their arrays and others lack them, or a file is damaged.
    """
    if not any(part_path(folder, part.index).is_file() for part in parts):
        return []
    return [(part, read_part(folder, part.index)) for part in parts]


def _document(title: str, body: str, scripts: str) -> str:
    assets = resources.files(__package__) / "assets"
    style = (assets / "report.css").read_text(encoding="utf-8") + sections.ramp_style()
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{sections.text(title)}: inspection report</title>\n<style>{style}</style>\n"
        "<script>document.documentElement.classList.add('scripted')</script></head>\n"
        f"<body>{body}\n{scripts}</body></html>\n"
    )


def _contents(body: str) -> str:
    links = [f'<a href="#{name}">{title}</a>' for name, title in _TITLES.items() if f'<section id="{name}">' in body]
    return f'<nav aria-label="On this page">{"".join(links)}</nav>'


def _curves(results: Results) -> str:
    drawn = [sections.figure(figures.score_histogram(results), "Histogram of the image scores")]
    roc, pro = figures.roc_curve(results), figures.pro_curve(results)
    if roc is not None:
        words = f"ROC curve over parts, area {number(results.metrics.get('i_auroc'))}"
        drawn.append(sections.figure(roc, words))
    if pro is not None:
        words = f"PRO curve over pixels, exact AUPRO up to 0.3: {number(results.metrics.get('aupro@0.3'))}"
        drawn.append(sections.figure(pro, words))
    return sections.section("curves", "Scores and curves", f'<div class="figures">{"".join(drawn)}</div>')


def _gallery(
    results: Results, shown: Shown, names: Sequence[str], scales: Mapping[str, Scale], viewable: set[int]
) -> str:
    if not shown:
        return sections.section("parts", "Pictures", "<p>This folder holds no maps to show.</p>")
    span = depth_span(arrays for _, arrays in shown)
    articles = [
        sections.part_article(
            part, part_pictures(part, arrays, scales, span, names), results.threshold, part.index in viewable
        )
        for part, arrays in shown
    ]
    words = (
        f"{count(len(shown), 'part')} of {len(results.parts)}, the worst mistakes first: missed defects, then false "
    )
    words += "alarms, then the closest calls."
    if "depth" in names:
        quantity = "Height" if any("height" in arrays for _, arrays in shown) else "Depth"
        words += f" {quantity}: white to black is {1000 * span:.3g} mm on every part, centred on its median."
    body = f"<p>{words}</p>{sections.legend(scales)}{''.join(articles)}"
    return sections.section("parts", "Pictures, worst mistakes first", body)


def _view_section(view: Sequence[Mapping[str, Any]], scales: Mapping[str, Scale]) -> str:
    if not view:
        return ""
    missed = [entry for entry in view if entry["outcome"] == "missed"]
    first = missed[0] if missed else max(view, key=lambda entry: entry["score"])
    options = "".join(
        f'<option value="{place}"{" selected" if entry is first else ""}>'
        f"{sections.text(entry['id'])} ({sections.text(entry['outcome'])})</option>"
        for place, entry in enumerate(view)
    )
    template = (resources.files(__package__) / "assets" / "view.html").read_text(encoding="utf-8")
    bar = sections.legend({"map": scales["map"]}).split("<p", 1)[0]
    return sections.section("view", "In 3D", template.replace("<!--options-->", options).replace("<!--legend-->", bar))


def _scripts(view: Sequence[Mapping[str, Any]]) -> str:
    script = (resources.files(__package__) / "assets" / "report.js").read_text(encoding="utf-8")
    if not view:
        return f"<script>{script}</script>"
    from plotly.offline import get_plotlyjs

    data = json.dumps({"ramp": RAMP, "parts": view}, allow_nan=False).replace("<", "\\u003c")
    plotly = get_plotlyjs().replace("</script", "<\\/script")
    return (
        f'<script type="application/json" id="view-data">{data}</script>\n'
        f"<script>{plotly}</script>\n<script>{script}</script>"
    )
