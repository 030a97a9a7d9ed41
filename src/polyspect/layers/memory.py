"""Memory of normal patches: which of them to keep, and how far a new patch is from the nearest one.

    M    memory bank, (K, D): a coreset of the patches of good parts, see `polyspect.layers.coreset`
    d_q  = min over k of |q - M_k|               (1)  the score of a patch q
    w    = 1 - exp(d_q) / sum_n exp(|q - n|)     (2)  trust in the worst patch; n: rows near its match in the bank

Roth et al., "Towards Total Recall in Industrial Anomaly Detection" (CVPR 2022), Eqs. 6 and 7.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ..errors import ConfigError, DataError, NotFittedError
from ..samples import check_shapes
from .coreset import ROWS, greedy_coreset, sparse_random_projection
from .maps import MapMoments
from .reservoir import Reservoir

__all__ = ["MemoryBank", "greedy_coreset", "nearest", "reweight", "sparse_random_projection"]

log = logging.getLogger("polyspect")

Reweighting = Literal["btf", "patchcore", "none"]  # form of w in Eq. 2; "none": w = 1

STRIPES = 32  # that the columns of a product are split into to find its smallest entries
FEW = 64  # unsure queries that are worth comparing with more candidates; for more, float64 at once costs less


def nearest(queries: Tensor, bank: Tensor, k: int = 1, *, block: int = 1 << 22) -> tuple[Tensor, Tensor]:
    """The `k` rows of `bank` (K, D) nearest to each row of `queries` (Q, D), exactly, nearest first (Eq. 1).

    One matrix product finds the candidates; their distances are then taken from direct differences in float64, so equal
    vectors are at exactly 0. Where rounding of the product could hide a true neighbour, more candidates are compared,
    and if that does not settle it the query is searched again in float64. The answer for a query does not depend on the
    other queries, nor on `block`. Ties go to the lower index (unless more than k + 4 rows tie).

    Args:
        k: Neighbours wanted, 1..K.
        block: Most entries of the distance matrix held at a time.

    Returns:
        Distances float32 (Q, k) and row indices int64 (Q, k).

    Raises:
        ConfigError: `k` is not in 1..K.
    """
    check_shapes(queries=(queries, "Q D"), bank=(bank, "K D"))
    K = len(bank)
    if queries.device.type == "mps":  # no float64 there
        distances, indices = nearest(queries.cpu(), bank.cpu(), k, block=block)
        return distances.to(queries.device), indices.to(queries.device)
    if not 1 <= k <= K:
        raise ConfigError(f"{k} nearest neighbours were asked for, but the bank has {K} vectors")
    queries, bank = queries.detach(), bank.detach()
    side = _Side(bank)
    parts = queries.split(max(1, block // K))
    buffer = queries.new_empty(max(map(len, parts)), len(side.norm))
    found = [_nearest_block(rows, side, k, buffer[: len(rows)]) for rows in parts]
    return torch.cat([d for d, _ in found]), torch.cat([i for _, i in found])


class _Side:
    """The bank's side of the matrix product of `nearest`."""

    def __init__(self, bank: Tensor) -> None:
        K, self.bank = len(bank), bank
        self.centre = bank.mean(0)  # near the data, distances of the product form lose little to cancellation
        self.shifted = bank.new_zeros(K + -K % STRIPES, bank.shape[1])  # K' D, rows beyond K are padding
        torch.sub(bank, self.centre, out=self.shifted[:K])
        length = torch.linalg.vector_norm(self.shifted, dim=1)
        self.radius, self.norm = length.max(), length.square()  # K'
        self.norm[K:] = torch.inf


def _nearest_block(queries: Tensor, side: _Side, k: int, product: Tensor) -> tuple[Tensor, Tensor]:
    """`nearest` for as many queries as fit at once; `product` (Q, K') is overwritten."""
    bank, K = side.bank, len(side.bank)
    moved = queries - side.centre
    torch.addmm(side.norm, moved, side.shifted.T, alpha=-2, out=product)  # squared distances less |q|^2
    # |error of an entry| <= slack / 2, so a row left out can only be nearer if its gap to the candidates is small
    slack = 2 * _roundoff(queries) * (queries.shape[1] + 8) * (moved.norm(dim=1) + side.radius).square()
    distances = torch.empty(len(queries), k, dtype=queries.dtype, device=queries.device)
    indices = torch.empty(len(queries), k, dtype=torch.int64, device=queries.device)
    unsure = torch.arange(len(queries), device=queries.device)
    for count in (k, k + 4, k + 60):
        values, candidates = _smallest(product if count == k else product[unsure], min(count + 1, K), K)
        distances[unsure], indices[unsure] = _rank(queries[unsure], bank, candidates[:, :count], k)
        if count >= K:
            return distances, indices
        unsure = unsure[~(values[:, count] - values[:, k - 1] > slack[unsure])]
        if len(unsure) == 0:
            return distances, indices
        if count > k and len(unsure) > FEW:
            break
    for rows in unsure.split(max(1, len(queries) // 2)):  # float64 entries are twice as large
        wide = (bank.double() - side.centre).T  # D K
        product64 = torch.addmm(wide.square().sum(0), queries[rows].double() - side.centre, wide, alpha=-2)
        candidates = product64.topk(min(k + 4, K), largest=False).indices
        distances[rows], indices[rows] = _rank(queries[rows], bank, candidates, k)
    return distances, indices


def _smallest(values: Tensor, count: int, real: int) -> tuple[Tensor, Tensor]:
    """The `count` smallest of each row of `values` (Q, K'), ascending, and their columns, below `real`.

    The columns lie in stripes; the smallest entries lie where the minima over the stripes are smallest. So one cheap
    pass and two short selections do the work of a long one.
    """
    Q, columns = values.shape
    width = columns // STRIPES
    if width <= 2 * count:
        smallest, found = values.topk(count, largest=False)
    else:
        stripes = values.view(Q, STRIPES, width)
        places = stripes.amin(1).topk(count, largest=False).indices  # Q count
        entries = stripes.gather(2, places[:, None].expand(-1, STRIPES, -1))  # Q STRIPES count
        smallest, order = entries.flatten(1).topk(count, largest=False)
        found = order.div(count, rounding_mode="floor") * width + places.gather(1, order % count)
    return smallest, found.clamp_(max=real - 1)  # a NaN can point into the padding


def _rank(queries: Tensor, bank: Tensor, candidates: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` nearest of each query's `candidates` (Q, c), by direct differences; equal distances by index."""
    candidates = candidates.sort(dim=1).values
    step = max(1, (1 << 22) // (candidates.shape[1] * bank.shape[1]))  # keeps the differences under 32 MiB
    parts = []
    for rows in torch.arange(len(queries), device=queries.device).split(step):
        difference = bank[candidates[rows]] - queries[rows, None]  # q c D
        parts.append(difference.double().square_().sum(2))
    squared, order = torch.cat(parts).sort(dim=1, stable=True)
    return squared[:, :k].sqrt().to(queries.dtype), candidates.gather(1, order[:, :k])


def _roundoff(x: Tensor) -> float:
    """Relative rounding of one product in a matrix multiplication of `x`, as torch is set up."""
    exact = x.dtype == torch.float64 or torch.get_float32_matmul_precision() == "highest"
    return torch.finfo(x.dtype).eps / 2 if exact else 2.0**-8  # TF32 and bfloat16 products


def reweight(
    worst: Tensor, around: Tensor, dim: int, form: Literal["btf", "patchcore"] = "btf", *, scaled: bool = True
) -> Tensor:
    """The weight w of Eq. 2, by which an image's worst distance is multiplied.

    A large distance counts in full when the bank is sparse around the match, less when it is dense.

    Args:
        worst: s*, distance of the worst patch to its match m* in the bank, (B,).
        around: Distances of that patch to the rows of the bank nearest to m*, m* itself first, (B, n).
        dim: Dimension D of the patches.
        form: ``"patchcore"`` sums over all n rows, as in the paper; ``"btf"`` leaves m* out of the sum, as the code of
            BTF and of its descendants does, so that w lies in [1/2, 1).
        scaled: Divide distances by sqrt(D) first, as that code does; the paper does not.

    Returns:
        (B,), no overflow however large the distances. 1 where the sum is empty.
    """
    check_shapes(worst=(worst, "B"), around=(around, "B n"))
    rows = around[:, 1:] if form == "btf" else around
    if rows.shape[1] == 0:
        return torch.ones_like(worst)
    divisor = math.sqrt(dim) if scaled else 1.0
    return 1 - torch.exp(-torch.logsumexp((rows - worst[:, None]) / divisor, dim=1))  # Eq. 2, without overflow


class MemoryBank(nn.Module):
    """Collects normal patches, keeps a coreset of them, and says how far new patches are from it.

    Use: `add` per batch of training patches, `build`; `observe` per batch of held-out distances, `set_level`; then
    `distance` and `standardise`. Everything it learns is a buffer.

    Args:
        name: What messages call it.
        ratio: Share of the patches to keep, in (0, 1]; 1 keeps all, in the order they came.
        limit: Most patches to keep, None for no limit.
        eps: Distortion that the random projection before the selection may have.
        start: Patch that the selection starts from.
        seed: Of the projection, and of the sample drawn when there are too many patches.
        max_bytes: Most bytes of collected patches. Beyond it they are a uniform random sample of all patches
            (reservoir sampling), and `build` logs a warning with both counts.
    """

    growing: ClassVar[tuple[str, ...]] = ("vectors",)
    vectors: Tensor  # M, (K, D); empty until built
    counts: Tensor  # patches seen and patches that the selection could choose from, (2,) int64
    mean: Tensor  # of held-out distances, () float64
    std: Tensor

    def __init__(
        self,
        name: str,
        *,
        ratio: float = 0.1,
        limit: int | None = None,
        eps: float = 0.9,
        start: int = 0,
        seed: int = 0,
        max_bytes: int = 4 * 2**30,
    ) -> None:
        super().__init__()
        self.name, self.ratio, self.limit, self.eps, self.start, self.seed = name, ratio, limit, eps, start, seed
        self.max_bytes = max_bytes
        self.register_buffer("vectors", torch.empty(0, 0))
        self.register_buffer("counts", torch.zeros(2, dtype=torch.int64))
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64))
        self.register_buffer("std", torch.ones((), dtype=torch.float64))
        self._pool = Reservoir(max_bytes, seed)
        self._moments = MapMoments()

    def add(self, patches: Tensor) -> None:
        """Take in training patches (n, D); they are copied to host memory."""
        check_shapes(patches=(patches, "n D"))
        self._pool.add(patches.detach().float().cpu())

    def build(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Choose the bank from what was added, and forget the rest.

        Raises:
            DataError: nothing was added, or something that is not a finite number.
        """
        seen, pool = self._pool.seen, self._pool.take()
        self._pool = Reservoir(self.max_bytes, self.seed)
        if len(pool) == 0:
            raise DataError(
                f"memory bank '{self.name}' got no patch: no training part has a measured patch for it; check the "
                f"valid pixels and the foreground of the training parts"
            )
        if not bool(torch.isfinite(pool.sum(1)).all()):
            raise DataError(f"memory bank '{self.name}' got features that are not finite; check the training parts")
        if seen > len(pool):
            log.warning(
                "memory bank '%s': %d patches of dimension %d exceed the limit of %.1f GiB; its coreset is chosen from "
                "a random sample of %d of them", self.name, seen, pool.shape[1], self.max_bytes / 2**30, len(pool)
            )  # fmt: skip
        size = max(1, int(self.ratio * len(pool)))
        size = size if self.limit is None else min(size, self.limit)
        device = self.vectors.device
        self.vectors = (pool if size == len(pool) else self._select(pool, size, progress)).to(device)
        self.counts.copy_(torch.tensor([seen, len(pool)]))

    def _select(self, pool: Tensor, size: int, progress: Callable[[int, int], None] | None) -> Tensor:
        """The coreset of `pool` (N, D), chosen in the projected space on this module's device."""
        device = self.vectors.device
        generator = torch.Generator().manual_seed(self.seed)
        projection = sparse_random_projection(pool.shape[1], len(pool), self.eps, generator=generator)
        if projection is None:
            shrunk = pool.to(device)
        else:  # dense: faster than a sparse product on every device tried
            shrunk = torch.cat([rows.to(device) @ projection.T.to(device) for rows in pool.split(ROWS)])
        chosen = greedy_coreset(shrunk, size, min(self.start, len(pool) - 1), progress=progress)
        return pool[chosen.cpu()]

    def observe(self, distances: Tensor) -> None:
        """Take in distances (any shape) of patches of held-out good parts."""
        flat = distances.reshape(1, 1, 1, -1)
        self._moments.add(flat, torch.ones_like(flat, dtype=torch.bool))

    def set_level(self) -> None:
        """Set mean and standard deviation of the distances observed since the last call.

        Raises:
            DataError: there were none.
        """
        count, mean, std = self._moments.take()
        if count.sum() == 0:
            raise DataError(
                f"memory bank '{self.name}': no validation part has a measured patch, so its distances have no level; "
                f"check the valid pixels and the foreground of the validation parts"
            )
        self.mean.copy_(mean[0])
        self.std.copy_(std[0].clamp(min=1e-6))

    def distance(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Distance to the nearest row of the bank and its index, both (n,), of patches (n, D).

        Raises:
            NotFittedError: the bank was not built.
        """
        if len(self.vectors) == 0:
            raise NotFittedError(f"memory bank '{self.name}' is empty: fit the detector before scoring")
        distances, indices = nearest(patches, self.vectors)
        return distances[:, 0], indices[:, 0]

    def around(self, patches: Tensor, match: Tensor, n: int) -> Tensor:
        """Distances (B, n) of `patches` (B, D) to the `n` rows nearest to their `match` (B,), the match first."""
        _, rows = nearest(self.vectors[match], self.vectors, min(n, len(self.vectors)))
        return (self.vectors[rows] - patches[:, None]).norm(dim=2)

    def standardise(self, distances: Tensor) -> Tensor:
        """Distances in standard deviations above the mean of held-out good patches."""
        return (distances - self.mean.to(distances)) / self.std.to(distances)
