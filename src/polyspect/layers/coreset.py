"""Coresets: few rows that cover many, by exact greedy k-centre selection, and the random projection before it.

    r_i = min over chosen c of |x_i - c|     (1)     the next choice is the row with the largest r_i

Gonzalez, "Clustering to minimize the maximum intercluster distance" (1985); used for memory banks by Roth et al.,
"Towards Total Recall in Industrial Anomaly Detection" (CVPR 2022), Sec. 3.2. Projection: Li, Hastie and Church, "Very
sparse random projections" (KDD 2006).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import ConfigError
from ..samples import check_shapes

ROWS = 8192  # rows handled at a time when a pass over all patches needs a float64 copy
CENTRES = 512  # chosen centres that stale rows catch up with at a time
STEPS = 128  # most choices made from one candidate set


def jl_dimension(n: int, eps: float) -> int:
    """Dimension that keeps all distances between `n` points within a factor 1 +- `eps` (Johnson-Lindenstrauss)."""
    return int(4 * math.log(n) / (eps**2 / 2 - eps**3 / 3))


def sparse_random_projection(
    dim_in: int, n: int, eps: float = 0.9, *, generator: torch.Generator | None = None
) -> Tensor | None:
    """A very sparse random matrix P (d, dim_in): ``x @ P.T`` about keeps distances. None where it would not shrink.

    d is `jl_dimension(n, eps)`; an entry is nonzero with probability 1 / sqrt(dim_in), then +-sqrt(sqrt(dim_in) / d).

    Args:
        n: How many points will be projected.
        generator: A CPU generator; without one, the matrix of seed 0.

    Raises:
        ConfigError: `eps` is not in (0, 1).
    """
    if not 0 < eps < 1:
        raise ConfigError(f"`eps` of the random projection must lie between 0 and 1, got {eps}")
    dim_out = jl_dimension(n, eps)
    if dim_out >= dim_in:
        return None
    draw = torch.rand(dim_out, dim_in, generator=generator or torch.Generator().manual_seed(0))
    density = 1 / math.sqrt(dim_in)
    size = math.sqrt(1 / (density * dim_out))
    return torch.where(draw < density / 2, -size, torch.where(draw < density, size, 0.0))


def greedy_coreset(
    x: Tensor, size: int, start: int = 0, *, candidates: int = 2048, progress: Callable[[int, int], None] | None = None
) -> Tensor:
    """Choose `size` rows of `x` (N, D) that cover it: each next row is the one farthest from all chosen so far (Eq. 1).

    Exact: distances are those of float64, and rows whose squared distances agree to 1e-14 of the squared extent of `x`
    count as tied, the lowest index winning. A row is chosen once only; when nothing but copies of chosen rows is left,
    they follow by index. The result does not depend on `candidates`.

    A plain loop compares every row with every centre, one centre per pass over `x`. But distances only fall, so an old
    one is an upper bound, and a row matters only while its bound is among the largest. Each round therefore takes the
    `candidates` rows of largest bound, lets them catch up with the centres they have not met (one matrix product for
    many centres, and no more for a row once its bound falls out of the race), and chooses among them for as long as
    their best beats every bound left outside. Memory beyond `x`: 24 bytes per row, ``8 * size * D`` bytes of centres
    and some blocks of constant size; nothing grows per choice.

    Args:
        size: 1..N.
        start: Index of the first choice.
        candidates: How many rows to look at in the first round; adapted from then on.
        progress: Called as ``progress(chosen, size)`` once per round.

    Returns:
        int64 (size,), in the order of choice.

    Raises:
        ConfigError: `size` or `start` out of range.
    """
    _check(x, size, start)
    N, state = len(x), _Cover(x, size, start)
    count = min(candidates, N)
    while state.chosen < size:
        made = state.round(count)
        if made < 8:
            count = min(2 * count, N)
        elif made == STEPS:
            count = max(count // 4, min(256, N))
        if progress is not None:
            progress(state.chosen, size)
    return state.order.to(x.device)


def l1_coreset(x: Tensor, size: int, start: int = 0, *, progress: Callable[[int, int], None] | None = None) -> Tensor:
    """`size` rows of `x` (N, D), each next one the farthest by ``l1`` from all before it; ties go to the lower index.

    Otherwise as `greedy_coreset`, but one pass over `x` per choice; `progress` is called after each.
    """
    _check(x, size, start)
    order = torch.full((size,), start, dtype=torch.int64, device=x.device)
    bound = x.new_full((len(x),), torch.inf)
    for count in range(1, size):
        newest = order[count - 1]
        bound = torch.minimum(bound, torch.cdist(x, x[newest][None], p=1.0)[:, 0])
        bound[order[:count]] = -1.0
        order[count] = (bound == bound.max()).to(torch.uint8).argmax()  # the first of equals on every device
        if progress is not None:
            progress(count + 1, size)
    return order


def _check(x: Tensor, size: int, start: int) -> None:
    check_shapes(x=(x, "N D"))
    if not 1 <= size <= len(x):
        raise ConfigError(f"a coreset of {size} rows was asked for, but there are {len(x)} rows to choose from")
    if not 0 <= start < len(x):
        raise ConfigError(f"the coreset's start row is {start}, but rows go from 0 to {len(x) - 1}")


class _Cover:
    """The state of `greedy_coreset`: squared distances, as upper bounds, and how many centres each row has met."""

    def __init__(self, x: Tensor, size: int, start: int) -> None:
        N, D = x.shape
        self.x, self.origin = x, x[start].double()  # distances are taken from here: exact for integers, small offsets
        self.norm = torch.cat([(rows.double() - self.origin).square().sum(1) for rows in x.split(ROWS)])  # N
        self.bound = self.norm.clone()  # N, squared; -1 once chosen
        self.bound[start] = -1.0
        self.met = torch.ones(N, dtype=torch.int64, device=x.device)  # N
        self.tie = 1e-14 * float(self.norm.max())
        self.centres = torch.zeros(size, D, dtype=torch.float64, device=x.device)
        self.centre_norm = torch.zeros(size, dtype=torch.float64, device=x.device)
        self.order = torch.full((size,), start, dtype=torch.int64)
        self.chosen = 1

    def round(self, count: int) -> int:
        """Choose from the `count` rows of largest bound while that is safe; return how many were chosen."""
        outside = -math.inf  # largest bound among the other rows
        if count < len(self.x):
            values, rows = self.bound.topk(count + 1)
            outside, rows = float(values[-1]), rows[:-1].sort().values
        else:
            rows = torch.arange(len(self.x), device=self.x.device)
        vectors = self.x[rows].double() - self.origin  # n D
        self._catch_up(rows, vectors, outside - self.tie)
        alive = (self.bound[rows] >= outside - self.tie).nonzero()[:, 0]
        return self._choose(rows[alive], vectors[alive], outside)

    def _catch_up(self, rows: Tensor, vectors: Tensor, floor: float) -> None:
        """Bring `rows` up to date with the centres chosen since; a row whose bound falls below `floor` stops there."""
        bound, met, norm = self.bound[rows], self.met[rows], self.norm[rows]
        for low in range(int(met.min()), self.chosen, CENTRES):
            high = min(low + CENTRES, self.chosen)
            stale = ((met < high) & (bound >= max(floor, 0.0))).nonzero()[:, 0]
            for part in stale.split(ROWS):
                product = vectors[part] @ self.centres[low:high].T  # n c
                nearest = product.mul_(-2).add_(self.centre_norm[low:high]).amin(1)
                bound[part] = torch.minimum(bound[part], (nearest + norm[part]).clamp_(min=0))
            met[stale] = high
        self.bound[rows], self.met[rows] = bound, met

    def _choose(self, rows: Tensor, vectors: Tensor, outside: float) -> int:
        """Plain greedy steps among up-to-date `rows` (ascending), while the best of them beats `outside`."""
        bound, norm, made = self.bound[rows], self.norm[rows], 0
        while len(rows) and made < STEPS and self.chosen < len(self.order):
            best = float(bound.max())
            if not best - self.tie > outside:
                break
            pick = int((bound >= best - self.tie).to(torch.uint8).argmax())  # the first, so the lowest index
            self.order[self.chosen] = rows[pick]
            self.centres[self.chosen], self.centre_norm[self.chosen] = vectors[pick], norm[pick]
            distance = torch.addmv(norm + norm[pick], vectors, vectors[pick], alpha=-2).clamp_(min=0)
            bound = torch.minimum(bound, distance)
            bound[pick] = -1.0
            self.chosen, made = self.chosen + 1, made + 1
        self.bound[rows], self.met[rows] = bound, self.chosen
        return made
