"""Finding the parts of a user's folder in three ways: by name patterns, by a CSV table, by the default layout."""

from __future__ import annotations

import csv
import glob
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import DataError, nearest_names
from .files import CLOUD_SUFFIXES, IMAGE_SUFFIXES
from .listing import files_by_stem, subfolders, visible_files
from .mapping import DEFAULT_CAMERAS, FolderMapping, inside
from .opening import check_file, decoding
from .source import Record
from .views import NOT_VIEWS

_FIELD = re.compile(r"\{(\w*)\}")
_FIELDS = ("category", "split", "label", "defect", "id")
_COLUMNS = ("id", "category", "split", "label", "defect")
_ANOMALOUS = ("1", "anomalous", "bad", "ng", "defective")
_EXAMPLE = {"category": "part", "split": "train", "label": "good", "defect": "good", "id": "001"}


def make_record(mapping: FolderMapping, fields: Mapping[str, str | None], split: str, files: dict[str, Path]) -> Record:
    """A record from what a name, a row or a folder says of a part."""
    label, defect = mapping.label(fields.get("label"), split)
    category = str(fields["category"])
    meta: dict[str, Any] = {"metadata_file": files.pop("meta")} if "meta" in files else {}
    id = f"{category}/{split}/{defect or 'unlabelled'}/{fields['id']}"
    return Record(id, category, split, defect, label, files, meta)


# ---------------------------------------------------------------------------------------------------- name patterns


def pattern_records(root: Path, mapping: FolderMapping) -> list[Record]:
    """Parts found by the name patterns of their roles.

    Raises:
        DataError: a bad pattern, a pattern that matches nothing, a file that belongs to no part, an unknown split.
    """
    patterns = {role: _check_pattern(root, role, text) for role, text in mapping.patterns.items()}
    fields = {role: set(_FIELD.findall(text)) for role, text in patterns.items()}
    views = [role for role in patterns if role not in NOT_VIEWS]
    if not views:
        raise DataError(f"{root}: the patterns name no view; give at least 'rgb' or 'xyz'")
    full = max((fields[role] for role in views), key=len)
    parts: dict[tuple[str, ...], dict[str, str]] = {}
    matches = _best_matches(root, patterns)
    for role in views:
        if not matches[role]:
            example = root / _fill(patterns[role], _EXAMPLE)
            raise DataError(
                f"{root}: no file matches the pattern of '{role}', '{patterns[role]}'; looked for files such as "
                f"{example}: correct the pattern, or remove it"
            )
        if fields[role] == full:
            parts |= {tuple(found.values()): found for found in map(_sorted, matches[role].values())}
    records: list[Record] = []
    used: set[Path] = set()
    for found in parts.values():
        files = {role: root / _fill(text, found) for role, text in patterns.items()}
        files = {role: path for role, path in files.items() if path in matches[role]}
        used.update(files.values())
        split = mapping.split(found["split"], root) if "split" in found else "test"
        if split is not None:
            records.append(make_record(mapping, {"category": mapping.category or root.name} | found, split, files))
    for role, found_files in matches.items():
        orphan = next((path for path in found_files if path not in used), None)
        if orphan is not None:
            raise DataError(f"{orphan}: a '{role}' file without a part; add the part's '{views[0]}', or move it away")
    return records


def _sorted(found: dict[str, str]) -> dict[str, str]:
    return dict(sorted(found.items()))


def _check_pattern(root: Path, role: str, text: str) -> str:
    text = text.replace("\\", "/").replace("{defect}", "{label}")
    where = f"pattern of '{role}'"
    inside(root, text, where)
    for name in _FIELD.findall(text):
        if name not in _FIELDS:
            raise DataError(f"{where}: unknown field {{{name}}} in '{text}': {nearest_names(name, _FIELDS)}")
    if "{id}" not in text and role != "intrinsics":
        raise DataError(f"{where}: '{text}' lacks {{id}}, which tells parts apart")
    return text


def expected_file(root: Path, patterns: Mapping[str, str], record: Record, role: str) -> Path:
    """Where the file of a role should be, from the names of the files that the part does have."""
    wanted = _check_pattern(root, role, patterns[role])
    for known, path in record.files.items():
        match = _regex(_check_pattern(root, known, patterns[known])).fullmatch(path.relative_to(root).as_posix())
        if match and set(_FIELD.findall(wanted)) <= match.groupdict().keys():
            return root / _fill(wanted, match.groupdict())
    return root / wanted


def _best_matches(root: Path, patterns: Mapping[str, str]) -> dict[str, dict[Path, dict[str, str]]]:
    """Role -> its files. Of several patterns that fit a file, the one with most literal text has it: ``1_depth.png``
    goes to ``{id}_depth.png`` rather than to ``{id}.png``."""
    matches = {role: _matches(root, text) for role, text in patterns.items()}
    literal = {role: len(_FIELD.sub("", text)) for role, text in patterns.items()}
    for path in {path for found in matches.values() for path in found}:
        owners = [role for role in matches if path in matches[role]]
        for role in owners:
            if literal[role] < max(literal[owner] for owner in owners):
                del matches[role][path]
    return matches


def _matches(root: Path, pattern: str) -> dict[Path, dict[str, str]]:
    """File -> field values for every visible file that fits the pattern."""
    regex = _regex(pattern)
    wild = "*".join(glob.escape(piece) for piece in _FIELD.split(pattern)[::2])
    found = {}
    for path in sorted(root.glob(wild)):
        relative = path.relative_to(root).as_posix()
        match = regex.fullmatch(relative)
        if match and path.is_file() and not any(piece.startswith(".") for piece in relative.split("/")):
            found[path] = match.groupdict()
    return found


def _regex(pattern: str) -> re.Pattern[str]:
    """Every ``{field}`` matches within one level of folders, and the same text wherever it occurs again."""
    regex, seen = "", set()
    for i, piece in enumerate(_FIELD.split(pattern)):
        if i % 2 == 0:
            regex += re.escape(piece)
        else:
            regex += f"(?P={piece})" if piece in seen else f"(?P<{piece}>[^/]+)"
            seen.add(piece)
    return re.compile(regex)


def _fill(pattern: str, values: Mapping[str, str]) -> str:
    return _FIELD.sub(lambda match: values[match[1]], pattern)


# --------------------------------------------------------------------------------------------------------- CSV table


def csv_records(root: Path, mapping: FolderMapping) -> list[Record]:
    """Parts listed in a CSV file: a header, then one part a row; ``,`` or ``;`` between cells; UTF-8.

    Columns: ``id``, and any of ``category``, ``split`` (``test`` if absent), ``label``, ``defect``, a column per role
    with paths relative to the CSV file. Other columns travel along in ``meta["columns"]``.

    Raises:
        DataError: names the line and the column.
    """
    assert mapping.csv is not None  # the caller's choice of this way
    path = check_file(mapping.csv, "CSV table")
    with decoding(path, "a CSV table in UTF-8"):
        text = path.read_text(encoding="utf-8-sig")
        first = text.partition("\n")[0]
        table = csv.DictReader(
            io.StringIO(text), delimiter=";" if ";" in first and "," not in first else ",", strict=True
        )
        rows = [(table.line_num, row) for row in table]
    header = [name.strip() for name in table.fieldnames or [] if rows]
    views = [name for name in header if name in mapping.roles() and name not in NOT_VIEWS]
    if "id" not in header or not views:
        raise DataError(
            f"{path}: needs a column 'id', a column for a view ({', '.join(mapping.roles())}) and at least one row; "
            f"its columns are {', '.join(header) or 'none'}"
        )
    records = []
    for number, row in rows:
        if None in row or None in row.values():
            raise DataError(f"{path} line {number}: has not as many cells as the header; correct the row")
        cells = {key.strip(): value.strip() for key, value in row.items()}
        record = _csv_record(root, path, f"{path} line {number}", cells, mapping)
        if record is not None:
            records.append(record)
    return records


def _csv_record(root: Path, table: Path, where: str, cells: dict[str, str], mapping: FolderMapping) -> Record | None:
    if not cells["id"] or "/" in cells["id"]:
        raise DataError(f"{where}: the id is '{cells['id']}'; expected a name without '/'")
    split = mapping.split(cells.get("split") or "test", where)
    if split is None:
        return None
    files = {}
    for role in [name for name in cells if name in mapping.roles() and cells[name]]:
        given = Path(cells[role])
        file = given if given.is_absolute() else inside(table.parent, cells[role], f"{where}, column '{role}'")
        if not file.is_file():
            raise DataError(f"{where}: the '{role}' file {file} is missing; paths are relative to the CSV file")
        files[role] = file
    if not set(files) - set(NOT_VIEWS):
        raise DataError(f"{where}: part '{cells['id']}' has no view; fill in at least 'rgb' or 'xyz'")
    fields = {
        "id": cells["id"],
        "category": cells.get("category") or mapping.category or root.name,
        "label": _csv_label(where, cells.get("label", ""), cells.get("defect", ""), mapping),
    }
    record = make_record(mapping, fields, split, files)
    rest = {name: cell for name, cell in cells.items() if name not in (*_COLUMNS, *mapping.roles())}
    return Record(**{**vars(record), "meta": {**record.meta, "columns": rest}}) if rest else record


def _csv_label(where: str, label: str, defect: str, mapping: FolderMapping) -> str:
    """One label as `FolderMapping.label` takes it, out of the two columns."""
    good = (*mapping.good, "0")
    says_good, says_bad = label.lower() in good, bool(defect) and defect.lower() not in good
    if says_good and says_bad:
        raise DataError(f"{where}: the label is '{label}' but the defect is '{defect}'; correct one of them")
    if says_bad:
        return defect
    if says_good or (not label and defect):
        return mapping.good[0]
    return "anomalous" if label.lower() in _ANOMALOUS else label


# ----------------------------------------------------------------------------------------------------- default layout


def layout_records(root: Path, mapping: FolderMapping) -> list[Record]:
    """Parts in ``[CATEGORY/]SPLIT/LABEL/`` with role-named folders or flat files; or all in the root, without labels.

    Raises:
        DataError: no part anywhere, an unknown folder, or a file of unknown role.
    """
    homes = {mapping.category or root.name: root}
    if not _split_folders(root, mapping):
        homes = {f.name: f for f in subfolders(root) if _split_folders(f, mapping)} or homes
    records = []
    for category, home in homes.items():
        places = [(split, *pair) for f, split in _split_folders(home, mapping) for pair in _label_folders(f, mapping)]
        if not places and not _stray_folders(home, mapping):
            places = [("test", None, home)]
        for split, label, kind in places:
            for id, files in _part_files(kind, mapping).items():
                fields = {"category": category, "label": label, "id": id}
                records.append(make_record(mapping, fields, split, files))
    if not records:
        raise DataError(
            f"{root}: holds no parts; expected {root / 'train' / 'good' / '001_rgb.png'} or "
            f"{root / 'train' / 'good' / 'rgb' / '001.png'}, or a mapping in {root / 'polyspect.yaml'}"
        )
    return records


def _split_folders(home: Path, mapping: FolderMapping) -> list[tuple[Path, str]]:
    """(folder, split) pairs; beside a split's folder only other splits may lie."""
    if not any(mapping.splits.get(folder.name) for folder in subfolders(home)):
        return []
    pairs = [(folder, mapping.split(folder.name, folder)) for folder in subfolders(home)]
    return [(folder, split) for folder, split in pairs if split is not None]


def _stray_folders(folder: Path, mapping: FolderMapping) -> list[Path]:
    """Sub-folders that are not named after a role."""
    return [f for f in subfolders(folder) if f.name not in _folder_roles(mapping)]


def _label_folders(folder: Path, mapping: FolderMapping) -> list[tuple[str | None, Path]]:
    """(label, folder) pairs; the split folder itself, without label, if it holds parts directly."""
    labels = _stray_folders(folder, mapping)
    direct = _data_files(folder) or [f for f in subfolders(folder) if f not in labels]
    if direct and labels:
        raise DataError(
            f"{direct[0]}: lies beside the folder '{labels[0].name}'; put all parts of a split into such folders"
        )
    return [(None, folder)] if direct else [(f.name, f) for f in labels]


def _folder_roles(mapping: FolderMapping) -> dict[str, str]:
    """Name of a role's folder, or suffix of a flat file -> role."""
    return {role: role for role in mapping.roles()} | {"gt": "mask", "meta": "meta"}


def _data_files(folder: Path) -> list[Path]:
    settings = (".yaml", ".yml", ".json", ".csv", ".txt", ".md")
    return [f for f in visible_files(folder) if f.suffix.lower() not in settings or "_" in f.stem]


def _part_files(kind: Path, mapping: FolderMapping) -> dict[str, dict[str, Path]]:
    """Id -> role -> file of one folder of parts."""
    roles = _folder_roles(mapping)
    parts: dict[str, dict[str, Path]] = {}
    for folder in subfolders(kind):
        if folder.name not in roles:
            raise DataError(
                f"{folder}: is named after no role: {nearest_names(folder.name, roles)}; rename it, or move it"
            )
        role = roles[folder.name]
        for id, path in files_by_stem(folder, role, (".json",) if role == "meta" else None).items():
            parts.setdefault(id, {})[role] = path
    for path in _data_files(kind):
        id, _, ending = path.stem.rpartition("_")
        role = roles.get(ending.lower(), "") if id else ""
        if not role:
            id, role = path.stem, _plain_role(path, roles)
        if role in parts.setdefault(id, {}):
            raise DataError(f"{parts[id][role]} and {path.name}: two '{role}' files of one part; keep one of them")
        parts[id][role] = path
    shared = next((kind / name for name in DEFAULT_CAMERAS if (kind / name).is_file()), None)
    for files in parts.values():
        if shared is not None:
            files.setdefault("intrinsics", shared)
        if not set(files) - {*NOT_VIEWS, "meta"}:
            path = next(iter(files.values()))
            raise DataError(f"{path}: belongs to no part; add the part's rgb or xyz file, or move this one away")
    return parts


def _plain_role(path: Path, roles: Mapping[str, str]) -> str:
    """Role of a flat file whose name does not end in one."""
    suffix = path.suffix.lower()
    if suffix in CLOUD_SUFFIXES:
        return "xyz"
    if suffix in IMAGE_SUFFIXES and suffix not in (".tif", ".tiff"):
        return "rgb"
    raise DataError(
        f"{path}: its role is unknown; expected a name such as {path.stem}_xyz{path.suffix} with one of "
        f"{', '.join(roles)} at its end: rename it, or give a mapping in polyspect.yaml"
    )
