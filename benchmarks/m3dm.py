"""What M3DM takes per part beside its two networks: ``python benchmarks/m3dm.py --rows 4000 --set mask_invalid=true``.

Untrained networks of a preset, one artificial part, banks of `--rows` rows drawn near the part's own patches. All steps
are timed in turn, several times, in one run; the median of process time counts, as other work may share the machine.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import yaml

from polyspect.detectors.contract import configure
from polyspect.detectors.m3dm import M3DM
from polyspect.samples import Batch


def part(size: int) -> Batch:
    """A bump under a stripe pattern, measured on a disc of 45 % of the image."""
    y, x = torch.meshgrid(*(torch.linspace(-0.5, 0.5, size),) * 2, indexing="ij")
    disc = x**2 + y**2 < 0.45 / torch.pi
    z = 0.5 - 0.05 * (0.4**2 - x**2 - y**2).clamp(min=0).sqrt() + 0.002 * torch.sin(40 * x) * torch.cos(30 * y)
    xyz = torch.stack([0.1 * x, 0.1 * y, z])[None] * disc
    rgb = (0.5 + 0.3 * torch.sin(60 * x) * torch.cos(45 * y)).expand(1, 3, size, size).contiguous()
    return Batch(["part"], {"rgb": rgb, "xyz": xyz}, disc[None], disc[None])


def fill(detector: M3DM, batch: Batch, rows: int) -> None:
    """Banks of `rows` rows near the part's patches; decision layers of equal weights."""
    generator = torch.Generator().manual_seed(0)
    patches = detector.patches(detector.extract(batch))
    for name, bank in detector.named_banks():
        values = patches[name].values[patches[name].counts]
        spread = float(values.std())
        drawn = values[torch.randint(len(values), (rows,), generator=generator)]
        bank.vectors = drawn / spread + 0.3 * torch.randn(drawn.shape, generator=generator)
        bank.feature_std.fill_(spread)
    for layer in detector.decisions.values():
        layer.weight.fill_(1)  # type: ignore[operator,union-attr]
        layer.counts.fill_(1)  # type: ignore[operator,union-attr]
    detector.fitted.fill_(True)


def main() -> None:
    """Print milliseconds of process and wall time per step, and the ratio to the two networks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="paper")
    parser.add_argument("--rows", type=int, default=4000, help="rows per bank")
    parser.add_argument("--size", type=int, default=224, help="pixels per side")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--set", nargs="*", default=[], help="settings, field=value")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    chosen = {key: yaml.safe_load(value) for key, value in (item.split("=", 1) for item in options.set)}
    config = configure(M3DM, {"weights": "random", "point_weights": "random", **chosen}, options.preset)
    detector, batch = M3DM(config).eval(), part(options.size)
    rgb, xyz = detector.extractor.rgb, detector.extractor.xyz
    if rgb is None or xyz is None:
        raise SystemExit("give banks that need both networks")
    size = (options.size, options.size)
    with torch.inference_mode():
        fill(detector, batch, options.rows)
        features = detector.extract(batch)
        patches = detector.patches(features)
        steps: dict[str, Callable[[], object]] = {
            "image network": lambda: rgb(batch.images["rgb"]),
            "point network": lambda: xyz(batch),
            "patches": lambda: detector.patches(features),
            "banks and maps": lambda: detector.judge(patches, size),
            "the whole part": lambda: detector(batch),
        }
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
        for _ in range(options.repeat):
            for name, step in steps.items():
                start = time.process_time(), time.perf_counter()
                step()
                times[name].append((time.process_time() - start[0], time.perf_counter() - start[1]))
    cpu = {name: statistics.median(t for t, _ in found) for name, found in times.items()}
    wall = {name: statistics.median(t for _, t in found) for name, found in times.items()}
    for name in steps:
        print(f"{name:16} {1e3 * cpu[name]:8.0f} ms process {1e3 * wall[name]:8.0f} ms wall")
    networks = cpu["image network"] + cpu["point network"]
    print(f"part / networks  {cpu['the whole part'] / networks:.2f} ({options.rows} rows per bank)")


if __name__ == "__main__":
    main()
