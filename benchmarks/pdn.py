"""What a distilled patch description network has learned, and whether it finds defects better than a random one.

    python benchmarks/pdn.py explained --images photos     # how much of its teacher it explains
    python benchmarks/pdn.py parts                         # defects in RGB on synthetic parts

`explained`: share of the variance of each channel of the targets on views of made-up pictures of another seed, and of
photographs, none of which it may have learned from.

`parts`: per category, parts are rendered and prepared (256 pixels). "bank" is the distance of a feature to the nearest
of a tenth of those of good parts. "student" is what EfficientAD and MDSS do, at its plainest: a network of the same
shape learns to answer as the teacher does on crops of good parts, mean squared error, and a defect is where it does
not. Background does not count. Defects are those that show in RGB; --seed decides all.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import fields

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from polyspect.backbones.patch_description import MARGIN, STRIDE, PatchDescription
from polyspect.backbones.pdn_weights import load_patch_description
from polyspect.data.image_folder import ImageFolder
from polyspect.data.made_up_images import MadeUpImages
from polyspect.data.preparation import PREPARATIONS, prepare
from polyspect.data.synthetic import CATEGORIES, DEFECTS, make_part
from polyspect.data.synthetic.part import part_seed
from polyspect.fitting.pdn_distillation import DistillationConfig, PatchTargets, explained, measure_targets
from polyspect.layers.memory import MemoryBank
from polyspect.metrics import evaluate_maps

METRICS = ("i_auroc", "p_auroc", "aupro@0.3")


class Part:
    """Picture, foreground of the feature grid and ground truth of one part."""

    def __init__(self, category: str, split: str, defect: str, index: int, seed: int) -> None:
        chosen = part_seed(seed, category, split, defect, index)
        sample = prepare(make_part(category, chosen, None if defect == "good" else defect), PREPARATIONS["cloud"])
        assert sample.foreground is not None
        self.rgb = torch.from_numpy(sample.images["rgb"]).permute(2, 0, 1)[None].contiguous()  # 1 3 H W
        seen = torch.from_numpy(sample.foreground)[None, None].float()
        inside = slice(MARGIN, -MARGIN)
        self.seen = F.max_pool2d(seen, STRIDE)[0, 0, inside, inside] > 0  # h w
        self.mask = np.zeros(sample.foreground.shape, bool) if sample.mask is None else sample.mask
        self.bad = defect != "good"


def judge(parts: list[Part], maps: list[Tensor]) -> dict[str, float | None]:
    """Metrics of maps (h, w) on the feature grid, one per part."""
    masked = [torch.where(part.seen, values, 0) for part, values in zip(parts, maps)]
    full = [F.pad(values, [MARGIN] * 4)[None, None] for values in masked]
    images = [F.interpolate(x, scale_factor=STRIDE, mode="bilinear", align_corners=False)[0, 0].numpy() for x in full]
    scores = [float(values.max()) for values in masked]
    return evaluate_maps(
        scores, [int(part.bad) for part in parts], images, [part.mask for part in parts], limits=(0.3,)
    )


@torch.no_grad()
def bank_maps(teacher: PatchDescription, train: list[Part], test: list[Part], seed: int) -> list[Tensor]:
    """Distance of every feature to a bank of good ones."""
    bank = MemoryBank("patches", ratio=0.1, seed=seed)
    for part in train:
        bank.add(teacher(part.rgb)[0].permute(1, 2, 0)[part.seen])
    bank.build()
    maps = []
    for part in test:
        values = torch.zeros(part.seen.shape)
        values[part.seen], _ = bank.distance(teacher(part.rgb)[0].permute(1, 2, 0)[part.seen])
        maps.append(values)
    return maps


def student_maps(teacher: PatchDescription, train: list[Part], test: list[Part], a: argparse.Namespace) -> list[Tensor]:
    """Squared difference of a student that learned from the good parts."""
    generator = torch.Generator().manual_seed(a.seed)
    with torch.no_grad():
        rows = torch.cat([teacher(part.rgb)[0].permute(1, 2, 0)[part.seen] for part in train])
    mean, std = rows.mean(0).view(1, -1, 1, 1), rows.std(0).view(1, -1, 1, 1)
    student = load_patch_description(weights="random", seed=a.seed + 1).network.train().requires_grad_(True)
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-3, weight_decay=1e-5)
    for step in range(a.steps):
        crops = []
        for _ in range(8):
            part = train[int(torch.randint(len(train), (), generator=generator))]
            y, x = (int(torch.randint(256 - 96 + 1, (), generator=generator)) for _ in "yx")
            crops.append(part.rgb[:, :, y : y + 96, x : x + 96])
        image = torch.cat(crops)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=a.bf16):
            target = (teacher(image).float() - mean) / std
        with torch.autocast("cpu", torch.bfloat16, enabled=a.bf16):
            answer = student(image)
        for entry in optimizer.param_groups:
            entry["lr"] = 1e-3 * min(1.0, (step + 1) / 20) * (0.1 if step > 0.8 * a.steps else 1.0)
        loss = F.mse_loss(answer.float(), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"  student of {a.steps} updates: last loss {float(loss.detach()):.3f}", flush=True)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=a.bf16):
        return [((teacher(x.rgb).float() - mean) / std - student(x.rgb).float()).square().mean(1)[0] for x in test]


def run_explained(a: argparse.Namespace) -> None:
    """Print one row per source."""
    loaded = load_patch_description(weights=a.weights[-1])
    settings = {k: v for k, v in loaded.made["settings"].items() if k in {f.name for f in fields(DistillationConfig)}}
    config = DistillationConfig(**settings | {"weights": "auto", "seed": a.seed + 1})
    # the statistics that the network learned with: same pictures, same seed
    learned = DistillationConfig(**settings | {"weights": "auto"})
    made_up = loaded.made["pictures"][-1]
    sources = [ImageFolder(folder) for folder in a.learned] + [
        MadeUpImages(made_up["count"], made_up["seed"], made_up["size"])
    ]
    if [source.about() for source in sources] != loaded.made["pictures"]:
        raise SystemExit(f"--learned must name the pictures that the network learned from: {loaded.made['pictures']}")
    targets = PatchTargets(learned)
    measure_targets(targets, sources, learned)
    network = loaded.network
    rows = {"made-up pictures, seed + 1": [MadeUpImages(100_000, a.seed + 1)]}
    rows |= {f"photographs in {folder}": [ImageFolder(folder)] for folder in a.images}
    levels = config.reductions
    print(
        f"{'pictures':<36} {'all':>7} " + " ".join(f"{f'level {r}':>9}" for r in levels) + "   quartiles over channels"
    )
    for name, source in rows.items():
        share = explained(network, targets, source, config, a.views)
        parts = " ".join(f"{float(level.mean()):9.3f}" for level in share.chunk(len(levels)))
        low, middle, high = torch.quantile(share, torch.tensor([0.25, 0.5, 0.75])).tolist()
        print(f"{name[-36:]:<36} {float(share.mean()):7.3f} {parts}   {low:.3f} {middle:.3f} {high:.3f}", flush=True)


def run_parts(a: argparse.Namespace) -> None:
    """Print one row per category, way and network, and the means."""
    networks = {weights: load_patch_description(a.name, weights=weights, seed=a.seed).network for weights in a.weights}
    rows: dict[str, list[list[float]]] = {}
    print(f"{'category':<12} {'network':<32} " + " ".join(f"{name:>10}" for name in METRICS) + "   seconds")
    for category in a.categories.split(","):
        kinds = [kind for kind in CATEGORIES[category].defects if DEFECTS[kind] != "3d"]
        train = [Part(category, "train", "good", i, a.seed) for i in range(a.train)]
        test = [Part(category, "test", "good", i, a.seed) for i in range(a.good)]
        test += [Part(category, "test", kinds[i % len(kinds)], i, a.seed) for i in range(a.bad)]
        for way in a.ways.split(","):
            for weights, network in networks.items():
                began, name = time.perf_counter(), f"{way}, {weights[-22:]}"
                if way == "bank":
                    maps = bank_maps(network, train, test, a.seed)
                else:
                    maps = student_maps(network, train, test, a)
                got = judge(test, maps)
                values = [float(got[metric] or 0) for metric in METRICS]
                rows.setdefault(name, []).append(values)
                shown = " ".join(f"{value:10.3f}" for value in values)
                print(f"{category:<12} {name:<32} {shown} {time.perf_counter() - began:9.1f}", flush=True)
    for name, table in rows.items():
        print(f"{'mean':<12} {name:<32} " + " ".join(f"{mean:10.3f}" for mean in np.mean(table, 0)))


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    sub = kinds.add_parser("explained")
    sub.add_argument("--images", nargs="*", default=[], help="folders of photographs that it did not learn from")
    sub.add_argument("--learned", nargs="*", default=[], help="folders that it did learn from, for the statistics")
    sub.add_argument("--views", type=int, default=256)
    sub.set_defaults(run=run_explained)
    parts = kinds.add_parser("parts")
    parts.add_argument("--categories", default="bracket,gear,foam_block")
    parts.add_argument("--train", type=int, default=16)
    parts.add_argument("--good", type=int, default=8)
    parts.add_argument("--bad", type=int, default=16)
    parts.add_argument("--name", default="pdn_small")
    parts.add_argument("--ways", default="bank,student")
    parts.add_argument("--steps", type=int, default=300, help="updates of the student")
    parts.add_argument("--bf16", action="store_true", help="student and its teacher use bfloat16 convolutions")
    parts.set_defaults(run=run_parts)
    for each in (sub, parts):
        each.add_argument("--weights", nargs="+", default=["random", "auto"], help="random, auto or files")
        each.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    a.run(a)


if __name__ == "__main__":
    main()
