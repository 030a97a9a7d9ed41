"""Time fitting and predicting of the distillation methods against the bare backbone and an uncached loop.

    python benchmarks/distillation.py                                # offline backbone, 256 pixels
    python benchmarks/distillation.py --backbone wide_resnet50_2.tv_in1k --weights random --parts 4 --batch 4 --epochs 2
    python benchmarks/distillation.py --device cuda --backbone wide_resnet50_2.tv_in1k --weights random --batch 16

Per method, in one process each, on synthetic parts written to a temporary folder:

* **fit**: seconds per epoch of the engine, features cached, and parts per second;
* **uncached**: an epoch of the loop as it is usually written: the teacher once per modality and step, NCHW layout, the
  parts held in memory as tensors; and the same reading and preparing the files each time, as research code does;
* **predict**: the fitted detector on batches of prepared parts, against the frozen backbone alone on the same images of
  all its modalities. The factor counts everything from tensors to smoothed maps and scores.

Times are medians; judge by the ratios, which come from one run. Memory is the peak resident set of the method's
process.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

METHODS: dict[str, list[str]] = {
    "reverse_distillation": ["rgb"],
    "forward_distillation": ["rgb"],
    "mmrd": ["rgb", "depth"],
    "crd": ["rgb", "depth"],
}


def measure(a: argparse.Namespace, name: str, folder: str) -> dict[str, float]:
    """All numbers of one method; runs in a process of its own."""
    import torch

    from polyspect.backbones.modalities import stack_modalities
    from polyspect.data.depth_scale import fit_depth_scale
    from polyspect.data.parts import Parts
    from polyspect.data.preparation import Preparation
    from polyspect.data.source import open_reader
    from polyspect.detectors import detector_class
    from polyspect.detectors.contract import Optimise, configure
    from polyspect.fitting.engine import Engine, EngineConfig
    from polyspect.fitting.memory import peak_rss_mib
    from polyspect.fitting.progress import Progress

    torch.set_num_threads(a.threads)
    kind = detector_class(name)
    settings = {"modalities": METHODS[name], "backbone": a.backbone, "weights": a.weights, "batch_size": a.batch}
    config = configure(kind, {**settings, "epochs": a.epochs}, "fast")
    reader = open_reader("mvtec3d", folder)
    parts = Parts(reader, reader.records("bracket", "train"), Preparation(size=a.size), modalities=config.modalities)
    parts.scale = fit_depth_scale(parts.samples())
    device = torch.device(a.device)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    class Clock(Progress):
        """Notes when each epoch of a training stage ended."""

        ends: list[float] = []

        @contextmanager
        def task(self, name: str, total: int) -> Iterator[Any]:
            def advance(n: int = 1, note: str = "") -> None:
                if name.startswith("student"):
                    wait()
                    self.ends.append(time.perf_counter())

            yield advance

    clock = Clock()
    engine = Engine(EngineConfig(device=a.device, precision=a.precision, compile=a.compile), progress=clock)
    detector = engine.fit(kind(config), {"train": parts, "validation": parts})
    epochs = [after - before for before, after in zip(clock.ends, clock.ends[1:])]
    epoch = statistics.median(epochs[1:] or epochs)
    batch = parts.batch(range(min(a.batch, len(parts)))).to(device)

    def median(call: Callable[[], object], repeats: int = a.repeats) -> float:
        times = []
        for _ in range(repeats + 1):
            started = time.perf_counter()
            call()
            wait()
            times.append(time.perf_counter() - started)
        return statistics.median(times[1:])

    backbone = plain_backbone(a)
    images = stack_modalities(batch, config.modalities)
    with torch.inference_mode():
        predict = median(lambda: detector(batch)) / len(batch)
        bare = median(lambda: backbone(images)) / len(batch)
    return {
        "epoch": epoch,
        "fit_rate": len(parts) / epoch,
        "uncached": uncached_epoch(a, kind(config).to(device), parts, read=False, wait=wait) / epoch,
        "reading": uncached_epoch(a, kind(config).to(device), parts, read=True, wait=wait) / epoch,
        "predict": 1e3 * predict,
        "bare": 1e3 * bare,
        "memory": peak_rss_mib(),
        "gpu": torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else 0.0,
        "steps": float(sum(isinstance(stage, Optimise) for stage in detector.stages())),
    }


def plain_backbone(a: argparse.Namespace) -> Any:
    """The frozen network by itself, with its own norms."""
    from polyspect.backbones.image import ImageBackbone

    return ImageBackbone(a.backbone, (4, 8, 16), a.weights).to(a.device)


def uncached_epoch(a: argparse.Namespace, detector: Any, parts: Any, *, read: bool, wait: Callable[[], None]) -> float:
    """Seconds of an epoch as usually written: teacher and student on every step, one modality after another."""
    import torch

    stage = next(stage for stage in detector.stages() if stage.name.startswith("student"))
    optimizer = torch.optim.Adam(list(stage.parameters()), lr=1e-3, betas=(0.5, 0.999))
    groups = [list(range(first, min(first + a.batch, len(parts)))) for first in range(0, len(parts), a.batch)]
    held = None if read else [parts.batch(group) for group in groups]
    plain = plain_backbone(a)
    module, times = sys.modules[type(detector).__module__], []
    usual, module.stages_of = module.stages_of, plain_stages  # type: ignore[attr-defined]
    detector.requires_grad_(True)
    detector.teacher.requires_grad_(False)
    for _ in range(2):
        started = time.perf_counter()
        detector.train()
        for index, group in enumerate(groups):
            batch = (parts.batch(group) if held is None else held[index]).to(a.device)
            with torch.no_grad():
                features = one_by_one(plain, detector.modalities, batch)
            loss = sum(stage.loss(features).values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        wait()
        times.append(time.perf_counter() - started)
    module.stages_of = usual  # type: ignore[attr-defined]
    return min(times)


def one_by_one(backbone: Any, names: Sequence[str], batch: Any) -> dict[str, Any]:
    """Features with one pass of a plain network per modality, in the ordinary layout."""
    from polyspect.backbones.modalities import modality_image, name_stages

    images = {name: ((modality_image(batch, name) - backbone.mean) / backbone.std).contiguous() for name in names}
    stages = {name: backbone.network(image) for name, image in images.items()}
    return {"valid": batch.valid, "foreground": batch.foreground, "image": images[names[0]]} | name_stages(stages)


def plain_stages(features: Any, name: str, count: int = 3) -> list[Any]:
    """Stands for `stages_of` in the uncached loop: the features in the layout in which they come."""
    return [features[f"{name}.{scale}"] for scale in range(1, count + 1)]


def work(task: tuple[argparse.Namespace, str, str]) -> dict[str, float]:
    """`measure` for a pool."""
    return measure(*task)


def main() -> None:
    """Parse, run every method in a fresh process, print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--backbone", default="efficientnet_lite0")
    parser.add_argument("--weights", default="auto", help="auto, random, or a file (speed does not depend on it)")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--parts", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    a = parser.parse_args()
    from polyspect.data.synthetic import write_dataset

    print(f"{a.backbone}, {a.size} px, batch {a.batch}, {a.parts} parts, {a.device}, {a.threads} threads", flush=True)
    heads = ["method", "views", "epoch s", "fit parts/s", "uncached / cached", "and reading", "predict ms/part"]
    heads += ["backbone ms", "factor", "RSS MiB", "GPU MiB"]
    print("| " + " | ".join(heads) + " |")
    print("| --- " * len(heads) + "|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(folder, ["bracket"], train=a.parts, validation=1, test_good=1, test_per_defect=0, seed=0)
        for name in a.methods:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                row = pool.apply(work, ((a, name, str(Path(folder))),))
            print(
                f"| {name} | {'+'.join(METHODS[name])} | {row['epoch']:.2f} | {row['fit_rate']:.1f} | "
                f"{row['uncached']:.2f}x | {row['reading']:.2f}x | {row['predict']:.1f} | {row['bare']:.1f} | "
                f"{row['predict'] / row['bare']:.2f}x | {row['memory']:.0f} | {row['gpu']:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
