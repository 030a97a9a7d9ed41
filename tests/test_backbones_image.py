"""Frozen image backbones: equal to plain timm, cut at the right place, frozen, and leaving the RNG alone."""

import random

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from torch.testing import assert_close

from polyspect.backbones import image as image_module
from polyspect.backbones.folding import fold_batch_norm
from polyspect.backbones.image import DEFAULT_BACKBONE, ImageBackbone, default_backbone, last_stages
from polyspect.errors import ConfigError, ShapeError, WeightsError
from polyspect.weights.convert import load_state
from polyspect.weights.resolve import resolve


@pytest.fixture(scope="module")
def lite() -> ImageBackbone:
    return ImageBackbone()


@pytest.fixture(scope="module")
def res() -> ImageBackbone:
    return ImageBackbone("resnet18.tv_in1k", weights="random", seed=3)


def pictures(count: int, size: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def plain(name: str, **options: object) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(11)
        return timm.create_model(name, **options).eval()


# -- the right numbers -------------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_default_features_equal_timms_network_with_the_package_tensors(lite):
    whole = plain("tf_efficientnet_lite0")
    tensors = [t for name, t in load_state(resolve("efficientnet_lite0").path).items() if "num_batches" not in name]
    names = [name for name in whole.state_dict() if "num_batches" not in name]
    whole.load_state_dict(dict(zip(names, tensors)), strict=False)
    x = pictures(2, 96)
    expected = whole.forward_intermediates((x * 255 - 127) / 128, indices=[1, 2, 3], intermediates_only=True)
    for got, want in zip(lite(x), expected, strict=True):
        assert_close(got, want, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_features_equal_timms_features_only_network(res):
    reference = plain("resnet18", features_only=True, out_indices=(1, 2, 3))
    reference.load_state_dict(res.network.state_dict(), strict=True)  # timm's own tensor names
    x = pictures(2)
    for got, want in zip(res.features(x), reference(x), strict=True):
        assert_close(got, want, rtol=1e-5, atol=1e-5)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normalised = (x - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)
    for got, want in zip(res(x), reference(normalised), strict=True):
        assert_close(got, want, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_networks_that_answer_channels_last_are_permuted():
    swin = ImageBackbone("swin_tiny_patch4_window7_224", weights="random")
    x = pictures(1, 224)
    raw = swin.network(x)
    assert raw[0].shape == (1, 56, 56, 96)
    for got, want in zip(swin.features(x), raw, strict=True):
        assert_close(got, want.permute(0, 3, 1, 2))
        assert got.is_contiguous()
    assert swin.channels == (96, 192, 384)
    assert [f.shape[-1] for f in swin(pictures(1, 256))] == [64, 32, 16]  # another size than its training's


@torch.inference_mode()
def test_final_norm_gives_the_patch_tokens_behind_the_networks_norm():
    backbone = ImageBackbone("vit_tiny_patch16_224", (16,), weights="random", final_norm=True)
    whole = plain("vit_tiny_patch16_224")
    tensors = {name.removeprefix("network.model."): t for name, t in backbone.state_dict().items()}
    left = whole.load_state_dict({n: t for n, t in tensors.items() if n not in ("mean", "std")}, strict=False)
    assert left.missing_keys == ["head.weight", "head.bias"]
    x = pictures(1, 224)
    tokens = whole.forward_features(x)[:, 1:]  # (1, 196, 192), without the class token
    assert_close(backbone.features(x)[0], tokens.transpose(1, 2).view(1, 192, 14, 14), rtol=1e-5, atol=1e-5)
    assert backbone(pictures(1, 256))[0].shape == (1, 192, 16, 16)
    with pytest.raises(ConfigError, match="no final norm"):
        ImageBackbone("resnet18", weights="random", final_norm=True)


def test_wide_resnet50_up_to_stage_3_has_24862528_parameters():
    wide = ImageBackbone("wide_resnet50_2.tv_in1k", weights="random")
    assert sum(p.numel() for p in wide.parameters()) == 24_862_528
    assert wide.channels == (256, 512, 1024)
    assert wide.nonneg


def test_stages_behind_the_deepest_wanted_one_are_cut(lite):
    names = list(lite.network.state_dict())
    assert names[0] == "conv_stem.weight"
    assert {name.split(".")[1] for name in names if name.startswith("blocks")} == {"0", "1", "2", "3", "4"}
    shallow = ImageBackbone(reductions=(4,))
    assert sum(p.numel() for p in shallow.parameters()) < sum(p.numel() for p in lite.parameters()) / 10
    x = pictures(1)
    assert_close(shallow(x)[0], lite(x)[0])


@pytest.mark.parametrize("size", [(64, 64), (64, 96), (60, 64)])
def test_shapes(lite, size):
    outputs = lite(torch.zeros(2, 3, *size))
    assert lite.channels == (24, 40, 112)
    for output, channels, r in zip(outputs, lite.channels, lite.reductions, strict=True):
        assert output.shape == (2, channels, -(-size[0] // r), -(-size[1] // r))
        assert output.is_contiguous()


@torch.inference_mode()
def test_batch_of_one_equals_batch_of_many(lite, res):
    x = pictures(3)
    for backbone in (lite, res):
        many = backbone(x)
        for i in range(3):
            for one, all_ in zip(backbone(x[i : i + 1]), many, strict=True):
                assert_close(one[0], all_[i], rtol=1e-5, atol=1e-5)


def test_nonneg_is_true_for_relu_outputs_only(lite, res):
    assert res.nonneg
    assert not lite.nonneg


def test_default_network_is_the_one_its_weights_were_trained_in(lite):
    """TensorFlow's padding and epsilon; (x - 127) / 128 of 8-bit values."""
    assert type(lite.network.conv_stem).__name__ == "Conv2dSame"
    assert lite.network.bn1.eps == 1e-3
    assert_close((torch.tensor(200 / 255) - lite.mean) / lite.std, torch.full((1, 3, 1, 1), 73 / 128))


def test_default_backbone_is_the_offline_one():
    assert default_backbone((8,)).name == DEFAULT_BACKBONE == "efficientnet_lite0"


# -- where weights come from -------------------------------------------------------------------------------------------


def test_weights_source_is_recorded(lite, res):
    assert lite.weights_source == {
        "name": "efficientnet_lite0",
        "source": "package",
        "sha256": "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    }
    assert res.weights_source == {"name": "resnet18.tv_in1k", "source": "random", "sha256": ""}


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_file_is_loaded(tmp_path, wrapped):
    whole = plain("resnet18")
    state = whole.state_dict()
    if wrapped:
        path = tmp_path / "mine.pth"
        torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, path)
    else:
        path = tmp_path / "mine.safetensors"
        save_file(state, path)
    backbone = ImageBackbone("resnet18.tv_in1k", weights=str(path))
    assert backbone.weights_source["source"] == "file"
    expected = plain("resnet18", features_only=True, out_indices=(1, 2, 3))
    expected.load_state_dict(state, strict=False)
    for got, want in zip(backbone.features(pictures(1)), expected(pictures(1)), strict=True):
        assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_a_file_of_another_network_is_refused(tmp_path):
    torch.save(plain("resnet18").state_dict(), tmp_path / "mine.pth")
    with pytest.raises(WeightsError, match=r"'resnet34': .*mine\.pth has no tensor 'layer1\.2\.conv1\.weight'"):
        ImageBackbone("resnet34", weights=str(tmp_path / "mine.pth"))


def test_weights_that_cannot_be_had_raise_instead_of_a_random_network(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("POLYSPECT_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    with pytest.raises(WeightsError, match=r"Put resnet18-f37072fd\.pth into"):
        ImageBackbone("resnet18.tv_in1k")


def test_pretrained_false_looks_nowhere_and_has_the_same_build(monkeypatch, lite):
    def refuse(*_: object) -> None:
        raise AssertionError("weights were looked for")

    monkeypatch.setattr(image_module, "resolve", refuse)
    empty = ImageBackbone(pretrained=False)
    assert empty.weights_source["source"] == "none"
    assert empty.nonneg == lite.nonneg
    empty.load_state_dict(lite.state_dict(), strict=True)
    for got, want in zip(empty(pictures(1)), lite(pictures(1)), strict=True):
        assert torch.equal(got, want)


# -- frozen, and quiet -------------------------------------------------------------------------------------------------


def test_random_weights_follow_the_seed_and_leave_every_rng_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    one, same, other = (ImageBackbone("resnet18", (4,), weights="random", seed=seed) for seed in (1, 1, 2))
    ImageBackbone(reductions=(4,))
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1]  # noqa: NPY002
    assert torch.equal(before[0], after[0])
    assert before[1] == after[1]
    assert np.array_equal(before[2], after[2])
    assert torch.equal(one.network.conv1.weight, same.network.conv1.weight)
    assert not torch.equal(one.network.conv1.weight, other.network.conv1.weight)


def test_train_keeps_eval_mode_and_statistics():
    backbone = ImageBackbone("resnet18", (4,), weights="random")
    parent = nn.Sequential(backbone)
    parent.train()
    assert parent.training
    assert not any(module.training for module in backbone.modules())
    before = backbone.network.bn1.running_mean.clone()
    backbone(pictures(2))
    assert torch.equal(backbone.network.bn1.running_mean, before)
    assert not any(p.requires_grad for p in backbone.parameters())


def test_statistics_of_batch_norm_may_be_edited(res):
    backbone = ImageBackbone("resnet18", (4,), weights="random")
    before = backbone(pictures(1))[0]
    backbone.network.bn1.running_mean += 1.0
    assert not torch.equal(backbone(pictures(1))[0], before)


def test_bad_requests_say_what_there_is(lite):
    with pytest.raises(ConfigError, match=r"reductions \[2, 4, 8, 16, 32\], asked for \[4, 5\]"):
        last_stages("resnet18", (4, 5))
    for wanted in ((), (4, 4)):
        with pytest.raises(ConfigError, match="each once"):
            last_stages("resnet18", wanted)
    with pytest.raises(ConfigError, match="did you mean resnet18"):
        ImageBackbone("resnet_18")
    with pytest.raises(ConfigError, match="no regular grid"):
        ImageBackbone("inception_v3", (4,), weights="random")
    with pytest.raises(ShapeError, match="images"):
        lite(torch.zeros(1, 1, 64, 64))


def test_reductions_are_answered_shallow_first():
    assert [stage.reduction for stage in last_stages("resnet18", (16, 4))] == [4, 16]
    assert [stage.number for stage in last_stages("vit_tiny_patch16_224", (16,))] == [11]  # the last of twelve


# -- folding -----------------------------------------------------------------------------------------------------------


class Tiny(nn.Module):
    """Convolution and norm, in data order or (wrongly) registered in another."""

    def __init__(self, true_order: bool) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.true_order = true_order
        nn.init.constant_(self.conv.weight, 0.5)
        nn.init.constant_(self.conv.bias, 1.0)
        self.norm.running_mean.fill_(2.0)
        self.norm.running_var.fill_(4.0 - 1e-5)
        nn.init.constant_(self.norm.weight, 3.0)
        nn.init.constant_(self.norm.bias, 0.25)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [self.norm(self.conv(x)) if self.true_order else self.conv(self.norm(x))]


def test_folding_by_hand():
    tiny = Tiny(true_order=True).eval()
    assert fold_batch_norm(tiny, pictures(1, 4)) == 1
    assert_close(tiny.conv.weight, torch.full((3, 3, 1, 1), 0.75))  # 0.5 * 3 / sqrt(4)
    assert_close(tiny.conv.bias, torch.full((3,), -1.25))  # (1 - 2) * 3 / 2 + 0.25
    assert isinstance(tiny.norm, nn.Identity)


def test_folding_what_does_not_belong_together_is_noticed():
    with pytest.raises(ConfigError, match="use this backbone without fold_bn"):
        fold_batch_norm(Tiny(true_order=False).eval(), pictures(1, 4))
    with pytest.raises(ConfigError, match="0 batch norms"):
        fold_batch_norm(nn.Sequential(nn.Conv2d(3, 3, 1)), pictures(1, 4))


@torch.inference_mode()
def test_folded_backbone_has_the_same_features_and_no_statistics(lite):
    folded = ImageBackbone(fold_bn=True)
    assert not any("running" in name for name in folded.state_dict())
    for got, want in zip(folded(pictures(2)), lite(pictures(2)), strict=True):
        assert float((got - want).abs().max()) < 1e-5 * float(want.abs().max())
    empty = ImageBackbone(fold_bn=True, pretrained=False)
    empty.load_state_dict(folded.state_dict(), strict=True)
    assert torch.equal(empty(pictures(1))[2], folded(pictures(1))[2])


# -- EfficientNets cut inside a reduction, and their padding -----------------------------------------------------------


@torch.inference_mode()
def test_an_efficientnet_ends_behind_any_of_its_blocks(lite):
    whole = ImageBackbone("efficientnet_lite0", (8, 16))
    cut = ImageBackbone("efficientnet_lite0", (8, 16), blocks=4)
    x = pictures(1, 96)
    shallow, deep = cut(x)
    assert cut.channels == (40, 80)
    assert torch.equal(shallow, whole(x)[0])
    assert_close(whole.network.blocks[4](deep), whole(x)[1])
    for count in (3, 6):
        with pytest.raises(ConfigError, match=rf"must be in 4\.\.5 for this reduction .*got {count}"):
            ImageBackbone("efficientnet_lite0", (8, 16), blocks=count, weights="random")
    with pytest.raises(ConfigError, match="'resnet18' is neither"):
        ImageBackbone("resnet18", (16,), blocks=2, weights="random")


@torch.inference_mode()
def test_a_fixed_padding_is_that_of_the_size_it_was_fixed_for():
    free = ImageBackbone("efficientnet_lite0", (16,))
    fixed = ImageBackbone("efficientnet_lite0", (16,), padded_for=72)
    assert free.network.state_dict().keys() == fixed.network.state_dict().keys()
    around = [m.around for m in fixed.network.modules() if hasattr(m, "around")]
    assert around == [(0, 1, 0, 1), (0, 1, 0, 1), (1, 2, 1, 2), (1, 1, 1, 1)]  # sides 72, 36, 18, 9
    at_72, at_96 = pictures(1, 72), pictures(1, 96)
    assert_close(fixed(at_72)[0], free(at_72)[0])
    assert fixed(at_96)[0].shape == free(at_96)[0].shape
    assert (fixed(at_96)[0] - free(at_96)[0]).abs().max() > 0.01
    with pytest.raises(ConfigError, match='no convolution with TensorFlow\'s "same" padding'):
        ImageBackbone("resnet18", (16,), weights="random", padded_for=72)


def test_asts_features_of_efficientnet_b5():
    backbone = ImageBackbone("tf_efficientnet_b5.aa_in1k", (32,), weights="random", blocks=6, padded_for=456)
    assert backbone.channels == (304,)
    assert [len(stage) for stage in backbone.network.blocks] == [3, 5, 5, 7, 7, 9]
    around = {name: m.around for name, m in backbone.network.named_modules() if hasattr(m, "around")}
    odd, even, wide = (1, 1, 1, 1), (0, 1, 0, 1), (1, 2, 1, 2)  # as the released program pads 768 pixels
    assert around == {
        "conv_stem": even, "blocks.1.0.conv_dw": even, "blocks.2.0.conv_dw": wide,
        "blocks.3.0.conv_dw": odd, "blocks.5.0.conv_dw": (2, 2, 2, 2),
    }  # fmt: skip
    assert backbone.to("meta")(torch.empty(1, 3, 768, 768, device="meta"))[0].shape == (1, 304, 24, 24)
