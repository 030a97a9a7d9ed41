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
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import ConfigError, DataError, MissingExtraError, NotFittedError
from ..samples import check_shapes
from .coreset import ROWS, greedy_coreset, jl_dimension, sparse_random_projection
from .maps import MapMoments
from .reservoir import Reservoir

__all__ = [
    "BankBytes",
    "ExactIndex",
    "FaissIndex",
    "MemoryBank",
    "greedy_coreset",
    "nearest",
    "reweight",
    "sparse_random_projection",
]

log = logging.getLogger("polyspect")

Reweighting = Literal["btf", "patchcore", "none"]  # form of w in Eq. 2; "none": w = 1

STRIPES = 32  # that the columns of a product are split into to find its smallest entries
BLOCK = 1 << 21  # entries of the distance matrix held at a time: 8 MiB, still in a processor's caches
FEW = 64  # unsure queries that are worth comparing with more candidates; for more, float64 at once costs less


def nearest(queries: Tensor, bank: Tensor, k: int = 1, *, block: int = BLOCK) -> tuple[Tensor, Tensor]:
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
    return ExactIndex(bank).nearest(queries, k, block=block)


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
        self._double: tuple[Tensor, Tensor] | None = None

    def double(self) -> tuple[Tensor, Tensor]:
        """`shifted` and `norm` in float64, made when first needed."""
        if self._double is None:
            wide = self.shifted.new_zeros(self.shifted.shape, dtype=torch.float64)
            torch.sub(self.bank.double(), self.centre, out=wide[: len(self.bank)])
            norm = wide.square().sum(1)
            norm[len(self.bank) :] = torch.inf
            self._double = wide, norm
        return self._double

    def slack(self, moved: Tensor) -> Tensor:
        """Twice the largest error (Q,) of a squared distance in product form; `moved` are queries less the centre."""
        D = moved.shape[1]
        return 2 * _roundoff(moved) * (D + 8) * (moved.norm(dim=1) + self.radius).square()


def _nearest_block(queries: Tensor, side: _Side, k: int, product: Tensor) -> tuple[Tensor, Tensor]:
    """`nearest` for as many queries as fit at once; `product` (Q, K') is overwritten."""
    bank, K = side.bank, len(side.bank)
    moved = queries - side.centre
    torch.addmm(side.norm, moved, side.shifted.T, alpha=-2, out=product)  # squared distances less |q|^2
    slack = side.slack(moved)  # a row left out can only be nearer if its gap to the candidates is below it
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
    wide, norm = side.double()
    for rows in unsure.split(max(1, len(queries) // 2)):  # float64 entries are twice as large
        product64 = torch.addmm(norm, queries[rows].double() - side.centre, wide.T, alpha=-2)
        candidates = _smallest(product64, min(k + 4, K), K)[1]
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
    step = max(1, (1 << 17) // (candidates.shape[1] * bank.shape[1]))  # 1 MiB of differences, which stay in the cache
    parts = []
    for rows in torch.arange(len(queries), device=queries.device).split(step):
        own = candidates[rows]
        found = bank.index_select(0, own.flatten()).view(*own.shape, bank.shape[1])  # faster than bank[own]
        difference = found.sub_(queries[rows, None])  # q c D
        parts.append(difference.double().square_().sum(2))
    squared, order = torch.cat(parts).sort(dim=1, stable=True)
    return squared[:, :k].sqrt().to(queries.dtype), candidates.gather(1, order[:, :k])


def _roundoff(x: Tensor) -> float:
    """Relative rounding of one product in a matrix multiplication of `x`, as torch is set up."""
    exact = x.dtype == torch.float64 or torch.get_float32_matmul_precision() == "highest"
    return torch.finfo(x.dtype).eps / 2 if exact else 2.0**-8  # TF32 and bfloat16 products


class ExactIndex:
    """`nearest` for one bank (K, D) and many calls: what a call needs of the bank beside its rows is made once.

    It holds the bank less its mean, so as much memory as the bank takes again.
    """

    def __init__(self, bank: Tensor) -> None:
        check_shapes(bank=(bank, "K D"))
        self._side = _Side(bank.detach())

    def nearest(self, queries: Tensor, k: int = 1, *, block: int = BLOCK) -> tuple[Tensor, Tensor]:
        """As the function of that name."""
        side, queries = self._side, queries.detach()
        check_shapes(queries=(queries, "Q D"), bank=(side.bank, "K D"))
        if not 1 <= k <= len(side.bank):
            raise ConfigError(f"{k} nearest neighbours were asked for, but the bank has {len(side.bank)} vectors")
        parts = queries.split(max(1, block // len(side.bank)))
        buffer = queries.new_empty(max(map(len, parts)), len(side.norm))
        found = [_nearest_block(rows, side, k, buffer[: len(rows)]) for rows in parts]
        return torch.cat([d for d, _ in found]), torch.cat([i for _, i in found])


class FaissIndex:
    """`nearest` with candidates from FAISS's flat index, on the CPU; same distances, same indices.

    Raises:
        MissingExtraError: FAISS is not installed.
    """

    def __init__(self, bank: Tensor) -> None:
        try:
            import faiss
        except ImportError as error:
            raise MissingExtraError(
                "a memory bank with `backend='faiss'` needs FAISS: pip install 'polyspect[faiss]', or use 'torch'"
            ) from error
        self._side = _Side(bank.detach().cpu())
        self._index: Any = faiss.IndexFlatL2(bank.shape[1])
        self._index.add(self._side.shifted[: len(bank)].numpy())

    def nearest(self, queries: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
        """As the function of that name."""
        bank, device = self._side.bank, queries.device
        if not 1 <= k <= len(bank):
            raise ConfigError(f"{k} nearest neighbours were asked for, but the bank has {len(bank)} vectors")
        queries = queries.detach().cpu()
        moved = queries - self._side.centre
        values, candidates = map(torch.from_numpy, self._index.search(moved.numpy(), min(k + 5, len(bank))))
        distances, indices = _rank(queries, bank, candidates.clamp(min=0), k)  # -1 stands where a query is not finite
        if len(bank) > k + 4:
            unsure = (~(values[:, k + 4] - values[:, k - 1] > self._side.slack(moved))).nonzero()[:, 0]
            if len(unsure):
                distances[unsure], indices[unsure] = nearest(queries[unsure], bank, k)
        return distances.to(device), indices.to(device)


def reweight(
    worst: Tensor,
    around: Tensor,
    dim: int,
    form: Literal["btf", "patchcore"] = "btf",
    *,
    scaled: bool = True,
    guard: float = 0.0,
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
        guard: Added to the sum, as M3DM's single-bank classes add 1e-5.

    Returns:
        (B,), no overflow however large the distances. 1 where the sum is empty.
    """
    check_shapes(worst=(worst, "B"), around=(around, "B n"))
    rows = around[:, 1:] if form == "btf" else around
    if rows.shape[1] == 0:
        return torch.ones_like(worst)
    divisor = math.sqrt(dim) if scaled else 1.0
    exponents = (rows - worst[:, None]) / divisor
    if guard > 0:
        exponents = torch.cat([exponents, math.log(guard) - worst[:, None] / divisor], dim=1)
    return 1 - torch.exp(-torch.logsumexp(exponents, dim=1))  # Eq. 2, without overflow


class BankBytes(NamedTuple):
    """Memory that a bank takes, in bytes."""

    pool: int  # collected patches, on the host
    projection: int  # the projected patches, on the bank's device; patches that are not projected but moved there
    coreset: int  # what the selection takes beside: bounds, centres, blocks
    stored: int  # the finished bank

    @property
    def peak(self) -> int:
        """While it is built."""
        return sum(self)

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / 2**20:.0f}" for name, size in zip(self._fields, self))
        return f"{self.peak / 2**20:.0f} MiB to build ({parts})"


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
        normalise: Shift and scale all patches by two numbers, mean and deviation of the training patches' entries.
        storage: ``"float16"`` halves the bank; distances are those to the rounded vectors, in float32. A float32 bank
            keeps what searching needs between calls, as much memory again; a float16 one makes it in every call.
        backend: ``"faiss"`` finds candidates by FAISS (an optional extra) on the CPU; the results are the same.

    Raises:
        ConfigError: `storage` or `backend` is unknown.
    """

    growing: ClassVar[tuple[str, ...]] = ("vectors",)
    vectors: Tensor  # M, (K, D); empty until built
    feature_mean: Tensor  # what `normalise` subtracts and divides by, () float64
    feature_std: Tensor
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
        normalise: bool = False,
        storage: Literal["float32", "float16"] = "float32",
        backend: Literal["torch", "faiss"] = "torch",
    ) -> None:
        super().__init__()
        if storage not in ("float32", "float16"):
            raise ConfigError(f"`storage` of a memory bank must be 'float32' or 'float16', got '{storage}'")
        if backend not in ("torch", "faiss"):
            raise ConfigError(f"`backend` of a memory bank must be 'torch' or 'faiss', got '{backend}'")
        self.name, self.ratio, self.limit, self.eps, self.start, self.seed = name, ratio, limit, eps, start, seed
        self.max_bytes, self.normalise, self.storage, self.backend = max_bytes, normalise, storage, backend
        self.register_buffer("vectors", torch.empty(0, 0, dtype=getattr(torch, storage)))
        self.register_buffer("counts", torch.zeros(2, dtype=torch.int64))
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64))
        self.register_buffer("std", torch.ones((), dtype=torch.float64))
        self.register_buffer("feature_mean", torch.zeros((), dtype=torch.float64))
        self.register_buffer("feature_std", torch.ones((), dtype=torch.float64))
        self._pool = Reservoir(max_bytes, seed)
        self._moments = MapMoments()  # of held-out distances
        self._entries = MapMoments()  # of training patches
        self._index: tuple[Tensor, int, ExactIndex | FaissIndex] | None = None  # of which `vectors`, and their version

    def estimate(self, rows: int, dimension: int) -> BankBytes:
        """Memory that `build` will take for `rows` patches of `dimension`.

        The tensors' own sizes: the allocator may hold half as much again. The selection's blocks are those of its
        start; it enlarges them while distances tie or nearly tie.
        """
        kept = max(1, min(rows, self.max_bytes // (4 * dimension)))
        size = self._size(kept)
        stored = size * dimension * torch.finfo(self.vectors.dtype).bits // 8
        if size == kept:
            return BankBytes(4 * kept * dimension, 0, 0, stored)
        shrunk = min(jl_dimension(kept, self.eps), dimension) if kept > 1 else dimension
        projected = shrunk < dimension or self.vectors.device.type != "cpu"
        coreset = 24 * kept + 8 * size * shrunk + 3 * 8 * min(ROWS, kept) * shrunk
        return BankBytes(4 * kept * dimension, 4 * kept * shrunk if projected else 0, coreset, stored)

    def add(self, patches: Tensor) -> None:
        """Take in training patches (n, D); they are copied to host memory."""
        check_shapes(patches=(patches, "n D"))
        patches = patches.detach().float().cpu()
        self._pool.add(patches)
        if self.normalise:
            for rows in patches.split(ROWS):
                flat = rows.reshape(1, 1, 1, -1)
                self._entries.add(flat, torch.ones_like(flat, dtype=torch.bool))

    def statistics(self) -> tuple[float, float]:
        """Mean and standard deviation (n - 1) of all entries of the patches added since the last `build`.

        Raises:
            DataError: none was added, or the bank does not normalise.
        """
        count, mean, std = self._entries.read()
        if not count.sum() > 1:
            raise DataError(f"memory bank '{self.name}' has no statistics: `normalise` is off or no patch was added")
        n = float(count[0])
        return float(mean[0]), float(std[0]) * math.sqrt(n / (n - 1))

    def build(
        self,
        progress: Callable[[int, int], None] | None = None,
        *,
        statistics: tuple[float, float] | None = None,
        size: int | None = None,
    ) -> None:
        """Choose the bank from what was added, and forget the rest.

        Args:
            progress: See `greedy_coreset`.
            statistics: What `normalise` subtracts and divides by; None: this bank's own `statistics`.
            size: Patches to keep instead of the share `ratio`; `limit` holds all the same.

        Raises:
            ConfigError: `statistics` are given, but the bank does not normalise.
            DataError: nothing was added, or something that is not a finite number, or patches that do not vary, or
                numbers that `storage` cannot hold.
        """
        if statistics is not None and not self.normalise:
            raise ConfigError(f"memory bank '{self.name}' got statistics but does not normalise; set `normalise`")
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
        log.info("memory bank '%s': %d patches, %s", self.name, len(pool), self.estimate(*pool.shape))
        if self.normalise:
            mean, std = self.statistics() if statistics is None else statistics
            if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
                raise DataError(f"memory bank '{self.name}' cannot be normalised by mean {mean:g}, deviation {std:g}")
            self.feature_mean.fill_(mean)
            self.feature_std.fill_(std)
            pool.sub_(mean).div_(std)
        self._entries = MapMoments()
        size = self._size(len(pool), size)
        vectors = (pool if size == len(pool) else pool[self._select(pool, size, progress).cpu()]).to(self.vectors)
        if not bool(torch.isfinite(vectors).all()):
            raise DataError(f"memory bank '{self.name}' has values beyond float16; set `storage` to 'float32'")
        self.vectors = vectors
        self.counts.copy_(torch.tensor([seen, len(pool)]))

    def _size(self, patches: int, wanted: int | None = None) -> int:
        """How many of `patches` the bank keeps."""
        size = max(1, min(patches, int(self.ratio * patches) if wanted is None else wanted))
        return size if self.limit is None else min(size, self.limit)

    def _select(self, pool: Tensor, size: int, progress: Callable[[int, int], None] | None) -> Tensor:
        """Rows of the coreset of `pool` (N, D), chosen in the projected space on this module's device."""
        device = self.vectors.device
        generator = torch.Generator().manual_seed(self.seed)
        projection = sparse_random_projection(pool.shape[1], len(pool), self.eps, generator=generator)
        if projection is None:
            shrunk = pool.to(device)
        else:  # dense: faster than a sparse product on every device tried
            shrunk = torch.cat([rows.to(device) @ projection.T.to(device) for rows in pool.split(ROWS)])
        return greedy_coreset(shrunk, size, min(self.start, len(pool) - 1), progress=progress)

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
        distances, indices = self._search().nearest(self._normalised(patches))
        return distances[:, 0], indices[:, 0]

    def around(self, patches: Tensor, match: Tensor, n: int) -> Tensor:
        """Distances (B, n) of `patches` (B, D) to the `n` rows nearest to their `match` (B,), the match first."""
        vectors = self.vectors.float()
        _, rows = self._search().nearest(vectors[match], min(n, len(vectors)))
        return (vectors[rows] - self._normalised(patches)[:, None]).norm(dim=2)

    def _normalised(self, patches: Tensor) -> Tensor:
        if not self.normalise:
            return patches
        return (patches - self.feature_mean.to(patches)).div_(self.feature_std.to(patches))

    def _search(self) -> ExactIndex | FaissIndex:
        """The index of `vectors`, kept until they are others; one that would undo the saving of float16 is not."""
        vectors = self.vectors
        if self.backend == "torch" and vectors.dtype != torch.float32:
            return ExactIndex(vectors.float())
        version = 0 if vectors.is_inference() else vectors._version
        if self._index is None or self._index[0] is not vectors or self._index[1] != version:
            make = ExactIndex if self.backend == "torch" else FaissIndex
            self._index = vectors, version, make(vectors.float())
        return self._index[2]

    def standardise(self, distances: Tensor) -> Tensor:
        """Distances in standard deviations above the mean of held-out good patches."""
        return (distances - self.mean.to(distances)) / self.std.to(distances)
