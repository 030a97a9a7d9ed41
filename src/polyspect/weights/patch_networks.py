"""Published networks of small patches: EfficientAD's teacher, Shape-Guided's signed distances, AST's pair.

    file                                                     network
    EfficientAD   0.*, 3.*, 6.*, 8.* (its public port)       backbones.patch_description.PatchDescription
    EfficientAD   conv1.*, ..., conv4.* (anomalib)           the same

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
