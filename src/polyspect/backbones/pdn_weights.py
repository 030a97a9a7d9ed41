"""Patch description networks by name, with their weights: the frozen teachers of EfficientAD and MDSS."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError, WeightsError, nearest_names
from ..weights.convert import fit_state, read_file, read_metadata
from ..weights.patch_networks import patch_description_state
from ..weights.resolve import resolve
from .patch_description import PatchDescription, Size

PATCH_NETWORKS: dict[str, Size] = {
    "pdn_small": "small",
    "pdn_small_efficientad": "small",
    "pdn_medium_efficientad": "medium",
}
"""Name -> size. ``pdn_small`` comes with polyspect; the other two are the published networks and must be supplied."""

DEFAULT_PATCH_NETWORK = "pdn_small"

_OURS = ("pdn_small",)


@dataclass(frozen=True, eq=False)
class LoadedPDN:
    """A patch description network ready for use.

    Attributes:
        network: In eval mode, without gradients; 384 outputs.
        source: ``name``, ``source`` (shipped, folder, file, random, or none: to be loaded) and ``sha256``.
        made: How the weights were made, if their file says so.
    """

    network: PatchDescription
    source: dict[str, str]
    made: Mapping[str, Any] = field(default_factory=dict)


def load_patch_description(
    name: str = DEFAULT_PATCH_NETWORK,
    *,
    weights: str = "auto",
    pretrained: bool = True,
    seed: int = 0,
    padding: bool = False,
) -> LoadedPDN:
    """Build a patch description network of 384 outputs and load its weights.

    A file written by ``polyspect weights distil-pdn`` says in its header which size it has; any such file can be named
    with `weights`, under any name of that size.

    Args:
        name: A name in `PATCH_NETWORKS`.
        weights: ``"auto"``, a file or folder, or ``"random"``: untrained.
        pretrained: False builds only, because all tensors are about to be loaded from a model file.
        seed: Seeds the random initialisation, inside a fork of torch's RNG.
        padding: As of `PatchDescription`; changes no tensor.

    Raises:
        ConfigError: unknown name.
        WeightsError: the weights cannot be had, or do not fit.
    """
    if name not in PATCH_NETWORKS:
        raise ConfigError(f"unknown patch description network '{name}': {nearest_names(name, PATCH_NETWORKS)}")
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        network = PatchDescription(PATCH_NETWORKS[name], padding=padding)
    network.requires_grad_(False).eval()
    source = {"name": name, "source": "none", "sha256": ""}
    if weights == "random":
        return LoadedPDN(network, source | {"source": "random"})
    if not pretrained:
        return LoadedPDN(network, source)
    file = resolve(name, weights)
    source |= {"source": file.source, "sha256": file.sha256}
    about = _header(file.path)
    if about is None and name in _OURS:
        raise WeightsError(
            f"{file.path} has no header that says which patch description network it holds: write it with "
            "`polyspect weights distil-pdn`, or load EfficientAD's teacher as 'pdn_small_efficientad'"
        )
    content, origin = read_file(file.path), str(file.path)
    if about is None:
        network.load_state_dict(patch_description_state(content, network, origin))
        return LoadedPDN(network, source)
    if about["size"] != network.size or about["outputs"] != network.outputs:
        raise WeightsError(
            f"{file.path} holds a patch description network of size '{about['size']}' with {about['outputs']} outputs, "
            f"but '{name}' is of size '{network.size}' with {network.outputs}"
        )
    state = fit_state(content, network, origin)
    network.load_state_dict({tensor_name: tensor.float() for tensor_name, tensor in state.items()})
    return LoadedPDN(network, source, about["made"])


def _header(path: Path) -> dict[str, Any] | None:
    """What `polyspect weights distil-pdn` wrote into the file of itself; None for other files.

    Raises:
        WeightsError: it lacks an entry.
    """
    text = read_metadata(path).get("polyspect")
    about = None if text is None else json.loads(text).get("patch_description")
    if about is None:
        return None
    for entry in ("size", "outputs"):
        if entry not in about:
            raise WeightsError(f"{path}: its header does not say the network's {entry}; fetch or write the file anew")
    return {"made": {}, **about}
