"""One file per fitted model: tensors as safetensors, everything else as JSON in the file's header.

The header's one metadata entry, ``polyspect``, is a JSON object. Its keys are written by `polyspect.model.Model`:
format, detector, config, seed, preparation, depth scale, calibration, versions, weights, data fingerprint. It holds no
time stamp and no path, so the same fit gives the same bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import ModelFileError

FORMAT = 2  # 1: memory banks without normalisation


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write tensors and a JSON header beside `path`, flush, then rename, so that no half file is ever seen."""
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        save_file(plain, beside, metadata={"polyspect": json.dumps(header, sort_keys=True, allow_nan=False)})
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def read_header(path: Path) -> dict[str, Any]:
    """The JSON header of a model file, without reading its tensors.

    Raises:
        ModelFileError: no such file, damaged, cut short, or not written by polyspect.
    """
    return _read(path, tensors=False)[0]


def read_tensors(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a model file.

    Raises:
        ModelFileError: as `read_header`.
    """
    return _read(path, tensors=True)


def _read(path: Path, *, tensors: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise ModelFileError(f"no model file at '{path}': give the .safetensors file that `polyspect fit --out` wrote")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            found: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()} if tensors else {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelFileError(
            f"'{path}' is damaged or cut short ({path.stat().st_size} bytes; {error}): copy it again or fit anew"
        ) from None
    if "polyspect" not in metadata:
        raise ModelFileError(f"'{path}' is a safetensors file but not a polyspect model: it has no 'polyspect' header")
    header = json.loads(metadata["polyspect"])
    if header.get("format") != FORMAT:
        raise ModelFileError(
            f"'{path}' has model format {header.get('format')!r}, this version reads {FORMAT}: fit it again"
        )
    return header, found


def flatten_state(state: Mapping[str, Any], prefix: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split an optimizer's state dict into named tensors and a JSON-able rest."""
    tensors: dict[str, Tensor] = {}
    rest: dict[str, Any] = {}
    for index, entries in state["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{prefix}.{index}.{key}"] = value
            else:
                rest[f"{index}.{key}"] = value
    groups = [{k: v for k, v in group.items() if k != "params"} for group in state["param_groups"]]
    members = [group["params"] for group in state["param_groups"]]
    return tensors, {"rest": rest, "groups": groups, "members": members}


def unflatten_state(tensors: Mapping[str, Tensor], plain: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The inverse of `flatten_state`."""
    state: dict[int, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        if name.startswith(f"{prefix}."):
            index, _, key = name[len(prefix) + 1 :].partition(".")
            state.setdefault(int(index), {})[key] = tensor
    for name, value in plain["rest"].items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = value
    groups = [
        {**{k: tuple(v) if isinstance(v, list) else v for k, v in group.items()}, "params": members}
        for group, members in zip(plain["groups"], plain["members"])
    ]
    return {"state": state, "param_groups": groups}


def tensor_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes that the tensors take."""
    return sum(tensor.numel() * torch.empty((), dtype=tensor.dtype).element_size() for tensor in tensors.values())
