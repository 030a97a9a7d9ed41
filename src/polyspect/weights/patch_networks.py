"""Published networks of small patches: EfficientAD's teacher, Shape-Guided's signed distances, AST's pair.

    file                                                     network
    EfficientAD   0.*, 3.*, 6.*, 8.* (its public port)       backbones.patch_description.PatchDescription
    EfficientAD   conv1.*, ..., conv4.* (anomalib)           the same
    Shape-Guided  {"sdf_model": encoder.*, NIF.*, ...}       layers.signed_distance.SignedDistance

Every function takes the file's content or its state dict, reads only names, shapes and kinds from the network, and
raises WeightsError for a tensor that is unknown, missing, of another shape or kind, or not finite.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .convert import State
from .renaming import rename, unwrap

if TYPE_CHECKING:
    from torch import nn

_SEQUENCE = (0, 3, 6, 8, 10, 12)  # places of the convolutions among activations and means
_ENCODER = ("conv1", "conv2", "conv3", "fc1", "fc2")
_NEW_WEIGHT_NORM = ("parametrizations.weight.original0", "parametrizations.weight.original1")


def patch_description_state(content: Any, network: nn.Module, origin: str = "the EfficientAD checkpoint") -> State:
    """The state dict of a `PatchDescription`, small or medium, from a teacher of either public implementation.

    The files differ in names and in where the image is normalised (in the network, or before it), not in numbers.

    Raises:
        WeightsError: a tensor does not fit (names it): the file may be of the other size.
    """
    names: dict[str, str] = {}
    for index, place in enumerate(_SEQUENCE):
        names |= {f"{place}.": f"convolutions.{index}.", f"conv{index + 1}.": f"convolutions.{index}."}
    return rename(unwrap(content, "state_dict", origin), network, names, (), origin)


def signed_distance_state(content: Any, network: nn.Module, origin: str = "the Shape-Guided checkpoint") -> State:
    """The state dict of a `SignedDistance` from Shape-Guided's ``ckpt_*.pth``.

    Weight norm is kept, gain and direction, under the names of torch's old and new implementation.

    Raises:
        WeightsError: a tensor does not fit (names it).
    """
    names = {f"encoder.{layer}.": f"encoder.layers.{i}." for i, layer in enumerate(_ENCODER)}
    names |= {f"encoder.bn{i + 1}.": f"encoder.norms.{i}." for i in range(len(_ENCODER))}
    for i in range(7):
        for gain, direction in (("weight_g", "weight_v"), _NEW_WEIGHT_NORM):
            names |= {f"NIF.fc4{i}.{gain}": f"field.hidden.{i}.gain"}
            names |= {f"NIF.fc4{i}.{direction}": f"field.hidden.{i}.direction"}
        names[f"NIF.fc4{i}.bias"] = f"field.hidden.{i}.bias"
    names |= {"NIF.fc1.": "field.of_code.", "NIF.fc2.": "field.of_point.", "NIF.fc3.": "field.join."}
    names["NIF.fc5."] = "field.output."
    return rename(unwrap(content, "sdf_model", origin), network, names, (), origin)
