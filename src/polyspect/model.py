"""A fitted model: detector + preparation + calibration, in one file that answers with a decision.

files -> Sample -> prepared Sample -> Batch -> detector -> Prediction -> calibration -> PartResult
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .calibration import Calibration
from .config import build_config
from .data.batches import collate
from .data.depth_scale import DepthScale
from .data.parts import NoPointsError, Parts, prefetched, usable
from .data.preparation import Preparation, only_views, prepare, without_cloud
from .detectors import detector_class
from .detectors.completion import Completion, CompletionConfig
from .detectors.contract import Detector
from .errors import DataError, ModelFileError
from .fitting.modelfile import FORMAT, read_header, read_tensors, write_tensors
from .samples import Array, Sample, is_geometric
from .version import __version__


@dataclass(frozen=True, eq=False)
class PartResult:
    """What a model says of one part.

    Attributes:
        sample: The prepared part.
        score: Raw image score; larger is more anomalous.
        map: (H, W) float32 raw anomaly map on the prepared grid.
        branch_maps: Name -> (H, W) float32, one per modality or memory bank.
        p_value: Conformal p-value among the calibration parts: how often a good part would score at least this high.
            None for an uncalibrated model.
        decision: ``"accept"``, ``"reject"``, or None for an uncalibrated model.
        used: The modalities that the verdict rests on; fewer than the model's where the part lacks some.
    """

    sample: Sample
    score: float
    map: Array
    branch_maps: Mapping[str, Array]
    p_value: float | None
    decision: str | None
    used: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """The part's id."""
        return self.sample.id


@dataclass(eq=False)
class Model:
    """A fitted detector with all that is needed to judge new parts.

    Attributes:
        name: The detector's name in the registry.
        detector: Fitted, in eval mode.
        preparation: How parts are prepared; the same as in fitting.
        scale: Depth standardisation of the category; None if depth is not used or not scaled by category.
        calibration: Decision threshold; None if the model was never calibrated.
        partial: Thresholds of a completed model for parts that lack something: ``"rgb"`` or ``"rgb+depth"``, the
            modalities they have -> calibration.
        info: Seed, versions, weights, data fingerprint: what else the file's header says.
    """

    name: str
    detector: Detector
    preparation: Preparation
    scale: DepthScale | None = None
    calibration: Calibration | None = None
    info: dict[str, Any] = field(default_factory=dict)
    partial: dict[str, Calibration] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)  # of the last `predict`: "read" and "predict"

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modalities that the detector was fitted on."""
        return self.detector.modalities

    @property
    def choices(self) -> list[tuple[str, ...]]:
        """The sets of modalities with which a part can be judged, the best first."""
        return self.detector.choices

    def calibration_for(self, used: Sequence[str]) -> Calibration | None:
        """The calibration for parts with the modalities `used`."""
        return self.calibration if set(self.detector.required) <= set(used) else self.partial.get("+".join(used))

    def predict(self, parts: Parts, batch_size: int = 8) -> Iterator[PartResult]:
        """Judge parts one after another, lazily. A part's result does not depend on the others.

        Raises:
            DataError: a part cannot be read, or lacks a modality.
        """
        self.seconds = {"read": 0.0, "predict": 0.0}
        parts.scale = self.scale
        mark = time.perf_counter()
        for _, samples, batch in prefetched(parts, batch_size):
            now = time.perf_counter()
            self.seconds["read"] += now - mark
            results = self._judge(samples, batch)
            mark = time.perf_counter()
            self.seconds["predict"] += mark - now
            yield from results
            mark = time.perf_counter()

    def predict_sample(self, sample: Sample) -> PartResult:
        """Judge one part as it was read (it is prepared here).

        Raises:
            DataError: the part lacks a modality, or has no valid 3D point where one is needed.
        """
        flat = not any(is_geometric(name) for name in sample.images)
        can_do_without = any(not any(map(is_geometric, names)) for names in self.choices)
        ready = prepare(sample, without_cloud(self.preparation) if flat and can_do_without else self.preparation)
        used = self.check_sample(ready)
        if set(used) != set(self.modalities):
            ready = only_views(ready, used)
        return self._judge([ready], collate([ready], self.preparation, self.scale, used))[0]

    def check_sample(self, sample: Sample) -> tuple[str, ...]:
        """Check that a prepared part has what the detector needs; the modalities it will be judged by.

        Raises:
            DataError: names the part and what is missing.
        """
        try:
            return usable(sample, self.choices)
        except NoPointsError as error:
            raise DataError(f"part '{sample.id}' {error}") from None
        except DataError:
            missing = next(name for name in min(self.choices, key=len) if name not in sample.images)
            raise DataError(
                f"part '{sample.id}' has no '{missing}', which this {self.name} model needs (it uses "
                f"{', '.join(self.modalities)}; the part has {', '.join(sample.images) or 'nothing'})"
            ) from None

    def _judge(self, samples: list[Sample], batch: Any) -> list[PartResult]:
        import torch

        device = self.detector.fitted.device
        with torch.inference_mode():
            prediction = self.detector(batch.to(device)).cpu()
        scores = prediction.score.double().numpy()
        maps = prediction.map.float().numpy()
        branches = {name: tensor.float().numpy() for name, tensor in prediction.branch_maps.items()}
        if not np.isfinite(scores).all():
            bad = samples[int(np.flatnonzero(~np.isfinite(scores))[0])]
            raise DataError(f"the score of part '{bad.id}' is not finite: check its files for extreme values")
        used = tuple(name for name in self.detector.required if name in batch.images)
        calibration = self.calibration_for(used)
        nothing = [None] * len(scores)
        p_values: Any = calibration.p_values(scores) if calibration else nothing
        rejects: Any = calibration.decide(scores) if calibration else nothing
        return [
            PartResult(
                sample=sample,
                score=float(scores[i]),
                map=maps[i],
                branch_maps={name: stack[i] for name, stack in branches.items()},
                p_value=None if p_values[i] is None else float(p_values[i]),
                decision=None if rejects[i] is None else "reject" if rejects[i] else "accept",
                used=used,
            )
            for i, sample in enumerate(samples)
        ]

    def _completion(self) -> dict[str, Any]:
        """What the header says of a completed detector, and of thresholds for parts that lack something."""
        said: dict[str, Any] = {}
        if isinstance(self.detector, Completion):
            said["completion"] = asdict(self.detector.config)
        if self.partial:
            said["partial"] = {names: calibration.to_dict() for names, calibration in self.partial.items()}
        return said

    @property
    def _inner(self) -> Detector:
        return self.detector.inner if isinstance(self.detector, Completion) else self.detector

    # -- one file ----------------------------------------------------------------------------------------------------

    def header(self) -> dict[str, Any]:
        """Everything about the model but its tensors, as JSON writes it. Holds no time and no path."""
        return {
            "format": FORMAT,
            "polyspect": __version__,
            "detector": self.name,
            "config": asdict(self._inner.config),
            "preparation": asdict(self.preparation),
            "depth_scale": self.scale.to_dict() if self.scale else None,
            "calibration": self.calibration.to_dict() if self.calibration else None,
            **self._completion(),
            **self.info,
        }

    def save(self, path: str | Path) -> Path:
        """Write the model to one safetensors file; the same model gives the same bytes."""
        write_tensors(Path(path), self.detector.state_dict(), self.header())
        return Path(path)

    @classmethod
    def load(cls, path: str | Path, device: str = "auto") -> Model:
        """Read a model file. No weights are looked for: the file holds every tensor.

        Raises:
            ModelFileError: no such file, damaged, cut short, not a fitted model.
            ConfigError: the device is not there.
        """
        from .fitting.engine import pick_accelerator

        header, tensors = read_tensors(Path(path))
        if "imported" in header:
            raise ModelFileError(
                f"'{path}' holds an imported checkpoint, no fitted model: fit one with it, "
                f"`polyspect fit --detector {header['imported']['detector']} --set checkpoint={path} ...`"
            )
        if "detector" not in header:
            raise ModelFileError(f"'{path}' is a checkpoint of an unfinished fit: run that fit again with --resume")
        kind = detector_class(header["detector"])
        detector: Detector = kind(build_config(kind.Config, header["config"]), pretrained=False)  # type: ignore[call-arg]
        detector.fitted.fill_(True)  # which can decide what a completion has to stand in for
        if header.get("completion"):
            detector = Completion(detector, build_config(CompletionConfig, header["completion"]))
        detector.load_tensors(tensors)
        detector.eval().requires_grad_(False).to(pick_accelerator(device))
        known = (
            "format", "polyspect", "detector", "config", "completion", "preparation", "depth_scale", "calibration",
            "partial",
        )  # fmt: skip
        return cls(
            name=header["detector"],
            detector=detector,
            preparation=build_config(Preparation, header["preparation"]),
            scale=DepthScale.from_dict(header["depth_scale"]) if header["depth_scale"] else None,
            calibration=Calibration.from_dict(header["calibration"]) if header["calibration"] else None,
            info={key: value for key, value in header.items() if key not in known},
            partial={names: Calibration.from_dict(values) for names, values in header.get("partial", {}).items()},
        )


def describe(path: str | Path) -> dict[str, Any]:
    """The header of a model file, without its tensors.

    Raises:
        ModelFileError: as `Model.load`.
    """
    return read_header(Path(path))
