"""Time what memory banks do: the greedy coreset, and the search relative to one matrix product of its size.

    OMP_NUM_THREADS=2 python benchmarks/memory.py                 # the figures of docs/performance.md
    python benchmarks/memory.py --rows 20000 --only coreset       # a smaller coreset

* coreset: `greedy_coreset` of `--rows` x 768 at 10 %, after the random projection, once per data set, to the end. How
  it compares with the usual loops is measured by coreset.py.
* search: 3,136 patches (one part) against a bank of 10,000 x 768: `nearest`, a bank in float16, ``cdist`` + ``min``, a
  bank with FAISS where that is installed, and the bare product ``q @ bank.T``. All in turn, `--repeat` times; medians,
  and the median over the repeats of the ratio to the product of the same round.

Judge by the ratios, which come from one run; where other programs are running, by those of process time.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import time
from collections.abc import Callable

import torch

from coreset import clustered, gaussian
from polyspect.layers.memory import MemoryBank, greedy_coreset, nearest, sparse_random_projection

PATCHES, BANK, DIM = 3_136, 10_000, 768


def seconds(function: Callable[[], object]) -> tuple[float, float]:
    """Wall and process time of one call."""
    wall, used = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - wall, time.process_time() - used


def time_coreset(rows: int, ratio: float) -> None:
    """Print one row per data set."""
    print("| patches | data | choices | projection s | coreset, wall (cpu) s |\n| --- | --- | --- | --- | --- |")
    for make in (gaussian, clustered):
        x = make(rows, DIM)
        projection = sparse_random_projection(DIM, rows)
        assert projection is not None
        projected, _ = seconds(lambda x=x, p=projection: x @ p.T)  # type: ignore[misc]
        shrunk, size = x @ projection.T, int(ratio * rows)
        wall, used = seconds(lambda shrunk=shrunk, size=size: greedy_coreset(shrunk, size))  # type: ignore[misc]
        cells = (
            f"{rows} x {DIM} -> {shrunk.shape[1]}",
            make.__name__,
            size,
            f"{projected:.2f}",
            f"{wall:.1f} ({used:.1f})",
        )
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def time_search(repeat: int) -> None:
    """Print one row per data set and way to search."""
    print("| data | search | wall ms | times the product, wall (cpu) |\n| --- | --- | --- | --- |")
    for make in (gaussian, clustered):
        everything = make(BANK + PATCHES, DIM)
        bank, queries = everything[:BANK], everything[BANK:]
        half = MemoryBank("half", storage="float16")
        half.vectors = bank.half()
        ways: dict[str, Callable[[], object]] = {
            "q @ bank.T": lambda q=queries, b=bank: q @ b.T,  # type: ignore[misc]
            "nearest": lambda q=queries, b=bank: nearest(q, b),  # type: ignore[misc]
            "bank in float16": lambda q=queries, h=half: h.distance(q),  # type: ignore[misc]
            "cdist + min": lambda q=queries, b=bank: torch.cdist(q, b).min(1),  # type: ignore[misc]
        }
        if importlib.util.find_spec("faiss"):
            faiss = MemoryBank("faiss", backend="faiss")
            faiss.vectors = bank
            ways["bank with FAISS"] = lambda q=queries, f=faiss: f.distance(q)  # type: ignore[misc]
        for search in ways.values():
            search()
        rounds = [{name: seconds(search) for name, search in ways.items()} for _ in range(repeat)]
        for name in ways:
            wall = statistics.median(r[name][0] for r in rounds)
            ratios = [statistics.median(r[name][i] / r["q @ bank.T"][i] for r in rounds) for i in (0, 1)]
            print(f"| {make.__name__} | {name} | {1e3 * wall:.0f} | {ratios[0]:.2f} ({ratios[1]:.2f}) |", flush=True)


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--rows", type=int, default=80_000, help="patches that the coreset is chosen from")
    parser.add_argument("--ratio", type=float, default=0.1)
    parser.add_argument("--repeat", type=int, default=15, help="rounds of the search")
    parser.add_argument("--only", choices=("coreset", "search"))
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), load {os.getloadavg()[0]:.1f}\n")
    if options.only != "search":
        time_coreset(options.rows, options.ratio)
    if options.only != "coreset":
        print()
        time_search(options.repeat)


if __name__ == "__main__":
    main()
