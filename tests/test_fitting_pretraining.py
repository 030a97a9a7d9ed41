"""Pre-training of point transformers: the recipe's numbers, the same bits after a kill, and what the file says."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from polyspect.backbones.point_mae import PointMAE
from polyspect.backbones.point_weights import load_point_transformer
from polyspect.cli import main
from polyspect.data.cloud_folder import CloudFolder
from polyspect.data.shape_clouds import ShapeClouds
from polyspect.errors import ConfigError, DataError, WeightsError
from polyspect.fitting.pretraining import (
    HISTOGRAM,
    PAPER,
    PretrainingConfig,
    augment,
    draw_batch,
    parameter_groups,
    pretrain,
    shape_histograms,
    write_encoder,
)
from polyspect.fitting.updates import learning_rate
from polyspect.weights.convert import load_state, read_metadata

QUICK = {"steps": 4, "batch_size": 2, "points": 300, "groups": (6, 8), "group_size": (5, 9), "decoder_blocks": 1}


class Balls:
    """Noisy spheres, without files and without rendering."""

    def __init__(self, count: int = 5, points: int = 400) -> None:
        self.count, self.points = count, points

    def __len__(self) -> int:
        return self.count

    def cloud(self, index: int) -> np.ndarray:
        x = np.random.default_rng(index).standard_normal((self.points, 3))
        return (x / np.linalg.norm(x, axis=1, keepdims=True) + 3).astype(np.float32)

    def about(self) -> dict:
        return {"source": "balls", "count": self.count}


def state(trained) -> dict[str, torch.Tensor]:
    return dict(trained.network.state_dict())


# -- the recipe --------------------------------------------------------------------------------------------------------


def test_the_rate_rises_over_ten_of_three_hundred_epochs_and_falls_as_a_cosine():
    config = PretrainingConfig(steps=301, lr=1e-3, warmup=PAPER["warmup"])
    assert learning_rate(config, 0) == pytest.approx(1e-6)
    assert learning_rate(config, 5) == pytest.approx(1e-6 + (1e-3 - 1e-6) / 2)
    assert learning_rate(config, 10) == pytest.approx(1e-3)
    assert learning_rate(config, 155) == pytest.approx((1e-3 + 1e-6) / 2)
    assert learning_rate(config, 300) == pytest.approx(1e-6)


def test_weight_decay_spares_vectors_and_the_mask_token():
    with torch.device("meta"):
        net = PointMAE("small")
    decayed, free = parameter_groups(net, 0.05)
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.05, 0.0)
    names = {id(p): name for name, p in net.named_parameters()}
    spared = {names[id(p)] for p in free["params"]}
    assert "mask_token" in spared
    assert {name.rpartition(".")[2] for name in spared} == {"mask_token", "weight", "bias"}
    assert all(p.dim() == 1 for p in free["params"])
    matrices = {f"{name}.weight" for name, layer in net.named_modules() if isinstance(layer, nn.Linear)}
    assert {names[id(p)] for p in decayed["params"]} == matrices


def test_the_papers_settings():
    config = PretrainingConfig(**PAPER)
    assert (config.size, config.batch_size, config.points, config.groups) == ("base", 128, 1024, (64, 64))
    assert (config.visible_weight, config.normalise, config.shape_weight, config.branch_scale) == (0, False, 0, 1)
    assert (config.lr, config.weight_decay, config.mask_ratio, config.loss) == (1e-3, 0.05, 0.6, "l2")


def test_augmentation_scales_and_shifts_the_unit_frame_as_the_paper_says():
    config = PretrainingConfig(**PAPER)
    points = torch.from_numpy(Balls().cloud(0))
    factors, shifts = [], []
    for seed in range(60):
        moved = augment(points, config, torch.Generator().manual_seed(seed))
        plain = augment(
            points, PretrainingConfig(turn=False, scale=(1, 1), shift=0), torch.Generator().manual_seed(seed)
        )
        assert_close(float(plain.norm(dim=1).max()), 1.0)
        factor = moved.std(0) / plain.std(0)
        factors.append(factor)
        shifts.append(moved.mean(0) - plain.mean(0) * factor)
    factors, shifts = torch.stack(factors), torch.stack(shifts)
    assert 2 / 3 - 1e-5 <= float(factors.min()) < 0.72
    assert 1.42 < float(factors.max()) <= 1.5 + 1e-5
    assert 0.18 < float(shifts.abs().max()) <= 0.2 + 1e-5


def test_turning_keeps_heights_and_radii():
    config = PretrainingConfig(scale=(1, 1))
    points = torch.from_numpy(Balls().cloud(0))
    plain = augment(points, PretrainingConfig(turn=False, scale=(1, 1)), torch.Generator().manual_seed(0))
    turned = augment(points, config, torch.Generator().manual_seed(0))
    assert_close(turned[:, 2], plain[:, 2])
    assert_close(turned.norm(dim=1), plain.norm(dim=1))
    assert float((turned - plain).abs().max()) > 0.1


def test_batches_have_the_shapes_asked_for_and_every_cloud_once_per_epoch():
    source, config = Balls(), PretrainingConfig(**QUICK)
    seen, shapes = [], set()
    source.cloud = lambda index, make=source.cloud: (seen.append(index), make(index))[1]  # type: ignore[method-assign]
    for step in range(20):
        groups, centres, descriptors = draw_batch(source, config, step)
        assert descriptors is not None
        assert descriptors.shape == (*groups.shape[:2], HISTOGRAM)
        assert groups.shape[:2] == centres.shape[:2]
        assert bool((groups[:, :, 0] == 0).all())  # the centre itself first
        shapes.add(groups.shape[1:3])
    assert [sorted(seen[i : i + 5]) for i in range(0, 40, 5)] == [[0, 1, 2, 3, 4]] * 8
    assert {G for G, _ in shapes} == {6, 7, 8}
    assert {M for _, M in shapes} == {5, 6, 7, 8, 9}


def test_histograms_of_a_surface_do_not_change_when_it_turns_about_the_cameras_axis():
    u, v = torch.rand(2, 900, generator=torch.Generator().manual_seed(0))
    sheet = torch.stack([u - 0.5, v - 0.5, 2 * (u - 0.5) ** 2], dim=1)
    plain = shape_histograms(sheet, 0.1, 0.2)
    assert plain.shape == (900, HISTOGRAM)
    assert_close(plain.unflatten(1, (3, 11)).sum(2), torch.ones(900, 3))
    c, s = math.cos(0.7), math.sin(0.7)
    turned = shape_histograms(sheet @ torch.tensor([[c, s, 0], [-s, c, 0], [0, 0, 1]]), 0.1, 0.2)
    assert float((turned - plain).abs().mean()) < 1e-3  # a pair on the border of a bin may go to the next
    flat = shape_histograms(sheet * torch.tensor([1.0, 1, 0]) + torch.tensor([0, 0, 0.5]), 0.1, 0.2)
    assert_close(flat[:, [5, 16, 27]], torch.ones(900, 3))  # all angles 0, wherever the plane lies
    assert float((plain - flat).abs().mean()) > 0.01


def test_descriptors_are_standardised_roots_of_the_groups_mean_histograms():
    source, config = Balls(points=300), PretrainingConfig(**QUICK)
    _, _, descriptors = draw_batch(source, config, 3)
    again = draw_batch(source, config, 3)[2]
    assert descriptors is not None
    assert_close(descriptors, again, rtol=0, atol=0)
    assert float(descriptors.mean().abs()) < 1.0
    assert draw_batch(source, PretrainingConfig(**QUICK, shape_weight=0.0), 3)[2] is None


def test_a_cloud_with_too_few_points_is_named():
    with pytest.raises(DataError, match=r"cloud \d has 4 points, fewer than"):
        draw_batch(Balls(points=4), PretrainingConfig(**QUICK), 0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"groups": (8, 4)},
        {"groups": (1, 4)},
        {"steps": 0},
        {"mask_ratio": 1.0},
        {"masking": "stripes"},
        {"lr": 0.0},
        {"points": 5},
        {"size": "huge"},
        {"shape_weight": -1.0},
        {"shape_radius": 0.0},
    ],
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigError):
        pretrain(Balls(), PretrainingConfig(**{**QUICK, **wrong}), device="cpu")


# -- the run -----------------------------------------------------------------------------------------------------------


def test_a_resumed_run_ends_in_the_same_bits(tmp_path):
    config = PretrainingConfig(**{**QUICK, "drop_path": 0.2})
    whole = pretrain(Balls(), config, device="cpu")
    file = tmp_path / "run.safetensors"
    first = pretrain(Balls(), config, device="cpu", checkpoint=file, stop_after=2)
    assert not torch.equal(first.network.mask_token, whole.network.mask_token)
    torch.manual_seed(12345)  # what the process did in between does not matter
    second = pretrain(Balls(), config, device="cpu", checkpoint=file, resume=True)
    assert all(torch.equal(tensor, state(second)[name]) for name, tensor in state(whole).items())
    assert second.curve == whole.curve
    assert second.curve[-1][0] == 4
    with pytest.raises(ConfigError, match=r"from another run \(other settings, seed or data\)"):
        pretrain(Balls(), PretrainingConfig(**QUICK), device="cpu", checkpoint=file, resume=True)


def test_a_run_brought_to_an_early_end_says_so_and_is_repeatable(tmp_path):
    config, file = PretrainingConfig(**QUICK), tmp_path / "run.safetensors"
    pretrain(Balls(), config, device="cpu", checkpoint=file, stop_after=1)
    ends = [pretrain(Balls(), config, device="cpu", checkpoint=file, resume=True, cooldown=2) for _ in range(2)]
    assert torch.equal(ends[0].network.head.weight, ends[1].network.head.weight)
    assert (ends[0].updates, ends[0].cooled_from, ends[0].curve[-1][0]) == (3, 1, 3)
    three = pretrain(Balls(), config, device="cpu", stop_after=3)
    assert three.cooled_from is None
    assert not torch.equal(ends[0].network.head.weight, three.network.head.weight)
    with pytest.raises(ConfigError, match="cooldown of 4"):
        pretrain(Balls(), config, device="cpu", checkpoint=file, resume=True, cooldown=4)
    with pytest.raises(ConfigError, match="needs a checkpoint"):
        pretrain(Balls(), config, device="cpu", cooldown=2)


def test_the_seed_decides_and_the_global_generator_does_not():
    config = PretrainingConfig(**{**QUICK, "steps": 1})
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    a = pretrain(Balls(), config, device="cpu")
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(2)
    b = pretrain(Balls(), config, device="cpu")
    c = pretrain(Balls(), PretrainingConfig(**{**QUICK, "steps": 1, "seed": 1}), device="cpu")
    assert torch.equal(a.network.head.weight, b.network.head.weight)
    assert not torch.equal(a.network.head.weight, c.network.head.weight)


def test_everything_is_trained_but_biases_that_a_norm_takes_away():
    idle = {f"encoder.encoder.{layer}.bias" for layer in ("local1", "local2", "joint1")}
    config = PretrainingConfig(**{**QUICK, "steps": 2, "lr": 1e-2})
    trained = pretrain(Balls(), config, device="cpu")
    start = pretrain(Balls(), PretrainingConfig(**{**QUICK, "steps": 2, "lr": 1e-12, "lowest_lr": 0}), device="cpu")
    for (name, a), b in zip(trained.network.named_parameters(), start.network.parameters()):
        assert name in idle or not torch.equal(a, b), name


# -- the file ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("half", [True, False])
def test_the_file_holds_the_encoder_and_its_history(tmp_path, half):
    config, source = PretrainingConfig(**QUICK), Balls()
    trained = pretrain(source, config, device="cpu")
    path = tmp_path / "own.safetensors"
    write_encoder(path, trained, source, config, half=half)
    about = json.loads(read_metadata(path)["polyspect"])["point_transformer"]
    assert (about["size"], about["layers"], about["frame"]) == ("small", [2, 5, 7], "unit")
    assert about["made"]["clouds"] == source.about()
    assert about["made"]["settings"]["seed"] == 0
    assert about["made"]["curve"][-1][0] == 4
    assert str(tmp_path) not in read_metadata(path)["polyspect"]
    assert {t.dtype for t in load_state(path).values()} == {torch.float16 if half else torch.float32}
    loaded = load_point_transformer("point_mae_small", weights=str(path))
    assert loaded.frame == "unit"
    assert loaded.made["settings"]["steps"] == 4
    assert loaded.source["source"] == "file"
    for name, tensor in loaded.network.state_dict().items():
        exact = trained.network.encoder.state_dict()[name]
        assert_close(tensor, exact.half().float() if half else exact, rtol=0, atol=0)
    shallow = load_point_transformer("point_mae_small", layers=(1, 3), weights=str(path)).network
    assert len(shallow.blocks) == 4
    with pytest.raises(WeightsError, match="size 'small', but 'point_mae' is of size 'base'"):
        load_point_transformer("point_mae", weights=str(path))
    with pytest.raises(ConfigError, match="statistics='cloud'"):
        load_point_transformer("point_mae_small", weights=str(path), statistics="stored")


def test_the_command_writes_a_file_that_can_be_used_and_resumes(tmp_path, capsys):
    out = tmp_path / "own.safetensors"
    command = ["weights", "pretrain-point-mae", "--shapes", "3", "--steps", "2", "--batch-size", "2", "--groups", "8"]
    command += ["--group-size", "5", "9", "--out", str(out), "--device", "cpu", "--json"]
    assert main(command) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["steps"] == 2
    assert shown["bytes"] == out.stat().st_size < 8e6
    assert math.isfinite(shown["loss"])
    before = out.read_bytes()
    assert main([*command, "--resume"]) == 0  # nothing is left to do
    assert out.read_bytes() == before
    load_point_transformer("point_mae_small", weights=str(out))


def test_the_command_says_what_is_wrong(tmp_path, capsys):
    base = ["weights", "pretrain-point-mae", "--out", str(tmp_path / "a.safetensors")]
    assert main([*base, "--clouds", str(tmp_path / "nowhere")]) == 2
    assert "there is no folder" in capsys.readouterr().err
    assert main([*base[:3], str(tmp_path / "a.pth"), "--shapes", "3"]) == 2
    assert ".safetensors" in capsys.readouterr().err
    assert main([*base, "--shapes", "3", "--groups", "9", "4"]) == 2
    assert "`groups` must be (least, most)" in capsys.readouterr().err


# -- sources of clouds -------------------------------------------------------------------------------------------------


def test_a_folder_gives_lists_and_grids_of_points(tmp_path):
    (tmp_path / "below").mkdir()
    points = np.arange(1.0, 31.0, dtype=np.float32).reshape(10, 3)
    np.save(tmp_path / "list.npy", points)
    grid = points.reshape(2, 5, 3).copy()
    grid[0, 0], grid[1, 1] = 0, np.nan
    np.save(tmp_path / "below" / "grid.npy", grid)
    rows = "\n".join(" ".join(map(str, row)) for row in points.tolist())
    head = (
        "ply\nformat ascii 1.0\nelement vertex 10\nproperty float x\nproperty float y\nproperty float z\nend_header\n"
    )
    (tmp_path / "z.ply").write_text(head + rows + "\n")
    (tmp_path / "note.txt").write_text("no cloud")
    source = CloudFolder(tmp_path)
    assert [path.name for path in source.paths] == ["grid.npy", "list.npy", "z.ply"]
    assert len(source.cloud(0)) == 8
    np.testing.assert_array_equal(source.cloud(1), points)
    np.testing.assert_array_equal(source.cloud(2), points)
    assert str(tmp_path) not in json.dumps(source.about())
    assert source.about()["count"] == 3
    with pytest.raises(DataError, match="no cloud in"):
        CloudFolder(_empty(tmp_path))


def _empty(tmp_path):
    folder = tmp_path / "empty"
    folder.mkdir()
    return folder


def test_made_up_clouds_depend_on_seed_and_number_alone():
    source = ShapeClouds(20, seed=3)
    clouds = [source.cloud(index) for index in range(8)]
    assert all(c.dtype == np.float32 and c.shape[1] == 3 and len(c) >= 1500 for c in clouds)
    assert all(np.isfinite(c).all() for c in clouds)
    np.testing.assert_array_equal(ShapeClouds(9, seed=3).cloud(5), clouds[5])
    assert len({len(c) for c in clouds}) == 8
    assert ShapeClouds(20, seed=4).cloud(5).shape != clouds[5].shape
    with pytest.raises(ConfigError, match="no cloud 20"):
        source.cloud(20)
    with pytest.raises(ConfigError):
        ShapeClouds(0)


def test_made_up_clouds_show_one_side_only():
    """Seen along the camera's axis, hardly any point hides behind another."""
    for index in range(6):
        x, y, z = ShapeClouds(6, seed=1).cloud(index).T
        cell = np.round(x * 12).astype(int) * 1000 + np.round(y * 12).astype(int)
        spans = [np.ptp(z[cell == c]) for c in np.unique(cell)]
        assert np.median(spans) < 0.3 * np.ptp(np.stack([x, y]), axis=1).max()
