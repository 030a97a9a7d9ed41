"""The command line as its user meets it: start-up, help, the whole road, and every kind of bad input."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from polyspect.cli import build_parser, main
from polyspect.data.synthetic import make_part, write_dataset
from polyspect.detectors import DETECTORS

SMALL = ["--prepare", "size=64", "--set", "bank_limit=200"]


@pytest.fixture(scope="session")
def pristine(tmp_path_factory) -> Path:
    """A small synthetic data set that no test changes."""
    root = tmp_path_factory.mktemp("parts")
    write_dataset(root, ["gear"], train=6, validation=4, test_good=3, test_per_defect=1, size=64, seed=3)
    return root


@pytest.fixture
def parts(pristine: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may damage."""
    return Path(shutil.copytree(pristine, tmp_path / "parts"))


@pytest.fixture(scope="session")
def model(pristine: Path, tmp_path_factory) -> Path:
    """A small PatchCore model."""
    out = tmp_path_factory.mktemp("model") / "gear.safetensors"
    assert main(fit_arguments(pristine, out)) == 0
    return out


def fit_arguments(root: Path, out: Path, *more: str) -> list[str]:
    where = ["--root", str(root), "--category", "gear", "--out", str(out), "--no-cache"]
    return ["fit", "--detector", "patchcore", *where, *SMALL, *more]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "polyspect", *arguments], capture_output=True, text=True, check=False)


def refused(capsys, arguments: list[str]) -> str:
    """The one line with which a command refuses its input."""
    capsys.readouterr()
    assert main(arguments) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("polyspect: error: ")]
    assert len(errors) == 1
    return errors[0].removeprefix("polyspect: error: ")


# -- start-up and help -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("statement", ["import polyspect", "from polyspect.cli import build_parser; build_parser()"])
def test_torch_is_not_loaded_before_it_is_needed(statement: str):
    heavy = "{'torch', 'timm', 'matplotlib', 'plotly', 'open3d', 'scipy', 'cv2'}"
    code = f"{statement}\nimport sys; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_command_explains_itself_with_examples(capsys):
    parser = build_parser()
    names = re.search(r"\{(.*?)\}", parser.format_usage()) or re.findall(r"^    (\w+)", parser.format_help(), re.M)
    for command in names:
        with pytest.raises(SystemExit, match="0"):
            main([command, "--help"])
        text = capsys.readouterr().out
        assert "examples:\n  polyspect " + command in text
    assert set(names) == {
        "demo", "data", "detectors", "fit", "complete", "predict", "evaluate", "report", "weights", "info",
    }  # fmt: skip


def test_the_public_names_are_there():
    import polyspect

    assert sorted(polyspect.__all__) == dir(polyspect)
    assert all(getattr(polyspect, name) is not None for name in polyspect.__all__)
    with pytest.raises(AttributeError, match="no attribute 'fitt'"):
        polyspect.fitt  # noqa: B018


def test_methods_and_weights_are_listed(capsys):
    assert main(["detectors", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) >= {"patchcore", "crd"}
    assert main(["detectors", "crd", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["settings"]["epochs"]["default"] == 200
    assert set(shown["presets"]) >= {"paper", "fast"}
    assert main(["weights", "list", "--json"]) == 0
    assert any(row["name"] == "efficientnet_lite0" and row["available"] for row in json.loads(capsys.readouterr().out))
    assert main(["info", "--json"]) == 0
    assert "torch" in json.loads(capsys.readouterr().out)["packages"]


# -- the whole road --------------------------------------------------------------------------------------------------


def test_evaluate_prints_one_json_object_and_writes_a_report(pristine, model, tmp_path, capsys):
    where = ["--root", str(pristine), "--category", "gear", "--out", str(tmp_path / "r"), "--no-cache"]
    assert main(["evaluate", str(model), *where, "--bootstrap", "20", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    limits = ("0.3", "0.1", "0.05", "0.01")
    names = {"i_auroc", "i_ap", "p_auroc", "p_ap", "f1_max"}
    names |= {f"{kind}@{limit}" for kind in ("aupro", "aupro_sampled") for limit in limits}
    assert names <= set(results["metrics"])
    assert all(0 <= results["metrics"][name] <= 1 for name in names)
    low, high = results["intervals"]["i_auroc"]
    assert low <= results["metrics"]["i_auroc"] <= high
    assert results["data"]["synthetic"] is True
    assert results["data"]["n_good"] == 3
    assert set(results["branches"]) == {"rgb", "normals"}
    rows = list(csv.DictReader((tmp_path / "r" / "parts.csv").read_text().splitlines()))
    assert len(rows) == results["data"]["n_good"] + results["data"]["n_anomalous"]
    assert "Synthetic data" in (tmp_path / "r" / "report.html").read_text()
    (tmp_path / "r" / "report.html").unlink()
    assert main(["report", str(tmp_path / "r"), "--parts", "2"]) == 0
    assert (tmp_path / "r" / "report.html").stat().st_size > 50_000


def test_predict_takes_two_files_a_folder_or_a_data_set_and_agrees(pristine, model, tmp_path, capsys):
    good = pristine / "gear" / "test" / "good"
    two = [str(good / "rgb" / "000.png"), str(good / "xyz" / "000.tiff"), str(good / "normals" / "000.png")]
    capsys.readouterr()
    assert main(["predict", str(model), *two, "--json"]) == 0
    alone = json.loads(capsys.readouterr().out)["parts"]
    assert len(alone) == 1
    new = tmp_path / "new"
    for view in ("rgb", "xyz", "normals"):
        shutil.copytree(good / view, new / view)
    assert main(["predict", str(model), str(new), "--out", str(tmp_path / "out"), "--json"]) == 0
    folder = json.loads(capsys.readouterr().out)["parts"]
    assert len(folder) == 3
    assert main(["predict", str(model), "--root", str(pristine), "--category", "gear", "--json"]) == 0
    whole = {part["id"]: part for part in json.loads(capsys.readouterr().out)["parts"]}
    expected = whole["gear/test/good/000"]
    for part in (alone[0], folder[0]):
        assert part["score"] == pytest.approx(expected["score"], rel=1e-5)
        assert (part["p_value"], part["decision"]) == (expected["p_value"], expected["decision"])
    written = tifffile.imread(tmp_path / "out" / folder[0]["map"])
    assert written.shape == (64, 64)
    assert written.max() > 0
    with Image.open(tmp_path / "out" / folder[0]["picture"]) as picture:
        assert (picture.mode, picture.size) == ("RGB", (64, 64))
    assert len(list(csv.DictReader((tmp_path / "out" / "predictions.csv").read_text().splitlines()))) == 3


def test_depth_images_and_a_camera_file_stand_in_for_a_cloud(tmp_path, capsys):
    root, camera = tmp_path / "own", tmp_path / "camera.json"
    camera.write_text('{"fx": 266.7, "fy": 266.7, "cx": 31.5, "cy": 31.5, "scale": 0.0001}')
    for split, label, seeds in [
        ("train", "good", range(5)),
        ("validation", "good", range(9, 12)),
        ("test", "dent", [20]),
    ]:
        folder = root / split / label
        folder.mkdir(parents=True)
        for seed in seeds:
            part = make_part("washer", seed, defect=None if label == "good" else label, size=64)
            Image.fromarray(part.images["rgb"]).save(folder / f"{seed:03d}_rgb.png")
            counts = np.rint(part.images["depth"] * 1e4).astype(np.uint16)
            Image.fromarray(counts).save(folder / f"{seed:03d}_depth.png")
    (root / "polyspect.yaml").write_text(f"category: washer\nintrinsics: {camera}\n")
    out = tmp_path / "m.safetensors"
    where = ["--data", "folder", "--root", str(root), "--category", "washer", "--no-cache"]
    views = ["--modalities", "rgb,normals", *SMALL]
    assert main(["fit", "--detector", "patchcore", *where, *views, "--out", str(out)]) == 0
    new = tmp_path / "new"
    new.mkdir()
    for kind in ("rgb", "depth"):
        shutil.copy(root / "test" / "dent" / f"020_{kind}.png", new / f"020_{kind}.png")
    files = [str(new / "020_rgb.png"), str(new / "020_depth.png")]
    scores = []
    capsys.readouterr()
    for paths in (files, [str(new)]):
        assert main(["predict", str(out), *paths, "--intrinsics", str(camera), "--json"]) == 0
        scores.append(json.loads(capsys.readouterr().out)["parts"][0]["score"])
    assert scores[0] == pytest.approx(scores[1], rel=1e-6)
    assert "nothing says how long one count is" in refused(capsys, ["predict", str(out), *files])


def test_the_command_line_wins_over_the_config_file(pristine, tmp_path, capsys):
    config = tmp_path / "fit.yaml"
    config.write_text(
        f"detector: patchcore\nroot: {pristine}\ncategory: gear\nout: {tmp_path / 'a.safetensors'}\nmodalities: [rgb]\n"
        "prepare: {size: 64}\nset: {bank_limit: 100}\nno_cache: true\nfalse-reject: 0.2\n"
    )
    capsys.readouterr()
    assert main(["fit", "--config", str(config), "--json"]) == 0
    header = json.loads(capsys.readouterr().out)
    assert header["config"]["modalities"] == ["rgb"]
    assert header["config"]["bank_limit"] == 100
    assert header["preparation"]["size"] == 64
    assert header["calibration"]["false_reject"] == 0.2
    assert main(["fit", "--config", str(config), "--false-reject", "0.25", "--set", "bank_limit=90", "--json"]) == 0
    header = json.loads(capsys.readouterr().out)
    assert (header["config"]["bank_limit"], header["calibration"]["false_reject"]) == (90, 0.25)
    assert main(["info", str(tmp_path / "a.safetensors"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["detector"] == "patchcore"


def test_python_callers_have_the_same_road(pristine, tmp_path):
    import polyspect as ps

    model = ps.fit(
        "patchcore", root=pristine, category="gear", settings={"bank_limit": 50}, prepare={"size": 64}, max_train=3
    )
    assert model.info["data"]["train"] == 3
    model.save(tmp_path / "m.safetensors")
    results = ps.evaluate(
        ps.load(tmp_path / "m.safetensors", device="cpu"), root=pristine, category="gear", bootstrap=0
    )
    listed = list(ps.predict(model, data="mvtec3d", root=pristine, category="gear"))
    assert [part.score for part in listed] == pytest.approx([row.score for row in results.parts], rel=1e-6)


def test_data_is_listed_and_checked(parts, capsys):
    assert main(["data", "list", "--root", str(parts), "--json"]) == 0
    counts = json.loads(capsys.readouterr().out)
    assert counts["gear"]["train"] == {"good": 6}
    assert main(["data", "check", "--root", str(parts), "--prepare", "size=64"]) == 0
    assert "0 cannot" in capsys.readouterr().out
    cut(parts / "gear" / "train" / "good" / "xyz" / "002.tiff")
    assert main(["data", "check", "--root", str(parts), "--prepare", "size=64"]) == 2
    assert "002.tiff" in capsys.readouterr().out


# -- bad input: one line that names the file and the remedy, status 2, nothing half-written ---------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def drop_xyz(good: Path) -> None:
    (good / "xyz" / "001.tiff").unlink()


def truncate_tiff(good: Path) -> None:
    cut(good / "xyz" / "001.tiff")


def truncate_png(good: Path) -> None:
    cut(good / "rgb" / "001.png")


def one_channel(good: Path) -> None:
    tifffile.imwrite(good / "xyz" / "001.tiff", tifffile.imread(good / "xyz" / "001.tiff")[..., 2])


def other_size(good: Path) -> None:
    Image.new("RGB", (48, 64)).save(good / "rgb" / "001.png")


def all_zero(good: Path) -> None:
    tifffile.imwrite(good / "xyz" / "001.tiff", np.zeros((64, 64, 3), np.float32), photometric="rgb")


def all_nan(good: Path) -> None:
    tifffile.imwrite(good / "xyz" / "001.tiff", np.full((64, 64, 3), np.nan, np.float32), photometric="rgb")


DAMAGE = {
    drop_xyz: r"rgb/001\.png.* partner is missing: expected 'xyz' at .*001\.tiff.*add the file",
    truncate_tiff: r"xyz/001\.tiff.*(cut short|damaged|truncated)",
    truncate_png: r"rgb/001\.png.*(cut short|damaged|truncated)",
    one_channel: r"xyz/001\.tiff.*one channel; expected 3",
    other_size: r"rgb/001\.png.*48.*64",
    all_zero: r"train/good/001.*xyz/001\.tiff.*no valid 3D point.*on-error skip",
    all_nan: r"train/good/001.*xyz/001\.tiff.*no valid 3D point.*on-error skip",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda f: f.__name__)
def test_a_damaged_part_is_named_and_nothing_is_written(damage, parts, tmp_path, capsys):
    damage(parts / "gear" / "train" / "good")
    out = tmp_path / "out"
    out.mkdir()
    message = refused(capsys, fit_arguments(parts, out / "m.safetensors"))
    assert re.search(DAMAGE[damage], message), message
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda f: f.__name__)
def test_on_error_skip_finishes_and_lists_what_was_skipped(damage, parts, model, tmp_path, capsys):
    damage(parts / "gear" / "train" / "good")
    damage(parts / "gear" / "test" / "good")
    capsys.readouterr()
    assert main(fit_arguments(parts, tmp_path / "m.safetensors", "--on-error", "skip", "--json")) == 0
    header = json.loads(capsys.readouterr().out)
    assert [part for part, _ in header["skipped"]] == ["gear/train/good/001"]
    assert header["data"]["train"] == 5
    where = ["--root", str(parts), "--category", "gear", "--no-cache", "--bootstrap", "0"]
    assert main(["evaluate", str(model), *where, "--on-error", "skip", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert [item["id"] for item in results["skipped"]] == ["gear/test/good/001"]
    assert results["data"]["n_good"] == 2
    assert main(["predict", str(model), "--root", str(parts), "--category", "gear", "--on-error", "skip"]) == 0
    assert "skipped gear/test/good/001: " in capsys.readouterr().out


def test_wrong_names_and_files_are_refused(parts, model, tmp_path, capsys):
    out = tmp_path / "m.safetensors"
    arguments = fit_arguments(parts, out)

    def changed(old: str, new: str) -> list[str]:
        return [new if argument == old else argument for argument in arguments]

    assert "did you mean 'gear'" in refused(capsys, changed("gear", "gaer"))
    assert "unknown detector 'patchcor': did you mean 'patchcore'" in refused(capsys, changed("patchcore", "patchcor"))
    assert "did you mean 'bank_limit'" in refused(capsys, [*arguments, "--set", "bank_limt=3"])
    assert "did you mean 'size'" in refused(capsys, [*arguments, "--prepare", "sizes=3"])
    assert "is not of the form name=value" in refused(capsys, [*arguments, "--set", "bank_limit"])
    assert "does not exist" in refused(capsys, changed(str(out), str(tmp_path / "nowhere" / "m.safetensors")))
    config = tmp_path / "fit.yaml"
    config.write_text("detector: patchcore\ncategry: gear\n")
    assert "unknown key 'categry'" in refused(capsys, ["fit", "--config", str(config)])
    config.write_text("detector: [patchcore\n")
    assert "cannot be read" in refused(capsys, ["fit", "--config", str(config)])
    weights = tmp_path / "weights.pth"
    weights.write_bytes(b"not weights at all")
    assert "weights.pth" in refused(capsys, [*arguments, "--set", f"weights={weights}"])
    missing = tmp_path / "absent.pth"
    assert "absent.pth" in refused(capsys, [*arguments, "--set", f"weights={missing}"])
    half = tmp_path / "half.safetensors"
    half.write_bytes(model.read_bytes()[:20_000])
    assert "half.safetensors' is damaged or cut short" in refused(capsys, ["predict", str(half), str(parts)])
    shutil.rmtree(parts / "gear" / "train" / "good")
    (parts / "gear" / "train" / "good").mkdir()
    assert re.search(r"train.*(holds|expected)", refused(capsys, arguments))
    assert not out.exists()


def test_calibrating_on_a_test_part_is_refused(parts, tmp_path, capsys):
    test, validation = parts / "gear" / "test" / "good", parts / "gear" / "validation" / "good"
    shutil.copy(test / "rgb" / "000.png", validation / "rgb" / "001.png")
    message = refused(capsys, fit_arguments(parts, tmp_path / "m.safetensors"))
    assert "gear/validation/good/001" in message
    assert "gear/test/good/000" in message


def test_a_model_names_the_modality_it_misses(pristine, model, capsys):
    rgb = pristine / "gear" / "test" / "good" / "rgb" / "000.png"
    message = refused(capsys, ["predict", str(model), str(rgb)])
    assert "has no 'normals'" in message


def test_refusals_are_one_line_for_the_shell_too(tmp_path):
    done = run("fit", "--detector", "crdd", "--root", str(tmp_path), "--category", "x", "--out", str(tmp_path / "m"))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        f"polyspect: error: unknown detector 'crdd': did you mean 'crd'? known: {', '.join(sorted(DETECTORS))}"
    ]


def test_named_types_of_settings_are_shown_as_their_choices(capsys):
    assert main(["detectors", "mmrd", "--json"]) == 0
    settings = json.loads(capsys.readouterr().out)["settings"]
    assert settings["fusion"]["type"].startswith("Literal['alpha_sum', 'alpha_aux', 'add', 'csa'")
    assert settings["bn_momentum"]["type"] == "float | None"


def test_choices_of_a_tuple_are_shown(capsys: pytest.CaptureFixture[str]):
    assert main(["detectors", "btf", "--json"]) == 0
    settings = json.loads(capsys.readouterr().out)["settings"]
    assert settings["features"]["type"].startswith("tuple[Literal['raw', 'raw_blocks', ")


def test_modalities_that_follow_from_other_settings_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = [
        "--modalities",
        "rgb",
        "--root",
        str(tmp_path),
        "--category",
        "c",
        "--out",
        str(tmp_path / "m.safetensors"),
    ]
    assert main(["fit", "--detector", "btf", *words]) == 2
    assert "`modalities` of BTFConfig is no setting, it follows from the others" in capsys.readouterr().err
