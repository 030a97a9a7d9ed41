"""Point transformers by name, with their weights and the frame of coordinates that these expect."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from ..errors import ConfigError
from ..weights.convert import read_file
from ..weights.point_mae import point_mae_state
from ..weights.resolve import resolve
from .point_transformer import PointTransformer, Statistics

Frame = Literal["camera", "unit"]

DEFAULT_POINT_BACKBONE = "point_mae"
LAYERS = {"point_mae": (3, 7, 11)}
FRAMES: dict[str, Frame] = {"point_mae": "camera"}


@dataclass(frozen=True, eq=False)
class LoadedPoints:
    """A point transformer, where its tensors came from (name, source, sha256), and the frame it expects clouds in."""

    network: PointTransformer
    source: dict[str, str]
    frame: Frame


def load_point_transformer(
    name: str,
    *,
    layers: Sequence[int] | None = None,
    weights: str = "auto",
    pretrained: bool = True,
    seed: int = 0,
    statistics: Statistics = "cloud",
) -> LoadedPoints:
    """Build a point transformer and load its weights; see `PointBackbone`.

    Raises:
        ConfigError: unknown name or layers.
        WeightsError: the weights cannot be had, or do not fit.
    """
    if name not in LAYERS:
        raise ConfigError(f"unknown point backbone '{name}': one of {', '.join(LAYERS)}")
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        network = PointTransformer(layers or LAYERS[name], statistics=statistics)
    source = {"name": name, "source": "none", "sha256": ""}
    if weights == "random":
        source["source"] = "random"
    elif pretrained:
        file = resolve(name, weights)
        network.load_state_dict(point_mae_state(read_file(file.path), network, str(file.path)))
        source |= {"source": file.source, "sha256": file.sha256}
    return LoadedPoints(network, source, FRAMES[name])
