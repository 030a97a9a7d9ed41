"""AUROC, AP, F1 and AUPRO: exact over all distinct scores, from one sort. Needs numpy and scipy only."""

from .evaluate import StreamingMetrics, evaluate_maps, evaluate_parts, metric_names
from .intervals import PairedDifference, bootstrap, paired_difference
from .parts import PartPixels, ScoredParts
from .pro import LIMITS, aupro, aupro_sampled, pro_curve
from .ranking import auroc, average_precision, f1_max, precision_recall_curve, roc_curve

__all__ = [
    "LIMITS",
    "PairedDifference",
    "PartPixels",
    "ScoredParts",
    "StreamingMetrics",
    "aupro",
    "aupro_sampled",
    "auroc",
    "average_precision",
    "bootstrap",
    "evaluate_maps",
    "evaluate_parts",
    "f1_max",
    "metric_names",
    "paired_difference",
    "precision_recall_curve",
    "pro_curve",
    "roc_curve",
]
