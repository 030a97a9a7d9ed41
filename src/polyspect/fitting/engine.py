"""The fitting engine: runs a detector's stages. It knows stages and features, no method by name and no file format.

Same seed, same machine, same number of threads: same bits on a CPU. (On a GPU the gradient of AST's padding and MDSS's
`overlap="mean"` are summed in no fixed order.) Every random choice is drawn from a generator seeded by
(seed, stage, epoch), so a fit that was killed and resumed continues with the very numbers it would have drawn.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..detectors.contract import Detector, Observe, Optimise, Split, seeded
from ..errors import ConfigError, DataError
from ..samples import Features
from .features import FeatureStore, PartSource, make_room, store_key
from .modelfile import FORMAT, flatten_state, read_tensors, unflatten_state, write_tensors
from .progress import Progress

log = logging.getLogger("polyspect")

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How a fit is run; nothing here is part of the method."""

    seed: int = 0  # order of batches, dropout; the detector's own seed is in its config
    device: str = "auto"  # auto, cpu, cuda
    precision: str = "32-true"  # 32-true, bf16-mixed or 16-mixed (autocast; the last two change results)
    compile: bool = False  # compile the loss with torch.compile: same maths, rounding differs, minutes of start-up
    block: int = 8  # parts per extraction
    cache: str | None = None  # folder of the feature cache; None keeps features in memory
    cache_bytes: int = 8 * 2**30  # most that cached features may take
    checkpoint_every: int = 1  # epochs between checkpoints inside a stage; a stage's end is always one

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ConfigError(f"unknown precision '{self.precision}': one of {', '.join(PRECISIONS)}")
        if self.block < 1 or self.checkpoint_every < 1 or self.cache_bytes < 0:
            raise ConfigError("block and checkpoint_every must be at least 1, cache_bytes at least 0")


class Engine:
    """Fits a detector on the parts of its splits.

    Args:
        config: How to run.
        checkpoint: File to write checkpoints to, or None.
        progress: Where progress is shown.
    """

    def __init__(self, config: EngineConfig, checkpoint: Path | None = None, progress: Progress | None = None) -> None:
        from lightning_fabric import Fabric

        self.config = config
        self.checkpoint = checkpoint
        self.progress = progress or Progress()
        accelerator = pick_accelerator(config.device)
        with _quiet_fabric():
            self.fabric = Fabric(accelerator=accelerator, devices=1, precision=config.precision)

    def fit(self, detector: Detector, splits: dict[Split, PartSource], *, resume: bool = False) -> Detector:
        """Run all stages and mark the detector fitted. The detector stays on the device, in eval mode.

        Raises:
            DataError: a split that a stage asks for has no part.
            ConfigError: `resume` and the checkpoint belongs to another fit.
        """
        stages = list(detector.stages())
        for stage in stages:
            if stage.split not in splits or len(splits[stage.split]) == 0:
                raise DataError(f"stage '{stage.name}' needs good parts of the {stage.split} split and there is none")
        detector.to(self.fabric.device)
        identity = self._identity(detector, splits)
        at, epoch, optimizer_state = self._resume(detector, identity) if resume else (0, 0, None)
        with deterministic_kernels():
            for index in range(at, len(stages)):
                stage = stages[index]
                if isinstance(stage, Observe):
                    self._observe(detector, stage, index, splits[stage.split])
                else:
                    first, state = (epoch, optimizer_state) if index == at else (0, None)
                    self._optimise(detector, stage, index, splits[stage.split], first, state, identity)
                self._save(detector, identity, stage=index + 1, epoch=0)
        detector.fitted.fill_(True)
        detector.eval().requires_grad_(False)
        if self.checkpoint is not None:
            self.checkpoint.unlink(missing_ok=True)
        return detector

    # -- the two kinds of stage --------------------------------------------------------------------------------------

    def _observe(self, detector: Detector, stage: Observe, index: int, parts: PartSource) -> None:
        detector.eval()
        count = len(parts)
        store = None if stage.over == "batches" else self._store(detector, parts)
        with torch.no_grad(), self.progress.task(stage.name, stage.passes * count) as advance:
            for turn in range(stage.passes):
                for members in self._blocks(stage, count, (index, turn)):
                    if store is None:
                        stage.update(parts.batch(members).to(self.fabric.device))
                    else:
                        stage.update(store.rows(members, self.fabric.device))
                    advance(len(members))
            stage.finish()

    def _blocks(self, stage: Observe, count: int, place: tuple[int, int]) -> list[list[int]]:
        """The parts of one pass: in order, or shuffled into batches where the stage says of what size."""
        if stage.batch_size is not None:
            return shuffled_batches(count, stage.batch_size, derive_seed(self.config.seed, *place))
        block = self.config.block
        return [list(range(first, min(first + block, count))) for first in range(0, count, block)]

    def _optimise(
        self,
        detector: Detector,
        stage: Optimise,
        index: int,
        parts: PartSource,
        first_epoch: int,
        state: dict[str, Any] | None,
        identity: str,
    ) -> None:
        store = self._store(detector, parts)
        parameters = list(stage.parameters())
        optimizer = stage.optimizer(parameters)
        schedule = stage.schedule(optimizer) if stage.schedule else None
        epochs, steps = _length(stage, len(parts))
        if state is not None:
            optimizer.load_state_dict(state["optimizer"])
            if schedule is not None:
                schedule.load_state_dict(state["schedule"])
        stepper = self.fabric.setup_optimizers(optimizer)
        if self.config.compile:
            stage = replace(stage, loss=_compiled(stage.loss))
        with self.progress.task(stage.name, epochs) as advance:
            advance(first_epoch)
            for epoch in range(first_epoch, epochs):
                done = epoch * updates_per_epoch(len(parts), stage.batch_size)
                terms = self._epoch(detector, stage, store, parameters, stepper, schedule, (index, epoch), steps - done)
                if schedule is not None and stage.schedule_every == "epoch":
                    schedule.step()
                advance(1, note=" ".join(f"{name} {value:.4f}" for name, value in terms.items()))
                if (epoch + 1) % self.config.checkpoint_every == 0 and epoch + 1 < epochs:
                    self._save(detector, identity, stage=index, epoch=epoch + 1, optimizer=optimizer, schedule=schedule)
        detector.eval()

    def _epoch(
        self,
        detector: Detector,
        stage: Optimise,
        store: FeatureStore,
        parameters: list[torch.nn.Parameter],
        stepper: Any,
        schedule: Any,
        place: tuple[int, int],
        steps_left: float,
    ) -> dict[str, float]:
        """One pass over the parts in an order drawn for this epoch; returns the mean of each loss term."""
        seed = derive_seed(self.config.seed, *place)
        batches = shuffled_batches(store.count, stage.batch_size, seed)
        batches = batches[: int(min(steps_left, len(batches)))]
        sums: dict[str, Tensor] = {}
        detector.train()
        with seeded(seed), torch.enable_grad():
            for members in batches:
                with torch.no_grad():
                    features = store.rows(members, self.fabric.device)
                with self.fabric.autocast():
                    terms = dict(stage.loss(features))
                loss = torch.stack(list(terms.values())).sum()
                stepper.zero_grad(set_to_none=True)
                self.fabric.backward(loss)
                stepper.step()
                if schedule is not None and stage.schedule_every == "step":
                    schedule.step()
                for name, term in terms.items():
                    sums[name] = sums.get(name, torch.zeros((), device=term.device)) + term.detach()
        means = {name: float(total) / max(len(batches), 1) for name, total in sums.items()}
        bad = [name for name, value in means.items() if not math.isfinite(value)]
        if bad:
            raise ConfigError(
                f"stage '{stage.name}', epoch {place[1] + 1}: loss term '{bad[0]}' is not finite; "
                f"lower the learning rate, or check the training parts for extreme values"
            )
        return means

    # -- features, checkpoints ---------------------------------------------------------------------------------------

    def _store(self, detector: Detector, parts: PartSource) -> FeatureStore:
        """The filled feature store of these parts for the extractor as it is now."""
        detector.eval()
        folder = Path(self.config.cache) / "features" if self.config.cache else None
        key = store_key(detector.extractor_key(), parts.keys(), self.config.precision)
        if folder is not None:
            make_room(folder, self.config.cache_bytes, keep={key})

        def extract(indices: Sequence[int]) -> dict[str, Tensor]:
            batch = parts.batch(indices).to(self.fabric.device)
            detector.check_batch(batch)
            with torch.no_grad(), self.fabric.autocast():
                features = detector.extract(batch)
            return {name: t.float() if t.is_floating_point() else t for name, t in features.items()}

        store = FeatureStore(
            extract, key, len(parts), folder=folder, max_bytes=self.config.cache_bytes, block=self.config.block
        )
        if not store.complete:
            with self.progress.task("features", len(parts)) as advance:
                store.fill(advance)
        return store

    def _identity(self, detector: Detector, splits: dict[Split, PartSource]) -> str:
        """What a checkpoint must share with the fit that resumes from it."""
        settings = {k: v for k, v in asdict(self.config).items() if k in ("seed", "precision", "block", "compile")}
        text = json.dumps(
            [
                type(detector).__qualname__,
                asdict(detector.config),
                settings,
                {split: parts.keys() for split, parts in splits.items()},
            ],
            sort_keys=True,
            default=str,
        )
        return hashlib.sha256(text.encode()).hexdigest()

    def _save(
        self,
        detector: Detector,
        identity: str,
        *,
        stage: int,
        epoch: int,
        optimizer: torch.optim.Optimizer | None = None,
        schedule: Any = None,
    ) -> None:
        if self.checkpoint is None:
            return
        tensors = {f"detector.{name}": tensor for name, tensor in detector.state_dict().items()}
        header: dict[str, Any] = {"format": FORMAT, "checkpoint": identity, "stage": stage, "epoch": epoch}
        if optimizer is not None:
            moments, header["optimizer"] = flatten_state(optimizer.state_dict(), "optimizer")
            tensors.update(moments)
            header["schedule"] = _plain_schedule(schedule)
        write_tensors(self.checkpoint, tensors, header)

    def _resume(self, detector: Detector, identity: str) -> tuple[int, int, dict[str, Any] | None]:
        """Load the checkpoint: which stage and epoch come next, and the optimizer's state."""
        if self.checkpoint is None or not self.checkpoint.is_file():
            log.warning("nothing to resume: there is no checkpoint at '%s'; fitting from the start", self.checkpoint)
            return 0, 0, None
        header, tensors = read_tensors(self.checkpoint)
        if header.get("checkpoint") != identity:
            raise ConfigError(
                f"the checkpoint '{self.checkpoint}' is from another fit (other settings, seed, preparation or parts): "
                f"fit with the same ones, or without --resume to start anew"
            )
        own = {name[9:]: tensor for name, tensor in tensors.items() if name.startswith("detector.")}
        detector.load_tensors(own)
        detector.to(self.fabric.device)
        log.info("resuming at stage %d, epoch %d", header["stage"] + 1, header["epoch"] + 1)
        if "optimizer" not in header:
            return header["stage"], header["epoch"], None
        state = {
            "optimizer": unflatten_state(tensors, header["optimizer"], "optimizer"),
            "schedule": header["schedule"],
        }
        return header["stage"], header["epoch"], state


# -- pieces without state --------------------------------------------------------------------------------------------


def shuffled_batches(count: int, batch_size: int, seed: int) -> list[list[int]]:
    """All indices once, in an order drawn from `seed`, in batches; a trailing batch of one joins the one before it.

    (A batch of one has no batch statistics where a network's map has shrunk to one position.)
    """
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    batches = [order[first : first + batch_size] for first in range(0, count, batch_size)]
    if len(batches) > 1 and len(batches[-1]) == 1 and batch_size > 1:
        batches[-2:] = [batches[-2] + batches[-1]]
    return batches


def updates_per_epoch(count: int, batch_size: int) -> int:
    """How many batches `shuffled_batches` makes."""
    joined = batch_size > 1 and count > batch_size and count % batch_size == 1
    return math.ceil(count / batch_size) - joined


def derive_seed(seed: int, *place: int) -> int:
    """A 63-bit seed from a fit's seed and the place (stage, epoch, ...) where it is used."""
    digest = hashlib.sha256(json.dumps([seed, *place]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def pick_accelerator(device: str) -> str:
    """``auto`` -> cuda where there is one, else cpu; anything else must be there.

    Apple's MPS is none of them: it has no float64, which geometry, banks and statistics need.

    Raises:
        ConfigError: the device asked for is unknown or not there.
    """
    there = {"cpu": True, "cuda": torch.cuda.is_available()}
    if device == "auto":
        return "cuda" if there["cuda"] else "cpu"
    if device not in there:
        raise ConfigError(f"unknown device '{device}': one of auto, {', '.join(there)}")
    if not there[device]:
        raise ConfigError(f"device '{device}' was asked for and torch finds none: use --device cpu, or mend the driver")
    return device


@contextmanager
def deterministic_kernels() -> Iterator[None]:
    """Choose reproducible kernels while fitting, and put the caller's choice back."""
    flags = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = flags


def _compiled(loss: Callable[[Features], Mapping[str, Tensor]]) -> Callable[[Features], Mapping[str, Tensor]]:
    """`loss` through torch.compile; what the compiler cannot do is an error with its reason, no silent fallback."""
    from torch._dynamo.exc import TorchDynamoException

    fast = torch.compile(loss)

    def run(features: Features) -> Mapping[str, Tensor]:
        try:
            return fast(dict(features))
        except TorchDynamoException as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ConfigError(
                f"the loss cannot be compiled here ({reason}); torch.compile needs a C++ compiler on a CPU and Triton "
                f"on a GPU: install it, or fit without compile"
            ) from error

    return run


@contextmanager
def _quiet_fabric() -> Iterator[None]:
    """Silence the fabric's greeting, which is not about this project."""
    logger = logging.getLogger("lightning_fabric")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _length(stage: Optimise, count: int) -> tuple[int, float]:
    """Epochs of a stage and its most steps (infinite when given in epochs)."""
    if (stage.epochs is None) == (stage.steps is None):
        raise ConfigError(f"stage '{stage.name}' must give either epochs or steps")
    if stage.epochs is not None:
        return stage.epochs, math.inf
    steps = stage.steps or 0
    return math.ceil(steps / updates_per_epoch(count, stage.batch_size)), float(steps)


def _plain_schedule(schedule: Any) -> dict[str, Any] | None:
    """A scheduler's state as plain numbers (functions, which torch skips, are rebuilt from the stage)."""
    if schedule is None:
        return None
    return {k: v for k, v in schedule.state_dict().items() if isinstance(v, (int, float, str, bool, list, type(None)))}
