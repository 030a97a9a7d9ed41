"""What all tests share: where the real data is, if it is here."""

from __future__ import annotations

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def osd_root() -> Path:
    """The real RGB + 3D data kept beside the repository; the test is skipped where it is absent."""
    root = SHARED / "data" / "osd_tabletop"
    if not root.is_dir():
        pytest.skip(f"no real data at {root}")
    return root
