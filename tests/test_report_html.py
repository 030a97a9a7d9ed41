"""The HTML report from made-up results: complete, self-contained, reproducible, safe, and fine with what is missing."""

import base64
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from polyspect.errors import DataError
from polyspect.evaluation.results import PartRow, Results, clear_results, write_part, write_results
from polyspect.report.html import write_report

SIZE = 96
DEFECTS = ("bump", "stain", "good", "hole")


def smooth(rng, amount, size=SIZE):
    """Smooth noise (size, size): box-filtered normal numbers of standard deviation `amount`."""
    field = np.cumsum(np.cumsum(np.pad(rng.normal(size=(size + 12, size + 12)), ((1, 0), (1, 0))), 0), 1)
    field = field[12:-1, 12:-1] - field[:-13, 12:-1] - field[12:-1, :-13] + field[:-13, :-13]
    return amount * field / field.std()


def make_part(defect, seed, strength):
    """Arrays of one round part on a table, seen from 0.5 m, with one defect that some of the branches see."""
    rng = np.random.default_rng(seed)
    v, u = np.mgrid[0:SIZE, 0:SIZE] - (SIZE - 1) / 2
    radius = np.hypot(u, v) / (0.42 * SIZE)
    part = radius < 1
    centre = rng.uniform(-0.2, 0.2, 2) * SIZE
    blob = np.exp(-((u - centre[0]) ** 2 + (v - centre[1]) ** 2) / (2 * rng.uniform(3, 7) ** 2))
    height = np.where(part, 0.03 * np.sqrt(np.clip(1 - radius**2, 0, 1)), 0) + smooth(rng, 0.0002)
    height += {"bump": 0.008, "hole": -0.012}.get(defect, 0) * strength * blob
    z = 0.5 - height
    xyz = np.stack([u * z / 400, v * z / 400, z], axis=2)
    valid = (rng.random((SIZE, SIZE)) > 0.01) & ~((v > 0) & (np.abs(radius - 1) < 0.05))
    shade = 0.75 + 0.2 * (1 - radius.clip(0, 1)) + smooth(rng, 0.015)
    rgb = shade[..., None] * np.where(part[..., None], [0.85, 0.62, 0.38], [0.32, 0.36, 0.4])
    rgb *= 1 - (0.55 if defect in ("stain", "hole") else 0) * min(strength, 1) * blob[..., None]
    seen = {"rgb": {"stain": 2.2, "hole": 1.2, "bump": 0.4}, "xyz": {"bump": 2.4, "hole": 2.0, "stain": 0.1}}
    branches = {
        name: np.where(part, 1 + smooth(rng, 0.16), 0.5) + see.get(defect, 0) * strength * blob
        for name, see in seen.items()
    }
    return {
        "map": (branches["rgb"] + branches["xyz"]) / 2,
        **{f"branch.{name}": values for name, values in branches.items()},
        "rgb": rgb.clip(0, 1),
        "depth": np.where(valid, z, 0),
        "xyz": np.where(valid[..., None], xyz, 0),
        "valid": valid,
        "foreground": part,
        "mask": (blob > 0.4) & part & (defect != "good"),
    }


def make_folder(folder, n=12, drop=(), labelled=True, calibrated=True, only=None, **changes):
    """A results folder of `n` parts; `drop` names arrays that are left out."""
    clear_results(folder)
    rows = []
    for index in range(n):
        defect = only or DEFECTS[index % 4]
        arrays = make_part(defect, index, strength=(0.12, 0.7, 1.0, 1.4)[index * 7 % 4])
        scores = {
            name: float(arrays[name][arrays["foreground"]].max()) for name in arrays if name.startswith("branch.")
        }
        write_part(folder, index, {name: array for name, array in arrays.items() if name not in drop})
        score = float(arrays["map"].max())
        label = int(defect != "good") if labelled else None
        row = PartRow(index=index, id=f"biscuit/test/{defect}/{index:03d}", score=score, label=label)
        row = replace(row, branch_scores={name.removeprefix("branch."): value for name, value in scores.items()})
        if calibrated:
            row = replace(row, p_value=1 / (1 + index), decision="reject" if score > 1.5 else "accept")
        rows.append(replace(row, defect=defect if labelled else None))
    write_results(folder, make_results(rows, calibrated, **changes))
    return folder


def make_results(rows, calibrated=True, **changes):
    both = {row.label for row in rows} >= {0, 1}
    keys = ["i_auroc", "i_ap", "f1_max", "p_auroc", "p_ap", "aupro@0.3", "aupro@0.01", "aupro_sampled@0.3"]
    metrics = {key: 0.98 - 0.05 * place if both else None for place, key in enumerate(keys)}
    fpr = np.linspace(0, 1, 51)
    values = {
        "model": {"path": "biscuit.safetensors", "detector": "patchcore", "modalities": ["rgb", "xyz"], "seed": 0},
        "data": {"reader": "mvtec3d", "category": "biscuit", "split": "test", "synthetic": True},
        "parts": rows,
        "metrics": metrics,
        "intervals": {key: (value - 0.02, value + 0.01) for key, value in metrics.items() if both},
        "per_defect": {kind: {"n": 3, "metrics": metrics} for kind in ("bump", "hole", "stain") if both},
        "branches": {name: metrics for name in ("rgb", "xyz") if both},
        "timing": {"total_s": 3.5, "images_per_s": 4.2},
        "curves": {"roc": {"fpr": fpr, "tpr": fpr**0.2}, "pro": {"fpr": fpr, "pro": fpr**0.1}} if both else {},
        "grid": "on the prepared grid of 96 x 96 pixels",
    }
    if calibrated:
        counts = {f"{kind}_{decision}ed": 0 for kind in ("good", "anomalous") for decision in ("accept", "reject")}
        for row in rows:
            if row.label is not None:
                counts[f"{('good', 'anomalous')[row.label]}_{row.decision}ed"] += 1
        statement = "At most 5 % of good parts are rejected, on average over calibrations."
        values["calibration"] = {"threshold": 1.5, "false_reject": 0.05, "statement": statement, "n": 40}
        values["decisions"] = counts
    return Results(**{**values, **changes})


class Page(HTMLParser):
    """The tags, the text outside scripts and styles, and the scripts of a page."""

    def __init__(self, path):
        super().__init__(convert_charrefs=True)
        self.tags, self.words, self.scripts, self.styles, self._inside = [], [], [], [], None
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = tag if tag in ("script", "style") else None
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_endtag(self, tag):
        self._inside = None

    def handle_data(self, data):
        if self._inside == "script":
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)
        elif self._inside == "style":
            self.styles.append(data)
        else:
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())

    def count(self, tag, **attributes):
        return sum(name == tag and attributes.items() <= found.items() for name, found in self.tags)

    def view(self):
        found = [body for attrs, body in self.scripts if attrs.get("id") == "view-data"]
        return json.loads(found[0]) if found else None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="module")
def page(folder):
    return Page(write_report(folder))


def assert_self_contained(page):
    for tag, attrs in page.tags:
        assert tag not in ("iframe", "object", "embed", "base", "form", "audio", "video"), tag
        for name, value in attrs.items():
            value = value or ""
            if name in ("src", "href", "srcset", "data", "poster", "action", "xlink:href"):
                assert value.startswith(("data:", "#")), f"<{tag} {name}={value[:80]!r}> leaves the page"
            assert not name.startswith("on"), f"<{tag}> has an inline handler {name}"
            assert "url(" not in value
    for style in page.styles:
        assert "url(" not in style
        assert "@import" not in style
    for _, body in page.scripts:
        if "plotly.js v" not in body[:200]:
            assert "http" not in body
            assert not re.search(r"\b(fetch|XMLHttpRequest|WebSocket|import)\s*\(|\bimport\s", body)


def test_page_holds_everything_itself_and_forbids_fetching(page):
    assert_self_contained(page)
    policy = next(attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none';")
    assert "http" not in policy
    assert "connect-src" not in policy
    assert sum("plotly.js v" in body[:200] for _, body in page.scripts) == 1
    for attrs, _ in page.scripts:
        assert "src" not in attrs


def test_pictures_and_figures_are_inside_and_whole(page):
    from PIL import Image

    sources = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
    jpegs = [source for source in sources if source.startswith("data:image/jpeg;base64,")]
    figures = [source for source in sources if source.startswith("data:image/svg+xml;base64,")]
    assert len(figures) == 3
    assert len(jpegs) == 12 * 5 + 9  # rgb, depth, two branches, fused; the truth of nine anomalous parts
    import io

    for source in jpegs[:3]:
        assert Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))).size == (192, 192)
    for source in figures:
        drawing = base64.b64decode(source.partition(",")[2]).decode()
        assert drawing.startswith("<svg")
        assert not re.search(r"(href|src)=.http", drawing)
    assert all(attrs.get("alt") for tag, attrs in page.tags if tag == "img")


def test_page_without_plotly_stays_small(folder, page):
    size = (folder / "report.html").stat().st_size
    plotly = max(len(body.encode()) for _, body in page.scripts)
    assert size - plotly < 2_000_000


def test_same_folder_gives_the_same_bytes(folder, tmp_path):
    first = write_report(folder, tmp_path / "a.html").read_bytes()
    assert write_report(folder, tmp_path / "deep" / "b.html").read_bytes() == first
    assert write_report(make_folder(tmp_path / "again"), tmp_path / "c.html").read_bytes() == first


def test_key_numbers_and_decisions_are_said(page):
    text = page.text
    assert "Synthetic data" in text
    assert "patchcore on biscuit" in text
    assert "12 parts: 3 good, 9 anomalous of 3 defect types" in text
    assert "At most 5 % of good parts are rejected" in text
    assert "defects missed" in text
    assert "good parts rejected" in text
    assert "0.960 to 0.990" in text  # the interval of I-AUROC
    assert "on the prepared grid of 96 x 96 pixels" in text


def test_exact_and_sampled_aupro_have_their_own_columns(page):
    spans = [tag for tag in page.tags if tag[0] == "th" and tag[1].get("scope") == "colgroup"]
    assert len(spans) == 2 + 4 + 4
    assert page.text.count("AUPRO, exact AUPRO, sampled") == 3


def test_parts_come_worst_mistake_first(page):
    order = [attrs["data-outcome"] for tag, attrs in page.tags if "data-outcome" in attrs]
    assert len(order) == 12
    assert "missed" in order
    assert order == sorted(order, key=lambda outcome: {"missed": 0, "false alarm": 1}.get(outcome, 2))
    shown = [attrs["id"] for tag, attrs in page.tags if tag == "article"]
    assert len(shown) == 12


def test_max_parts_limits_pictures_and_the_view_but_not_the_table(folder, tmp_path):
    page = Page(write_report(folder, tmp_path / "few.html", max_parts=3))
    assert page.count("article") == 3
    assert len(page.view()["parts"]) == 3
    assert sum("data-outcome" in attrs for _, attrs in page.tags) == 12
    none = Page(write_report(folder, tmp_path / "none.html", max_parts=0))
    assert none.count("article") == 0
    assert none.view() is None
    with pytest.raises(DataError, match="max_parts"):
        write_report(folder, max_parts=-1)


def test_every_shown_part_is_in_the_view_in_the_same_order(page):
    view = page.view()
    shown = [int(attrs["id"].removeprefix("part-")) for tag, attrs in page.tags if tag == "article"]
    assert [part["index"] for part in view["parts"]] == shown
    for part in view["parts"]:
        points = np.frombuffer(base64.b64decode(part["points"]), "<u2").reshape(part["rows"], part["columns"], 3)
        there = points[..., 0] != 65535
        assert 0.5 < there.mean() < 0.8  # the box around the round part, without the background
        extent = (points[there].max(0).astype(float) - points[there].min(0)) * part["step_mm"]
        np.testing.assert_allclose(extent, part["size_mm"], atol=0.1)
        assert len(base64.b64decode(part["anomaly"])) == part["rows"] * part["columns"]


EVIL = '<script>alert("1")</script>\'"&</textarea><img src=x onerror=alert(1)>'


def test_text_from_the_data_cannot_become_markup(tmp_path):
    clear_results(tmp_path)
    rows = []
    for index, label in enumerate((0, 1)):
        arrays = make_part("bump", index, 1.0)
        arrays[f"branch.{EVIL}"] = arrays["branch.rgb"]
        write_part(tmp_path, index, arrays)
        scores = {EVIL: 1.0}
        rows.append(
            PartRow(index=index, id=f"{EVIL}{index}", score=1.0, label=label, defect=EVIL, branch_scores=scores)
        )
    metrics = {"i_auroc": 0.5, EVIL: 0.5, f"aupro@{EVIL}": 0.5}
    results = make_results(
        rows,
        calibrated=False,
        model={EVIL: EVIL, "detector": EVIL, "modalities": [EVIL]},
        data={"category": EVIL, "split": EVIL, "reader": EVIL, EVIL: {EVIL: [EVIL]}},
        metrics=metrics,
        per_defect={EVIL: {"n": 1, "metrics": metrics}},
        branches={EVIL: metrics},
        calibration={"threshold": 2.0, "statement": EVIL, "n": EVIL},
        decisions={"good_accepted": 1, "anomalous_accepted": 1, "good_rejected": 0, "anomalous_rejected": 0},
        skipped=[{"id": EVIL, "reason": EVIL}],
        grid=EVIL,
        polyspect=EVIL,
    )
    write_results(tmp_path, results)
    page = Page(write_report(tmp_path))
    assert_self_contained(page)
    assert page.count("img", src="x") == 0
    assert len(page.scripts) == 4
    assert not any(
        "alert" in body for attrs, body in page.scripts if attrs.get("id") != "view-data" and len(body) < 1e6
    )
    assert page.view()["parts"][0]["id"].startswith(EVIL)
    assert page.text.count("<script>alert") > 15
    raw = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in raw
    assert "<img src=x" not in raw


def test_only_good_parts(tmp_path):
    page = Page(write_report(make_folder(tmp_path, n=4, only="good")))
    assert "No metric is defined here" in page.text
    assert "of 4 good parts" in page.text
    assert "Defects missed" not in page.text
    assert not re.search(r"\bnan\b", page.text.lower())


def test_only_anomalous_parts(tmp_path):
    page = Page(write_report(make_folder(tmp_path, n=4, only="hole")))
    assert "Defects missed" in page.text
    assert "none is known to be good" in page.text


def test_new_parts_without_labels_or_masks(tmp_path):
    page = Page(write_report(make_folder(tmp_path, n=4, labelled=False, drop=("mask",))))
    assert "4 parts: 4 without a label" in page.text
    assert "Truth" not in {word for word in page.words if "Truth" in word and "figcaption" in word}
    assert page.count("article") == 4
    outcomes = {attrs["data-outcome"] for _, attrs in page.tags if "data-outcome" in attrs}
    assert outcomes <= {"rejected", "accepted"}


def test_no_calibration(tmp_path):
    page = Page(write_report(make_folder(tmp_path, n=8, calibrated=False)))
    assert "carries no calibration" in page.text
    assert {attrs["data-outcome"] for _, attrs in page.tags if "data-outcome" in attrs} == {"scored"}


def test_threshold_that_rejects_nothing(tmp_path):
    calibration = {"threshold": float("inf"), "false_reject": 0.001, "supported": False, "n": 5}
    page = Page(write_report(make_folder(tmp_path, n=4, calibration=calibration)))
    assert "nothing is ever rejected" in page.text
    assert "too few calibration parts" in page.text


def test_no_3d_leaves_out_the_view_and_plotly(tmp_path):
    path = write_report(make_folder(tmp_path, n=4, drop=("xyz", "depth")))
    page = Page(path)
    assert page.view() is None
    assert page.count("section", id="view") == 0
    assert not any("plotly" in body for _, body in page.scripts)
    assert path.stat().st_size < 600_000
    assert_self_contained(page)


def test_points_without_depth_still_make_a_depth_picture(tmp_path):
    page = Page(write_report(make_folder(tmp_path, n=2, drop=("depth",)), max_parts=1))
    assert any(word == "Depth" for word in (word.strip() for word in page.words))


@pytest.mark.parametrize(
    "drop", [("rgb", "mask"), ("rgb", "depth", "xyz", "foreground", "mask", "branch.rgb", "branch.xyz")]
)
def test_map_alone_is_enough(tmp_path, drop):
    page = Page(write_report(make_folder(tmp_path, n=2, drop=(*drop, "valid"))))
    assert page.count("article") == 2


def test_single_part(tmp_path):
    page = Page(write_report(make_folder(tmp_path, n=1)))
    assert "1 part: 0 good, 1 anomalous" in page.text


def test_cloud_with_no_point_at_all(tmp_path):
    make_folder(tmp_path, n=2)
    arrays = make_part("hole", 0, 1.0)
    arrays |= {"xyz": np.zeros((SIZE, SIZE, 3)), "valid": np.zeros((SIZE, SIZE), bool), "depth": np.zeros((SIZE, SIZE))}
    write_part(tmp_path, 0, arrays)
    page = Page(write_report(tmp_path))
    assert [part["index"] for part in page.view()["parts"]] == [1]


def test_folder_without_arrays_reports_numbers_only(tmp_path):
    make_folder(tmp_path, n=4)
    for path in (tmp_path / "parts").iterdir():
        path.unlink()
    page = Page(write_report(tmp_path))
    assert "holds no maps to show" in page.text
    assert page.count("article") == 0


def test_damaged_folders_are_named(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        write_report(tmp_path / "nowhere")
    make_folder(tmp_path, n=4)
    (tmp_path / "parts" / "0002.safetensors").unlink()
    with pytest.raises(DataError, match=r"0002\.safetensors' is missing"):
        write_report(tmp_path)
    (tmp_path / "parts" / "0002.safetensors").write_bytes(b"nonsense")
    with pytest.raises(DataError, match=r"0002\.safetensors' is damaged"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()
    write_results(tmp_path, make_results([]))
    with pytest.raises(DataError, match="no parts"):
        write_report(tmp_path)


def test_skipped_parts_are_listed(tmp_path):
    skipped = [{"id": "biscuit/test/hole/999", "reason": "the TIFF is truncated"}]
    page = Page(write_report(make_folder(tmp_path, n=4, skipped=skipped)))
    assert "biscuit/test/hole/999" in page.text
    assert "the TIFF is truncated" in page.text


def test_matplotlib_settings_stay_as_they_were(folder, tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    write_report(folder, tmp_path / "r.html", max_parts=1)
    assert dict(matplotlib.rcParams) == before
