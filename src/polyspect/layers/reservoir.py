"""Samples of bounded size of rows that come in any number (Vitter, "Random sampling with a reservoir", 1985)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class Reservoir:
    """A uniform random sample of rows that come in any number, of bounded size (Vitter's algorithm R)."""

    def __init__(self, max_bytes: int, seed: int) -> None:
        self.seen = 0
        self._max_bytes, self._generator = max_bytes, np.random.default_rng(seed)
        self._parts: list[Tensor] = []  # what came in until the limit was met
        self._full: Tensor | None = None  # (capacity, D), from then on

    def add(self, rows: Tensor) -> None:
        """Take in rows (n, D); the outcome does not depend on how they are batched."""
        capacity = max(1, self._max_bytes // (4 * rows.shape[1]))
        fitting = max(0, min(len(rows), capacity - self.seen))
        if fitting:
            self._parts.append(rows[:fitting].clone())
        self.seen += fitting
        rest = rows[fitting:]
        if len(rest) == 0:
            return
        full = self._gather()
        order = np.arange(self.seen + 1, self.seen + 1 + len(rest))  # how many rows there are with each new one
        slots = (self._generator.random(len(rest)) * order).astype(np.int64)
        last = {int(slot): row for row, slot in enumerate(slots) if slot < capacity}  # a later row replaces an earlier
        full[list(last)] = rest[list(last.values())]
        self.seen += len(rest)

    def take(self) -> Tensor:
        """The sample, (n, D)."""
        return self._gather() if self._parts or self._full is not None else torch.empty(0, 0)

    def _gather(self) -> Tensor:
        if self._full is None:
            self._full = _join(self._parts)
        return self._full


def _join(parts: list[Tensor]) -> Tensor:
    """Concatenate and empty `parts`, releasing each as it is copied, so that memory does not double."""
    joined = torch.empty(sum(map(len, parts)), parts[0].shape[1])
    end = len(joined)
    while parts:
        part = parts.pop()
        joined[end - len(part) : end] = part
        end -= len(part)
    return joined
