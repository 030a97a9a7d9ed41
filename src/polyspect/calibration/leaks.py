"""Refuses to calibrate on files that are also tested: a threshold must not have seen the parts that judge it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..errors import CalibrationError

SHOWN = 5  # pairs that a message names


def check_no_leak(calibration_hashes: Mapping[str, Iterable[str]], test_hashes: Mapping[str, Iterable[str]]) -> None:
    """Check that no input file of a calibration part is, by content, an input file of a test part.

    Args:
        calibration_hashes: Part id -> sha256 of each of its input files (images and clouds; no masks, which are alike
            on all good parts, and no files that all parts share, such as camera parameters).
        test_hashes: The same for the test split.

    Raises:
        CalibrationError: names the parts on both sides and says what to do.
    """
    tested: dict[str, str] = {}
    for name, hashes in test_hashes.items():
        for digest in hashes:
            tested.setdefault(digest, name)
    leaks = {
        name: (tested[digest], digest)
        for name, hashes in calibration_hashes.items()
        for digest in hashes
        if digest in tested
    }
    if not leaks:
        return
    pairs = [f"'{name}' = test part '{other}' (sha256 {digest[:12]})" for name, (other, digest) in leaks.items()]
    more = f" and {len(pairs) - SHOWN} more" if len(pairs) > SHOWN else ""
    raise CalibrationError(
        f"{len(leaks)} of {len(calibration_hashes)} calibration parts share a file with the test split: "
        f"{', '.join(pairs[:SHOWN])}{more}; calibrate on good parts that are not tested (the data set's own validation "
        f"split), or take these parts out of one of the two"
    )
