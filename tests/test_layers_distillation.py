"""Shared blocks of distillation methods: widths, mixing, losses, maps, smoothing and map statistics."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import nn
from torch.testing import assert_close

from polyspect.layers.blocks import (
    BlockPlan,
    ForwardTrunk,
    ReverseDecoder,
    init_convolutions,
    plan_blocks,
    residual_stage,
)
from polyspect.layers.bottleneck import OneClassEmbedding
from polyspect.layers.distillation import cosine_losses, kept_cells
from polyspect.layers.maps import (
    MapMoments,
    cosine_map,
    cosine_shares,
    enlarge,
    fill_unkept,
    gaussian_smooth,
    top_mean,
)
from polyspect.layers.projection import AmplifierProjection, FilterProjection

WIDE, SMALL = (256, 512, 1024), (64, 128, 256)
TINY = (4, 6, 10)
PLAN = BlockPlan("basic", 1, 2, (2, 2, 2))


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def features(seed=0, channels=TINY, batch=2, size=64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, c, size // s, size // s, generator=generator) for c, s in zip(channels, (4, 8, 16))]


# -- sizes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backbone", "channels", "embedding", "decoder"),
    [
        ("wide_resnet50_2.tv_in1k", WIDE, 58_885_120, 24_917_504),
        ("resnet50", WIDE, 30_829_568, 46_651_392 - 30_829_568),
        ("resnet34", SMALL, 16_400_640, 5_770_624),
        ("resnet18.tv_in1k", SMALL, 11_680_000, 3_703_168),
        ("resnet10t", SMALL, 11_680_000, 3_703_168),
    ],
)
def test_plain_students_have_the_published_sizes(backbone, channels, embedding, decoder):
    plan = plan_blocks(backbone, channels)
    with torch.device("meta"):
        assert parameters(OneClassEmbedding(channels, plan)) == embedding
        assert parameters(ReverseDecoder(channels, plan)) == decoder


def test_crossmodal_parts_have_the_published_sizes():
    with torch.device("meta"):
        plan = plan_blocks("wide_resnet50_2", WIDE)
        assert parameters(OneClassEmbedding(WIDE, plan, sources=2)) == 90_738_688
        assert parameters(OneClassEmbedding(WIDE, plan, sources=2).stage) == 48_263_168
        scales = FilterProjection(WIDE).scales
        assert [parameters(scale) for scale in scales] == [22_030_848, 20_980_736, 16_783_360]
        scales = AmplifierProjection(WIDE).scales
        assert [parameters(scale) for scale in scales] == [854_016, 3_411_968, 13_639_680]
        assert parameters(ReverseDecoder(WIDE, plan, assistants=1)) == 24_917_504 + 6
        assert parameters(OneClassEmbedding(SMALL, plan_blocks("resnet18", SMALL), sources=2)) == 13_671_424
        assert parameters(FilterProjection(SMALL)) == 3_742_080
        assert parameters(AmplifierProjection(SMALL)) == 1_121_792


def test_projections_without_squeezing_or_widening_are_one_3x3_and_one_1x1():
    plain = sum(10 * c**2 + 4 * c for c in WIDE)
    with torch.device("meta"):
        assert parameters(FilterProjection(WIDE, None)) == parameters(AmplifierProjection(WIDE, None)) == plain
        deepest = FilterProjection(WIDE, 64).scales[2]
    assert [m.out_channels for m in deepest if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)] == [
        2048,
        2048,
        2048,
        1024,
    ]


@pytest.mark.parametrize("stride", [16, 32, 64, None])
def test_filter_squeezes_to_its_stride_and_restores_the_shape(stride):
    projection, maps = FilterProjection(TINY, stride).eval(), features(size=128)
    narrowest = []
    for part in projection.modules():
        if isinstance(part, nn.Conv2d):
            part.register_forward_hook(lambda _m, _i, out: narrowest.append(out.shape[-1]))
    out = projection(maps)
    assert [x.shape for x in out] == [x.shape for x in maps]
    assert min(narrowest) == (128 // stride if stride else 8)


def test_embedding_and_decoder_restore_shapes_for_odd_channel_counts():
    maps = features(channels=(5, 7, 11))
    embedding = OneClassEmbedding((5, 7, 11), PLAN)(maps)
    assert embedding.shape == (2, 22, 2, 2)
    raw, mixed = ReverseDecoder((5, 7, 11), PLAN)(embedding)
    assert [x.shape for x in raw] == [x.shape for x in maps]
    assert all(a is b for a, b in zip(raw, mixed))


@pytest.mark.parametrize("plan", [PLAN, BlockPlan("bottleneck", 2, 3, (3, 4, 6))], ids=["basic", "bottleneck"])
def test_only_decoders_of_nonnegative_features_end_in_a_relu(plan):
    maps, channels = features(channels=(4, 6, 8)), (4, 6, 8)
    for nonneg in (True, False):
        torch.manual_seed(0)
        embedding = OneClassEmbedding(channels, plan)(maps)
        raw, _ = ReverseDecoder(channels, plan, nonneg=nonneg)(embedding)
        projected = FilterProjection(channels, nonneg=nonneg)(maps) + AmplifierProjection(channels, nonneg=nonneg)(maps)
        assert {bool((x >= 0).all()) for x in [*raw, *projected]} == {nonneg}


def test_stage_keeps_inner_relus_when_the_last_is_dropped():
    stage = residual_stage(PLAN, 3, 4, 2, "up", last_relu=False)
    assert [block.last_relu for block in stage] == [True, False]


def test_convolutions_start_kaiming_fan_out_and_transposed_ones_as_torch_has_them():
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(16, 64, 3, bias=False), nn.ConvTranspose2d(16, 64, 2, bias=False))
    before = block[1].weight.clone()
    init_convolutions(block)
    assert_close(block[0].weight.std(), torch.tensor((2 / (64 * 9)) ** 0.5), rtol=0.05, atol=0)
    assert torch.equal(block[1].weight, before)


# -- mixing ------------------------------------------------------------------------------------------------------------


def test_decoder_mixes_with_softmax_weights_and_passes_the_mix_on():
    decoder = ReverseDecoder(TINY, PLAN, assistants=1).eval()
    embedding, helper = torch.randn(2, 20, 2, 2, generator=torch.Generator().manual_seed(1)), features(seed=3)
    assert all(torch.equal(theta, torch.ones(2)) for theta in decoder.theta)
    with torch.no_grad():
        decoder.theta[0].copy_(torch.tensor([2.0, 1.0]))
        raw, mixed = decoder(embedding, [helper])
        assert_close(mixed[2], 0.731059 * raw[2] + 0.268941 * helper[2], rtol=1e-5, atol=1e-5)
        assert_close(raw[1], decoder.stages[1](mixed[2]))
        assert_close(mixed[1], 0.5 * raw[1] + 0.5 * helper[1])
        assert_close(mixed[0], 0.5 * decoder.stages[2](mixed[1]) + 0.5 * helper[0])


def test_decoder_with_all_weight_on_the_student_ignores_its_assistants():
    decoder = ReverseDecoder(TINY, PLAN, assistants=2).eval()
    embedding = torch.randn(2, 20, 2, 2, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for theta in decoder.theta:
            theta.copy_(torch.tensor([60.0, -50.0, -50.0]))
        raw, mixed = decoder(embedding, [features(seed=3), features(seed=4)])
        for r, g in zip(raw, mixed):
            assert torch.equal(r, g)


# -- priors ------------------------------------------------------------------------------------------------------------


def test_a_decoder_with_priors_has_the_published_size():
    with torch.device("meta"):
        wide = ReverseDecoder(WIDE, plan_blocks("wide_resnet50_2", WIDE), priors="input")
        small = ReverseDecoder(SMALL, plan_blocks("resnet18", SMALL), priors="input")
        assert parameters(wide) == 27_866_624
        assert parameters(small) == 4_030_848
        first = wide.stages[1][0]
        assert tuple(first.conv1.weight.shape) == (256, 2048, 1, 1)
        assert tuple(first.upsample[0].weight.shape) == (2048, 512, 2, 2)


def test_priors_behind_every_stage_pass_a_1x1_convolution():
    decoder = ReverseDecoder(TINY, PLAN, priors="output").eval()
    embedding, priors = torch.randn(2, 20, 2, 2, generator=torch.Generator().manual_seed(1)), features(seed=3)
    with torch.no_grad():
        raw, mixed = decoder(embedding, priors=priors)
        for i in range(3):
            weight, bias = decoder.join[2 - i].weight, decoder.join[2 - i].bias
            joined = torch.einsum("oc,bchw->bohw", weight[:, :, 0, 0], torch.cat([raw[i], priors[i]], 1))
            assert_close(mixed[i], joined + bias[:, None, None], rtol=1e-4, atol=1e-5)
        assert_close(raw[0], decoder.stages[2](mixed[1]))


def test_a_forward_trunk_is_a_resnets_and_takes_priors_beside_its_stages():
    with torch.device("meta"):
        assert parameters(ForwardTrunk(WIDE, plan_blocks("wide_resnet50_2", WIDE))) == 24_862_528
    trunk = ForwardTrunk(TINY, PLAN, inputs=6, priors=True).eval()
    x = torch.randn(2, 6, 64, 64, generator=torch.Generator().manual_seed(1))
    priors = features(seed=3)
    with torch.no_grad():
        first, second, third = trunk(x, priors)
        assert_close(second, trunk.stages[1](torch.cat([first, priors[0]], 1)))
        assert_close(third, trunk.stages[2](torch.cat([second, priors[1]], 1)))
    assert [y.shape for y in (first, second, third)] == [y.shape for y in priors]


# -- losses ------------------------------------------------------------------------------------------------------------


def two_positions():
    student = torch.tensor([[3.0, 0.0], [1.0, 0.0]]).T.reshape(1, 2, 1, 2)  # B C h w: (3,0) and (1,0)
    teacher = torch.tensor([[3.0, 0.0], [0.0, 1.0]]).T.reshape(1, 2, 1, 2)
    return student, teacher


def test_flat_and_pixel_losses_on_two_positions():
    student, teacher = two_positions()
    assert_close(cosine_losses({"x": [student]}, [teacher])["x"], torch.tensor(0.1))
    assert_close(cosine_losses({"x": [student]}, [teacher], kind="pixel")["x"], torch.tensor(0.5))


@pytest.mark.parametrize("kind", ["flat", "pixel"])
def test_loss_is_zero_for_scaled_targets_one_per_scale_for_orthogonal_ones_and_finite_for_zeros(kind):
    teacher = [torch.stack([x.abs(), torch.zeros_like(x)], dim=1).flatten(1, 2) for x in features()]
    orthogonal = [x.flip(1) for x in teacher]
    zero = [torch.zeros_like(x, requires_grad=True) for x in teacher]
    predictions = {"same": [3 * x for x in teacher], "other": orthogonal, "zero": zero}
    losses = cosine_losses(predictions, teacher, kind=kind)
    assert_close(losses["same"], torch.tensor(0.0), atol=1e-5, rtol=0)
    assert_close(losses["other"], torch.tensor(3.0))
    assert_close(losses["zero"], torch.tensor(3.0))
    losses["zero"].backward()
    assert all(bool(x.grad.isfinite().all()) for x in zero)


@pytest.mark.parametrize("kind", ["flat", "pixel"])
def test_losses_equal_loops_with_and_without_a_mask(kind):
    student, teacher = features(seed=1), features(seed=2)
    keep = torch.rand(2, 64, 64, generator=torch.Generator().manual_seed(3)) > 0.99
    keep[0, :32] = False
    for mask in (None, keep):
        expected = 0.0
        for s, t in zip(student, teacher):
            cells = torch.ones(2, *s.shape[-2:], dtype=torch.bool) if mask is None else kept_cells(mask, s.shape[-2:])
            if kind == "flat":
                pairs = [(s[b][:, cells[b]].flatten(), t[b][:, cells[b]].flatten()) for b in range(2)]
            else:
                pairs = [(s[b, :, i, j], t[b, :, i, j]) for b, i, j in cells.nonzero().tolist()]
            expected += np.mean([1 - float(x @ y / (x.norm() * y.norm())) for x, y in pairs])
        assert float(cosine_losses({"x": student}, teacher, kind=kind, keep=mask)["x"]) == pytest.approx(
            expected, rel=1e-4
        )


def test_a_part_without_kept_positions_leaves_the_loss_of_the_others():
    student, teacher = features(seed=1), features(seed=2)
    keep = torch.ones(2, 64, 64, dtype=torch.bool)
    keep[1] = False
    alone = cosine_losses({"x": [s[:1] for s in student]}, [t[:1] for t in teacher])["x"]
    assert_close(cosine_losses({"x": student}, teacher, keep=keep)["x"], alone)


def test_flat_loss_does_not_depend_on_the_memory_format():
    student, teacher = features(seed=1), features(seed=2)
    other = [x.contiguous(memory_format=torch.channels_last) for x in student]
    losses = cosine_losses({"nchw": student, "nhwc": other}, teacher)
    assert_close(losses["nchw"], losses["nhwc"])


def test_a_cell_is_kept_when_any_of_its_pixels_is():
    keep = torch.zeros(1, 8, 8, dtype=torch.bool)
    keep[0, 5, 2] = True
    assert kept_cells(keep, (2, 2)).tolist() == [[[False, False], [True, False]]]


# -- maps --------------------------------------------------------------------------------------------------------------


def test_map_on_two_positions_and_corner_aligned_enlargement():
    student, teacher = two_positions()
    assert_close(cosine_map([student], [teacher], (1, 2)), torch.tensor([[[0.0, 1.0]]], dtype=torch.float64))
    assert_close(cosine_map([student], [teacher], (1, 4))[0, 0], torch.tensor([0, 1 / 3, 2 / 3, 1]).double())


def test_map_sums_scales_and_a_zero_vector_counts_one():
    teacher = features(seed=2)
    zeros = [torch.zeros_like(x) for x in teacher]
    assert_close(cosine_map(zeros, teacher, (64, 64)), torch.full((2, 64, 64), 3.0, dtype=torch.float64))
    assert_close(cosine_map(teacher, teacher, (64, 64)), torch.zeros(2, 64, 64, dtype=torch.float64), atol=1e-6, rtol=0)


def test_masked_map_ignores_what_lies_in_cells_without_a_kept_pixel():
    student, teacher = features(seed=1), features(seed=2)
    keep = torch.ones(2, 64, 64, dtype=torch.bool)
    keep[:, 16:48, 32:] = False  # whole cells at every scale
    clean = cosine_map(student, teacher, (64, 64), keep)
    spoilt = [s.clone() for s in student]
    for s, stride in zip(spoilt, (4, 8, 16)):
        s[:, :, 16 // stride : 48 // stride, 32 // stride :] = 100.0
    assert_close(cosine_map(spoilt, teacher, (64, 64), keep)[keep], clean[keep])
    assert not torch.allclose(cosine_map(spoilt, teacher, (64, 64))[keep], clean[keep])
    assert_close(cosine_map(student, teacher, (64, 64), torch.ones_like(keep)), cosine_map(student, teacher, (64, 64)))


def test_scales_can_be_multiplied():
    student, teacher = features(seed=1), features(seed=2)
    each = [cosine_map([s], [t], (64, 64)) for s, t in zip(student, teacher)]
    assert_close(cosine_map(student, teacher, (64, 64), multiply=True), each[0] * each[1] * each[2])


def test_shares_of_a_distance_add_up_and_follow_their_summand():
    student, first, second = (features(seed=s)[0] for s in (1, 2, 3))
    shares = cosine_shares(student, [first, second])
    distance = 1 - torch.nn.functional.cosine_similarity(student, first + second, dim=1)
    assert_close(shares.sum(1), distance, rtol=1e-4, atol=1e-5)
    assert_close(cosine_shares(student, [first])[:, 0], 1 - torch.nn.functional.cosine_similarity(student, first))
    silent = cosine_shares(student, [first, torch.zeros_like(first)])
    assert_close(silent[:, 1], torch.zeros_like(distance))
    # T = (1, 0) + (0, 1); S = (1, 0): the second summand is what is missing
    by_hand = cosine_shares(
        torch.tensor([1.0, 0.0]).view(1, 2, 1, 1), [torch.tensor(v).view(1, 2, 1, 1) for v in ([1.0, 0], [0, 1.0])]
    ).flatten()
    assert_close(by_hand, torch.tensor([0.5 - 0.5**0.5, 0.5]))
    nothing = cosine_shares(student, [torch.zeros_like(first)] * 2)
    assert torch.equal(nothing, torch.zeros_like(nothing))


def test_unkept_pixels_get_the_mean_of_the_others():
    maps = torch.tensor([[[1.0, 2.0], [3.0, 9.0]], [[5.0, 5.0], [5.0, 5.0]]])
    keep = torch.tensor([[[True, True], [True, False]], [[False, False], [False, False]]])
    assert fill_unkept(maps, keep).tolist() == [[[1.0, 2.0], [3.0, 2.0]], [[0.0, 0.0], [0.0, 0.0]]]
    assert torch.equal(enlarge(maps, (2, 2)), maps)


@pytest.mark.parametrize("shape", [(40, 56), (64, 64), (7, 5)])
def test_smoothing_equals_scipy(shape):
    maps = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = np.stack([gaussian_filter(m, 4) for m in maps.numpy()])
    np.testing.assert_allclose(gaussian_smooth(maps, 4).numpy(), expected, atol=1e-12, rtol=0)


def test_smoothing_spreads_an_impulse_keeps_constants_and_is_linear():
    impulse = torch.zeros(65, 65, dtype=torch.float64)
    impulse[32, 32] = 1
    smooth = gaussian_smooth(impulse, 4)
    assert float(smooth.max()) == pytest.approx(0.00994789, rel=1e-6)
    assert float(smooth.sum()) == pytest.approx(1)
    assert smooth[32].nonzero().flatten().tolist() == list(range(16, 49))
    corner = gaussian_smooth(impulse.roll((-32, -32), (0, 1)), 4)
    assert float(corner[0, 0]) == pytest.approx(0.0385767, rel=1e-5)
    assert_close(gaussian_smooth(torch.full((9, 30), 4.0), 4), torch.full((9, 30), 4.0))
    a, b = torch.rand(2, 64, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert_close(gaussian_smooth(a + b, 4), gaussian_smooth(a, 4) + gaussian_smooth(b, 4), atol=1e-12, rtol=0)
    assert gaussian_smooth(impulse, 0) is impulse


# -- statistics --------------------------------------------------------------------------------------------------------


def test_moments_are_the_population_moments_of_all_kept_pixels():
    generator = np.random.default_rng(0)
    maps = generator.normal(1000, 0.01, (7, 2, 5, 6))
    keep = generator.random((7, 2, 5, 6)) > 0.3
    keep[:3, 1] = False  # nothing kept of the second branch in the first batches
    moments = MapMoments()
    for rows in (slice(0, 2), slice(2, 3), slice(3, 7)):
        moments.add(torch.from_numpy(maps[rows]), torch.from_numpy(keep[rows]))
    count, mean, std = moments.take()
    for k in range(2):
        kept = maps[:, k][keep[:, k]]
        assert float(count[k]) == kept.size
        assert float(mean[k]) == pytest.approx(kept.mean(), rel=1e-13)
        assert float(std[k]) == pytest.approx(kept.std(), rel=1e-9)


def test_moments_of_ones_and_threes_and_a_fresh_start():
    moments = MapMoments()
    for value in (1.0, 3.0):
        moments.add(torch.full((1, 1, 4, 4), value), torch.ones(1, 1, 4, 4, dtype=torch.bool))
    assert [float(x) for x in moments.take()] == [32, 2, 1]
    assert [len(x) for x in moments.take()] == [0, 0, 0]


@pytest.mark.parametrize(
    ("share", "expected"), [(0.0, [9.0, 3.0]), (0.25, [9.0, 3.0]), (0.5, [6.5, 2.5]), (1.0, [4.0, 1.0])]
)
def test_top_mean_by_hand(share, expected):
    maps = torch.tensor([[[9.0, 4.0], [3.0, 0.0]], [[-1.0, 2.0], [0.0, 3.0]]])
    assert top_mean(maps, share).tolist() == expected
