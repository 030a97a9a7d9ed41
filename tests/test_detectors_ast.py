"""AST: the official map and score, masks, shares, switches, learning, checkpoints."""

from __future__ import annotations

import dataclasses
import hashlib

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from golden import Golden, filled_state, noise
from polyspect.data.preparation import PREPARATIONS, Preparation
from polyspect.detectors import ast
from polyspect.detectors.ast import AST, ASTConfig, fold_depth, part_share
from polyspect.detectors.contract import configure
from polyspect.errors import ConfigError, DataError, ShapeError, WeightsError
from polyspect.fitting.engine import Engine, EngineConfig
from polyspect.layers.flow import imitation_loss, likelihood_loss
from polyspect.metrics import auroc
from polyspect.model import Model
from polyspect.samples import Batch
from polyspect.weights.patch_networks import conv_student_state, flow_state
from published_networks import ast_student, ast_teacher
from tiny import TinyParts, blinded, tiny_batch

SMALL = {
    "weights": "random",
    "teacher_hidden": 8,
    "student_width": 16,
    "student_blocks": 1,
    "batch_size": 4,
    "epochs": 2,
}


def small(**settings):
    return AST(ASTConfig(**SMALL | settings))


def disturbed(detector, seed=0):
    """A detector whose networks do something, without training."""
    generator = torch.Generator().manual_seed(seed)
    for part in (detector.teacher, detector.student):
        for name, parameter in part.named_parameters():
            size = 0.3 if name.endswith("gain") else 0.05
            parameter.data = size * torch.randn(parameter.shape, generator=generator)
    return detector.eval()


def features_of(detector, seeds=(1, 2, 3), **options):
    with torch.no_grad():
        return dict(detector.extract(tiny_batch(seeds, **options)))


def fit(detector, count=8):
    splits = {"train": TinyParts(range(count)), "validation": TinyParts(range(50, 54))}
    return Engine(EngineConfig(device="cpu", block=4)).fit(detector, splits)


def published(channels, hidden=8, width=16, blocks=1):
    """Teacher and student as the released program writes them."""
    return filled_state(ast_teacher(channels, hidden)), filled_state(ast_student(channels, width, 32, blocks))


# -- stored outputs ----------------------------------------------------------------------------------------------------


class StoredFeatures(torch.nn.Module):
    """A backbone that gives the features of the stored runs."""

    channels = (304,)

    def __init__(self, *_, **__):
        super().__init__()

    def forward(self, images):
        return [noise("features", len(images), 304, 6, 6)]


@pytest.mark.slow
def test_map_and_score_equal_the_official_code(monkeypatch):
    golden = Golden("ast_combi.npz")
    monkeypatch.setattr(ast, "ImageBackbone", StoredFeatures)
    with torch.device("meta"):
        detector = AST(ASTConfig(reduction=8), pretrained=False)
    teacher, student = (
        filled_state({f"{part}.{n}": s for n, s in shapes.items()})
        for part, shapes in (("teacher", ast_teacher(368)), ("student", ast_student(368)))
    )
    for part, state, convert in (
        ("teacher", teacher, flow_state),
        ("student", student, conv_student_state),
    ):
        net = detector.get_submodule(part)
        net.load_state_dict(convert({n.removeprefix(f"{part}."): t for n, t in state.items()}, net), assign=True)
    for index, order in enumerate(golden.tensor("perms")):
        detector.teacher.register_buffer(f"order{index}", order, persistent=False)
    detector.fitted = torch.ones((), dtype=torch.bool)
    detector.feature_mean = torch.zeros(368)
    on = golden.tensor("fg")[:, 0] > 0
    batch = Batch(
        ids=["a", "b"],
        images={"rgb": torch.zeros(2, 3, 48, 48), "depth": golden.tensor("depth") / 100},
        valid=torch.ones_like(on),
        foreground=on,
    )
    golden.check("fg_down", part_share(on, (6, 6))[:, None], 1e-6)
    with torch.no_grad():
        features = detector.eval().extract(batch)
        prediction = detector(batch)
        assert float(detector.teacher_loss(features)["likelihood"]) == pytest.approx(golden.number("nf_loss"), rel=5e-5)
        assert float(detector.student_loss(features)["imitation"]) == pytest.approx(golden.number("st_loss"), rel=5e-5)
    official = golden.tensor("map")
    assert_close(prediction.map, official.reshape(prediction.map.shape), rtol=1e-4, atol=1e-4 * float(official.std()))
    assert_close(prediction.score, golden.tensor("image_score_max").flatten(), rtol=5e-5, atol=0)
    shares = torch.stack(list(prediction.branch_maps.values())).sum(0)
    assert_close(shares, prediction.map, rtol=1e-4, atol=1e-4 * float(official.std()))


# -- depth and mask ----------------------------------------------------------------------------------------------------


def test_depth_is_folded_row_by_row():
    depth = torch.arange(16 * 24.0).view(1, 1, 16, 24)
    folded = fold_depth(depth, (2, 3))
    for dy, dx in ((0, 0), (0, 1), (3, 5), (7, 7)):
        assert torch.equal(folded[0, 8 * dy + dx], depth[0, 0, dy::8, dx::8])
    repeated = depth.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.equal(fold_depth(repeated, (2, 3)), folded)


def test_the_part_is_dilated_by_a_square_of_eight():
    on = torch.zeros(1, 64, 64, dtype=torch.bool)
    on[0, 20, 33] = True
    share = part_share(on, (8, 8))
    block = torch.zeros(64, 64)
    block[16:24, 29:37] = 1  # rows -4 to +3, columns -4 to +3
    expected = torch.stack([block[3::8, 3::8], block[3::8, 4::8], block[4::8, 3::8], block[4::8, 4::8]]).mean(0)
    assert torch.equal(share[0], expected)
    anywhere = part_share(torch.rand(4, 64, 64, generator=torch.Generator().manual_seed(0)) > 0.99, (8, 8))
    assert set(anywhere.unique().tolist()) <= {0, 0.25, 0.5, 0.75, 1}
    assert bool(((anywhere > 0) & (anywhere < 1)).any())


def test_cells_off_the_part_have_no_influence_where_features_are_masked():
    detector = disturbed(small(mask_features=True))
    features = features_of(detector, seeds=(1,), size=128)
    off = (part_share(features["foreground"], (8, 8)) == 0)[:, None]
    assert bool(off.any())
    other = {name: torch.where(off, 9, x) if name.endswith(".1") else x for name, x in features.items()}
    with torch.no_grad():
        before, after = detector.score(features), detector.score(other)
        assert torch.equal(before.score, after.score)
        assert torch.equal(before.map, after.map)
        for loss in (detector.teacher_loss, detector.student_loss):
            assert list(loss(features).values()) == list(loss(other).values())
        open_ = disturbed(small())  # as published: through the convolutions the background reaches the part
        assert not torch.equal(open_.score(features).score, open_.score(other).score)


def test_masks_follow_the_card_written_out():
    base = {"aggregation": "mean", "modalities": ("depth",)}
    reference = disturbed(small(mask_train=False, mask_eval=False, **base))
    features = features_of(reference)
    soft = part_share(features["foreground"], (4, 4))
    assert bool(((soft > 0) & (soft < 1)).any())
    hard = (soft > 0).float()
    with torch.no_grad():
        x = features["depth.1"]
        (z, log_det), imitated = reference.teacher(x), reference.student(x)
    ones = torch.ones_like(soft)
    for settings, train, once, shown in (
        ({"mask_train": False, "mask_eval": False}, ones, ones, ones),
        ({}, soft, soft, soft**2),
        ({"square_mask": False}, soft, soft, soft),
        ({"mask": "hard"}, hard, hard, hard),
        ({"mask_eval": False}, soft, ones, ones),
        ({"mask_train": False}, ones, soft, soft**2),
    ):
        detector = disturbed(small(**base | settings))
        with torch.no_grad():
            losses = detector.teacher_loss(features)["likelihood"], detector.student_loss(features)["imitation"]
            by_mean, by_max = (
                disturbed(small(**base | settings | {"aggregation": rule})).score(features) for rule in ("mean", "max")
            )
        assert_close(losses[0], likelihood_loss(z, log_det, train).mean())
        assert_close(losses[1], imitation_loss(z, imitated, train).mean())
        assert_close(by_mean.score, imitation_loss(z, imitated, once).mean((1, 2)))
        cells = imitation_loss(z, imitated) * shown
        fine = F.interpolate(cells[:, None], scale_factor=8, mode="bicubic", align_corners=False)
        assert_close(by_max.score, fine.amax((1, 2, 3)))
        large = F.interpolate(fine, size=(64, 64), mode="bilinear", align_corners=False)[:, 0]
        assert_close(by_max.map, large, rtol=1e-5, atol=1e-6 * float(large.max()))


def test_pictures_alone_are_not_masked_and_scored_by_the_mean():
    detector = disturbed(small(modalities=("rgb",)))
    batch = tiny_batch([1, 2])
    nowhere = Batch(batch.ids, {"rgb": batch.images["rgb"]}, batch.valid, torch.zeros_like(batch.foreground))
    with torch.no_grad():
        features = detector.extract(batch)
        z, _ = detector.teacher(features["rgb.1"])
        cells = imitation_loss(z, detector.student(features["rgb.1"]))
        assert_close(detector.score(features).score, cells.mean((1, 2)))
        assert torch.equal(detector.score(detector.extract(nowhere)).map, detector.score(features).map)


def test_a_part_of_which_nothing_is_known_is_judged_as_a_whole():
    detector = disturbed(small())
    batch = tiny_batch([1, 2])
    on = batch.foreground.clone()
    on[0] = False
    with torch.no_grad():
        empty = detector.score(detector.extract(dataclasses.replace(batch, foreground=on)))
        everywhere = detector.score(detector.extract(dataclasses.replace(batch, foreground=torch.ones_like(on))))
        known = detector.score(detector.extract(batch))
    assert float(empty.score[0]) == float(everywhere.score[0]) > 0
    assert torch.equal(empty.map[0], everywhere.map[0])
    assert torch.equal(empty.map[1], known.map[1])


# -- shares and scores -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"score": "likelihood", "mask_eval": False}, {"student": "flow"}])
def test_the_shares_of_the_views_add_up(settings):
    detector = disturbed(small(**settings))
    with torch.no_grad():
        prediction = detector.score(features_of(detector))
    assert list(prediction.branch_maps) == ["rgb", "depth"]
    total = prediction.branch_maps["rgb"] + prediction.branch_maps["depth"]
    assert_close(total, prediction.map, rtol=1e-4, atol=1e-5 * float(prediction.map.abs().max()))


def test_a_view_without_a_difference_has_no_share():
    detector = small(mask_features=False).eval()  # fresh: the flow only permutes
    features = features_of(detector)
    x = torch.cat([features["rgb.1"], features["depth.1"]], dim=1)
    z = detector.teacher(x)[0]
    detector.student.forward = lambda x: torch.where(torch.isin(z, features["depth.1"]), z, 0)
    with torch.no_grad():
        maps = detector.score(features).branch_maps
    assert maps["rgb"].abs().max() > 0.01
    assert not maps["depth"].any()


def test_depth_comes_last_in_whatever_order_it_is_named():
    features = features_of(small())
    one, two = (disturbed(small(modalities=names)) for names in (("rgb", "depth"), ("depth", "rgb")))
    with torch.no_grad():
        assert torch.equal(one.score(features).map, two.score(features).map)


def test_the_teachers_likelihood_alone():
    detector = disturbed(small(score="likelihood"))
    assert [stage.name for stage in detector.stages()] == ["teacher"]
    features = features_of(detector)
    share = part_share(features["foreground"], (4, 4))
    with torch.no_grad():
        z, log_det = detector.teacher(torch.cat([features["rgb.1"], features["depth.1"]], dim=1))
        prediction = detector.score(features)
    cells = likelihood_loss(z, log_det)
    lowest = torch.where(share > 0, cells, torch.inf).amin((1, 2), keepdim=True)
    filled = torch.where(share > 0, cells, lowest)[:, None]
    fine = F.interpolate(filled, scale_factor=8, mode="bicubic", align_corners=False)
    assert_close(prediction.score, fine.amax((1, 2, 3)))
    with torch.no_grad():
        features = detector.extract(blinded(tiny_batch([1])))  # judged as a whole
        z, log_det = detector.teacher(torch.cat([features["rgb.1"], features["depth.1"]], dim=1))
        fine = F.interpolate(likelihood_loss(z, log_det)[:, None], scale_factor=8, mode="bicubic", align_corners=False)
        assert_close(detector.score(features).score, fine.amax((1, 2, 3)))


def test_levels_are_those_of_the_part_in_good_parts():
    detector = fit(small(standardise=True, epochs=1))
    batch = tiny_batch(range(8))
    features = detector.extract(batch)
    x = torch.cat([features["rgb.1"], features["depth.1"]], dim=1).movedim(1, -1)
    on = x[part_share(batch.foreground, (4, 4)) > 0].double()
    assert_close(detector.feature_mean.double(), on.mean(0), rtol=1e-4, atol=1e-5)
    assert_close(detector.feature_std.double(), on.std(0, correction=0), rtol=1e-4, atol=1e-5)
    assert [stage.name for stage in detector.stages()] == ["feature_levels", "teacher", "student"]
    blind = small(standardise=True)
    observe = blind.stages()[0]
    observe.update(blind.extract(blinded(tiny_batch([1]))))
    with pytest.raises(DataError, match="no training part has a foreground"):
        observe.finish()


# -- learning ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("modalities", [("rgb",), ("depth",), ("rgb", "normals", "depth")])
def test_it_detects_with_any_of_its_views(modalities, tmp_path):
    settings = {"modalities": modalities, "epochs": 6, "batch_size": 4, "student_width": 32, "teacher_hidden": 16}
    detector = fit(AST(configure(AST, settings, "fast")), 12)
    good, bad = tiny_batch(range(300, 310)), tiny_batch(range(400, 410), defect=True)
    scores = torch.cat([detector(good).score, detector(bad).score]).double().numpy()
    assert auroc(scores, [0] * 10 + [1] * 10) >= 0.9
    file = Model("ast", detector, Preparation()).save(tmp_path / "m.safetensors")
    assert torch.equal(Model.load(file, device="cpu").detector(bad).map, detector(bad).map)


def test_the_student_learns_nothing_into_the_teacher():
    detector = small().train()
    features = features_of(detector)
    detector.student_loss(features)["imitation"].backward()
    assert all(parameter.grad is None for parameter in detector.teacher.parameters())
    assert all(parameter.grad is not None for parameter in detector.student.parameters())
    detector.teacher_loss(features)["likelihood"].backward()
    assert all(parameter.grad is not None for parameter in detector.teacher.parameters())
    assert not any(parameter.requires_grad for parameter in detector.backbone.parameters())


def test_the_optimiser_is_the_papers():
    teacher, student = AST(configure(AST, {"modalities": ("depth",), "student_width": 8}, "paper")).stages()
    for stage in (teacher, student):
        adam = stage.optimizer([torch.nn.Parameter(torch.ones(1))])
        assert isinstance(adam, torch.optim.Adam)
        chosen = {key: adam.defaults[key] for key in ("lr", "betas", "eps", "weight_decay")}
        assert chosen == {"lr": 2e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-5}
        assert (stage.epochs, stage.batch_size) == (72, 8)


# -- settings ----------------------------------------------------------------------------------------------------------


def test_the_papers_networks():
    config = configure(AST, preset="paper")
    assert AST.PREPARATION["paper"] == "ast_paper"
    with torch.device("meta"):
        detector = AST(configure(AST, {"modalities": ("depth",)}, "paper"), pretrained=False)
    assert sum(p.numel() for p in detector.teacher.parameters()) == 853_000
    assert sum(p.numel() for p in detector.student.parameters()) == 76_997_696
    assert PREPARATIONS["ast_paper"].size // config.reduction == 24


@pytest.mark.parametrize(("blocks", "millions"), [(1, 26.0), (2, 44.8), (8, 158.1), (12, 233.6)])
def test_deeper_students(blocks, millions):
    with torch.device("meta"):
        settings = {"modalities": ("depth",), "student_blocks": blocks}
        student = AST(configure(AST, settings), pretrained=False).student
    extra = 304 * 9 * 1024 * 2 + 304  # what 304 more channels cost at input and output
    assert (sum(p.numel() for p in student.parameters()) + extra) / 1e6 == pytest.approx(millions, abs=0.06)


def test_a_flow_of_the_teachers_kind_as_student():
    detector = small(student="flow", student_blocks=4)
    assert [block.of_first.conv1.kernel_size[0] for block in detector.student.blocks] == [3, 3, 3, 5]
    features = features_of(detector.eval())
    with torch.no_grad():
        assert float(detector.student_loss(features)["imitation"]) == 0  # both only permute, alike
        assert torch.isfinite(disturbed(detector).score(features).map).all()


def test_without_positions_the_networks_see_features_only():
    with_, without = small(), small(pos_enc=False)
    n = 112 + 64
    assert (with_.student.input.in_channels, without.student.input.in_channels) == (n + 32, n)
    assert (with_.teacher.position, without.teacher.position) == (32, 0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("modalities", ("xyz",)),
        ("mask", "none"),
        ("pad", "zero"),
        ("student", "mlp"),
        ("score", "teacher"),
        ("aggregation", "sum"),
        ("clamp", 0.0),
        ("slope", -0.1),
        ("student_blocks", 0),
        ("depth_scale", 0.0),
        ("weight_decay", -1.0),
        ("epochs", 0),
        ("checkpoint", ("a", "b", "c")),
    ],
)
def test_settings_out_of_range_are_named(field, value):
    with pytest.raises(ConfigError, match=field):
        configure(AST, {field: value})


def test_sizes_that_do_not_fit_the_grid_are_refused():
    with pytest.raises(ShapeError, match=r"'tiny/good/1' is 72x72.*multiples of 16"):
        small(modalities=("depth",)).extract(tiny_batch([1], size=72))


# -- checkpoints -------------------------------------------------------------------------------------------------------


def test_published_files_are_used_as_they_are(tmp_path):
    files = []
    for name, state in zip(("teacher", "student"), published(112 + 64)):
        files.append(str(tmp_path / f"ast_bagel_{name}.pth"))
        torch.save(state, files[-1])
    detector = small(checkpoint=tuple(files))
    assert detector.stages() == []
    assert {name: source["sha256"] for name, source in detector.sources.items()} == {
        name: hashlib.sha256((tmp_path / f"ast_bagel_{name}.pth").read_bytes()).hexdigest()
        for name in ("teacher", "student")
    }
    state = published(112 + 64)
    gamma = state[0]["module_list.7.s2.gamma"]
    assert torch.equal(detector.teacher.blocks[2].of_second.gain, gamma)
    assert torch.equal(detector.student.blocks[0].norm2.running_var, state[1]["res.0.bn2.running_var"])
    fitted = fit(detector)
    assert torch.equal(fitted.teacher.blocks[2].of_second.gain, gamma)
    assert torch.isfinite(fitted(tiny_batch([7])).map).all()
    alone = small(checkpoint=(files[0],))
    assert [stage.name for stage in alone.stages()] == ["student"]
    with pytest.raises(WeightsError, match=r"student\.pth.*unknown to format 'ast-teacher'"):
        small(checkpoint=(files[1], files[0]))
    with pytest.raises(WeightsError, match="shape"):
        small(checkpoint=(files[0],), teacher_hidden=16)
    with pytest.raises(ConfigError, match="teacher's file alone with student 'flow'"):
        small(checkpoint=tuple(files), student="flow")
