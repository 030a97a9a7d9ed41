"""A fit that is killed with SIGKILL and resumed ends in the same bytes as one that was left alone."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from polyspect.data.synthetic import write_dataset


def command(root: Path, out: Path, *more: str) -> list[str]:
    return [
        sys.executable, "-m", "polyspect", "fit", "--detector", "crd", "--preset", "fast", "--root", str(root),
        "--category", "washer", "--out", str(out), "--prepare", "size=64", "--set", "epochs=12",
        "--set", "batch_size=4", "--cache", str(out.parent / "cache"), *more,
    ]  # fmt: skip


@pytest.mark.slow
def test_killed_and_resumed_is_byte_identical(tmp_path: Path):
    root = tmp_path / "parts"
    write_dataset(root, ["washer"], train=10, validation=4, test_good=1, test_per_defect=1, size=64)
    whole, broken = tmp_path / "a" / "m.safetensors", tmp_path / "b" / "m.safetensors"
    for path in (whole, broken):
        path.parent.mkdir()
    subprocess.run(command(root, whole), check=True, capture_output=True)
    fit = subprocess.Popen(command(root, broken), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    checkpoint = broken.with_name("m.safetensors.checkpoint")
    deadline = time.monotonic() + 120
    while not checkpoint.exists():  # the first epoch is done, the fit is not
        assert fit.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(fit.pid, signal.SIGKILL)
    assert fit.wait() == -signal.SIGKILL
    assert not broken.exists()
    done = subprocess.run(command(root, broken, "--resume"), check=True, capture_output=True, text=True)
    assert "resuming at stage 1, epoch" in done.stderr
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (whole, broken)]
    assert digests[0] == digests[1]
    assert not checkpoint.exists()
