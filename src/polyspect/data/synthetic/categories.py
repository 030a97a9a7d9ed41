"""The ten categories of synthetic parts: what each is, how it lies before the camera, which defects it can have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from . import shapes
from .canvas import Canvas, Colour, Streams, Surface, linear


@dataclass(frozen=True, kw_only=True)
class CategorySpec:
    """What is fixed for a category.

    Attributes:
        kind: ``"rigid"``, ``"natural"`` (grown or baked: every part differs) or ``"deformable"``.
        description: One line for people.
        build: Draws a good part.
        field_mm: Width of the table that the camera sees.
        extent_mm: Side of the canvas; the part fits inside with room for its lean.
        defects: Defect kinds that its parts can have.
        turn_deg: Parts lie within +- this angle of upright.
        table: Linear albedo of the table under it.
        discolour: Linear albedo towards which it discolours (heat, mould, fading).
        hole_mm: How deep a hole goes at most; more than the part is high: through.
        relief: Scale of the depths and heights of its defects; larger for coarse surfaces.
    """

    kind: str
    description: str
    build: Callable[[Canvas, Streams], Surface]
    field_mm: float
    extent_mm: float
    defects: tuple[str, ...]
    turn_deg: float
    table: Colour
    discolour: Colour
    hole_mm: float = 99.0
    relief: float = 1.0


_MAT, _STEEL, _BOARD, _BELT = linear(62, 66, 70), linear(118, 122, 126), linear(88, 78, 70), linear(52, 72, 66)
_PALE = linear(168, 166, 160)

CATEGORIES: dict[str, CategorySpec] = {
    "bracket": CategorySpec(
        kind="rigid",
        description="milled steel angle with holes, ribs, a flange and a printed lot number",
        build=shapes.bracket,
        field_mm=104,
        extent_mm=88,
        defects=("discolouration", "misprint", "stain", "bend", "dent", "contamination", "hole", "scratch"),
        turn_deg=14,
        table=_MAT,
        discolour=linear(150, 112, 62),
    ),
    "washer": CategorySpec(
        kind="rigid",
        description="turned and zinc-plated ring with chamfers",
        build=shapes.washer,
        field_mm=96,
        extent_mm=82,
        defects=("discolouration", "stain", "dent", "missing_material", "crack", "scratch"),
        turn_deg=180,
        table=_BELT,
        discolour=linear(92, 98, 136),
        relief=0.8,
    ),
    "gear": CategorySpec(
        kind="rigid",
        description="moulded nylon spur gear of 24 teeth with web, hub and keyway",
        build=shapes.gear,
        field_mm=100,
        extent_mm=86,
        defects=("discolouration", "stain", "dent", "missing_material", "contamination", "crack"),
        turn_deg=180,
        table=_MAT,
        discolour=linear(176, 142, 88),
    ),
    "bottle_cap": CategorySpec(
        kind="rigid",
        description="red moulded screw cap with a knurled skirt and a printed rosette, ring and lot",
        build=shapes.bottle_cap,
        field_mm=94,
        extent_mm=80,
        defects=("discolouration", "misprint", "stain", "bump", "dent", "hole", "scratch"),
        turn_deg=25,
        table=_STEEL,
        discolour=linear(206, 120, 104),
    ),
    "biscuit": CategorySpec(
        kind="natural",
        description="round baked biscuit with a scalloped rim and docking holes",
        build=shapes.biscuit,
        field_mm=94,
        extent_mm=84,
        defects=("discolouration", "stain", "bump", "missing_material", "contamination", "crack", "hole"),
        turn_deg=180,
        table=_STEEL,
        discolour=linear(74, 42, 24),
        relief=1.3,
    ),
    "bun": CategorySpec(
        kind="natural",
        description="domed bread bun with sesame",
        build=shapes.bun,
        field_mm=112,
        extent_mm=96,
        defects=("discolouration", "stain", "bump", "dent", "contamination", "crack"),
        turn_deg=180,
        table=_BOARD,
        discolour=linear(118, 132, 106),
        relief=1.8,
    ),
    "tuber": CategorySpec(
        kind="natural",
        description="potato-like tuber with eyes, netted skin and traces of soil",
        build=shapes.tuber,
        field_mm=122,
        extent_mm=110,
        defects=("discolouration", "stain", "bump", "dent", "contamination", "crack", "hole"),
        turn_deg=30,
        table=_BELT,
        discolour=linear(96, 118, 58),
        hole_mm=7,
        relief=1.8,
    ),
    "cord": CategorySpec(
        kind="deformable",
        description="piece of laid three-strand cord with taped ends, in a loose curve",
        build=shapes.cord,
        field_mm=108,
        extent_mm=96,
        defects=("discolouration", "stain", "bump", "missing_material", "contamination", "crack"),
        turn_deg=14,
        table=_BOARD,
        discolour=linear(120, 126, 96),
        relief=1.5,
    ),
    "foam_block": CategorySpec(
        kind="deformable",
        description="soft open-pored foam block with a stamped lot number",
        build=shapes.foam_block,
        field_mm=108,
        extent_mm=92,
        defects=("discolouration", "misprint", "stain", "dent", "missing_material", "contamination", "crack", "hole"),
        turn_deg=12,
        table=_MAT,
        discolour=linear(176, 134, 62),
        hole_mm=10,
        relief=1.8,
    ),
    "gasket": CategorySpec(
        kind="deformable",
        description="moulded black rubber seal with a bead and two bolt lugs",
        build=shapes.gasket,
        field_mm=116,
        extent_mm=102,
        defects=("discolouration", "stain", "bend", "bump", "missing_material", "contamination", "crack"),
        turn_deg=14,
        table=_PALE,
        discolour=linear(128, 122, 108),
        relief=0.9,
    ),
}
"""Category name -> what it is. The names are those of no public data set, so that no table can mix them up."""
