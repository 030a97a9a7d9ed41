"""Published checkpoints, brought to the tensor names of our detectors.

    format           what the file holds                                          for detector
    crd              {"student_rgb": ..., "student_depth" or "student_normals"}   crd
    rd4ad            {"bn": ..., "decoder": ...}                                  reverse_distillation
    anomalib-rd      a Lightning checkpoint: model.bottleneck.*, model.decoder.*  reverse_distillation
    stfpm            {"category": ..., "state_dict": model.0.* to model.7.*}      forward_distillation
    m3dm-uff         {"model": xyz_norm.*, xyz_mlp.*, xyz_head.*, rgb_...}        m3dm
    cmdiad-f2f       {"model": xyz_norm.*, xyz_mlp.mlp_module.*, rgb_...}         cmdiad, as the next four
    cmdiad-f2f-conv  {"model": xyz_conv.*, rgb_conv.*}
    cmdiad-f2i       {"model": conv1.* to conv4.*, norm.*}
    cmdiad-f2i-mlp   {"model": rgb_norm.*, mlp.*}
    cmdiad-i2f       {"model": conv1.*, layer1.*, ..., final_layer.*}
    cfm              input.*, projection.* or projection_a.* to _e.*, output.*    cfm, two files
    point-mae        {"base_model": MAE_encoder.*, MAE_decoder.*, ...}            m3dm, cmdiad, cfm: point weights
    ast-teacher      module_list.{3,5,7,9}.{s1,s2}.*, from 2 without encoding     ast, two files
    ast-student      conv1.*, res.*, conv2.*, gamma                               ast

Nested dicts, or the same names joined by dots in one flat dict (as safetensors holds them). Nothing is computed:
tensors are renamed, and counters of batch norm that a file lacks are set to 0. Every tensor of a file is either renamed
or dropped by a rule that is written here and reported; any other one is an error, and so is one that is missing.

No published file holds its frozen network (Lightning's does, and it is dropped): students are of use only behind the
very network, and the input preparation, that they were trained with.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import WeightsError, nearest_names
from . import cross_modal, patch_networks, point_mae
from .convert import State, named_tensors, read_file, read_metadata
from .renaming import Tensors, covers, listed
from .resolve import verified

if TYPE_CHECKING:
    from torch import Tensor, nn

# Names inside a published part -> ours. A name that ends in "." stands for all tensors under it.
EMBEDDING = {
    "conv1.": "paths.0.0.",
    "bn1.": "paths.0.1.",
    "conv2.": "paths.0.3.",
    "bn2.": "paths.0.4.",
    "conv3.": "paths.1.0.",
    "bn3.": "paths.1.1.",
    "bn_layer.": "stage.",
}
DEEP_PATH = {"conv4.": "paths.2.0.", "bn4.": "paths.2.1."}  # CRD's path at stride 16, there with a filter only
DECODER = {"layer1.": "stages.0.", "layer2.": "stages.1.", "layer3.": "stages.2."}  # deepest first, as ours
MIXING = {"w_a": "theta.0", "w_b": "theta.1", "w_c": "theta.2"}  # there with an amplifier only
PROJECTION = {"conv_a.": "scales.0.", "conv_b.": "scales.1.", "conv_c.": "scales.2."}
TRUNK = {
    "0.": "conv1.",
    "1.": "bn1.",
    "4.": "layer1.",
    "5.": "layer2.",
    "6.": "layer3.",
}

# why tensors are dropped
DEAD_PATH = "the published network never uses it: plain reverse distillation passes stride 16 on as it is"
MEMORY = "left over from an early version of the published code, which drops it as well"
TEACHER = "the teacher; detectors load theirs by name"
THRESHOLDS = "thresholds and score ranges of the program that wrote the file; ours are measured anew"
STAGE_4 = "the published method compares stages 1 to 3 only"
NO_USE = "the published network has it and never uses it"
PRETRAINING = "reconstructs hidden groups, which only pre-training does"
COUNTER = "counts the updates of a norm, which are over"
BESIDE = "beside the state dict: a record of the training, no weights"

_NORM = ("weight", "bias", "running_mean", "running_var")
_COUNTER = "num_batches_tracked"
_WRAPPERS = ("state_dict", "base_model", "model")  # entries that hold the tensors, others lie beside
_HEADER = "polyspect"  # the metadata entry of our own files


@dataclass(frozen=True, eq=False)
class Imported:
    """A checkpoint under our names.

    Attributes:
        format: Key of `FORMATS`.
        tensors: As in the detector's state dict: ``students.rgb.embedding.paths.0.0.weight``.
        modalities: Of the students, in the file's order; empty where the format names none.
        dropped: Name in the file -> why it is not among `tensors`.
        made_from: sha256 of the published file, where a file of our own was read.
    """

    format: str
    tensors: State
    modalities: tuple[str, ...] = ()
    dropped: Mapping[str, str] = field(default_factory=dict)
    made_from: str | None = None

    @property
    def detector(self) -> str:
        """The detector that takes these tensors."""
        return FORMATS[self.format].detector

    @property
    def parameters(self) -> int:
        """How many numbers were trained: statistics and counters of batch norm aside."""
        return sum(
            tensor.numel()
            for name, tensor in self.tensors.items()
            if not name.endswith(("running_mean", "running_var", "num_batches_tracked"))
        )

    def about(self, sha256: str) -> dict[str, Any]:
        """What an imported file says of itself; `sha256` is that of the published file."""
        return {"from": self.format, "detector": self.detector, "modalities": self.modalities, "sha256": sha256}

    def header(self, sha256: str) -> dict[str, Any]:
        """All entries of an imported file's header but its format number."""
        return {"imported": self.about(sha256), **FORMATS[self.format].header}


@dataclass(frozen=True)
class Format:
    """One kind of published file."""

    detector: str  # that takes its tensors
    part: str  # submodule of the detector that the tensors make up; "" where it is no detector's own
    mark: str  # regular expression: some name of such a file begins like this, and none of the others' does
    keys: str  # what such a file holds, for people
    convert: Callable[[Any, str], Imported]  # content of the file, how errors call the file
    use: str = "checkpoint={}"  # the setting that takes the written file, for people
    header: Mapping[str, Any] = field(default_factory=dict)  # what readers of the written file need to know beside


# -- the formats -------------------------------------------------------------------------------------------------------


def crd(content: Any, origin: str = "the checkpoint") -> Imported:
    """Crossmodal Reverse Distillation: two students, each with the parts that its variant has.

    Without filter the embedding is that of plain reverse distillation, whose ``conv4`` and ``bn4`` are dead weight.

    Raises:
        WeightsError: an unknown or missing tensor (names it), or not two students.
    """
    state, dropped = _flat(content, origin)
    students: dict[str, State] = {}
    for name, tensor in state.items():
        match = re.fullmatch(r"student_(\w+)\.(.+)", name)
        if match is None:
            raise WeightsError(_unknown(origin, "crd", [name]))
        students.setdefault(match[1], {})[match[2]] = tensor
    if len(students) != 2:
        raise WeightsError(
            f"{origin}: format 'crd' holds two students that help each other, got {len(students)} "
            f"({listed(f'student_{name}' for name in students)})"
        )
    tensors: State = {}
    for (own, student), other in zip(students.items(), reversed(students)):
        filtered = any(name.startswith("projector_filter.") for name in student)
        mixed = any(name.startswith("projector_amply.") for name in student)
        keep = _under("bn.", "embedding.", EMBEDDING | (DEEP_PATH if filtered else {}))
        keep |= _under("decoder.", "decoder.", DECODER | (MIXING if mixed else {}))
        keep |= _under("projector_filter.", f"filters.{other}.", PROJECTION if filtered else {})
        keep |= _under("projector_amply.", f"amplifiers.{other}.", PROJECTION if mixed else {})
        where = f"{origin}: 'student_{own}'"
        if not filtered:
            _check_dead(student, "bn.", where)
        drop = {} if filtered else {r"bn\.(conv4|bn4)\.": DEAD_PATH}
        renamed, left = _rename(student, keep, drop, "crd", where)
        tensors |= {f"students.{own}.{name}": tensor for name, tensor in renamed.items()}
        dropped |= {f"student_{own}.{name}": why for name, why in left.items()}
    return Imported("crd", tensors, tuple(students), dropped)


def rd4ad(content: Any, origin: str = "the checkpoint") -> Imported:
    """Reverse Distillation: embedding (``bn``) and decoder.

    Raises:
        WeightsError: an unknown or missing tensor (names it).
    """
    state, dropped = _flat(content, origin)
    return _reverse("rd4ad", state, dropped, "bn.", "decoder.", {r"bn\..*memory": MEMORY}, origin)


def anomalib_rd(content: Any, origin: str = "the checkpoint") -> Imported:
    """Reverse Distillation as anomalib's Lightning module stores it.

    Raises:
        WeightsError: an unknown or missing tensor (names it).
    """
    state, dropped = _flat(content, origin)
    drop = {
        r"model\.encoder\.": TEACHER,
        r"(post_processor|normalization_metrics|image_threshold|pixel_threshold)\.": THRESHOLDS,
    }
    return _reverse("anomalib-rd", state, dropped, "model.bottleneck.", "model.decoder.", drop, origin)


def stfpm(content: Any, origin: str = "the checkpoint") -> Imported:
    """Student-Teacher Feature Pyramid Matching: a ResNet trunk, its layers numbered.

    Raises:
        WeightsError: an unknown or missing tensor (names it).
    """
    state, dropped = _flat(content, origin)
    keep = _under("model.", "student.", TRUNK)
    renamed, left = _rename(state, keep, {r"model\.7\.": STAGE_4}, "stfpm", origin)
    return Imported("stfpm", renamed, (), dropped | left)


def _network(
    published: str,
    tensors: Callable[[Iterable[str]], Tensors],
    drop: Mapping[str, str],
    content: Any,
    origin: str = "the checkpoint",
) -> Imported:
    """A network whose tensors are all known by name.

    Args:
        tensors: From the names in a file, published name -> ours of all that such a file must hold.
        drop: As `_rename`.

    Raises:
        WeightsError: an unknown or missing tensor, or one that is not finite (names it).
    """
    state, beside = _flat(content, origin)
    part = FORMATS[published].part
    keep = {old: f"{part}.{new}" if part else new for old, new in tensors(state).items()}
    renamed, left = _rename(state, keep, drop, published, origin, halves=False)
    for name, tensor in renamed.items():
        _check_finite(name, tensor, origin)
    return Imported(published, renamed, (), beside | left)


def _point_mae(content: Any, origin: str = "the checkpoint") -> Imported:
    """The encoder of the whole pre-training network, or alone; its convolutions of one position are matrices here."""
    drop = {rf"{re.escape(start)}": PRETRAINING for start in point_mae.PRETRAINING} | {rf".*{_COUNTER}$": COUNTER}
    imported = _network("point-mae", point_mae.point_mae_tensors, drop, content, origin)
    matrices = {name: x.flatten(1) if x.ndim == 3 and x.shape[2] == 1 else x for name, x in imported.tensors.items()}
    return replace(imported, tensors=matrices)


FORMATS: dict[str, Format] = {
    "crd": Format("crd", "students", r"student_\w+\.", "student_rgb and student_depth or student_normals", crd),
    "rd4ad": Format("reverse_distillation", "student", r"(bn|decoder)\.", "bn and decoder", rd4ad),
    "anomalib-rd": Format(
        "reverse_distillation",
        "student",
        r"model\.bottleneck\.",
        "state_dict with model.bottleneck and model.decoder",
        anomalib_rd,
    ),
    "stfpm": Format("forward_distillation", "student", r"model\.\d\.", "state_dict with model.0 to model.7", stfpm),
    "m3dm-uff": Format(
        "m3dm",
        "uff",
        r"(xyz|rgb)_head\.",
        "model with xyz_norm, xyz_mlp, xyz_head and the same of rgb",
        partial(_network, "m3dm-uff", cross_modal.feature_fusion_tensors, {}),
        "uff_checkpoint={}",
    ),
    "cmdiad-f2f": Format(
        "cmdiad",
        "network",
        r"(xyz|rgb)_mlp\.mlp_module\.",
        "model with xyz_norm, xyz_mlp.mlp_module and the same of rgb",
        partial(_network, "cmdiad-f2f", cross_modal.patch_hallucination_tensors, {}),
    ),
    "cmdiad-f2f-conv": Format(
        "cmdiad",
        "network",
        r"(xyz|rgb)_conv\.",
        "model with xyz_conv and rgb_conv",
        partial(_network, "cmdiad-f2f-conv", cross_modal.conv_hallucination_tensors, {}),
    ),
    "cmdiad-f2i": Format(
        "cmdiad",
        "network",
        r"conv4\.",
        "model with conv1 to conv4 and norm",
        partial(_network, "cmdiad-f2i", cross_modal.image_hallucination_tensors, {r"norm\.": NO_USE}),
    ),
    "cmdiad-f2i-mlp": Format(
        "cmdiad",
        "network",
        r"mlp\.\d",
        "model with rgb_norm and mlp",
        partial(_network, "cmdiad-f2i-mlp", cross_modal.patch_image_hallucination_tensors, {}),
    ),
    "cmdiad-i2f": Format(
        "cmdiad",
        "network",
        r"final_layer\.",
        "model with conv1, conv2, layer1 to layer4 and final_layer",
        partial(_network, "cmdiad-i2f", cross_modal.features_from_image_tensors, {r"layer4\.": NO_USE}),
    ),
    "cfm": Format(
        "cfm",
        "mapping",
        r"projection(_[a-e])?\.",
        "input, projection (big: projection_a to projection_e) and output",
        partial(_network, "cfm", cross_modal.feature_mapping_tensors, {}),
        "checkpoint='[{}, FILE_OF_THE_OTHER_DIRECTION]'",
    ),
    "point-mae": Format(
        "m3dm, cmdiad or cfm",
        "",
        r"(MAE_encoder\.)?encoder\.first_conv\.",
        "base_model with MAE_encoder",
        _point_mae,
        "point_backbone=point_mae --set point_weights={}",
        {"point_transformer": {"size": "base", "frame": "camera", "statistics": "stored"}},
    ),
    "ast-teacher": Format(
        "ast",
        "teacher",
        r"module_list\.\d+\.",
        "module_list.3, 5, 7, 9 with s1 and s2",
        partial(_network, "ast-teacher", patch_networks.flow_tensors, {}),
        "checkpoint='[{}, FILE_OF_THE_STUDENT]'",
    ),
    "ast-student": Format(
        "ast",
        "student",
        r"res\.\d+\.",
        "conv1, res.0 to res.3, conv2",
        partial(_network, "ast-student", patch_networks.conv_student_tensors, {r"gamma$": NO_USE}),
        "checkpoint='[FILE_OF_THE_TEACHER, {}]'",
    ),
}
"""Name of a published format -> what it is."""


# -- files -------------------------------------------------------------------------------------------------------------


def read_checkpoint(path: str | Path, published: str | None = None) -> Imported:
    """A published checkpoint, or a file that ``polyspect weights import`` made of one, under our names.

    Args:
        path: The file. Pickled objects other than tensors and plain data are refused, never run.
        published: Key of `FORMATS`; None tells it by the names in the file.

    Raises:
        WeightsError: unreadable, of no known or of another format, or a tensor is unknown or missing (names it).
    """
    if published is not None and published not in FORMATS:
        raise WeightsError(f"unknown checkpoint format '{published}': {nearest_names(published, FORMATS)}")
    path = Path(path).expanduser()
    origin = f"checkpoint {path}"
    content = read_file(path)
    header = _own_header(path) if path.suffix == ".safetensors" else None
    if header is None:
        return FORMATS[published or detect(content, origin)].convert(content, origin)
    name = header["from"]
    if published not in (None, name):
        raise WeightsError(f"{origin} was imported from format '{name}', not '{published}'")
    tensors = named_tensors(content, origin)
    return Imported(name, tensors, tuple(header["modalities"]), made_from=str(header["sha256"]))


def load_checkpoint(
    path: str | Path, detector: str, like: nn.Module | Mapping[str, Tensor], published: str | None = None
) -> State:
    """The tensors of a checkpoint for the part of `detector` that it is for, names and shapes exactly as in `like`.

    Args:
        path: A published file, or one that ``polyspect weights import`` wrote.
        detector: Registered name: ``crd``.
        like: The part itself (``students`` of `crd`), or its state dict; only names, shapes and kinds are read.
        published: As `read_checkpoint`.

    Raises:
        WeightsError: as `read_checkpoint`; the file is for another detector; or a tensor is missing, left over, of
            another shape (names both), or not finite.
    """
    imported, origin = read_checkpoint(path, published), f"checkpoint {path}"
    _check_detector(imported, detector, origin)
    part = f"{FORMATS[imported.format].part}."
    expected = like if isinstance(like, Mapping) else like.state_dict()
    state = {name.removeprefix(part): tensor for name, tensor in imported.tensors.items()}
    missing, extra = [n for n in expected if n not in state], [n for n in state if n not in expected]
    if missing or extra:
        lacks = f"lacks {listed(missing)}" if missing else ""
        has = f"has {listed(extra)}, for which the detector has no place" if extra else ""
        students = f"; its students are for {', '.join(imported.modalities)}" if imported.modalities else ""
        raise WeightsError(
            f"{origin} {' and '.join(filter(None, (lacks, has)))}{students}: choose the modalities, the backbone and "
            f"the variant that it was trained with"
        )
    for name, wanted in expected.items():
        _check_tensor(name, state[name], wanted, origin)
    return {name: state[name] for name in expected}


def read_network(path: str | Path, detector: str) -> Any:
    """What the functions of `weights.cross_modal` take: a published file's content, or the tensors of an imported one.

    Raises:
        WeightsError: unreadable, or imported for another detector.
    """
    path = Path(path).expanduser()
    if path.suffix != ".safetensors" or _own_header(path) is None:
        return read_file(path)
    imported = read_checkpoint(path)
    _check_detector(imported, detector, f"checkpoint {path}")
    part = f"{FORMATS[imported.format].part}."
    return {name.removeprefix(part): tensor for name, tensor in imported.tensors.items()}


def checkpoint_source(path: str | Path) -> dict[str, str]:
    """Where a detector's trained tensors came from, for a model's header: name, source and sha256 of the file.

    Raises:
        WeightsError: the file cannot be read.
    """
    file = verified("checkpoint", Path(path).expanduser(), "file", "")
    return {"name": file.name, "source": file.source, "sha256": file.sha256}


def detect(content: Any, origin: str = "the checkpoint") -> str:
    """The key of `FORMATS` that fits the names in a file.

    Raises:
        WeightsError: none does (lists what each holds), or the content is no mapping of names to tensors.
    """
    state, _ = _flat(content, origin)
    for name, kind in FORMATS.items():
        if any(re.match(kind.mark, key) for key in state):
            return name
    known = "; ".join(f"{name}: {kind.keys}" for name, kind in FORMATS.items())
    raise WeightsError(f"{origin} is of no known format. It holds {listed(state)}; known are {known}")


def _own_header(path: Path) -> Mapping[str, Any] | None:
    """What ``polyspect weights import`` wrote into the file's header; None for a file from elsewhere."""
    text = read_metadata(path).get(_HEADER)
    if text is None:
        return None
    try:
        header: dict[str, Any] = json.loads(text)["imported"]
        if header["from"] in FORMATS and isinstance(header["modalities"], list) and header["sha256"]:
            return header
    except (ValueError, KeyError, TypeError):
        pass
    raise WeightsError(
        f"checkpoint {path} was written by polyspect but is no imported checkpoint (a fitted model is used as it is, "
        f"with `polyspect predict`): give a file that `polyspect weights import` wrote, or the published one"
    )


# -- rules -------------------------------------------------------------------------------------------------------------


def _flat(content: Any, origin: str) -> tuple[State, dict[str, str]]:
    """All tensors of a file under dotted names, and what lies beside a wrapper with the reason to drop it."""
    from torch import Tensor

    if not isinstance(content, Mapping) or not content:
        raise WeightsError(f"{origin} holds {type(content).__name__}, expected tensors by name")
    for wrapper in _WRAPPERS:
        if isinstance(content.get(wrapper), Mapping):
            beside = {str(key): BESIDE for key in content if key != wrapper}
            return named_tensors(content[wrapper], f"{origin}: '{wrapper}'"), beside
    state: State = {}
    for key, value in content.items():
        if isinstance(value, Mapping):
            inner = named_tensors(value, f"{origin}: '{key}'")
            state |= {f"{key}.{name}": tensor for name, tensor in inner.items()}
        elif isinstance(value, Tensor):
            state[str(key)] = value
        else:
            raise WeightsError(f"{origin}: '{key}' is {type(value).__name__}, expected tensors by name")
    return state, {}


def _reverse(
    name: str, state: State, dropped: dict[str, str], bn: str, decoder: str, drop: Mapping[str, str], origin: str
) -> Imported:
    """Plain reverse distillation whose embedding and decoder lie under the prefixes `bn` and `decoder`."""
    _check_dead(state, bn, origin)
    keep = _under(bn, "student.embedding.", EMBEDDING) | _under(decoder, "student.decoder.", DECODER)
    dead = {rf"{re.escape(bn)}(conv4|bn4)\.": DEAD_PATH}
    renamed, left = _rename(state, keep, dead | dict(drop), name, origin)
    return Imported(name, renamed, (), dropped | left)


def _under(theirs: str, ours: str, table: Mapping[str, str]) -> dict[str, str]:
    return {theirs + old: ours + new for old, new in table.items()}


def _rename(
    state: State, keep: Mapping[str, str], drop: Mapping[str, str], published: str, origin: str, halves: bool = True
) -> tuple[State, dict[str, str]]:
    """Sort `state` into renamed and dropped tensors.

    Args:
        keep: Name or, with a final ".", start of names -> ours.
        drop: Regular expression for the start of a name -> why.
        halves: Whether `keep` does not say which tensors there are, so that `_missing_halves` must.
    """
    dropped = {name: why for name in state for rule, why in drop.items() if re.match(rule, name)}
    kept = {name: tensor for name, tensor in state.items() if name not in dropped}
    rules = {name: next((old for old in keep if covers(old, name)), "") for name in kept}
    unknown = [name for name, rule in rules.items() if not rule]
    if unknown:
        raise WeightsError(_unknown(origin, published, unknown))
    hit = set(rules.values())
    missing = [old.removesuffix(".") for old in keep if old not in hit and not old.endswith(_COUNTER)]
    missing += _missing_halves(kept) if halves else []
    if missing:
        raise WeightsError(f"{origin} lacks {listed(missing)}: it is not whole, or not of format '{published}'")
    renamed = {keep[rule] + name.removeprefix(rule): kept[name] for name, rule in rules.items()}
    return _with_counters(renamed), dropped


def _missing_halves(state: State) -> list[str]:
    """Tensors that must be there because in these networks a norm follows every convolution: ``conv2`` and ``bn2``,
    or neighbours by number (``upsample.0`` and ``upsample.1``).
    """
    needed: dict[str, None] = {}
    for name, tensor in state.items():
        owner, _, leaf = name.rpartition(".")
        start, _, last = owner.rpartition(".")
        if leaf not in _NORM:
            continue
        if last.isdigit():
            at = int(last) - (tensor.ndim < 2)  # the number of the convolution
            pair = str(at), str(at + 1)
        else:
            number = last.lstrip("abcdefghijklmnopqrstuvwxyz_")
            pair = f"conv{number}", f"bn{number}"
        kernel, norm = (f"{start}.{half}" if start else half for half in pair)
        needed |= dict.fromkeys([f"{kernel}.weight", *(f"{norm}.{leaf}" for leaf in _NORM)])
    return [name for name in needed if name not in state]


def _with_counters(state: State) -> State:
    """Give every batch norm its counter; it plays no part once the statistics are frozen."""
    import torch

    counters = [name.removesuffix("running_mean") + "num_batches_tracked" for name in state if "running_mean" in name]
    return state | {name: torch.zeros((), dtype=torch.int64) for name in counters if name not in state}


def _check_detector(imported: Imported, detector: str, origin: str) -> None:
    if imported.detector != detector:
        raise WeightsError(
            f"{origin} (format '{imported.format}') is for detector '{imported.detector}', not '{detector}': "
            f"use that one, or another file"
        )


def _check_dead(state: State, prefix: str, origin: str) -> None:
    """Refuse to drop a ``conv4`` that is no dead weight: the unused one is 1x1, the path of CRD's filter 3x3."""
    kernel = state.get(f"{prefix}conv4.weight")
    if kernel is not None and tuple(kernel.shape[2:]) != (1, 1):
        raise WeightsError(
            f"{origin}: '{prefix}conv4.weight' has shape {tuple(kernel.shape)}, expected the unused 1x1 convolution of "
            f"plain reverse distillation: this embedding takes a filter, which the file lacks"
        )


def _check_tensor(name: str, tensor: Tensor, wanted: Tensor, origin: str) -> None:
    if tensor.shape != wanted.shape:
        raise WeightsError(
            f"{origin}: '{name}' has shape {tuple(tensor.shape)}, the detector needs {tuple(wanted.shape)}: choose the "
            f"backbone and the variant that it was trained with"
        )
    if tensor.is_floating_point() != wanted.is_floating_point():
        raise WeightsError(f"{origin}: '{name}' is of type {tensor.dtype}, the detector needs {wanted.dtype}")
    _check_finite(name, tensor, origin)


def _check_finite(name: str, tensor: Tensor, origin: str) -> None:
    if not bool(tensor.isfinite().all()):
        raise WeightsError(f"{origin}: '{name}' holds numbers that are not finite: the training failed, use another")


def _unknown(origin: str, published: str, names: list[str]) -> str:
    return f"{origin} has {listed(names)}, unknown to format '{published}': it is of another network or version"
