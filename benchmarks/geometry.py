"""Time the point geometry against a plain way of writing each step, on this machine, in one run.

    python benchmarks/geometry.py                      # the tables of docs/geometry.md
    python benchmarks/geometry.py --diameter 100 --runs 3

One organised cloud of 224 x 224 pixels: a bumpy disc of about 20,000 points. The plain side does what point networks
usually ship: farthest points by a loop that gathers, subtracts and sums (N, 3) arrays; groups by the norm of broadcast
differences and ``topk``; interpolation by the expanded squared distance and a full sort; pooling of a C x 224 x 224
image. Both sides start from the same tensors. Medians of `--runs`, which alternate between the two sides; wall time in
milliseconds. Judge by the ratios of one run. Also printed: how far the results are apart.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from polyspect.geometry.fpfh import estimate_normals, fpfh
from polyspect.geometry.interpolation import groups_to_patches, interpolation_map
from polyspect.geometry.neighbours import gather_rows, group, nearest_neighbours
from polyspect.geometry.padding import PackedPoints, pack_points
from polyspect.geometry.sampling import farthest_points

SIZE, GROUPS, GROUP_SIZE = 224, 1024, 128


def bumpy_disc(diameter: int) -> PackedPoints:
    """A disc of `diameter` pixels, 0.5 mm apart, half a metre away, measured with 0.2 mm of noise."""
    y, x = torch.meshgrid(*[torch.arange(SIZE) - (SIZE - 1) / 2] * 2, indexing="ij")
    valid = x**2 + y**2 < (diameter / 2) ** 2
    x, y = 0.0005 * x, 0.0005 * y
    z = 0.5 + 0.01 * torch.sin(60 * x) * torch.cos(45 * y) + 0.004 * torch.sin(150 * x + 1)
    noise = torch.randn(3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    return pack_points((torch.stack([x, y, z]) + 2e-4 * noise)[None], valid[None])


def plain_farthest_points(points: Tensor, count: int) -> Tensor:
    """A loop over choices on (B, N, 3)."""
    B, N, _ = points.shape
    chosen = torch.zeros(B, count, dtype=torch.int64)
    nearest = torch.full((B, N), 1e10)
    pick, batch = torch.zeros(B, dtype=torch.int64), torch.arange(B)
    for i in range(count):
        chosen[:, i] = pick
        distance = ((points - points[batch, pick][:, None]) ** 2).sum(-1)
        closer = distance < nearest
        nearest[closer] = distance[closer]
        pick = nearest.max(-1).indices
    return chosen


def plain_neighbours(centres: Tensor, points: Tensor, k: int) -> Tensor:
    """The norm of all differences, (B, N, G, 3) of them, and the k smallest."""
    distance = (points[:, :, None] - centres[:, None]).norm(dim=-1)  # B N G
    return distance.topk(k, dim=1, largest=False).indices.mT


def plain_interpolation(points: Tensor, centres: Tensor, features: Tensor) -> Tensor:
    """Expanded squared distances, all of them sorted, the first three used."""
    squared = points.square().sum(-1)[:, :, None] + centres.square().sum(-1)[:, None] - 2 * points @ centres.mT
    ordered, rows = squared.sort(dim=-1)
    closeness = 1 / (ordered[:, :, :3] + 1e-8)
    weight = closeness / closeness.sum(-1, keepdim=True)
    return (gather_rows(features, rows[:, :, :3]) * weight[..., None]).sum(2)


def plain_pooling(values: Tensor, pixels: Tensor, patches: int) -> Tensor:
    """A zero image C x H x W, 3x3 means, adaptive pooling."""
    image = torch.zeros(1, values.shape[-1], SIZE * SIZE)
    image[:, :, pixels[0]] = values.mT
    pooled = F.adaptive_avg_pool2d(F.avg_pool2d(image.view(1, -1, SIZE, SIZE), 3, stride=1), patches)
    return pooled.flatten(2).mT


def compare(name: str, plain: Callable[[], object], ours: Callable[[], object], runs: int) -> tuple[float, float]:
    """Print a row; return the medians in milliseconds."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(runs):
        for kept, function in zip(times, (plain, ours)):
            begin = time.perf_counter()
            function()
            kept.append(1e3 * (time.perf_counter() - begin))
    slow, fast = (statistics.median(kept) for kept in times)
    print(f"| {name} | {slow:.0f} | {fast:.1f} | {slow / fast:.1f}x |", flush=True)
    return slow, fast


def chain(cloud: PackedPoints, features: Tensor, runs: int) -> None:
    """The steps of a point transformer around its network, one by one and together."""
    points, pixels, _ = cloud
    C = features.shape[-1]
    centres = gather_rows(points, farthest_points(points, GROUPS))
    size = (SIZE, SIZE)

    def plain_groups() -> Tensor:
        rows = plain_farthest_points(points, GROUPS)
        centres = gather_rows(points, rows)
        return group(points, centres, plain_neighbours(centres, points, GROUP_SIZE))

    def our_groups() -> Tensor:
        centres = gather_rows(points, farthest_points(points, GROUPS))
        return group(points, centres, nearest_neighbours(centres, points, GROUP_SIZE).rows)

    def plain_points() -> Tensor:
        return plain_interpolation(points, centres, features)

    def our_points() -> Tensor:
        return interpolation_map(points, centres).apply(features)

    def plain_patches(patches: int) -> Tensor:
        return plain_pooling(plain_points(), pixels, patches)

    def our_patches(patches: int) -> Tensor:
        return groups_to_patches(points, centres, pixels, size, (patches, patches)).apply(features)

    print(f"\n| {points.shape[1]} points, {C} channels | plain, ms | ours, ms | ratio |\n| --- | --- | --- | --- |")
    compare(
        f"farthest points -> {GROUPS}",
        lambda: plain_farthest_points(points, GROUPS),
        lambda: farthest_points(points, GROUPS),
        runs,
    )
    compare(
        f"neighbours, {GROUPS} x {GROUP_SIZE}",
        lambda: plain_neighbours(centres, points, GROUP_SIZE),
        lambda: nearest_neighbours(centres, points, GROUP_SIZE),
        runs,
    )
    compare("interpolation to points", plain_points, our_points, runs)
    compare(
        "**farthest points + groups + interpolation**",
        lambda: (plain_groups(), plain_points()),
        lambda: (our_groups(), our_points()),
        runs,
    )
    for patches in (56, SIZE):
        compare(
            f"**groups to {patches}x{patches} patches**",
            lambda patches=patches: plain_patches(patches),  # type: ignore[misc]
            lambda patches=patches: our_patches(patches),  # type: ignore[misc]
            runs,
        )
    ready = groups_to_patches(points, centres, pixels, size, (56, 56))
    compare("groups to 56x56 patches, map kept", lambda: plain_patches(56), lambda: ready.apply(features), runs)

    exact = groups_to_patches(points.double(), centres.double(), pixels, size, (56, 56)).apply(features.double())
    chosen, near = farthest_points(points, GROUPS), nearest_neighbours(centres, points, GROUP_SIZE).rows
    same_points = float((plain_farthest_points(points, GROUPS) == chosen).float().mean())
    same_rows = float((plain_neighbours(centres, points, GROUP_SIZE) == near).float().mean())
    print(f"\nthe same farthest points {same_points:.2%}, the same neighbour in the same slot {same_rows:.2%}")
    for name, patches in (("plain", plain_patches(56)), ("ours", our_patches(56))):
        print(f"largest error of the 56x56 patches, {name}: {float((patches - exact).abs().max()):.1e}")


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--diameter", type=int, default=160, help="of the disc, pixels")
    parser.add_argument("--channels", type=int, default=1152)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.threads} thread(s), load {os.getloadavg()[0]:.1f}")
    cloud = bumpy_disc(options.diameter)
    features = torch.randn(1, GROUPS, options.channels, generator=torch.Generator().manual_seed(1))
    chain(cloud, features, options.runs)
    normals = estimate_normals(cloud.points)
    for name, function in (
        ("normals, 30 neighbours", lambda: estimate_normals(cloud.points)),
        ("FPFH, 100 neighbours", lambda: fpfh(cloud.points, normals)),
    ):
        begin = time.perf_counter()
        function()
        print(f"{name}: {1e3 * (time.perf_counter() - begin):.0f} ms")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
