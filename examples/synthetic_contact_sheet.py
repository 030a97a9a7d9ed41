"""Draw the contact sheet of docs/synthetic.md: every category, good and with one defect of each group.

    python examples/synthetic_contact_sheet.py docs/figures/synthetic.jpg

Rows are the ten categories. Each group of four tiles is one part: the photograph, the height above the table, the
normals and the ground truth; black where the 3D sensor saw nothing. Groups: good, rgb defect, 3d defect, both.
"""

from __future__ import annotations

import sys
from pathlib import Path

import cv2
import numpy as np

from polyspect.data.synthetic import CATEGORIES, DEFECTS, make_part
from polyspect.samples import Array, Sample

TILE = 128  # pixels
SHOWN = {  # one kind of each group; together all eleven
    "bracket": ("misprint", "bend", "scratch"),
    "washer": ("discolouration", "dent", "crack"),
    "gear": ("stain", "missing_material", "contamination"),
    "bottle_cap": ("misprint", "bump", "hole"),
    "biscuit": ("discolouration", "missing_material", "crack"),
    "bun": ("discolouration", "dent", "contamination"),
    "tuber": ("discolouration", "bump", "hole"),
    "cord": ("stain", "missing_material", "contamination"),
    "foam_block": ("misprint", "dent", "hole"),
    "gasket": ("stain", "bend", "crack"),
}


def tiles(sample: Sample) -> Array:
    """Photograph, height over the table, normals and mask side by side, (TILE, 4 TILE, 3) uint8 RGB."""
    a, b, c, d = sample.meta["table_plane"]
    height = sample.images["xyz"] @ np.array([a, b, c]) + d  # metres
    top = np.quantile(height[sample.valid], 0.995)
    shade = np.clip(255 * (0.12 + 0.85 * height / top), 0, 255).astype(np.uint8)
    depth = cv2.cvtColor(cv2.applyColorMap(shade, cv2.COLORMAP_VIRIDIS), cv2.COLOR_BGR2RGB)
    normals = ((sample.images["normals"] * [1, -1, -1] + 1) * 127.5).astype(np.uint8)  # y up, z towards the viewer
    for view in (depth, normals):
        view[~sample.valid] = 0
    assert sample.mask is not None
    mask = np.repeat(255 * sample.mask[..., None].astype(np.uint8), 3, axis=2)
    views = (sample.images["rgb"], depth, normals, mask)
    return np.hstack([cv2.resize(view, (TILE, TILE), interpolation=cv2.INTER_AREA) for view in views])


def contact_sheet(seed: int, severity: float) -> Array:
    """The whole sheet, RGB uint8."""
    rows = []
    for category in CATEGORIES:
        parts = [make_part(category, seed)]
        parts += [make_part(category, seed + k, kind, severity=severity) for k, kind in enumerate(SHOWN[category], 1)]
        groups = [np.pad(tiles(part), ((1, 1), (1, 5), (0, 0)), constant_values=255) for part in parts]
        label = np.full((TILE + 2, 18, 3), 255, np.uint8)
        turned = np.ascontiguousarray(np.rot90(label, -1))
        cv2.putText(turned, category, (4, 13), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (20, 20, 20), 1, cv2.LINE_AA)
        rows.append(np.hstack([np.rot90(turned), *groups]))
        kinds = ["good", *(f"{kind} ({DEFECTS[kind]})" for kind in SHOWN[category])]
        line = np.full((16, rows[-1].shape[1], 3), 255, np.uint8)
        for k, text in enumerate(kinds):
            at = (22 + k * groups[0].shape[1], 12)
            cv2.putText(line, text, at, cv2.FONT_HERSHEY_SIMPLEX, 0.4, (20, 20, 20), 1, cv2.LINE_AA)
        rows.insert(-1, line)
    return np.vstack(rows)


def main() -> None:
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "synthetic.jpg")
    sheet = contact_sheet(seed=27, severity=0.75)
    target.parent.mkdir(parents=True, exist_ok=True)
    done, coded = cv2.imencode(target.suffix, cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 78])
    if not done:
        raise SystemExit(f"cannot write a '{target.suffix}' file: name a .jpg or .png")
    target.write_bytes(coded.tobytes())
    print(f"{target}: {sheet.shape[1]} x {sheet.shape[0]} pixels, {target.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()
