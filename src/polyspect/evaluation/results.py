"""The results folder: everything that an evaluation leaves behind, in files that any program can read.

    OUT/
      results.json            metrics, calibration, decisions, timing, provenance, one entry per part
      parts.csv               one row per part, for a spreadsheet
      parts/0000.safetensors  the arrays of part 0: maps and thumbnails of what the detector saw
      report.html             written later, from the files above alone (`polyspect.report`)

The folder is complete once `results.json` is there, because it is written last. Nothing here needs torch.

Arrays of one part, all on the grid H x W on which the detector's map lives (see `PART_ARRAYS` for the stored types):

    map             (H, W)     anomaly map, raw; the only one that must be there
    branch.<name>   (H, W)     map of one modality or memory bank, raw
    rgb             (H, W, 3)  uint8, or float in 0..1
    depth           (H, W)     metres along the optical axis, 0 where not measured
    height          (H, W)     metres above the support plane, instead of depth if the preparation measures it
    normals         (H, W, 3)  unit vectors in the camera frame
    xyz             (h, w, 3)  metres in the camera frame: x right, y down, z forward; every s-th row and column
    valid           (H, W)     bool, True where the 3D sensor measured
    foreground      (H, W)     bool, True on the part
    mask            (H, W)     bool, ground truth, True on a defect
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..errors import DataError
from ..samples import Array
from ..version import __version__

FORMAT = 1
MAX_CLOUD_SIDE = 128  # rows and columns of the stored point grid, at most
CSV_COLUMNS = ("id", "defect", "label", "score", "p_value", "decision", "outcome")
PART_ARRAYS: dict[str, tuple[int, str]] = {  # name -> (number of axes, stored type)
    "map": (2, "float32"),
    "rgb": (3, "uint8"),
    "depth": (2, "float32"),
    "height": (2, "float32"),
    "normals": (3, "int8"),
    "xyz": (3, "float32"),
    "valid": (2, "uint8"),
    "foreground": (2, "uint8"),
    "mask": (2, "uint8"),
}
BRANCH = "branch."
_BOOLEANS = ("valid", "foreground", "mask")
_FLOAT16_MAX = 65504.0

Decision = Literal["accept", "reject"]
Outcome = Literal["caught", "missed", "false alarm", "passed", "rejected", "accepted", "scored"]


def outcome_of(label: int | None, decision: str | None) -> Outcome:
    """What became of a part: the decision held against the truth, as far as either is known.

    Known label: ``caught`` and ``missed`` for anomalous parts, ``passed`` and ``false alarm`` for good ones. Unknown
    label: ``rejected`` or ``accepted``. No decision (no calibration): ``scored``.
    """
    if decision is None:
        return "scored"
    if label is None:
        return "rejected" if decision == "reject" else "accepted"
    if label == 1:
        return "caught" if decision == "reject" else "missed"
    return "false alarm" if decision == "reject" else "passed"


@dataclass(frozen=True, kw_only=True)
class PartRow:
    """One evaluated part.

    Attributes:
        index: Position in the results, and the number of its array file.
        id: The sample's id.
        score: Raw image score of the detector; larger is more anomalous.
        label: 0 good, 1 anomalous, None unknown.
        defect: Defect type in the data set's spelling, None unknown.
        p_value: Share of good parts expected to score at least as high, 0..1; None without calibration.
        decision: None without calibration.
        branch_scores: Name of a modality or memory bank -> raw score of that branch.
    """

    index: int
    id: str
    score: float
    label: int | None = None
    defect: str | None = None
    p_value: float | None = None
    decision: Decision | None = None
    branch_scores: Mapping[str, float] = field(default_factory=dict)

    @property
    def outcome(self) -> Outcome:
        """See `outcome_of`."""
        return outcome_of(self.label, self.decision)

    def as_dict(self) -> dict[str, Any]:
        """The entry of this part in `results.json`."""
        names = ("index", "id", "defect", "label", "score", "p_value", "decision", "outcome")
        return {name: getattr(self, name) for name in names} | {"branch_scores": dict(self.branch_scores)}


@dataclass(frozen=True, kw_only=True)
class Results:
    """Everything that `results.json` holds. A metric that is not defined for these parts is None.

    Attributes:
        model: path, sha256, detector, config, modalities, preparation, seed, weights.
        data: reader, category, split, n_good, n_anomalous, fingerprint; ``synthetic: true`` for generated parts.
        parts: One row per part, in the order of their indices.
        metrics: i_auroc, i_ap, f1_max, p_auroc, p_ap, ``aupro@<limit>`` (exact) and ``aupro_sampled@<limit>``.
        intervals: Metric -> its 95 % bootstrap interval over parts, low and high.
        per_defect: Defect type -> {"n": parts of that type, "metrics": those parts against all good ones}.
        branches: Branch name -> metrics of that branch alone.
        calibration: threshold (None: no finite threshold keeps the wished rate), false_reject (wished), statement,
            supported, n, ...; None for a model without calibration.
        decisions: good_rejected, good_accepted, anomalous_rejected, anomalous_accepted; empty without calibration.
        timing: total_s, prepare_s, predict_s, images_per_s, peak_rss_mib.
        skipped: One {"id", "reason"} per part that could not be read and was left out.
        curves: ``roc`` {"fpr", "tpr"} over images and ``pro`` {"fpr", "pro"} over pixels.
        grid: In words, on which grid the pixel metrics were computed.
        polyspect: Version that wrote the results.
    """

    model: Mapping[str, Any]
    data: Mapping[str, Any]
    parts: Sequence[PartRow]
    metrics: Mapping[str, float | None]
    intervals: Mapping[str, Sequence[float]] = field(default_factory=dict)
    per_defect: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    branches: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    calibration: Mapping[str, Any] | None = None
    decisions: Mapping[str, int] = field(default_factory=dict)
    timing: Mapping[str, float | None] = field(default_factory=dict)
    skipped: Sequence[Mapping[str, str]] = ()
    curves: Mapping[str, Mapping[str, Sequence[float]]] = field(default_factory=dict)
    grid: str = ""
    polyspect: str = __version__

    @property
    def threshold(self) -> float | None:
        """The image score from which a part is rejected; None without (finite) calibration."""
        value = (self.calibration or {}).get("threshold")
        return None if value is None else float(value)

    @property
    def synthetic(self) -> bool:
        """True if the data says that its parts were generated."""
        return bool(self.data.get("synthetic", False))

    def as_dict(self) -> dict[str, Any]:
        """The content of `results.json`, in plain values: numbers that are not finite are None."""
        names = ("polyspect", "model", "data", "grid", "metrics", "intervals", "per_defect", "branches", "calibration")
        content = {"format": FORMAT} | {name: getattr(self, name) for name in names}
        content |= {name: getattr(self, name) for name in ("decisions", "timing", "skipped", "curves")}
        content["parts"] = [part.as_dict() for part in self.parts]
        plain: dict[str, Any] = _plain(content)
        return plain

    def check(self) -> Results:
        """Return self after checking the parts.

        Raises:
            DataError: indices that are not 0, 1, 2, ..., a repeated id, a score or p-value out of range, an unknown
                label or decision; names the part.
        """
        seen: set[str] = set()
        for position, part in enumerate(self.parts):
            where = f"part {position} ('{part.id}')"
            if part.index != position:
                raise DataError(f"{where} has index {part.index}, expected {position}: number the parts in their order")
            if part.id in seen:
                raise DataError(f"{where}: this id occurs twice; ids must be unique within the results")
            seen.add(part.id)
            if not math.isfinite(part.score):
                raise DataError(
                    f"{where}: score is {part.score}, expected a finite number; the detector gave no answer"
                )
            for name, score in part.branch_scores.items():
                if not math.isfinite(score):
                    raise DataError(f"{where}: the score of branch '{name}' is {score}, expected a finite number")
            if part.p_value is not None and not 0 <= part.p_value <= 1:
                raise DataError(f"{where}: p_value is {part.p_value}, expected a number in 0..1 or nothing")
            if part.label not in (None, 0, 1):
                raise DataError(f"{where}: label is {part.label!r}, expected 0 (good), 1 (anomalous) or nothing")
            if part.decision not in (None, "accept", "reject"):
                raise DataError(f"{where}: decision is {part.decision!r}, expected 'accept', 'reject' or nothing")
        return self


# -- writing ---------------------------------------------------------------------------------------------------------


def clear_results(folder: str | Path) -> Path:
    """Make `folder` ready for new results: create it, and take away the files of an earlier evaluation.

    Only files that this module or the report wrote are removed, `results.json` first, so that an interrupted
    evaluation is never taken for a complete one.
    """
    folder = Path(folder)
    (folder / "parts").mkdir(parents=True, exist_ok=True)
    for name in ("results.json", "parts.csv", "report.html"):
        (folder / name).unlink(missing_ok=True)
    for path in (folder / "parts").glob("[0-9][0-9][0-9][0-9]*.safetensors"):
        path.unlink()
    return folder


def write_results(folder: str | Path, results: Results) -> Path:
    """Write `parts.csv` and then `results.json`; return the latter's path. Numbers that are not finite become null.

    Raises:
        DataError: the parts are not in order (see `Results.check`).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    results.check()
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for part in results.parts:
        row = part.as_dict()
        writer.writerow(["" if row[name] is None else row[name] for name in CSV_COLUMNS])
    write_atomically(folder / "parts.csv", table.getvalue().encode())
    text = json.dumps(results.as_dict(), indent=1, ensure_ascii=False, allow_nan=False)
    write_atomically(folder / "results.json", text.encode() + b"\n")
    return folder / "results.json"


def write_part(folder: str | Path, index: int, arrays: Mapping[str, Array]) -> Path:
    """Write the arrays of one part (module header: names, shapes, units), cast to the stored types; return the file.

    `xyz` comes on the full grid H x W and is thinned to at most 128 x 128 by taking every s-th row and column.
    Branch maps are kept in half precision: values beyond +-65504 are clipped.

    Raises:
        DataError: unknown name, no map, arrays on different grids, or a map that is not finite; names the part.
    """
    from safetensors.numpy import save

    if "map" not in arrays:
        raise DataError(f"part {index}: no 'map' among the arrays to write ({', '.join(arrays) or 'none'})")
    size = arrays["map"].shape
    stored: dict[str, Array] = {}
    for name, array in arrays.items():
        axes, dtype = _spec(name, f"part {index}")
        if array.ndim != axes or array.shape[:2] != size or (axes == 3 and array.shape[2] != 3):
            expected = (*size, 3)[:axes]
            raise DataError(f"part {index}: '{name}' has shape {array.shape}, expected {expected} as the map has")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise DataError(f"part {index}: '{name}' holds NaN or infinity; mark unmeasured pixels in 'valid'")
        if name == "xyz":
            step = -(-max(size) // MAX_CLOUD_SIDE)  # ceil
            array = array[::step, ::step]
        stored[name] = np.ascontiguousarray(_to_stored(name, array, dtype))
    path = part_path(folder, index)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, save(stored))
    return path


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file beside its target, flush it to the disk and rename it over the target."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _spec(name: str, where: str) -> tuple[int, str]:
    if name.startswith(BRANCH) and len(name) > len(BRANCH):
        return 2, "float16"
    if name not in PART_ARRAYS:
        raise DataError(f"{where}: unknown array '{name}'; known: {', '.join(PART_ARRAYS)}, {BRANCH}<name>")
    return PART_ARRAYS[name]


def _to_stored(name: str, array: Array, dtype: str) -> Array:
    if name in _BOOLEANS:
        return (array != 0).astype(np.uint8)
    if name == "rgb" and array.dtype.kind == "f":
        return np.clip(np.rint(array * 255.0), 0, 255).astype(np.uint8)
    if name == "normals" and array.dtype != np.int8:
        return np.clip(np.rint(array * 127.0), -127, 127).astype(np.int8)
    if dtype == "float16":
        return np.clip(array, -_FLOAT16_MAX, _FLOAT16_MAX).astype(np.float16)
    return array.astype(dtype)


def _plain(value: Any) -> Any:
    """The same in the types of JSON: numpy scalars and arrays unpacked, numbers that are not finite None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in (sorted(value) if isinstance(value, set | frozenset) else value)]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"results hold a {type(value).__name__}, which JSON cannot: {value!r}")


# -- reading ---------------------------------------------------------------------------------------------------------

_KEYS: dict[str, tuple[type, ...]] = {
    "polyspect": (str,),
    "model": (dict,),
    "data": (dict,),
    "grid": (str,),
    "metrics": (dict,),
    "intervals": (dict,),
    "per_defect": (dict,),
    "branches": (dict,),
    "calibration": (dict, type(None)),
    "decisions": (dict,),
    "timing": (dict,),
    "skipped": (list,),
    "curves": (dict,),
    "parts": (list,),
}


def read_results(folder: str | Path) -> Results:
    """Read `results.json`.

    Raises:
        DataError: no such file, not JSON, written by another format, or a key that is missing or of the wrong kind.
    """
    path = Path(folder) / "results.json"
    if not path.is_file():
        what = (
            "the folder does not exist"
            if not Path(folder).is_dir()
            else "it is written last, so this run is incomplete"
        )
        raise DataError(f"no results in '{folder}': '{path}' is missing ({what}); run the evaluation (again)")
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"'{path}' is damaged, not JSON: {error}; run the evaluation again") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise DataError(f"'{path}' has format {found!r}, expected {FORMAT}: it is not from this version of polyspect")
    for key, kinds in _KEYS.items():
        if not isinstance(content.get(key, ...), kinds):
            found = type(content[key]).__name__ if key in content else "nothing"
            raise DataError(f"'{path}' is damaged: '{key}' is {found}, expected {kinds[0].__name__}")
    parts = [_part_row(entry, f"'{path}', part {position}") for position, entry in enumerate(content["parts"])]
    return Results(**{key: content[key] for key in _KEYS if key != "parts"}, parts=parts).check()


def _part_row(entry: Any, where: str) -> PartRow:
    try:
        return PartRow(
            index=int(entry["index"]),
            id=str(entry["id"]),
            score=float(entry["score"]),
            label=entry["label"],
            defect=entry["defect"],
            p_value=None if entry["p_value"] is None else float(entry["p_value"]),
            decision=entry["decision"],
            branch_scores={str(name): float(score) for name, score in entry["branch_scores"].items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{where} is damaged: {type(error).__name__} at {error}; run the evaluation again") from None


def part_path(folder: str | Path, index: int) -> Path:
    """Where the arrays of a part are."""
    return Path(folder) / "parts" / f"{index:04d}.safetensors"


def read_part(folder: str | Path, index: int, names: Sequence[str] | None = None) -> dict[str, Array]:
    """The arrays of one part: masks as bool, normals as float32 unit vectors, the rest as stored.

    Args:
        names: Only these, as far as they are there; all by default. Reads nothing else from the disk.

    Raises:
        DataError: the file is missing or damaged, or holds arrays that do not belong there.
    """
    from safetensors import SafetensorError, safe_open

    path = part_path(folder, index)
    if not path.is_file():
        raise DataError(f"'{path}' is missing: the arrays of part {index} were not written; run the evaluation again")
    try:
        with safe_open(str(path), framework="np") as file:
            stored = {name: file.get_tensor(name) for name in file.keys() if names is None or name in names}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(f"'{path}' is damaged: {error}; run the evaluation again") from None
    for name, array in stored.items():
        axes, dtype = _spec(name, f"'{path}'")
        if array.ndim != axes or array.dtype != dtype:
            raise DataError(
                f"'{path}' is damaged: '{name}' is {array.dtype} with {array.ndim} axes, expected {dtype} with {axes}"
            )
        if name in _BOOLEANS:
            stored[name] = array.astype(bool)
        elif name == "normals":
            stored[name] = array.astype(np.float32) / 127.0
    if names is None and "map" not in stored:
        raise DataError(f"'{path}' is damaged: no 'map' in it; run the evaluation again")
    return stored
