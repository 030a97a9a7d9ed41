"""The engine against a detector small enough to compute by hand: stages, order, resuming, the feature cache."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from polyspect.detectors.contract import Detector, Observe, Optimise, Stage, seeded
from polyspect.errors import ConfigError, DataError
from polyspect.fitting.engine import Engine, EngineConfig, derive_seed, shuffled_batches, updates_per_epoch
from polyspect.fitting.features import FeatureStore, make_room
from polyspect.samples import Batch, Features, Prediction
from tiny import TinyParts


@dataclass(frozen=True, kw_only=True)
class ToyConfig:
    """Settings of the toy."""

    modalities: tuple[str, ...] = ("rgb",)
    epochs: int | None = 5
    steps: int | None = None
    dropout: float = 0.2
    batch_size: int = 3


class Toy(Detector):
    """Predicts the mean colour of a part from a constant through dropout; then observes the training residuals."""

    Config = ToyConfig
    PRESETS: Mapping[str, Mapping[str, object]] = {"paper": {}, "fast": {}}
    frozen = ("gain",)

    def __init__(self, config: ToyConfig, *, pretrained: bool = True) -> None:
        super().__init__(config)
        self.gain = nn.BatchNorm2d(3)
        with seeded(1):
            self.layer = nn.Linear(3, 3)
        self.register_buffer("level", torch.zeros(()))
        self.extractions = 0
        self.total: list[Tensor] = []

    def extract(self, batch: Batch) -> Features:
        self.extractions += len(batch)
        return {"colour": self.gain(batch.images["rgb"]).mean((2, 3)), "valid": batch.valid}

    def stages(self) -> Sequence[Stage]:
        c = self.config
        return [
            Optimise(
                name="fit colour",
                parameters=self.layer.parameters,
                loss=self._loss,
                optimizer=lambda p: torch.optim.Adam(p, lr=0.05),
                schedule=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
                epochs=c.epochs,
                steps=c.steps,
                batch_size=c.batch_size,
            ),
            Observe(name="level", update=self._see, finish=self._set, split="validation"),
        ]

    def score(self, features: Features) -> Prediction:
        score = (self.layer(features["colour"]) - features["colour"]).abs().sum(1) - self.level
        return Prediction(score, score[:, None, None].expand(features["valid"].shape).clone(), {})

    def _loss(self, features: Features) -> dict[str, Tensor]:
        noisy = nn.functional.dropout(features["colour"], self.config.dropout, self.training)
        return {"l2": (self.layer(noisy) - features["colour"]).square().mean()}

    def _see(self, features: Features) -> None:
        self.total.append((self.layer(features["colour"]) - features["colour"]).abs().sum(1))

    def _set(self) -> None:
        self.level = torch.cat(self.total).mean()
        self.total.clear()


SPLITS = {"train": TinyParts(range(7)), "validation": TinyParts(range(50, 53))}


class Killed(Exception):
    """Stands for a kill: raised in the middle of a fit."""


def fit(config: ToyConfig | None = None, **engine) -> Toy:
    toy = Toy(config or ToyConfig())
    settings = {"seed": 5, "device": "cpu", "block": 2, **engine.pop("settings", {})}
    resume = engine.pop("resume", False)
    Engine(EngineConfig(**settings), **engine).fit(toy, dict(SPLITS), resume=resume)
    return toy


def test_optimise_equals_the_loop_written_out():
    fitted = fit(ToyConfig(dropout=0.0))
    toy = Toy(ToyConfig(dropout=0.0)).eval()
    with torch.no_grad():
        colour = toy.extract(SPLITS["train"].batch(range(7)))["colour"]
    optimizer = torch.optim.Adam(toy.layer.parameters(), lr=0.05)
    for epoch in range(5):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * 0.9**epoch
        for members in shuffled_batches(7, 3, derive_seed(5, 0, epoch)):
            optimizer.zero_grad()
            (toy.layer(colour[members]) - colour[members]).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(fitted.layer.weight, toy.layer.weight.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("after", range(1, 7))
@pytest.mark.parametrize("cached", [False, True])
def test_killed_and_resumed_has_the_same_bits(after: int, cached: bool, tmp_path, monkeypatch):
    settings = {"cache": str(tmp_path / "cache")} if cached else {}
    whole = fit(settings=settings).state_dict()
    saves = 0
    save = Engine._save

    def killing(self, *args, **kwargs):
        nonlocal saves
        saves += 1
        save(self, *args, **kwargs)
        if saves == after:
            raise Killed

    monkeypatch.setattr(Engine, "_save", killing)
    with pytest.raises(Killed):
        fit(checkpoint=tmp_path / "c", settings=settings)
    monkeypatch.setattr(Engine, "_save", save)
    resumed = fit(checkpoint=tmp_path / "c", resume=True, settings=settings).state_dict()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert not (tmp_path / "c").exists()


def test_steps_bound_the_number_of_updates():
    three = fit(ToyConfig(epochs=None, steps=3, batch_size=3))
    two = fit(ToyConfig(epochs=None, steps=2, batch_size=3))
    one_epoch = fit(ToyConfig(epochs=1, batch_size=3))
    assert torch.equal(two.layer.weight, one_epoch.layer.weight)
    assert not torch.equal(three.layer.weight, two.layer.weight)


def test_resuming_another_fit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Engine, "_observe", lambda *a: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        fit(checkpoint=tmp_path / "c")
    with pytest.raises(ConfigError, match="from another fit"):
        fit(ToyConfig(dropout=0.3), checkpoint=tmp_path / "c", resume=True)


def test_another_seed_gives_another_fit_and_the_same_seed_the_same():
    a, b, c = fit(), fit(), fit(settings={"seed": 6})
    assert torch.equal(a.layer.weight, b.layer.weight)
    assert not torch.equal(a.layer.weight, c.layer.weight)


def test_mixed_precision_is_used_only_when_asked_for():
    plain, mixed = fit(), fit(settings={"precision": "bf16-mixed"})
    assert mixed.layer.weight.dtype == torch.float32
    assert torch.isfinite(mixed.layer.weight).all()
    assert not torch.equal(plain.layer.weight, mixed.layer.weight)
    torch.testing.assert_close(plain.layer.weight, mixed.layer.weight, rtol=0.05, atol=0.05)


def test_features_are_extracted_once_and_reused_by_the_next_fit(tmp_path):
    first = fit(settings={"cache": str(tmp_path)})
    again = fit(settings={"cache": str(tmp_path)})
    assert first.extractions == 10
    assert again.extractions == 0
    assert torch.equal(first.layer.weight, again.layer.weight)
    assert torch.equal(first.layer.weight, fit().layer.weight)


def test_the_cache_key_follows_the_frozen_tensors():
    a, b = Toy(ToyConfig()), Toy(ToyConfig())
    assert a.extractor_key() == b.extractor_key()
    b.gain.running_mean += 1
    assert a.extractor_key() != b.extractor_key()


def test_an_empty_split_and_a_bad_stage_are_errors():
    with pytest.raises(DataError, match="stage 'level' needs good parts of the validation split"):
        Engine(EngineConfig(device="cpu")).fit(Toy(ToyConfig()), {"train": SPLITS["train"]})
    with pytest.raises(ConfigError, match="either epochs or steps"):
        fit(ToyConfig(epochs=3, steps=3))
    with pytest.raises(ConfigError, match="unknown precision 'half'"):
        EngineConfig(precision="half")
    with pytest.raises(ConfigError, match="unknown device 'gpu'"):
        Engine(EngineConfig(device="gpu"))


def test_a_diverging_loss_stops_the_fit():
    toy = Toy(ToyConfig())
    stage = replace(toy.stages()[0], loss=lambda f: {"boom": toy._loss(f)["l2"] * math.inf})
    toy.stages = lambda: [stage]  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match="loss term 'boom' is not finite"):
        Engine(EngineConfig(device="cpu")).fit(toy, dict(SPLITS))


def test_batches_cover_everything_once_and_never_end_in_one():
    for count, size in [(7, 3), (10, 3), (1, 4), (9, 4), (5, 1), (16, 16)]:
        batches = shuffled_batches(count, size, seed=3)
        assert sorted(index for batch in batches for index in batch) == list(range(count))
        assert len(batches) == updates_per_epoch(count, size)
        assert size == 1 or count == 1 or all(len(batch) > 1 for batch in batches)
    assert shuffled_batches(7, 3, 3) != shuffled_batches(7, 3, 4)


# -- the feature store -----------------------------------------------------------------------------------------------


def rows_of(indices: Sequence[int]) -> dict[str, Tensor]:
    index = torch.tensor(list(indices))
    return {"x": index[:, None].float().expand(-1, 4).clone(), "ok": index % 2 == 0}


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("fitting", [0, 1, 5, 8, 100])  # parts that the limit lets in
def test_rows_are_right_whatever_fits(fitting: int, on_disk: bool, tmp_path, caplog):
    folder = tmp_path if on_disk else None
    store = FeatureStore(rows_of, "k", 11, folder=folder, max_bytes=fitting * 17, block=3)
    for wanted in ([10, 0, 4, 4], [2], list(range(11))):
        rows = store.rows(wanted, "cpu")
        assert rows["x"][:, 0].tolist() == wanted
        assert rows["ok"].tolist() == [i % 2 == 0 for i in wanted]
    assert ("the rest is computed anew" in caplog.text) == (fitting < 11)


def test_a_store_left_half_filled_goes_on(tmp_path):
    first = FeatureStore(rows_of, "k", 10, folder=tmp_path, max_bytes=10**6, block=3)
    first.rows([4], "cpu")
    asked: list[int] = []

    def counting(indices: Sequence[int]) -> dict[str, Tensor]:
        asked.extend(indices)
        return rows_of(indices)

    second = FeatureStore(counting, "k", 10, folder=tmp_path, max_bytes=10**6, block=3)
    assert not second.complete
    second.fill(lambda n: None)
    assert second.complete
    assert asked == [0, 1, 2, 6, 7, 8, 9]
    assert second.rows(range(10), "cpu")["x"][:, 3].tolist() == list(range(10))


def test_old_stores_make_room(tmp_path):
    for key in ("a", "b"):
        FeatureStore(rows_of, key, 4000, folder=tmp_path, max_bytes=10**6, block=500).fill(lambda n: None)
    make_room(tmp_path, 10**6, keep={"a"})
    assert {p.name for p in tmp_path.iterdir()} == {"a", "b"}
    make_room(tmp_path, 1000, keep={"a"})
    assert {p.name for p in tmp_path.iterdir()} == {"a"}


# -- passes of an Observe stage ----------------------------------------------------------------------------------------


def members_seen(stage_settings, over="features"):
    """Which parts each call of `update` got, told by their mean colour."""
    parts, calls = TinyParts(range(7)), []
    colours = [float(parts.batch([i]).images["rgb"].mean()) for i in range(7)]

    def update(seen):
        means = seen.images["rgb"].mean((1, 2, 3)) if over == "batches" else seen["colour"].mean(1)
        calls.append([min(range(7), key=lambda i: abs(colours[i] - float(m))) for m in means])

    toy = Toy(ToyConfig())
    stage = Observe(name="look", update=update, finish=lambda: None, over=over, **stage_settings)
    toy.stages = lambda: [stage]
    Engine(EngineConfig(device="cpu", block=3)).fit(toy, {"train": parts})
    return calls


def test_one_pass_sees_the_parts_in_order_in_the_engines_blocks():
    assert members_seen({}, over="batches") == [[0, 1, 2], [3, 4, 5], [6]]


@pytest.mark.parametrize("over", ["batches", "features"])
def test_several_passes_see_every_part_once_each_in_orders_of_their_own(over):
    calls = members_seen({"passes": 3, "batch_size": 4}, over)
    assert [len(call) for call in calls] == [4, 3] * 3
    turns = [calls[i] + calls[i + 1] for i in (0, 2, 4)]
    assert all(sorted(turn) == list(range(7)) for turn in turns)
    assert len({tuple(turn) for turn in turns}) == 3
    assert members_seen({"passes": 3, "batch_size": 4}, over) == calls


# -- compiling ---------------------------------------------------------------------------------------------------------


def test_compiled_loss_is_the_same_up_to_rounding_and_part_of_a_checkpoints_identity(monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "compile", lambda loss: seen.append(loss) or loss)
    plain, compiled = fit(), fit(settings={"compile": True})
    assert len(seen) == 1
    assert torch.equal(plain.layer.weight, compiled.layer.weight)
    engines = [Engine(EngineConfig(device="cpu", compile=flag)) for flag in (False, True)]
    assert len({engine._identity(plain, SPLITS) for engine in engines}) == 2


def test_a_compiler_that_fails_is_an_error_and_not_a_slow_fit(monkeypatch):
    from torch._dynamo.exc import InternalTorchDynamoError

    def broken(_loss):
        def run(_features):
            raise InternalTorchDynamoError("no compiler found")

        return run

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(ConfigError, match=r"cannot be compiled here \(no compiler found"):
        fit(settings={"compile": True})
