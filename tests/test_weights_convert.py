"""Reading weight files safely and bringing their tensors to timm's names."""

import pickle
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from polyspect.errors import WeightsError
from polyspect.weights.convert import efficientnet_lite_to_timm, fit_state, is_efficientnet_lite, load_state, read_file
from polyspect.weights.resolve import resolve

PALACE, DAISY = 698, 985  # ImageNet-1k class numbers


class Evil:
    """A pickle that would write a file when opened."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.trace,)


@pytest.fixture(scope="module")
def package() -> dict[str, torch.Tensor]:
    return load_state(resolve("efficientnet_lite0").path)


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    with torch.random.fork_rng():
        return timm.create_model("tf_efficientnet_lite0").eval()


# -- reading -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_wrapped_states_are_unwrapped(tmp_path, wrapper, prefix):
    state = {f"{prefix}a.weight": torch.arange(3.0), f"{prefix}b": torch.ones(())}
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, tmp_path / "x.pth")
    loaded = load_state(tmp_path / "x.pth")
    assert list(loaded) == ["a.weight", "b"]
    assert torch.equal(loaded["a.weight"], torch.arange(3.0))


def test_module_is_kept_when_only_some_names_have_it(tmp_path):
    torch.save({"module.a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "x.pt")
    assert list(load_state(tmp_path / "x.pt")) == ["module.a", "b"]


def test_safetensors_are_read(tmp_path):
    save_file({"a": torch.arange(4.0)}, tmp_path / "x.safetensors")
    assert torch.equal(load_state(tmp_path / "x.safetensors")["a"], torch.arange(4.0))


def test_pickled_objects_are_refused_and_never_run(tmp_path):
    trace = tmp_path / "trace"
    (tmp_path / "x.pth").write_bytes(pickle.dumps(Evil(trace)))
    torch.save({"a": Evil(trace)}, tmp_path / "y.pth")
    for name in ("x.pth", "y.pth"):
        with pytest.raises(WeightsError, match=name):
            load_state(tmp_path / name)
    assert not trace.exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_truncated_files_are_an_error_with_the_file_name(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)({"a": torch.arange(1000.0)}, path)
    for size in (0, path.stat().st_size // 2):
        with open(path, "r+b") as file:
            file.truncate(size)
        with pytest.raises(WeightsError, match=re.escape(path.name)):
            load_state(path)


@pytest.mark.parametrize("content", [torch.ones(2), {}, {"a": 3}, [torch.ones(1)]])
def test_files_without_named_tensors_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match=r"x\.pth.*expected"):
        load_state(tmp_path / "x.pth")


def test_missing_file_and_odd_suffix(tmp_path):
    with pytest.raises(WeightsError, match=r"gone\.pth cannot be read"):
        load_state(tmp_path / "gone.pth")
    with pytest.raises(WeightsError, match=r"got '\.bin'"):
        load_state(tmp_path / "x.bin")


# -- EfficientNet-Lite package -> timm ---------------------------------------------------------------------------------


def test_all_247_tensors_are_used_once_in_order(package, network):
    assert is_efficientnet_lite(package)
    converted = efficientnet_lite_to_timm(package, network)
    assert len(converted) == 247
    used = [tensor.data_ptr() for tensor in converted.values()]
    assert used == [tensor.data_ptr() for name, tensor in package.items() if "num_batches" not in name]
    assert len(set(used)) == 247
    missing, unexpected = network.load_state_dict(converted, strict=False)
    assert not unexpected
    assert all(name.endswith("num_batches_tracked") for name in missing)
    assert torch.equal(network.blocks[3][1].conv_dw.weight, package["_blocks.6._depthwise_conv.weight"])
    assert torch.equal(network.bn2.running_var, package["_bn1.running_var"])


def test_any_mismatch_raises_and_names_the_pair(package, network):
    short = dict(list(package.items())[:-1])
    with pytest.raises(WeightsError, match="has 246 tensors, EfficientNet needs 247"):
        efficientnet_lite_to_timm(short, network)
    shape = package | {"_fc.weight": torch.zeros(10, 1280)}
    with pytest.raises(WeightsError, match=r"'_fc\.weight' \(10, 1280\), does not fit 'classifier\.weight'"):
        efficientnet_lite_to_timm(shape, network)
    swapped = {_swap_roles(name): tensor for name, tensor in package.items()}  # same shapes, other meaning
    with pytest.raises(WeightsError, match=r"tensor 2 of the file, '_bn0\.bias'"):
        efficientnet_lite_to_timm(swapped, network)
    with pytest.raises(WeightsError, match="needs 322"), torch.device("meta"):
        efficientnet_lite_to_timm(package, timm.create_model("tf_efficientnet_lite1"))


def _swap_roles(name: str) -> str:
    return {"_bn0.weight": "_bn0.bias", "_bn0.bias": "_bn0.weight"}.get(name, name)


def test_the_converted_network_knows_what_it_sees(package, network):
    """scikit-learn's two sample pictures: a Chinese palace and a flower (ImageNet's closest class is 'daisy')."""
    from PIL import Image as image_module
    from sklearn import datasets

    pictures = {Path(file).name: picture for file, picture in zip(*_bunch(datasets))}
    network.load_state_dict(efficientnet_lite_to_timm(package, network), strict=False)
    for name, wanted, floor in (("china.jpg", PALACE, 0.25), ("flower.jpg", DAISY, 0.15)):
        picture = image_module.fromarray(pictures[name])
        margin = (picture.width - picture.height) // 2
        square = picture.crop((margin, 0, margin + picture.height, picture.height)).resize((224, 224), 3)
        x = torch.from_numpy(np.array(square)).permute(2, 0, 1)[None]  # 1 3 H W
        with torch.inference_mode():
            probability = network((x - 127.0) / 128.0).softmax(1)[0]
        assert int(probability.argmax()) == wanted
        assert float(probability[wanted]) > floor


def _bunch(datasets) -> tuple[list[str], list[np.ndarray]]:
    bunch = datasets.load_sample_images()
    return bunch.filenames, bunch.images


# -- fitting a state to a (cut, wrapped) network -----------------------------------------------------------------------


def test_fit_state_follows_timms_wrappers_and_leaves_the_rest_out():
    state = {"stages.0.weight": torch.ones(2, 3), "stages.0.bias": torch.ones(2), "head.weight": torch.ones(5, 2)}
    wrapped = torch.nn.ModuleDict({"stages_0": torch.nn.Linear(3, 2)})
    fitted = fit_state(state, wrapped, "x.pth")
    assert set(fitted) == {"stages_0.weight", "stages_0.bias"}
    getter = torch.nn.ModuleDict({"model": torch.nn.ModuleDict({"head": torch.nn.Linear(2, 5, bias=False)})})
    assert fit_state(state, getter, "x.pth")["model.head.weight"] is state["head.weight"]


def test_fit_state_raises_on_a_missing_or_misshapen_tensor():
    network = torch.nn.Sequential(torch.nn.Linear(3, 2))
    with pytest.raises(WeightsError, match=r"x\.pth has no tensor '0\.bias' \(2,\)"):
        fit_state({"0.weight": torch.ones(2, 3)}, network, "x.pth")
    with pytest.raises(WeightsError, match=r"x\.pth: '0\.weight' has shape \(3, 2\), the network needs \(2, 3\)"):
        fit_state({"0.weight": torch.ones(3, 2), "0.bias": torch.ones(2)}, network, "x.pth")


def test_fit_state_needs_no_counters_of_batch_norm():
    norm = torch.nn.BatchNorm2d(2)
    state = {name: tensor for name, tensor in norm.state_dict().items() if "num" not in name}
    assert set(fit_state(state, norm, "x.pth")) == set(norm.state_dict())


def test_a_published_command_line_is_read_and_other_objects_are_not(tmp_path: Path):
    import argparse
    from fractions import Fraction

    state = {"w": torch.ones(2)}
    torch.save({"model": state, "args": argparse.Namespace(lr=0.1, name="uff")}, tmp_path / "uff.pth")
    assert read_file(tmp_path / "uff.pth")["args"].lr == 0.1
    assert torch.equal(load_state(tmp_path / "uff.pth")["w"], state["w"])
    torch.save({"model": state, "best_metrics": {"acc": np.float64(0.5)}}, tmp_path / "bert.pth")
    assert read_file(tmp_path / "bert.pth")["best_metrics"] == {"acc": 0.5}
    with zipfile.ZipFile(tmp_path / "bert.pth") as new, zipfile.ZipFile(tmp_path / "numpy1.pth", "w") as old:
        for name in new.namelist():  # as numpy 1 called the module
            old.writestr(name, new.read(name).replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert read_file(tmp_path / "numpy1.pth")["best_metrics"] == {"acc": 0.5}
    torch.save({"model": state, "args": argparse.Namespace(lr=Fraction(1, 3))}, tmp_path / "odd.pth")
    with pytest.raises(WeightsError, match="never run"):
        read_file(tmp_path / "odd.pth")
