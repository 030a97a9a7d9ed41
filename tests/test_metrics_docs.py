"""The Python blocks of the pages on metrics and calibration run as they are printed."""

import re
from pathlib import Path

import pytest

from polyspect.calibration import false_reject_bound, parts_for_average, parts_for_confidence

DOCS = Path(__file__).resolve().parents[1] / "docs"


def run_page(name):
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / name).read_text(encoding="utf-8"), flags=re.DOTALL)
    assert blocks
    names = {}
    for block in blocks:
        exec(compile(block, name, "exec"), names)
    return names


def test_metrics_page():
    names = run_page("metrics.md")
    assert names["low"] <= names["values"]["aupro@0.3"] <= names["high"]


def test_calibration_page_prints_the_statement_that_it_quotes():
    calibration = run_page("calibration.md")["calibration"]
    page = " ".join((DOCS / "calibration.md").read_text(encoding="utf-8").split())
    assert calibration.statement in page
    assert calibration.decide([0.2, 1.5]).tolist() == [False, True]


def test_calibration_page_tables_are_what_the_code_says():
    page = (DOCS / "calibration.md").read_text(encoding="utf-8")
    rows = [[cell.strip(" %") for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| ")]
    by_parts = [row for row in rows if len(row) == 3 and row[0].isdigit()]
    by_rate = [row for row in rows if len(row) == 4 and re.fullmatch(r"[\d.]+", row[0])]
    assert (len(by_parts), len(by_rate)) == (13, 6)
    for row in by_parts:
        n = int(row[0])
        expected = [100 / (n + 1), 100 * false_reject_bound(n, n, 0.95)]
        assert [float(row[1]), float(row[2])] == pytest.approx(expected, abs=0.0051)
    for row in by_rate:
        rate = float(row[0]) / 100
        assert int(row[1]) == parts_for_average(rate)
        assert [int(row[2]), int(row[3])] == [parts_for_confidence(rate), parts_for_confidence(rate, 0.99)]
