"""Time the pieces of MDSS on this machine: what a part costs, and what a step of each branch's training costs.

    OMP_NUM_THREADS=1 python benchmarks/mdss.py                # preset fast: the table of docs/methods/mdss.md
    OMP_NUM_THREADS=1 python benchmarks/mdss.py --preset paper --repeats 1

Weights are random. The part is drawn on the machine: a bumpy disc of `--points` measured pixels in 256 x 256. Medians
of process seconds, since other programs on the machine stretch wall times.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from polyspect.detectors.contract import configure
from polyspect.detectors.mdss import MDSS
from polyspect.samples import Batch


def make_part(size: int, points: int) -> Batch:
    """A disc of about `points` measured pixels (a full picture if they are as many), half a metre away."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    apart = (y - size / 2).square() + (x - size / 2).square()
    valid = apart <= apart.flatten().sort().values[min(points, size * size) - 1]
    generator = torch.Generator().manual_seed(0)
    z = 0.5 + 0.01 * torch.sin(x / 9) * torch.cos(y / 12) + 2e-4 * torch.randn(size, size, generator=generator)
    xyz = torch.stack([(x - size / 2) * 5e-4, (y - size / 2) * 5e-4, z]) * valid
    rgb = torch.rand(1, 3, size, size, generator=generator)
    return Batch(["disc"], {"rgb": rgb, "xyz": xyz[None].float()}, valid[None], valid[None])


def seconds(run: Callable[[], object], repeats: int) -> float:
    """Median of process seconds, after one run that is not counted."""
    found = []
    for _ in range(repeats + 1):
        started = time.process_time()
        run()
        found.append(time.process_time() - started)
    return statistics.median(found[1:])


def main() -> None:
    """Print one line per piece."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="fast", help="default: %(default)s")
    parser.add_argument("--points", type=int, default=16_000, help="measured pixels (default: %(default)s)")
    parser.add_argument("--size", type=int, default=256, help="pixels per side (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="default: %(default)s")
    a = parser.parse_args()
    detector = MDSS(configure(MDSS, {"teacher_weights": "random"}, a.preset))
    c, batch = detector.config, make_part(a.size, a.points)
    detector.eval()
    with torch.no_grad():
        features = detector.extract(batch)
    many = {name: x.expand(c.student_batch, *x.shape[1:]) for name, x in features.items()}

    def student_step() -> None:
        detector.student_loss(many)["student"].backward()

    def distance_step() -> None:
        detector.distance_loss(features)["distance"].backward()

    pieces: dict[str, Callable[[], object]] = {
        "features": torch.no_grad()(lambda: detector.extract(batch)),
        "RGB map": torch.no_grad()(lambda: detector.student_map(features)),
        "3D map": torch.no_grad()(lambda: detector.distance_map(features)),
        "student step": student_step,
        "distance step": distance_step,
    }
    print(f"preset {a.preset}, {int(batch.valid.sum())} points, {torch.get_num_threads()} threads")
    for name, run in pieces.items():
        detector.train(name.endswith("step"))
        print(f"| {name} | {seconds(run, a.repeats):.2f} |")


if __name__ == "__main__":
    main()
