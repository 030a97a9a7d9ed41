"""A run of updates that is no fit of a detector: its rates, its curve, its checkpoints, going on and ending early.

What pre-training (`pretraining`) and distillation (`pdn_distillation`) share. Who runs it says what the loss of a step
is, and draws all that is random in it from the step's number; so a run that was killed and resumed ends in the same
bits.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .modelfile import FORMAT, flatten_state, read_tensors, unflatten_state, write_tensors
from .progress import Progress

log = logging.getLogger(__name__)

CURVE_EVERY = 100  # steps whose losses are averaged to one entry of the curve


class Schedule(Protocol):
    """The part of a config that says how the learning rate runs."""

    @property
    def steps(self) -> int: ...

    @property
    def lr(self) -> float: ...

    @property
    def lowest_lr(self) -> float: ...

    @property
    def warmup(self) -> float: ...


class Outcome(NamedTuple):
    """What a run came to."""

    curve: list[tuple[int, float]]  # (updates so far, mean loss of the last 100)
    seconds: float  # of training in all runs, data included
    updates: int  # made in all
    cooled_from: int | None  # update after which the run was brought to an early end


def run_updates(
    name: str,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    loss: Callable[[int], Tensor],
    *,
    identity: str,
    begin: Callable[[Progress], None] | None = None,
    checkpoint: Path | None = None,
    resume: bool = False,
    save_every: float = 120.0,
    stop_after: int | None = None,
    cooldown: int | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Make `schedule.steps` updates of `network`.

    Args:
        name: What the progress bar calls the run.
        network: All that a checkpoint keeps beside the optimizer.
        optimizer: Of its parameters.
        schedule: How many updates, and at which rates.
        loss: Of the update of a number, from 0; a scalar.
        identity: Tells this run from another: settings, seed and data.
        begin: What a run does before its first update, and not when it goes on.
        checkpoint: File that is written now and then; None for none. Left behind at the end.
        resume: Go on from `checkpoint` where it is there.
        save_every: Seconds between two checkpoints.
        stop_after: Updates after which to save and stop, as if killed; None to go on to the end.
        cooldown: With `resume`: end the run early, after so many further updates, over which the rate falls linearly
            from where it is to the lowest. No checkpoint is written on the way.
        progress: Shows how far it is.

    Raises:
        ConfigError: a checkpoint of another run, nothing to cool down from, or a loss that is not finite.
    """
    start, before = 0, 0.0
    curve: list[tuple[int, float]] = []
    recent: list[float] = []
    if resume and checkpoint is not None and checkpoint.is_file():
        start, curve, recent, before = _load(checkpoint, identity, network, optimizer)
    elif resume:
        log.warning("nothing to resume: there is no checkpoint at '%s'; training from the start", checkpoint)
    rates, stop = plan_rates(schedule, start, stop_after, cooldown)
    checkpoint = None if cooldown is not None else checkpoint
    began = saved = time.monotonic()
    progress = progress or Progress()
    with progress:
        if begin is not None and start == 0:
            begin(progress)
        with progress.task(name, stop) as advance:
            advance(start)
            for step in range(start, stop):
                value = _update(optimizer, loss, step, rates[step])
                recent.append(value)
                if len(recent) == CURVE_EVERY or step + 1 == (stop if cooldown else schedule.steps):
                    curve.append((step + 1, sum(recent) / len(recent)))
                    recent = []
                advance(1, note=f"loss {sum(recent[-20:], value) / (len(recent[-20:]) + 1):.3g}")
                if checkpoint is not None and (time.monotonic() - saved > save_every or step + 1 == stop):
                    spent = before + time.monotonic() - began
                    _save(checkpoint, identity, network, optimizer, step + 1, curve, recent, spent)
                    saved = time.monotonic()
    seconds = before + time.monotonic() - began
    return Outcome(curve, seconds, max(start, stop), start if cooldown else None)


def learning_rate(config: Schedule, step: int) -> float:
    """The rate of update `step`, from 0: linear from `lowest_lr` to `lr`, then half a cosine back."""
    warm = int(config.warmup * config.steps)
    if step < warm:
        return config.lowest_lr + (config.lr - config.lowest_lr) * step / warm
    share = (step - warm) / max(1, config.steps - 1 - warm)
    return config.lowest_lr + (config.lr - config.lowest_lr) * (1 + math.cos(math.pi * share)) / 2


def plan_rates(config: Schedule, start: int, stop_after: int | None, cooldown: int | None) -> tuple[list[float], int]:
    """The rate of every update, and the update before which to stop, for a run of which `start` updates are made.

    Raises:
        ConfigError: nothing to cool down from, or fewer updates left than asked for.
    """
    if cooldown is not None and not (start > 0 and 1 <= cooldown <= config.steps - start):
        raise ConfigError(
            f"a cooldown of {cooldown} updates needs a checkpoint to go on from, and as many updates that are left: "
            f"{start} of {config.steps} are made"
        )
    stop = config.steps if stop_after is None else min(config.steps, stop_after)
    rates = [learning_rate(config, step) for step in range(config.steps)]
    if cooldown is not None:
        stop = start + cooldown
        fall = rates[start] - config.lowest_lr
        rates[start:stop] = [config.lowest_lr + fall * (1 - (n + 1) / cooldown) for n in range(cooldown)]
    return rates, stop


def _update(optimizer: torch.optim.Optimizer, loss: Callable[[int], Tensor], step: int, rate: float) -> float:
    for entry in optimizer.param_groups:
        entry["lr"] = rate
    found = loss(step)
    optimizer.zero_grad(set_to_none=True)
    found.backward()
    optimizer.step()
    value = float(found.detach())
    if not math.isfinite(value):
        raise ConfigError(f"the loss of update {step + 1} is {value}: lower `lr`, or check the data for wild values")
    return value


def _save(
    path: Path,
    identity: str,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    curve: list[tuple[int, float]],
    recent: list[float],
    seconds: float,
) -> None:
    """Write a checkpoint that `_load` goes on from."""
    tensors = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
    moments, plain = flatten_state(optimizer.state_dict(), "optimizer")
    header = {"format": FORMAT, "checkpoint": identity, "step": step, "curve": curve, "recent": recent}
    write_tensors(path, tensors | moments, header | {"seconds": seconds, "optimizer": plain})


def _load(
    path: Path, identity: str, network: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[int, list[tuple[int, float]], list[float], float]:
    """Bring network and optimizer to where `path` was written: updates made, curve, latest losses, seconds.

    Raises:
        ConfigError: the checkpoint is of another run.
    """
    header, tensors = read_tensors(path)
    if header.get("checkpoint") != identity:
        raise ConfigError(
            f"the checkpoint '{path}' is from another run (other settings, seed or data): "
            "train with the same ones, or without --resume to start anew"
        )
    network.load_state_dict({n.removeprefix("network."): t for n, t in tensors.items() if n.startswith("network.")})
    optimizer.load_state_dict(unflatten_state(tensors, header["optimizer"], "optimizer"))
    return header["step"], [(int(s), float(x)) for s, x in header["curve"]], header["recent"], header["seconds"]
