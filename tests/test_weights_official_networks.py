"""Published networks after ``polyspect weights import``: what was written is read as the published file is."""

from __future__ import annotations

import hashlib
import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from golden import filled_state
from polyspect.backbones.point_weights import load_point_transformer
from polyspect.cli import main
from polyspect.errors import WeightsError
from polyspect.fitting.modelfile import read_header
from polyspect.weights.convert import read_file, read_metadata
from polyspect.weights.cross_modal import feature_mapping_widths
from polyspect.weights.official import FORMATS, read_network
from published_networks import POINT_MAE, POINT_MAE_ENCODER, mapping
from test_weights_cross_modal import CASES

FORMAT_OF = {
    "fusion": "m3dm-uff",
    "f2f_mlp": "cmdiad-f2f",
    "f2f_conv": "cmdiad-f2f-conv",
    "f2i_conv": "cmdiad-f2i",
    "f2i_mlp": "cmdiad-f2i-mlp",
    "i2f": "cmdiad-i2f",
    "mapping": "cfm",
    "big": "cfm",
}


def imported(folder, content, *options: str):
    """Import a made-up published file; the published and the written one."""
    source, out = folder / "published.pth", folder / "written.safetensors"
    torch.save(content, source)
    assert main(["weights", "import", str(source), "--out", str(out), *options]) == 0
    return source, out


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    shapes, build, convert, _ = CASES[request.param]
    with torch.device("meta"):
        network = build()
    files = imported(tmp_path_factory.mktemp(request.param), {"model": filled_state(shapes), "epoch": 3})
    return FORMAT_OF[request.param], *files, network, partial(convert, network=network)


def test_the_written_file_gives_the_same_tensors_as_the_published_one(case):
    published, source, out, network, convert = case
    detector = FORMATS[published].detector
    direct, again = convert(read_network(source, detector)), convert(read_network(out, detector))
    assert list(again) == list(direct) == list(network.state_dict())
    assert all(torch.equal(again[name], direct[name]) for name in direct)


def test_the_header_says_format_detector_and_hash(case):
    published, source, out, *_ = case
    about = read_header(out)["imported"]
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    detector = FORMATS[published].detector
    assert about == {"from": published, "detector": detector, "modalities": [], "sha256": digest}
    other = "cfm" if detector == "m3dm" else "m3dm"
    with pytest.raises(WeightsError, match=rf"is for detector '{detector}', not '{other}'"):
        read_network(out, other)


def rewritten(path, change):
    """The written file with other tensors and the same header."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path.with_name("changed.safetensors"), metadata=read_metadata(path))
    return path.with_name("changed.safetensors")


def test_a_written_file_that_was_changed_is_refused(case):
    published, _, out, network, convert = case
    detector, part = FORMATS[published].detector, FORMATS[published].part
    ours = next(name for name in network.state_dict() if name.endswith("weight"))
    side = {"cmdiad-f2f": "xyz.", "cmdiad-f2f-conv": "rgb."}.get(published, "")  # the direction that the case reads
    stored = f"{part}.{side}{ours}"
    for change, message in (
        (lambda tensors: tensors.pop(stored), f"has nothing for '{ours}'"),
        (lambda tensors: tensors.update({stored: torch.zeros(3, 2, 1, 1)}), rf"'{ours}' has shape \(3, 2, 1, 1\)"),
        (lambda tensors: tensors[stored].fill_(torch.nan), f"'{ours}' holds numbers that are not finite"),
        (lambda tensors: tensors.update({f"{part}.odd": torch.zeros(1)}), "has 'odd', for which"),
    ):
        with pytest.raises(WeightsError, match=message):
            convert(read_network(rewritten(out, change), detector))


def test_the_command_says_how_to_use_what_it_wrote(tmp_path, capsys):
    _, out = imported(tmp_path, filled_state(mapping(6, 4)), "--from", "cfm")
    text = capsys.readouterr().out
    assert "6 tensors, 89 parameters for detector cfm" in text
    assert f"--set checkpoint='[{out}, FILE_OF_THE_OTHER_DIRECTION]'" in text
    assert feature_mapping_widths(read_network(out, "cfm")) == (6, 4)


# -- Point-MAE ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def point_mae(tmp_path_factory):
    content = {"base_model": {f"module.{n}": x for n, x in filled_state(POINT_MAE).items()}, "optimizer": {}}
    return imported(tmp_path_factory.mktemp("point_mae"), content)


@pytest.mark.parametrize("layers", [None, (1, 3)])
def test_the_written_point_transformer_equals_the_published_one(point_mae, layers):
    source, out = (load_point_transformer("point_mae", layers=layers, weights=str(file)) for file in point_mae)
    direct, again = source.network.state_dict(), out.network.state_dict()
    assert list(again) == list(direct)
    assert all(torch.equal(again[name], direct[name]) for name in direct)
    assert (out.frame, out.source["source"]) == ("camera", "file")
    assert out.source["sha256"] == hashlib.sha256(point_mae[1].read_bytes()).hexdigest()


def test_the_published_norms_statistics_can_be_used(point_mae):
    network = load_point_transformer("point_mae", weights=str(point_mae[1]), statistics="stored").network
    expected = filled_state(POINT_MAE)["MAE_encoder.encoder.first_conv.1.running_var"]
    assert torch.equal(network.encoder.norm1.var, expected)


def test_a_point_transformer_of_another_shape_or_name_is_refused(point_mae, tmp_path):
    with pytest.raises(WeightsError, match=r"size 'base', but 'point_mae_small' is of size 'small'"):
        load_point_transformer("point_mae_small", weights=str(point_mae[1]))
    header = json.loads(read_metadata(point_mae[1])["polyspect"])
    assert header["imported"]["from"] == "point-mae"
    assert set(load_file(point_mae[1])) == set(
        load_point_transformer("point_mae", weights="random").network.state_dict()
    )
    state = filled_state(POINT_MAE_ENCODER) | {"norm.weight": torch.zeros(256)}
    _, out = imported(tmp_path, state)
    with pytest.raises(WeightsError, match=r"'norm\.weight' has shape \(256,\), the network needs \(384,\)"):
        load_point_transformer("point_mae", weights=str(out))
    assert list(read_file(out)) == list(load_file(out))
