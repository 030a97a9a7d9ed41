"""Do pre-trained point features find defects better than random ones? Points only, a memory bank, synthetic parts.

    python benchmarks/point_mae.py                                     # the table of docs/networks.md
    python benchmarks/point_mae.py --weights other.safetensors --layers 7 --categories gear

With `--weights fpfh` the features are FPFH histograms, what the network learned to tell of each group.

Per category: parts are rendered and prepared as for BTF (224 pixels, the table removed), brought to the unit frame,
grouped once, and seen through the same network with random and with trained weights. Group features are interpolated to
pixels and pooled to 56 x 56 patches; a tenth of the training patches is the memory bank; a patch's score is the
distance to the nearest of them, a part's the largest. Defects are those that show in the points; --seed decides all.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from polyspect.backbones.point_transformer import PointTransformer
from polyspect.backbones.point_weights import load_point_transformer
from polyspect.data.preparation import PREPARATIONS, prepare
from polyspect.data.synthetic import CATEGORIES, DEFECTS, make_part
from polyspect.data.synthetic.part import part_seed
from polyspect.fitting.pretraining import PretrainingConfig, shape_histograms
from polyspect.geometry.interpolation import LinearMap, groups_to_patches
from polyspect.geometry.neighbours import group, nearest_neighbours
from polyspect.geometry.sampling import farthest_points
from polyspect.geometry.unit import to_unit_frame
from polyspect.layers.memory import MemoryBank
from polyspect.metrics import evaluate_maps

GRID = (56, 56)
METRICS = ("i_auroc", "p_auroc", "aupro@0.3")


class Part:
    """The groups of one part and the way from their features to patches."""

    def __init__(self, category: str, split: str, defect: str, index: int, a: argparse.Namespace) -> None:
        seed = part_seed(a.seed, category, split, defect, index)
        sample = prepare(make_part(category, seed, None if defect == "good" else defect), PREPARATIONS["btf"])
        assert sample.foreground is not None
        seen = sample.valid & sample.foreground
        self.mask = np.zeros(seen.shape, bool) if sample.mask is None else sample.mask
        self.bad = defect != "good"
        points = to_unit_frame(torch.from_numpy(sample.images["xyz"][seen]).float()[None])
        pixels = torch.from_numpy(np.flatnonzero(seen))[None]
        self.centres = points[:, farthest_points(points, a.groups)[0]]
        self.rows = nearest_neighbours(self.centres, points, a.group_size).rows
        self.points = points
        self.patches: LinearMap = groups_to_patches(points, self.centres, pixels, seen.shape, GRID)
        self.measured = self.patches.apply(torch.ones(1, a.groups, 1))[0, :, 0] > 0.5  # h*w

    @torch.no_grad()
    def features(self, network: PointTransformer | None) -> Tensor:
        """(h*w, C); of FPFH, averaged over the groups, where there is no network."""
        if network is not None:
            h = network(group(self.points, self.centres, self.rows), self.centres)
        else:
            settings = PretrainingConfig()
            h = shape_histograms(self.points[0], settings.normal_radius, settings.shape_radius)[self.rows].mean(2)
        return self.patches.apply(h)[0]


def score(parts: dict[str, list[Part]], network: PointTransformer | None, seed: int) -> dict[str, float | None]:
    """Metrics of the test parts behind a memory bank of the training parts."""
    bank = MemoryBank("points", ratio=0.1, seed=seed)
    for part in parts["train"]:
        bank.add(part.features(network)[part.measured])
    bank.build()
    maps, scores = [], []
    for part in parts["test"]:
        flat = torch.zeros(GRID[0] * GRID[1])
        flat[part.measured], _ = bank.distance(part.features(network)[part.measured])
        scores.append(float(flat.max()))
        image = F.interpolate(flat.view(1, 1, *GRID), part.mask.shape, mode="bilinear", align_corners=False)
        maps.append(image[0, 0].numpy())
    masks = [part.mask for part in parts["test"]]
    return evaluate_maps(scores, [int(part.bad) for part in parts["test"]], maps, masks, limits=(0.3,))


def main() -> None:
    """Print one row per category and network, and the means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--categories", default="bracket,gear,biscuit,cord,foam_block")
    parser.add_argument("--train", type=int, default=16)
    parser.add_argument("--good", type=int, default=8)
    parser.add_argument("--bad", type=int, default=16)
    parser.add_argument("--groups", type=int, default=512)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--name", default="point_mae_small")
    parser.add_argument("--weights", nargs="+", default=["random", "auto"], help="random, auto, files, or fpfh: none")
    parser.add_argument("--layers", nargs="+", default=["default"], help="e.g. 2,5,7 7; all are tried")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    networks: dict[str, PointTransformer | None] = {"fpfh": None} if "fpfh" in a.weights else {}
    for layers in a.layers:
        blocks = None if layers == "default" else [int(block) for block in layers.split(",")]
        for weights in [weights for weights in a.weights if weights != "fpfh"]:
            loaded = load_point_transformer(a.name, layers=blocks, weights=weights, seed=a.seed)
            assert loaded.frame == "unit"
            networks[f"{weights} {layers}"] = loaded.network
    rows: dict[str, list[list[float]]] = {name: [] for name in networks}
    print(f"{'category':<12} {'network':<40} " + " ".join(f"{name:>10}" for name in METRICS) + "   seconds")
    for category in a.categories.split(","):
        kinds = [kind for kind in CATEGORIES[category].defects if DEFECTS[kind] != "rgb"]
        began = time.perf_counter()
        parts = {"train": [Part(category, "train", "good", i, a) for i in range(a.train)]}
        bad = [Part(category, "test", kinds[i % len(kinds)], i, a) for i in range(a.bad)]
        parts["test"] = [Part(category, "test", "good", i, a) for i in range(a.good)] + bad
        print(f"{category:<12} {'(parts made)':<73} {time.perf_counter() - began:9.1f}", flush=True)
        for name, network in networks.items():
            began = time.perf_counter()
            got = score(parts, network, a.seed)
            values = [float(got[metric] or 0) for metric in METRICS]
            rows[name].append(values)
            shown = " ".join(f"{value:10.4f}" for value in values)
            print(f"{category:<12} {name[-40:]:<40} {shown} {time.perf_counter() - began:9.1f}", flush=True)
    for name, values in rows.items():
        print(f"{'mean':<12} {name[-40:]:<40} " + " ".join(f"{mean:10.4f}" for mean in np.mean(values, 0)))


if __name__ == "__main__":
    main()
