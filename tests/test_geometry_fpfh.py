"""Normals and FPFH: closed forms, the Darboux frame in loops, invariances, padding, stored outputs, Open3D itself."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from polyspect.errors import ConfigError, DataError, ShapeError
from polyspect.geometry import fpfh as module
from polyspect.geometry.fpfh import estimate_normals, fpfh
from polyspect.geometry.padding import pad_clouds

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "reference" / "golden" / "09_btf_fpfh.npz"


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def surface(points: int, seed: int = 0) -> Tensor:
    """A bumpy sheet of 10 cm, half a metre away, (N, 3)."""
    x, y, noise = 0.03 * random(points, 3, seed=seed).T
    return torch.stack([x, y, 0.5 + 0.01 * torch.sin(60 * x) * torch.cos(45 * y) + 0.005 * noise], 1)


def turn() -> Tensor:
    """A rotation (3, 3)."""
    Q = torch.linalg.qr(random(3, 3, seed=9)).Q
    return Q * torch.linalg.det(Q)


# -- normals ----------------------------------------------------------------------------------------------------------


def test_normals_of_a_plane_point_to_the_camera():
    a = random(60, 2)
    points = torch.stack([a[:, 0], a[:, 1], 5 + 0.3 * a[:, 0] - 0.2 * a[:, 1]], 1)
    expected = torch.tensor([0.3, -0.2, -1.0], dtype=torch.float64)
    normals = estimate_normals(points[None], radius=4, max_neighbours=12)[0]
    assert_close(normals, (expected / expected.norm()).expand(60, 3), rtol=0, atol=1e-7)


def test_normals_by_definition():
    points = surface(80)
    normals = estimate_normals(points[None], radius=0.02, max_neighbours=9)[0]
    for row, p in enumerate(points):
        squared = (points - p).square().sum(1)
        near = squared.argsort(stable=True)[:9]
        near = points[near[squared[near] < 0.02**2]]
        if len(near) < 3:
            assert normals[row].tolist() == [0, 0, -1]
            continue
        axis = torch.linalg.svd(near - near.mean(0)).Vh[2]
        assert abs(float(axis @ normals[row])) > 1 - 1e-9
        assert float(normals[row] @ p) <= 0


def test_normals_turn_with_the_cloud():
    points = surface(200)
    R = turn()
    normals = estimate_normals(points[None])[0]
    assert_close(estimate_normals((points @ R.T)[None])[0], normals @ R.T, rtol=0, atol=1e-9)


def test_signs_of_the_solver_on_a_sheet_and_on_a_line():
    """Worked out by hand: the longest cross product of two rows on a sheet; u, v and w on a line."""
    t = torch.linspace(-1, 1, 9, dtype=torch.float64)
    a, b = (part.flatten() for part in torch.meshgrid(t, t, indexing="ij"))
    flat = 0 * a
    for sheet, expected in (
        (torch.stack([a, b, flat], 1), [0, 0, 1]),
        (torch.stack([a, flat, b], 1), [0, -1, 0]),
        (torch.stack([flat, a, b], 1), [1, 0, 0]),
        # a line along w = (0, 0.6, 0.8), so U = (0, 0.8, -0.6) and V = w x U = -x. Widest across it in x: a = -lambda,
        # c = 0, the middle vector is -V = x and the normal x x w. Widest along U: a = 0, c = -lambda, U x w.
        (torch.stack([0.1 * a, 6 * b, 8 * b], 1), [0, -0.8, 0.6]),
        (torch.stack([flat, 6 * b + 0.08 * a, 8 * b - 0.06 * a], 1), [1, 0, 0]),
    ):
        points = sheet + torch.tensor([0, 0, 50.0])
        normals = estimate_normals(points[None], radius=100, max_neighbours=81, sign="solver")[0]
        assert_close(normals, torch.tensor(expected, dtype=torch.float64).expand(81, 3), rtol=0, atol=1e-9)


# -- FPFH -------------------------------------------------------------------------------------------------------------


def pair_by_definition(p: Tensor, n: Tensor, q: Tensor, m: Tensor) -> tuple[float, float, float]:
    """theta, alpha, phi from the frame u, v, w of the source (Rusu et al., Sec. II), vectors written out."""
    e = q - p
    if not e.norm() > 0:
        return 0.0, 0.0, 0.0
    e = e / e.norm()
    if abs(float(n @ e)) < abs(float(m @ e)):  # the source is the one whose normal is closer to the line
        n, m, e = m, n, -e
    v = torch.linalg.cross(e, n)
    if not v.norm() > 0:
        return 0.0, 0.0, 0.0
    v = v / v.norm()
    w = torch.linalg.cross(n, v)
    return math.atan2(float(w @ m), float(n @ m)), float(v @ m), float(n @ e)


def fpfh_by_definition(points: Tensor, normals: Tensor, radius: float, count: int) -> Tensor:
    near, simple = [], torch.zeros(len(points), 33, dtype=torch.float64)
    for i, p in enumerate(points):
        squared = (points - p).square().sum(1)
        rows = squared.argsort(stable=True)[:count]
        near.append([(j, float(squared[j])) for j in rows[squared[rows] < radius**2].tolist()][1:])
        for j, _ in near[i]:
            theta, alpha, phi = pair_by_definition(p, normals[i], points[j], normals[j])
            for block, share in enumerate(((theta + math.pi) / (2 * math.pi), (alpha + 1) / 2, (phi + 1) / 2)):
                simple[i, 11 * block + min(10, max(0, math.floor(11 * share)))] += 100 / len(near[i])
    full = simple.clone()
    for i, rows in enumerate(near):
        total = sum(1 / d for _, d in rows if d > 0)
        for j, d in rows:
            if d > 0:
                full[i] += simple[j] / d / total
    return full


@pytest.mark.parametrize(("radius", "count"), [(1.0, 12), (0.015, 100)])
def test_equals_the_darboux_frame_in_loops(radius, count, monkeypatch):
    monkeypatch.setattr(module, "_PAIRS", 100)  # several blocks
    upright = torch.tensor([[0.01, 0, 0.5], [0.01, 0, 0.51]], dtype=torch.float64)  # no frame: e is the normal itself
    points = torch.cat([surface(40), surface(40)[:3], upright])  # three points twice
    normals = torch.nn.functional.normalize(torch.tensor([0.0, 0, -1]) + 0.4 * random(45, 3, seed=4))
    normals[41] *= -1  # a copy that looks the other way
    normals[43] = torch.tensor([0, 0, -1.0])
    expected = fpfh_by_definition(points, normals, radius, count)
    assert_close(fpfh(points[None], normals[None], radius=radius, max_neighbours=count)[0], expected, rtol=0, atol=1e-9)


def test_a_plane_has_one_bin_per_block():
    points = torch.cat([random(150, 2), torch.full((150, 1), 3.0, dtype=torch.float64)], 1)
    normals = estimate_normals(points[None], radius=50)
    histogram = fpfh(points[None], normals, radius=50)[0]
    expected = torch.zeros(33, dtype=torch.float64)
    expected[[5, 16, 27]] = 200
    assert_close(histogram, expected.expand(150, 33), rtol=0, atol=1e-9)


def test_blocks_sum_to_200_and_single_points_are_empty():
    points = torch.cat([surface(120), torch.tensor([[9.0, 9, 9]], dtype=torch.float64)])[None]
    histogram = fpfh(points, estimate_normals(points))[0]
    assert_close(histogram[:-1].view(-1, 3, 11).sum(2), torch.full((120, 3), 200.0, dtype=torch.float64))
    assert (histogram[-1] == 0).all()


def test_knows_neither_place_nor_turn_nor_order_nor_unit():
    points = surface(150)
    # not estimated: points with the same neighbourhood have equal normals, and which is the source is then a toss-up
    normals = torch.nn.functional.normalize(torch.tensor([0.0, 0, -1]) + 0.4 * random(150, 3, seed=4))
    histogram = fpfh(points[None], normals[None], radius=0.1, max_neighbours=40)[0]
    R = turn()
    for scale, shift in ((1, torch.tensor([1.0, 2, -3])), (2, 0)):
        moved = scale * points @ R.T + shift
        changed = (
            (fpfh(moved[None], (normals @ R.T)[None], radius=scale * 0.1, max_neighbours=40)[0] - histogram)
            .abs()
            .amax(1)
        )
        assert changed.max() < 1e-9
    order = torch.randperm(150, generator=torch.Generator().manual_seed(0))
    assert_close(
        fpfh(points[order][None], normals[order][None], radius=0.1, max_neighbours=40)[0],
        histogram[order],
        rtol=0,
        atol=1e-9,
    )


def test_padded_rows_change_nothing():
    clouds = [surface(60), surface(40, seed=1)]
    points, valid = pad_clouds(clouds)
    points[~valid] = torch.nan
    normals = estimate_normals(points, valid=valid)
    histogram = fpfh(points, normals, valid=valid)
    assert (normals[~valid] == 0).all()
    assert (histogram[~valid] == 0).all()
    for b, single in enumerate(clouds):
        alone = estimate_normals(single[None])
        assert_close(normals[b, : len(single)], alone[0], rtol=0, atol=0)
        assert_close(histogram[b, : len(single)], fpfh(single[None], alone)[0], rtol=0, atol=0)


def test_errors():
    points = surface(5)[None].float()
    with pytest.raises(ShapeError, match="normals"):
        fpfh(points, points[:, :3])
    with pytest.raises(ConfigError, match="radius"):
        estimate_normals(points, radius=0)
    with pytest.raises(ConfigError, match="'up'; it must be one of camera, solver"):
        estimate_normals(points, sign="up")
    with pytest.raises(ConfigError, match="at least 3"):
        estimate_normals(points, max_neighbours=2)
    with pytest.raises(DataError, match="row 0 of cloud 0"):
        fpfh(points * torch.nan, points)
    assert fpfh(points, points).dtype == torch.float32
    assert fpfh(points[:0], points[:0]).shape == (0, 5, 33)


@pytest.mark.parametrize(("suffix", "voxel"), [("", 0.05), ("_voxel4mm", 0.004)])
def test_stored_normals_and_histograms_of_btf(suffix, voxel):
    if not GOLDEN.is_file():
        pytest.skip(f"stored outputs are not here: {GOLDEN}")
    with np.load(GOLDEN) as stored:
        points = torch.from_numpy(stored["cloud_organised"].reshape(-1, 3)[stored["valid_idx"]])[None]
        normals, expected = (torch.from_numpy(stored[name + suffix]) for name in ("normals", "fpfh"))
    ours = estimate_normals(points, radius=2 * voxel, max_neighbours=30)[0]
    assert ((ours.double() * normals.double()).sum(1).abs() > 1 - 1e-5).all()
    solved = estimate_normals(points, radius=2 * voxel, max_neighbours=30, sign="solver")
    assert ((solved[0].double() * normals.double()).sum(1) > 1 - 1e-5).all()
    assert_close(fpfh(points, solved, radius=5 * voxel, max_neighbours=100)[0], expected, rtol=0, atol=1e-3)
    got = fpfh(points, normals[None], radius=5 * voxel, max_neighbours=100)[0]
    assert_close(got, expected, rtol=0, atol=1e-3)


def test_open3d_gives_the_same():
    o3d = pytest.importorskip("open3d", reason="Open3D is not installed", exc_type=ImportError)
    points = surface(1500)
    cloud = o3d.geometry.PointCloud(o3d.utility.Vector3dVector(points.numpy()))
    for normal_radius, radius in ((0.1, 0.25), (0.006, 0.012)):
        cloud.normals = o3d.utility.Vector3dVector()
        cloud.estimate_normals(o3d.geometry.KDTreeSearchParamHybrid(normal_radius, 30))
        normals = torch.from_numpy(np.asarray(cloud.normals).copy())
        populated = (torch.cdist(points, points) < normal_radius).sum(1) > 3
        ours = estimate_normals(points[None], radius=normal_radius)[0]
        assert ((ours * normals).sum(1).abs()[populated] > 1 - 1e-6).all()
        ours = estimate_normals(points[None], radius=normal_radius, sign="solver")[0]
        assert ((ours * normals).sum(1)[populated] > 1 - 1e-6).all()
        search = o3d.geometry.KDTreeSearchParamHybrid(radius, 100)
        expected = torch.from_numpy(o3d.pipelines.registration.compute_fpfh_feature(cloud, search).data.T.copy())
        changed = (fpfh(points[None], normals[None], radius=radius)[0] - expected).abs().amax(1)
        assert (changed > 1e-5).float().mean() < 0.005  # angles on the edge of a bin


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_same_on_a_gpu():
    points, valid = pad_clouds([surface(600), surface(400, seed=1)])
    normals = estimate_normals(points, valid=valid)
    assert_close(estimate_normals(points.cuda(), valid=valid.cuda()).cpu(), normals, rtol=0, atol=1e-9)
    got = fpfh(points.cuda(), normals.cuda(), valid=valid.cuda()).cpu()
    changed = (got - fpfh(points, normals, valid=valid)).abs().amax(-1)
    assert (changed > 1e-6).float().mean() < 0.005
