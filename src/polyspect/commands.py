"""What each command does: call the library, print the result. Nothing heavy is imported until a command runs."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from .errors import ConfigError, nearest_names
from .version import __version__

if TYPE_CHECKING:
    from .fitting.pdn_distillation import Distilled
    from .fitting.pretraining import Pretrained


def run_demo(a: argparse.Namespace) -> int:
    """Generate synthetic parts, fit, evaluate, report."""
    from . import api
    from .fitting.progress import TerminalProgress

    out, categories = Path(a.out), a.categories.split(",")
    _render(a, out / "data", categories)
    shown = {}
    for category in categories:
        where: dict[str, Any] = {"root": out / "data", "category": category, "cache": out / "cache"}
        model_file, folder = out / f"{category}-{a.detector}.safetensors", out / f"report-{category}"
        api.fit(
            a.detector,
            preset=a.preset,
            out=model_file,
            settings=_settings(a),
            prepare=_pairs(a.prepare),
            progress=TerminalProgress(),
            **where,
        )
        results = api.evaluate(model_file, out=folder, progress=TerminalProgress(), **where)
        shown[category] = {"metrics": results.metrics, "report": str((folder / "report.html").resolve())}
        if not a.json:
            _print_results(results)
            print(f"report: {shown[category]['report']}")
    if a.json:
        print(json.dumps(shown))
    return 0


def run_make_synthetic(a: argparse.Namespace) -> int:
    """Write synthetic parts in MVTec 3D-AD layout."""
    from .data.synthetic import CATEGORIES

    wanted = list(CATEGORIES) if a.categories == "all" else a.categories.split(",")
    summary = _render(a, Path(a.folder), wanted, camera=a.camera, overwrite=a.overwrite)
    text = f"{summary['parts']} synthetic parts of {len(wanted)} categories in {Path(a.folder).resolve()}"
    _emit(a, summary, f"{text} ({summary['written']} written, {summary['skipped']} were there)")
    return 0


def _render(a: argparse.Namespace, folder: Path, categories: Sequence[str], **settings: Any) -> dict[str, Any]:
    """Write a synthetic data set, showing progress."""
    from contextlib import ExitStack

    from .data.synthetic import write_dataset
    from .fitting.progress import TerminalProgress

    with ExitStack() as stack:
        bars = stack.enter_context(TerminalProgress())
        advances: list[Any] = []

        def progress(done: int, total: int, name: str) -> None:
            if not advances:
                advances.append(stack.enter_context(bars.task("synthetic parts", total)))
            advances[0](1, note=name)

        counts = {name: getattr(a, name) for name in ("train", "validation", "test_good", "test_per_defect")}
        return write_dataset(
            folder, categories, size=a.size, seed=a.seed, progress=progress, workers=a.workers, **counts, **settings
        )


def run_data_list(a: argparse.Namespace) -> int:
    """Count the parts of each category and split."""
    from .data.source import open_reader

    reader = open_reader(a.data, a.root, **_pairs(a.reader))
    rows: dict[str, dict[str, Any]] = {}
    for category in [a.category] if a.category else reader.categories():
        rows[category] = {}
        for split in ("train", "validation", "test"):
            if reader.has_split(category, split):
                counts: dict[str, int] = {}
                for record in reader.records(category, split):
                    counts[record.defect or "unknown"] = counts.get(record.defect or "unknown", 0) + 1
                rows[category][split] = counts
    text = "\n".join(
        f"{category:<20} {split:<11} " + ", ".join(f"{defect} {count}" for defect, count in counts.items())
        for category, splits in rows.items()
        for split, counts in splits.items()
    )
    _emit(a, rows, text)
    return 0


def run_data_check(a: argparse.Namespace) -> int:
    """Read and prepare every part once; report planes, valid shares and problems."""
    from dataclasses import asdict

    from .config import build_config
    from .data.parts import Parts
    from .data.preparation import PREPARATIONS, Preparation
    from .data.source import open_reader
    from .fitting.progress import TerminalProgress

    if a.preparation not in PREPARATIONS:
        raise ConfigError(f"unknown preparation '{a.preparation}': {nearest_names(a.preparation, PREPARATIONS)}")
    reader = open_reader(a.data, a.root, **_pairs(a.reader))
    preparation = build_config(Preparation, {**asdict(PREPARATIONS[a.preparation]), **_pairs(a.prepare)})
    report: dict[str, Any] = {"parts": [], "problems": []}

    def look(sample: Any) -> None:
        plane = sample.meta.get("plane")
        row = {"id": sample.id, "valid": round(float(sample.valid.mean()), 4), "flags": list(sample.meta["flags"])}
        report["parts"].append({**row, "plane": plane})

    for category in [a.category] if a.category else reader.categories():
        for split in ("train", "validation", "test"):
            if reader.has_split(category, split):
                broken: dict[str, str] = {}
                records = reader.records(category, split, broken)
                parts = Parts(reader, records, preparation, on_error="skip", broken=broken)
                with TerminalProgress() as progress, progress.task(f"{category}/{split}", len(records)) as advance:
                    parts.check(look, advance)
                report["problems"] += [{"id": part, "reason": reason} for part, reason in parts.skipped]
    flagged = [row for row in report["parts"] if row["flags"]]
    lines = [f"{len(report['parts'])} parts can be read, {len(report['problems'])} cannot, {len(flagged)} are flagged"]
    lines += [f"  {row['id']}: {row['reason']}" for row in report["problems"]]
    lines += [f"  {row['id']}: {', '.join(row['flags'])}" for row in flagged]
    _emit(a, report, "\n".join(lines))
    return 2 if report["problems"] else 0


def run_detectors(a: argparse.Namespace) -> int:
    """List the methods, or show one with all its settings."""
    from .detectors import DETECTORS, describe, detector_class

    if a.name is None:  # nothing heavy is imported for the list
        rows = {name: describe(name) for name in DETECTORS}
        _emit(a, rows, "\n".join(f"{name:<20} {text}" for name, text in rows.items()))
        return 0
    import dataclasses

    kind = detector_class(a.name)
    types = _field_types(kind.Config)
    fields = {f.name: {"type": types[f.name], "default": f.default} for f in dataclasses.fields(kind.Config)}
    shown = {"name": a.name, "about": describe(a.name), "settings": fields, "presets": dict(kind.PRESETS)}
    lines = [f"{a.name}: {describe(a.name)}", "", "settings (polyspect fit --set NAME=VALUE):"]
    lines += [f"  {name:<22} {spec['type']:<34} {spec['default']!r}" for name, spec in fields.items()]
    lines += ["", "presets (--preset NAME):"]
    lines += [
        f"  {name}: " + (", ".join(f"{k}={v!r}" for k, v in values.items()) or "the defaults")
        for name, values in kind.PRESETS.items()
    ]
    _emit(a, shown, "\n".join(lines))
    return 0


def _field_types(config: type[Any]) -> dict[str, str]:
    """Types of a config's fields as they are written; a named type (`Rule`) as the choices that it stands for."""
    written, meant = config.__annotations__, get_type_hints(config)
    return {
        name: str(meant[name]).replace("typing.", "") if re.match(r"(tuple\[)?[A-Z]\w*\b(?!\[)", text) else text
        for name, text in written.items()
    }


def run_fit(a: argparse.Namespace) -> int:
    """Fit, calibrate, save."""
    for name in ("detector", "root", "category", "out"):
        if getattr(a, name) is None:
            raise ConfigError(f"--{name} is missing: give it on the command line or in the --config file")
    if not Path(a.out).parent.is_dir():
        raise ConfigError(f"the folder of --out '{a.out}' does not exist: make it first")
    from . import api
    from .fitting.progress import TerminalProgress

    model = api.fit(
        a.detector,
        data=a.data,
        root=a.root,
        category=a.category,
        out=a.out,
        preset=a.preset,
        settings=_settings(a),
        preparation=a.preparation,
        prepare=_pairs(a.prepare),
        reader_options=_pairs(a.reader),
        seed=a.seed,
        device=a.device,
        precision=a.precision,
        compile=a.compile,
        cache=_cache(a),
        cache_gb=a.cache_gb,
        false_reject=a.false_reject,
        confidence=a.confidence,
        max_train=a.max_train,
        resume=a.resume,
        on_error=a.on_error,
        progress=TerminalProgress(),
    )
    header = model.header()
    size = Path(a.out).stat().st_size / 2**20
    statement = model.calibration.statement if model.calibration else ""
    lines = [f"{a.out}: {a.detector} on {', '.join(model.modalities)}, {size:.1f} MiB", statement]
    lines += [f"skipped {part}: {reason}" for part, reason in header["skipped"]]
    _emit(a, {"model": str(a.out), "bytes": Path(a.out).stat().st_size, **header}, "\n".join(lines))
    return 0


def run_complete(a: argparse.Namespace) -> int:
    """Learn to do without modalities, calibrate every set of them, save."""
    if not Path(a.out).parent.is_dir():
        raise ConfigError(f"the folder of --out '{a.out}' does not exist: make it first")
    if Path(a.out).resolve() == Path(a.model).resolve():
        raise ConfigError(f"--out must name another file than the model, got '{a.out}'")
    from . import api
    from .fitting.progress import TerminalProgress

    model = api.complete(
        api.load(a.model, a.device),
        data=a.data,
        root=a.root,
        category=a.category,
        out=a.out,
        preset=a.preset,
        settings=_pairs(a.set),
        reader_options=_pairs(a.reader),
        seed=a.seed,
        device=a.device,
        precision=a.precision,
        cache=_cache(a),
        cache_gb=a.cache_gb,
        max_train=a.max_train,
        resume=a.resume,
        on_error=a.on_error,
        progress=TerminalProgress(),
    )
    size = Path(a.out).stat().st_size
    lines = [f"{a.out}: {model.name}, {size / 2**20:.1f} MiB"]
    for names in model.choices:
        calibration = model.calibration_for(names)
        lines.append(f"  {', '.join(names):<20} {calibration.statement if calibration else 'not calibrated'}")
    _emit(a, {"model": str(a.out), "bytes": size, **model.header()}, "\n".join(lines))
    return 0


def run_predict(a: argparse.Namespace) -> int:
    """Judge new parts."""
    from . import api
    from .report.verdicts import write_verdicts

    skipped: list[tuple[str, str]] = []
    model = api.load(a.model, a.device)
    results = api.predict(
        model,
        *a.paths,
        data=a.data if a.root else None,
        root=a.root,
        category=a.category,
        split=a.split,
        reader_options=_pairs(a.reader),
        intrinsics=a.intrinsics,
        on_error=a.on_error,
        skipped=skipped,
    )

    def threshold(used: Sequence[str]) -> float | None:
        calibration = model.calibration_for(used)
        return calibration.threshold if calibration else None

    rows = write_verdicts(results, Path(a.out) if a.out else None, skipped, threshold)
    several = len(model.choices) > 1
    lines = [f"{'part':<44} {'score':>10} {'p-value':>8}  decision" + ("        by" if several else "")]
    for row in rows["parts"]:
        p = "-" if row["p_value"] is None else f"{row['p_value']:.3f}"
        by = f"{'':<8}{'+'.join(row['used'])}" if several else ""
        lines.append(f"{row['id']:<44} {row['score']:>10.4f} {p:>8}  {row['decision'] or 'not calibrated'}{by}")
    lines += [f"skipped {item['id']}: {item['reason']}" for item in rows["skipped"]]
    if a.out:
        lines.append(f"written to {Path(a.out).resolve()}")
    _emit(a, rows, "\n".join(lines))
    return 0


def run_evaluate(a: argparse.Namespace) -> int:
    """Evaluate on a labelled split; write table, JSON, maps and the report."""
    from . import api
    from .fitting.progress import TerminalProgress

    results = api.evaluate(
        api.load(a.model, a.device) if a.device != "auto" else a.model,
        data=a.data,
        root=a.root,
        category=a.category,
        split=a.split,
        out=a.out,
        reader_options=_pairs(a.reader),
        bootstrap=a.bootstrap,
        ignore_invalid=a.ignore_invalid,
        cache=_cache(a),
        on_error=a.on_error,
        only=[name.strip() for name in a.only.split(",")] if a.only else None,
        progress=TerminalProgress(),
    )
    if a.json:
        print(json.dumps({k: v for k, v in results.as_dict().items() if k not in ("parts", "curves")}))
        return 0
    _print_results(results)
    if a.out:
        print(f"report: {(Path(a.out) / 'report.html').resolve()}")
    return 0


def run_report(a: argparse.Namespace) -> int:
    """Write the HTML page of a results folder again."""
    from .report.html import write_report

    page = write_report(Path(a.folder), out=Path(a.out) if a.out else None, max_parts=a.parts)
    _emit(a, {"report": str(page)}, f"report: {page.resolve()}")
    return 0


def run_weights_list(a: argparse.Namespace) -> int:
    """List the pretrained weights that are known, and what is here."""
    from dataclasses import asdict

    from .weights.catalogue import list_weights

    rows = list_weights(folder=a.folder)
    text = "\n".join(f"{row.name:<28} {'here' if row.available else 'absent':<7} {row.where}" for row in rows)
    _emit(a, [asdict(row) for row in rows], text)
    return 0


def run_weights_check(a: argparse.Namespace) -> int:
    """Find pretrained weights on this machine and verify them."""
    from .weights.catalogue import check

    return _emit_weights(a, check(a.name, folder=a.folder))


def run_weights_fetch(a: argparse.Namespace) -> int:
    """Bring pretrained weights to the weight folder."""
    from .weights.catalogue import fetch

    return _emit_weights(a, fetch(a.name, folder=a.folder))


def _emit_weights(a: argparse.Namespace, found: Any) -> int:
    row = {"name": found.name, "path": str(found.path), "sha256": found.sha256, "source": found.source}
    _emit(a, row, f"{found.name}: {found.path} (from {found.source}), sha256 {found.sha256}")
    return 0


def run_weights_import(a: argparse.Namespace) -> int:
    """Bring a published checkpoint to our names and write it without pickle."""
    from .errors import WeightsError
    from .fitting.modelfile import FORMAT, write_tensors
    from .weights.official import FORMATS, checkpoint_source, read_checkpoint

    out = Path(a.out).expanduser()
    if out.suffix != ".safetensors":
        raise ConfigError(f"--out must name a .safetensors file, got '{a.out}'")
    if out.resolve() == Path(a.file).expanduser().resolve():
        raise ConfigError(f"--out must name another file than the published one, got '{a.out}'")
    imported, digest = read_checkpoint(a.file, a.source_format), checkpoint_source(a.file)["sha256"]
    if imported.made_from is not None:
        use = FORMATS[imported.format].use.format(a.file)
        raise ConfigError(f"'{a.file}' is imported already: use it with {imported.detector} --set {use}")
    try:
        write_tensors(out, imported.tensors, {"format": FORMAT, **imported.header(digest)})
    except OSError as error:
        raise WeightsError(f"cannot write {out}: {error.strerror or error}; choose another --out") from None
    reasons: dict[str, list[str]] = {}
    for name, why in imported.dropped.items():
        reasons.setdefault(why, []).append(name)
    shown = {"out": str(out), **imported.about(digest), "dropped": reasons}
    shown |= {"tensors": len(imported.tensors), "parameters": imported.parameters}
    lines = [
        f"{out}: {shown['tensors']} tensors, {shown['parameters']:,} parameters for detector {imported.detector}"
        + (f", modalities {','.join(imported.modalities)}" if imported.modalities else ""),
        f"imported from {a.file} (format {imported.format}), sha256 {digest}",
        *(f"dropped {len(names)} ({_few(names)}): {why}" for why, names in reasons.items()),
        *([] if reasons else ["dropped nothing"]),
        f"use it with --set {FORMATS[imported.format].use.format(out)}, behind the networks and the preparation that "
        "it was trained with",
    ]
    _emit(a, shown, "\n".join(lines))
    return 0


def run_weights_pretrain(a: argparse.Namespace) -> int:
    """Pre-train a point transformer and write its encoder."""
    out = _weights_out(a.out)
    import math

    from .data.cloud_folder import CloudFolder
    from .data.shape_clouds import ShapeClouds
    from .fitting.pretraining import PAPER, CloudSource, PretrainingConfig, pretrain, write_encoder
    from .fitting.progress import TerminalProgress

    names = ["size", "steps", "batch_size", "points", "groups", "group_size", "mask_ratio", "masking", "loss"]
    names += ["shape_weight", "lr"]
    given = {name: getattr(a, name) for name in names if getattr(a, name) is not None}
    for name in ("groups", "group_size"):
        if len(given.get(name, ())) == 1:
            given[name] *= 2
    settings = {**(PAPER if a.paper else {}), **given, "seed": a.seed}
    source: CloudSource = CloudFolder(a.clouds) if a.clouds else ShapeClouds(a.shapes, a.seed, a.pixels)
    if a.epochs is not None:
        batch = settings.get("batch_size", PretrainingConfig.batch_size)
        settings["steps"] = math.ceil(a.epochs * len(source) / batch)
    config = PretrainingConfig(**settings)
    checkpoint = out.with_suffix(".checkpoint.safetensors")
    trained = pretrain(
        source,
        config,
        device=a.device,
        checkpoint=checkpoint,
        resume=a.resume,
        stop_after=a.stop_after,
        cooldown=a.cooldown,
        progress=TerminalProgress(),
    )
    return _emit_run(
        a,
        trained,
        config.steps,
        partial(write_encoder, out, trained, source, config, half=not a.fp32),
        f"point transformer of size {config.size}",
        f"on {len(source)} clouds",
    )


def run_weights_distil(a: argparse.Namespace) -> int:
    """Distil a frozen image network into a patch description network and write that."""
    out = _weights_out(a.out)
    if not a.images and a.made_up is None:
        raise ConfigError("name the pictures to learn from: --images FOLDER, --made-up N, or both")
    from .data.image_folder import ImageFolder
    from .data.made_up_images import MadeUpImages
    from .fitting.pdn_distillation import PAPER, DistillationConfig, ImageSource, distil, write_network
    from .fitting.progress import TerminalProgress

    names = ("size", "backbone", "weights", "steps", "batch_size", "pixels", "crop", "lr", "statistics", "precision")
    given = {name: getattr(a, name) for name in names if getattr(a, name) is not None}
    config = DistillationConfig(**{**(PAPER if a.paper else {}), **given, "seed": a.seed})
    sources: list[ImageSource] = [ImageFolder(folder) for folder in a.images or ()]
    if a.made_up is not None:
        sources.append(MadeUpImages(a.made_up, a.seed))
    checkpoint = out.with_suffix(".checkpoint.safetensors")
    distilled = distil(
        sources,
        config,
        device=a.device,
        checkpoint=checkpoint,
        resume=a.resume,
        stop_after=a.stop_after,
        cooldown=a.cooldown,
        progress=TerminalProgress(),
    )
    return _emit_run(
        a,
        distilled,
        config.steps,
        partial(write_network, out, distilled, sources, config, half=not a.fp32),
        f"patch description network of size {config.size}",
        f"of {config.batch_size} pictures",
        " (1 is the answer of a network that has learned nothing)",
    )


def _emit_run(
    a: argparse.Namespace,
    made: Pretrained | Distilled,
    steps: int,
    write: Callable[[], None],
    what: str,
    of: str,
    measure: str = "",
) -> int:
    """Write the weights of a run that is at its end, or say how to go on with it."""
    out = Path(a.out).expanduser()
    checkpoint = out.with_suffix(".checkpoint.safetensors")
    if a.cooldown is None and made.updates < steps:
        text = f"{made.updates} of {steps} updates made: go on with --resume ({checkpoint})"
        _emit(a, {"checkpoint": str(checkpoint), "updates": made.updates}, text)
        return 0
    write()
    size, loss = out.stat().st_size, made.curve[-1][1]
    shown = {"out": str(out), "bytes": size, "steps": made.updates, "loss": loss, "seconds": round(made.seconds, 1)}
    text = (
        f"{out}: {what}, {size / 1e6:.2f} MB\n"
        f"{made.updates} updates {of} in {made.seconds / 60:.1f} min, last loss {loss:.4g}{measure}\n"
        f"{checkpoint} is no longer needed"
    )
    _emit(a, shown | {"curve": made.curve}, text)
    return 0


def _weights_out(name: str) -> Path:
    """The file that --out names, in a folder that is there."""
    out = Path(name).expanduser()
    if out.suffix != ".safetensors":
        raise ConfigError(f"--out must name a .safetensors file, got '{name}'")
    if not out.parent.is_dir():
        raise ConfigError(f"the folder of --out '{name}' does not exist: make it first")
    return out


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def run_info(a: argparse.Namespace) -> int:
    """What is installed, or what a model file says of itself."""
    if a.model:
        from .model import describe

        header = describe(a.model)
        _emit(a, header, json.dumps(header, indent=2))
        return 0
    import importlib.metadata
    import importlib.util
    import os

    names = (
        "torch",
        "torchvision",
        "timm",
        "numpy",
        "scipy",
        "opencv-python-headless",
        "lightning-fabric",
        "safetensors",
    )
    info: dict[str, Any] = {"polyspect": __version__, "python": sys.version.split()[0], "cpus": os.cpu_count()}
    info["packages"] = {}
    for name in names:
        try:
            info["packages"][name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            info["packages"][name] = None
    info["extras"] = {name: importlib.util.find_spec(name) is not None for name in ("open3d", "anomalib")}
    import torch

    info["cuda"] = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    info["threads"] = torch.get_num_threads()
    _emit(a, info, json.dumps(info, indent=2))
    return 0


# -- printing and small parsing --------------------------------------------------------------------------------------


def _emit(a: argparse.Namespace, value: Any, text: str) -> None:
    print(json.dumps(value, default=str) if a.json else text)


def _print_results(results: Any) -> None:
    from rich.console import Console

    from .report.table import results_table

    Console(width=None if sys.stdout.isatty() else 110).print(results_table(results))


def _pairs(items: Sequence[str] | None) -> dict[str, Any]:
    """``["size=224", "aspect=pad"]`` -> typed values, read as YAML."""
    import yaml

    pairs: dict[str, Any] = {}
    for item in items or ():
        name, equals, value = item.partition("=")
        if not equals or not name:
            raise ConfigError(f"'{item}' is not of the form name=value")
        try:
            pairs[name.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"the value of '{name}' cannot be read as YAML: {error}") from None
    return pairs


def _settings(a: argparse.Namespace) -> dict[str, Any]:
    settings = _pairs(a.set)
    if a.modalities:
        names = a.modalities.split(",") if isinstance(a.modalities, str) else list(a.modalities)
        settings["modalities"] = [name.strip() for name in names]
    return settings


def _cache(a: argparse.Namespace) -> str | None:
    return None if a.no_cache else a.cache or str(Path.home() / ".cache" / "polyspect")
