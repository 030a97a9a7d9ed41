"""Coresets, nearest neighbours and memory banks against loops, hand values and invariances."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from polyspect.errors import ConfigError, DataError, MissingExtraError, NotFittedError
from polyspect.layers import coreset as coreset_module
from polyspect.layers import memory
from polyspect.layers.coreset import jl_dimension
from polyspect.layers.memory import (
    FaissIndex,
    MemoryBank,
    greedy_coreset,
    nearest,
    reweight,
    sparse_random_projection,
)
from polyspect.layers.smoothing import smooth
from test_layers_memory_golden import bank_score

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "reference" / "golden"


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def greedy_loop(x: Tensor, size: int, start: int = 0) -> Tensor:
    """Greedy k-centre as its definition reads: all rows against every choice, direct differences in float64."""
    x = x.double()
    distance = (x - x[start]).square().sum(1)
    chosen = [start]
    while len(chosen) < size:
        distance[chosen[-1]] = -1
        chosen.append(int(distance.argmax()))  # the first of equals
        distance = torch.minimum(distance, (x - x[chosen[-1]]).square().sum(1))
    return torch.tensor(chosen)


# -- coreset ---------------------------------------------------------------------------------------------------------


def test_points_of_a_line():
    line = torch.arange(100.0)[:, None]
    assert greedy_coreset(line, 3).tolist() == [0, 99, 49]  # 49 and 50 tie: the lower index


def test_hand_case_with_a_duplicate():
    rows = torch.tensor([[0.0, 0], [1, 0], [0, 0], [4, 0], [4, 3], [1, 1]])
    assert greedy_coreset(rows, 5).tolist() == [0, 4, 3, 5, 1]
    assert greedy_coreset(rows, 6).tolist() == [0, 4, 3, 5, 1, 2]  # the copy of row 0 comes last


def clusters(seed: int) -> Tensor:
    spread = 3 * random(1500, 1, seed=seed + 1).abs() ** 3
    return 100 + random(1500, 17, seed=seed) * spread


@pytest.mark.parametrize("candidates", [16, 300, 5000])
@pytest.mark.parametrize(
    "x",
    [
        random(1200, 12),
        clusters(3),
        torch.randint(0, 4, (1500, 4), generator=torch.Generator().manual_seed(5)).float(),  # ties and copies
        1e3 + 1e-3 * random(600, 8, seed=6),  # far from the origin
        random(40, 5, seed=7).repeat(20, 1),  # every row twenty times
    ],
    ids=["gaussian", "clusters", "integers", "offset", "copies"],
)
def test_coreset_equals_the_plain_loop(x: Tensor, candidates: int):
    assert_close(greedy_coreset(x, 300, start=7, candidates=candidates), greedy_loop(x, 300, start=7))


def test_the_smallest_candidate_set_will_do():
    x = clusters(4)[:300]
    assert_close(greedy_coreset(x, 100, candidates=1), greedy_loop(x, 100))


def test_rows_catch_up_across_several_slices_of_centres(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(coreset_module, "CENTRES", 7)
    monkeypatch.setattr(coreset_module, "ROWS", 50)
    x = random(900, 9, seed=8)
    assert_close(greedy_coreset(x, 400, candidates=32), greedy_loop(x, 400))


def test_the_covering_radius_never_grows():
    x = random(800, 6, seed=9)
    chosen = greedy_coreset(x, 200)
    gaps = torch.stack([torch.cdist(x[chosen[i]][None], x[chosen[:i]]).min() for i in range(1, 200)])
    assert bool((gaps.diff() <= 1e-6).all())
    assert len(set(chosen.tolist())) == 200


def test_the_whole_set_can_be_chosen_and_progress_ends_there():
    calls: list[tuple[int, int]] = []
    chosen = greedy_coreset(torch.ones(50, 3), 50, start=4, progress=lambda done, size: calls.append((done, size)))
    assert chosen.tolist() == [4, *range(4), *range(5, 50)]
    assert calls[-1] == (50, 50)


@pytest.mark.parametrize(("size", "start"), [(0, 0), (11, 0), (3, 10), (3, -1)])
def test_impossible_sizes_and_starts_are_refused(size: int, start: int):
    with pytest.raises(ConfigError, match="coreset"):
        greedy_coreset(torch.zeros(10, 2), size, start)


@pytest.mark.skipif(not (GOLDEN / "05_coreset.npz").is_file(), reason="the golden files are not there")
def test_indices_of_published_code():
    golden = np.load(GOLDEN / "05_coreset.npz")
    bank = torch.from_numpy(golden["bank"])
    assert sparse_random_projection(32, 500) is None
    assert_close(greedy_coreset(bank, 50), torch.from_numpy(golden["idx_f32_no_projection"]))

    sys.path.insert(0, str(GOLDEN))
    try:
        from fill import noise  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(GOLDEN))
    matrix = np.zeros(tuple(golden["projection_shape"]), dtype=np.float32)
    matrix[golden["projection_row"], golden["projection_col"]] = golden["projection_val"]
    wide = noise("bank_wide", (500, 256), int(golden["seed"]))
    projected = torch.from_numpy(wide @ matrix.T)
    assert_close(greedy_coreset(projected, 50), torch.from_numpy(golden["idx_f32_projected"]))


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_choices():
    script = (
        "import resource, torch\n"
        "from polyspect.layers.coreset import greedy_coreset\n"
        "x = torch.randn(30000, 64, generator=torch.Generator().manual_seed(0))\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "greedy_coreset(x, 100); first = peak()\n"
        "greedy_coreset(x, 3000); print((peak() - first) / 1024)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 80  # MiB; 2,900 more centres are 1.5 MiB, the rest is blocks of constant size


# -- projection ------------------------------------------------------------------------------------------------------


def test_johnson_lindenstrauss_dimensions():
    assert [jl_dimension(n, 0.9) for n in (191_296, 164_640, 283_024, 765_184)] == [300, 296, 309, 334]


def test_projection_has_the_stated_density_and_keeps_squared_lengths_on_average():
    matrix = sparse_random_projection(1536, 191_296)
    assert matrix is not None
    assert matrix.shape == (300, 1536)
    assert_close((matrix != 0).float().mean(), torch.tensor(1536**-0.5), rtol=0.03, atol=0)
    assert_close(matrix[matrix > 0].unique(), torch.tensor([(1536**0.5 / 300) ** 0.5]))
    x = random(400, 1536)
    ratio = (x @ matrix.T).square().sum(1) / x.square().sum(1)
    assert abs(float(ratio.mean()) - 1) < 0.03
    again = sparse_random_projection(1536, 191_296, generator=torch.Generator().manual_seed(1))
    assert again is not None
    assert not torch.equal(matrix, again)


def test_projection_that_would_not_shrink_is_skipped():
    assert sparse_random_projection(300, 191_296) is None
    with pytest.raises(ConfigError, match="eps"):
        sparse_random_projection(10, 10, eps=1.0)


# -- nearest neighbours ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3, 40])
def test_nearest_equals_direct_differences_in_float64(k: int):
    queries, bank = random(70, 30) + 5, random(40, 30, seed=1) + 5
    expected, order = (queries.double()[:, None] - bank.double()).norm(dim=2).sort(dim=1)
    distances, indices = nearest(queries, bank, k)
    assert_close(distances, expected[:, :k].float(), rtol=1e-6, atol=0)
    assert_close(indices, order[:, :k])


def test_nearest_does_not_depend_on_the_block_or_on_other_queries():
    queries, bank = random(101, 20), random(300, 20, seed=1)
    whole = nearest(queries, bank, 2)
    for block in (1, 900, 7000):
        assert torch.equal(nearest(queries, bank, 2, block=block)[0], whole[0])
        assert torch.equal(nearest(queries, bank, 2, block=block)[1], whole[1])
    alone = torch.cat([nearest(query[None], bank, 2)[0] for query in queries])
    assert_close(alone, whole[0], rtol=1e-5, atol=0)


def test_a_vector_of_the_bank_is_at_distance_exactly_zero():
    bank = 1e4 + random(500, 64)  # the product form of the distance is off by far more than the distances here
    distances, indices = nearest(bank, bank)
    assert bool((distances == 0).all())
    assert indices[:, 0].tolist() == list(range(500))


def test_neighbours_that_the_product_form_confuses_are_searched_again():
    centre = 300 * random(1, 48)
    bank = torch.cat([centre + 1e-3 * random(200, 48, seed=1), 1e4 * random(4, 48, seed=2)])
    queries = centre + 1e-3 * random(30, 48, seed=3)
    expected = torch.cdist(queries.double(), bank.double(), compute_mode="donot_use_mm_for_euclid_dist").min(1)
    distances, indices = nearest(queries, bank)
    assert_close(indices[:, 0], expected.indices)
    assert_close(distances[:, 0], expected.values.float(), rtol=1e-5, atol=0)


def test_equal_bank_vectors_give_the_lower_index():
    bank = random(6, 4).repeat(2, 1)
    assert nearest(bank, bank)[1][:, 0].tolist() == [0, 1, 2, 3, 4, 5] * 2
    with pytest.raises(ConfigError, match="13 nearest"):
        nearest(bank, bank, 13)


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("rows", [1, 31, 33, 640, 1000])
def test_short_selections_find_the_smallest_entries(count: int, rows: int):
    if count > rows:
        count = rows
    values = torch.randint(0, 40, (9, rows), generator=torch.Generator().manual_seed(rows)).float()  # many ties
    padded = torch.nn.functional.pad(values, (0, -rows % memory.STRIPES), value=torch.inf)
    smallest, columns = memory._smallest(padded, count, rows)
    assert_close(smallest, values.sort(dim=1).values[:, :count])
    assert_close(values.gather(1, columns), smallest)
    assert all(len(set(row)) == count for row in columns.tolist())


def test_queries_that_are_not_finite_get_no_finite_distance():
    queries, bank = torch.full((2, 5), torch.nan), random(700, 5)
    distances, indices = nearest(queries, bank)
    assert not bool(distances.isfinite().any())
    assert bool((indices < 700).all())


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("case", ["gaussian", "tight", "copies"])
def test_faiss_gives_the_same_distances_and_indices(case: str, k: int):
    pytest.importorskip("faiss", reason="FAISS is not installed: pip install 'polyspect[faiss]'")
    centre = 300 * random(1, 48)
    bank, queries = {
        "gaussian": (random(3000, 48), random(500, 48, seed=1)),
        "tight": (
            torch.cat([centre + 1e-3 * random(200, 48, seed=1), 1e4 * random(4, 48, seed=2)]),
            centre + 1e-3 * random(30, 48, seed=3),
        ),
        "copies": (random(40, 48).repeat(3, 1), random(40, 48)),
    }[case]
    found, expected = FaissIndex(bank).nearest(queries, k), nearest(queries, bank, k)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    built = built_bank(bank, ratio=1.0, backend="faiss")
    assert torch.equal(built.distance(queries)[0], expected[0][:, 0])
    assert torch.equal(
        built.around(queries, expected[1][:, 0], 3), built_bank(bank, ratio=1.0).around(queries, expected[1][:, 0], 3)
    )


@pytest.mark.parametrize("backend", ["torch", "faiss"])
def test_a_bank_notices_that_its_vectors_are_others(backend: str):
    if backend == "faiss":
        pytest.importorskip("faiss", reason="FAISS is not installed: pip install 'polyspect[faiss]'")
    vectors, queries = random(60, 5), random(7, 5, seed=1)
    bank = built_bank(vectors, ratio=1.0, backend=backend)
    first, place = bank.distance(queries)
    bank.vectors.mul_(2)
    assert torch.equal(bank.distance(2 * queries)[1], place)
    assert torch.equal(bank.distance(2 * queries)[0], 2 * first)
    bank.vectors = 4 * vectors
    assert torch.equal(bank.distance(4 * queries)[0], 4 * first)
    bank.load_state_dict(built_bank(8 * vectors, ratio=1.0).state_dict())
    assert torch.equal(bank.distance(8 * queries)[0], 8 * first)


def test_half_precision_bank_keeps_nothing_beside_its_vectors():
    bank = built_bank(random(60, 5), ratio=1.0, storage="float16")
    bank.distance(random(7, 5, seed=1))
    assert bank._index is None


def test_absent_faiss_is_answered_with_the_install_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    bank = built_bank(random(10, 3), backend="faiss")
    with pytest.raises(MissingExtraError, match=r"polyspect\[faiss\]"):
        bank.distance(random(2, 3))
    for settings in ({"backend": "annoy"}, {"storage": "int8"}):
        with pytest.raises(ConfigError, match="memory bank"):
            MemoryBank("rgb", **settings)  # type: ignore[arg-type]


# -- re-weighting ----------------------------------------------------------------------------------------------------


def test_weights_of_worked_examples():
    worst = torch.tensor([2.0, 2.0])
    around = torch.tensor([[2.0, 2, 2], [2, 2, 4]])
    e = torch.e
    expected = torch.tensor([0.5, 1 - e / (e + e**2)])
    assert_close(reweight(worst, around, 4), expected)
    # M = (0,0), (1,0), (0,2), (5,5); the patch (3, 0) matches (1, 0)
    patch, match = torch.tensor([2.0]), torch.tensor([[2.0, 3.0, 13**0.5]])
    assert_close(reweight(patch, match, 2), torch.tensor([0.805455]), rtol=0, atol=1e-6)
    assert_close(reweight(patch, match, 2, "patchcore"), torch.tensor([0.837139]), rtol=0, atol=1e-6)
    raw = 1 - np.exp(2) / (np.exp(2) + np.exp(3) + np.exp(13**0.5))
    assert_close(reweight(patch, match, 2, "patchcore", scaled=False), torch.tensor([raw]).float())


def test_weights_survive_distances_that_overflow_exp():
    weight = reweight(torch.tensor([5e4]), torch.tensor([[5e4, 5e4, 5e4]]), 4)
    assert_close(weight, torch.tensor([0.5]))
    assert reweight(torch.tensor([3.0]), torch.tensor([[3.0]]), 4).item() == 1


def test_a_guard_is_added_to_the_sum():
    worst, around = torch.tensor([2.0]), torch.tensor([[2.0, 2, 4]])
    expected = 1 - np.exp(1) / (np.exp(1) + np.exp(2) + 0.25)
    assert_close(reweight(worst, around, 4, guard=0.25), torch.tensor([expected]).float())


def test_score_of_a_bank_written_as_loops():
    rows, patches = random(30, 6), random(3, 10, 6, seed=1)
    bank = built_bank(rows, ratio=1.0)
    for shrink, guard in ((1.0, 0.0), (7.0, 0.3)):
        score, distances = bank_score(bank, patches, guard=guard, shrink=shrink)
        for b, part in enumerate(patches):
            d = (part[:, None] - rows).norm(dim=2)
            assert_close(distances[b], d.amin(1))
            p = int(d.amin(1).argmax())
            match = int(d[p].argmin())
            around = (rows - rows[match]).norm(dim=1).argsort()[1:3]
            sum_ = (d[p, around] / shrink / 6**0.5).exp().sum() + guard
            s = d[p, match] / shrink
            assert_close(score[b], (1 - (s / 6**0.5).exp() / sum_) * s)


# -- the bank --------------------------------------------------------------------------------------------------------


def built_bank(patches: Tensor, **settings: object) -> MemoryBank:
    bank = MemoryBank("rgb", **settings)  # type: ignore[arg-type]
    for part in patches.split(37):
        bank.add(part)
    bank.build()
    return bank


def test_bank_keeps_the_coreset_of_what_was_added():
    patches = random(500, 8)
    bank = built_bank(patches, ratio=0.1)
    assert_close(bank.vectors, patches[greedy_loop(patches, 50)])
    assert bank.counts.tolist() == [500, 500]
    assert len(built_bank(patches, ratio=0.1, limit=20).vectors) == 20
    assert_close(built_bank(patches, ratio=1.0).vectors, patches)
    assert len(built_bank(patches[:3], ratio=0.1).vectors) == 1


def test_bank_selects_in_the_projected_space_and_keeps_whole_vectors():
    patches = random(600, 400)
    bank = built_bank(patches, ratio=0.1, seed=3)
    matrix = sparse_random_projection(400, 600, generator=torch.Generator().manual_seed(3))
    assert matrix is not None
    assert_close(bank.vectors, patches[greedy_loop(patches @ matrix.T, 60)])


def test_too_many_patches_become_a_random_sample_and_a_warning(caplog: pytest.LogCaptureFixture):
    patches = torch.arange(4000.0)[:, None].repeat(1, 4)
    with caplog.at_level(logging.WARNING, logger="polyspect"):
        bank = built_bank(patches, ratio=1.0, max_bytes=16 * 500)
    assert "4000 patches" in caplog.text
    assert "500 of them" in caplog.text
    assert bank.counts.tolist() == [4000, 500]
    kept = bank.vectors[:, 0]
    assert len(kept.unique()) == 500
    assert abs(float(kept.mean()) - 1999.5) < 4 * 4000 / 12**0.5 / 500**0.5  # four standard errors of a uniform sample
    whole = MemoryBank("rgb", ratio=1.0, max_bytes=16 * 500)
    whole.add(patches)
    whole.build()
    assert torch.equal(whole.vectors, bank.vectors)  # however the patches were batched


def test_level_is_mean_and_deviation_of_all_observed_distances():
    bank = MemoryBank("rgb")
    distances = 5 + random(1000)
    for part in distances.split(99):
        bank.observe(part)
    bank.set_level()
    assert_close(bank.standardise(distances).mean(), torch.tensor(0.0), rtol=0, atol=1e-5)
    assert_close(bank.standardise(distances).std(correction=0), torch.tensor(1.0), rtol=1e-5, atol=0)
    with pytest.raises(DataError, match="validation"):
        bank.set_level()


def test_normalised_bank_holds_and_compares_normalised_patches():
    patches, query = 5 + 3 * random(600, 8), 5 + 3 * random(20, 8, seed=1)
    bank = MemoryBank("rgb", ratio=0.1, normalise=True)
    for part in patches.split(37):
        bank.add(part)
    mean, std = patches.double().mean().item(), patches.double().std().item()
    assert bank.statistics() == pytest.approx((mean, std), rel=1e-12)
    bank.build()
    scaled = (patches - mean) / std
    assert_close(bank.vectors, scaled[greedy_loop(patches, 60)])
    assert_close(bank.distance(query)[0], nearest((query - mean) / std, bank.vectors)[0][:, 0])
    plain = built_bank(patches, ratio=0.1)
    assert_close(bank.distance(query)[0] * std, plain.distance(query)[0], rtol=1e-5, atol=0)
    score, around = bank_score(bank, query[None])[0], bank.around(query[:1], torch.tensor([4]), 3)
    assert_close(around * std, plain.around(query[:1], torch.tensor([4]), 3), rtol=1e-5, atol=1e-6)
    other = MemoryBank("rgb", normalise=True)
    other.vectors = torch.empty_like(bank.vectors)
    other.load_state_dict(bank.state_dict())
    assert_close(bank_score(other, query[None])[0], score)


def test_given_statistics_replace_a_banks_own():
    patches = random(50, 4)
    bank = MemoryBank("rgb", ratio=1.0, normalise=True)
    bank.add(patches)
    bank.build(statistics=(0.5, 2.0))
    assert_close(bank.vectors, (patches - 0.5) / 2)
    with pytest.raises(DataError, match="no statistics"):
        bank.statistics()
    bank.add(torch.ones(5, 4))
    with pytest.raises(DataError, match="deviation 0"):
        bank.build()
    plain = MemoryBank("rgb")
    plain.add(patches)
    with pytest.raises(ConfigError, match="does not normalise"):
        plain.build(statistics=(0.5, 2.0))


def test_half_precision_bank_measures_to_the_rounded_vectors():
    patches, query = random(300, 20), random(40, 20, seed=1)
    bank, full = built_bank(patches, ratio=0.2, storage="float16"), built_bank(patches, ratio=0.2)
    assert bank.vectors.dtype == torch.float16
    assert torch.equal(bank.vectors, full.vectors.half())
    distances, matches = bank.distance(query)
    direct = (query.double() - bank.vectors[matches].double()).norm(dim=1)
    assert distances.dtype == torch.float32
    assert_close(distances, direct.float(), rtol=1e-6, atol=0)
    assert_close(distances, full.distance(query)[0], rtol=0, atol=20**0.5 * 2**-10)  # entries below 4 are off by 2^-10
    assert_close(bank.around(query, matches, 3)[:, 0], distances)
    with pytest.raises(DataError, match="beyond float16"):
        built_bank(torch.full((4, 2), 1e6), storage="float16")


def test_estimate_names_what_the_bank_takes():
    patches = random(3000, 400)
    bank = MemoryBank("rgb", ratio=0.1, storage="float16", max_bytes=4 * 400 * 2000)
    estimate = bank.estimate(*patches.shape)
    for part in patches.split(500):
        bank.add(part)
    assert estimate.pool == bank._pool.take().nbytes == 4 * 400 * 2000
    bank.build()
    assert estimate.stored == bank.vectors.nbytes == 2 * 400 * 200
    assert estimate.projection == 4 * 2000 * jl_dimension(2000, 0.9)
    assert estimate.peak == estimate.pool + estimate.projection + estimate.coreset + estimate.stored
    assert str(estimate).startswith(f"{estimate.peak / 2**20:.0f} MiB to build (pool 3, ")
    whole = MemoryBank("rgb", ratio=1.0).estimate(1000, 50)
    assert whole == (200_000, 0, 0, 200_000)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc, as Linux has it")
def test_building_takes_about_the_estimate():
    script = (
        "import re, torch\n"
        "from polyspect.layers.memory import MemoryBank\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
        "warm = MemoryBank('warm'); warm.add(torch.rand(2000, 400)); warm.build()\n"
        "bank, generator = MemoryBank('rgb', ratio=0.02), torch.Generator().manual_seed(0)\n"
        "first = peak()\n"
        "for _ in range(60): bank.add(torch.randn(1000, 600, generator=generator))\n"
        "bank.build(); print((peak() - first) * 1024 / bank.estimate(60000, 600).peak)\n"
    )
    plain = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # glibc gives back what is freed, so that tensors count
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=plain)
    assert 0.6 < float(done.stdout) < 1.2


def test_bank_refuses_what_it_cannot_use():
    with pytest.raises(DataError, match="no patch"):
        MemoryBank("rgb").build()
    with pytest.raises(DataError, match="not finite"):
        built_bank(torch.full((4, 2), torch.nan))
    with pytest.raises(NotFittedError, match="'rgb' is empty"):
        MemoryBank("rgb").distance(torch.zeros(1, 2))


# -- smoothing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blur", ["gaussian", "pil", "none"])
def test_smoothing_keeps_a_constant_and_never_exceeds_the_maximum(blur: str):
    constant = torch.full((2, 20, 30), 3.7)
    assert_close(smooth(constant, blur, 4.0), constant, rtol=1 / 255, atol=0)  # type: ignore[arg-type]
    maps = random(2, 20, 30).abs()
    assert float(smooth(maps, blur, 4.0).max()) <= float(maps.max())  # type: ignore[arg-type]
    empty = torch.zeros(1, 8, 8)
    assert torch.equal(smooth(empty, blur, 4.0), empty)  # type: ignore[arg-type]
