"""What a user says about a folder of parts: name patterns or a CSV, units, camera, and what folder names mean.

It comes from ``polyspect.yaml`` (or ``.yml``, ``.json``) in the root, from another file, or from a dict, and every key
is checked. Role names at its top level are taken as patterns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DataError, PolyspectError, nearest_names
from ..samples import MODALITIES
from .camera import Intrinsics
from .opening import read_mapping
from .source import SPLITS
from .views import NOT_VIEWS, ReadOptions, sentinels

DEFAULT_FILES = ("polyspect.yaml", "polyspect.yml", "polyspect.json")
DEFAULT_CAMERAS = ("intrinsics.yaml", "intrinsics.yml", "intrinsics.json")
SETTINGS = (
    "patterns", "csv", "category", "splits", "good", "unlabelled", "extra", "unit", "invalid", "intrinsics",
    "cloud_size", "flip_normals",
)  # fmt: skip
ROLES = (*MODALITIES, *NOT_VIEWS)


@dataclass(frozen=True, kw_only=True)
class FolderMapping:
    """A checked mapping.

    Attributes:
        patterns: Role -> name pattern relative to the root, e.g. ``"{split}/{label}/{id}_color.png"``.
        csv: Table of the parts, in place of patterns.
        category: Name of the only category; None: the root's name.
        splits: Name of a folder (or a CSV's split cell) -> split; None: leave that folder out.
        good: Labels that mean good; any other label is a defect type.
        unlabelled: Labels that mean "not known".
        extra: Further views (thermal, polarisation, ...), read like pictures.
        options: Unit, sentinels, camera.
    """

    patterns: Mapping[str, str] = field(default_factory=dict)
    csv: Path | None = None
    category: str | None = None
    splits: Mapping[str, str | None]
    good: tuple[str, ...] = ("good", "ok", "normal")
    unlabelled: tuple[str, ...] = ("new", "unknown", "unlabelled")
    extra: tuple[str, ...] = ()
    options: ReadOptions

    def roles(self) -> tuple[str, ...]:
        """Roles that a folder or CSV column may be named after."""
        return (*ROLES, *self.extra)

    def label(self, name: str | None, split: str) -> tuple[int | None, str | None]:
        """(label, defect type) of a label as written; without one, parts to learn from are good."""
        if not name:
            return (None, None) if split == "test" else (0, "good")
        if name.lower() in self.good:
            return 0, "good"
        return (None, None) if name.lower() in self.unlabelled else (1, name)

    def split(self, name: str, where: str | Path) -> str | None:
        """The split that a name stands for; None if it is to be left out.

        Raises:
            DataError: the name stands for nothing.
        """
        if name not in self.splits:
            raise DataError(
                f"{where}: '{name}' is no split: {nearest_names(name, self.splits)}; rename it, or map it under "
                f"`splits` (`{name}: train`, or `{name}: null` to leave it out)"
            )
        return self.splits[name]


def load_mapping(
    root: Path, mapping: Mapping[str, Any] | str | Path | None, overrides: Mapping[str, Any]
) -> FolderMapping:
    """Read and check the mapping of a folder.

    Args:
        root: The data set; files named in the mapping are relative to it.
        mapping: Its content, a YAML, JSON or CSV file, or None for the default file if there is one.
        overrides: Settings that replace those of the mapping, where they are not None.

    Raises:
        DataError: names the file and the key.
    """
    where = "mapping"
    if mapping is None:
        mapping = next((root / name for name in DEFAULT_FILES if (root / name).is_file()), {})
    if isinstance(mapping, str | Path):
        path, where = Path(mapping), str(mapping)
        content: dict[str, Any] = {"csv": str(path.absolute())}
        if path.suffix.lower() != ".csv":
            content = read_mapping(path, "mapping of a folder")
    else:
        content = dict(mapping)
    content = _gather_patterns(content, where)
    content |= {key: value for key, value in overrides.items() if value is not None}
    try:
        return _build(root, content)
    except (PolyspectError, TypeError, ValueError) as error:
        raise DataError(f"{where}: {error}") from error


def inside(root: Path, relative: str, where: str) -> Path:
    """`root` / `relative`, which must not leave the root.

    Raises:
        DataError: absolute, or with enough ``..`` to leave.
    """
    path = Path(relative)
    depth = 0
    for piece in path.parts:
        depth += -1 if piece == ".." else 1
        if depth < 0:
            break
    if path.is_absolute() or depth < 0:
        raise DataError(
            f"{where}: '{relative}' leads out of {root}; paths here are relative to it: move the data inside"
        )
    return root / path


def _gather_patterns(content: dict[str, Any], where: str) -> dict[str, Any]:
    """Move role patterns written at the top level into ``patterns``; anything else unknown is an error."""
    patterns = dict(content.get("patterns") or {})
    for key in [key for key in content if key not in SETTINGS]:
        value = content.pop(key)
        if not (isinstance(value, str) and "{id}" in value):
            raise DataError(
                f"{where}: '{key}' is neither a setting nor a role with a pattern holding {{id}}: "
                f"{nearest_names(key, {*SETTINGS, *ROLES})}"
            )
        patterns[key] = value
    return {**content, "patterns": patterns}


def _build(root: Path, content: Mapping[str, Any]) -> FolderMapping:
    unknown = [key for key in content if key not in SETTINGS]
    if unknown:
        raise ConfigError(f"unknown setting '{unknown[0]}': {nearest_names(unknown[0], SETTINGS)}")
    splits: dict[str, str | None] = {"train": "train", "validation": "validation", "val": "validation", "test": "test"}
    for name, split in (content.get("splits") or {}).items():
        if split is not None and split not in SPLITS:
            raise ConfigError(
                f"splits: '{name}' stands for '{split}', which is no split: {nearest_names(split, SPLITS)}"
            )
        splits[str(name)] = split
    csv, size = content.get("csv"), content.get("cloud_size")
    csv_path = None if csv is None else Path(csv) if Path(csv).is_absolute() else inside(root, str(csv), "csv")
    options = ReadOptions(
        unit=content.get("unit", "m"),
        invalid=sentinels(content.get("invalid")),
        intrinsics=_camera(root, content.get("intrinsics")),
        cloud_size=None if size is None else (int(size[0]), int(size[1])),
        flip_normals=bool(content.get("flip_normals", False)),
    )
    names = {
        key: tuple(str(v).lower() for v in _listed(content[key])) for key in ("good", "unlabelled") if key in content
    }
    if not all(names.values()):
        raise ConfigError("`good` and `unlabelled` need at least one label each")
    return FolderMapping(
        patterns={str(role): str(pattern) for role, pattern in (content.get("patterns") or {}).items()},
        csv=csv_path,
        category=content.get("category"),
        splits=splits,
        extra=tuple(str(name) for name in _listed(content.get("extra"))),
        options=options,
        **names,
    )


def _camera(root: Path, given: Any) -> Intrinsics | None:
    """Intrinsics given in place, as a file inside the root, or found there under the default name."""
    if given is None:
        path = next((root / name for name in DEFAULT_CAMERAS if (root / name).is_file()), None)
        return None if path is None else Intrinsics.load(path)
    if isinstance(given, Intrinsics):
        return given
    if isinstance(given, Mapping):
        return Intrinsics.from_mapping(given)
    path = Path(given)
    return Intrinsics.load(path if path.is_absolute() else inside(root, str(path), "intrinsics"))


def _listed(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]
