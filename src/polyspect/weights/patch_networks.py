"""Published networks of small patches: EfficientAD's teacher, Shape-Guided's signed distances, AST's pair.

    file                                                     network
    EfficientAD   0.*, 3.*, 6.*, 8.* (its public port)       backbones.patch_description.PatchDescription
    EfficientAD   conv1.*, ..., conv4.* (anomalib)           the same
    Shape-Guided  {"sdf_model": encoder.*, NIF.*, ...}       layers.signed_distance.SignedDistance
    AST teacher   module_list.{3,5,7,9}.{s1,s2}.*            layers.flow.Flow
    AST student   conv1.*, res.*, conv2.*, gamma             layers.flow.ConvStudent

Every function takes the file's content or its state dict, reads only names, shapes and kinds from the network, and
raises WeightsError for a tensor that is unknown, missing, of another shape or kind, or not finite.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from .convert import State
from .renaming import LAYER, NORM, Tensors, rename, unwrap, whole

if TYPE_CHECKING:
    from torch import nn

    from ..layers.flow import ConvStudent, Flow

_SEQUENCE = (0, 3, 6, 8, 10, 12)  # places of the convolutions among activations and means
_ENCODER = ("conv1", "conv2", "conv3", "fc1", "fc2")
_UNUSED = ("gamma",)  # tensors in AST's student that its network never uses
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


def flow_state(content: Any, network: Flow, origin: str = "the AST teacher's checkpoint") -> State:
    """The state dict of a `Flow` from AST's ``*_teacher.pth``; the permutations are no part of either.

    Raises:
        WeightsError: a tensor does not fit (names it): the file may be of another mode.
    """
    names = flow_names(len(network.blocks), bool(network.position))
    return rename(unwrap(content, "state_dict", origin), network, names, (), origin)


def conv_student_state(content: Any, network: ConvStudent, origin: str = "the AST student's checkpoint") -> State:
    """The state dict of a `ConvStudent` from AST's ``*_student.pth``. Dropped: its ``gamma``, which is never used.

    Raises:
        WeightsError: a tensor does not fit (names it): the file may be of another mode.
    """
    names = conv_student_names(len(network.blocks))
    return rename(unwrap(content, "state_dict", origin), network, names, _UNUSED, origin)


def flow_names(blocks: int, position: bool) -> Tensors:
    """Name of every tensor in AST's ``*_teacher.pth`` -> name in a `Flow` of so many blocks.

    The file numbers the nodes of a graph: couplings are every second one, from 3 with a positional encoding, from 2
    without.
    """
    names: Tensors = {}
    for index in range(blocks):
        node = f"module_list.{2 * index + (3 if position else 2)}"
        for theirs, ours in (("s1", "of_first"), ("s2", "of_second")):
            names[f"{node}.{theirs}.gamma"] = f"blocks.{index}.{ours}.gain"
            convs = {f"{node}.{theirs}.conv{n}.": f"blocks.{index}.{ours}.conv{n}." for n in (1, 2)}
            names |= whole(convs, LAYER)
    return names


def conv_student_names(blocks: int) -> Tensors:
    """Name of every tensor in AST's ``*_student.pth``, but for its ``gamma``, -> name in a `ConvStudent`."""
    names = whole({"conv1.": "input.", "conv2.": "output."}, LAYER)
    for index in range(blocks):
        names |= whole({f"res.{index}.l{n}.": f"blocks.{index}.conv{n}." for n in (1, 2)}, LAYER)
        names |= whole({f"res.{index}.bn{n}.": f"blocks.{index}.norm{n}." for n in (1, 2)}, NORM)
    return names


def flow_tensors(names: Iterable[str]) -> Tensors:
    """`flow_names` for the couplings that a file's names show."""
    nodes = [int(match[1]) for name in names if (match := re.match(r"module_list\.(\d+)\.", name))]
    last = max(nodes, default=9)
    return flow_names(max(last // 2, 1), position=last % 2 == 1)


def conv_student_tensors(names: Iterable[str]) -> Tensors:
    """`conv_student_names` for the blocks that a file's names show."""
    blocks = [int(match[1]) + 1 for name in names if (match := re.match(r"res\.(\d+)\.", name))]
    return conv_student_names(max(blocks, default=4))
