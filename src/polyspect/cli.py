"""The command line: parses, calls `polyspect.api`, prints. Nothing heavy is imported until a command runs."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .errors import ConfigError, PolyspectError, nearest_names
from .version import __version__

EXAMPLES = """\
examples:
  polyspect demo
  polyspect data make-synthetic parts --categories bracket --train 60
  polyspect fit --detector crd --preset fast --root parts --category bracket --out bracket.safetensors
  polyspect evaluate bracket.safetensors --root parts --category bracket --out results
  polyspect predict bracket.safetensors part.png part.tiff
  polyspect COMMAND --help      every command has examples of its own
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 2 bad input (one line on standard error), 130 interrupted."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="polyspect: %(message)s", stream=sys.stderr)
    for name in ("timm", "lightning_fabric", "huggingface_hub", "matplotlib", "PIL", "httpx"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if not getattr(arguments, "run", None):
        parser.print_help()
        return 0
    try:
        if getattr(arguments, "config", None):
            arguments = _with_config(parser, argv, arguments)
        return int(arguments.run(arguments) or 0)
    except PolyspectError as error:
        print(f"polyspect: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("polyspect: interrupted; a fit goes on from its checkpoint with --resume", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0


# -- commands --------------------------------------------------------------------------------------------------------


def run_demo(a: argparse.Namespace) -> int:
    """Generate synthetic parts, fit, evaluate, report."""
    from . import api
    from .data.synthetic import write_dataset
    from .fitting.progress import TerminalProgress

    out = Path(a.out)
    categories = a.categories.split(",")
    with TerminalProgress() as progress, progress.task("synthetic parts", len(categories)) as advance:
        for category in categories:
            write_dataset(
                out / "data",
                categories=[category],
                train=a.train,
                validation=a.validation,
                test_good=a.test_good,
                test_per_defect=a.test_per_defect,
                size=a.size,
                seed=a.seed,
            )
            advance(1, note=category)
    for category in categories:
        model_file = out / f"{category}-{a.detector}.safetensors"
        api.fit(
            a.detector,
            preset=a.preset,
            root=out / "data",
            category=category,
            out=model_file,
            settings=_settings(a),
            prepare=_pairs(a.prepare),
            cache=out / "cache",
            progress=TerminalProgress(),
        )
        results = api.evaluate(
            model_file,
            root=out / "data",
            category=category,
            out=out / f"report-{category}",
            cache=out / "cache",
            progress=TerminalProgress(),
        )
        _print_results(results)
        print(f"report: {(out / f'report-{category}' / 'report.html').resolve()}")
    return 0


def run_make_synthetic(a: argparse.Namespace) -> int:
    """Write synthetic parts in MVTec 3D-AD layout."""
    from .data.synthetic import CATEGORIES, write_dataset
    from .fitting.progress import TerminalProgress

    wanted = list(CATEGORIES) if a.categories == "all" else a.categories.split(",")
    for name in wanted:
        if name not in CATEGORIES:
            raise ConfigError(f"unknown synthetic category '{name}': {nearest_names(name, CATEGORIES)}")
    with TerminalProgress() as progress, progress.task("synthetic categories", len(wanted)) as advance:
        summary: dict[str, Any] = {}
        for name in wanted:
            summary[name] = write_dataset(
                a.folder,
                categories=[name],
                train=a.train,
                validation=a.validation,
                test_good=a.test_good,
                test_per_defect=a.test_per_defect,
                size=a.size,
                seed=a.seed,
                camera=a.camera,
                overwrite=a.overwrite,
            )
            advance(1, note=name)
    _emit(a, summary, f"{len(wanted)} synthetic categories in {Path(a.folder).resolve()}")
    return 0


def run_data_list(a: argparse.Namespace) -> int:
    """Count the parts of each category and split."""
    from .data.source import open_reader

    reader = open_reader(a.data, a.root, **_pairs(a.reader))
    rows: dict[str, dict[str, Any]] = {}
    for category in reader.categories():
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
    from .config import build_config
    from .data.parts import Parts
    from .data.preparation import PREPARATIONS, Preparation
    from .data.source import open_reader
    from .fitting.progress import TerminalProgress

    reader = open_reader(a.data, a.root, **_pairs(a.reader))
    from dataclasses import asdict

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

    if a.name is None:
        rows = {name: describe(name) for name in DETECTORS}
        _emit(a, rows, "\n".join(f"{name:<14} {text}" for name, text in rows.items()))
        return 0
    import dataclasses

    kind = detector_class(a.name)
    fields = {f.name: {"type": str(f.type), "default": f.default} for f in dataclasses.fields(kind.Config)}
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


def run_predict(a: argparse.Namespace) -> int:
    """Judge new parts."""
    from . import api
    from .evaluation.predictions import write_predictions

    skipped: list[tuple[str, str]] = []
    results = api.predict(
        api.load(a.model, a.device),
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
    rows = write_predictions(results, Path(a.out) if a.out else None, skipped)
    lines = [f"{'part':<44} {'score':>10} {'p-value':>8}  decision"]
    for row in rows["parts"]:
        p = "-" if row["p_value"] is None else f"{row['p_value']:.3f}"
        lines.append(f"{row['id']:<44} {row['score']:>10.4f} {p:>8}  {row['decision'] or 'not calibrated'}")
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
        cache=_cache(a),
        on_error=a.on_error,
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


def run_weights(a: argparse.Namespace) -> int:
    """List, check or fetch pretrained weights."""
    from dataclasses import asdict

    from .weights.catalogue import check, fetch, list_weights

    if a.action == "list":
        rows = list_weights(folder=a.folder)
        text = "\n".join(f"{row.name:<28} {'here' if row.available else 'absent':<7} {row.where}" for row in rows)
        _emit(a, [asdict(row) for row in rows], text)
        return 0
    if a.name is None:
        raise ConfigError(
            f"`polyspect weights {a.action}` needs the name of a backbone; `polyspect weights list` shows them"
        )
    found = fetch(a.name, folder=a.folder) if a.action == "fetch" else check(a.name, folder=a.folder)
    row = {"name": found.name, "path": str(found.path), "sha256": found.sha256, "source": found.source}
    _emit(a, row, f"{found.name}: {found.path} (from {found.source}), sha256 {found.sha256}")
    return 0


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


def _with_config(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, arguments: argparse.Namespace
) -> argparse.Namespace:
    """Parse again with the YAML file's values as defaults, so that the command line wins."""
    import yaml

    path = Path(arguments.config)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"the config file '{path}' cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"the config file '{path}' must hold 'name: value' lines, got {type(values).__name__}")
    known = set(vars(arguments)) - {"run", "config", "command", "json"}
    for key in values:
        if str(key).replace("-", "_") not in known:
            raise ConfigError(f"unknown key '{key}' in '{path}': {nearest_names(str(key), known)}")
    defaults = {str(key).replace("-", "_"): value for key, value in values.items()}
    for name in ("set", "prepare", "reader"):  # the options that may be repeated
        if isinstance(defaults.get(name), dict):
            defaults[name] = [f"{key}={json.dumps(value)}" for key, value in defaults[name].items()]
    arguments.subparser.set_defaults(**defaults)
    return parser.parse_args(argv)


# -- the parser ------------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """The whole command line as an argument parser."""
    parser = _parser(
        argparse.ArgumentParser, "polyspect", "Find defects from registered RGB, 3D and normals.", EXAMPLES
    )
    parser.add_argument("--version", action="version", version=f"polyspect {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")

    def command(
        name: str, run: Callable[[argparse.Namespace], int], text: str, examples: str
    ) -> argparse.ArgumentParser:
        sub = _parser(commands.add_parser, name, text, "examples:\n" + examples)
        sub.set_defaults(run=run, subparser=sub)
        sub.add_argument("--json", action="store_true", help="print one JSON object instead of text")
        return sub

    _add_demo(command)
    _add_data(commands)
    sub = command(
        "detectors",
        run_detectors,
        "List the methods, or show one with its settings and presets.",
        "  polyspect detectors\n  polyspect detectors crd --json\n",
    )
    sub.add_argument("name", nargs="?", help="show this method")
    _add_fit(command)
    _add_predict(command)
    _add_evaluate(command)
    sub = command(
        "report", run_report, "Write report.html of a results folder again.", "  polyspect report results --parts 48\n"
    )
    sub.add_argument("folder", help="what `polyspect evaluate --out` wrote")
    sub.add_argument("--out", help="page to write (default: FOLDER/report.html)")
    sub.add_argument("--parts", type=int, default=24, help="parts shown with pictures (default: %(default)s)")
    sub = command(
        "weights",
        run_weights,
        "Where pretrained weights come from.",
        "  polyspect weights list\n  polyspect weights check efficientnet_lite0\n"
        "  polyspect weights fetch wide_resnet50_2.tv_in1k\n",
    )
    sub.add_argument("action", choices=["list", "check", "fetch"])
    sub.add_argument("name", nargs="?", help="a backbone's timm name")
    sub.add_argument("--folder", help="weight folder (default: $POLYSPECT_WEIGHTS or ~/.cache/polyspect/weights)")
    sub = command(
        "info",
        run_info,
        "What is installed here, or what a model file says of itself.",
        "  polyspect info\n  polyspect info bracket.safetensors\n",
    )
    sub.add_argument("model", nargs="?", help="a model file")
    return parser


def _parser(make: Callable[..., Any], name: str, text: str, epilog: str) -> Any:
    key = "prog" if make is argparse.ArgumentParser else "name"
    extra = {} if key == "prog" else {"help": text}
    arguments = (name,) if key == "name" else ()
    named = {"prog": name} if key == "prog" else {}
    return make(
        *arguments,
        description=text,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **named,
        **extra,
    )


def _add_source(sub: argparse.ArgumentParser, *, required: bool = True) -> None:
    group = sub.add_argument_group("data set")
    group.add_argument("--data", default="mvtec3d", help="reader: mvtec3d, eyecandies or folder (default: %(default)s)")
    group.add_argument("--root", required=required, help="folder of the data set")
    group.add_argument("--category", required=required, help="category in the data set's spelling")
    group.add_argument("--reader", action="append", metavar="NAME=VALUE", help="option of the reader, e.g. unit=mm")


def _add_run(sub: argparse.ArgumentParser) -> None:
    group = sub.add_argument_group("running")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: %(default)s)")
    group.add_argument("--on-error", choices=["raise", "skip"], default="raise", help="what a bad part does")


def _add_cache(sub: argparse.ArgumentParser) -> None:
    group = sub.add_argument_group("cache")
    group.add_argument("--cache", metavar="DIR", help="prepared parts and features (default: ~/.cache/polyspect)")
    group.add_argument("--no-cache", action="store_true", help="keep nothing on disk")


def _add_method(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--preset", help="named settings of the method: paper, fast")
    sub.add_argument("--modalities", help="comma-separated, e.g. rgb,depth")
    sub.add_argument("--set", action="append", metavar="NAME=VALUE", help="one setting of the method (repeatable)")
    sub.add_argument("--prepare", action="append", metavar="NAME=VALUE", help="one setting of the preparation")


def _add_demo(command: Callable[..., argparse.ArgumentParser]) -> None:
    sub = command(
        "demo",
        run_demo,
        "Generate synthetic parts, fit, evaluate, and write a report: the whole road in one command.",
        "  polyspect demo\n  polyspect demo --categories bracket,cord --detector patchcore\n",
    )
    sub.add_argument("--out", default="demo", help="folder for everything (default: %(default)s)")
    sub.add_argument("--categories", default="bracket", help="comma-separated synthetic categories")
    sub.add_argument("--detector", default="crd")
    _add_method(sub)
    sub.set_defaults(preset="fast")
    _add_synthetic(sub, train=80, validation=30, test_good=20, test_per_defect=4)


def _add_synthetic(sub: argparse.ArgumentParser, **counts: int) -> None:
    for name, value in counts.items():
        sub.add_argument(f"--{name.replace('_', '-')}", type=int, default=value, help="number of parts (%(default)s)")
    sub.add_argument("--size", type=int, default=256, help="pixels per side (default: %(default)s)")
    sub.add_argument("--seed", type=int, default=0)


def _add_data(commands: Any) -> None:
    data = _parser(
        commands.add_parser,
        "data",
        "Make, list and check data sets.",
        "examples:\n  polyspect data make-synthetic parts\n  polyspect data list --root parts\n"
        "  polyspect data check --root parts --category bracket\n",
    )
    kinds = data.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(
        name: str, run: Callable[[argparse.Namespace], int], text: str, examples: str
    ) -> argparse.ArgumentParser:
        sub = _parser(kinds.add_parser, name, text, "examples:\n" + examples)
        sub.set_defaults(run=run, subparser=sub)
        sub.add_argument("--json", action="store_true", help="print one JSON object instead of text")
        return sub

    sub = command(
        "make-synthetic",
        run_make_synthetic,
        "Render synthetic parts with known defects, in MVTec 3D-AD layout.",
        "  polyspect data make-synthetic parts --categories bracket,cord --train 60 --seed 1\n",
    )
    sub.add_argument("folder")
    sub.add_argument("--categories", default="all", help="comma-separated, or all (default)")
    sub.add_argument("--camera", choices=["pinhole", "orthographic"], default="pinhole")
    sub.add_argument("--overwrite", action="store_true", help="write into a folder that holds something else")
    _add_synthetic(sub, train=60, validation=20, test_good=20, test_per_defect=8)
    sub = command("list", run_data_list, "Count parts per category and split.", "  polyspect data list --root parts\n")
    _add_source(sub, required=False)
    sub = command(
        "check",
        run_data_check,
        "Read and prepare every part once and say what is wrong; exit status 2 if any part cannot be used.",
        "  polyspect data check --root parts --category bracket --prepare background=plane\n",
    )
    _add_source(sub, required=False)
    sub.add_argument("--preparation", default="default", help="named preparation (default: %(default)s)")
    sub.add_argument("--prepare", action="append", metavar="NAME=VALUE", help="one setting of the preparation")


def _add_fit(command: Callable[..., argparse.ArgumentParser]) -> None:
    sub = command(
        "fit",
        run_fit,
        "Learn from good parts, calibrate on validation parts, write one model file.",
        "  polyspect fit --detector crd --preset fast --root parts --category bracket --out bracket.safetensors\n"
        "  polyspect fit --detector patchcore --modalities rgb --root parts --category bracket --out rgb.safetensors\n"
        "  polyspect fit --config fit.yaml --set epochs=20 --resume\n",
    )
    sub.add_argument("--config", help="YAML file with any of these options; the command line wins")
    sub.add_argument("--detector", help="method, see `polyspect detectors`")
    sub.add_argument("--out", help="model file to write")
    _add_method(sub)
    sub.add_argument("--preparation", help="named preparation (default: the one that goes with the preset)")
    _add_source(sub, required=False)
    _add_run(sub)
    sub.add_argument("--precision", default="32-true", help="32-true, bf16-mixed or 16-mixed (default: %(default)s)")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--max-train", type=int, help="use only this many training parts (few-shot)")
    sub.add_argument("--resume", action="store_true", help="go on from the checkpoint of a fit that was stopped")
    _add_cache(sub)
    sub.add_argument("--cache-gb", type=float, default=8.0, help="most that cached features may take")
    group = sub.add_argument_group("calibration")
    group.add_argument("--false-reject", type=float, default=0.05, help="wished share of rejected good parts (0.05)")
    group.add_argument("--confidence", type=float, default=0.95, help="confidence of the statement on it (0.95)")


def _add_predict(command: Callable[..., argparse.ArgumentParser]) -> None:
    sub = command(
        "predict",
        run_predict,
        "Judge new parts: the files of one part, a folder, or a split of a data set. No ground truth is needed.",
        "  polyspect predict bracket.safetensors part.png part.tiff\n"
        "  polyspect predict bracket.safetensors new_parts/ --out verdicts\n"
        "  polyspect predict bracket.safetensors --root parts --category bracket --split test --json\n",
    )
    sub.add_argument("model", help="model file")
    sub.add_argument("paths", nargs="*", help="the files of one part (FILE or ROLE=FILE), or a folder")
    sub.add_argument("--out", help="folder for predictions.csv, predictions.json and a map per part")
    sub.add_argument("--split", default="test")
    sub.add_argument("--intrinsics", help="camera file (JSON or YAML), where a depth image is given")
    _add_source(sub, required=False)
    _add_run(sub)


def _add_evaluate(command: Callable[..., argparse.ArgumentParser]) -> None:
    sub = command(
        "evaluate",
        run_evaluate,
        "Metrics with intervals on a labelled split, and a report that opens offline.",
        "  polyspect evaluate bracket.safetensors --root parts --category bracket --out results\n"
        "  polyspect evaluate bracket.safetensors --root parts --category bracket --json\n",
    )
    sub.add_argument("model", help="model file")
    sub.add_argument("--out", help="folder for results.json, parts.csv, maps and report.html")
    sub.add_argument("--split", default="test")
    sub.add_argument("--bootstrap", type=int, default=200, help="resamples for the intervals, 0 for none (200)")
    _add_source(sub)
    _add_run(sub)
    _add_cache(sub)


if __name__ == "__main__":
    raise SystemExit(main())
