"""Published networks that link two modalities: M3DM's fusion, CMDIAD's hallucination, CFM's mapping.

    file                                             network of `polyspect.layers`
    M3DM   {"model": xyz_norm.*, xyz_mlp.*, ...}     feature_fusion.FeatureFusion
    CMDIAD {"model": xyz_mlp.*, rgb_mlp.*, ...}      hallucination.PatchHallucination, one direction of the two
    CMDIAD {"model": xyz_conv.*, rgb_conv.*}         hallucination.ConvHallucination, one direction of the two
    CMDIAD {"model": conv1.*, ..., norm.*}           hallucination.ImageHallucination
    CMDIAD {"model": rgb_norm.*, mlp.*}              hallucination.PatchImageHallucination
    CMDIAD {"model": conv1.*, layer1.*, ...}         hallucination.FeaturesFromImage
    CFM    input.*, projection.*, output.*           feature_mapping.FeatureMapping

The functions ``*_state`` take the file's content or its state dict, or what ``polyspect weights import`` made of it
(`official.read_network`). They read only names, shapes and kinds from the network, and raise WeightsError for a tensor
that is unknown, missing, of another shape or kind, or not finite. The functions ``*_tensors`` say which tensors a file
holds, by the names in it alone, and what they are called here; a file with both directions has ours under ``xyz.`` and
``rgb.``, the modality that is there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

from ..errors import WeightsError
from .convert import State
from .renaming import KERNEL, LAYER, NORM, Starts, Tensors, rename, unwrap, whole

if TYPE_CHECKING:
    from torch import nn

Source = Literal["xyz", "rgb"]
SOURCES: tuple[Source, Source] = ("xyz", "rgb")

_PARTS = {"norm.": "norm.", "mlp.fc1.": "mlp.0.", "mlp.fc2.": "mlp.2.", "head.": "head."}
_FUSION: Starts = {f"{half}_{old}": f"{half}.{new}" for half in SOURCES for old, new in _PARTS.items()}
_IMAGE: Starts = {"conv1.": "reduce.", "conv2.": "refine.0.", "conv3.": "refine.2.", "conv4.": "refine.4."}
_PATCH_IMAGE: Starts = {"rgb_norm.": "norm.", "mlp.": "mlp."}
_PROJECTIONS = [f"projection_{letter}." for letter in "abcde"]  # of CFM's big variant
_MAPPING: Starts = {"input.": "input.", "output.": "output.", "projection.": "hidden.0."}
_MAPPING |= {start: f"hidden.{index}." for index, start in enumerate(_PROJECTIONS)}
_STEM: Starts = {f"{part}.": f"{part}." for part in ("conv1", "bn1", "conv2", "bn2")}
_STAGES: Starts = {f"layer{number}.": f"stages.{number - 1}." for number in (1, 2, 3)}


def feature_fusion_state(content: Any, network: nn.Module, origin: str = "the M3DM fusion checkpoint") -> State:
    """The state dict of a `FeatureFusion` from M3DM's UFF file.

    Raises:
        WeightsError: a tensor does not fit (names it).
    """
    return rename(unwrap(content, "model", origin), network, _FUSION, (), origin)


def patch_hallucination_state(
    content: Any, network: nn.Module, source: Source, origin: str = "the CMDIAD checkpoint"
) -> State:
    """The state dict of a `PatchHallucination` from CMDIAD's F2F file, which holds both directions.

    Args:
        source: The modality that is there: ``"xyz"`` in the PCs file, ``"rgb"`` in the RGB file. Dropped: the other.

    Raises:
        WeightsError: a tensor does not fit (names it).
    """
    layers = sum(name.startswith("layers.") and name.endswith(".weight") for name in network.state_dict())
    names = _patch_layers(source, layers) | {f"{source}.": ""}
    other = "rgb" if source == "xyz" else "xyz"
    drop = (f"{other}_norm.", f"{other}_mlp.", f"{other}.")
    return rename(unwrap(content, "model", origin), network, names, drop, origin)


def conv_hallucination_state(
    content: Any, network: nn.Module, source: Source, origin: str = "the CMDIAD checkpoint"
) -> State:
    """The state dict of a `ConvHallucination` from a file with both directions; `source` as above.

    Raises:
        WeightsError: a tensor does not fit (names it).
    """
    other = "rgb" if source == "xyz" else "xyz"
    names = {f"{source}_conv.": "layers.", f"{source}.": ""}
    return rename(unwrap(content, "model", origin), network, names, (f"{other}_conv.", f"{other}."), origin)


def image_hallucination_state(content: Any, network: nn.Module, origin: str = "the CMDIAD checkpoint") -> State:
    """The state dict of an `ImageHallucination` from CMDIAD's F2I file. Dropped: its LayerNorm, which is never used.

    Raises:
        WeightsError: a tensor does not fit (names it).
    """
    return rename(unwrap(content, "model", origin), network, _IMAGE, ("norm.",), origin)


def patch_image_hallucination_state(content: Any, network: nn.Module, origin: str = "the CMDIAD checkpoint") -> State:
    """The state dict of a `PatchImageHallucination`.

    Raises:
        WeightsError: a tensor does not fit (names it).
    """
    return rename(unwrap(content, "model", origin), network, _PATCH_IMAGE, (), origin)


def features_from_image_state(content: Any, network: nn.Module, origin: str = "the CMDIAD checkpoint") -> State:
    """The state dict of a `FeaturesFromImage` from CMDIAD's I2F file. Dropped: its fourth stage, which is never used.

    Raises:
        WeightsError: a tensor does not fit (names it).
    """
    names = _STEM | _STAGES | {"final_layer.": "output."}
    return rename(unwrap(content, "model", origin), network, names, ("layer4.",), origin)


def feature_mapping_state(content: Any, network: nn.Module, origin: str = "the CFM checkpoint") -> State:
    """The state dict of a `FeatureMapping` from a CFM file, of the base or the big variant.

    Raises:
        WeightsError: a tensor does not fit (names it): the file may be of the other direction or variant.
    """
    return rename(unwrap(content, "model", origin), network, _MAPPING, (), origin)


def feature_mapping_widths(content: Any, origin: str = "the CFM checkpoint") -> tuple[int, int]:
    """Channels that the network of a CFM file takes and gives: 768, 1152 in a 2Dto3D file, 1152, 768 in a 3Dto2D file.

    Raises:
        WeightsError: it is no such file (names the tensor that is missing).
    """
    state = unwrap(content, "model", origin)
    for name in ("input.weight", "output.weight"):
        if name not in state or state[name].ndim != 2:
            raise WeightsError(f"{origin} has no matrix '{name}', which every mapping network of CFM has")
    return int(state["input.weight"].shape[1]), int(state["output.weight"].shape[0])


# -- which tensors a file holds ----------------------------------------------------------------------------------------


def feature_fusion_tensors(names: Iterable[str]) -> Tensors:
    """M3DM's UFF."""
    return whole(_FUSION, LAYER)


def patch_hallucination_tensors(names: Iterable[str]) -> Tensors:
    """CMDIAD's F2F by MLPs, both directions, as deep as the file is."""
    depth = 1 + max(_numbers(r"\w+_mlp\.mlp_module\.(\d+)\.", names), default=0)
    return _both({source: whole(_patch_layers(source, 3 * depth), LAYER) for source in SOURCES})


def conv_hallucination_tensors(names: Iterable[str]) -> Tensors:
    """CMDIAD's F2F by convolutions, both directions."""
    kernels, norms = (0, 3, 6, 9), (1, 4, 7)
    found = {}
    for source in SOURCES:
        found[source] = whole({f"{source}_conv.{index}.": f"layers.{index}." for index in kernels}, KERNEL)
        found[source] |= whole({f"{source}_conv.{index}.": f"layers.{index}." for index in norms}, NORM)
    return _both(found)


def image_hallucination_tensors(names: Iterable[str]) -> Tensors:
    """CMDIAD's F2I by convolutions."""
    return whole(_IMAGE, LAYER)


def patch_image_hallucination_tensors(names: Iterable[str]) -> Tensors:
    """CMDIAD's F2I by an MLP."""
    return whole({"rgb_norm.": "norm."} | {f"mlp.{index}.": f"mlp.{index}." for index in (0, 2, 4, 6)}, LAYER)


def features_from_image_tensors(names: Iterable[str]) -> Tensors:
    """CMDIAD's I2F, with as many bottlenecks as the file has; the first of a stage may change the width."""
    found = whole({"final_layer.": "output."}, LAYER)
    starts = dict(_STEM)
    for old, new in _STAGES.items():
        count = 1 + max(_numbers(rf"{re.escape(old)}(\d+)\.", names), default=0)
        for index in range(count):
            owners = [f"{kind}{number}." for number in (1, 2, 3) for kind in ("conv", "bn")]
            if any(name.startswith(f"{old}{index}.downsample.") for name in names):
                owners += ["downsample.0.", "downsample.1."]
            starts |= {f"{old}{index}.{owner}": f"{new}{index}.{owner}" for owner in owners}
    for old, new in starts.items():
        found |= whole({old: new}, NORM if re.search(r"bn\d\.$|downsample\.1\.$", old) else KERNEL)
    return found


def feature_mapping_tensors(names: Iterable[str]) -> Tensors:
    """CFM's mapping network, the big one if a projection bears a letter."""
    big = any(name.startswith(tuple(_PROJECTIONS)) for name in names)
    kept = {"input.", "output.", *(_PROJECTIONS if big else ("projection.",))}
    return whole({old: new for old, new in _MAPPING.items() if old in kept}, LAYER)


def _patch_layers(source: Source, layers: int) -> dict[str, str]:
    names = {f"{source}_norm.": "norm."}
    for index in range(layers):
        names[f"{source}_mlp.mlp_module.{index // 3}.fc{index % 3 + 1}."] = f"layers.{index}."
    return names


def _both(directions: dict[Source, Tensors]) -> Tensors:
    return {old: f"{source}.{new}" for source, names in directions.items() for old, new in names.items()}


def _numbers(pattern: str, names: Iterable[str]) -> list[int]:
    return [int(found[1]) for found in (re.match(pattern, name) for name in names) if found]
