"""Where pretrained weights come from: known files and hashes, places to look, downloads, converters.

`resolve` finds and verifies a file; `list_weights`, `check` and `fetch` serve the command line; `convert` reads files.
Nothing here loads torch before a weight file is opened.
"""

from .catalogue import WeightsRow, check, fetch, list_weights
from .known import KNOWN, KnownWeights
from .resolve import WeightsFile, resolve, weight_folder

__all__ = [
    "KNOWN",
    "KnownWeights",
    "WeightsFile",
    "WeightsRow",
    "check",
    "fetch",
    "list_weights",
    "resolve",
    "weight_folder",
]
