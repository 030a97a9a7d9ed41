"""Draw some parts of a results folder as one picture, with the report's own colours: the figure of the README.

    python examples/report_strip.py demo/report-bracket docs/figures/demo.jpg stain dent hole

Each word picks the best caught part whose id holds it.
"""

from __future__ import annotations

import base64
import io
import sys
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from polyspect.evaluation.results import read_part, read_results
from polyspect.report.pictures import columns_of, depth_span, map_scales, part_pictures


def main(folder: str, out: str, words: list[str]) -> None:
    """Pick the parts, decode the report's pictures, lay them out."""
    source, results = Path(folder), read_results(folder)
    chosen = [max((p for p in results.parts if word in p.id), key=lambda part: part.score) for word in words]
    arrays = {part.index: read_part(source, part.index) for part in chosen}
    columns = columns_of(arrays.values())
    scales = map_scales(source, results, [name for name in columns if name == "map" or name.startswith("branch.")])
    span = depth_span(arrays.values())
    figure = Figure(figsize=(2.1 * len(columns), 2.25 * len(chosen)), dpi=110)
    axes = figure.subplots(len(chosen), len(columns), squeeze=False)
    for row, part in zip(axes, chosen):
        pictures = part_pictures(part, arrays[part.index], scales, span, columns)
        for axis, picture in zip(row, pictures):
            axis.set_axis_off()
            if picture.uri is not None:
                axis.imshow(Image.open(io.BytesIO(base64.b64decode(picture.uri.partition(",")[2]))))
            axis.set_title(picture.title, fontsize=9)
        row[0].text(-0.05, 0.5, part.defect, rotation=90, va="center", ha="right", transform=row[0].transAxes)
    figure.tight_layout(pad=0.4)
    figure.savefig(out)


if __name__ == "__main__":
    if len(sys.argv) < 4:
        raise SystemExit(__doc__)
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
