"""The named metrics, their streaming collection, bootstrap intervals and paired differences."""

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from polyspect.errors import ConfigError, DataError, ShapeError
from polyspect.metrics import (
    ScoredParts,
    StreamingMetrics,
    aupro,
    aupro_sampled,
    auroc,
    average_precision,
    bootstrap,
    evaluate_maps,
    f1_max,
    intervals,
    metric_names,
    paired_difference,
)


def make_results(seed=0, good=5, bad=7, size=20, signal=1.0):
    generator = np.random.default_rng(seed)
    labels = np.arange(good + bad) >= good
    masks = np.zeros((good + bad, size, size), bool)
    for i in np.flatnonzero(labels):
        for y, x in generator.integers(0, size - 5, (1 + i % 2, 2)):
            masks[i, y : y + 4, x : x + 3] = True
    maps = (generator.integers(-30, 30, masks.shape) / 10).astype(np.float32)
    maps[masks] += np.float32(signal)
    scores = generator.integers(0, 9, good + bad) + 2.0 * labels
    return {"scores": scores, "labels": labels.astype(int), "maps": maps, "masks": masks}


def pick(results, index):
    return {name: values[index] for name, values in results.items()}


def test_names_and_values_are_those_of_the_single_functions():
    results = make_results()
    values = evaluate_maps(**results, limits=(0.3, 0.05), thresholds=50)
    assert tuple(values) == metric_names((0.3, 0.05))
    assert tuple(values)[:6] == ("i_auroc", "i_ap", "f1_max", "p_auroc", "p_ap", "p_f1_max")
    assert tuple(values)[6:] == ("aupro@0.3", "aupro@0.05", "aupro_sampled@0.3", "aupro_sampled@0.05")
    scores, labels, maps, masks = results.values()
    assert values["i_auroc"] == pytest.approx(auroc(scores, labels))
    assert values["i_ap"] == pytest.approx(average_precision(scores, labels))
    assert values["f1_max"] == pytest.approx(f1_max(scores, labels)[0])
    assert values["p_auroc"] == pytest.approx(auroc(maps, masks))
    assert values["p_ap"] == pytest.approx(average_precision(maps, masks))
    assert values["p_f1_max"] == pytest.approx(f1_max(maps, masks)[0])
    for limit in (0.3, 0.05):
        assert values[f"aupro@{limit}"] == pytest.approx(aupro(maps, masks, [limit])[limit])
        assert values[f"aupro_sampled@{limit}"] == pytest.approx(aupro_sampled(maps, masks, [limit], 50)[limit])


def test_what_the_parts_do_not_define_is_none():
    results = make_results()
    only_good = evaluate_maps(**pick(results, slice(0, 5)))
    assert set(only_good.values()) == {None}
    only_bad = evaluate_maps(**pick(results, slice(5, None)))
    assert [only_bad[k] for k in ("i_auroc", "i_ap", "f1_max")] == [None] * 3
    assert only_bad["p_auroc"] is not None  # anomalous parts have ok pixels too
    without_maps = evaluate_maps(results["scores"], results["labels"])
    assert without_maps["i_auroc"] is not None
    assert without_maps["aupro@0.3"] is None
    all_hidden = evaluate_maps(**results, ignore=np.ones_like(results["masks"]))
    assert all_hidden["p_ap"] is None


def test_streaming_equals_all_at_once_and_keeps_no_view():
    results = make_results()
    stream = StreamingMetrics()
    for start in range(0, 12, 5):
        batch = {name: values.copy() for name, values in pick(results, slice(start, start + 5)).items()}
        stream.update(**batch, ids=[f"part/{i}" for i in range(start, min(start + 5, 12))])
        for values in batch.values():
            values[:] = 0
    assert len(stream) == 12
    assert stream.compute() == evaluate_maps(**results)
    assert stream.parts.ids[-1] == "part/11"


def test_per_defect_is_the_good_parts_and_that_type():
    results = make_results()
    defects = np.array(["good"] * 5 + ["hole", "cut", "hole", "cut", "hole", "cut", "cut"])
    stream = StreamingMetrics(limits=(0.3,))
    stream.update(**results, defects=list(defects))
    per_defect = stream.compute_per_defect()
    assert list(per_defect) == ["cut", "hole"]
    for kind, values in per_defect.items():
        keep = (defects == "good") | (defects == kind)
        assert values == evaluate_maps(**pick(results, keep), limits=(0.3,))
        assert values != stream.compute()


def test_collecting_refuses_what_does_not_fit():
    results = make_results()
    with pytest.raises(DataError, match="part 'a' is labelled good"):
        ScoredParts.collect([1.0], [0], results["maps"][-1:], results["masks"][-1:], ids=["a"])
    with pytest.raises(DataError, match=r"image score of part 1 is NaN \(1 of 2 are\)"):
        evaluate_maps([0.0, np.nan], [0, 1])
    with pytest.raises(ShapeError, match="go together"):
        evaluate_maps([0.0, 1.0], [0, 1], maps=results["maps"][:2])
    with pytest.raises(ShapeError, match="12 `maps` but 11 scores"):
        evaluate_maps(results["scores"][:11], results["labels"][:11], results["maps"], results["masks"])


def test_streaming_refuses_what_does_not_fit():
    results = make_results()
    stream = StreamingMetrics()
    with pytest.raises(DataError, match="no part was added"):
        stream.compute()
    stream.update(**pick(results, [0, 5]), ids=["a", "b"])
    with pytest.raises(DataError, match="part 'b' was added twice"):
        stream.update(**pick(results, [1, 6]), ids=["c", "b"])
    with pytest.raises(DataError, match="part 'd' was added twice"):
        stream.update(**pick(results, [1, 6]), ids=["d", "d"])
    with pytest.raises(ShapeError, match="comes without maps and masks, those before came with"):
        stream.update([1.0], [0], ids=["c"])
    with pytest.raises(DataError, match="need `defects`"):
        stream.compute_per_defect()
    assert len(stream) == 2


METRICS = ("i_auroc", "i_ap", "f1_max", "p_auroc", "aupro@0.3", "aupro@0.01")


def test_each_replicate_equals_the_metrics_of_the_repeated_parts(monkeypatch):
    monkeypatch.setattr(intervals, "BLOCK", 100)  # several blocks even on these small maps
    results = make_results()
    parts = ScoredParts.collect(**results)
    draws = intervals._draws(parts.labels, 8, seed=1)
    assert_array_equal(draws[:, :5].sum(axis=1), 5)
    assert_array_equal(draws[:, 5:].sum(axis=1), 7)
    assert (draws > 1).any()
    limits = {"aupro@0.3": 0.3, "aupro@0.01": 0.01}
    drawn = intervals._metrics(parts, draws, METRICS, limits)
    for row, multiplicity in enumerate(draws.astype(int)):
        expected = evaluate_maps(**pick(results, np.repeat(np.arange(12), multiplicity)))
        for name in METRICS:
            assert drawn[name][row] == pytest.approx(expected[name], abs=1e-12), name


def test_intervals_hold_the_value_and_shrink_with_parts():
    results = make_results(good=8, bad=10)
    nine_times = pick(results, np.tile(np.arange(18), 9))  # the same distribution of parts: a third of the width
    values = evaluate_maps(**results)
    small, large = ScoredParts.collect(**results), ScoredParts.collect(**nine_times)
    wide, narrow = bootstrap(small, METRICS), bootstrap(large, METRICS)
    for name in set(METRICS) - {"f1_max"}:  # that one has a floor: rejecting every part
        (low, high), (inner_low, inner_high) = wide[name], narrow[name]
        assert low < inner_low < inner_high < high, name
        assert inner_low <= values[name] <= inner_high, name
        assert 1 / 5 < (inner_high - inner_low) / (high - low) < 1 / 2, name
    assert bootstrap(small, METRICS) == wide  # same seed, same bits
    assert bootstrap(small, METRICS, seed=1) != wide
    tighter = bootstrap(small, ["aupro@0.3"], confidence=0.5)["aupro@0.3"]
    assert wide["aupro@0.3"][0] < tighter[0] < tighter[1] < wide["aupro@0.3"][1]


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    # Scores N(0, 1) and N(1, 1): true AUROC = Phi(1 / sqrt 2). 150 test sets of 40 + 40 parts; a 90 % percentile
    # interval covers 135 on average, sd 3.7. The bound of 120 is four sd down and far above a half-width error.
    generator = np.random.default_rng(7)
    labels = np.arange(80) >= 40
    hits = 0
    for _ in range(150):
        parts = ScoredParts.collect(generator.normal(labels.astype(float)), labels)
        low, high = bootstrap(parts, ["i_auroc"], resamples=200, confidence=0.9)["i_auroc"]
        hits += low <= 0.7602499 <= high
    assert 120 <= hits <= 148


def test_paired_difference_is_sharper_than_two_intervals():
    results = make_results(good=20, bad=30, signal=1.0)
    better = {**results, "maps": results["maps"] + np.float32(0.3) * results["masks"]}
    a, b = ScoredParts.collect(**better), ScoredParts.collect(**results)
    paired = paired_difference(a, b, METRICS, resamples=200)["aupro@0.3"]
    values = [evaluate_maps(**r)["aupro@0.3"] for r in (better, results)]
    assert paired.a == pytest.approx(values[0])
    assert paired.b == pytest.approx(values[1])
    assert paired.difference == pytest.approx(values[0] - values[1])
    assert 0 < paired.low < paired.difference < paired.high
    assert paired.clear
    one, two = (bootstrap(p, ["aupro@0.3"], resamples=200)["aupro@0.3"] for p in (a, b))
    assert paired.high - paired.low < (one[1] - one[0] + two[1] - two[0]) / 2
    same = paired_difference(a, a, METRICS, resamples=20)
    assert all((d.difference, d.low, d.high, d.clear) == (0, 0, 0, False) for d in same.values())


def test_pairing_needs_the_same_parts():
    results = make_results()
    a = ScoredParts.collect(**results, ids=[str(i) for i in range(12)])
    other = make_results(size=18)
    for b in (
        ScoredParts.collect(**results, ids=[str(i) for i in range(1, 13)]),
        ScoredParts.collect(**pick(results, slice(0, 11)), ids=[str(i) for i in range(11)]),
        ScoredParts.collect(**other, ids=a.ids),
        ScoredParts.collect(**{**results, "masks": results["masks"] & (np.arange(20) % 2 == 0)}, ids=a.ids),
    ):
        with pytest.raises(DataError, match="the same parts with the same truth"):
            paired_difference(a, b)


def test_no_interval_from_one_part_of_a_kind():
    results = make_results(good=1)
    parts = ScoredParts.collect(**results)
    assert bootstrap(parts) == dict.fromkeys(intervals.DEFAULT_METRICS)
    assert paired_difference(parts, parts, ["i_ap"]) == {"i_ap": None}
    no_maps = ScoredParts.collect(*(make_results()[k] for k in ("scores", "labels")))
    found = bootstrap(no_maps, ["i_auroc", "aupro@0.3"], resamples=10)
    assert found["aupro@0.3"] is None
    assert found["i_auroc"] is not None


def test_bad_settings_are_named():
    parts = ScoredParts.collect(**make_results())
    with pytest.raises(ConfigError, match=r"no interval is computed for 'aupro_sampled@0\.3'"):
        bootstrap(parts, ["aupro_sampled@0.3"])
    for name in ("aupro@x", "aupro@2"):
        with pytest.raises(ConfigError, match=f"bad limit in '{name}'"):
            bootstrap(parts, [name])
    with pytest.raises(ConfigError, match="resamples >= 1"):
        bootstrap(parts, resamples=0)
