"""The methods: one file each. `DETECTORS` maps a method's name to where its class is; it is imported when used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from ..errors import ConfigError, nearest_names

if TYPE_CHECKING:
    from .contract import Detector

DETECTORS: dict[str, str] = {
    "patchcore": "polyspect.detectors.patchcore:PatchCore",
    "crd": "polyspect.detectors.crd:CRD",
    "mmrd": "polyspect.detectors.mmrd:MMRD",
    "reverse_distillation": "polyspect.detectors.reverse_distillation:ReverseDistillation",
    "forward_distillation": "polyspect.detectors.forward_distillation:ForwardDistillation",
    "btf": "polyspect.detectors.btf:BTF",
    "m3dm": "polyspect.detectors.m3dm:M3DM",
    "cfm": "polyspect.detectors.cfm:CFM",
    "ast": "polyspect.detectors.ast:AST",
    "cmdiad": "polyspect.detectors.cmdiad:CMDIAD",
    "mdss": "polyspect.detectors.mdss:MDSS",
}


def detector_class(name: str) -> type[Detector]:
    """The class of the method called `name`.

    Raises:
        ConfigError: no method of that name; names the nearest.
    """
    if name not in DETECTORS:
        raise ConfigError(f"unknown detector '{name}': {nearest_names(name, DETECTORS)}")
    module, _, cls = DETECTORS[name].partition(":")
    found: type[Detector] = getattr(importlib.import_module(module), cls)
    return found


def describe(name: str) -> str:
    """The first line of a method's module docstring, read without importing the method."""
    import ast
    from pathlib import Path

    module = DETECTORS[name].partition(":")[0].rpartition(".")[2]
    text = ast.get_docstring(ast.parse((Path(__file__).parent / f"{module}.py").read_text(encoding="utf-8")))
    return (text or "").split("\n", 1)[0]
