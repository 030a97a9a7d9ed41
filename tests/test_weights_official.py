"""Published checkpoints under our names: every tensor used or dropped by rule, none unknown, missing or misshapen."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from polyspect.cli import main
from polyspect.data.preparation import Preparation
from polyspect.data.synthetic import write_dataset
from polyspect.detectors.crd import CRD, CRDConfig, Student
from polyspect.detectors.forward_distillation import ForwardDistillation, ForwardDistillationConfig
from polyspect.detectors.reverse_distillation import ReverseDistillation, ReverseDistillationConfig
from polyspect.errors import WeightsError
from polyspect.fitting.engine import Engine, EngineConfig
from polyspect.fitting.modelfile import FORMAT, write_tensors
from polyspect.layers.blocks import ReverseDecoder
from polyspect.layers.bottleneck import OneClassEmbedding
from polyspect.layers.flow import ConvStudent, Flow
from polyspect.model import Model
from polyspect.weights import official
from polyspect.weights.official import FORMATS, load_checkpoint, read_checkpoint
from published import (
    LITE0,
    RESNET18,
    TINY,
    WIDE_RESNET50,
    anomalib_shapes,
    crd_shapes,
    filled_state,
    meta_state,
    rd4ad_shapes,
    stfpm_shapes,
)
from published_networks import (
    POINT_MAE,
    ast_student,
    ast_teacher,
    f2f_conv,
    f2f_mlp,
    f2i_conv,
    f2i_mlp,
    fusion,
    i2f,
    mapping,
    signed_distance,
)
from tiny import TinyParts, tiny_batch

VARIANTS = [(True, True), (True, False), (False, True), (False, False)]  # filter, amplifier
DEAD = {"conv4.weight"} | {
    f"bn4.{leaf}" for leaf in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
}


class Evil:
    """A pickle that would write a file when opened."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


def students(network=TINY, filtered=True, mixed=True, names=("rgb", "depth")):
    """Our students of one CRD variant."""
    config = CRDConfig(crossmodal_filter=filtered, crossmodal_amplifier=mixed)
    return torch.nn.ModuleDict(
        {a: Student(network.widths, [b for b in names if b != a], config, network.plan) for a in names}
    )


def rd_student(network=TINY):
    student = torch.nn.Module()
    student.embedding = OneClassEmbedding(network.widths, network.plan)
    student.decoder = ReverseDecoder(network.widths, network.plan)
    return student


def trunk():
    """ResNet-18 without stage 4, under timm's names."""
    return timm.create_model("resnet18", features_only=True, out_indices=(1, 2, 3))


def crd_file(network=TINY, names=("rgb", "depth"), **variant):
    return {f"student_{a}": filled_state(crd_shapes(network, **variant), f"student_{a}.") for a in names}


def rd4ad_file(network=TINY):
    return {part: filled_state(shapes, f"{part}.") for part, shapes in rd4ad_shapes(network).items()}


def stfpm_file():
    return {"category": "bottle", "state_dict": filled_state(stfpm_shapes((2, 4, 8, 16)))}


def shrunk(shapes):
    """The names of a published network with hardly any numbers, as importing asks for no shape."""
    return filled_state({name: tuple(min(size, 3) for size in shape) for name, shape in shapes.items()})


def network_file(shapes, wrapper="model"):
    return lambda: {wrapper: shrunk(shapes), "epoch": 64}


FILES = {
    "crd": crd_file,
    "rd4ad": rd4ad_file,
    "anomalib-rd": lambda: {"epoch": 3, "state_dict": filled_state(anomalib_shapes(TINY))},
    "stfpm": stfpm_file,
    "m3dm-uff": network_file(fusion()),
    "cmdiad-f2f": network_file(f2f_mlp(2)),
    "cmdiad-f2f-conv": network_file(f2f_conv()),
    "cmdiad-f2i": network_file(f2i_conv()),
    "cmdiad-f2i-mlp": network_file(f2i_mlp()),
    "cmdiad-i2f": network_file(i2f()),
    "cfm": network_file(mapping(6, 4, big=True)),
    "point-mae": network_file(POINT_MAE, "base_model"),
    "shape-guided": lambda: {"sdf_model": filled_state(signed_distance(6)), "epoch": 64},
    "ast-teacher": lambda: {"state_dict": filled_state(ast_teacher(6, 4)), "epoch": 64},
    "ast-student": lambda: {"state_dict": filled_state(ast_student(6, 8)), "epoch": 64},
}
NETWORKS = {  # tensors that such a file must hold, counters of norms aside
    "m3dm-uff": 16,
    "cmdiad-f2f": 28,
    "cmdiad-f2f-conv": 32,
    "cmdiad-f2i": 8,
    "cmdiad-f2i-mlp": 10,
    "cmdiad-i2f": 2 * 5 + 12 * 15 + 5 + 2,
    "cfm": 14,
    "point-mae": 154,
    "shape-guided": 59,
    "ast-teacher": 40,
    "ast-student": 52,
}
EXPECTED = {  # the part of the detector that takes the file
    "crd": ("crd", students),
    "rd4ad": ("reverse_distillation", rd_student),
    "anomalib-rd": ("reverse_distillation", rd_student),
    "ast-teacher": ("ast", lambda: Flow(6, hidden=4)),
    "ast-student": ("ast", lambda: ConvStudent(6, hidden=8)),
}


def flat(content):
    """All tensors of a file under dotted names."""
    parts = {part: state for part, state in content.items() if isinstance(state, dict)}
    return {f"{part}.{name}": x for part, state in parts.items() for name, x in state.items()}


def bare(content):
    """All tensors of a file under the names that a file without any wrapper would have."""
    wrapper = next((f"{name}." for name in ("state_dict", "base_model", "model", "sdf_model") if name in content), "")
    return {name.removeprefix(wrapper): x for name, x in flat(content).items()}


def accounts_for(content, imported):
    """Every tensor of the file is among the renamed ones, the very object, or dropped, and in one of them only."""
    kept = {id(x) for x in imported.tensors.values()}
    state = content.get("state_dict") or flat(content)
    assert {name for name, x in state.items() if id(x) not in kept} == set(imported.dropped) - set(content)
    assert len(kept) == len(imported.tensors) == len(state) - len(set(imported.dropped) & set(state))


# -- names and shapes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("filtered", "mixed"), VARIANTS)
@pytest.mark.parametrize(
    ("network", "names"), [(WIDE_RESNET50, ("rgb", "depth")), (RESNET18, ("rgb", "normals"))], ids=["wide", "resnet18"]
)
def test_crd_fits_our_students_tensor_for_tensor(network, names, filtered, mixed):
    shapes = crd_shapes(network, filtered=filtered, mixed=mixed)
    if (network, filtered, mixed) == (WIDE_RESNET50, True, True):  # as counted in the published files
        assert len(shapes) == 465
        assert sum(name.endswith("num_batches_tracked") for name in shapes) == 77
    file = {f"student_{a}": meta_state(shapes) for a in names}
    imported = official.crd(file)
    accounts_for(file, imported)
    with torch.device("meta"):
        ours = students(network, filtered, mixed, names)
    wanted = {f"students.{name}": tuple(x.shape) for name, x in ours.state_dict().items()}
    assert {name: tuple(x.shape) for name, x in imported.tensors.items()} == wanted
    assert imported.parameters == sum(p.numel() for p in ours.parameters())
    assert imported.modalities == names
    dropped = set() if filtered else {f"student_{a}.bn.{name}" for a in names for name in DEAD}
    assert set(imported.dropped) == dropped
    assert all("never uses it" in why for why in imported.dropped.values())


@pytest.mark.parametrize("network", [WIDE_RESNET50, RESNET18], ids=["wide", "resnet18"])
def test_rd4ad_fits_embedding_and_decoder_tensor_for_tensor(network):
    shapes = rd4ad_shapes(network)
    if network is WIDE_RESNET50:
        assert [len(shapes[part]) for part in ("bn", "decoder")] == [84, 252]
    file = {part: meta_state(inner) for part, inner in shapes.items()}
    file["bn"]["memory.bank"] = torch.empty(3, device="meta")  # old files have such keys
    imported = official.rd4ad(file)
    accounts_for(file, imported)
    with torch.device("meta"):
        ours = rd_student(network).state_dict()
    assert {n: x.shape for n, x in imported.tensors.items()} == {f"student.{n}": x.shape for n, x in ours.items()}
    assert set(imported.dropped) == {f"bn.{name}" for name in DEAD} | {"bn.memory.bank"}
    assert imported.dropped["bn.memory.bank"] == official.MEMORY
    assert imported.modalities == ()


def test_anomalibs_file_is_rd4ads_under_other_names():
    state = meta_state(anomalib_shapes(RESNET18))
    file = {"state_dict": state, "epoch": 3, "optimizer_states": [{"state": {}}], "loops": {"fit_loop": {}}}
    imported = official.anomalib_rd(file)
    accounts_for(file, imported)
    bare = {part: meta_state(shapes) for part, shapes in rd4ad_shapes(RESNET18).items()}
    assert {n: x.shape for n, x in imported.tensors.items()} == {
        n: x.shape for n, x in official.rd4ad(bare).tensors.items()
    }
    reasons = imported.dropped
    assert reasons["model.encoder.feature_extractor.bn1.bias"] == official.TEACHER
    assert reasons["post_processor.pixel_max"] == official.THRESHOLDS
    assert reasons["model.bottleneck.conv4.weight"] == official.DEAD_PATH
    assert {name for name, why in reasons.items() if why == official.BESIDE} == {"epoch", "optimizer_states", "loops"}


def test_stfpm_is_a_resnet_trunk_under_its_usual_names():
    file = {"category": "bottle", "state_dict": meta_state(stfpm_shapes())}
    imported = official.stfpm(file)
    accounts_for(file, imported)
    with torch.device("meta"):
        ours = trunk().state_dict()
    assert {n: x.shape for n, x in imported.tensors.items()} == {f"student.{n}": x.shape for n, x in ours.items()}
    dropped = {name for name, why in imported.dropped.items() if why == official.STAGE_4}
    assert dropped == {name for name in file["state_dict"] if name.startswith("model.7.")}


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("student_rgb.bn.conv2.weight", "students.rgb.embedding.paths.0.3.weight"),
        ("student_rgb.bn.bn4.running_var", "students.rgb.embedding.paths.2.1.running_var"),
        ("student_depth.bn.bn_layer.1.conv3.weight", "students.depth.embedding.stage.1.conv3.weight"),
        ("student_rgb.decoder.layer1.0.upsample.1.bias", "students.rgb.decoder.stages.0.0.upsample.1.bias"),
        ("student_depth.decoder.w_a", "students.depth.decoder.theta.0"),
        ("student_depth.decoder.w_c", "students.depth.decoder.theta.2"),
        ("student_rgb.projector_filter.conv_a.15.weight", "students.rgb.filters.depth.scales.0.15.weight"),
        ("student_depth.projector_amply.conv_c.6.weight", "students.depth.amplifiers.rgb.scales.2.6.weight"),
    ],
)
def test_named_tensors_land_where_they_belong(theirs, ours):
    file = crd_file()
    assert official.crd(file).tensors[ours] is flat(file)[theirs]


@pytest.mark.parametrize(("position", "first"), [(32, 3), (0, 2)])
def test_asts_couplings_are_counted_with_and_without_positions(position, first):
    file = filled_state(ast_teacher(6, 4, position, kernels=(3, 3, 5)))
    imported = FORMATS["ast-teacher"].convert(file, "x.pth")
    assert imported.dropped == {}
    assert imported.tensors["teacher.blocks.2.of_second.gain"] is file[f"module_list.{first + 4}.s2.gamma"]
    Flow(6, position, 4, (3, 3, 5)).load_state_dict(
        {name.removeprefix("teacher."): tensor for name, tensor in imported.tensors.items()}
    )
    student = FORMATS["ast-student"].convert(filled_state(ast_student(6, 8)), "x.pth")
    assert student.dropped == {"gamma": official.NO_USE}


# -- what is not as it should be ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("published", FORMATS)
def test_any_single_tensor_that_is_missing_is_named(published):
    state = bare(FILES[published]())
    whole = FORMATS[published].convert(state, "x.pth")
    counters = [name for name in state if name.endswith("num_batches_tracked")]
    needed = [name for name in state if name not in whole.dropped and name not in counters]
    assert len(needed) == NETWORKS[published] if published in NETWORKS else len(needed) > 50
    for name in needed:
        rest = {key: x for key, x in state.items() if key != name}
        last = name.rpartition("student_")[2].partition(".")[2] if published == "crd" else name
        with pytest.raises(WeightsError, match=rf"^x\.pth.* lacks .*'{re.escape(last)}'"):
            FORMATS[published].convert(rest, "x.pth")


@pytest.mark.parametrize("published", FORMATS)
def test_missing_counters_are_filled_with_zero(published):
    content = FILES[published]()
    whole = FORMATS[published].convert(content, "x.pth").tensors
    for state in content.values():
        for name in [n for n in state if "num_batches" in n] if isinstance(state, dict) else []:
            del state[name]
    filled = FORMATS[published].convert(content, "x.pth").tensors
    assert filled.keys() == whole.keys()
    assert all(torch.equal(filled[name], whole[name]) and filled[name].dtype == whole[name].dtype for name in whole)


@pytest.mark.parametrize(
    ("published", "part", "name"),
    [
        ("crd", "student_rgb", "decoder.layer4.0.conv1.weight"),
        ("crd", "student_depth", "projector_merge.conv_a.0.weight"),
        ("crd", "student_rgb", "bn.memory"),
        ("rd4ad", "decoder", "w_a"),
        ("rd4ad", "decoder", "memory"),
        ("anomalib-rd", "state_dict", "model.head.weight"),
        ("stfpm", "state_dict", "model.8.weight"),
        ("m3dm-uff", "model", "xyz_mlp.fc3.weight"),
        ("cmdiad-f2f", "model", "rgb_mlp.mlp_module.0.fc4.bias"),
        ("cmdiad-f2f-conv", "model", "xyz_conv.10.weight"),
        ("cmdiad-f2i", "model", "conv5.weight"),
        ("cmdiad-f2i-mlp", "model", "xyz_norm.weight"),
        ("cmdiad-i2f", "model", "layer2.0.conv4.weight"),
        ("cfm", "model", "projection.weight"),
        ("point-mae", "base_model", "MAE_encoder.blocks.blocks.12.norm1.weight"),
        ("point-mae", "base_model", "cls_head.weight"),
        ("ast-teacher", "state_dict", "module_list.4.perm"),
        ("ast-student", "state_dict", "res.4.l3.weight"),
    ],
)
def test_a_tensor_of_no_rule_is_named(published, part, name):
    content = FILES[published]()
    content[part][name] = torch.ones(2)
    with pytest.raises(WeightsError, match=rf"has '.*{re.escape(name)}', unknown to format '{published}'"):
        FORMATS[published].convert(content, "x.pth")


def test_mixing_weights_without_an_amplifier_are_no_known_variant():
    file = crd_file(mixed=False)
    file["student_rgb"]["decoder.w_a"] = torch.ones(2)
    with pytest.raises(WeightsError, match=r"'student_rgb' has 'decoder\.w_a', unknown"):
        official.crd(file)


def test_a_live_path_is_not_dropped_for_dead():
    file = crd_file()
    for student in file.values():
        for name in [name for name in student if name.startswith("projector_filter.")]:
            del student[name]
    with pytest.raises(WeightsError, match=r"'bn\.conv4\.weight' has shape \(16, 32, 3, 3\).* takes a filter"):
        official.crd(file)


def test_crd_needs_two_students_and_nothing_beside_them():
    file = crd_file()
    with pytest.raises(WeightsError, match=r"two students .* got 1 \('student_rgb'\)"):
        official.crd({"student_rgb": file["student_rgb"]})
    with pytest.raises(WeightsError, match="'epoch' is int, expected tensors"):
        official.crd(file | {"epoch": 3})
    with pytest.raises(WeightsError, match=r"has 'teacher\.conv1\.weight', unknown"):
        official.crd(file | {"teacher": {"conv1.weight": torch.ones(1)}})


@pytest.mark.parametrize("content", [torch.ones(2), {}, [torch.ones(1)], {"a": 3}, {"bn": {"conv1.weight": 3}}])
def test_files_without_named_tensors_are_refused(content):
    with pytest.raises(WeightsError, match=r"^x\.pth.*expected (a tensor|tensors by name)"):
        official.detect(content, "x.pth")


@pytest.mark.parametrize("published", NETWORKS)
def test_every_tensor_of_a_network_is_kept_or_dropped_with_a_reason_and_finite(published):
    content = FILES[published]()
    imported = FORMATS[published].convert(content, "x.pth")
    state = next(iter(content.values()))
    kept = {name: x for name, x in state.items() if name not in imported.dropped}
    assert len(imported.tensors) == len(kept)
    assert {x.data_ptr() for x in imported.tensors.values()} == {x.data_ptr() for x in kept.values()}
    assert imported.dropped.pop("epoch") == official.BESIDE
    reasons = {name: {official.NO_USE} for name in ("cmdiad-f2i", "cmdiad-i2f", "ast-student")}
    reasons["point-mae"] = {official.PRETRAINING, official.COUNTER}
    assert set(imported.dropped.values()) == reasons.get(published, set())
    for name in kept:
        if not name.endswith("num_batches_tracked"):
            broken = {**state, name: torch.full_like(state[name], torch.nan)}
            with pytest.raises(WeightsError, match=r"^x\.pth: '.*' holds numbers that are not finite"):
                FORMATS[published].convert({**content, next(iter(content)): broken}, "x.pth")
            break


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("published", FORMATS)
@pytest.mark.parametrize("kind", ["nested.pth", "flat.safetensors", "parallel.pt", "best.pth.tar", "x.ckpt"])
def test_each_format_is_told_by_its_names(tmp_path, published, kind):
    content = FILES[published]()
    expected = FORMATS[published].convert(content, "x").tensors
    if kind == "flat.safetensors":
        save_file(bare(content), tmp_path / kind)
    else:
        start = "module." if kind == "parallel.pt" else ""
        torch.save(
            {k: {start + n: x for n, x in v.items()} if isinstance(v, dict) else v for k, v in content.items()},
            tmp_path / kind,
        )
    imported = read_checkpoint(tmp_path / kind)
    assert imported.format == published
    assert imported.detector == FORMATS[published].detector
    assert imported.tensors.keys() == expected.keys()
    assert all(torch.equal(imported.tensors[name], expected[name]) for name in expected)


@pytest.mark.parametrize("published", EXPECTED)
def test_a_checkpoint_fits_the_part_it_is_for(tmp_path, published):
    torch.save(FILES[published](), tmp_path / "x.pth")
    detector, build = EXPECTED[published]
    part = build()
    state = load_checkpoint(tmp_path / "x.pth", detector, part)
    assert list(state) == list(part.state_dict())
    part.load_state_dict(state)
    again = load_checkpoint(tmp_path / "x.pth", detector, part.state_dict(), published)
    assert all(torch.equal(again[name], x) for name, x in part.state_dict().items())


def test_pickled_objects_are_refused_and_never_run(tmp_path):
    trace = tmp_path / "trace"
    content = crd_file() | {"student_rgb": {"bn.conv1.weight": Evil(trace)}}
    torch.save(content, tmp_path / "x.pth")
    (tmp_path / "y.pth").write_bytes(pickle.dumps(Evil(trace)))
    for name in ("x.pth", "y.pth"):
        with pytest.raises(WeightsError, match=rf"{name} is damaged, or holds pickled objects"):
            read_checkpoint(tmp_path / name)
    assert not trace.exists()


def change(content, part, name, tensor):
    content[part][name] = tensor
    return content


@pytest.mark.parametrize(
    ("content", "like", "message"),
    [
        (
            crd_file(),
            students(mixed=False),
            r"has .*'rgb\.amplifiers\.depth.*no place.* for rgb, depth: choose",
        ),
        (crd_file(filtered=False), students(), r"lacks 'rgb\.filters\.depth\.scales\.0\.0\.weight'.* and \d+ more"),
        (
            crd_file(names=("rgb", "normals")),
            students(),
            r"lacks .*depth.* has .*normals.* for rgb, normals: choose",
        ),
        (crd_file(), students(LITE0), r"has 'rgb\..*choose the modalities, the backbone and the variant"),
        (
            change(crd_file(), "student_rgb", "bn.conv3.weight", torch.ones(16, 16, 1, 1)),
            students(),
            r"'rgb\.embedding\.paths\.1\.0\.weight' has shape \(16, 16, 1, 1\), the detector needs \(16, 16, 3, 3\)",
        ),
        (
            change(crd_file(), "student_rgb", "decoder.w_b", torch.ones(2, dtype=torch.int64)),
            students(),
            r"'rgb\.decoder\.theta\.1' is of type torch\.int64, the detector needs torch\.float32",
        ),
        (
            change(crd_file(), "student_depth", "decoder.w_b", torch.tensor([1.0, float("nan")])),
            students(),
            r"'depth\.decoder\.theta\.1' holds numbers that are not finite",
        ),
        (rd4ad_file(), students(), r"\(format 'rd4ad'\) is for detector 'reverse_distillation', not 'crd'"),
        ({"conv1": {"weight": torch.ones(1)}}, students(), r"of no known format\. It holds 'conv1\.weight'; known are"),
    ],
)
def test_a_file_that_does_not_fit_says_where(tmp_path, content, like, message):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match=rf"checkpoint .*x\.pth.*{message}"):
        load_checkpoint(tmp_path / "x.pth", "crd", like)


def test_a_named_format_is_the_only_one_tried(tmp_path):
    torch.save(crd_file(), tmp_path / "x.pth")
    with pytest.raises(WeightsError, match="unknown checkpoint format 'crdd': did you mean 'crd'"):
        read_checkpoint(tmp_path / "x.pth", "crdd")
    with pytest.raises(WeightsError, match="unknown to format 'rd4ad'"):
        read_checkpoint(tmp_path / "x.pth", "rd4ad")


# -- the command -------------------------------------------------------------------------------------------------------


def refused(capsys, *arguments):
    assert main(list(arguments)) == 2
    return capsys.readouterr().err


def test_import_writes_the_same_tensors_with_their_origin(tmp_path, capsys):
    source, out = tmp_path / "published.pth", tmp_path / "new" / "students.safetensors"
    torch.save(crd_file(filtered=False), source)
    command = ["weights", "import", "--from", "crd", str(source), "--out", str(out)]
    assert main(command) == 0
    text, first = capsys.readouterr().out, out.read_bytes()
    ours = students(filtered=False)
    numbers = sum(p.numel() for p in ours.parameters())
    assert f"{len(ours.state_dict())} tensors, {numbers:,} parameters for detector crd, modalities rgb,depth" in text
    assert "dropped 12 (student_rgb.bn.conv4.weight, student_rgb.bn.bn4.weight, " in text
    assert official.DEAD_PATH in text
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    assert main([*command, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    about = {"from": "crd", "detector": "crd", "modalities": ["rgb", "depth"], "sha256": digest}
    assert shown["parameters"] == numbers
    assert {key: shown[key] for key in about} == about
    assert out.read_bytes() == first
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    with safe_open(out, framework="pt") as file:
        assert json.loads(file.metadata()["polyspect"]) == {"format": FORMAT, "imported": about}
    here, there = load_checkpoint(out, "crd", ours), load_checkpoint(source, "crd", ours)
    assert here.keys() == there.keys()
    assert all(torch.equal(here[name], there[name]) for name in here)
    assert read_checkpoint(out).modalities == ("rgb", "depth")
    assert main(["info", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["imported"] == about


def test_import_refuses_what_it_cannot_do(tmp_path, capsys):
    source, out = tmp_path / "published.pth", tmp_path / "students.safetensors"
    torch.save(crd_file(), source)
    start = ["weights", "import", str(source)]
    assert "--out must name a .safetensors file" in refused(capsys, *start, "--out", str(tmp_path / "x.pth"))
    same = ["weights", "import", str(out), "--out", str(out.parent / "." / out.name)]
    assert "another file than the published one" in refused(capsys, *same)
    assert "did you mean 'rd4ad'" in refused(capsys, *start, "--from", "rd4", "--out", str(out))
    gone = ["weights", "import", str(tmp_path / "gone.pth")]
    assert "gone.pth cannot be read" in refused(capsys, *gone, "--out", str(out))
    (tmp_path / "file").write_text("")
    assert "cannot write" in refused(capsys, *start, "--out", str(tmp_path / "file" / "x.safetensors"))
    assert not out.exists()
    assert main([*start, "--out", str(out)]) == 0
    assert "dropped nothing" in capsys.readouterr().out
    again = ["weights", "import", str(out), "--out", str(tmp_path / "b.safetensors")]
    assert "is imported already" in refused(capsys, *again)
    with pytest.raises(WeightsError, match="was imported from format 'crd', not 'rd4ad'"):
        read_checkpoint(out, "rd4ad")
    assert "holds an imported checkpoint, no fitted model" in refused(capsys, "predict", str(out), str(tmp_path))


@pytest.mark.parametrize(
    "header",
    [{"format": 1, "detector": "crd"}, {"imported": 3}, {"imported": {"from": "x"}}, {"imported": {"from": "crd"}}],
)
def test_other_files_of_ours_are_no_checkpoint(tmp_path, header):
    write_tensors(tmp_path / "x.safetensors", {"a": torch.ones(1)}, header)
    with pytest.raises(WeightsError, match=r"written by polyspect but is no imported checkpoint"):
        read_checkpoint(tmp_path / "x.safetensors")


# -- CRD behind a checkpoint -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lite0_file(tmp_path_factory):
    """Published names at the widths of the default backbone."""
    path = tmp_path_factory.mktemp("published") / "lite0.pth"
    torch.save(crd_file(LITE0), path)
    return path


def test_a_fit_with_a_checkpoint_measures_levels_and_trains_nothing(lite0_file, tmp_path):
    path = Path(tmp_path / "students.pth")
    path.write_bytes(lite0_file.read_bytes())
    detector = CRD(CRDConfig(weights="random", checkpoint=str(path)))
    assert [stage.name for stage in detector.stages()] == ["map_levels"]
    assert [stage.name for stage in CRD(CRDConfig(weights="random")).stages()] == ["students", "map_levels"]
    parts = TinyParts(range(4))
    Engine(EngineConfig(device="cpu", block=2)).fit(detector, {"train": parts, "validation": parts})
    expected = official.crd(torch.load(path, weights_only=True)).tensors
    fitted = {name: x for name, x in detector.state_dict().items() if name.startswith("students.")}
    assert fitted.keys() == expected.keys()
    assert all(torch.equal(fitted[name], expected[name]) for name in expected)
    assert (detector.map_mean > 0).all()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert detector.sources == {"students": {"name": "checkpoint", "source": "file", "sha256": digest}}
    prediction = detector(tiny_batch([7, 8]))
    assert torch.isfinite(prediction.map).all()
    assert prediction.score[0] != prediction.score[1]
    path.unlink()  # a model holds its tensors: nothing is read again
    assert torch.equal(reloaded(detector, tmp_path)(tiny_batch([7, 8])).score, prediction.score)


def reloaded(detector, folder):
    return Model.load(Model("crd", detector, Preparation()).save(folder / "m.safetensors"), device="cpu").detector


def test_a_checkpoint_of_another_network_or_none_is_an_error(lite0_file, tmp_path):
    with pytest.raises(WeightsError, match=r"lite0\.pth lacks 'rgb\.filters\.normals.* students are for rgb, depth: "):
        CRD(CRDConfig(weights="random", modalities=("rgb", "normals"), checkpoint=str(lite0_file)))
    with pytest.raises(WeightsError, match=r"gone\.pth cannot be read"):
        CRD(CRDConfig(weights="random", checkpoint=str(tmp_path / "gone.pth")))


def test_the_command_line_fits_behind_an_imported_checkpoint(lite0_file, tmp_path, capsys):
    write_dataset(tmp_path / "parts", ["gear"], train=2, validation=3, test_good=1, test_per_defect=1, size=64, seed=3)
    students_file, model = tmp_path / "students.safetensors", tmp_path / "gear.safetensors"
    assert main(["weights", "import", str(lite0_file), "--out", str(students_file)]) == 0
    where = ["--root", str(tmp_path / "parts"), "--category", "gear", "--out", str(model), "--no-cache"]
    settings = ["--set", f"checkpoint={students_file}", "--prepare", "size=64"]
    assert main(["fit", "--detector", "crd", "--preset", "fast", *where, *settings]) == 0
    capsys.readouterr()
    assert main(["info", str(model), "--json"]) == 0
    weights = json.loads(capsys.readouterr().out)["weights"]
    assert set(weights) == {"teacher", "students"}
    assert weights["students"]["sha256"] == hashlib.sha256(students_file.read_bytes()).hexdigest()


# -- single students behind a checkpoint -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "content", "convert"),
    [
        (
            lambda path: ReverseDistillation(ReverseDistillationConfig(weights="random", checkpoint=path)),
            lambda: rd4ad_file(LITE0),
            official.rd4ad,
        ),
        (
            lambda path: ForwardDistillation(
                ForwardDistillationConfig(weights="random", backbone="resnet18", checkpoint=path)
            ),
            lambda: {"category": "bottle", "state_dict": filled_state(stfpm_shapes())},
            official.stfpm,
        ),
    ],
    ids=["reverse_distillation", "forward_distillation"],
)
def test_a_single_student_is_used_as_it_is(tmp_path, make, content, convert):
    path = tmp_path / "student.pth"
    torch.save(content(), path)
    detector = make(str(path))
    assert detector.stages() == []
    parts = TinyParts(range(2))
    Engine(EngineConfig(device="cpu", block=2)).fit(detector, {"train": parts, "validation": parts})
    expected = convert(content()).tensors
    fitted = {name: x for name, x in detector.state_dict().items() if name.startswith("student.")}
    assert fitted.keys() == expected.keys()
    assert all(torch.equal(fitted[name], expected[name]) for name in expected)
    assert detector.sources["student"]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert torch.isfinite(detector(tiny_batch([7])).map).all()
