"""Progress of long work, shown or not: the engine and the evaluation report to a `Progress` and never print."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

Kind = type[BaseException] | None


class Progress:
    """Shows nothing; the base and the default of library calls.

    Use as a context manager. `task` is a context manager too and yields a function ``advance(n, note="")``.
    """

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    @contextmanager
    def task(self, name: str, total: int) -> Iterator[Any]:
        """Announce `total` units of work called `name`."""

        def advance(n: int = 1, note: str = "") -> None:
            return None

        yield advance


class TerminalProgress(Progress):
    """Bars on standard error when it is a terminal, else one line at the start and end of each task."""

    def __init__(self) -> None:
        self._bars: Any = None

    def __enter__(self) -> TerminalProgress:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bars

            self._bars = Bars(
                TextColumn("{task.description:<34}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    @contextmanager
    def task(self, name: str, total: int) -> Iterator[Any]:
        """Announce `total` units of work called `name`."""
        started = time.monotonic()
        if self._bars is not None:
            bar = self._bars.add_task(name, total=total, note="")
            yield lambda n=1, note="": self._bars.update(bar, advance=n, **({"note": note} if note else {}))
            return
        done, said, latest = 0, started, ""

        def advance(n: int = 1, note: str = "") -> None:
            nonlocal done, said, latest
            done, latest = done + n, note or latest
            if time.monotonic() - said > 15:  # a sign of life for logs, not a line per batch
                said = time.monotonic()
                _say(f"{name}: {done}/{total} {latest}")

        yield advance
        _say(f"{name}: {done}/{total} in {time.monotonic() - started:.1f} s {latest}")


def _say(text: str) -> None:
    print(f"  {text}".rstrip(), file=sys.stderr, flush=True)
