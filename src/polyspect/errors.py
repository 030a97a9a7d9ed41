"""The exceptions that polyspect raises on purpose.

    PolyspectError
      ├─ DataError          a file, folder or split is not what it should be
      ├─ ShapeError         arrays do not fit each other
      ├─ ConfigError        a setting is unknown or out of range
      ├─ WeightsError       pretrained weights cannot be had, or are not what they claim
      ├─ NotFittedError     a detector was asked to score before it was fitted
      ├─ CalibrationError   a threshold cannot be set honestly
      ├─ ModelFileError     a model file is damaged or from another format
      └─ MissingExtraError  an optional dependency is needed and absent

Every message says what is wrong, where (file, sample or field), and what to do about it. The command line prints the
message alone, on one line, and exits with status 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PolyspectError(Exception):
    """Base of all exceptions that polyspect raises on purpose."""


class DataError(PolyspectError, ValueError):
    """A file, folder or split is missing, damaged or of the wrong kind."""


class ShapeError(PolyspectError, ValueError):
    """Arrays do not have the shapes that an interface promises."""


class ConfigError(PolyspectError, ValueError):
    """A setting is unknown, of the wrong type or out of range."""


class WeightsError(PolyspectError, RuntimeError):
    """Pretrained weights cannot be found, or do not fit the network."""


class NotFittedError(PolyspectError, RuntimeError):
    """A detector was asked for a prediction before it was fitted."""


class CalibrationError(PolyspectError, ValueError):
    """A decision threshold cannot be set honestly from the parts at hand."""


class ModelFileError(PolyspectError, ValueError):
    """A model file is damaged, incomplete, or written by an unknown format."""


class MissingExtraError(PolyspectError, ImportError):
    """An optional dependency is needed for this and is not installed."""


def nearest_names(name: str, known: Iterable[str]) -> str:
    """Say which known name was probably meant, and list them all: the tail of an 'unknown name' message."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return f"{hint}known: {', '.join(names)}"
