"""Both AUPRO evaluators against naive twins of their definitions, hand-made cases and stored values."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from polyspect.errors import ConfigError, DataError, ShapeError
from polyspect.metrics import aupro, aupro_sampled, auroc, average_precision, pro_curve
from polyspect.metrics.parts import collect_pixels
from polyspect.metrics.pro import pool_or_raise, sampled_curve

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "reference" / "golden" / "10_metrics.npz"
QUICK = settings(max_examples=60, deadline=None, derandomize=True)
LIMITS = (1.0, 0.3, 0.07, 0.01)


def flood(mask):
    """8-connected components as lists of pixels, by walking: shares nothing with the code under test."""
    left, components = set(map(tuple, np.argwhere(mask))), []
    while left:
        queue, component = [left.pop()], []
        while queue:
            y, x = queue.pop()
            component.append((y, x))
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            queue += near
        components.append(component)
    return components


def truth_lists(maps, masks, ignore=None):
    """Scores of all ok pixels, and one array of scores per component."""
    kept = [np.ones(m.shape, bool) for m in maps] if ignore is None else [~i for i in ignore]
    ok = np.concatenate([image[k & ~mask] for image, mask, k in zip(maps, masks, kept)])
    components = []
    for image, mask, k in zip(maps, masks, kept):
        components += [np.array([image[p] for p in pixels if k[p]]) for pixels in flood(mask)]
    return ok, [c for c in components if c.size]


def trapezoid_to(x, y, limit):
    """Area of the polyline up to `limit`, segment by segment."""
    area = 0.0
    for x0, x1, y0, y1 in zip(x, x[1:], y, y[1:]):
        if x0 >= limit:
            break
        if x1 > limit:
            x1, y1 = limit, y0 + (y1 - y0) * (limit - x0) / (x1 - x0)
        area += (x1 - x0) * (y0 + y1) / 2
    return area


def naive_curve(ok, components):
    x, y = [0.0], [0.0]
    for t in np.unique(np.concatenate([ok, *components]))[::-1]:
        x.append(np.mean(ok >= t))
        y.append(np.mean([np.mean(c >= t) for c in components]))
    return x, y


def naive_exact(maps, masks, limits, ignore=None):
    x, y = naive_curve(*truth_lists(maps, masks, ignore))
    return {limit: trapezoid_to(x, y, limit) / limit for limit in limits}


def naive_sampled(maps, masks, limits, thresholds):
    ok, components = truth_lists(maps, masks)
    ok = np.sort(ok)
    x, y = [], []
    for i in reversed(range(thresholds)):
        position = int(i * (ok.size - 1) / (thresholds - 1))
        x.append((ok.size - 1 - position) / ok.size)
        y.append(np.mean([np.mean(c > ok[position]) for c in components]))
    x.append(1.0)
    y.append(1.0)
    return {limit: trapezoid_to(x, y, limit) / limit for limit in limits}


@st.composite
def cases(draw):
    """Small maps with few levels (ties everywhere) and random masks (diagonal chains, single pixels)."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n, h, w = draw(st.integers(1, 4)), draw(st.integers(2, 9)), draw(st.integers(2, 9))
    levels = draw(st.sampled_from([1, 2, 5, 40, 100_000]))  # 1: all scores alike
    maps = generator.integers(0, levels, (n, h, w)).astype(np.float32) / 8
    masks = generator.random((n, h, w)) < draw(st.sampled_from([0.05, 0.2, 0.5]))
    masks[0, 0, 0], masks[0, -1, -1] = True, False
    if draw(st.booleans()):
        maps[masks] += np.float32(draw(st.sampled_from([0.25, 3.0])))
    return maps, masks


@QUICK
@given(cases())
def test_exact_equals_brute_force_over_all_thresholds(case):
    maps, masks = case
    limits = (*LIMITS, 1.0 / (~masks).sum())  # the last limit is a single ok pixel
    got, expected = aupro(maps, masks, limits), naive_exact(maps, masks, limits)
    assert_allclose([got[k] for k in limits], [expected[k] for k in limits], rtol=0, atol=1e-9)


@QUICK
@given(cases(), st.sampled_from([2, 7, 99, 100]))
def test_sampled_equals_its_rule_written_as_loops(case, thresholds):
    maps, masks = case
    expected = naive_sampled(maps, masks, LIMITS, thresholds)
    got = aupro_sampled(maps, masks, LIMITS, thresholds)
    assert_allclose(list(got.values()), [expected[k] for k in LIMITS], rtol=0, atol=1e-9)


@QUICK
@given(cases(), st.integers(0, 2**16))
def test_ignored_pixels_leave_the_metric(case, seed):
    maps, masks = case
    ignore = np.random.default_rng(seed).random(maps.shape) < 0.3
    ignore[0, 0, 0] = ignore[0, -1, -1] = False
    hidden = np.where(ignore, np.float32(np.nan), maps)  # NaN is allowed where it is not counted
    expected = naive_exact(maps, masks, LIMITS, ignore)
    got = aupro(hidden, masks, LIMITS, ignore=ignore)
    assert_allclose(list(got.values()), [expected[k] for k in LIMITS], rtol=0, atol=1e-9)


@QUICK
@given(cases())
def test_curve_passes_through_all_thresholds(case):
    maps, masks = case
    x, y = naive_curve(*truth_lists(maps, masks))
    n = int((~masks).sum())
    fpr, pro = pro_curve(maps, masks, points=2 * n + 1)
    assert fpr.tolist() == pytest.approx((np.arange(2 * n + 1) / (2 * n)).tolist())
    assert pro[-1] == pytest.approx(1.0)
    for rate, value in list(zip(fpr, pro))[1::2]:  # halfway between two possible rates: never on a jump
        k = max(k for k in range(len(x)) if x[k] < rate)
        assert value == pytest.approx(y[k] + (y[k + 1] - y[k]) * (rate - x[k]) / (x[k + 1] - x[k]))


def test_components_count_alike_and_join_over_corners():
    # a 2-pixel diagonal component found in full, a single pixel missed: PRO is 1/2, not 2/3
    maps, masks = np.zeros((1, 5, 5)), np.zeros((1, 5, 5), bool)
    masks[0, 0, 0] = masks[0, 1, 1] = masks[0, 4, 4] = True
    maps[0, 0, 0] = maps[0, 1, 1] = 2.0
    maps[0, 4, 4] = -1.0
    assert aupro(maps, masks, [0.3])[0.3] == pytest.approx(0.5)


def test_perfect_and_tied_maps():
    masks = np.zeros((2, 6, 6), bool)
    masks[1, 2:4, 2:4] = True
    assert list(aupro(masks.astype(float), masks).values()) == pytest.approx([1.0] * 4)
    # all alike: one straight line from (0, 0) to (1, 1), so the mean height up to L is L / 2
    assert aupro(np.ones((2, 6, 6)), masks) == pytest.approx({k: k / 2 for k in (0.3, 0.1, 0.05, 0.01)})


def test_only_the_order_of_scores_and_no_order_of_parts_matters():
    generator = np.random.default_rng(3)
    maps, masks = generator.integers(0, 60, (6, 16, 16)) / 8.0, generator.random((6, 16, 16)) < 0.1
    expected = aupro(maps, masks)
    assert aupro(np.exp(maps), masks) == pytest.approx(expected, abs=1e-12)
    order = generator.permutation(6)
    assert aupro(maps[order], masks[order]) == pytest.approx(expected, abs=1e-12)
    assert aupro(maps[:, ::-1].swapaxes(1, 2), masks[:, ::-1].swapaxes(1, 2)) == pytest.approx(expected, abs=1e-12)


def test_parts_may_differ_in_size():
    generator = np.random.default_rng(4)
    shapes = [(5, 7), (9, 4), (3, 3)]
    maps = [generator.integers(0, 9, shape) / 4 for shape in shapes]
    masks = [generator.random(shape) < 0.3 for shape in shapes]
    assert aupro(maps, masks) == pytest.approx(naive_exact(maps, masks, (0.3, 0.1, 0.05, 0.01)), abs=1e-9)


@pytest.mark.skipif(not GOLDEN.exists(), reason="the stored outputs of the research scripts are not here")
@pytest.mark.parametrize("prefix", ["", "ties_"])
def test_stored_outputs_of_the_research_scripts(prefix):
    with np.load(GOLDEN, allow_pickle=False) as data:
        golden = {key: data[key] for key in data.files}
    maps, masks = golden[f"{prefix}maps"], golden["masks"]
    scores, labels = golden[f"{prefix}image_scores"], golden["image_labels"]

    exact = aupro(maps, masks)
    for limit, value in exact.items():
        assert_allclose(value, golden[f"{prefix}exact_aupro_{limit:g}"], rtol=0, atol=1e-6)
    fpr, pro = sampled_curve(pool_or_raise(collect_pixels(maps, masks)), 100)
    assert_allclose(fpr, golden[f"{prefix}m3dm_curve_fpr_f64"], rtol=0, atol=1e-12)
    assert_allclose(pro, golden[f"{prefix}m3dm_curve_pro_f64"], rtol=0, atol=1e-12)
    for limit, value in aupro_sampled(maps, masks, (0.3, 0.01)).items():
        assert_allclose(value, golden[f"{prefix}m3dm_aupro_{limit:g}"], rtol=0, atol=1e-12)
    cfm = aupro_sampled(maps, masks, (0.3, 0.1, 0.05, 0.01), thresholds=99)
    assert_allclose(list(cfm.values()), golden[f"{prefix}cfm_aupro_30_10_5_1"], rtol=0, atol=1e-12)
    for name, metric in (("auroc", auroc), ("ap", average_precision)):
        assert_allclose(metric(scores, labels), golden[f"{prefix}i_{name}"], rtol=0, atol=1e-12)
        assert_allclose(metric(maps, masks), golden[f"{prefix}p_{name}"], rtol=0, atol=1e-12)


def test_bad_input_is_named():
    maps, masks = np.zeros((2, 4, 4)), np.zeros((2, 4, 4), bool)
    with pytest.raises(DataError, match="at least one ground-truth component"):
        aupro(maps, masks)
    masks[1, 0, 0] = True
    for limit in (0.0, 1.5, float("nan")):
        with pytest.raises(ConfigError, match="limit must be above 0 and at most 1"):
            aupro(maps, masks, [limit])
    with pytest.raises(ConfigError, match="`thresholds` must be at least 2, got 1"):
        aupro_sampled(maps, masks, thresholds=1)
    with pytest.raises(ShapeError, match="2 `maps` but 1 `masks`"):
        aupro(maps, masks[:1])
    with pytest.raises(ShapeError, match=r"part 0: the map has shape \(4, 4\) and the mask \(4, 3\)"):
        aupro(maps, masks[:, :, :3])
    with pytest.raises(DataError, match=r"part 0: the mask is float64, expected bool or integers"):
        aupro(maps, masks.astype(float))
    maps[1, 2, 2] = np.nan
    with pytest.raises(DataError, match="the map of part 1 has 1 NaN"):
        aupro(maps, masks)
