"""The whole road in four calls: `fit`, `load`, `predict`, `evaluate` (re-exported as ``polyspect.fit`` and so on)."""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from .calibration import Calibration, calibrate, check_no_leak
from .config import build_config
from .data.depth_scale import fit_depth_scale
from .data.parts import OnError, Parts
from .data.preparation import PREPARATIONS, Preparation, without_cloud
from .data.prepared_cache import PreparedCache
from .data.source import Reader, Record, file_hash, open_reader
from .data.views import ReadOptions, files_sample, guess_roles
from .detectors import detector_class
from .detectors.completion import Completion
from .detectors.contract import Detector, configure
from .errors import CalibrationError, ConfigError, DataError, nearest_names
from .evaluation.evaluate import evaluate as _evaluate
from .evaluation.results import Results
from .fitting.engine import Engine, EngineConfig
from .fitting.progress import Progress
from .model import Model, PartResult
from .version import __version__

log = logging.getLogger("polyspect")

HELD_OUT = 0.15  # share of the training parts kept for calibration where a data set has no validation split


def fit(
    detector: str,
    *,
    data: str = "mvtec3d",
    root: str | Path,
    category: str,
    out: str | Path | None = None,
    preset: str | None = None,
    settings: Mapping[str, Any] | None = None,
    preparation: str | None = None,
    prepare: Mapping[str, Any] | None = None,
    reader_options: Mapping[str, Any] | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: str = "32-true",
    compile: bool = False,
    cache: str | Path | None = None,
    cache_gb: float = 8.0,
    false_reject: float = 0.05,
    confidence: float = 0.95,
    max_train: int | None = None,
    resume: bool = False,
    on_error: OnError = "raise",
    progress: Progress | None = None,
) -> Model:
    """Fit a detector on the good training parts of one category, calibrate it on validation parts, save one file.

    Args:
        detector: Name, see `polyspect.DETECTORS`.
        data: Reader: ``mvtec3d``, ``eyecandies`` or ``folder``.
        root: Folder of the data set.
        category: Category in the data set's spelling.
        out: Model file to write; while fitting, a checkpoint lies beside it.
        preset: Named settings of the detector (``paper``, ``fast``).
        settings: Single settings of the detector; they win over the preset.
        preparation: Named preparation; by default the one that goes with the preset.
        prepare: Single settings of the preparation; they win.
        reader_options: Options of the reader.
        seed: Order of batches and the held-out share.
        device: ``auto``, ``cpu`` or ``cuda``.
        precision: ``32-true``, ``bf16-mixed`` or ``16-mixed``.
        compile: Compile the training loss with ``torch.compile``: pays off for long fits on a GPU; rounding differs.
        cache: Folder for prepared parts and features; None keeps features in memory and prepares parts anew.
        cache_gb: Most that cached features may take.
        false_reject: Wished share of good parts that may be rejected.
        confidence: Confidence of the statement on it.
        max_train: Use only this many training parts, drawn by `seed` (few-shot).
        resume: Go on from the checkpoint beside `out`.
        on_error: ``skip`` leaves bad parts out and lists them in ``model.info["skipped"]``.
        progress: Where progress is shown.

    Raises:
        ConfigError: unknown detector, preset or setting (names the nearest), or a value out of range.
        DataError: a file or split is not what it should be.
        WeightsError: pretrained weights cannot be had.
        CalibrationError: a validation part is also a test part.
    """
    kind, config, chosen = _choose(detector, preset, settings, preparation, prepare)
    reader = open_reader(data, root, **(reader_options or {}))
    progress, folder = progress or Progress(), Path(cache) if cache else None
    seen = {"preparation": chosen, "modalities": config.modalities, "on_error": on_error}
    parts, hold, source = _good_parts(reader, category, seed, max_train, folder, **seen)
    held = hold()
    # a device or weights that cannot be had are errors before the long work starts
    engine = _engine(out, folder, cache_gb, progress, seed=seed, device=device, precision=precision, compile=compile)
    network = kind(config)
    with progress:
        with progress.task("prepare", len(parts) + len(held)) as advance:
            parts.check(advance=advance)
            held.check(advance=advance)
        if chosen.depth_range == "category" and "depth" in config.modalities:
            parts.scale = held.scale = fit_depth_scale(parts.samples())
        fitted = engine.fit(network, {"train": parts, "validation": held}, resume=resume)
        model = Model(detector, fitted, chosen, parts.scale, None, _info(fitted, reader, category, parts, held, seed))
        with progress.task("calibrate", len(held)) as advance:
            model.calibration = _calibrate(model, held, false_reject, confidence, source, advance)
    if out is not None:
        model.save(out)
    return model


def complete(
    model: Model | str | Path,
    *,
    data: str = "mvtec3d",
    root: str | Path,
    category: str,
    out: str | Path | None = None,
    preset: str | None = None,
    settings: Mapping[str, Any] | None = None,
    reader_options: Mapping[str, Any] | None = None,
    seed: int | None = None,
    device: str = "auto",
    precision: str = "32-true",
    cache: str | Path | None = None,
    cache_gb: float = 8.0,
    max_train: int | None = None,
    resume: bool = False,
    on_error: OnError = "raise",
    progress: Progress | None = None,
) -> Model:
    """Teach a fitted model to judge parts that lack some of its modalities; see `polyspect.detectors.completion`.

    The detector is left as it is. Every set of modalities gets a threshold of its own, from the validation parts as
    they would be with these modalities alone, at the model's false-reject rate.

    Args:
        model: A fitted model on two or more modalities, or its file.
        data: Reader.
        root: Folder of the data set that the model was fitted on.
        category: Category in the data set's spelling.
        out: Model file to write.
        preset: Named settings of the completion (``paper``, ``fast``).
        settings: Single settings of the completion.
        reader_options: Options of the reader.
        seed: Order of batches and the held-out share; None: the model's own, so that the same parts are held out.
        device: ``auto``, ``cpu`` or ``cuda``.
        precision: ``32-true``, ``bf16-mixed`` or ``16-mixed``.
        cache: Folder for prepared parts and features.
        cache_gb: Most that cached features may take.
        max_train: As in the model's fit.
        resume: Go on from the checkpoint beside `out`.
        on_error: ``skip`` leaves bad parts out.
        progress: Where progress is shown.

    Raises:
        ConfigError: the model has one modality, or features that cannot be filled in, or blanks RGB by 3D.
        DataError: a file or split is not what it should be.
        CalibrationError: the model is not calibrated, or a validation part is also a test part.
    """
    fitted = model if isinstance(model, Model) else load(model, device)
    if isinstance(fitted.detector, Completion):
        raise ConfigError("this model is completed already: complete the model that it was made from")
    if fitted.calibration is None:
        raise CalibrationError("this model was never calibrated: fit it with validation parts first")
    completion = Completion(fitted.detector, configure(Completion, settings, preset))
    without_cloud(fitted.preparation)  # an error now, not after the long work
    seed = int(fitted.info.get("seed", 0)) if seed is None else seed
    reader = open_reader(data, root, **(reader_options or {}))
    progress, folder = progress or Progress(), Path(cache) if cache else None
    seen = {"preparation": fitted.preparation, "modalities": fitted.modalities, "scale": fitted.scale}
    parts, hold, source = _good_parts(reader, category, seed, max_train, folder, **seen, on_error=on_error)
    engine = _engine(out, folder, cache_gb, progress, seed=seed, device=device, precision=precision)
    with progress:
        with progress.task("prepare", len(parts)) as advance:
            parts.check(advance=advance)
        engine.fit(completion, {"train": parts}, resume=resume)
        completed = Model(
            fitted.name, completion, fitted.preparation, fitted.scale, fitted.calibration, dict(fitted.info)
        )
        fewer = completion.choices[1:]
        with progress.task("calibrate", len(fewer) * len(hold())) as advance:
            for names in fewer:
                held = hold(choices=[names]).check()
                completed.partial["+".join(names)] = _calibrate(
                    completed, held, fitted.calibration.false_reject, fitted.calibration.confidence, source, advance
                )
    if out is not None:
        completed.save(out)
    return completed


def load(path: str | Path, device: str = "auto") -> Model:
    """Read a fitted model; see `Model.load`."""
    return Model.load(path, device)


def predict(
    model: Model | str | Path,
    *paths: str | Path,
    data: str | None = None,
    root: str | Path | None = None,
    category: str | None = None,
    split: str = "test",
    reader_options: Mapping[str, Any] | None = None,
    intrinsics: str | Path | None = None,
    on_error: OnError = "raise",
    skipped: list[tuple[str, str]] | None = None,
) -> Iterable[PartResult]:
    """Judge new parts: the files of one part, a folder of parts, or a split of a data set. Lazy.

    Args:
        model: A model or its file.
        paths: The files of one part (say its RGB and xyz file; ``ROLE=FILE`` where the role cannot be told from the
            content), or one folder of parts without ground truth.
        data: Reader, for parts of a data set (then `root` and `category` too).
        root: Folder of the data set.
        category: Category in the data set's spelling.
        split: Which split of it.
        reader_options: Options of the reader.
        intrinsics: Camera file, where `paths` bring depth images.
        on_error: ``skip`` leaves bad parts out.
        skipped: Filled with (id, reason) of each part left out.

    Raises:
        DataError: a file is missing or not what it should be.
    """
    fitted = model if isinstance(model, Model) else load(model)
    if data is None and len(paths) >= 1 and not Path(paths[0]).is_dir():
        options = build_config(ReadOptions, reader_options or {})
        return [fitted.predict_sample(files_sample(_roles(paths, intrinsics), options=options))]
    broken: dict[str, str] | None = {} if on_error == "skip" else None
    if data is None:
        if len(paths) != 1:
            raise ConfigError(
                "give the files of one part, or one folder of parts, or a data set by data, root, category"
            )
        camera = {} if intrinsics is None else {"intrinsics": str(Path(intrinsics).resolve())}
        reader: Reader = open_reader("folder", paths[0], **{**(reader_options or {}), **camera})
        records = [record for name in reader.categories() for record in reader.records(name, split, broken)]
    else:
        if root is None or category is None:
            raise ConfigError("predicting a data set needs its root and a category")
        reader = open_reader(data, root, **(reader_options or {}))
        records = reader.records(category, split, broken)
    parts = Parts(
        reader,
        records,
        fitted.preparation,
        modalities=fitted.modalities,
        on_error=on_error,
        broken=broken,
        choices=fitted.choices,
    )
    parts.check()
    if skipped is not None:
        skipped.extend(parts.skipped)
    return fitted.predict(parts)


def evaluate(
    model: Model | str | Path,
    *,
    data: str = "mvtec3d",
    root: str | Path,
    category: str,
    split: str = "test",
    out: str | Path | None = None,
    reader_options: Mapping[str, Any] | None = None,
    bootstrap: int = 200,
    ignore_invalid: bool = False,
    cache: str | Path | None = None,
    on_error: OnError = "raise",
    only: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Results:
    """Evaluate a model on a labelled split: metrics with intervals, per defect type, per modality; a results folder.

    Args:
        model: A model or its file.
        data: Reader.
        root: Folder of the data set.
        category: Category in the data set's spelling.
        split: Which split.
        out: Folder for results.json, parts.csv, the maps and report.html; None writes nothing.
        reader_options: Options of the reader.
        bootstrap: Resamples for the intervals; 0 for none.
        ignore_invalid: Leave pixels without 3D data out of the pixel metrics; the papers count them.
        cache: Folder for prepared parts.
        on_error: ``skip`` leaves bad parts out and lists them in the results.
        only: Judge the parts as if they had these modalities alone; for a model that can do without the others.
        progress: Where progress is shown.

    Raises:
        DataError: a file or split is not what it should be.
        ConfigError: the model cannot judge parts with the modalities in `only`.
    """
    fitted = model if isinstance(model, Model) else load(model)
    reader = open_reader(data, root, **(reader_options or {}))
    prepared = PreparedCache(Path(cache) / "prepared" if cache else None)
    broken: dict[str, str] | None = {} if on_error == "skip" else None
    parts = Parts(
        reader,
        reader.records(category, split, broken),
        fitted.preparation,
        modalities=fitted.modalities,
        cache=prepared,
        on_error=on_error,
        broken=broken,
        choices=fitted.choices if only is None else [_only(fitted, only)],
    )
    about = {
        "reader": data,
        "category": category,
        "split": split,
        "synthetic": (Path(root) / "synthetic.json").is_file(),
    }
    path = None if isinstance(model, Model) else Path(model)
    folder = Path(out) if out else None
    results = _evaluate(
        fitted,
        parts,
        about,
        out=folder,
        path=path,
        resamples=bootstrap,
        ignore_invalid=ignore_invalid,
        progress=progress,
    )
    if folder is not None:
        from .report.html import write_report

        write_report(folder)
    return results


# -- pieces ----------------------------------------------------------------------------------------------------------


def _engine(out: str | Path | None, cache: Path | None, cache_gb: float, progress: Progress, **settings: Any) -> Engine:
    """The engine of a fit that writes to `out`, its checkpoint beside it."""
    config = EngineConfig(cache=str(cache) if cache else None, cache_bytes=int(cache_gb * 2**30), **settings)
    return Engine(config, checkpoint=Path(f"{out}.checkpoint") if out else None, progress=progress)


def _good_parts(
    reader: Reader, category: str, seed: int, max_train: int | None, cache: Path | None, on_error: OnError, **seen: Any
) -> tuple[Parts, Callable[..., Parts], str]:
    """The training parts, what makes the validation parts (by further options of `Parts`), and where these came from.

    `seen` says how parts are seen: `preparation`, `modalities`, `scale`.

    Raises:
        CalibrationError: a validation part is also a test part.
    """
    broken: dict[str, dict[str, str]] | None = {"train": {}, "validation": {}} if on_error == "skip" else None
    train, validation, source = _splits(reader, category, seed, max_train, broken)
    check_no_leak({record.id: _own_hashes(record) for record in validation}, _hashes(reader, category))
    prepared = PreparedCache(cache / "prepared" if cache else None)

    def make(split: str, records: list[Record], **more: Any) -> Parts:
        left_out = None if broken is None else broken[split]
        return Parts(reader, records, cache=prepared, on_error=on_error, broken=left_out, **seen, **more)

    return make("train", train), partial(make, "validation", validation), source


def _choose(
    detector: str,
    preset: str | None,
    settings: Mapping[str, Any] | None,
    preparation: str | None,
    prepare: Mapping[str, Any] | None,
) -> tuple[type[Detector], Any, Preparation]:
    """The detector's class, its config, and the preparation, all checked before any work starts."""
    kind = detector_class(detector)
    config = configure(kind, settings, preset)
    name = preparation or kind.PREPARATION.get(preset or "", "default")
    if name not in PREPARATIONS:
        raise ConfigError(f"unknown preparation '{name}': {nearest_names(name, PREPARATIONS)}")
    chosen = build_config(Preparation, {**asdict(PREPARATIONS[name]), **(prepare or {})})
    return kind, config, chosen


def _only(model: Model, names: Sequence[str]) -> tuple[str, ...]:
    """The one of the model's choices that is the set `names`."""
    for choice in model.choices:
        if set(choice) == set(names):
            return choice
    there = "; ".join(",".join(choice) for choice in model.choices)
    raise ConfigError(
        f"this model cannot judge by {', '.join(names)} alone, only by: {there}; see `polyspect complete`"
    )


def _splits(
    reader: Reader, category: str, seed: int, max_train: int | None, broken: dict[str, dict[str, str]] | None
) -> tuple[list[Record], list[Record], str]:
    """Training and validation parts, good ones only, and where the validation parts came from."""

    def good(split: str) -> list[Record]:
        found = reader.records(category, split, None if broken is None else broken[split])
        return [record for record in found if record.label != 1]

    train = good("train")
    if max_train is not None:
        if max_train < 1:
            raise ConfigError(f"max_train is {max_train}: at least one part is needed")
        train = sorted(random.Random(seed).sample(train, min(max_train, len(train))), key=lambda record: record.id)
    if reader.has_split(category, "validation"):
        validation = good("validation")
        if validation:
            return train, validation, "the data set's own validation split"
    count = max(1, round(HELD_OUT * len(train)))
    if len(train) < 2:
        raise DataError(
            f"category '{category}' has {len(train)} good training part and no validation split: "
            f"at least two good parts are needed, one to learn from and one to calibrate on"
        )
    held = set(random.Random(seed).sample([record.id for record in train], count))
    log.warning("no validation split: %d of %d training parts are held out for calibration", count, len(train))
    return (
        [record for record in train if record.id not in held],
        [record for record in train if record.id in held],
        f"{count} training parts held out by seed {seed}",
    )


def _hashes(reader: Reader, category: str) -> dict[str, list[str]]:
    """Content hashes of the input files of each part of the test split."""
    found: dict[str, list[str]] = {}
    if reader.has_split(category, "test"):
        for record in reader.records(category, "test", broken={}):  # a part that lacks a file is no leak
            found[record.id] = _own_hashes(record)
    return found


def _own_hashes(record: Record) -> list[str]:
    """Content hashes of the files that belong to this part alone: no ground truth, no camera file."""
    return [file_hash(path) for role, path in record.files.items() if role not in ("mask", "intrinsics")]


def _info(fitted: Detector, reader: Reader, category: str, parts: Parts, held: Parts, seed: int) -> dict[str, Any]:
    import numpy
    import timm
    import torch

    return {
        "seed": seed,
        "versions": {
            "polyspect": __version__,
            "python": ".".join(map(str, sys.version_info[:3])),
            "torch": torch.__version__,
            "timm": timm.__version__,
            "numpy": numpy.__version__,
        },
        "weights": {
            name: source
            for name in fitted.frozen
            if (source := getattr(fitted.get_submodule(name), "weights_source", None)) is not None
        }
        | fitted.sources,
        "data": {
            "reader": reader.name,
            "category": category,
            "train": len(parts),
            "validation": len(held),
            "fingerprint": parts.fingerprint(),
        },
        "skipped": [list(item) for item in parts.skipped + held.skipped],
    }


def _calibrate(
    model: Model, held: Parts, false_reject: float, confidence: float, source: str, advance: Any
) -> Calibration:
    scores = []
    for result in model.predict(held):
        scores.append(result.score)
        advance(1)
    if not scores:
        raise CalibrationError("no validation part is left to calibrate on")
    return calibrate(scores, false_reject=false_reject, confidence=confidence, source=source)


def _roles(paths: Sequence[str | Path], intrinsics: str | Path | None) -> dict[str, Path]:
    """Role of each loose file: as said by ``ROLE=FILE``, else by what the file holds."""
    said = dict(str(path).split("=", 1) for path in paths if "=" in str(path) and not Path(path).exists())
    if intrinsics is not None:
        said["intrinsics"] = str(intrinsics)
    guessed = guess_roles(path for path in paths if "=" not in str(path) or Path(path).exists())
    return {**guessed, **{role: Path(path) for role, path in said.items()}}
