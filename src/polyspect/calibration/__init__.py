"""Decision thresholds with a stated false-reject rate, conformal p-values, and a guard against leaks."""

from .leaks import check_no_leak
from .threshold import Calibration, calibrate, false_reject_bound, parts_for_average, parts_for_confidence

__all__ = [
    "Calibration",
    "calibrate",
    "check_no_leak",
    "false_reject_bound",
    "parts_for_average",
    "parts_for_confidence",
]
