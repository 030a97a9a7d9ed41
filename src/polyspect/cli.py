"""The command line: one parser per command. What a command does is in `polyspect.commands`."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from . import commands as do
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

    command = partial(_command, commands)
    _add_demo(command)
    _add_data(commands)
    sub = command(
        "detectors",
        do.run_detectors,
        "List the methods, or show one with its settings and presets.",
        "  polyspect detectors\n  polyspect detectors crd --json\n",
    )
    sub.add_argument("name", nargs="?", help="show this method")
    _add_fit(command)
    _add_complete(command)
    _add_predict(command)
    _add_evaluate(command)
    sub = command(
        "report",
        do.run_report,
        "Write report.html of a results folder again.",
        "  polyspect report results\n",
    )
    sub.add_argument("folder", help="what `polyspect evaluate --out` wrote")
    sub.add_argument("--out", help="page to write (default: FOLDER/report.html)")
    sub.add_argument("--parts", type=int, default=24, help="parts shown with pictures (default: %(default)s)")
    _add_weights(commands)
    sub = command(
        "info",
        do.run_info,
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


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], text: str, examples: str
) -> argparse.ArgumentParser:
    sub: argparse.ArgumentParser = _parser(commands.add_parser, name, text, "examples:\n" + examples)
    sub.set_defaults(run=run, subparser=sub)
    sub.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    return sub


def _group(commands: Any, name: str, text: str, examples: str) -> Callable[..., argparse.ArgumentParser]:
    """A command with commands of its own; returns what adds one."""
    group = _parser(commands.add_parser, name, text, "examples:\n" + examples)
    return partial(_command, group.add_subparsers(title="commands", metavar="COMMAND", required=True))


def _add_source(sub: argparse.ArgumentParser, *, root: bool = False, category: bool = False) -> None:
    group = sub.add_argument_group("data set")
    group.add_argument("--data", default="mvtec3d", help="reader: mvtec3d, eyecandies or folder (default: %(default)s)")
    group.add_argument("--root", required=root, help="folder of the data set")
    group.add_argument("--category", required=category, help="category in the data set's spelling")
    group.add_argument("--reader", action="append", metavar="NAME=VALUE", help="option of the reader, e.g. unit=mm")


def _add_run(sub: argparse.ArgumentParser) -> None:
    group = sub.add_argument_group("running")
    group.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
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
        do.run_demo,
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
    sub.add_argument("--workers", type=int, default=1, help="processes that render (default: %(default)s)")


def _add_data(commands: Any) -> None:
    command = _group(
        commands,
        "data",
        "Make, list and check data sets.",
        "  polyspect data make-synthetic parts\n  polyspect data list --root parts\n"
        "  polyspect data check --root parts --category bracket\n",
    )
    sub = command(
        "make-synthetic",
        do.run_make_synthetic,
        "Render synthetic parts with known defects, in MVTec 3D-AD layout.",
        "  polyspect data make-synthetic parts --categories bracket,cord --train 60 --seed 1\n",
    )
    sub.add_argument("folder")
    sub.add_argument("--categories", default="all", help="comma-separated, or all (default)")
    sub.add_argument("--camera", choices=["pinhole", "orthographic"], default="pinhole")
    sub.add_argument("--overwrite", action="store_true", help="write into a folder that holds something else")
    _add_synthetic(sub, train=60, validation=20, test_good=20, test_per_defect=8)
    sub = command("list", do.run_data_list, "Count the parts there are.", "  polyspect data list --root parts\n")
    _add_source(sub, root=True)
    sub = command(
        "check",
        do.run_data_check,
        "Read and prepare every part once and say what is wrong; exit status 2 if any part cannot be used.",
        "  polyspect data check --root parts --category bracket --prepare background=plane\n",
    )
    _add_source(sub, root=True)
    sub.add_argument("--preparation", default="default", help="named preparation (default: %(default)s)")
    sub.add_argument("--prepare", action="append", metavar="NAME=VALUE", help="one setting of the preparation")


def _add_weights(commands: Any) -> None:
    command = _group(
        commands,
        "weights",
        "Where pretrained weights come from, and checkpoints that others published.",
        "  polyspect weights list\n  polyspect weights check efficientnet_lite0\n"
        "  polyspect weights fetch wide_resnet50_2.tv_in1k\n"
        "  polyspect weights import --from crd published.pth --out students.safetensors\n",
    )
    kinds = [
        command(
            "list", do.run_weights_list, "What is known, and what is here.", "  polyspect weights list --folder here\n"
        ),
        command(
            "check",
            do.run_weights_check,
            "Find weights on this machine and verify their hash.",
            "  polyspect weights check efficientnet_lite0\n",
        ),
        command(
            "fetch",
            do.run_weights_fetch,
            "Download weights, verify and keep them.",
            "  polyspect weights fetch wide_resnet50_2.tv_in1k\n",
        ),
    ]
    for sub in kinds:
        sub.add_argument("--folder", help="weight folder (default: $POLYSPECT_WEIGHTS or ~/.cache/polyspect/weights)")
    for sub in kinds[1:]:
        sub.add_argument("name", help="a backbone's timm name")
    sub = command(
        "import",
        do.run_weights_import,
        "Bring a published checkpoint to our names, as safetensors; runs no pickled code.",
        "  polyspect weights import --from crd published.pth --out students.safetensors\n"
        "  polyspect weights import --from anomalib-rd model.ckpt --out student.safetensors --json\n"
        "  polyspect weights import pointmae_pretrain.pth --out point_mae.safetensors\n"
        "  polyspect fit --detector crd --preset paper --set checkpoint=students.safetensors --root parts "
        "--category bagel --out bagel.safetensors\n",
    )
    sub.add_argument("file", help="the published file: .pth, .pt, .ckpt, .tar or .safetensors")
    sub.add_argument(
        "--from",
        dest="source_format",
        metavar="FORMAT",
        help="crd, rd4ad, anomalib-rd, stfpm, m3dm-uff, cmdiad-f2f, cmdiad-f2f-conv, cmdiad-f2i, cmdiad-f2i-mlp, "
        "cmdiad-i2f, cfm or point-mae (default: told by its names)",
    )
    sub.add_argument("--out", required=True, help="file to write, .safetensors")
    _add_pretraining(command)
    _add_distillation(command)


def _add_pretraining(command: Callable[..., argparse.ArgumentParser]) -> None:
    sub = command(
        "pretrain-point-mae",
        do.run_weights_pretrain,
        "Train a point transformer on clouds without labels (Point-MAE), and write its encoder as a weights file.",
        "  polyspect weights pretrain-point-mae --shapes 1000 --out own.safetensors\n"
        "  polyspect weights pretrain-point-mae --clouds scans/xyz --epochs 20 --seed 1 --out scans.safetensors\n"
        "  polyspect weights pretrain-point-mae --clouds shapenet --paper --epochs 300 --out base.safetensors\n"
        "  polyspect weights pretrain-point-mae --shapes 1000 --out own.safetensors --resume\n",
    )
    clouds = sub.add_mutually_exclusive_group(required=True)
    clouds.add_argument(
        "--clouds", metavar="FOLDER", help="PLY, PCD, TIFF, NPY or NPZ clouds, in folders below as well"
    )
    clouds.add_argument("--shapes", type=int, metavar="N", help="N made-up shapes as a depth camera sees them")
    sub.add_argument("--pixels", type=int, default=160, help="with --shapes: side of the depth image (%(default)s)")
    sub.add_argument("--out", required=True, help="file to write, .safetensors")
    length = sub.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="updates (default: 800)")
    length.add_argument("--epochs", type=float, help="passes over the clouds, instead of --steps")
    sub.add_argument("--paper", action="store_true", help="the paper's settings and size where none is given here")
    sub.add_argument("--size", choices=["small", "base"], help="of the network (default: small)")
    sub.add_argument("--batch-size", type=int, help="clouds per update (default: 8)")
    sub.add_argument("--points", type=int, help="points drawn from a cloud (default: 6144)")
    for name, what, default in (("groups", "groups per cloud", "96 160"), ("group-size", "points per group", "48 96")):
        sub.add_argument(
            f"--{name}",
            type=int,
            nargs="+",
            metavar="N",
            help=f"{what}: one number, or least and most (default: {default})",
        )
    sub.add_argument("--mask-ratio", type=float, help="share of the groups that is hidden (default: 0.4)")
    sub.add_argument("--masking", choices=["random", "block"], help="which groups are hidden (default: random)")
    sub.add_argument("--loss", choices=["l2", "l1"], help="Chamfer distance, squared or not (default: l2)")
    sub.add_argument(
        "--shape-weight", type=float, help="weight of telling each group's histogram of angles; 0: do not (default: 1)"
    )
    sub.add_argument("--lr", type=float, help="highest learning rate (default: 0.001)")
    _add_updates(sub)


def _add_distillation(command: Callable[..., argparse.ArgumentParser]) -> None:
    sub = command(
        "distil-pdn",
        do.run_weights_distil,
        "Distil a frozen image network into a patch description network (PDN), the teacher of MDSS and EfficientAD, "
        "and write it as a weights file.",
        "  polyspect weights distil-pdn --made-up 50000 --out own.safetensors\n"
        "  polyspect weights distil-pdn --images photos --made-up 50000 --steps 4000 --out own.safetensors\n"
        "  polyspect weights distil-pdn --images imagenet/train --paper --out paper.safetensors\n"
        "  polyspect weights distil-pdn --made-up 50000 --out own.safetensors --resume\n",
    )
    sub.add_argument(
        "--images",
        metavar="FOLDER",
        nargs="+",
        help="PNG, JPEG, BMP or TIFF pictures, in folders below as well; each folder gives as many as any other source",
    )
    sub.add_argument("--made-up", type=int, metavar="N", help="N made-up pictures of textures and things")
    sub.add_argument("--out", required=True, help="file to write, .safetensors")
    sub.add_argument("--paper", action="store_true", help="EfficientAD's settings where none is given here")
    sub.add_argument("--backbone", help="the frozen network, a name of timm's (default: efficientnet_lite0)")
    sub.add_argument("--weights", help="its weights: auto, a file or a folder (default: auto)")
    sub.add_argument("--size", choices=["small", "medium"], help="of the PDN (default: small)")
    sub.add_argument("--steps", type=int, help="updates (default: 4000)")
    sub.add_argument("--batch-size", type=int, help="pictures per update (default: 4)")
    sub.add_argument("--pixels", type=int, help="side of a picture as the PDN sees it (default: 128)")
    sub.add_argument(
        "--crop",
        type=float,
        nargs=2,
        metavar=("LEAST", "MOST"),
        help="share of a picture's sides that is cut out (default: 0.4 1)",
    )
    sub.add_argument("--lr", type=float, help="highest learning rate (default: 0.0005)")
    sub.add_argument("--statistics", type=int, help="pictures for mean and deviation of the targets (default: 512)")
    sub.add_argument(
        "--precision",
        choices=["32-true", "bf16-mixed"],
        help="bf16-mixed is faster where the processor has bfloat16 (default: 32-true)",
    )
    _add_updates(sub)


def _add_updates(sub: argparse.ArgumentParser) -> None:
    """Options of a run of updates that writes weights."""
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    sub.add_argument("--fp32", action="store_true", help="store 32-bit numbers instead of 16-bit ones")
    sub.add_argument("--resume", action="store_true", help="go on from the checkpoint beside --out")
    sub.add_argument("--stop-after", type=int, metavar="N", help="save and stop once N updates are made")
    sub.add_argument("--cooldown", type=int, metavar="N", help="with --resume: end early, after N more updates")


def _add_fit(command: Callable[..., argparse.ArgumentParser]) -> None:
    sub = command(
        "fit",
        do.run_fit,
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
    _add_source(sub)
    _add_run(sub)
    sub.add_argument("--precision", default="32-true", help="32-true, bf16-mixed or 16-mixed (default: %(default)s)")
    sub.add_argument("--compile", action="store_true", help="compile the training loss (torch.compile): for long fits")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--max-train", type=int, help="use only this many training parts (few-shot)")
    sub.add_argument("--resume", action="store_true", help="go on from the checkpoint of a fit that was stopped")
    _add_cache(sub)
    sub.add_argument("--cache-gb", type=float, default=8.0, help="most that cached features may take")
    group = sub.add_argument_group("calibration")
    group.add_argument("--false-reject", type=float, default=0.05, help="wished share of rejected good parts (0.05)")
    group.add_argument("--confidence", type=float, default=0.95, help="confidence of the statement on it (0.95)")


def _add_complete(command: Callable[..., argparse.ArgumentParser]) -> None:
    sub = command(
        "complete",
        do.run_complete,
        "Teach a fitted model to judge parts that lack a modality: what is missing is hallucinated from what is there. "
        "One file then serves all of them, each set of modalities with a threshold of its own.",
        "  polyspect complete bracket.safetensors --root parts --category bracket --out any.safetensors\n"
        "  polyspect predict any.safetensors photo.png\n"
        "  polyspect evaluate any.safetensors --only rgb --root parts --category bracket\n",
    )
    sub.add_argument("model", help="model file that `polyspect fit` wrote, on two or more modalities")
    sub.add_argument("--out", required=True, help="model file to write")
    sub.add_argument("--preset", help="named settings: paper, fast")
    sub.add_argument("--set", action="append", metavar="NAME=VALUE", help="one setting, e.g. epochs=30 (repeatable)")
    _add_source(sub, root=True, category=True)
    _add_run(sub)
    sub.add_argument("--precision", default="32-true", help="32-true, bf16-mixed or 16-mixed (default: %(default)s)")
    sub.add_argument("--seed", type=int, help="order of batches and the held-out share (default: the model's)")
    sub.add_argument("--max-train", type=int, help="use only this many training parts, as the model's fit did")
    sub.add_argument("--resume", action="store_true", help="go on from the checkpoint of a run that was stopped")
    _add_cache(sub)
    sub.add_argument("--cache-gb", type=float, default=8.0, help="most that cached features may take")


def _add_predict(command: Callable[..., argparse.ArgumentParser]) -> None:
    sub = command(
        "predict",
        do.run_predict,
        "Judge new parts: the files of one part, a folder, or a split of a data set. No ground truth is needed.",
        "  polyspect predict bracket.safetensors part.png part.tiff\n"
        "  polyspect predict bracket.safetensors new_parts/ --out verdicts\n"
        "  polyspect predict bracket.safetensors --root parts --category bracket --split test --json\n",
    )
    sub.add_argument("model", help="model file")
    sub.add_argument("paths", nargs="*", help="the files of one part (FILE or ROLE=FILE), or a folder")
    sub.add_argument("--out", help="folder for predictions.csv, .json, and a map and a picture per part")
    sub.add_argument("--split", default="test")
    sub.add_argument("--intrinsics", help="camera file (JSON or YAML), where a depth image is given")
    _add_source(sub)
    _add_run(sub)


def _add_evaluate(command: Callable[..., argparse.ArgumentParser]) -> None:
    sub = command(
        "evaluate",
        do.run_evaluate,
        "Metrics with intervals on a labelled split, and a report that opens offline.",
        "  polyspect evaluate bracket.safetensors --root parts --category bracket --out results\n"
        "  polyspect evaluate bracket.safetensors --root parts --category bracket --json\n",
    )
    sub.add_argument("model", help="model file")
    sub.add_argument("--out", help="folder for results.json, parts.csv, maps and report.html")
    sub.add_argument("--split", default="test")
    sub.add_argument("--bootstrap", type=int, default=200, help="resamples for the intervals, 0 for none (200)")
    sub.add_argument("--only", help="judge by these modalities alone, e.g. rgb; for models that can do without others")
    sub.add_argument("--ignore-invalid", action="store_true", help="leave pixels without 3D data out of pixel metrics")
    _add_source(sub, root=True, category=True)
    _add_run(sub)
    _add_cache(sub)


if __name__ == "__main__":
    raise SystemExit(main())
