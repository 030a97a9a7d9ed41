"""The results folder: what is written comes back, and a damaged folder says what is wrong with it."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest

from polyspect.errors import DataError
from polyspect.evaluation.results import (
    PartRow,
    Results,
    clear_results,
    outcome_of,
    read_part,
    read_results,
    write_part,
    write_results,
)


def make_results(**changes):
    parts = [
        PartRow(index=0, id="a/test/good/000", defect="good", label=0, score=0.25, p_value=0.5, decision="accept"),
        PartRow(index=1, id='a,"ü"/test/hole/001', defect="hole", label=1, score=2.5, p_value=0.01, decision="reject"),
        PartRow(index=2, id="new", score=np.float32(1.5), branch_scores={"rgb": 0.5}),
    ]
    values = {
        "model": {"detector": "patchcore", "config": {"modalities": ("rgb", "xyz"), "k": np.int64(3)}, "seed": 0},
        "data": {"category": "a", "n_good": 1, "n_anomalous": 1},
        "parts": parts,
        "metrics": {"i_auroc": 1.0, "aupro@0.3": float("nan"), "p_auroc": None},
        "intervals": {"i_auroc": (0.9, 1.0)},
        "calibration": {"threshold": math.inf, "statement": "too few parts", "n": 3},
        "curves": {"roc": {"fpr": np.array([0.0, 1.0]), "tpr": np.array([0.5, 1.0])}},
        "grid": "ground truth grid, 160x160",
    }
    return Results(**{**values, **changes})


def make_arrays(height=6, width=5, seed=0):
    rng = np.random.default_rng(seed)
    normals = rng.normal(size=(height, width, 3))
    return {
        "map": rng.normal(size=(height, width)),
        "branch.rgb": rng.normal(size=(height, width)).astype(np.float32),
        "rgb": rng.integers(0, 256, (height, width, 3), dtype=np.uint8),
        "depth": rng.uniform(0.5, 1, (height, width)),
        "normals": normals / np.linalg.norm(normals, axis=2, keepdims=True),
        "xyz": rng.normal(size=(height, width, 3)).astype(np.float32),
        "valid": rng.random((height, width)) > 0.2,
        "foreground": rng.random((height, width)) > 0.2,
        "mask": rng.random((height, width)) > 0.8,
    }


def test_results_come_back_with_undefined_numbers_as_none(tmp_path):
    write_results(tmp_path, make_results())
    back = read_results(tmp_path)
    assert [part.id for part in back.parts] == ["a/test/good/000", 'a,"ü"/test/hole/001', "new"]
    assert [part.outcome for part in back.parts] == ["passed", "caught", "scored"]
    assert back.parts[2] == PartRow(index=2, id="new", score=1.5, branch_scores={"rgb": 0.5})
    assert back.metrics == {"i_auroc": 1.0, "aupro@0.3": None, "p_auroc": None}
    assert back.threshold is None
    assert back.calibration == {"threshold": None, "statement": "too few parts", "n": 3}
    assert back.model["config"] == {"modalities": ["rgb", "xyz"], "k": 3}
    assert back.curves["roc"]["tpr"] == [0.5, 1.0]
    write_results(tmp_path / "again", back)
    assert (tmp_path / "again" / "results.json").read_bytes() == (tmp_path / "results.json").read_bytes()


def test_json_is_strict_and_nothing_is_left_beside_it(tmp_path):
    write_results(tmp_path, make_results())
    text = (tmp_path / "results.json").read_text(encoding="utf-8")

    def refuse(constant):
        raise AssertionError(f"{constant} in the file")

    json.loads(text, parse_constant=refuse)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts.csv", "results.json"]


def test_csv_quotes_names_and_leaves_unknown_fields_empty(tmp_path):
    write_results(tmp_path, make_results())
    lines = (tmp_path / "parts.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "id,defect,label,score,p_value,decision,outcome"
    assert lines[2] == '"a,""ü""/test/hole/001",hole,1,2.5,0.01,reject,caught'
    assert lines[3] == "new,,,1.5,,,scored"


@pytest.mark.parametrize(
    ("label", "decision", "expected"),
    [
        (0, "accept", "passed"),
        (0, "reject", "false alarm"),
        (1, "accept", "missed"),
        (1, "reject", "caught"),
        (None, "accept", "accepted"),
        (None, "reject", "rejected"),
        (1, None, "scored"),
        (None, None, "scored"),
    ],
)
def test_outcome_holds_the_decision_against_the_truth(label, decision, expected):
    assert outcome_of(label, decision) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"index": 4}, "index 4, expected 0"),
        ({"score": math.nan}, "score is nan"),
        ({"p_value": 1.5}, "p_value is 1.5"),
        ({"label": 2}, "label is 2"),
        ({"decision": "maybe"}, "decision is 'maybe'"),
        ({"branch_scores": {"xyz": math.inf}}, "branch 'xyz' is inf"),
    ],
)
def test_rows_that_make_no_sense_are_refused_by_name(tmp_path, change, message):
    row = PartRow(**{"index": 0, "id": "part-7", "score": 1.0, **change})
    with pytest.raises(DataError, match="part-7") as caught:
        write_results(tmp_path, make_results(parts=[row]))
    assert message in str(caught.value)
    assert not (tmp_path / "results.json").exists()


def test_repeated_ids_are_refused(tmp_path):
    rows = [PartRow(index=index, id="same", score=1.0) for index in range(2)]
    with pytest.raises(DataError, match=r"'same'.*occurs twice"):
        write_results(tmp_path, make_results(parts=rows))


def test_part_arrays_come_back_in_their_stored_precision(tmp_path):
    arrays = make_arrays()
    write_part(tmp_path, 3, arrays)
    back = read_part(tmp_path, 3)
    assert (tmp_path / "parts" / "0003.safetensors").is_file()
    assert set(back) == set(arrays)
    np.testing.assert_array_equal(back["map"], arrays["map"].astype(np.float32))
    np.testing.assert_allclose(back["branch.rgb"], arrays["branch.rgb"], rtol=1e-3)
    np.testing.assert_allclose(back["normals"], arrays["normals"], atol=0.5 / 127 + 1e-6)
    for name in ("rgb", "xyz", "valid", "foreground", "mask"):
        np.testing.assert_array_equal(back[name], arrays[name])
        assert back[name].dtype == arrays[name].dtype


def test_one_array_can_be_read_alone(tmp_path):
    write_part(tmp_path, 0, make_arrays())
    assert set(read_part(tmp_path, 0, names=("map", "branch.none"))) == {"map"}


def test_prepared_rgb_is_stored_as_bytes_and_big_branch_values_are_clipped(tmp_path):
    rgb = np.zeros((2, 2, 3), np.float32)
    rgb[0, 0] = (1.0, 0.5, 0.2)
    write_part(tmp_path, 0, {"map": np.zeros((2, 2)), "rgb": rgb, "branch.b": np.full((2, 2), 1e9)})
    back = read_part(tmp_path, 0)
    assert back["rgb"][0, 0].tolist() == [255, 128, 51]
    assert back["branch.b"].max() == 65504


def test_points_are_thinned_to_every_other_row_and_column(tmp_path):
    xyz = np.arange(200 * 130 * 3, dtype=np.float32).reshape(200, 130, 3)
    write_part(tmp_path, 0, {"map": np.zeros((200, 130)), "xyz": xyz})
    np.testing.assert_array_equal(read_part(tmp_path, 0)["xyz"], xyz[::2, ::2])


def test_views_that_are_not_contiguous_are_stored_as_they_read(tmp_path):
    arrays = {"map": np.arange(12.0).reshape(3, 4).T, "mask": (np.arange(12).reshape(4, 3) % 2 == 0)[::-1]}
    write_part(tmp_path, 0, arrays)
    np.testing.assert_array_equal(read_part(tmp_path, 0)["map"], arrays["map"])
    np.testing.assert_array_equal(read_part(tmp_path, 0)["mask"], arrays["mask"])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"rgb": np.zeros((2, 2, 3), np.uint8)}, "no 'map'"),
        ({"map": np.zeros((2, 2)), "branch.": np.zeros((2, 2))}, "unknown array 'branch.'"),
        ({"map": np.zeros((2, 2)), "mask": np.zeros((2, 3))}, r"'mask' has shape \(2, 3\), expected \(2, 2\)"),
        ({"map": np.zeros((2, 2)), "xyz": np.zeros((2, 2, 4))}, r"'xyz' has shape .* expected \(2, 2, 3\)"),
        ({"map": np.full((2, 2), np.nan)}, "'map' holds NaN"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path, arrays, message):
    with pytest.raises(DataError, match=f"part 7: {message}"):
        write_part(tmp_path, 7, arrays)


def damage(tmp_path, change):
    write_results(tmp_path, make_results())
    content = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    change(content)
    (tmp_path / "results.json").write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.pop("metrics"), "'metrics' is nothing, expected dict"),
        (lambda content: content.update(parts={}), "'parts' is dict, expected list"),
        (lambda content: content.update(format=99), "format 99, expected 1"),
        (lambda content: content["parts"][1].pop("score"), "part 1 is damaged: KeyError at 'score'"),
        (lambda content: content["parts"][1].update(score=None), "part 1 is damaged: TypeError"),
        (lambda content: content["parts"].pop(0), "has index 1, expected 0"),
    ],
)
def test_damaged_results_say_which_key_is_wrong(tmp_path, change, message):
    damage(tmp_path, change)
    with pytest.raises(DataError) as caught:
        read_results(tmp_path)
    assert message in str(caught.value)


def test_missing_and_truncated_files_are_named(tmp_path):
    with pytest.raises(DataError, match="the folder does not exist"):
        read_results(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"results\.json.*incomplete"):
        read_results(tmp_path)
    path = write_results(tmp_path, make_results())
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=r"results\.json' is damaged, not JSON"):
        read_results(tmp_path)
    with pytest.raises(DataError, match=r"0000\.safetensors' is missing"):
        read_part(tmp_path, 0)
    part = write_part(tmp_path, 0, make_arrays())
    part.write_bytes(part.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"0000\.safetensors' is damaged"):
        read_part(tmp_path, 0)


def test_foreign_arrays_in_a_part_file_are_refused(tmp_path):
    from safetensors.numpy import save_file

    (tmp_path / "parts").mkdir()
    save_file({"map": np.zeros((2, 2), np.float64)}, tmp_path / "parts" / "0000.safetensors")
    with pytest.raises(DataError, match="'map' is float64 with 2 axes, expected float32 with 2"):
        read_part(tmp_path, 0)


def test_clearing_removes_an_earlier_run_and_nothing_else(tmp_path):
    write_results(tmp_path, make_results())
    write_part(tmp_path, 0, make_arrays())
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "parts" / "mine.safetensors").write_text("mine")
    clear_results(tmp_path)
    left = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file())
    assert left == ["notes.txt", "parts/mine.safetensors"]


def test_reading_results_needs_no_torch():
    code = "import sys, polyspect.evaluation.results; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
