"""polyspect: find defects on parts from registered RGB, 3D and normal views, learning from good parts only.

    import polyspect as ps

    model = ps.fit("crd", preset="fast", root="data", category="bracket", out="bracket.safetensors")
    for part in ps.predict("bracket.safetensors", "new_parts/"):
        print(part.id, part.score, part.p_value, part.decision)
    results = ps.evaluate("bracket.safetensors", root="data", category="bracket", out="results")

Importing the package is instant; torch is loaded by the first call that needs it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .api import complete, evaluate, fit, load, predict
    from .detectors import DETECTORS
    from .model import Model, PartResult

_WHERE = {
    "complete": "api",
    "fit": "api",
    "load": "api",
    "predict": "api",
    "evaluate": "api",
    "Model": "model",
    "PartResult": "model",
    "DETECTORS": "detectors",
}

__all__ = ["DETECTORS", "Model", "PartResult", "__version__", "complete", "evaluate", "fit", "load", "predict"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'polyspect' has no attribute '{name}'")
    return getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
