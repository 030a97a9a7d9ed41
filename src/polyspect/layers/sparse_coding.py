"""Rebuild vectors from the rows of a dictionary that are nearest to them, few at a time.

Shape-Guided (ICML 2023), as released: what is normal about a feature is its orthogonal matching pursuit, OMP, over the
10 nearest of a bank (5 for RGB); what cannot be rebuilt is the anomaly. Atoms are used as they are, not normalised:

    r = x;  repeat:  add the unused atom with the greatest |a . r|;  r = x - (projection of x on the atoms so far)

So a long atom can win over one that equals x, and a vector of the bank is not always rebuilt from itself.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigError
from ..samples import check_shapes
from .memory import nearest

_DEPENDENT = 1e-12  # square of what is new in an atom, relative to its own: below, the atom adds nothing
_BLOCK = 1 << 24  # numbers of atoms held at a time


class Rebuilt(NamedTuple):
    """Vectors from dictionary rows.

    Attributes:
        vectors: (Q, D), sparse combinations of rows.
        distance: (Q,), how far the queries are from them.
        rows: (Q, k) int64, the rows that could be used, nearest first.
    """

    vectors: Tensor
    distance: Tensor
    rows: Tensor


def rebuild(queries: Tensor, bank: Tensor, neighbours: int = 10, atoms: int = 3, *, skip: int = 0) -> Rebuilt:
    """Rebuild each of `queries` (Q, D) from the rows of `bank` (K, D) near to it.

    Args:
        neighbours: k, the rows that may be used.
        atoms: How many of them are used at most. ``neighbours=1, atoms=1`` projects onto the nearest row.
        skip: Nearest rows to leave out; 1 where the queries are rows of the bank themselves.

    Raises:
        ConfigError: the bank has fewer than ``neighbours + skip`` rows, or `atoms` is not in 1..`neighbours`.
    """
    check_shapes(queries=(queries, "Q D"), bank=(bank, "K D"))
    if skip < 0:
        raise ConfigError(f"`skip` must be at least 0, got {skip}")
    _, rows = nearest(queries, bank, neighbours + skip)
    rows = rows[:, skip:]
    block = max(1, _BLOCK // max(1, neighbours * bank.shape[1]))
    vectors = [matching_pursuit(x, bank[near], atoms) for x, near in zip(queries.split(block), rows.split(block))]
    rebuilt = torch.cat(vectors) if vectors else queries
    return Rebuilt(rebuilt, torch.linalg.vector_norm(queries - rebuilt, dim=1), rows)


def matching_pursuit(queries: Tensor, dictionaries: Tensor, atoms: int = 3) -> Tensor:
    """The OMP of each of `queries` (Q, D) over a dictionary of its own, (Q, k, D): combinations of rows, (Q, D).

    All queries at once, in float64, by Gram-Schmidt: each chosen atom is made orthogonal to the earlier ones,
    and the query's share along it moves from the residual to the result. Of equal correlations the first row wins. An
    atom that depends on the earlier ones adds nothing.

    Raises:
        ConfigError: `atoms` is not in 1..k.
    """
    k = check_shapes(queries=(queries, "Q D"), dictionaries=(dictionaries, "Q k D"))["k"]
    if not 1 <= atoms <= k:
        raise ConfigError(f"`atoms` must be in 1..{k}, the rows of the dictionary, got {atoms}")
    x, rows = queries.double(), dictionaries.double()
    residual = x
    basis: list[Tensor] = []
    used = torch.zeros(rows.shape[:2], dtype=torch.bool, device=rows.device)
    for _ in range(atoms):
        match = torch.einsum("qkd,qd->qk", rows, residual).abs()
        chosen = match.masked_fill(used, -1).argmax(1, keepdim=True)  # Q 1
        used = used.scatter(1, chosen, True)
        atom = rows.gather(1, chosen[..., None].expand(-1, -1, x.shape[1]))[:, 0]  # Q D
        size = atom.square().sum(1, keepdim=True)
        for _twice in range(2):  # once loses digits where the atom is nearly dependent
            for direction in basis:
                atom = atom - (atom * direction).sum(1, keepdim=True) * direction
        new = atom.square().sum(1, keepdim=True)
        direction = torch.where(new > _DEPENDENT * size, atom * new.rsqrt(), 0)
        residual = residual - (residual * direction).sum(1, keepdim=True) * direction
        basis.append(direction)
    return (x - residual).to(queries.dtype)
