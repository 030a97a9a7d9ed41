"""Download one file beside its target, verify it, rename it: a target exists whole or not at all."""

from __future__ import annotations

import hashlib
import http.client
import os
import secrets
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from ..errors import WeightsError

TIMEOUT_S = 10.0  # for each wait on the network (connecting, one read), not for the whole file
_BLOCK = 1 << 20  # bytes read at once

Progress = Callable[[int, int | None], None]


class HubUnreachable(Exception):
    """The address did not deliver: no network, refused, timed out, broken off, or no such file there."""


def offline() -> bool:
    """Whether the environment forbids asking a hub (`HF_HUB_OFFLINE`, as huggingface_hub reads it)."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def hub_url(repository: str, file: str = "model.safetensors") -> str:
    """Address of a file in a Hugging Face repository; `HF_ENDPOINT` names a mirror."""
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    return f"{endpoint.rstrip('/')}/{repository}/resolve/main/{file}"


def download(
    url: str, target: Path, sha256: str = "", timeout: float = TIMEOUT_S, progress: Progress | None = None
) -> Path:
    """Fetch `url` to `target`, which appears only once it is complete and verified.

    Args:
        url: The address.
        target: The file to write; its folder is made.
        sha256: Expected hash or its first digits; ``""``: what the server states, if it does.
        timeout: Seconds for each wait on the network.
        progress: Called with (bytes so far, bytes in all or None).

    Raises:
        HubUnreachable: the address did not deliver a whole file.
        WeightsError: it delivered another file than expected (names both hashes), or `target` cannot be written.
    """
    redirects = _NotingRedirects()
    try:
        answer = urllib.request.build_opener(redirects).open(url, timeout=timeout)
    except urllib.error.HTTPError as error:
        raise HubUnreachable(f"HTTP {error.code} {error.reason}") from None
    except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
        raise HubUnreachable(str(getattr(error, "reason", "") or error)) from None
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with answer, open(partial, "xb") as file:
            digest = _copy(answer, file, progress)
            file.flush()
            os.fsync(file.fileno())
        expected = sha256 or redirects.stated
        if not digest.startswith(expected):
            raise WeightsError(f"{url} delivered a file with sha256 {digest}, expected {expected}; it was thrown away")
        os.replace(partial, target)
    except OSError as error:
        raise WeightsError(
            f"cannot write weights to {target.parent}: {error.strerror or error}; choose another weight folder"
        ) from None
    finally:
        with suppress(OSError):  # renamed by now, or never made
            partial.unlink()
    return target


def _copy(answer: Any, file: IO[bytes], progress: Progress | None) -> str:
    """Copy the body of an answer to `file`; its sha256."""
    length = answer.headers.get("Content-Length")
    total = int(length) if length else None
    digest, done = hashlib.sha256(), 0
    while block := _read(answer):
        digest.update(block)
        file.write(block)
        done += len(block)
        if progress is not None:
            progress(done, total)
    if total is not None and done != total:
        raise HubUnreachable(f"broken off after {done} of {total} bytes")
    return digest.hexdigest()


def _read(answer: Any) -> bytes:
    """One block of the body. A failure of the network is not taken for one of the disk."""
    try:
        return bytes(answer.read(_BLOCK))
    except (OSError, http.client.HTTPException) as error:
        raise HubUnreachable(f"broken off: {error or type(error).__name__}") from None


class _NotingRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects and notes the sha256 that Hugging Face states beside the one to its file store."""

    stated = ""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        """As the base class, after a look at the header."""
        digest = str(headers.get("X-Linked-Etag") or "").strip('"').lower()
        if len(digest) == 64 and all(digit in "0123456789abcdef" for digit in digest):
            self.stated = digest
        return super().redirect_request(req, fp, code, msg, headers, newurl)
