"""What training has in common: Adam with a rate that may fall after each epoch; and which step a stage is at."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from ..samples import Features
from .contract import Optimise, require

Schedule = torch.optim.lr_scheduler.LRScheduler


class Recipe(Protocol):
    """The settings of a method's config that say how its students are trained."""

    @property
    def epochs(self) -> int:
        """Passes over the training parts."""

    @property
    def batch_size(self) -> int:
        """Parts per step."""

    @property
    def learning_rate(self) -> float:
        """Of the optimizer, at the start."""

    @property
    def betas(self) -> tuple[float, float]:
        """Of Adam."""

    @property
    def lr_decay(self) -> float:
        """What the learning rate is multiplied by after each epoch; 1 is none."""


def check_recipe(method: str, recipe: Recipe) -> None:
    """Check the settings of a recipe.

    Raises:
        ConfigError: one is out of range; names it.
    """
    for name in ("epochs", "batch_size"):
        require(method, getattr(recipe, name) >= 1, name, "at least 1", getattr(recipe, name))
    require(method, recipe.learning_rate > 0, "learning_rate", "above 0", recipe.learning_rate)
    require(method, 0 < recipe.lr_decay <= 1, "lr_decay", "above 0 and at most 1", recipe.lr_decay)
    betas_fit = len(recipe.betas) == 2 and all(0 <= beta < 1 for beta in recipe.betas)
    require(method, betas_fit, "betas", "two numbers in [0, 1)", recipe.betas)


def train(
    name: str,
    recipe: Recipe,
    parameters: Callable[[], Iterable[nn.Parameter]],
    loss: Callable[[Features], Mapping[str, Tensor]],
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
) -> Optimise:
    """The training stage called `name`: Adam, unless another `optimizer` is given, over `parameters` by the recipe.

    The learning rate is multiplied by `lr_decay` after every epoch.
    """
    return Optimise(
        name=name,
        parameters=parameters,
        loss=loss,
        optimizer=optimizer or partial(_adam, recipe),
        schedule=partial(torch.optim.lr_scheduler.ExponentialLR, gamma=recipe.lr_decay),
        epochs=recipe.epochs,
        batch_size=recipe.batch_size,
    )


class StepClock:
    """Tells a loss at which step of its stage it is, so that what it draws is the same after a kill and a resume.

    The engine steps a stage's schedule after every update and restores it; this looks at the schedule.
    """

    def __init__(self) -> None:
        self._schedule: weakref.ref[Schedule] | None = None  # of the stage that runs

    def keep(self, make: Callable[[torch.optim.Optimizer], Schedule], optimizer: torch.optim.Optimizer) -> Schedule:
        """The schedule that `make` makes of `optimizer`, kept in view; for `Optimise.schedule`, stepped every step."""
        schedule = make(optimizer)
        self._schedule = weakref.ref(schedule)
        return schedule

    @property
    def step(self) -> int:
        """Updates made so far in the stage that runs; 0 outside of one."""
        schedule = None if self._schedule is None else self._schedule()
        return 0 if schedule is None else schedule.last_epoch

    def generator(self, seed: int) -> torch.Generator:
        """The draws of this step: seeded by `seed`, the epoch (the engine's seed of it) and the step."""
        digest = hashlib.sha256(f"{seed} {torch.initial_seed()} {self.step}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _adam(recipe: Recipe, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Adam in one kernel for all parameters."""
    return torch.optim.Adam(parameters, lr=recipe.learning_rate, betas=recipe.betas, fused=True)
