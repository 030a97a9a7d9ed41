"""Stored outputs of the official programs, and the numbers that both sides fill weights and inputs with."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]

FOLDER = Path(__file__).resolve().parents[2] / "shared" / "reference" / "golden"


def noise(name: str, *shape: int) -> Tensor:
    """Standard normal numbers that depend on the name only."""
    generator = np.random.default_rng(zlib.crc32(f"0:{name}".encode()))
    return torch.from_numpy(generator.standard_normal(shape).astype(np.float32))


def filled(name: str, *shape: int) -> Tensor:
    """A weight of the stored runs: He-scaled matrices and kernels, norms near one, small biases."""
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "num_batches_tracked":
        return torch.zeros(shape, dtype=torch.int64)
    z = noise(name, *shape)
    if leaf == "running_var":
        return 1 + 0.2 * z.abs()
    if leaf == "bias":
        return 0.05 * z
    if len(shape) >= 2:
        return z * np.float32(np.sqrt(2 / np.prod(shape[1:])))
    return 1 + 0.1 * z if leaf == "weight" else 0.1 * z


def filled_state(shapes: Shapes) -> dict[str, Tensor]:
    """`filled` for every name of a published state dict."""
    return {name: filled(name, *shape) for name, shape in shapes.items()}


def layer(name: str, *shape: int, bias: bool = True) -> Shapes:
    """Names and shapes of a linear layer or convolution."""
    return {f"{name}.weight": shape} | ({f"{name}.bias": shape[:1]} if bias else {})


def batch_norm(name: str, channels: int) -> Shapes:
    """Names and shapes of a batch norm."""
    parts = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.{part}": (channels,) for part in parts} | {f"{name}.num_batches_tracked": ()}


def learned(state: dict[str, Tensor]) -> int:
    """How many numbers of a state dict are learned: statistics and counters of norms aside."""
    beside = ("running_mean", "running_var", "num_batches_tracked")
    return sum(tensor.numel() for name, tensor in state.items() if not name.endswith(beside))


def parameters(module: torch.nn.Module) -> int:
    """How many numbers are learned."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


class Golden:
    """One archive of stored outputs, whole or as (shape, spread, every k-th number); skips where it is absent."""

    def __init__(self, name: str) -> None:
        path = FOLDER / name
        if not path.is_file():
            pytest.skip(f"stored outputs are not here: {path}")
        with np.load(path, allow_pickle=False) as archive:
            self.stored = dict(archive)

    def tensor(self, name: str) -> Tensor:
        """A whole array."""
        return torch.from_numpy(self.stored[name])

    def number(self, name: str) -> float:
        """A scalar."""
        return float(self.stored[name])

    def check(self, name: str, got: Tensor, tolerance: float, relative: float = 0.0) -> None:
        """Largest difference below `tolerance` standard deviations, plus `relative` times the number itself."""
        numbers = got.detach().double().numpy()
        if name in self.stored:
            expected = self.stored[name].astype(np.float64)
            spread = expected.std()
        else:
            assert numbers.shape == tuple(self.stored[f"{name}__shape"])
            expected, spread = self.stored[f"{name}__sample"], self.stored[f"{name}__std"]
            numbers = numbers.ravel()[:: int(self.stored[f"{name}__stride"])]
        np.testing.assert_allclose(numbers, expected, rtol=relative, atol=tolerance * spread, err_msg=name)
