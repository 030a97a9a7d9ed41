"""Time a CFM prediction against the plain chain of steps that the method describes, on this machine.

    python benchmarks/cfm.py             # the table of docs/methods/cfm.md
    python benchmarks/cfm.py --groups 64 --group-size 16 --backbone efficientnet_lite0 --reductions 8 16

The plain chain: farthest points one pass each; k-NN as N x G x 3 differences; the point transformer as its equations
are written; C x H x W images of features; both mapping networks on every pixel; eight box means. It shares the image
network, and all weights are random and the same. One part, drawn on the machine: a bumpy disc before nothing. Medians
of `--repeats` runs, ours and the plain one in turn; the ratio is that of process times, since other programs on the
machine stretch the wall times.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from polyspect.detectors.cfm import CFM, CFMConfig
from polyspect.samples import Batch


class Plain(NamedTuple):
    """Features of one part before they reach pixels."""

    tokens: Tensor  # 1 C h w
    groups: Tensor  # G C
    centres: Tensor  # G 3
    points: Tensor  # N 3
    pixels: Tensor  # N


def make_part(size: int, points: int) -> Batch:
    """A disc of about `points` measured pixels, half a metre away."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    valid = (y - size / 2).square() + (x - size / 2).square() < points / torch.pi
    generator = torch.Generator().manual_seed(0)
    z = 0.5 + 0.01 * torch.sin(x / 9) * torch.cos(y / 12) + 2e-4 * torch.randn(size, size, generator=generator)
    xyz = torch.stack([(x - size / 2) * 5e-4, (y - size / 2) * 5e-4, z]) * valid
    rgb = torch.rand(1, 3, size, size, generator=generator)
    return Batch(["disc"], {"rgb": rgb, "xyz": xyz[None].float()}, valid[None], valid[None])


def plain_features(detector: CFM, batch: Batch) -> Plain:
    """The frozen networks, grouping by loops and whole difference tensors."""
    c = detector.config
    pixels = batch.valid[0].flatten().nonzero()[:, 0]
    points = batch.images["xyz"][0].flatten(1).T[pixels]
    chosen, apart = [0], torch.full((len(points),), torch.inf)
    for _ in range(c.groups - 1):
        apart = torch.minimum(apart, (points - points[chosen[-1]]).square().sum(1))
        chosen.append(int(apart.argmax()))
    centres = points[chosen]
    squared = (centres[:, None] - points[None]).square().sum(-1)  # G N, by way of G N 3
    near = squared.topk(c.group_size, largest=False).indices
    groups = points[near] - centres[:, None]
    network = detector.extractor.xyz.network
    return Plain(
        detector.extractor.image_grid(batch.images["rgb"]),
        network.plain(groups[None], centres[None])[0],
        centres,
        points,
        pixels,
    )


def plain_map(detector: CFM, part: Plain, size: int) -> tuple[Tensor, Tensor]:
    """Map and score by images of features: every pixel interpolated and mapped."""
    squared = (part.points[:, None] - part.centres[None]).square().sum(-1)  # N G, by way of N G 3
    smallest, index = squared.topk(3, largest=False)
    weight = 1 / (smallest + 1e-8)
    weight = weight / weight.sum(1, keepdim=True)
    own = (weight[..., None] * part.groups[index]).sum(1)  # N C
    image = own.new_zeros(own.shape[1], size * size)
    image[:, part.pixels] = own.T
    image = F.avg_pool2d(image.view(1, -1, size, size), 3, stride=1)
    f_xyz = F.adaptive_avg_pool2d(image, (size, size))[0].flatten(1).T  # H*W C
    f_rgb = F.interpolate(part.tokens, size=(size, size), mode="bilinear")[0].flatten(1).T
    outside = (f_xyz == 0).all(1)  # the program's sum == 0 misfires on untrained norms, whose features sum to about 0
    d_xyz = (F.normalize(detector.mapping["xyz"](f_rgb), dim=1) - F.normalize(f_xyz, dim=1)).norm(dim=1)
    d_rgb = (F.normalize(detector.mapping["rgb"](f_xyz), dim=1) - F.normalize(f_rgb, dim=1)).norm(dim=1)
    both = d_xyz * d_rgb
    both[outside] = 0
    blurred = both.view(1, 1, size, size)
    for side in (5, 5, 5, 5, 5, 7, 7, 7):
        blurred = F.avg_pool2d(blurred, side, stride=1, padding=side // 2)
    blurred = blurred[0] / blurred[blurred != 0].mean().sqrt()
    return blurred, blurred.amax()


def timed(form: Callable[[], Any]) -> tuple[Any, float, float]:
    """What a form gives, and its wall and process time in seconds."""
    wall, process = time.perf_counter(), time.process_time()
    result = form()
    return result, time.perf_counter() - wall, time.process_time() - process


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--points", type=int, default=20_000)
    parser.add_argument("--groups", type=int, default=1024)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--backbone", default="vit_base_patch8_224.dino")
    parser.add_argument("--reductions", type=int, nargs="+", default=[8])
    parser.add_argument("--mapper", choices=("base", "big"), default="base")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config = CFMConfig(
        backbone=options.backbone,
        reductions=tuple(options.reductions),
        weights="random",
        point_backbone="point_mae",
        point_weights="random",
        groups=options.groups,
        group_size=options.group_size,
        mapper=options.mapper,
    )
    detector, batch = CFM(config).eval(), make_part(options.size, options.points)
    print(
        f"torch {torch.__version__}, {options.threads} thread(s), load {os.getloadavg()[0]:.1f}; "
        f"{int(batch.valid.sum())} points, mapper {options.mapper}, medians of {options.repeats}\n"
    )
    taken: dict[str, list[tuple[float, float]]] = {}
    change = 0.0
    with torch.inference_mode():
        detector.extractor.image_grid(batch.images["rgb"])  # calls in the libraries
        for _ in range(options.repeats):
            runs: dict[str, tuple[float, float]] = {}
            features, *runs["ours, features"] = timed(lambda: detector.extract(batch))
            ours, *runs["ours, map"] = timed(lambda f=features: detector.score(f))
            part, *runs["plain, features"] = timed(lambda: plain_features(detector, batch))
            theirs, *runs["plain, map"] = timed(lambda p=part: plain_map(detector, p, options.size))
            _, *runs["image network"] = timed(lambda: detector.extractor.image_grid(batch.images["rgb"]))
            change = max(change, float((ours.map - theirs[0]).abs().max() / theirs[0].max()))
            change = max(change, abs(float(ours.score / theirs[1]) - 1))
            for name, pair in runs.items():
                taken.setdefault(name, []).append((pair[0], pair[1]))
    middle = {name: [statistics.median(times) for times in zip(*pairs)] for name, pairs in taken.items()}
    image = middle["image network"]
    rows = {}
    for form in ("ours", "plain"):
        features, own = middle[f"{form}, features"], middle[f"{form}, map"]
        rows[form] = {
            "from features to map": own,
            "point features": [a - b for a, b in zip(features, image)],
            "all but the image network": [a - b + m for a, b, m in zip(features, image, own)],
            "whole prediction": [a + m for a, m in zip(features, own)],
        }
    print("| step | ours, wall (cpu) s | plain, wall (cpu) s | plain / ours |")
    print("| --- | --- | --- | --- |")
    for step, ours in rows["ours"].items():
        plain = rows["plain"][step]
        print(
            f"| {step} | {ours[0]:.2f} ({ours[1]:.2f}) | {plain[0]:.2f} ({plain[1]:.2f}) | {plain[1] / ours[1]:.1f} |"
        )
    print(f"| image network, the same | {image[0]:.2f} ({image[1]:.2f}) | | |")
    print(f"\nLargest difference of map and score, over the maximum: {change:.0e}.")


if __name__ == "__main__":
    main()
