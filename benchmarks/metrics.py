"""Time and memory of exact AUPRO: polyspect, the full-curve way, and anomalib where it is installed.

Every contestant runs in a fresh process on the same synthetic maps: one warm-up on two parts (imports), one run for
peak memory, then timed repeats. Memory is the growth of the resident set over what the process held before the call.
Needs numpy and scipy alone, and measures the package of this checkout.

    python benchmarks/metrics.py
    python benchmarks/metrics.py --parts 100 --size 224 --repeats 7
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from scipy import ndimage

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

LIMIT = 0.3
Case = tuple[Any, Any]  # maps (N, H, W) float32 in 0..1 and masks (N, H, W) bool


def make_case(parts: int, size: int, defects: int, seed: int) -> Case:
    """Smooth noise in 0..1 as maps, and one 30 x 30 defect, raised a little, on each of the last `defects` parts."""
    generator = np.random.default_rng(seed)
    maps, masks = np.empty((parts, size, size), np.float32), np.zeros((parts, size, size), bool)
    for i in range(parts):
        image = ndimage.gaussian_filter(generator.standard_normal((size, size), dtype=np.float32), 2.0)
        if i >= parts - defects:
            y, x = generator.integers(0, size - 30, 2)
            masks[i, y : y + 30, x : x + 30] = True
            image += 0.15 * masks[i]
        maps[i] = np.clip(0.5 + image, 0.0, 1.0)
    return maps, masks


def run_polyspect(case: Case) -> float:
    """Exact AUPRO at one limit."""
    from polyspect.metrics import aupro

    return aupro(*case, [LIMIT])[LIMIT]


def run_all_metrics(case: Case) -> float:
    """All fourteen metrics of `evaluate_maps`: image and pixel AUROC, AP and F1, both evaluators at four limits."""
    from polyspect.metrics import evaluate_maps

    maps, masks = case
    values = evaluate_maps(maps.max(axis=(1, 2)), masks.any(axis=(1, 2)), maps, masks)
    return float(values[f"aupro@{LIMIT:g}"] or 0.0)


def run_interval(case: Case) -> float:
    """Bootstrap interval of exact AUPRO and three more metrics, 200 resamples; the value is its lower end."""
    from polyspect.metrics import ScoredParts, bootstrap

    maps, masks = case
    parts = ScoredParts.collect(maps.max(axis=(1, 2)), masks.any(axis=(1, 2)), maps, masks)
    interval = bootstrap(parts, resamples=200)[f"aupro@{LIMIT:g}"]
    return float("nan") if interval is None else interval[0]


def run_full_curve(case: Case) -> float:
    """The textbook way: sort all pixels with their weights, accumulate both rates, drop ties, integrate."""
    maps, masks = case
    weights, components = np.zeros(maps.shape), 0
    for mask, weight in zip(masks, weights):
        labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
        components += count
        weight[mask] = 1.0 / np.bincount(labels[mask])[labels[mask]]
    order = np.argsort(-maps, axis=None)
    scores = maps.ravel()[order]
    fpr = np.cumsum(~masks.ravel()[order]) / np.count_nonzero(~masks)
    pro = np.cumsum(weights.ravel()[order]) / components
    last = np.append(np.flatnonzero(np.diff(scores)), scores.size - 1)
    fpr, pro = np.append(0.0, fpr[last]), np.append(0.0, pro[last])
    inside = fpr < LIMIT
    x, y = np.append(fpr[inside], LIMIT), np.append(pro[inside], np.interp(LIMIT, fpr, pro))
    return float(np.sum(np.diff(x) * (y[1:] + y[:-1])) / 2 / LIMIT)


def run_anomalib(case: Case) -> float:
    """anomalib's AUPRO, through the bare torchmetrics class or, if that is gone, the field-reading one."""
    import torch

    maps, masks = (torch.from_numpy(array) for array in case)
    masks = masks.int()
    try:
        from anomalib.metrics.aupro import _AUPRO
    except ImportError:
        from anomalib.metrics import AUPRO

        metric = AUPRO(fields=["anomaly_map", "gt_mask"], fpr_limit=LIMIT)
        metric.update(SimpleNamespace(anomaly_map=maps, gt_mask=masks))
    else:
        metric = _AUPRO(fpr_limit=LIMIT)
        metric.update(maps, masks)
    return float(metric.compute())


CONTESTANTS: dict[str, Callable[[Case], float]] = {
    "polyspect": run_polyspect,
    "polyspect, all 14 metrics": run_all_metrics,
    "polyspect, lower end of the interval": run_interval,
    "full curve (numpy)": run_full_curve,
    "anomalib": run_anomalib,
}


def resident_mib(field: str) -> float:
    """``VmRSS`` (now) or ``VmHWM`` (peak) of this process; without /proc the peak for both."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith(field))
        return float(line.split()[1]) / 1024
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def reset_peak() -> None:
    """Start `VmHWM` anew from the present resident set, where the kernel lets us."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def measure(name: str, options: argparse.Namespace) -> dict[str, float]:
    """Value, median wall and CPU seconds, and peak extra MiB of one contestant, in this process."""
    run = CONTESTANTS[name]
    case = make_case(options.parts, options.size, options.defects, options.seed)
    run((case[0][-2:], case[1][-2:]))
    reset_peak()
    before = resident_mib("VmRSS")
    value = run(case)
    extra = resident_mib("VmHWM") - before
    walls, cpus = [], []
    for _ in range(options.repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        run(case)
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return {"value": value, "wall": statistics.median(walls), "cpu": statistics.median(cpus), "extra": extra}


def measure_apart(name: str, arguments: list[str], threads: int) -> dict[str, float] | str:
    """`measure` in a fresh process; the last line of its errors if it fails."""
    command = [sys.executable, __file__, *arguments, "--only", name]
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        return done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit status {done.returncode}"
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def has_anomalib() -> bool:
    """True if anomalib can be imported; looked up without importing it."""
    import importlib.util

    return importlib.util.find_spec("anomalib") is not None


def main(arguments: list[str]) -> int:
    """Measure all contestants and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=int, default=100, help="number of maps (default 100)")
    parser.add_argument("--size", type=int, default=256, help="height and width of a map (default 256)")
    parser.add_argument("--defects", type=int, default=60, help="parts with one defect (default 60)")
    parser.add_argument("--seed", type=int, default=0, help="of the synthetic maps (default 0)")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs, of which the median counts (default 5)")
    parser.add_argument("--threads", type=int, default=1, help="OpenMP threads of every contestant (default 1)")
    parser.add_argument("--only", choices=list(CONTESTANTS), help="measure one in this process and print it as JSON")
    options = parser.parse_args(arguments)
    if not (0 < options.defects <= options.parts and options.size > 30 and options.repeats > 0):
        parser.error("need 0 < --defects <= --parts, --size > 30 and --repeats > 0")
    if options.only:
        print(json.dumps(measure(options.only, options)))
        return 0
    print(
        f"{options.parts} maps {options.size}x{options.size}, {options.defects} defects, {options.threads} thread(s)\n"
    )
    print(f"| exact AUPRO@{LIMIT:g} | value | wall s | CPU s | peak extra MiB |\n|---|---|---|---|---|")
    failed = False
    for name in CONTESTANTS:
        if name == "anomalib" and not has_anomalib():
            print("\nanomalib not installed")
            continue
        result = measure_apart(name, arguments, options.threads)
        if isinstance(result, str):
            failed = True
            print(f"| {name} | failed: {result} | | | |")
        else:
            print("| {} | {value:.6f} | {wall:.3f} | {cpu:.3f} | {extra:.0f} |".format(name, **result))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
