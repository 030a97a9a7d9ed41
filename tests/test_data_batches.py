"""Depth as networks see it, and the stacking of parts into a batch."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from polyspect.data.batches import collate
from polyspect.data.depth_scale import DepthScale, fit_depth_scale, standardise_depth
from polyspect.data.preparation import Preparation, prepare
from polyspect.errors import DataError
from polyspect.samples import Sample

RAW = Preparation(size=8, depth="z", depth_fill="none", normals="none")


def part(depth, valid=None, foreground=None, id="p", **images):
    depth = np.asarray(depth, np.float32)
    valid = np.ones(depth.shape, bool) if valid is None else valid
    everything = np.ones(depth.shape, bool)
    return Sample(id, {"depth": depth, **images}, valid, foreground=everything if foreground is None else foreground)


def test_scale_is_the_percentiles_of_all_measured_foreground():
    values = np.random.default_rng(0).normal(0.02, 0.005, (6, 40, 50))
    valid = np.random.default_rng(1).random((6, 40, 50)) > 0.3
    foreground = np.random.default_rng(2).random((6, 40, 50)) > 0.3
    scale = fit_depth_scale(part(v, k, f) for v, k, f in zip(values, valid, foreground))
    low, high = np.percentile(values[valid & foreground].astype(np.float32), [0.5, 99.5])
    assert (scale.low_m, scale.high_m) == (pytest.approx(low, rel=1e-6), pytest.approx(high, rel=1e-6))


def test_every_part_weighs_alike_however_large():
    big = part(np.full((200, 200), 0.01))
    small = part(np.full((91, 90), 0.03))
    scale = fit_depth_scale([big, small], percentiles=(0, 50.1))
    assert scale.high_m == pytest.approx(0.03)  # 8,000 and 8,190 pixels, not 40,000 and 8,190


def test_noise_of_a_flat_part_is_not_blown_up():
    scale = fit_depth_scale([part(np.full((9, 9), 0.25))])
    assert (scale.low_m, scale.high_m) == (pytest.approx(0.2495), pytest.approx(0.2505))
    assert fit_depth_scale([part(np.full((9, 9), 0.25))], minimum_span_m=0.2).low_m == pytest.approx(0.15)


def test_no_measured_foreground_gives_no_scale():
    nothing = np.zeros((4, 4), bool)
    with pytest.raises(DataError, match="none of the 2 parts"):
        fit_depth_scale([part(np.ones((4, 4)), valid=nothing), part(np.ones((4, 4)), foreground=nothing)])
    with pytest.raises(DataError, match="none of the 0 parts"):
        fit_depth_scale([])
    assert fit_depth_scale([part(np.ones((4, 4)), valid=nothing), part(np.ones((4, 4)))]).high_m > 1


def test_scaled_depth_by_hand_and_not_clipped():
    valid = np.array([[True, True, True], [True, True, False]])
    foreground = np.array([[True, True, True], [True, False, True]])
    sample = part([[0.01, 0.02, 0.03], [0.06, 0.02, 0]], valid, foreground)
    image = standardise_depth(sample, RAW, DepthScale(0.01, 0.03))
    np.testing.assert_allclose(image, [[0.1, 0.5, 0.9], [2.1, 0, 0]], atol=1e-6)
    per_image = standardise_depth(sample, replace(RAW, depth_range="image"), None)
    np.testing.assert_allclose(per_image, [[0.1, 0.26, 0.42], [0.9, 0, 0]], atol=1e-6)
    metres = standardise_depth(sample, replace(RAW, depth_range="none"), None)
    np.testing.assert_allclose(metres, [[0.01, 0.02, 0.03], [0.06, 0, 0]], atol=1e-8)


def test_holes_are_filled_after_scaling():
    valid = np.ones((5, 5), bool)
    valid[2, 2] = False
    foreground = np.ones((5, 5), bool)
    foreground[:, 4] = False
    depth = np.broadcast_to(np.float32([0.01, 0.02, 0.03, 0.04, 0.05]), (5, 5)) * valid
    scale = DepthScale(0.01, 0.04)
    rounds = standardise_depth(
        part(depth, valid, foreground), replace(RAW, depth_fill="rounds", depth_fill_rounds=1), scale
    )
    u = 0.1 + 0.8 * np.arange(4) / 3
    assert rounds[2, 2] == pytest.approx((3 * u[1] + 2 * u[2] + 3 * u[3]) / 8)
    assert rounds[1, 4] == pytest.approx(u[3])  # grows into the background, as CRD does
    full = standardise_depth(part(depth, valid, foreground), replace(RAW, depth_fill="full"), scale)
    assert np.abs(full[2, 2] - u[1:]).min() < 1e-6  # one of its neighbours
    assert not full[:, 4].any()  # stays on the part


def test_a_scale_is_needed_for_category_and_survives_json():
    with pytest.raises(DataError, match=r"'p'.*fit_depth_scale"):
        standardise_depth(part(np.ones((4, 4))), RAW, None)
    scale = DepthScale(0.1, 0.2)
    assert DepthScale.from_dict(scale.to_dict()) == scale


def cloud_part(seed, size=24):
    generator = np.random.default_rng(seed)
    row, column = np.mgrid[:size, :size]
    z = 0.5 + 0.01 * np.sin(row / 5) + 1e-4 * generator.standard_normal((size, size))
    xyz = np.stack([0.003 * column, 0.003 * row, z], -1).astype(np.float32)
    xyz[generator.random((size, size)) < 0.1] = 0
    rgb = generator.integers(0, 256, (size, size, 3), dtype=np.uint8)
    uv = generator.integers(0, 256, (size, size), dtype=np.uint8)
    return Sample(f"part/{seed}", {"rgb": rgb, "xyz": xyz, "uv": uv}, (xyz != 0).any(-1))


def test_batch_holds_the_parts_channel_first():
    import torch

    preparation = Preparation(size=32)
    samples = [prepare(cloud_part(seed), preparation) for seed in range(3)]
    scale = fit_depth_scale(samples)
    batch = collate(samples, preparation, scale)
    assert batch.ids == ("part/0", "part/1", "part/2")
    channels = {"rgb": 3, "xyz": 3, "uv": 1, "depth": 1, "normals": 3}
    assert {name: tuple(image.shape) for name, image in batch.images.items()} == {
        name: (3, C, 32, 32) for name, C in channels.items()
    }
    assert all(image.dtype == torch.float32 and image.is_contiguous() for image in batch.images.values())
    assert batch.valid.dtype == batch.foreground.dtype == torch.bool
    for b, sample in enumerate(samples):
        assert (batch.images["xyz"][b].numpy() == sample.images["xyz"].transpose(2, 0, 1)).all()
        assert (batch.images["depth"][b, 0].numpy() == standardise_depth(sample, preparation, scale)).all()
        alone = collate([sample], preparation, scale)
        assert all((alone.images[name][0] == image[b]).all() for name, image in batch.images.items())
    lengths = batch.images["normals"].norm(dim=1)
    assert ((lengths < 1e-6) | ((lengths - 1).abs() < 1e-5)).all()
    assert not lengths[~batch.valid].any()


def test_unlike_parts_are_refused_by_name():
    preparation = Preparation(size=32)
    scale = DepthScale(0, 1)
    a, b = (prepare(cloud_part(seed), preparation) for seed in range(2))
    less = b.with_(images={name: image for name, image in b.images.items() if name != "rgb"})
    with pytest.raises(DataError, match="'part/1' has no 'rgb'"):
        collate([a, less], preparation, scale)
    with pytest.raises(DataError, match="'part/1' has no 'rgb'"):
        collate([less, a], preparation, scale)
    with pytest.raises(DataError, match=r"'part/1'.*16x16"):
        collate([a, prepare(cloud_part(1), replace(preparation, size=16))], preparation, scale)
    with pytest.raises(DataError, match="'part/1' was not prepared"):
        collate([cloud_part(1)], preparation, scale)
    with pytest.raises(DataError, match="at least one"):
        collate([], preparation, scale)
    wide = b.with_(images={**b.images, "uv": np.zeros((32, 32, 2), np.float32)})
    with pytest.raises(DataError, match="'part/1': 'uv' has shape"):
        collate([a, wide], preparation, scale)


def test_preparation_does_not_need_torch():
    program = "import sys, polyspect.data.batches, polyspect.data.prepared_cache; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
