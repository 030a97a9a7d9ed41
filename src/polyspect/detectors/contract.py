"""The one contract that every method fulfils, and the two kinds of fitting stage.

    forward(batch) = score(extract(batch))

* `Detector.extract` is the frozen part: networks and geometry without randomness or learning, so that its result can be
  computed once and kept.
* `Detector.stages` is the fitting recipe as data; the engine in `polyspect.fitting` runs it and owns devices,
  precision, batches, caching, checkpoints and resuming.
* `Detector.score` is what the method learned.

Everything learned lives in tensors (parameters and buffers), so a fitted detector is a set of named tensors.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..config import build_config
from ..errors import ConfigError, DataError, ModelFileError, NotFittedError, ShapeError, nearest_names
from ..samples import Batch, Features, Prediction

Split = Literal["train", "validation"]


@dataclass(frozen=True, kw_only=True)
class Observe:
    """One pass without gradients: `update` per batch, then `finish` once.

    Memory banks, score statistics, closed-form fits; with ``over="batches"`` the raw batches, for statistics of the
    frozen network itself. Parts come in the order of the split, in blocks as they are extracted; with `batch_size`
    they come in an order drawn from the fit's seed, anew for each of `passes`, as in training.
    """

    name: str
    update: Callable[[Any], None]  # takes Features, or a Batch if over == "batches"
    finish: Callable[[], None]
    split: Split = "train"
    over: Literal["features", "batches"] = "features"
    passes: int = 1
    batch_size: int | None = None


@dataclass(frozen=True, kw_only=True)
class Optimise:
    """Minimise the sum of the terms of `loss(features)` over `parameters`.

    `optimizer` gets the parameters and returns a torch optimizer; `schedule`, if given, gets the optimizer and returns
    a scheduler that is stepped at every epoch end, or after every step with ``schedule_every="step"``. Exactly one of
    `epochs` and `steps` is given. Batches are drawn without replacement, the last partial one kept; the order comes
    from the fit's seed. The global RNG is seeded by the engine inside a fork for each epoch, so dropout may be used.
    """

    name: str
    parameters: Callable[[], Iterable[nn.Parameter]]
    loss: Callable[[Features], Mapping[str, Tensor]]  # named scalar terms, summed
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    epochs: int | None = None
    steps: int | None = None
    batch_size: int = 16
    schedule: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler] | None = None
    schedule_every: Literal["epoch", "step"] = "epoch"
    split: Split = "train"


Stage = Observe | Optimise


class Detector(nn.Module):
    """Base of all methods. A subclass states its config class, its presets and its frozen submodules.

    Class attributes:
        Config: Frozen keyword-only dataclass; the schema of everything that can be set.
        PRESETS: Preset name -> config values that differ from the defaults. Always has ``paper`` and ``fast``.
        PREPARATION: Preset name -> name of the preparation that goes with it, where it is not the default one; ``""``
            stands for no preset.
        frozen: Names of the submodules that `extract` uses. They are kept in eval mode and take no gradient.

    A subclass's constructor takes ``(config, *, pretrained=True)``; with ``pretrained=False`` networks are only built,
    because all their tensors are about to be loaded from a model file. Random initialisation happens inside
    `seeded(config.seed)`, so building a detector leaves the global RNG alone.
    """

    Config: ClassVar[type[Any]]
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]]
    PREPARATION: ClassVar[Mapping[str, str]] = {}
    frozen: ClassVar[tuple[str, ...]] = ()
    fitted: Tensor  # () bool

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("fitted", torch.zeros((), dtype=torch.bool))
        self.sources: dict[str, dict[str, str]] = {}  # parts whose tensors came from a file: name, source, sha256

    # -- the three methods of the contract ---------------------------------------------------------------------------

    def extract(self, batch: Batch) -> Features:
        """Frozen features of a batch: name -> tensor, batch first. Deterministic; reads no label."""
        raise TypeError(f"{type(self).__name__} does not define extract()")

    def stages(self) -> Sequence[Stage]:
        """The fitting recipe, in order."""
        raise TypeError(f"{type(self).__name__} does not define stages()")

    def score(self, features: Features) -> Prediction:
        """Score a batch of features. Reads the detector, never changes it; no part sees its batch-mates."""
        raise TypeError(f"{type(self).__name__} does not define score()")

    # -- what follows from them --------------------------------------------------------------------------------------

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modalities that a batch must carry while fitting, and those that it may carry afterwards."""
        return tuple(self.config.modalities)

    @property
    def required(self) -> tuple[str, ...]:
        """The modalities that a prediction rests on: without the others it is the same, bit for bit.

        `modalities`, unless a method that learned from several needs fewer once it is fitted.
        """
        return self.modalities

    @property
    def choices(self) -> list[tuple[str, ...]]:
        """The sets of modalities with which a part can be judged, the best first; usually one: `modalities`."""
        return list(dict.fromkeys([self.modalities, self.required]))

    @property
    def standalone(self) -> bool:
        """Whether `score` judges by the views that are there if those of another are not among its features.

        So it is where features are raw points and pixels, for which nothing can stand in. Where the part is, which the
        cloud tells, is then said by the feature ``part`` (B, H, W) bool.
        """
        return False

    def over_part(self, feature: str, x: Tensor) -> Tensor:
        """A feature map `x` (B, C, h, w) whose cells lie all over the part: itself unless its rim is missing."""
        return x

    def modality_of(self, feature: str) -> str:
        """The modality that a feature of `extract` comes from, by its name; ``""`` for none or several.

        By default what stands before the first dot: ``"rgb.patches"`` comes from ``"rgb"``.
        """
        name = feature.partition(".")[0]
        return name if name in self.modalities else ""

    def forward(self, batch: Batch) -> Prediction:
        """`score(extract(batch))` of a fitted detector.

        Raises:
            NotFittedError: the detector was not fitted.
            DataError: a modality that the detector needs is missing from the batch.
        """
        if not bool(self.fitted):
            raise NotFittedError(
                f"{type(self).__name__} is not fitted: fit it, or load a model file, before predicting"
            )
        self.check_batch(batch)
        return self.score(self.extract(batch))

    def check_batch(self, batch: Batch) -> None:
        """Check that `batch` has what `extract` reads.

        Raises:
            DataError: names the missing modality, the part and what there is.
        """
        if any(set(names) <= set(batch.images) for names in self.choices):
            return
        least = min(self.choices, key=len)
        missing = [name for name in least if name not in batch.images]
        raise DataError(
            f"part '{batch.ids[0]}' has no '{missing[0]}', which this detector needs (it uses "
            f"{', '.join(self.modalities)}; the part has {', '.join(batch.images) or 'nothing'}): "
            f"supply it, fit a detector on the modalities that there are, or let `polyspect complete` teach this one "
            f"to do without"
        )

    def train(self, mode: bool = True) -> Detector:
        """Set the mode of everything that learns; frozen submodules stay in eval mode."""
        super().train(mode)
        for name in self.frozen:
            self.get_submodule(name).eval()
        return self

    def extractor_key(self) -> str:
        """sha256 of all that decides what `extract` returns: its settings and the frozen tensors, as they are now."""
        digest = hashlib.sha256(json.dumps(self.extraction_settings(), sort_keys=True, default=str).encode())
        for name in self.frozen:
            for key, tensor in self.get_submodule(name).state_dict().items():
                digest.update(f"{name}.{key}{tuple(tensor.shape)}{tensor.dtype}".encode())
                digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def extraction_settings(self) -> dict[str, Any]:
        """The settings that decide what `extract` returns; detectors that say the same share cached features.

        By default the class and its whole config.
        """
        kind = f"{type(self).__module__}.{type(self).__qualname__}"
        return {"detector": kind, "config": dataclasses.asdict(self.config)}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over all tensors of a fitted detector; buffers that are empty until fitted get the stored size.

        Raises:
            ModelFileError: a tensor is missing, left over, or of the wrong shape.
        """
        for module_name, module in self.named_modules():
            for name in getattr(module, "growing", ()):  # buffers whose size is known only after fitting
                stored = tensors.get(f"{module_name}.{name}" if module_name else name)
                if stored is not None:
                    old = getattr(module, name)
                    setattr(module, name, torch.empty(stored.shape, dtype=stored.dtype, device=old.device))
        try:
            self.load_state_dict(dict(tensors), strict=True)
        except RuntimeError as error:
            raise ModelFileError(f"the stored tensors do not fit {type(self).__name__}: {error}") from None


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's global RNG inside the block and put its state back afterwards (CPU and current CUDA devices)."""
    with torch.random.fork_rng(devices=list(range(torch.cuda.device_count()))):
        torch.manual_seed(seed)
        yield


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode inside the block, so that scoring never updates batch-norm statistics; the mode is put back."""
    training = module.training
    if training:
        module.eval()
    try:
        yield
    finally:
        if training:
            module.train()


def require(method: str, holds: bool, field: str, expected: str, got: object) -> None:
    """Check one setting of a method's config.

    Raises:
        ConfigError: it does not hold; says the field, what was expected and what was got.
    """
    if not holds:
        raise ConfigError(f"`{field}` of {method} must be {expected}, got {got!r}")


def require_views(method: str, names: Sequence[str]) -> None:
    """Check `modalities` of a method that looks at image-like views and keeps a module under each view's name.

    Raises:
        ConfigError: no name, a name twice, ``xyz`` (no image), or a name that cannot be a module's.
    """
    require(method, len(names) >= 1, "modalities", "one or more names", names)
    require(method, len(set(names)) == len(names), "modalities", "different names", names)
    image_like = "image-like (use 'depth' or 'normals' instead of 'xyz')"
    require(method, "xyz" not in names, "modalities", image_like, names)
    for name in names:
        usable = re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name) and not hasattr(nn.ModuleDict(), name)
        require(method, bool(usable), "modalities", "plain names of letters, digits and underscores", name)


def require_grid(method: str, batch: Batch, cell: int) -> None:
    """Check that height and width of a batch are multiples of the coarsest grid cell, and at least two of them.

    Raises:
        ShapeError: they are not; names the part, its size and the cell.
    """
    height, width = batch.valid.shape[-2:]
    if height % cell or width % cell or min(height, width) < 2 * cell:
        raise ShapeError(
            f"part '{batch.ids[0]}' is {width}x{height} pixels; {method} needs multiples of {cell}, at least "
            f"{2 * cell}: prepare the parts at such a size, e.g. 256x256"
        )


def configure(detector: type[Detector], values: Mapping[str, Any] | None = None, preset: str | None = None) -> Any:
    """The config of a detector class: defaults, then the preset, then `values`, all checked against the dataclass.

    Raises:
        ConfigError: unknown preset or field (names the nearest), or a value of the wrong type.
    """
    if preset is not None and preset not in detector.PRESETS:
        raise ConfigError(f"unknown preset '{preset}': {nearest_names(preset, detector.PRESETS)}")
    chosen = {**(detector.PRESETS[preset] if preset else {}), **(values or {})}
    return build_config(detector.Config, chosen)
