"""AST's preparation: its program's stored outputs, the card's hand cases, and what the program leaves undefined."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from golden import Golden, noise
from polyspect.data.batches import collate
from polyspect.data.preparation import PREPARATIONS, prepare, without_cloud
from polyspect.errors import ConfigError, DataError
from polyspect.geometry.filling import fill_rounds
from polyspect.geometry.plane import corner_surface
from polyspect.samples import Sample

PAPER = PREPARATIONS["ast_paper"]


def part_of(z, **extra):
    """A part of which only depth was measured, as a reader gives it."""
    z = np.asarray(z, dtype=np.float32)
    return Sample("made/up/part", {"depth": z}, valid=z != 0, **extra)


def at_own_size(size):
    """AST's steps without any resizing."""
    return replace(PAPER, size=size, depth_step=1)


def table(size=64, gap=()):
    """A tilted table, a box 1 cm high on it, and where the box is."""
    row, column = np.mgrid[:size, :size]
    z = 0.6 + 0.0008 * column + 0.0003 * row
    box = (row >= 20) & (row < 40) & (column >= 24) & (column < 50)
    z = np.where(box, z - 0.01, z)
    for rows, columns in gap:
        z[rows, columns] = 0
    return z, box


# -- stored outputs ----------------------------------------------------------------------------------------------------


def test_filling_and_foreground_equal_the_official_code():
    golden = Golden("ast_prep.npz")
    raw = golden.stored["raw_z"]
    for rounds in (1, 2, 3):
        filled, known = fill_rounds(raw, raw != 0, rounds, spare_first=True)
        golden.check(f"filled_{rounds}", filled_tensor(filled), 1e-5)
        assert np.array_equal(known, golden.stored[f"filled_{rounds}"] != 0)
    prepared = prepare(part_of(raw), at_own_size(40))
    assert np.array_equal(prepared.foreground, golden.stored["foreground"] > 0)
    assert 0.5 < prepared.foreground.mean() < 0.9


def filled_tensor(array):
    import torch

    return torch.from_numpy(array)


def test_depth_and_resizing_equal_the_official_code():
    golden = Golden("ast_combi.npz")
    raw = 0.5 + 0.01 * noise("raw_z", 2, 64, 64).numpy()
    preparation = replace(PAPER, size=192, background="keep", depth_fill="none")
    parts = [part_of(z, foreground=on > 0) for z, on in zip(raw, golden.stored["raw_fg"].reshape(2, 64, 64))]
    batch = collate([prepare(part, preparation) for part in parts], preparation)
    own = batch.images["depth"][:, :, ::4, ::4]  # each pixel of 48x48 is 4x4 prepared ones
    assert bool((batch.images["depth"] == own.repeat_interleave(4, 2).repeat_interleave(4, 3)).all())
    golden.check("depth", 100 * own, 1e-4)
    golden.check("fg", batch.foreground[:, None, ::4, ::4].float(), 1e-6)


# -- hand cases --------------------------------------------------------------------------------------------------------


def test_hole_filling_by_hand():
    z = np.full((20, 20), 5.0)
    z[4, 4] = z[0, 9] = z[9, 0] = z[-1, 9] = 0
    z[6:12, 6:12] = 0
    filled, known = fill_rounds(z, z != 0, 3, spare_first=True)
    assert filled[4, 4] == filled[-1, 9] == 5
    assert filled[0, 9] == filled[9, 0] == 0
    assert known[6:12, 6:12].all()
    assert np.array_equal(filled, np.where(known, 5, 0))
    z[6:13, 6:13] = 0
    _, known = fill_rounds(z, z != 0, 3, spare_first=True)
    assert list(zip(*np.nonzero(~known[1:, 1:]))) == [(8, 8)]


def test_a_box_on_a_tilted_table_by_hand():
    z, box = table()
    prepared = prepare(part_of(z), at_own_size(64))
    assert np.array_equal(prepared.foreground, box)
    depth = prepared.images["depth"]
    assert not depth[~box].any()
    np.testing.assert_allclose(depth[box], (z - z[box].mean())[box], atol=1e-6)
    assert prepared.meta["flags"] == []
    assert prepared.meta["plane"] is None


def test_depth_in_millimetres_is_refused():
    z, _ = table()
    with pytest.raises(DataError, match=r"'made/up/part': the median depth is 6\d\d\.?\d* m.*unit=mm"):
        prepare(part_of(1000 * z), at_own_size(64))


def test_an_empty_corner_takes_the_nearest_points_and_is_flagged():
    z, box = table(gap=[(slice(0, 9), slice(0, 9))])  # three rounds of filling leave rows and columns 0 to 5
    prepared = prepare(part_of(z), at_own_size(64))
    assert prepared.meta["flags"] == ["empty_corner"]
    assert np.isfinite(prepared.images["depth"]).all()
    assert (prepared.foreground == box).mean() > 0.99
    surface, widened = corner_surface(z, z != 0)
    assert widened == 1
    assert surface[0, 0] == pytest.approx(np.r_[z[9, :10], z[:9, 9]].mean())
    assert surface[-1, -1] == pytest.approx(z[-2:, -2:].mean())


def test_corners_are_interpolated_and_need_not_lie_in_a_plane():
    z = np.zeros((5, 9))
    z[:2, :2], z[:2, -2:], z[-2:, :2], z[-2:, -2:] = 1, 2, 3, 8
    surface, widened = corner_surface(z, z != 0)
    assert widened == 0
    u, v = np.meshgrid(np.linspace(0, 1, 9), np.linspace(0, 1, 5))
    np.testing.assert_allclose(surface, (1 - v) * ((1 - u) + 2 * u) + v * (3 * (1 - u) + 8 * u))


def test_the_official_grid_and_x_and_y_do_not_count():
    z, _ = table(200)
    row, column = np.mgrid[:200, :200]
    rgb = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    depths = []
    for pitch in (0.001, 0.3):
        xyz = np.stack([pitch * column, pitch * row, z], -1).astype(np.float32)
        prepared = prepare(Sample("a", {"rgb": rgb, "xyz": xyz}, valid=xyz[..., 2] != 0), PAPER)
        assert prepared.images["rgb"].shape == (768, 768, 3)
        assert prepared.images["rgb"].all(-1).mean() > 0.9  # the background stays
        depths.append(prepared.images["depth"])
    assert np.array_equal(*depths)
    expected = prepare(part_of(z), replace(PAPER, size=192, depth_step=1)).images["depth"]
    assert np.array_equal(depths[0], expected.repeat(4, 0).repeat(4, 1))


@pytest.mark.parametrize("z", [np.zeros((64, 64)), np.full((64, 64), 0.5)], ids=["nothing measured", "no part"])
def test_nothing_to_find_is_flagged_and_finite(z):
    prepared = prepare(part_of(z), at_own_size(64))
    assert "all_background" in prepared.meta["flags"]
    assert not prepared.foreground.any()
    assert not prepared.images["depth"].any()


def test_parts_without_3d_keep_all_of_their_picture():
    rgb = np.full((50, 60, 3), 9, np.uint8)
    prepared = prepare(Sample("a", {"rgb": rgb}, valid=np.ones((50, 60), bool)), without_cloud(PAPER))
    assert prepared.foreground.all()
    assert "depth" not in prepared.images


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"depth": "z"}, "`background` 'four_corners' is for depth='relative'"),
        ({"depth": "z", "background": "keep"}, "`depth_fill` 'early' is for depth='relative'"),
        ({"geometry_at": "prepared"}, "`geometry_at` 'input'"),
        ({"background": "plane"}, "`background` 'keep' or 'four_corners'"),
        ({"depth_range": "category"}, "`depth_range` 'none'"),
        ({"depth_fill": "full"}, "`depth_fill` 'early' or 'none'"),
        ({"depth_step": 5}, "multiple of `depth_step`, got 768 and 5"),
        ({"depth_step": 0}, "`depth_step` must be at least 1"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        replace(PAPER, **changes)
