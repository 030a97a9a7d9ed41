"""How the image score should be taken from a map: its maximum, or the mean of its largest share.

    python benchmarks/image_score.py --root parts --categories bracket gear biscuit

Fits PatchCore with its defaults on each category, then prints the image AUROC of the fused map for several shares; 0 is
the maximum.
"""

from __future__ import annotations

import argparse

import numpy as np

import polyspect as ps
from polyspect.fitting.progress import TerminalProgress
from polyspect.metrics import auroc

SHARES = (0.0, 0.001, 0.005, 0.01, 0.02, 0.05)


def main() -> None:
    """Fit, predict, print one row per category."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="mvtec3d")
    parser.add_argument("--root", required=True)
    parser.add_argument("--categories", nargs="+", required=True)
    parser.add_argument("--detector", default="patchcore")
    parser.add_argument("--preset")
    parser.add_argument("--cache", default="out/cache")
    a = parser.parse_args()
    print("| category | " + " | ".join("maximum" if share == 0 else f"{share:g}" for share in SHARES) + " |")
    print("| --- " * (len(SHARES) + 1) + "|")
    for category in a.categories:
        where = {"data": a.data, "root": a.root, "category": category}
        model = ps.fit(a.detector, preset=a.preset, cache=a.cache, progress=TerminalProgress(), **where)
        labels, values = [], []
        for part in ps.predict(model, **where):
            pixels = np.sort(part.map.ravel())[::-1]
            values.append([pixels[: max(1, int(share * pixels.size))].mean() for share in SHARES])
            labels.append(part.sample.label)
        columns = np.array(values).T
        print(f"| {category} | " + " | ".join(f"{auroc(column, labels):.3f}" for column in columns) + " |", flush=True)


if __name__ == "__main__":
    main()
