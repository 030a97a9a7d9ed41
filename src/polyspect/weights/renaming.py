"""Bring a published network's tensors to our names, with nothing left over and nothing left out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ..errors import WeightsError
from .convert import State, named_tensors

if TYPE_CHECKING:
    from torch import Tensor, nn

Starts = dict[str, str]  # start of published names, ending in "." -> start of ours
Tensors = dict[str, str]  # published name of a tensor -> ours
LAYER = ("weight", "bias")
KERNEL = ("weight",)
NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")  # of a batch


def unwrap(content: Any, wrapper: str, origin: str) -> State:
    """The tensors by name in a checkpoint's content: those under `wrapper` if there is such an entry, else all.

    A leading ``module.`` on every name is dropped.

    Raises:
        WeightsError: no mapping, an empty one, or a value that is no tensor (names it).
    """
    if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
        content = content[wrapper]
    return named_tensors(content, origin)


def rename(
    state: Mapping[str, Tensor], network: nn.Module, names: Mapping[str, str], drop: Iterable[str], origin: str
) -> State:
    """The state dict of `network` from published tensors: each is renamed or dropped by a rule, or it is an error.

    A tensor that no rule is for may bear our name already, as in a file that ``polyspect weights import`` wrote. A
    convolution with a kernel of one position may become a matrix: its trailing dimensions of size 1 go.

    Args:
        names: Published name -> ours. Both may be starts that end in ".", which stand for all names under them.
        drop: Published names, or starts that end in ".", which have no place in `network`.
        origin: Names `state` in errors.

    Raises:
        WeightsError: a tensor is unknown, missing, of another shape or kind, or not finite (names it).
    """
    import torch

    dropped, wanted = tuple(drop), network.state_dict()
    renamed: State = {}
    unknown = []
    for name, tensor in state.items():
        if any(covers(rule, name) for rule in dropped):
            continue
        rule = next((rule for rule in names if covers(rule, name)), None)
        ours = name if rule is None else names[rule] + name[len(rule) :]
        if ours in wanted and ours not in renamed:
            renamed[ours] = tensor
        else:
            unknown.append(name)
    if unknown:
        raise WeightsError(
            f"{origin} has {listed(unknown)}, for which {type(network).__name__} has no place: it belongs to another "
            f"network or variant"
        )
    counters = [name for name in wanted if name.endswith(".num_batches_tracked")]  # which some exports leave out
    renamed |= {name: torch.zeros((), dtype=torch.int64) for name in counters if name not in renamed}
    missing = [name for name in wanted if name not in renamed]
    if missing:
        raise WeightsError(
            f"{origin} has nothing for {listed(missing)} of {type(network).__name__}: it is not whole, or belongs to "
            f"another network or variant"
        )
    return {name: _fitted(name, renamed[name], like, origin) for name, like in wanted.items()}


def whole(starts: Mapping[str, str], leaves: Iterable[str]) -> Tensors:
    """Published name -> ours of every tensor: `leaves` under each of `starts`."""
    return {old + leaf: new + leaf for old, new in starts.items() for leaf in leaves}


def covers(rule: str, name: str) -> bool:
    """Whether a rule is for a tensor: its name or, ending in ".", the start of it."""
    return name.startswith(rule) if rule.endswith(".") else name == rule


def _fitted(name: str, tensor: Tensor, like: Tensor, origin: str) -> Tensor:
    shape = tuple(tensor.shape)
    if tensor.ndim > like.ndim and set(shape[like.ndim :]) == {1}:
        tensor = tensor.reshape(shape[: like.ndim])
    if tensor.shape != like.shape:
        raise WeightsError(
            f"{origin}: the tensor for '{name}' has shape {shape}, the network needs {tuple(like.shape)}: "
            f"it belongs to another network or variant"
        )
    if tensor.is_floating_point() != like.is_floating_point():
        raise WeightsError(f"{origin}: the tensor for '{name}' is of type {tensor.dtype}, expected {like.dtype}")
    if not bool(tensor.isfinite().all()):
        raise WeightsError(f"{origin}: the tensor for '{name}' holds numbers that are not finite")
    return tensor


def listed(names: Iterable[str]) -> str:
    """The first few names, and how many more there are; "nothing" for none."""
    quoted = [f"'{name}'" for name in names]
    return ", ".join(quoted[:4]) + (f" and {len(quoted) - 4} more" if len(quoted) > 4 else "") or "nothing"
