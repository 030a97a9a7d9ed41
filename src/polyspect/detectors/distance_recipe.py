"""How the methods that learn signed distances of patches train them: the checks, the stage and the loss.

MDSS and Shape-Guided, whose networks and training are the same (`layers.signed_distance`). Patches are drawn anew at
every step from the features ``xyz.points``, ``part`` and ``xyz.centres`` (`layers.cloud_patches`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal, Protocol

import torch
from torch import Tensor

from ..layers.cloud_patches import draw_patches
from ..layers.signed_distance import SignedDistance, normalise_patches, sample_queries
from ..samples import Features
from .contract import Optimise, require
from .recipe import Schedule, StepClock


class DistanceRecipe(Protocol):
    """The settings of a method's config that say how signed distances are trained."""

    @property
    def patch(self) -> int:
        """Points of a patch."""

    @property
    def train_density(self) -> float:
        """Patches per `patch` points, those that are learned from."""

    @property
    def score_density(self) -> float:
        """And those that score a part."""

    @property
    def encoder_input(self) -> Literal["targets", "patch"]:
        """What the encoder sees while it is trained."""

    @property
    def queries(self) -> int | None:
        """Noisy points per patch and step; None: one per point."""

    @property
    def neighbour(self) -> int:
        """The noise is as wide as the distance to this neighbour in the patch, or half of it."""

    @property
    def distance_steps(self) -> int:
        """Updates."""

    @property
    def distance_batch(self) -> int:
        """Patches per step."""

    @property
    def distance_parts(self) -> int:
        """Parts per step that these patches come from."""

    @property
    def distance_rate(self) -> float:
        """Of Adam."""


def check_distance_recipe(method: str, recipe: DistanceRecipe) -> None:
    """Check the settings of a recipe, and the sizes ``code``, ``pooled``, ``width`` and ``depth`` beside them.

    Raises:
        ConfigError: one is out of range; names it.
    """
    for field in ("neighbour", "code", "width", "depth", "distance_steps", "distance_parts"):
        require(method, getattr(recipe, field) >= 1, field, "at least 1", getattr(recipe, field))
    for field in ("distance_rate", "train_density", "score_density"):
        require(method, getattr(recipe, field) > 0, field, "above 0", getattr(recipe, field))
    for field in ("distance_batch", "pooled"):
        require(method, getattr(recipe, field) >= 2, field, "at least 2", getattr(recipe, field))
    require(method, recipe.patch > recipe.neighbour, "patch", f"above `neighbour`, {recipe.neighbour}", recipe.patch)
    few = recipe.queries is None or 1 <= recipe.queries <= recipe.patch
    require(method, few, "queries", f"1 to `patch`, {recipe.patch}, or null", recipe.queries)


def train_distance(
    recipe: DistanceRecipe,
    network: SignedDistance,
    loss: Callable[[Features], Mapping[str, Tensor]],
    clock: StepClock,
    *,
    falls: bool,
) -> Optimise:
    """The stage ``distance``: Adam, its rate falling to 0 by half a cosine over the steps, or staying as it is."""
    return Optimise(
        name="distance",
        parameters=network.parameters,
        loss=loss,
        optimizer=partial(torch.optim.Adam, lr=recipe.distance_rate),
        schedule=partial(clock.keep, partial(_schedule, recipe.distance_steps, falls)),
        schedule_every="step",
        steps=recipe.distance_steps,
        batch_size=recipe.distance_parts,
    )


def distance_loss(
    recipe: DistanceRecipe, network: SignedDistance, features: Features, generator: torch.Generator
) -> Tensor:
    """Mean distance between pulled points and their targets, of patches drawn with `generator`; a scalar.

    Raises:
        DataError: no part of the batch has points for a patch.
    """
    clouds = features["xyz.points"], features["part"], features["xyz.centres"]
    with torch.autocast(features["part"].device.type, enabled=False):  # halves would blur a hundredth of a patch
        patches = normalise_patches(draw_patches(*clouds, recipe.distance_batch, recipe.patch, generator)).points
        queries = sample_queries(patches, generator, neighbour=recipe.neighbour, count=recipe.queries)
        return network.loss(queries, patches if recipe.encoder_input == "patch" else None)


def _schedule(steps: int, falls: bool, optimizer: torch.optim.Optimizer) -> Schedule:
    rate = torch.optim.lr_scheduler.LambdaLR
    return rate(optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2 if falls else 1.0)
