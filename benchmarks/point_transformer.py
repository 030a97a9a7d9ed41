"""Time the point transformer's fast form against its written-out one, on this machine.

    python benchmarks/point_transformer.py             # the table of docs/networks.md
    python benchmarks/point_transformer.py --groups 256 --points 32 --repeats 5

Random weights and groups; grouping is not part of it. Wall and process time in seconds, the least of `--repeats` runs;
the ratio is that of process times, since other programs on the machine stretch the wall times. Memory is the growth of
the process's peak, which never falls: only the first pair tells, the fast form before the other, both after two groups
have called in the libraries.
"""

from __future__ import annotations

import argparse
import os
import resource
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from polyspect.backbones.point_transformer import PointTransformer


class Run(NamedTuple):
    """What a form gave and took."""

    result: Tensor
    wall: float  # seconds
    cpu: float  # seconds of this process
    grown: float  # MiB by which the peak grew


def timed(form: Callable[[], Tensor], repeats: int) -> Run:
    """Run a form `repeats` times; the least times."""
    before, walls, used = _peak(), [], []
    for _ in range(repeats):
        wall, process = time.perf_counter(), time.process_time()
        result = form()
        walls.append(time.perf_counter() - wall)
        used.append(time.process_time() - process)
    return Run(result, min(walls), min(used), _peak() - before)


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--groups", type=int, default=1024)
    parser.add_argument("--points", type=int, default=128, help="of a group")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(0)
    groups = 0.003 * torch.randn(1, options.groups, options.points, 3, generator=generator)
    centres = torch.tensor([0, 0, 0.5]) + 0.05 * torch.randn(1, options.groups, 3, generator=generator)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {options.threads} thread(s), load {os.getloadavg()[0]:.1f}\n")
    print("| statistics | part | fast, wall (cpu) s | plain, wall (cpu) s | plain / fast | largest difference |")
    print("| --- | --- | --- | --- | --- | --- |")
    memory = ""
    with torch.inference_mode():
        for form in (PointTransformer().eval(), PointTransformer().eval().plain):
            form(groups[:, :2], centres[:, :2])
    for statistics in ("cloud", "stored"):
        net = PointTransformer(statistics=statistics).eval()
        parts = {
            "group encoder": (partial(net.encoder, groups), partial(net.encoder.plain, groups)),
            "whole": (partial(net, groups, centres), partial(net.plain, groups, centres)),
        }
        for part, (fast, plain) in parts.items():
            with torch.inference_mode():
                ours, theirs = timed(fast, options.repeats), timed(plain, options.repeats)
            memory = (
                memory or f"Peak memory, {part}: {ours.grown:.0f} MiB fast, then {theirs.grown:.0f} more for plain."
            )
            change = float((ours.result - theirs.result).abs().max() / theirs.result.abs().max())
            cells = [statistics, part, *(f"{run.wall:.2f} ({run.cpu:.2f})" for run in (ours, theirs))]
            cells += [f"{theirs.cpu / ours.cpu:.1f}", f"{change:.0e}"]
            print("| " + " | ".join(cells) + " |", flush=True)
    print(f"\n{memory}")


if __name__ == "__main__":
    main()
