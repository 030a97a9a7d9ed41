"""Normals, hole filling and connected pieces: closed forms, hand cases, naive twins, invariances."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyspect.errors import ConfigError
from polyspect.geometry.components import close_mask, keep_components, label_components
from polyspect.geometry.filling import fill_nearest, fill_rounds, nearest_known
from polyspect.geometry.normals import sobel_normals, surface_normals

RNG = np.random.default_rng


def pinhole_plane(a=0.3, b=-0.2, size=32):
    """The plane z = 0.5 + a x + b y through a pinhole camera: spacing changes over the picture."""
    row, column = np.mgrid[:size, :size]
    u, v = (column - size / 2) / 60, (row - size / 2) / 60
    z = 0.5 / (1 - a * u - b * v)
    return np.stack([u * z, v * z, z], axis=-1)


def sphere(size=64, radius=0.03):
    """The near half of a sphere at z = 0.3; unmeasured outside. Points and true normals."""
    row, column = np.mgrid[:size, :size]
    x, y = (column - size / 2 + 0.5) * 0.001, (row - size / 2 + 0.5) * 0.001
    inside = x**2 + y**2 < (0.8 * radius) ** 2
    up = np.sqrt(np.where(inside, radius**2 - x**2 - y**2, 0))
    normal = np.where(inside[..., None], np.stack([x, y, -up], -1) / radius, 0)
    points = np.where(inside[..., None], np.stack([x, y, 0.3 - up], -1), 0)
    return points, inside, normal


# -- normals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [3, 5, 9])
def test_normals_of_a_plane_are_exact_up_to_the_edge(window):
    normals = surface_normals(pinhole_plane(), np.ones((32, 32), bool), window=window, jump_m=1)
    expected = np.array([0.3, -0.2, -1]) / np.linalg.norm([0.3, -0.2, -1])
    np.testing.assert_allclose(normals, np.broadcast_to(expected, normals.shape), atol=1e-6)


def test_normals_of_a_sphere():
    points, inside, expected = sphere()
    normals = surface_normals(points, inside, window=5)
    assert not normals[~inside].any()
    angle = np.degrees(np.arccos(np.clip((normals * expected).sum(-1)[inside], -1, 1)))
    assert np.median(angle) < 0.2
    assert angle.max() < 8  # one-sided windows at the rim
    np.testing.assert_allclose(np.linalg.norm(normals[inside], axis=-1), 1, atol=1e-6)


def test_normals_turn_with_the_cloud_and_do_not_know_the_unit():
    points, inside, _ = sphere()
    x, y, z = np.array([0.6, 0.64, 0.48])
    k = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    R = np.eye(3) + np.sin(0.2) * k + (1 - np.cos(0.2)) * k @ k
    normals = surface_normals(points, inside)
    np.testing.assert_allclose(surface_normals(points @ R.T, inside), normals @ R.T, atol=1e-5)
    np.testing.assert_allclose(surface_normals(1000 * points, inside, jump_m=20), normals, atol=1e-6)


def test_normals_do_not_mix_the_two_sides_of_a_depth_jump():
    points, valid = pinhole_plane(0, 0), np.ones((32, 32), bool)
    points[:, 16:] *= 0.8  # a second level, 10 cm nearer
    normals = surface_normals(points, valid, window=7, jump_m=0.05)
    np.testing.assert_allclose(normals, np.broadcast_to([0, 0, -1.0], normals.shape), atol=1e-6)
    smeared = surface_normals(points, valid, window=7, jump_m=1)
    assert np.abs(smeared[:, 14:18, 0]).min() > 0.3


def test_normals_equal_eq_1_written_as_loops():
    generator = RNG(1)
    points = pinhole_plane(size=12) + 0.002 * generator.standard_normal((12, 12, 3))
    valid = generator.random((12, 12)) > 0.2
    points[~valid] = 0
    normals = surface_normals(points, valid, window=5, jump_m=0.02)
    for i, j in np.ndindex(12, 12):
        t_x, t_y = np.zeros(3), np.zeros(3)
        for r, c in np.ndindex(12, 12):
            for t, (dr, dc) in ((t_x, (0, 1)), (t_y, (1, 0))):
                ends = [(r, c), (r + dr, c + dc)]
                if any(not (0 <= p < 12 and 0 <= q < 12) or max(abs(p - i), abs(q - j)) > 2 for p, q in ends):
                    continue
                step = points[ends[1]] - points[ends[0]]
                if valid[ends[0]] and valid[ends[1]] and np.linalg.norm(step) < 0.02:
                    t += step
        expected = np.cross(t_y, t_x)
        if not valid[i, j] or not np.linalg.norm(expected) > 0:
            assert not normals[i, j].any()
            continue
        expected /= np.linalg.norm(expected)
        np.testing.assert_allclose(normals[i, j], -expected if expected @ points[i, j] > 0 else expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["nothing", "one", "row"])
def test_normals_of_degenerate_clouds_are_zero(kind):
    points, valid = pinhole_plane(size=16), np.zeros((16, 16), bool)
    valid[{"nothing": np.s_[:0], "one": np.s_[3, 4], "row": np.s_[5]}[kind]] = True
    assert not surface_normals(np.where(valid[..., None], points, 0), valid).any()


def test_normals_refuse_an_even_window():
    with pytest.raises(ConfigError, match="odd"):
        surface_normals(pinhole_plane(), np.ones((32, 32), bool), window=4)


def test_sobel_normals_of_a_ramp_by_hand():
    ramp = np.broadcast_to(0.01 * np.arange(9.0), (9, 9))  # a 3x3 Sobel kernel gives 8 x the step
    mask = np.ones((9, 9), bool)
    mask[0, 0] = False
    normals = sobel_normals(ramp, mask, kernel=3)
    expected = np.array([-0.08, 0, 1]) / np.hypot(0.08, 1)
    np.testing.assert_allclose(normals[4, 1:-1], np.broadcast_to(expected, (7, 3)), atol=1e-7)
    assert not normals[0, 0].any()
    with pytest.raises(ConfigError, match="3, 5 or 7"):
        sobel_normals(ramp, mask, kernel=4)


# -- filling ----------------------------------------------------------------------------------------------------------


def test_hole_filling_of_crd_by_hand():
    image = np.zeros((5, 5))
    image[1, 1], image[1, 2], image[3, 3] = 0.4, 0.6, 0.2
    once, _ = fill_rounds(image, image != 0, 1)
    got = [once[2, 2], once[0, 0], once[0, 1], once[0, 3], once[4, 4], once[0, 4]]
    np.testing.assert_allclose(got, [0.4, 0.4, 0.5, 0.6, 0.2, 0], atol=1e-12)
    twice, known = fill_rounds(image, image != 0, 2)
    np.testing.assert_allclose([twice[0, 4], twice[1, 4], twice[3, 1], twice[4, 0]], [0.6, 0.45, 0.34, 0], atol=1e-12)
    assert (twice[1, 1], twice[1, 2], twice[3, 3]) == (0.4, 0.6, 0.2)
    assert (known == (twice != 0)).all()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), share=st.floats(0, 1), rounds=st.integers(0, 3))
def test_fill_rounds_equals_the_loop(seed, share, rounds):
    generator = RNG(seed)
    image, known = generator.standard_normal((7, 9)), generator.random((7, 9)) < share
    expected, done = np.where(known, image, 0), known.copy()
    for _ in range(rounds):
        old, old_done = expected.copy(), done.copy()
        for i, j in np.ndindex(7, 9):
            window = np.s_[max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2]
            if not old_done[i, j] and old_done[window].any():
                expected[i, j], done[i, j] = old[window][old_done[window]].mean(), True
    filled, now_known = fill_rounds(image, known, rounds)
    np.testing.assert_allclose(filled, expected, atol=1e-12)
    assert (now_known == done).all()


def test_fill_nearest_copies_a_nearest_value_and_only_where_allowed():
    generator = RNG(0)
    image, known = generator.random((30, 40)), generator.random((30, 40)) < 0.1
    filled = fill_nearest(image, known)
    assert (filled[known] == image[known]).all()
    rows, columns = np.divmod(nearest_known(known), 40)
    assert known[rows, columns].all()
    at = np.argwhere(known)
    for i, j in np.ndindex(30, 40):
        best = np.sqrt(((at - [i, j]) ** 2).sum(1).min())
        assert np.hypot(rows[i, j] - i, columns[i, j] - j) <= 1.05 * best + 1e-9
        assert filled[i, j] == image[rows[i, j], columns[i, j]]
    where = np.zeros((30, 40), bool)
    where[:10] = True
    assert (fill_nearest(image, known, where)[10:] == image[10:]).all()
    assert (fill_nearest(image, np.zeros_like(known)) == image).all()


# -- pieces -----------------------------------------------------------------------------------------------------------


def test_pieces_are_cut_at_depth_jumps_and_counted():
    points, mask = pinhole_plane(0, 0), np.zeros((32, 32), bool)
    mask[2:30, 2:30] = True
    points[:, 10:] *= 0.9  # 5 cm nearer from column 10 on: one piece in the picture, two in space
    labels, counts = label_components(points, np.ones_like(mask), mask, jump_m=0.02)
    assert sorted(counts[1:]) == [8 * 28, 20 * 28]
    assert len(np.unique(labels[mask])) == 2
    assert label_components(points, np.ones_like(mask), mask, jump_m=1)[1][1:].tolist() == [28 * 28]
    largest = keep_components(points, np.ones_like(mask), mask, jump_m=0.02, keep=1)
    assert largest.sum() == 20 * 28
    assert largest[15, 20]


def test_small_pieces_go_and_holes_are_bridged_only_in_space():
    points, valid = pinhole_plane(0, 0), np.ones((32, 32), bool)
    mask = np.ones((32, 32), bool)
    valid[:, 15:17] = False  # a closed gap; its two banks are near each other
    points[~valid] = 0
    assert label_components(points, valid, mask, jump_m=0.04)[1][1:].tolist() == [32 * 32]
    points[:, 17:] *= 0.8  # now they are not
    assert sorted(label_components(points, valid, mask, jump_m=0.04)[1][1:]) == [16 * 32, 16 * 32]
    mask[:] = False
    mask[3:6, 3:6] = mask[20, 20] = True
    kept = keep_components(points, valid, mask, jump_m=0.04, min_pixels=2)
    assert kept.sum() == 9
    assert keep_components(points, valid, mask, jump_m=0.04).sum() == 10
    assert not keep_components(points, valid, np.zeros_like(mask), jump_m=0.04, keep=1).any()


def test_labels_equal_a_flood_fill():
    generator = RNG(4)
    points, mask = 0.01 * generator.random((12, 12, 3)), generator.random((12, 12)) < 0.7
    labels, _ = label_components(points, np.ones_like(mask), mask, jump_m=0.006)
    expected = np.zeros((12, 12), int)
    for start in zip(*np.nonzero(mask)):
        stack = [start] if not expected[start] else []
        name = expected.max() + 1
        while stack:
            i, j = stack.pop()
            expected[i, j] = name
            for p, q in ((i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)):
                inside = 0 <= p < 12 and 0 <= q < 12 and mask[p, q] and not expected[p, q]
                if inside and np.linalg.norm(points[p, q] - points[i, j]) < 0.006:
                    stack.append((p, q))
    pairs = set(zip(labels.ravel().tolist(), expected.ravel().tolist()))
    assert len(pairs) == labels.max() + 1 == expected.max() + 1


def test_closing_fills_gaps_and_respects_the_border():
    mask = np.ones((12, 12), bool)
    mask[5:8, 5:8] = False
    assert close_mask(mask, 2).all()
    assert (close_mask(mask, 0) == mask).all()
    assert (close_mask(np.eye(12, dtype=bool)[:, :3] & False, 3) == False).all()  # noqa: E712
