"""Peak memory of this process, for results that state it."""

from __future__ import annotations

import resource
import sys


def peak_rss_mib() -> float:
    """Largest resident set of this process so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
