"""CFM: the chain written out densely, stored outputs of the official program, closed forms, switches, files."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from golden import Golden, filled_state, noise
from polyspect.backbones.point_transformer import PointTransformer
from polyspect.cli import main
from polyspect.data.preparation import PREPARATIONS
from polyspect.detectors import cfm, detector_class
from polyspect.detectors.cfm import CFM, CFMConfig, blur_boxes, direction_distance, fuse, normalise_maps
from polyspect.detectors.contract import configure
from polyspect.errors import ConfigError, DataError, ShapeError, WeightsError
from polyspect.fitting.engine import Engine, EngineConfig
from polyspect.geometry.interpolation import interpolation_weights
from polyspect.layers.feature_mapping import FeatureMapping, mapping_loss
from polyspect.layers.rgb_points import point_patches, point_pixels, rgb_pixels
from polyspect.metrics import auroc
from polyspect.samples import Features
from polyspect.weights.cross_modal import feature_mapping_state
from published_networks import mapping
from tiny import TinyParts, blinded, tiny_batch

TINY = {
    "weights": "random",
    "point_backbone": "point_mae",
    "point_weights": "random",
    "groups": 32,
    "group_size": 8,
    "point_layers": (0,),
}


def build(**settings: Any) -> CFM:
    return CFM(CFMConfig(**{**TINY, **settings}))


@pytest.fixture(scope="module")
def detector() -> CFM:
    return build()


@pytest.fixture(scope="module")
def features(detector: CFM) -> Features:
    return detector.extract(tiny_batch([1, 2, 3]))


def with_settings(detector: CFM, **settings: Any) -> CFM:
    """The same networks under other settings."""
    other = build(**settings)
    other.load_state_dict(detector.state_dict())
    return other


def dense_pixels(features: Features) -> tuple[Tensor, Tensor]:
    """Features of all pixels as the official program builds them, (B, H*W, C) of RGB and points."""
    size = features["valid"].shape[-2:]
    rgb = F.interpolate(features["rgb.grid"], size=size, mode="bilinear", align_corners=False)
    return rgb.flatten(2).mT, point_patches(features, tuple(size))


def dense_distances(detector: CFM, features: Features, masked: bool = True) -> tuple[Tensor, Tensor]:
    """d_rgb and d_xyz (B, H, W): every pixel mapped, background zeroed afterwards."""
    rgb, xyz = dense_pixels(features)
    inside = (xyz != 0).any(-1) if masked else torch.ones_like(xyz[..., 0], dtype=torch.bool)
    shape = features["valid"].shape
    found = []
    for mapped, observed in ((detector.mapping["rgb"](xyz), rgb), (detector.mapping["xyz"](rgb), xyz)):
        apart = (F.normalize(mapped, dim=-1) - F.normalize(observed, dim=-1)).square().sum(-1).sqrt()
        found.append((apart * inside).view(shape))
    return found[0], found[1]


def blur_by_definition(maps: Tensor) -> Tensor:
    for side in (5, 5, 5, 5, 5, 7, 7, 7):
        maps = F.avg_pool2d(maps[:, None], side, stride=1, padding=side // 2, count_include_pad=True)[:, 0]
    return maps


# -- the chain -------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("masked", [True, False])
def test_it_equals_the_chain_over_all_pixels(detector, features, masked):
    d_rgb, d_xyz = dense_distances(detector, features, masked)
    blurred = blur_by_definition(d_rgb * d_xyz)
    prediction = with_settings(detector, mask_background=masked).score(features)
    for index, b in enumerate(blurred):
        mu = b[b != 0].mean()
        assert_close(prediction.map[index], b / mu.sqrt(), rtol=1e-4, atol=1e-5)
        assert_close(prediction.score[index], b.max() / mu.sqrt(), rtol=1e-4, atol=1e-5)
    assert_close(prediction.branch_maps["rgb"], blur_by_definition(d_rgb), rtol=1e-4, atol=1e-5)
    assert_close(prediction.branch_maps["xyz"], blur_by_definition(d_xyz), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_mask_is_the_parts_pixels_and_a_rim(detector, features):
    inside = detector._inside(features).view(features["valid"].shape)
    valid = features["valid"] & features["foreground"]
    assert not bool((valid & ~inside).any())
    rim = F.max_pool2d(valid[:, None].float(), 5, stride=1, padding=2)[:, 0] > 0
    assert not bool((inside & ~rim).any())
    assert torch.equal(inside.flatten(1), (dense_pixels(features)[1] != 0).any(-1))


@torch.no_grad()
def test_chunks_and_lifting_change_nothing(detector, features, monkeypatch):
    whole = detector.score(features)
    monkeypatch.setattr(cfm, "_CHUNK", 100)
    assert_close(detector.score(features).map, whole.map, rtol=1e-4, atol=1e-5)
    pixels = detector._inside(features)[0].nonzero()[:, 0]
    assert len(pixels) > 64  # more than cells of either grid: lifted; a few are not
    many, few = next(detector._mapped(features, 0, [pixels])), next(detector._mapped(features, 0, [pixels[:20]]))
    for name in ("rgb", "xyz"):
        assert_close(many[name][0][:20], few[name][0], rtol=1e-4, atol=1e-5)


def test_loss_over_all_pixels_is_eq_1(detector, features):
    rgb, xyz = dense_pixels(features)
    inside = (xyz != 0).any(-1)
    terms = with_settings(detector, pixels_per_part=None).loss(features)
    with torch.no_grad():
        assert_close(terms["xyz"], mapping_loss(detector.mapping["xyz"](rgb), xyz, inside), rtol=1e-5, atol=1e-6)
        assert_close(terms["rgb"], mapping_loss(detector.mapping["rgb"](xyz), rgb, inside), rtol=1e-5, atol=1e-6)


def test_drawn_pixels_are_inside_new_every_epoch_and_the_same_again(detector, features):
    few = with_settings(detector, pixels_per_part=50)
    inside = few._inside(features)

    def drawn(seed):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            before = torch.get_rng_state()
            found = list(few._drawn(features))
            assert torch.equal(before, torch.get_rng_state())
        return torch.cat([64 * 64 * part + pixels for part, pixels in found])

    first = drawn(1)
    assert len(first) == 150 == len(first.unique())
    assert bool(inside.flatten()[first].all())
    assert torch.equal(first, drawn(1))
    assert not torch.equal(first, drawn(2))
    assert len(drawn(1)) == 150
    every = with_settings(detector, pixels_per_part=10_000)
    assert sum(len(pixels) for _, pixels in every._drawn(features)) == int(inside.sum())


def test_each_term_trains_its_own_network(detector, features):
    terms = detector.loss(features)
    for name, other in (("xyz", "rgb"), ("rgb", "xyz")):
        own, others = (list(detector.mapping[key].parameters()) for key in (name, other))
        gradients = torch.autograd.grad(terms[name], [*own, *others], retain_graph=True, allow_unused=True)
        assert all(gradient is not None for gradient in gradients[: len(own)])
        assert all(gradient is None for gradient in gradients[len(own) :])


# -- the official program --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def official() -> tuple[Golden, Features]:
    """The stored run's group features, cloud and RGB grid as the features of one part."""
    golden = Golden("07_cfm.npz")
    near, share = torch.zeros(1, 224 * 224, 3, dtype=torch.int16), torch.zeros(1, 224 * 224, 3)
    points, centres = golden.tensor("valid_xyz")[None], golden.tensor("centers")[None]
    index, weight = interpolation_weights(points, centres)
    place = golden.tensor("valid_idx")
    near[0, place], share[0, place] = index[0].to(torch.int16), weight[0]
    part = {
        "valid": torch.zeros(1, 224, 224, dtype=torch.bool),
        "rgb.grid": noise("rgb_map", 1, 24, 28, 28),
        "xyz.groups": noise("group_features", 1, 36, 256).mT.contiguous(),
        "xyz.near": near,
        "xyz.share": share,
    }
    return golden, part


@pytest.fixture(scope="module")
def official_patches(official) -> tuple[Tensor, Tensor]:
    """Features of all 50,176 pixels by the maps that `score` uses."""
    _, part = official
    every = torch.arange(224 * 224)
    rgb = rgb_pixels(part, every).apply(part["rgb.grid"].flatten(2).mT.contiguous())[0]
    return rgb, point_pixels(part, 0, every).apply(part["xyz.groups"])[0]


def test_pixel_features_equal_the_official_program(official, official_patches):
    golden, _ = official
    golden.check("rgb_patch", official_patches[0], 1e-5)
    golden.check("xyz_patch_double", official_patches[1], 3e-5)  # 1e-5 absolute


@torch.no_grad()
def test_inference_equals_the_official_program(detector, official, official_patches):
    golden, _ = official
    rgb, xyz = official_patches
    to_xyz, to_rgb = FeatureMapping(24, 36), FeatureMapping(36, 24)
    for net, inputs, outputs in ((to_xyz, 24, 36), (to_rgb, 36, 24)):
        net.load_state_dict(feature_mapping_state(filled_state(mapping(inputs, outputs)), net))
    defects = torch.zeros(3, 224, 224)
    for i, *corners in golden.tensor("gt_rows").tolist():
        for y0, y1, x0, x1 in (corners[:4], corners[4:]):
            defects[i, y0:y1, x0:x1] = 1
    measured = (xyz != 0).all(1)
    d_rgb, d_xyz = torch.zeros(3, 224, 224), torch.zeros(3, 224, 224)
    for i in range(3):
        f_rgb = rgb + 0.1 * noise(f"rgb_noise{i}", 50176, 24)
        f_xyz = xyz * (1 + 0.1 * noise(f"xyz_noise{i}", 50176, 36))
        f_xyz = f_xyz + 3 * (defects[i].flatten() * measured)[:, None]
        inside = f_xyz.sum(1) != 0
        d_xyz[i] = (direction_distance(to_xyz(f_rgb), f_xyz) * inside).view(224, 224)
        d_rgb[i] = (direction_distance(to_rgb(f_xyz), f_rgb) * inside).view(224, 224)
        golden.check(f"fused_{i}", fuse(d_rgb[i], d_xyz[i], "product"), 4e-5)  # 1e-5 of the maximum, 4 spreads
    golden.check("last_cos_3d", d_xyz[2], 3e-5)
    golden.check("last_cos_2d", d_rgb[2], 3e-5)
    chosen = {how: with_settings(detector, normalise=how).judge(d_rgb, d_xyz) for how in ("aupro", "pauroc", "none")}
    golden.check("last_blurred", chosen["none"].map[2], 3e-5)
    for i in range(3):
        golden.check(f"pred_{i}", chosen["aupro"].map[i], 3e-5)
    golden.check("pixel_preds", chosen["pauroc"].map, 3e-5)
    expected = golden.tensor("image_preds")
    for how in ("aupro", "pauroc"):
        assert_close(chosen[how].score, expected, rtol=1e-5, atol=0)
    assert_close(detector.judge(d_rgb, d_xyz).score, expected, rtol=1e-5, atol=0)
    assert_close(detector.judge(d_rgb, d_xyz).map.flatten(1).amax(1), expected, rtol=1e-5, atol=0)


# -- closed forms ----------------------------------------------------------------------------------------------------


def test_distance_of_directions():
    x, y = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 0.2]])
    assert float(direction_distance(x, 7 * x)) == 0
    assert float(direction_distance(x, y)) == pytest.approx(2**0.5, abs=1e-6)
    assert float(direction_distance(x, -y - 1e-9 * x)) == pytest.approx(2**0.5, abs=1e-6)
    assert float(direction_distance(x, -x)) == pytest.approx(2, abs=1e-6)
    a, b = noise("a", 50, 9), noise("b", 50, 9)
    assert_close(direction_distance(a, b), (2 - 2 * torch.cosine_similarity(a, b)).sqrt(), rtol=0, atol=1e-6)


def test_fusion_by_hand():
    d2, d3 = torch.tensor([0.0, 0.5, 2.0]), torch.tensor([1.0, 1.5, 2.0])
    expected = {"product": [0, 0.75, 4], "sum": [1, 2, 4], "max": [1, 1.5, 2], "d2": [0, 0.5, 2], "d3": [1, 1.5, 2]}
    for rule, values in expected.items():
        assert fuse(d2, d3, rule).tolist() == values


def test_blur_of_an_impulse():
    impulse = torch.zeros(1, 224, 224, dtype=torch.float64)
    impulse[0, 112, 112] = 1
    blurred = blur_boxes(impulse)[0]
    assert float(blurred.sum()) == pytest.approx(1, abs=1e-9)
    assert float(blurred.max()) == pytest.approx(0.0069094, abs=1e-7)
    rows = (blurred != 0).any(1).nonzero()[:, 0]
    assert (int(rows[0]), int(rows[-1])) == (93, 131)  # 39 pixels
    variance = float((blurred.sum(1) * (torch.arange(224) - 112.0).square()).sum())
    assert variance**0.5 == pytest.approx(4.690416, abs=1e-6)
    assert_close(blurred, blur_by_definition(impulse)[0], rtol=1e-9, atol=1e-15)


def test_blur_darkens_towards_the_border():
    blurred = blur_boxes(torch.ones(1, 224, 224))[0]
    assert float(blurred[112, 112]) == pytest.approx(1, abs=1e-6)
    assert float(blurred[0, 112]) == pytest.approx(0.280057, abs=1e-6)
    assert float(blurred[0, 0]) == pytest.approx(0.078432, abs=1e-6)
    maps = noise("m", 2, 48, 40).abs()  # not square, narrower than twice the kernel
    assert_close(blur_boxes(maps), blur_by_definition(maps), rtol=1e-5, atol=1e-6)


def test_normalisations_by_hand_and_their_scaling():
    b = torch.tensor([[[0.0, 0.0], [1.0, 3.0]], [[0.0, 0.0], [0.0, 0.0]]])
    for how, divisor in {"score": 2**0.5, "aupro": 2, "pauroc": 1, "none": 1}.items():
        assert_close(normalise_maps(b, how), b / divisor)  # a map of zeros stays one
    assert_close(normalise_maps(4 * b, "score"), 2 * normalise_maps(b, "score"))
    assert_close(normalise_maps(4 * b, "aupro"), normalise_maps(b, "aupro"))
    assert_close(normalise_maps(4 * b, "pauroc"), 2 * normalise_maps(b, "pauroc"))


@torch.no_grad()
def test_pooling_keeps_constants_and_has_narrow_edges(official):
    _, part = official
    every, ones = torch.arange(224 * 224), torch.ones(1, 256, 1)
    share = torch.zeros(1, 224 * 224, 3)
    share[..., 0] = 1
    full = point_pixels(part | {"xyz.share": share}, 0, every).apply(ones)
    assert_close(full, torch.ones_like(full), rtol=0, atol=1e-6)
    share = share.clone().view(224, 224, 3)
    share[:, 112:] = 0
    half = point_pixels(part | {"xyz.share": share.view(1, -1, 3)}, 0, every).apply(ones).view(224, 224)
    between = (half > 0) & (half < 1 - 1e-6)
    assert 1 <= int(between[100].sum()) <= 4
    assert bool((half.diff(dim=1) <= 1e-6).all())


@torch.no_grad()
def test_rgb_between_cells_is_monotone_and_flat_at_the_border(official):
    _, part = official
    column = torch.arange(28.0).expand(28, 28).reshape(1, -1, 1)
    row = rgb_pixels(part, torch.arange(224)).apply(column)[0, :, 0]
    assert bool((row.diff() >= 0).all())
    assert row[:4].tolist() == [0] * 4
    assert row[-4:].tolist() == [27] * 4
    assert_close(row, F.interpolate(torch.arange(28.0)[None, None], size=224, mode="linear")[0, 0])


def test_loss_of_unrelated_features_is_one():
    assert float(mapping_loss(noise("a", 10_000, 768), noise("b", 10_000, 768))) == pytest.approx(1, abs=2e-3)


def test_what_breaks_the_link_between_views_is_found():
    """A linear link, 4 good parts of 784 patches; in a new part a fifth of the patches has another's point features."""
    torch.manual_seed(0)
    link = torch.randn(24, 16) / 4
    to_xyz, to_rgb = FeatureMapping(16, 24), FeatureMapping(24, 16)
    optimizer = torch.optim.Adam([*to_xyz.parameters(), *to_rgb.parameters()], lr=1e-3)

    def part() -> tuple[Tensor, Tensor]:
        rgb = torch.randn(784, 16)
        return rgb, rgb @ link.T + 0.1 * torch.randn(784, 24)

    good = [part() for _ in range(4)]
    for _ in range(12):
        for rgb, xyz in good:
            for patches in torch.randperm(784).split(28):
                loss = mapping_loss(to_xyz(rgb[patches]), xyz[patches]) + mapping_loss(
                    to_rgb(xyz[patches]), rgb[patches]
                )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    rgb, xyz = part()
    swapped = torch.arange(784) < 157
    xyz[swapped] = xyz[swapped].roll(1, 0)
    with torch.no_grad():
        score = fuse(direction_distance(to_rgb(xyz), rgb), direction_distance(to_xyz(rgb), xyz), "product")
    assert auroc(score.double().numpy(), swapped.int().tolist()) > 0.95


# -- switches --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_switches_of_the_map(detector, features):
    d_rgb, d_xyz = dense_distances(detector, features)
    for fusion in ("product", "sum", "max", "d2", "d3"):
        prediction = with_settings(detector, fusion=fusion, blur="none", normalise="none").score(features)
        assert_close(prediction.map, fuse(d_rgb, d_xyz, fusion), rtol=1e-4, atol=1e-5)
        assert_close(prediction.score, prediction.map.flatten(1).amax(1))
        assert_close(prediction.branch_maps["xyz"], d_xyz, rtol=1e-4, atol=1e-5)
    boxes = with_settings(detector, normalise="none").score(features).map
    gaussian = with_settings(detector, blur="gaussian", normalise="none").score(features).map
    centre = (slice(None), slice(24, 40), slice(24, 40))
    assert float((boxes - gaussian)[centre].abs().max()) < 0.02 * float(boxes.max())  # as wide as the boxes
    wide = with_settings(detector, blur="gaussian", blur_sigma=9.0, normalise="none").score(features).map
    assert not torch.allclose(gaussian, wide, rtol=0.05)


@torch.no_grad()
def test_a_part_without_points_scores_zero(detector):
    prediction = detector.score(detector.extract(blinded(tiny_batch([1]))))
    assert float(prediction.score) == 0
    assert not bool(prediction.map.any())


def test_a_batch_without_points_cannot_be_learned_from(detector):
    with pytest.raises(DataError, match="nothing to learn from"):
        detector.loss(detector.extract(blinded(tiny_batch([1, 2]))))


def test_blocks_kept_of_both_transformers():
    vit = {"backbone": "vit_tiny_patch16_224", "reductions": (16,)}
    for kept, layers in {12: (3, 7, 11), 8: (1, 4, 7), 4: (1, 2, 3), 2: (1,), 1: (0,)}.items():
        assert CFMConfig(blocks_kept=kept).layers == layers
    assert CFMConfig().layers is None
    assert CFMConfig(blocks_kept=4, point_layers=(2,)).layers == (2,)
    cut = build(**vit, blocks_kept=2, point_layers=None)
    points = cut.extractor.get_submodule("xyz.network")
    assert isinstance(points, PointTransformer)
    assert len(points.blocks) == 2
    assert cut.extractor.channels == {"rgb": 192, "xyz": 384}
    image = cut.extractor.rgb.network.model
    assert len(image.blocks) == 2
    with torch.no_grad():
        x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        (got,) = cut.extractor.rgb.features(x)
        tokens = image.norm(image.blocks(image._pos_embed(image.patch_embed(x))))[:, 1:]  # without the class token
        assert_close(got.flatten(2).mT, tokens, rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match=r"`blocks` is for transformers on one grid .* 'efficientnet_lite0' is none"):
        build(blocks_kept=4)
    with pytest.raises(ConfigError, match=r"`blocks` of backbone 'vit_tiny_patch16_224' must be in 1\.\.12, got 13"):
        build(**vit, blocks_kept=13)


def test_the_big_mapper_has_five_hidden_layers(detector):
    big = build(mapper="big")
    assert len(big.mapping["xyz"].hidden) == 5
    assert len(detector.mapping["xyz"].hidden) == 1
    channels = big.extractor.channels
    assert big.mapping["xyz"].input.in_features == channels["rgb"] == 152
    assert big.mapping["xyz"].output.out_features == channels["xyz"] == 384


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "`epochs` of CFM must be at least 1"),
        ({"blocks_kept": 0}, "`blocks_kept` of CFM must be at least 1, or null"),
        ({"pixels_per_part": 0}, "`pixels_per_part` of CFM must be at least 1, or null"),
        ({"blur_sigma": -1.0}, "`blur_sigma` of CFM must be 0 or more"),
        ({"checkpoint": ("one.pth",)}, "`checkpoint` of CFM must be two files"),
        ({"mapper": "huge"}, "`mapper` of CFM must be one of base, big"),
        ({"fusion": "d1"}, "`fusion` of CFM must be one of product, sum, max, d2, d3"),
        ({"blur": "box"}, "`blur` of CFM must be one of boxes, gaussian, none"),
        ({"blocks_kept": 4, "point_layers": (3, 7, 11)}, "`point_layers` of CFM must be below `blocks_kept`, 4"),
        ({"normalise": "mean"}, "`normalise` of CFM must be one of score, aupro, pauroc, none"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        CFMConfig(**settings)


def test_an_image_that_does_not_fit_the_grid_is_named(detector):
    with pytest.raises(ShapeError, match=r"CFM needs multiples of 16"):
        detector.extract(tiny_batch([1], size=72))


def test_presets_and_preparation():
    assert detector_class("cfm") is CFM
    paper = configure(CFM, preset="paper")
    assert (paper.backbone, paper.reductions, paper.layers) == ("vit_base_patch8_224.dino", (8,), (3, 7, 11))
    assert (paper.epochs, paper.batch_size, paper.learning_rate, paper.pixels_per_part) == (50, 4, 1e-3, None)
    own, btf = PREPARATIONS[CFM.PREPARATION["paper"]], PREPARATIONS["btf"]
    changed = {f.name for f in dataclasses.fields(own) if getattr(own, f.name) != getattr(btf, f.name)}
    assert changed == {"pad_rgb", "remove_from"}
    assert own.pad_rgb == "edge"
    assert "rgb" not in own.remove_from


# -- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def released(tmp_path):
    """A pair of files as released, for the widths of the tiny detector; and its direction 2D to 3D in the big form."""
    files = {}
    for name, shapes in {
        "2Dto3D": mapping(152, 384),
        "3Dto2D": mapping(384, 152),
        "big": mapping(152, 384, big=True),
        "other": mapping(768, 1152),
        "nothing": {"weight": (3, 3)},
    }.items():
        torch.save(filled_state(shapes), tmp_path / f"CFM_{name}.pth")
        files[name] = str(tmp_path / f"CFM_{name}.pth")
    return files


def test_released_files_are_recognised_by_shape_and_train_nothing(released):
    for order in (("2Dto3D", "3Dto2D"), ("3Dto2D", "2Dto3D")):
        detector = build(checkpoint=tuple(released[name] for name in order))
        for name, shapes in (("xyz", mapping(152, 384)), ("rgb", mapping(384, 152))):
            state, net = filled_state(shapes), detector.mapping[name]
            assert isinstance(net, FeatureMapping)
            assert torch.equal(net.hidden[0].weight, state["projection.weight"])
            assert torch.equal(net.output.bias, state["output.bias"])
            assert len(detector.sources[f"mapping.{name}"]["sha256"]) == 64
    before = nn.utils.parameters_to_vector(detector.mapping.parameters()).clone()
    written = [f"{released[name]}.safetensors" for name in ("3Dto2D", "2Dto3D")]
    for name, out in zip(("3Dto2D", "2Dto3D"), written):
        assert main(["weights", "import", released[name], "--out", out]) == 0
    imported = build(checkpoint=tuple(written)).mapping
    assert torch.equal(before, nn.utils.parameters_to_vector(imported.parameters()))
    parts = TinyParts(range(2))
    fitted = Engine(EngineConfig(device="cpu")).fit(detector, {"train": parts, "validation": parts})
    assert torch.equal(before, nn.utils.parameters_to_vector(fitted.mapping.parameters()))
    assert torch.isfinite(fitted(tiny_batch([5])).score).all()


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (("big", "3Dto2D"), r"CFM_big\.pth' \(for `mapper` base\) has 'projection_b\.weight'"),
        (("2Dto3D", "2Dto3D"), "map in the same direction"),
        (("other", "3Dto2D"), r"maps 768 channels to 1152, this detector's networks 152 to 384 and 384 to 152"),
        (("nothing", "3Dto2D"), r"has no matrix 'input\.weight'"),
    ],
)
def test_files_that_do_not_fit_are_refused(released, pair, message):
    with pytest.raises(WeightsError, match=message):
        build(checkpoint=tuple(released[name] for name in pair))
