"""The pieces of the HTML page. Every text that comes from data goes through `text`; nothing else is ever pasted in."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterable, Mapping, Sequence

from ..evaluation.results import BRANCH, PartRow, Results
from .names import (
    GROUP_TITLES,
    GROUPS,
    MISSING,
    count,
    defined,
    interval,
    metric,
    number,
    ordered,
    percent,
    short,
)
from .pictures import RAMP, Picture, Scale

OUTCOMES: dict[str, tuple[str, str]] = {  # outcome -> (class of its chip, what people read)
    "missed": ("bad", "missed"),
    "false alarm": ("warn", "false alarm"),
    "caught": ("good", "caught"),
    "passed": ("good", "passed"),
    "rejected": ("warn", "rejected"),
    "accepted": ("good", "accepted"),
    "scored": ("plain", "scored only"),
}


def text(value: object) -> str:
    """Any value as text that is safe inside an element or a quoted attribute."""
    return html.escape(str(value), quote=True)


def chip(outcome: str) -> str:
    """An outcome as a small coloured label."""
    kind, words = OUTCOMES[outcome]
    return f'<span class="chip {kind}">{text(words)}</span>'


def heading(results: Results) -> str:
    """The page's head: which detector on which data, how many parts, and whether the data is synthetic."""
    data, model = results.data, results.model
    detector, category = model.get("detector", "detector"), data.get("category", "parts")
    kinds = {label: sum(part.label == label for part in results.parts) for label in (0, 1, None)}
    types = len({part.defect for part in results.parts if part.label == 1})
    said = [count(len(results.parts), "part")]
    if kinds[0] or kinds[1]:
        of = f" of {count(types, 'defect type')}" if kinds[1] else ""
        said[0] += f": {kinds[0]} good, {kinds[1]} anomalous{of}"
    if kinds[None]:
        said[0] += f"{',' if kinds[0] or kinds[1] else ':'} {kinds[None]} without a label"
    said += [f"split {data['split']}"] if data.get("split") else []
    said += [f"reader {data['reader']}"] if data.get("reader") else []
    said += ["sees " + ", ".join(map(str, model["modalities"]))] if model.get("modalities") else []
    said += [f"{len(results.skipped)} skipped"] if results.skipped else []
    badge = '<p class="badge">Synthetic data: generated parts, not photographs</p>' if results.synthetic else ""
    return (
        f'<header><p class="kicker">polyspect inspection report</p>{badge}'
        f"<h1>{text(detector)} <span>on</span> {text(category)}</h1>"
        f'<p class="lead">{" · ".join(text(item) for item in said)}</p></header>'
    )


def cards(results: Results) -> str:
    """The key numbers, with their intervals."""
    made = []
    for key, name in (("i_auroc", "I-AUROC"), ("p_auroc", "P-AUROC"), ("aupro@0.3", "AUPRO exact, to 0.3")):
        if results.metrics.get(key) is not None:
            bounds = results.intervals.get(key)
            note = f"95 % in {interval(bounds)}" if bounds else "no interval"
            made.append((name, number(results.metrics[key]), note, ""))
    decided, labels = results.decisions, {part.label for part in results.parts}
    if decided and 1 in labels:
        missed, bad = decided.get("anomalous_accepted", 0), decided.get("anomalous_rejected", 0)
        note = f"of {count(missed + bad, 'anomalous part')}"
        made.append(("Defects missed", str(missed), note, "bad" if missed else "good"))
    if decided and 0 in labels:
        rejected, good = decided.get("good_rejected", 0), decided.get("good_accepted", 0)
        note = f"of {count(rejected + good, 'good part')}" + _wished(results, ", wished ")
        made.append(("Good parts rejected", str(rejected), note, "warn" if rejected else "good"))
    speed = results.timing.get("images_per_s")
    if speed is not None:
        total = results.timing.get("total_s")
        made.append(("Parts per second", f"{speed:.3g}", "" if total is None else f"{total:.3g} s in all", ""))
    body = "".join(
        f'<div class="card {kind}"><dt>{text(name)}</dt><dd>{text(value)}</dd><dd class="note">{text(note)}</dd></div>'
        for name, value, note, kind in made
    )
    return f'<dl class="cards">{body}</dl>' if body else ""


def decision_section(results: Results) -> str:
    """Threshold, wished false-reject rate, the calibration's own statement, and the counts of right and wrong."""
    if results.calibration is None:
        return section(
            "decision",
            "Decision",
            "<p>This model carries no calibration, so no part was accepted or rejected. "
            "Calibrate it on good parts to get a threshold with a stated false-reject rate.</p>",
        )
    calibration = results.calibration
    threshold = short(results.threshold) if results.threshold is not None else "none: nothing is ever rejected"
    facts = [("Threshold", threshold)]
    if calibration.get("false_reject") is not None:
        facts.append(("Wished false-reject rate", percent(float(calibration["false_reject"]))))
    if calibration.get("n") is not None:
        facts.append(("Good parts calibrated on", str(calibration["n"])))
    listed = "".join(f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in facts)
    body = f'<dl class="facts">{listed}</dl>'
    if calibration.get("supported") is False:
        body += '<p class="alert">There are too few calibration parts to support the wished rate.</p>'
    if calibration.get("statement"):
        body += f'<p class="statement">{text(calibration["statement"])}</p>'
    return section("decision", "Decision", f'<div class="pair"><div>{body}</div>{_confusion(results)}</div>')


def metric_sections(results: Results) -> str:
    """The tables of metrics: overall, AUPRO by its two evaluators, by defect type, by branch."""
    if not defined(results.metrics):
        return section(
            "metrics",
            "Metrics",
            "<p>No metric is defined here: they need parts that are known to be good and parts that are known to be "
            "anomalous.</p>",
        )
    plain = [item for item in ordered(results.metrics) if item.group in ("image", "pixel", "other")]
    rows = "".join(
        f'<tr><th scope="row">{text(item.full)}</th><td>{number(results.metrics[item.key])}</td>'
        f"<td>{interval(results.intervals.get(item.key))}</td></tr>"
        for item in plain
    )
    head = '<tr><th scope="col">Metric</th><th scope="col">Value</th><th scope="col">95 % interval</th></tr>'
    body = f'<div class="pair"><div>{table(head, rows)}</div><div>{_aupro_table(results)}</div></div>'
    if results.grid:
        body += f'<p class="note">Pixel metrics: {text(results.grid)}.</p>'
    made = section("metrics", "Metrics", body)
    if results.per_defect:
        listed = [(name, entry.get("n"), entry.get("metrics", {})) for name, entry in results.per_defect.items()]
        note = '<p class="note">Parts of one type against all good parts.</p>'
        made += section("defects", "By defect type", _grouped_table("Defect type", listed) + note)
    if results.branches:
        listed = [("all together", None, results.metrics)]
        listed += [(name, None, metrics) for name, metrics in results.branches.items()]
        words = "Each modality or memory bank alone, by the maximum of its own map, to see which one saw the defects."
        note = f'<p class="note">{words}</p>'
        made += section("branches", "By modality", _grouped_table("Branch", listed) + note)
    return made


def figure(svg: str, alternative: str) -> str:
    """An SVG figure as a picture with a text alternative."""
    code = base64.b64encode(svg.encode()).decode("ascii")
    return f'<img class="figure" src="data:image/svg+xml;base64,{code}" alt="{text(alternative)}">'


def legend(scales: Mapping[str, Scale]) -> str:
    """One colour bar per map: the values of its palest and darkest colour, and where the good parts end."""
    made = []
    for name, scale in scales.items():
        place = 100 * (scale.typical - scale.low) / (scale.high - scale.low)
        title = "All together" if name == "map" else name.removeprefix(BRANCH)
        made.append(
            f'<div class="bar"><b>{text(title)}</b> <small>mark at {scale.typical:.3g}</small>'
            f'<div class="ramp"><i style="left:{place:.1f}%"></i></div>'
            f'<div class="ends"><span>{scale.low:.3g}</span><span>{scale.high:.3g} and above</span></div></div>'
        )
    whose = "good parts" if next(iter(scales.values())).from_good else "parts (none is known to be good)"
    return (
        f'<div class="legend">{"".join(made)}</div><p class="note">Every map has one fixed colour scale for all '
        f"parts. It is palest at the median pixel of the {whose}; 99.9 % of their pixels lie below the mark. "
        "Grey stripes: the 3D sensor measured nothing there.</p>"
    )


def part_article(part: PartRow, pictures: Sequence[Picture], threshold: float | None, has_view: bool) -> str:
    """One part of the gallery: its name and verdict, and a row of pictures."""
    said = [f"score {short(part.score)}"]
    if threshold:
        said.append(
            f"{part.score / threshold:.2f} of the threshold" if threshold > 0 else f"threshold {short(threshold)}"
        )
    said += [f"p\u00a0=\u00a0{part.p_value:.3g}"] if part.p_value is not None else []
    kind = "no label" if part.label is None else "good part" if part.label == 0 else part.defect or "anomalous"
    cells = []
    for picture in pictures:
        note = f" <small>{text(picture.note)}</small>" if picture.note else ""
        if picture.uri is None:
            inner = f'<div class="none">{text(picture.note)}</div>'
            note = ""
        else:
            alternative = f"{picture.title} of {part.id}"
            inner = f'<img src="{picture.uri}" alt="{text(alternative)}" loading="lazy">'
        cells.append(f"<figure>{inner}<figcaption>{text(picture.title)}{note}</figcaption></figure>")
    link = f'<a class="to3d" href="#view" data-part="{part.index}">turn it in 3D</a>' if has_view else ""
    return (
        f'<article class="part" id="part-{part.index}"><h3>{chip(part.outcome)} '
        f'<span class="id">{text(part.id)}</span></h3>'
        f'<p class="said"><b>{text(kind)}</b> · {" · ".join(text(item) for item in said)} {link}</p>'
        f'<div class="row" style="--n:{min(len(cells), 8)}">{"".join(cells)}</div></article>'
    )


def parts_table(ranked: Sequence[PartRow], shown: set[int]) -> str:
    """All parts in one table, the worst mistakes first; the page's script makes it sortable and adds the filters."""
    branches = sorted({name for part in ranked for name in part.branch_scores})
    titles = ["#", "Part", "Outcome", "Type", "Truth", "Score", "p-value", *branches]
    head = "".join(f'<th scope="col">{text(title)}</th>' for title in titles)
    rows = []
    for rank, part in enumerate(ranked, start=1):
        name = f'<a href="#part-{part.index}">{text(part.id)}</a>' if part.index in shown else text(part.id)
        truth = {0: "good", 1: "anomalous", None: MISSING}[part.label]
        cells = [
            _cell(rank, "{}"),
            f'<td class="name" data-v="{text(part.id)}">{name}</td>',
            f'<td class="word" data-v="{text(part.outcome)}">{chip(part.outcome)}</td>',
            f'<td class="word">{text(part.defect or MISSING)}</td>',
            f'<td class="word">{truth}</td>',
            _cell(part.score),
            _cell(part.p_value, "{:.4f}"),
            *(_cell(part.branch_scores.get(branch)) for branch in branches),
        ]
        attributes = f'data-outcome="{text(part.outcome)}" data-type="{text(part.defect or "")}"'
        rows.append(f"<tr {attributes}>{''.join(cells)}</tr>")
    controls = (
        '<div class="controls js"><label>Find <input type="search" id="find" placeholder="part of a name"></label>'
        f"<label>Outcome {_select('outcome', sorted({part.outcome for part in ranked}))}</label>"
        f"<label>Type {_select('type', sorted({part.defect for part in ranked if part.defect}))}</label>"
        '<output id="count" aria-live="polite"></output></div>'
    )
    body = table(f"<tr>{head}</tr>", "".join(rows), "parts-table")
    return section("all", "All parts", controls + body)


def skipped_section(results: Results) -> str:
    """The parts that were left out, each with its reason; empty if there are none."""
    if not results.skipped:
        return ""
    rows = "".join(
        f'<tr><th scope="row">{text(entry.get("id", MISSING))}</th>'
        f'<td class="word">{text(entry.get("reason", MISSING))}</td></tr>'
        for entry in results.skipped
    )
    head = '<tr><th scope="col">Part</th><th scope="col">Reason</th></tr>'
    words = f'<p class="alert">{count(len(results.skipped), "part")} could not be read and count nowhere above.</p>'
    return section("skipped", "Skipped parts", words + table(head, rows))


def provenance_section(results: Results) -> str:
    """What was run on what: everything needed to get the same numbers again."""
    groups = [("Model", results.model), ("Data", results.data), ("Timing", results.timing)]
    made = ""
    for title, values in groups:
        rows = "".join(
            f'<tr><th scope="row">{text(key)}</th><td class="word"><code>{text(_value(value))}</code></td></tr>'
            for key, value in values.items()
        )
        made += f"<h3>{title}</h3>{table('', rows)}" if rows else ""
    made += f'<p class="note">Evaluated by polyspect {text(results.polyspect)}; '
    made += "this page was made from the files of the results folder alone.</p>"
    return section("provenance", "Where this comes from", f"<details><summary>Show all</summary>{made}</details>")


def section(name: str, title: str, body: str) -> str:
    """A part of the page that can be linked to."""
    return f'<section id="{name}"><h2>{text(title)}</h2>{body}</section>\n'


def table(head: str, rows: str, name: str = "") -> str:
    """A table that scrolls by itself where the screen is too narrow."""
    label = f' id="{name}"' if name else ""
    above = f"<thead>{head}</thead>" if head else ""
    return f'<div class="scroll" tabindex="0"><table{label}>{above}<tbody>{rows}</tbody></table></div>'


def ramp_style() -> str:
    """The colour ramp as a style rule for the bars."""
    return f".ramp{{background:linear-gradient(90deg,{','.join(RAMP)})}}"


def _wished(results: Results, before: str) -> str:
    rate = (results.calibration or {}).get("false_reject")
    return "" if rate is None else f"{before}{percent(float(rate))}"


def _confusion(results: Results) -> str:
    counts = results.decisions
    if not counts:
        return ""
    head = '<tr><td></td><th scope="col">accepted</th><th scope="col">rejected</th></tr>'
    rows = ""
    for label, kind, wrong in ((0, "good", "rejected"), (1, "anomalous", "accepted")):
        if not any(part.label == label for part in results.parts):
            continue
        cells = ""
        for decision in ("accepted", "rejected"):
            many = counts.get(f"{kind}_{decision}", 0)
            words = {"good_rejected": "good parts rejected", "anomalous_accepted": "defects missed"}
            note = words.get(f"{kind}_{decision}", "right")
            mark = ' class="wrong"' if decision == wrong and many else ""
            cells += f"<td{mark}><b>{many}</b><small>{note}</small></td>"
        rows += f'<tr><th scope="row">{kind} parts</th>{cells}</tr>'
    return f'<table class="confusion"><thead>{head}</thead><tbody>{rows}</tbody></table>' if rows else ""


def _aupro_table(results: Results) -> str:
    there = [item for item in ordered(results.metrics) if item.group in ("exact", "sampled")]
    limits = list(dict.fromkeys(item.title for item in there))
    kinds = [kind for kind in (("aupro", "exact"), ("aupro_sampled", "sampled")) if kind[1] in {i.group for i in there}]
    rows = ""
    for limit in limits:
        cells = ""
        for name, _ in kinds:
            key = f"{name}@{limit}"
            cells += f"<td>{number(results.metrics.get(key))}</td><td>{interval(results.intervals.get(key))}</td>"
        rows += f'<tr><th scope="row">to {text(limit)}</th>{cells}</tr>'
    above = "".join(f'<th colspan="2" scope="colgroup">{GROUP_TITLES[group]}</th>' for _, group in kinds)
    below = '<th scope="col">Value</th><th scope="col">95 % interval</th>' * len(kinds)
    note = (
        '<p class="note">Exact: over all distinct thresholds. Sampled: about 100 thresholds at equidistant ranks, as '
        "several papers do it. The two must not be compared with each other.</p>"
    )
    head = f'<tr><th rowspan="2" scope="col">FPR</th>{above}</tr><tr>{below}</tr>'
    return table(head, rows) + note if rows else ""


def _grouped_table(title: str, listed: Iterable[tuple[str, int | None, Mapping[str, float | None]]]) -> str:
    entries = list(listed)
    columns = ordered(key for _, _, metrics in entries for key in metrics)
    columns = [item for item in columns if any(metrics.get(item.key) is not None for _, _, metrics in entries)]
    counted = any(n is not None for _, n, _ in entries)
    groups = [(group, [item for item in columns if item.group == group]) for group in GROUPS]
    above = "".join(
        f'<th scope="colgroup" colspan="{len(items)}">{GROUP_TITLES[group]}</th>' for group, items in groups if items
    )
    start = f'<th scope="col" rowspan="2">{text(title)}</th>' + (
        '<th scope="col" rowspan="2">Parts</th>' if counted else ""
    )
    below = "".join(f'<th scope="col">{_column_title(item.key)}</th>' for item in columns)
    rows = ""
    for name, n, metrics in entries:
        many = f"<td>{MISSING if n is None else n}</td>" if counted else ""
        cells = "".join(f"<td>{number(metrics.get(item.key))}</td>" for item in columns)
        rows += f'<tr><th scope="row">{text(name)}</th>{many}{cells}</tr>'
    return table(f"<tr>{start}{above}</tr><tr>{below}</tr>", rows)


def _column_title(key: str) -> str:
    item = metric(key)
    return f"to {text(item.title)}" if item.group in ("exact", "sampled") else text(item.title)


def _cell(value: float | None, form: str = "{:#.4g}") -> str:
    """A number that sorts by its value, and last if it is not known."""
    shown = MISSING if value is None else form.format(value)
    return f'<td data-v="{"" if value is None else repr(float(value))}">{shown}</td>'


def _select(name: str, values: Iterable[str]) -> str:
    options = "".join(f'<option value="{text(value)}">{text(value)}</option>' for value in values)
    return f'<select id="{name}"><option value="">all</option>{options}</select>'


def _value(value: object) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list | tuple) else str(value)
