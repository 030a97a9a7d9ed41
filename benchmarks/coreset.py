"""Time the greedy coreset and the nearest-neighbour search against the usual ways of writing them, on this machine.

    python benchmarks/coreset.py                       # the table of docs/methods/patchcore.md
    python benchmarks/coreset.py --points 20000 --dim 768 --steps 100

Per case and data set: the whole of `greedy_coreset` (its steps differ in cost, so it is run to the end), and `--steps`
steps of two plain loops, whose steps all cost the same, extrapolated to as many choices:

* one pass: squared distances by ``addmv`` on precomputed norms, ``minimum``, ``argmax``;
* subtract + norm: ``(x - x[c]).norm(dim=1)``, ``minimum``, ``argmax``, as published implementations do it.

All start from the projected patches, in float32; the projection is timed by itself. Wall and process time in seconds.
Wall is only meaningful on an idle machine, and the loops are memory bound: judge by the ratios of one run.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable

import torch
from torch import Tensor

from polyspect.layers.memory import greedy_coreset, nearest, sparse_random_projection


def gaussian(points: int, dim: int) -> Tensor:
    """Independent normal rows: distances concentrate, the hard case for any pruning."""
    return torch.randn(points, dim, generator=torch.Generator().manual_seed(0))


def clustered(points: int, dim: int) -> Tensor:
    """Sixty clusters whose points lie at widely different distances, nearer to what patches look like."""
    generator = torch.Generator().manual_seed(0)
    centres = 2 * torch.randn(60, dim, generator=generator)
    spread = torch.rand(points, 1, generator=generator) ** 2
    member = torch.randint(0, 60, (points,), generator=generator)
    return centres[member] + spread * torch.randn(points, dim, generator=generator)


def one_pass_step(x: Tensor, norm: Tensor, bound: Tensor, pick: int) -> int:
    """One choice of the plain loop with precomputed norms; `bound` holds squared distances and is updated."""
    torch.minimum(bound, torch.addmv(norm + norm[pick], x, x[pick], alpha=-2), out=bound)
    return int(bound.argmax())


def subtract_step(x: Tensor, norm: Tensor, bound: Tensor, pick: int) -> int:
    """One choice by direct differences; `bound` holds distances and is updated."""
    torch.minimum(bound, (x - x[pick]).norm(dim=1), out=bound)
    return int(bound.argmax())


def time_steps(step: Callable[[Tensor, Tensor, Tensor, int], int], x: Tensor, steps: int) -> tuple[float, float]:
    """Wall and process seconds per step."""
    norm, bound, pick = x.square().sum(1), torch.full((len(x),), torch.inf), 0
    pick = step(x, norm, bound, pick)
    wall, used = time.perf_counter(), time.process_time()
    for _ in range(steps):
        pick = step(x, norm, bound, pick)
    return (time.perf_counter() - wall) / steps, (time.process_time() - used) / steps


def timed(function: Callable[[], object]) -> tuple[float, float]:
    """Wall and process seconds of one call."""
    wall, used = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - wall, time.process_time() - used


def compare(points: int, dim: int, ratio: float, limit: int | None, steps: int) -> None:
    """Print one row per data set."""
    for make in (gaussian, clustered):
        x = make(points, dim)
        projection = sparse_random_projection(dim, points)
        before = ""
        if projection is not None:
            wall, used = timed(lambda x=x, p=projection: x @ p.T)  # type: ignore[misc]
            x, before = x @ projection.T, f", projection {wall:.2f} s ({used:.2f})"
        size = min(int(ratio * points), limit or points)
        ours = timed(lambda x=x, size=size: greedy_coreset(x, size))  # type: ignore[misc]
        one, direct = time_steps(one_pass_step, x, steps), time_steps(subtract_step, x, steps)
        cells = [f"{points} x {dim} -> {x.shape[1]}{before}", make.__name__, str(size)]
        cells += [f"{ours[0]:.1f} ({ours[1]:.1f}), {1e3 * ours[0] / size:.2f} ms"]
        for wall, used in (one, direct):
            cells += [f"{1e3 * wall:.1f} ({1e3 * used:.1f}) ms -> {wall * size:.0f} s, {wall * size / ours[0]:.0f}x"]
        print("| " + " | ".join(cells) + " |", flush=True)


def compare_search(queries: int, rows: int, dim: int) -> None:
    """Print the time of a search per block of queries."""
    everything = gaussian(rows + queries, dim)
    bank, query = everything[:rows], everything[rows:]
    for name, search in (
        ("nearest", lambda: nearest(query, bank)),
        ("cdist + min", lambda: torch.cdist(query, bank).min(1)),
    ):
        search()
        runs = [timed(search) for _ in range(5)]
        wall, used = (sorted(values)[2] for values in zip(*runs))
        print(f"| {name} | {queries} x {rows} x {dim} | {1e3 * wall:.0f} ({1e3 * used:.0f}) ms |", flush=True)


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--points", type=int, help="patches; without it, the two cases of the documentation")
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--ratio", type=float, default=0.1)
    parser.add_argument("--limit", type=int, help="most choices")
    parser.add_argument("--steps", type=int, default=60, help="steps of the plain loops that are timed")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.threads} thread(s), load {os.getloadavg()[0]:.1f}\n")
    print(
        "| patches | data | choices | greedy_coreset, wall (cpu) s | one pass, per step | subtract + norm, per step |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    if options.points:
        compare(options.points, options.dim, options.ratio, options.limit, options.steps)
        return
    compare(80_000, 768, 0.1, None, options.steps)
    compare(143_360, 152, 0.1, None, options.steps)
    compare(143_360, 152, 0.1, 4_000, options.steps)
    print("\n| search | queries x rows x dim | wall (cpu) |\n| --- | --- | --- |")
    compare_search(1024, 4_000, 152)
    compare_search(784, 10_000, 768)


if __name__ == "__main__":
    main()
