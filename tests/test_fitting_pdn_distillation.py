"""Distillation of patch description networks: the targets, the same bits after a kill, and what the file says."""

from __future__ import annotations

import json
import math
import re

import cv2
import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from polyspect.backbones.pdn_weights import load_patch_description
from polyspect.cli import main
from polyspect.data.image_folder import ImageFolder
from polyspect.data.made_up_images import MadeUpImages
from polyspect.errors import ConfigError, DataError, WeightsError
from polyspect.fitting.pdn_distillation import (
    PAPER,
    DistillationConfig,
    PatchTargets,
    augment,
    distil,
    draw_batch,
    explained,
    measure_targets,
    pooling_kernel,
    write_network,
)
from polyspect.fitting.updates import learning_rate
from polyspect.weights.convert import load_state, read_metadata
from polyspect.weights.known import KNOWN

QUICK = {"steps": 4, "batch_size": 2, "pixels": 36, "statistics": 4, "warmup": 0.0}


class Tiles:
    """Coloured chequers, without files and without drawing."""

    def __init__(self, count: int = 5) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def picture(self, index: int) -> np.ndarray:
        rng = np.random.default_rng(index)
        small = rng.integers(0, 256, (12, 10, 3), dtype=np.uint8)
        return small.repeat(5, axis=0).repeat(5, axis=1)

    def about(self) -> dict:
        return {"source": "tiles", "count": self.count}


def state(distilled) -> dict[str, torch.Tensor]:
    return dict(distilled.network.state_dict())


# -- the targets -------------------------------------------------------------------------------------------------------


def test_the_kernels_pool_patches_as_patchcore_and_efficientad_do():
    """Equations 1 and 2, written out: unfold, average to `middle` per level, join, average to the outputs."""
    fine = torch.randn(2, 5, 6, 6, generator=torch.Generator().manual_seed(0))
    coarse = torch.randn(2, 11, 3, 3, generator=torch.Generator().manual_seed(1))
    middle, outputs = 64, 12
    rows = []
    for level in (fine, coarse):
        B, C, h, w = level.shape
        patches = F.unfold(level, 3, padding=1).reshape(B, C * 9, h * w).transpose(1, 2)  # B h*w C*9
        pooled = F.adaptive_avg_pool1d(patches, middle).transpose(1, 2).reshape(B, middle, h, w)
        rows.append(F.interpolate(pooled, size=(6, 6), mode="bilinear", align_corners=False))
    joined = torch.cat(rows, dim=1).flatten(2).transpose(1, 2)  # B 36 2*middle
    expected = F.adaptive_avg_pool1d(joined, outputs).transpose(1, 2).reshape(2, outputs, 6, 6)
    ours = []
    for level in (fine, coarse):
        answer = F.conv2d(level, pooling_kernel(level.shape[1], middle, outputs // 2), padding=1)
        ours.append(F.interpolate(answer, size=(6, 6), mode="bilinear", align_corners=False))
    assert_close(torch.cat(ours, dim=1), expected, rtol=1e-5, atol=1e-5)


def test_a_kernel_of_few_numbers_by_hand():
    kernel = pooling_kernel(1, 9, 3).reshape(3, 9)  # nine numbers stay nine, then three means of three
    assert_close(kernel, torch.eye(3).repeat_interleave(3, dim=1) / 3)


def test_targets_have_mean_zero_and_deviation_one_over_the_pictures_measured():
    config = DistillationConfig(**QUICK | {"statistics": 6, "batch_size": 6})
    targets = PatchTargets(config)
    measure_targets(targets, [Tiles()], config)
    _, enlarged = draw_batch([Tiles()], config, 0, stream=2)
    answer = targets(enlarged, 9)
    assert answer.shape == (6, 384, 1, 1)  # nine cells without four on either side
    assert_close(answer.mean((0, 2, 3)), torch.zeros(384), rtol=0, atol=1e-4)
    assert_close(answer.square().mean((0, 2, 3)), torch.ones(384), rtol=0, atol=1e-3)
    whole = PatchTargets(DistillationConfig(**QUICK | {"padding": True}))
    whole.mean.copy_(targets.mean)
    whole.std.copy_(targets.std)
    assert_close(whole(enlarged, 9)[:, :, 4:5, 4:5], answer)


def test_pictures_of_one_colour_are_refused():
    class Grey(Tiles):
        def picture(self, index: int) -> np.ndarray:
            return np.full((40, 40, 3), 90, np.uint8)

    with pytest.raises(DataError, match="channels of 'efficientnet_lite0' have one value"):
        distil([Grey()], DistillationConfig(**QUICK | {"colour": 0.0}), device="cpu")
    with pytest.raises(DataError, match="no picture"):
        distil([], DistillationConfig(**QUICK), device="cpu")


# -- the recipe --------------------------------------------------------------------------------------------------------


def test_the_papers_settings():
    config = DistillationConfig(**PAPER)
    assert (config.size, config.outputs, config.pixels, config.enlarge, config.padding) == ("small", 384, 256, 2, True)
    assert (config.steps, config.batch_size, config.weight_decay, config.grey) == (60_000, 16, 1e-5, 0.1)
    assert (config.backbone, config.reductions, config.middle) == ("wide_resnet101_2.tv_in1k", (8, 16), 1024)
    assert {learning_rate(config, step) for step in (0, 1, 30_000, 59_999)} == {1e-4}


def test_the_papers_pictures_are_whole_and_only_ever_lose_their_colours():
    config, image = DistillationConfig(**PAPER), torch.tensor(Tiles().picture(0)).permute(2, 0, 1) / 255
    grey = (torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1) * image).sum(0)
    lost = 0
    for seed in range(200):
        changed = augment(image, config, torch.Generator().manual_seed(seed))
        if torch.equal(changed, image):
            continue
        lost += 1
        assert_close(changed, grey.expand(3, -1, -1))
    assert 10 <= lost <= 32  # of 200, one in ten


def test_views_are_cut_flipped_and_changed_in_colour_within_bounds():
    config = DistillationConfig(crop=(0.5, 0.9), colour=0.0, grey=0.0)
    image = torch.arange(60.0 * 50).reshape(1, 60, 50).expand(3, -1, -1)
    sides, signs = [], set()
    for seed in range(80):
        view = augment(image, config, torch.Generator().manual_seed(seed))[0]
        sides.append(len(view) / 60)
        signs.add((bool(view[1, 0] > view[0, 0]), bool(view[0, 1] > view[0, 0])))
        assert abs(view.shape[1] / 50 - sides[-1]) < 0.02
        assert torch.equal(view.flatten().sort().values, view.flatten().unique())  # pixels of the picture, each once
    assert 0.5 <= min(sides) < 0.56
    assert 0.84 < max(sides) <= 0.9
    assert len(signs) == 4
    bright = DistillationConfig(colour=0.3, crop=(1, 1), flip=False, grey=0.0)
    even = torch.full((3, 4, 4), 0.5)  # contrast and saturation leave an even grey alone
    levels = [float(augment(even, bright, torch.Generator().manual_seed(s)).mean()) for s in range(60)]
    assert 0.35 <= min(levels) < 0.4
    assert 0.6 < max(levels) <= 0.65


def test_every_source_gives_as_many_pictures_and_both_sizes_show_the_same():
    seen = {"few": 0, "many": 0}

    class Counted(Tiles):
        def __init__(self, name: str, count: int) -> None:
            super().__init__(count)
            self.name = name

        def picture(self, index: int) -> np.ndarray:
            seen[self.name] += 1
            return super().picture(index)

    config = DistillationConfig(**QUICK)
    for step in range(50):
        image, enlarged = draw_batch([Counted("few", 1), Counted("many", 1000)], config, step)
    assert 35 <= seen["few"] <= 65
    assert (tuple(image.shape), tuple(enlarged.shape)) == ((2, 3, 36, 36), (2, 3, 72, 72))
    assert float((F.avg_pool2d(enlarged, 2) - image).abs().mean()) < 0.02
    assert float(image.min()) >= 0
    assert float(image.max()) <= 1


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"pixels": 32}, "at least 36"),
        ({"pixels": 42}, "multiple of 4"),
        ({"steps": 0}, "`steps` must be at least 1"),
        ({"outputs": 385}, "shared equally"),
        ({"crop": (0.9, 0.5)}, "`crop`"),
        ({"colour": 1.0}, "colour in"),
        ({"lr": 0.0}, "lr > 0"),
        ({"precision": "half"}, "32-true or bf16-mixed"),
        ({"size": "large"}, "small"),
        ({"backbone": "efficientnet_lite9"}, "unknown backbone"),
        ({"reductions": (4, 7)}, "reductions"),
    ],
)
def test_settings_out_of_range_are_refused(wrong, match):
    with pytest.raises(ConfigError, match=match):
        distil([Tiles()], DistillationConfig(**{**QUICK, **wrong}), device="cpu")


# -- the run -----------------------------------------------------------------------------------------------------------


def test_a_resumed_run_ends_in_the_same_bits(tmp_path):
    config = DistillationConfig(**QUICK)
    whole = distil([Tiles()], config, device="cpu")
    file = tmp_path / "run.safetensors"
    first = distil([Tiles()], config, device="cpu", checkpoint=file, stop_after=2)
    assert not torch.equal(first.network.convolutions[0].weight, whole.network.convolutions[0].weight)
    torch.manual_seed(12345)  # what the process did in between does not matter
    second = distil([Tiles()], config, device="cpu", checkpoint=file, resume=True)
    assert all(torch.equal(tensor, state(second)[name]) for name, tensor in state(whole).items())
    assert torch.equal(second.targets.mean, whole.targets.mean)
    assert torch.equal(second.targets.std, whole.targets.std)
    assert second.curve == whole.curve
    assert second.curve[-1][0] == 4
    with pytest.raises(ConfigError, match=r"from another run \(other settings, seed or data\)"):
        distil([Tiles(6)], config, device="cpu", checkpoint=file, resume=True)
    early = distil([Tiles()], config, device="cpu", checkpoint=file.with_name("none"), resume=True, stop_after=1)
    assert early.updates == 1


def test_a_run_brought_to_an_early_end_says_so(tmp_path):
    config, file = DistillationConfig(**QUICK), tmp_path / "run.safetensors"
    distil([Tiles()], config, device="cpu", checkpoint=file, stop_after=1)
    end = distil([Tiles()], config, device="cpu", checkpoint=file, resume=True, cooldown=2)
    assert (end.updates, end.cooled_from, end.curve[-1][0]) == (3, 1, 3)
    with pytest.raises(ConfigError, match="cooldown of 4"):
        distil([Tiles()], config, device="cpu", checkpoint=file, resume=True, cooldown=4)


def test_the_seed_decides_and_the_global_generator_does_not():
    config = DistillationConfig(**QUICK | {"steps": 1})
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    a = distil([Tiles()], config, device="cpu")
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(2)
    b = distil([Tiles()], config, device="cpu")
    c = distil([Tiles()], DistillationConfig(**QUICK | {"steps": 1, "seed": 1}), device="cpu")
    assert torch.equal(a.network.convolutions[3].weight, b.network.convolutions[3].weight)
    assert not torch.equal(a.network.convolutions[3].weight, c.network.convolutions[3].weight)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_loss_falls_and_the_network_explains_what_it_has_seen(precision):
    quick = {"steps": 30, "batch_size": 2, "pixels": 44, "statistics": 8, "lr": 2e-3}
    still = {"crop": (1, 1), "flip": False, "colour": 0.0, "grey": 0.0, "precision": precision}
    config, source = DistillationConfig(**quick | still), [Tiles(2)]
    done = distil(source, config, device="cpu")
    known = explained(done.network, done.targets, source, config, 4)
    assert known.shape == (384,)
    assert float(known.mean()) > 0.1
    start = distil(source, DistillationConfig(**quick | still | {"steps": 1, "lr": 1e-9, "lowest_lr": 0}), device="cpu")
    assert float(explained(start.network, start.targets, source, config, 4).mean()) < 0
    assert done.curve[-1][1] < start.curve[0][1]
    assert {p.dtype for p in done.network.parameters()} == {torch.float32}


def test_the_share_explained_by_hand():
    config = DistillationConfig(**QUICK)
    targets = PatchTargets(config)
    measure_targets(targets, [Tiles()], config)
    views = [draw_batch([Tiles()], config, first, stream=3) for first in (0, 2)]
    truth = torch.cat([targets(enlarged, 9) for _, enlarged in views])  # 4 384 1 1

    def perfect(image):
        return next(targets(enlarged, 9) for small, enlarged in views if torch.equal(small, image))

    assert_close(explained(perfect, targets, [Tiles()], config, 4), torch.ones(384))
    middle = truth.mean((0, 2, 3), keepdim=True)
    assert_close(explained(lambda image: middle, targets, [Tiles()], config, 4), torch.zeros(384), rtol=0, atol=1e-4)
    doubled = 1 - truth.square().sum((0, 2, 3)) / (truth - middle).square().sum((0, 2, 3))
    assert_close(
        explained(lambda image: 2 * perfect(image), targets, [Tiles()], config, 4), doubled, rtol=1e-3, atol=1e-3
    )


# -- the file ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("half", [True, False])
def test_the_file_holds_the_network_and_its_history(tmp_path, half):
    config, sources = DistillationConfig(**QUICK | {"steps": 1}), [Tiles(), MadeUpImages(3, size=48)]
    done = distil(sources, config, device="cpu")
    path = tmp_path / "own.safetensors"
    write_network(path, done, sources, config, half=half)
    text = read_metadata(path)["polyspect"]
    about = json.loads(text)["patch_description"]
    assert (about["size"], about["outputs"]) == ("small", 384)
    assert about["made"]["pictures"] == [source.about() for source in sources]
    assert about["made"]["settings"]["weights"] == next(iter(KNOWN["efficientnet_lite0"].files.values()))
    assert about["made"]["curve"][-1][0] == 1
    assert str(tmp_path) not in text
    assert {t.dtype for t in load_state(path).values()} == {torch.float16 if half else torch.float32}
    loaded = load_patch_description(weights=str(path), padding=True)
    assert loaded.made["settings"]["steps"] == 1
    assert loaded.network.padding
    for name, tensor in loaded.network.state_dict().items():
        exact = state(done)[name]
        assert_close(tensor, exact.half().float() if half else exact, rtol=0, atol=0)
    with pytest.raises(WeightsError, match="size 'small'"):
        load_patch_description("pdn_medium_efficientad", weights=str(path))


def test_the_command_writes_a_file_that_can_be_used_and_resumes(tmp_path, capsys):
    out = tmp_path / "own.safetensors"
    command = ["weights", "distil-pdn", "--made-up", "3", "--steps", "2", "--batch-size", "2", "--pixels", "36"]
    command += ["--statistics", "2", "--out", str(out), "--device", "cpu", "--json"]
    assert main([*command, "--stop-after", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["updates"] == 1
    assert not out.exists()
    assert main([*command, "--resume"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["steps"] == 2
    assert shown["bytes"] == out.stat().st_size < 8e6
    assert math.isfinite(shown["loss"])
    load_patch_description(weights=str(out))


def test_the_help_has_examples_and_the_right_defaults(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["weights", "distil-pdn", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "examples: polyspect weights distil-pdn" in text
    c = DistillationConfig()
    assert re.findall(r"\(default: ([^)]*)\)", text) == [
        c.backbone, c.weights, c.size, *(str(n) for n in (c.steps, c.batch_size, c.pixels)),
        " ".join(f"{share:g}" for share in c.crop), f"{c.lr:g}", str(c.statistics), c.precision, "auto",
    ]  # fmt: skip


def test_the_command_says_what_is_wrong(tmp_path, capsys):
    base = ["weights", "distil-pdn", "--out", str(tmp_path / "a.safetensors")]
    assert main(base) == 2
    assert "--images FOLDER, --made-up N, or both" in capsys.readouterr().err
    assert main([*base, "--images", str(tmp_path / "nowhere")]) == 2
    assert "there is no folder" in capsys.readouterr().err
    assert main([*base[:3], str(tmp_path / "a.pth"), "--made-up", "3"]) == 2
    assert ".safetensors" in capsys.readouterr().err
    assert main([*base, "--made-up", "3", "--pixels", "30"]) == 2
    assert "`pixels` must be a multiple of 4" in capsys.readouterr().err
    assert main([*base, "--made-up", "0"]) == 2
    assert "at least 1" in capsys.readouterr().err


# -- sources of pictures -----------------------------------------------------------------------------------------------


def test_a_folder_gives_its_pictures_in_order_of_their_paths(tmp_path):
    (tmp_path / "below").mkdir()
    picture = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "b.png"), picture[..., ::-1])
    cv2.imwrite(str(tmp_path / "below" / "a.png"), picture[..., 0])
    (tmp_path / "note.txt").write_text("no picture")
    source = ImageFolder(tmp_path)
    assert [path.name for path in source.paths] == ["b.png", "a.png"]
    np.testing.assert_array_equal(source.picture(0), picture)
    np.testing.assert_array_equal(source.picture(1), np.repeat(picture[..., :1], 3, axis=2))
    assert str(tmp_path) not in json.dumps(source.about())
    assert source.about()["count"] == 2
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no picture in"):
        ImageFolder(tmp_path / "empty")


def test_made_up_pictures_depend_on_seed_and_number_alone():
    source = MadeUpImages(20, seed=3, size=96)
    pictures = [source.picture(index) for index in range(12)]
    assert all(p.dtype == np.uint8 and p.shape == (96, 96, 3) for p in pictures)
    np.testing.assert_array_equal(MadeUpImages(9, seed=3, size=96).picture(5), pictures[5])
    assert not np.array_equal(MadeUpImages(20, seed=4, size=96).picture(5), pictures[5])
    with pytest.raises(ConfigError, match="no picture 20"):
        source.picture(20)
    with pytest.raises(ConfigError):
        MadeUpImages(0)


def test_made_up_pictures_vary_in_colour_brightness_and_detail():
    pictures = np.stack([MadeUpImages(60).picture(index) for index in range(60)]).astype(np.float32)
    means = pictures.mean((1, 2))
    assert means.std(0).min() > 25
    assert np.ptp(means, axis=1).max() > 60  # some are strongly coloured
    assert np.ptp(means, axis=1).min() < 6  # some are grey
    edges = np.abs(np.diff(pictures.mean(-1), axis=2)).mean((1, 2))
    assert edges.max() > 8 * edges.min()
    flat = pictures.reshape(60, -1)
    assert min(np.abs(flat[i] - flat[j]).mean() for i in range(60) for j in range(i)) > 5
