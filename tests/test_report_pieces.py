"""The parts that the report is made of: order of parts, colour scales, pictures, 3D data, curves, tables."""

import base64
import io
from dataclasses import replace

import numpy as np
import pytest

from polyspect.evaluation.results import PartRow, Results
from polyspect.report.figures import operating_point, pro_curve, roc_curve, score_histogram
from polyspect.report.names import metric, ordered
from polyspect.report.pictures import (
    Scale,
    colour,
    columns_of,
    depth_span,
    is_geometric,
    map_scale,
    outlined,
    overlay,
    part_pictures,
)
from polyspect.report.ranking import ranked, reference_score, selected
from polyspect.report.table import compare_table, decision_line, results_table
from polyspect.report.view3d import view_axes, view_data


def row(index, label, score, decision=None):
    return PartRow(index=index, id=f"part {index}", label=label, score=score, decision=decision)


def make_results(rows=(), **changes):
    values = {"model": {"detector": "d"}, "data": {"category": "c"}, "parts": list(rows), "metrics": {}}
    return Results(**{**values, **changes})


def decode(uri):
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))


# -- names -----------------------------------------------------------------------------------------------------------


def test_metrics_are_ordered_by_group_and_limit():
    keys = ["aupro_sampled@0.3", "speed", "p_auroc", "aupro@0.01", "aupro@0.3", "i_ap", "i_auroc", "aupro_sampled@0.05"]
    expected = ["i_auroc", "i_ap", "p_auroc", "aupro@0.3", "aupro@0.01", "aupro_sampled@0.3", "aupro_sampled@0.05"]
    assert [item.key for item in ordered(keys)] == [*expected, "speed"]
    assert metric("aupro@0.3").full == "AUPRO exact, FPR to 0.3"
    assert metric("aupro_sampled@0.3").group != metric("aupro@0.3").group
    assert (metric("i_auroc").full, metric("p_auroc").full) == ("I-AUROC", "P-AUROC")


# -- ranking ---------------------------------------------------------------------------------------------------------


def test_misses_then_false_alarms_then_close_calls_then_the_rest():
    rows = [
        row(0, 0, 1.0, "accept"),  # far from the threshold
        row(1, 0, 2.4, "accept"),  # close
        row(2, 0, 3.5, "reject"),  # false alarm
        row(3, 0, 4.0, "reject"),  # worse false alarm
        row(4, 1, 2.2, "accept"),  # missed
        row(5, 1, 0.5, "accept"),  # missed by far
        row(6, 1, 2.8, "reject"),  # caught, close
        row(7, 1, 9.0, "reject"),  # caught
        row(8, None, 7.0, "reject"),
        row(9, None, 8.0, "reject"),
    ]
    results = make_results(rows, calibration={"threshold": 2.5})
    assert [part.index for part in ranked(results)] == [5, 4, 3, 2, 1, 6, 0, 7, 9, 8]


def test_without_threshold_the_best_separating_score_gives_the_order():
    rows = [row(0, 0, 1.0), row(1, 0, 2.0), row(2, 1, 3.0), row(3, 1, 1.5), row(4, 1, 4.0), row(5, 0, 0.0)]
    rows += [row(6, 0, 2.2)]
    results = make_results(rows)
    assert reference_score(results) == 3.0
    assert [part.index for part in ranked(results)] == [3, 2, 6, 1, 4, 0, 5]


def test_one_kind_alone_is_ordered_by_score():
    good = make_results([row(0, 0, 1.0), row(1, 0, 3.0), row(2, 0, 2.0)])
    assert reference_score(good) is None
    assert [part.index for part in ranked(good)] == [1, 2, 0]
    bad = make_results([row(0, 1, 1.0), row(1, 1, 3.0), row(2, 1, 2.0)])
    assert [part.index for part in ranked(bad)] == [0, 2, 1]


def test_no_kind_of_mistake_takes_all_places():
    rows = [row(i, 1, i / 100, "accept") for i in range(20)] + [row(20 + i, 0, 5 + i, "reject") for i in range(9)]
    rows += [row(29 + i, 0, 1.0, "accept") for i in range(5)]
    order = ranked(make_results(rows, calibration={"threshold": 2.0}))
    kinds = [part.outcome for part in selected(order, 8)]
    assert kinds == ["missed"] * 4 + ["false alarm"] * 2 + ["passed"] * 2
    misses_only = selected([part for part in order if part.outcome == "missed"], 8)
    assert [part.index for part in misses_only] == list(range(8))
    assert selected(order, 0) == []
    assert selected(order, 1)[0].index == 0


# -- pictures --------------------------------------------------------------------------------------------------------


def test_scale_starts_at_the_good_median_and_ends_at_the_usual_defect():
    normal = np.linspace(0, 1, 1001)
    scale = map_scale(normal, np.array([3.0, 5.0, 9.0]))
    assert scale == Scale(0.5, pytest.approx(0.999), 5.0)
    assert map_scale(normal, np.array([0.6])).high == pytest.approx(0.5 + 1.25 * 0.499)  # weak maps keep their noise
    assert map_scale(normal, np.array([])).high == pytest.approx(0.5 + 2 * 0.499)
    np.testing.assert_allclose(scale.unit(np.array([-1.0, 0.5, 2.75, 5.0, 99.0])), [0, 0, 0.5, 1, 1])


@pytest.mark.parametrize("value", [0.0, -3.0, 1e6])
def test_constant_maps_still_have_a_scale(value):
    scale = map_scale(np.full(10, value), np.array([]))
    assert scale.high > scale.low
    assert np.isfinite(scale.unit(np.full(3, value))).all()


def test_colours_darken_with_anomaly():
    lightness = colour(np.linspace(0, 1, 50)[None]).astype(float) @ [0.299, 0.587, 0.114]
    assert (np.diff(lightness[0]) < 0).all()


def test_overlay_shows_the_part_where_normal_and_the_scale_where_anomalous():
    rgb = np.zeros((1, 2, 3), np.uint8)
    rgb[0, 1] = 255
    calm = overlay(rgb, np.zeros((1, 2)))
    assert calm[0, 0].tolist() == [130, 130, 130]
    assert calm[0, 1].tolist() == [255, 255, 255]
    hot = overlay(rgb, np.ones((1, 2)))
    assert np.abs(hot.astype(int) - colour(np.ones((1, 2)))).max() <= 26


def test_outline_stays_outside_the_defect():
    mask = np.zeros((9, 9), bool)
    mask[4, 4] = True
    picture = outlined(np.full((9, 9, 3), 200, np.uint8), mask)
    assert picture[4, 4].tolist() == [200, 200, 200]
    assert picture[4, 5].tolist() == [0, 194, 255]
    assert picture[4, 6].tolist() == [0, 194, 255]
    assert picture[4, 7].tolist() == [4, 38, 56]
    assert picture[4, 8].tolist() == [200, 200, 200]


@pytest.mark.parametrize(
    ("name", "expected"), [("xyz", True), ("depth.bank", True), ("fpfh", True), ("rgb", False), ("rgb_depth", False)]
)
def test_branches_are_known_as_geometric_by_name(name, expected):
    assert is_geometric(name) is expected


def make_arrays(size=192):
    mask = np.zeros((size, size), bool)
    mask[80:100, 80:100] = True
    valid = np.ones((size, size), bool)
    valid[:, :60] = False
    return {
        "map": np.where(mask, 2.0, 0.0).astype(np.float32),
        "branch.xyz": np.where(mask, 2.0, 0.0).astype(np.float16),
        "branch.rgb": np.zeros((size, size), np.float16),
        "rgb": np.full((size, size, 3), 90, np.uint8),
        "depth": np.where(valid, 0.5, 0).astype(np.float32),
        "valid": valid,
        "mask": mask,
    }


def test_row_of_pictures_has_one_cell_per_column_and_the_same_colours_on_every_part():
    arrays = make_arrays()
    columns = columns_of([arrays])
    assert columns == ["rgb", "depth", "branch.rgb", "branch.xyz", "map", "mask"]
    scales = {name: Scale(0, 1, 2) for name in ("map", "branch.xyz", "branch.rgb")}
    part = row(0, 1, 2.0)
    pictures = part_pictures(part, arrays, scales, 0.01, columns)
    assert [picture.title for picture in pictures] == ["RGB", "Depth", "rgb", "xyz", "All together", "Truth"]
    xyz = decode(pictures[3].uri).astype(int)
    dark = colour(np.ones((1, 1)))[0, 0].astype(int)
    assert np.abs(xyz[90, 90] - dark).max() < 12
    striped = xyz[:, :50].reshape(-1, 3)
    assert np.ptp(striped, axis=1).max() < 25  # grey
    assert striped[:, 0].std() > 10  # and not flat
    rgb_branch = decode(pictures[2].uri).astype(int)
    assert rgb_branch[:, :50].std() < 20  # a colour branch sees what the 3D sensor does not
    weaker = part_pictures(part, {**arrays, "map": arrays["map"] / 4}, scales, 0.01, ["map"])
    assert not np.array_equal(decode(weaker[0].uri), decode(pictures[4].uri))


def test_missing_views_and_truths_are_said_in_words():
    arrays = {"map": np.zeros((8, 8), np.float32)}
    scales = {"map": Scale(0, 1, 2)}
    for label, word in ((None, "not known"), (0, "good part"), (1, "not marked")):
        pictures = part_pictures(row(0, label, 1.0), arrays, scales, 0.0, ["rgb", "map", "mask"])
        assert [picture.note for picture in pictures] == ["not there", "score 1", word]
        assert [picture.uri is None for picture in pictures] == [True, False, True]


def test_depth_range_ignores_unmeasured_pixels_and_the_background():
    depth = np.zeros((10, 10), np.float32)
    depth[2:8, 2:8] = np.linspace(0.4, 0.5, 36).reshape(6, 6)
    depth[0, 0] = 9.0
    foreground = np.zeros((10, 10), bool)
    foreground[1:9, 1:9] = True
    span = depth_span([{"map": depth, "depth": depth, "valid": depth > 0, "foreground": foreground}])
    assert span == pytest.approx(0.098, abs=0.002)
    assert depth_span([{"map": depth}]) == 0.0


def test_heights_are_light_where_high_and_never_taken_for_holes():
    height = np.full((192, 192), -0.004, np.float32)  # most of the part lies a little under the fitted plane
    height[40:80, 40:80] = 0.02
    valid = np.ones((192, 192), bool)
    valid[140:, 140:] = False
    arrays = {"map": np.zeros_like(height), "height": height, "valid": valid}
    assert columns_of([arrays]) == ["depth", "map"]
    (picture,) = part_pictures(row(0, 0, 1.0), arrays, {}, 0.03, ["depth"])
    assert (picture.title, picture.note) == ("Height", "light is high")
    grey = decode(picture.uri).astype(int)
    assert grey[60, 60, 0] > grey[110, 20, 0] + 50
    assert np.ptp(grey[100:130, 10:130]) <= 4  # plain grey, no stripes (a little noise from the file format)
    assert np.ptp(grey[150:, 150:]) > 10  # striped


# -- the 3D view -----------------------------------------------------------------------------------------------------


def make_plane(rows=24, columns=30, tilt=0.0):
    """A plane of points 1 mm apart, 0.5 m from the camera, turned about the x axis by `tilt` radians."""
    v, u = np.mgrid[0:rows, 0:columns] * 1e-3
    return np.stack([u, v * np.cos(tilt), 0.5 + v * np.sin(tilt)], axis=2)


@pytest.mark.parametrize("tilt", [0.0, 0.7, -0.9])
def test_surface_stands_upright_in_millimetres_whatever_its_tilt(tilt):
    plane = make_plane(tilt=tilt)
    points = plane @ view_axes(plane, np.ones((24, 30), bool)) * 1000
    extent = np.ptp(points.reshape(-1, 3), axis=0)
    np.testing.assert_allclose(extent, [29, 23, 0], atol=1e-6)
    assert points[0, -1, 0] > points[0, 0, 0]  # right stays right
    assert points[0, 0, 1] > points[-1, 0, 1]  # the picture's top is up


@pytest.mark.parametrize("tilt", [0.0, 0.7, -0.9])
def test_camera_is_where_the_surface_was_seen_from(tilt):
    plane = make_plane(tilt=tilt)
    plane -= plane.mean((0, 1)) - [0, 0, 0.5]  # on the optical axis
    arrays = {"map": np.zeros((24, 30), np.float32), "xyz": plane}
    (entry,) = view_data([(row(0, 1, 1.0), arrays)], Scale(0, 1, 2))
    np.testing.assert_allclose(entry["camera"], [0, np.sin(tilt), np.cos(tilt)], atol=1e-6)  # bottom far: from the top
    np.testing.assert_allclose(entry["up"], [0, np.cos(tilt), -np.sin(tilt)], atol=1e-6)


def test_a_bump_towards_the_camera_points_up():
    xyz = make_plane()
    xyz[12, 15, 2] -= 0.004
    points = xyz @ view_axes(xyz, np.ones((24, 30), bool)) * 1000
    assert points[12, 15, 2] - points[0, 0, 2] == pytest.approx(4.0, abs=1e-6)


def test_view_gives_back_the_points_and_the_map_below_them():
    rows, columns = 24, 30
    valid = np.ones((rows, columns), bool)
    valid[3, 4] = False
    heat = np.zeros((rows * 2, columns * 2), np.float32)
    heat[20, 10] = 1.0  # the stored points are every second pixel: row 10, column 5
    rgb = np.zeros((*heat.shape, 3), np.uint8)
    rgb[20, 10] = (1, 2, 3)
    xyz = np.where(valid[..., None], make_plane(rows, columns), 0).astype(np.float32)
    arrays = {"map": heat, "rgb": rgb, "xyz": xyz, "valid": np.repeat(np.repeat(valid, 2, 0), 2, 1)}
    (entry,) = view_data([(row(7, 1, 1.0), arrays)], Scale(0, 0.5, 1))
    points = np.frombuffer(base64.b64decode(entry["points"]), "<u2").reshape(rows, columns, 3)
    there = points[..., 0] != 65535
    np.testing.assert_array_equal(there, valid)
    span = (points[0, -1].astype(float) - points[0, 0]) * entry["step_mm"]
    np.testing.assert_allclose(span, [29, 0, 0], atol=0.01)
    anomaly = np.frombuffer(base64.b64decode(entry["anomaly"]), np.uint8).reshape(rows, columns)
    assert np.argwhere(anomaly == 255).tolist() == [[10, 5]]
    colours = np.frombuffer(base64.b64decode(entry["colours"]), np.uint8).reshape(rows, columns, 3)
    assert colours[10, 5].tolist() == [1, 2, 3]
    assert entry["edge_mm"] == pytest.approx(6.0, rel=0.01)
    assert entry["index"] == 7


def test_view_leaves_out_flying_points_and_parts_without_any():
    xyz = make_plane()
    xyz[0, 0, 2] = 3.0
    arrays = {"map": np.zeros((24, 30), np.float32), "xyz": xyz}
    empty = {**arrays, "xyz": np.zeros_like(xyz)}
    entries = view_data([(row(0, 1, 1.0), empty), (row(1, 1, 1.0), arrays)], Scale(0, 1, 2))
    assert [entry["index"] for entry in entries] == [1]
    assert entries[0]["size_mm"][2] < 1


def test_many_parts_share_the_budget_of_points():
    arrays = {"map": np.zeros((128, 128), np.float32), "xyz": make_plane(128, 128)}
    entries = view_data([(row(i, 1, 1.0), arrays) for i in range(40)], Scale(0, 1, 2))
    assert sum(entry["rows"] * entry["columns"] for entry in entries) <= 160_000
    assert min(entry["rows"] for entry in entries) > 40


# -- figures ---------------------------------------------------------------------------------------------------------


def test_operating_point_is_the_rates_of_the_decisions():
    counts = {"good_rejected": 1, "good_accepted": 3, "anomalous_rejected": 6, "anomalous_accepted": 2}
    assert operating_point(make_results(decisions=counts)) == (0.25, 0.75)
    assert operating_point(make_results(decisions={"good_rejected": 1})) is None


def test_figures_draw_only_what_there_is():
    results = make_results([row(0, 0, 1.0), row(1, None, 1.0)])
    assert roc_curve(results) is None
    assert pro_curve(results) is None
    drawing = score_histogram(results)
    assert "good (1)" in drawing
    assert "no label (1)" in drawing
    assert "threshold" not in drawing
    curves = {"roc": {"fpr": [0, 1], "tpr": [0, 1]}, "pro": {"fpr": [0, 0.3], "pro": [0, 0.9]}}
    results = replace(results, curves=curves, metrics={"i_auroc": 0.5}, calibration={"threshold": 4.0})
    assert "threshold 4" in score_histogram(results)
    assert "I-AUROC 0.500" in roc_curve(results)
    assert "area up to 0.3" in pro_curve(results)


# -- tables for the terminal -----------------------------------------------------------------------------------------


def printed(renderable, width=140):
    from rich.console import Console

    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(renderable)
    return console.file.getvalue()


COUNTS = {"good_rejected": 1, "good_accepted": 3, "anomalous_rejected": 6, "anomalous_accepted": 2}


def test_results_table_says_metrics_decisions_and_keeps_brackets_in_names():
    rows = [row(0, 0, 1.0, "accept"), row(1, 1, 3.0, "reject")]
    results = make_results(
        rows,
        data={"category": "[red]cat", "synthetic": True},
        metrics={"i_auroc": 0.9, "aupro@0.3": 0.8, "aupro_sampled@0.3": 0.81, "p_ap": None},
        intervals={"i_auroc": (0.85, 0.95)},
        per_defect={"[bold]hole": {"n": 1, "metrics": {"i_auroc": 1.0, "aupro_sampled@0.3": 0.7}}},
        calibration={"threshold": 2.0, "false_reject": 0.01},
        decisions=COUNTS,
    )
    text = printed(results_table(results))
    assert "d on [red]cat: 2 parts (1 good, 1 anomalous)" in text
    assert "synthetic data" in text
    assert "0.850 to 0.950" in text
    assert "[bold]hole" in text
    assert "AUPRO exact, FPR to 0.3" in text
    assert "AUPRO sampled, FPR to 0.3" in text
    assert "1 of 4 good parts rejected; 2 of 8 anomalous parts missed" in text


def test_decision_line_of_uncalibrated_unsupported_and_unlabelled_runs():
    assert "not calibrated" in decision_line(make_results())
    assert "nothing is ever rejected" in decision_line(make_results(calibration={"threshold": None}))
    rows = [row(0, None, 3.0, "reject"), row(1, None, 1.0, "accept")]
    assert decision_line(make_results(rows, calibration={"threshold": 2.0})) == "threshold 2; 1 of 2 parts rejected"


def test_comparison_keeps_the_two_aupros_apart_and_means_only_complete_columns():
    def run(category, exact, sampled):
        metrics = {"i_auroc": 0.5, "aupro@0.3": exact, "aupro_sampled@0.3": sampled}
        return make_results([row(0, 0, 1.0)], data={"category": category}, metrics=metrics, decisions=COUNTS)

    lines = printed(compare_table([run("bagel", 0.8, None), run("rope", 0.6, 0.7)])).splitlines()
    cells = {
        line.split("│")[2].strip(): [cell.strip() for cell in line.split("│")[3:-1]] for line in lines if "│ d" in line
    }
    assert cells["bagel"] == ["1 + 0", "0.500", "–", "0.800", "–", "1", "2", "–"]
    assert cells["rope"][3:5] == ["0.600", "0.700"]
    assert cells["mean"][1:5] == ["0.500", "–", "0.700", "–"]
