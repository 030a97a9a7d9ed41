"""Point transformers by name, with their weights and the frame of coordinates that these expect."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from ..errors import ConfigError, WeightsError, nearest_names
from ..weights.convert import State, fit_state, read_file, read_metadata
from ..weights.point_mae import point_bert_state, point_mae_state
from ..weights.resolve import resolve
from .point_transformer import SIZES, PointTransformer, Statistics

Frame = Literal["camera", "unit"]


@dataclass(frozen=True)
class _Network:
    size: str
    frame: Frame


POINT_BACKBONES = {
    "point_mae_small": _Network("small", "unit"),
    "point_mae": _Network("base", "camera"),
    "point_bert": _Network("bert", "camera"),
}
"""``point_mae_small`` comes with polyspect; the other two are published networks, which must be supplied."""

_PUBLISHED = {"base": point_mae_state, "bert": point_bert_state}  # by size: the reader of the published file

DEFAULT_POINT_BACKBONE = "point_mae_small"


@dataclass(frozen=True, eq=False)
class LoadedPoints:
    """A point transformer ready for use.

    Attributes:
        network: In eval mode, without gradients.
        source: ``name``, ``source`` (shipped, folder, file, random, or none: to be loaded) and ``sha256``.
        frame: Coordinates that the weights expect: ``"unit"`` (`geometry.unit.to_unit_frame`) or ``"camera"``, metres.
        made: How the weights were made, if their file says so.
    """

    network: PointTransformer
    source: dict[str, str]
    frame: Frame
    made: Mapping[str, Any] = field(default_factory=dict)


def load_point_transformer(
    name: str = DEFAULT_POINT_BACKBONE,
    *,
    layers: Sequence[int] | None = None,
    weights: str = "auto",
    pretrained: bool = True,
    seed: int = 0,
    statistics: Statistics = "cloud",
) -> LoadedPoints:
    """Build a point transformer and load its weights.

    A file written by ``polyspect weights pretrain-point-mae`` says in its header which size and frame it has; any such
    file can be named with `weights`, under either name, if its size is that of `name`.

    Args:
        name: A name in `POINT_BACKBONES`.
        layers: Blocks whose outputs are joined, from 0; None for the size's own three.
        weights: ``"auto"``, a file or folder, or ``"random"``: untrained.
        pretrained: False builds only, because all tensors are about to be loaded from a model file.
        seed: Seeds the random initialisation, inside a fork of torch's RNG.
        statistics: Of the group encoder's norms, see `PointTransformer`.

    Raises:
        ConfigError: unknown name, layers out of range, or stored statistics asked of weights that have none.
        WeightsError: the weights cannot be had, or do not fit.
    """
    if name not in POINT_BACKBONES:
        raise ConfigError(f"unknown point backbone '{name}': {nearest_names(name, POINT_BACKBONES)}")
    known = POINT_BACKBONES[name]
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        network = PointTransformer(layers, size=known.size, statistics=statistics)
    network.requires_grad_(False).eval()
    source = {"name": name, "source": "none", "sha256": ""}
    if weights == "random":
        return LoadedPoints(network, source | {"source": "random"}, known.frame)
    if not pretrained:
        return LoadedPoints(network, source, known.frame)
    file = resolve(name, weights)
    source |= {"source": file.source, "sha256": file.sha256}
    about = _header(file.path)
    if about is None:
        if known.size not in _PUBLISHED:
            raise WeightsError(f"{file.path} has no header that says which point transformer it holds: write it with "
                               "`polyspect weights pretrain-point-mae`")  # fmt: skip
        network.load_state_dict(_PUBLISHED[known.size](read_file(file.path), network, str(file.path)))
        return LoadedPoints(network, source, known.frame)
    if about["size"] != known.size:
        raise WeightsError(
            f"{file.path} holds a point transformer of size '{about['size']}', but '{name}' is of size '{known.size}'"
        )
    if statistics == "stored" and about["statistics"] != "stored":
        raise ConfigError(
            f"the weights {file.path} learned with the statistics of each cloud and store none: use statistics='cloud'"
        )
    network.load_state_dict(_floats(fit_state(read_file(file.path), network, str(file.path))))
    return LoadedPoints(network, source, about["frame"], about["made"])


def _header(path: Path) -> dict[str, Any] | None:
    """What `polyspect weights pretrain-point-mae` wrote into the file of itself; None for other files.

    Raises:
        WeightsError: it lacks an entry, or has one that this version does not know.
    """
    text = read_metadata(path).get("polyspect")
    about = None if text is None else json.loads(text).get("point_transformer")
    if about is None:
        return None
    expected = {"size": [*SIZES], "frame": ["camera", "unit"], "statistics": ["cloud", "stored"]}
    for name, values in expected.items():
        if about.get(name) not in values:
            raise WeightsError(f"{path}: its header has {name} '{about.get(name)}', expected one of {values}")
    return {"made": {}, **about}


def _floats(state: State) -> State:
    return {name: tensor.float() for name, tensor in state.items()}
