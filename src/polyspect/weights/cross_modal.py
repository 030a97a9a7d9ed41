"""Published networks that link two modalities: M3DM's fusion, CMDIAD's hallucination, CFM's mapping.

    file                                             network of `polyspect.layers`
    M3DM   {"model": xyz_norm.*, xyz_mlp.*, ...}     feature_fusion.FeatureFusion
    CMDIAD {"model": xyz_mlp.*, rgb_mlp.*, ...}      hallucination.PatchHallucination, one direction of the two
    CMDIAD {"model": xyz_conv.*, rgb_conv.*}         hallucination.ConvHallucination, one direction of the two
    CMDIAD {"model": conv1.*, ..., norm.*}           hallucination.ImageHallucination
    CMDIAD {"model": rgb_norm.*, mlp.*}              hallucination.PatchImageHallucination
    CMDIAD {"model": conv1.*, layer1.*, ...}         hallucination.FeaturesFromImage
    CFM    input.*, projection.*, output.*           feature_mapping.FeatureMapping

Every function takes the file's content or its state dict, reads only names, shapes and kinds from the network, and
raises WeightsError for a tensor that is unknown, missing, of another shape or kind, or not finite.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from ..errors import WeightsError
from .convert import State
from .renaming import rename, unwrap

if TYPE_CHECKING:
    from torch import nn

Source = Literal["xyz", "rgb"]


def feature_fusion_state(content: Any, network: nn.Module, origin: str = "the M3DM fusion checkpoint") -> State:
    """The state dict of a `FeatureFusion` from M3DM's UFF file.

    Raises:
        WeightsError: a tensor does not fit (names it).
    """
    names: dict[str, str] = {}
    for half in ("xyz", "rgb"):
        names |= {
            f"{half}_norm.": f"{half}.norm.",
            f"{half}_mlp.fc1.": f"{half}.mlp.0.",
            f"{half}_mlp.fc2.": f"{half}.mlp.2.",
            f"{half}_head.": f"{half}.head.",
        }
    return rename(unwrap(content, "model", origin), network, names, (), origin)


def patch_hallucination_state(
    content: Any, network: nn.Module, source: Source, origin: str = "the CMDIAD checkpoint"
) -> State:
    """The state dict of a `PatchHallucination` from CMDIAD's F2F file, which holds both directions.

    Args:
        source: The modality that is there: ``"xyz"`` in the PCs file, ``"rgb"`` in the RGB file. Dropped: the other.

    Raises:
        WeightsError: a tensor does not fit (names it).
    """
    names = {f"{source}_norm.": "norm."}
    for index in range(sum(name.startswith("layers.") and name.endswith(".weight") for name in network.state_dict())):
        names[f"{source}_mlp.mlp_module.{index // 3}.fc{index % 3 + 1}."] = f"layers.{index}."
    other = "rgb" if source == "xyz" else "xyz"
    drop = (f"{other}_norm.", f"{other}_mlp.")
    return rename(unwrap(content, "model", origin), network, names, drop, origin)


def conv_hallucination_state(
    content: Any, network: nn.Module, source: Source, origin: str = "the CMDIAD checkpoint"
) -> State:
    """The state dict of a `ConvHallucination` from a file with both directions; `source` as above.

    Raises:
        WeightsError: a tensor does not fit (names it).
    """
    other = "rgb" if source == "xyz" else "xyz"
    names = {f"{source}_conv.": "layers."}
    return rename(unwrap(content, "model", origin), network, names, (f"{other}_conv.",), origin)


def image_hallucination_state(content: Any, network: nn.Module, origin: str = "the CMDIAD checkpoint") -> State:
    """The state dict of an `ImageHallucination` from CMDIAD's F2I file. Dropped: its LayerNorm, which is never used.

    Raises:
        WeightsError: a tensor does not fit (names it).
    """
    names = {"conv1.": "reduce.", "conv2.": "refine.0.", "conv3.": "refine.2.", "conv4.": "refine.4."}
    return rename(unwrap(content, "model", origin), network, names, ("norm.",), origin)


def patch_image_hallucination_state(content: Any, network: nn.Module, origin: str = "the CMDIAD checkpoint") -> State:
    """The state dict of a `PatchImageHallucination`.

    Raises:
        WeightsError: a tensor does not fit (names it).
    """
    names = {"rgb_norm.": "norm.", "mlp.": "mlp."}
    return rename(unwrap(content, "model", origin), network, names, (), origin)


def features_from_image_state(content: Any, network: nn.Module, origin: str = "the CMDIAD checkpoint") -> State:
    """The state dict of a `FeaturesFromImage` from CMDIAD's I2F file. Dropped: its fourth stage, which is never used.

    Raises:
        WeightsError: a tensor does not fit (names it).
    """
    names = {f"{part}.": f"{part}." for part in ("conv1", "bn1", "conv2", "bn2")}
    names |= {f"layer{number}.": f"stages.{number - 1}." for number in (1, 2, 3)}
    names["final_layer."] = "output."
    return rename(unwrap(content, "model", origin), network, names, ("layer4.",), origin)


def feature_mapping_state(content: Any, network: nn.Module, origin: str = "the CFM checkpoint") -> State:
    """The state dict of a `FeatureMapping` from a CFM file, of the base or the big variant.

    Raises:
        WeightsError: a tensor does not fit (names it): the file may be of the other direction or variant.
    """
    names = {"input.": "input.", "output.": "output.", "projection.": "hidden.0."}
    names |= {f"projection_{letter}.": f"hidden.{index}." for index, letter in enumerate("abcde")}
    return rename(unwrap(content, "model", origin), network, names, (), origin)


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
