"""Parts in a user's own folders: patterns, a CSV table, or a sensible default layout.

    ROOT/{train,validation,test}/LABEL/{rgb,xyz,depth,normals,mask}/ID.*        role-named folders, or
    ROOT/{train,validation,test}/LABEL/ID_{rgb,xyz,depth,normals,mask}.*        flat files

``docs/data_formats.md`` has every option. `files_sample` and `guess_roles` read loose files without any layout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import DataError, nearest_names
from ..samples import Sample
from .camera import Intrinsics
from .discovery import csv_records, expected_file, layout_records, pattern_records
from .listing import check_partners, unique_ids
from .mapping import load_mapping
from .source import SPLITS, Record, check_root, check_split
from .views import files_sample as files_sample  # re-exported beside the reader of folders
from .views import guess_roles as guess_roles
from .views import read_record


class Folder:
    """Reader of a user's own folders.

    The folder is listed once, at the first question; make a new reader to see files that came later.

    Args:
        root: The folder.
        mapping: Role -> name pattern (``{"rgb": "{split}/{label}/{id}_color.png", ...}``), a mapping with the settings
            of `FolderMapping`, or a YAML, JSON or CSV file. By default ``polyspect.yaml`` in the root, or else the
            default layout.
        unit: ``"m"`` or ``"mm"``; this and the following replace the mapping's own settings.
        invalid: Values that mean "not measured".
        intrinsics: The camera of the depth maps: a file, a mapping or `Intrinsics`.
        cloud_size: (width, height) of clouds that do not state it.
        category: Name of the only category.

    Raises:
        DataError: `root` is not a folder, or the mapping is wrong (names the file and the key).
    """

    name = "folder"

    def __init__(
        self,
        root: str | Path,
        mapping: Mapping[str, Any] | str | Path | None = None,
        unit: str | None = None,
        invalid: float | Sequence[float] | None = None,
        intrinsics: Intrinsics | Mapping[str, Any] | str | Path | None = None,
        cloud_size: Sequence[int] | None = None,
        category: str | None = None,
    ) -> None:
        self.root = check_root(root)
        overrides = {
            "unit": unit,
            "invalid": invalid,
            "intrinsics": intrinsics,
            "cloud_size": cloud_size,
            "category": category,
        }
        self.mapping = load_mapping(self.root, mapping, overrides)

    def categories(self) -> list[str]:
        """All categories, sorted: the field or column ``category``, the folders above the splits, or the root's name.

        Raises:
            DataError: the folder holds no parts.
        """
        return sorted({record.category for record in self._records})

    def has_split(self, category: str, split: str) -> bool:
        """Whether the split has parts."""
        check_split(split)
        return any(record.split == split for record in self._of(category))

    def records(self, category: str, split: str, broken: dict[str, str] | None = None) -> list[Record]:
        """All parts of one split, sorted by id.

        Raises:
            DataError: unknown category; missing split; a part without one of its files; a part to learn from that is
                not good; masks for some anomalous parts but not for all.
        """
        check_split(split)
        records = [record for record in self._of(category) if record.split == split]
        if not records:
            there = sorted({record.split for record in self._of(category)}, key=SPLITS.index)
            expected = self.mapping.csv or self.root / split
            raise DataError(
                f"{expected}: '{category}' has no parts of the split '{split}'; it has {', '.join(there)}: add parts, "
                "or use a split that is there"
            )
        records = check_partners(records, self._place, broken)
        for record in records:
            self._check_label(record)
        self._check_masks(records)
        return unique_ids(records)

    def read(self, record: Record) -> Sample:
        """Open the files of one part.

        Raises:
            DataError: names the file, what was found, what was expected and the remedy.
        """
        return read_record(record, self.mapping.options)

    @cached_property
    def _records(self) -> list[Record]:
        find = csv_records if self.mapping.csv else pattern_records if self.mapping.patterns else layout_records
        return find(self.root, self.mapping)

    def _of(self, category: str) -> list[Record]:
        if category not in self.categories():
            raise DataError(f"{self.root}: has no category '{category}': {nearest_names(category, self.categories())}")
        return [record for record in self._records if record.category == category]

    def _place(self, record: Record, role: str) -> str:
        if self.mapping.csv:
            return f"{self.mapping.csv}, column '{role}', row of '{record.id.rpartition('/')[2]}'"
        if self.mapping.patterns:
            return str(expected_file(self.root, self.mapping.patterns, record, role))
        view, id = next(iter(record.files.values())), record.id.rpartition("/")[2]
        if view.stem == id and view.parent.name in self.mapping.roles():
            return str(view.parent.parent / role / f"{id}.*")
        return str(view.parent / f"{id}_{role}.*")

    def _check_label(self, record: Record) -> None:
        if record.split != "test" and record.label != 0:
            view = next(iter(record.files.values()))
            raise DataError(
                f"{view}: labelled '{record.defect}' but in '{record.split}', which must hold good parts only; move it "
                f"to 'test', or add its label to `good` ({', '.join(self.mapping.good)})"
            )

    def _check_masks(self, records: Sequence[Record]) -> None:
        """Ground truth for all anomalous parts of a split or for none; all, if the mapping names masks."""
        anomalous = [record for record in records if record.label == 1]
        named = "mask" in self.mapping.patterns or any("mask" in record.files for record in anomalous)
        for record in anomalous:
            if named and "mask" not in record.files:
                view = next(iter(record.files.values()))
                raise DataError(
                    f"{view}: anomalous, but its mask is missing: expected {self._place(record, 'mask')}; add it, or "
                    "leave out the masks of all parts"
                )
