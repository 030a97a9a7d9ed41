"""Synthetic parts: ten categories with RGB, organised points, normals and defects of known kind, place and size.

For tests, tutorials and benchmarks that must run without any real data. A part is a pure function of its category, a
seed and its settings; the parts of a data set get their seeds from (seed, category, split, defect, index), so any of
them can be made alone, in any order, with the same bytes.

    make_part("gear", seed=7, defect="dent")        one part as a Sample
    write_dataset("parts/", seed=0)                 a data set in the folder layout of MVTec 3D-AD

What is simulated, and what is not, is in docs/synthetic.md. Nothing here stands for the data sets of the literature.
"""

from .categories import CATEGORIES, CategorySpec
from .defects import DEFECTS
from .part import Part, make_part, part_seed, render_part
from .writer import write_dataset

__all__ = [
    "CATEGORIES",
    "DEFECTS",
    "CategorySpec",
    "Part",
    "make_part",
    "part_seed",
    "render_part",
    "write_dataset",
]
